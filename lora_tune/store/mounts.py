"""Which file system a folder is on, and what it keeps of the promises that SQLite and locks need.

Read from ``/proc/self/mountinfo`` (its fields: proc(5)). A write-ahead log needs memory that all who open the
database share, so it is for one machine's own disks. A lock that another machine does not see is no lock.
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path

MOUNTS = Path("/proc/self/mountinfo")

# Kinds whose files other machines may see. What begins with "fuse" is one unless it is known to be local.
NETWORK_KINDS = frozenset(
    (
        *(
            "nfs",
            "nfs4",
            "cifs",
            "smb3",
            "smbfs",
            "lustre",
            "gpfs",
            "beegfs",
            "beegfs_nodev",
            "ceph",
        ),
        *(
            "9p",
            "afs",
            "glusterfs",
            "orangefs",
            "pvfs2",
            "panfs",
            "wekafs",
            "virtiofs",
            "ocfs2",
            "gfs2",
        ),
    )
)
LOCAL_FUSE = frozenset(("fuseblk", "fuse.ntfs-3g", "fuse.fuse-overlayfs", "fusectl"))
# Kinds whose record locks (fcntl) all machines see, unless an option of the mount says otherwise.
_SHARING_KINDS = frozenset(("nfs", "nfs4", "cifs", "smb3", "gpfs", "ceph", "9p", "ocfs2", "gfs2"))
_KEEPS_LOCKS_TO_ITSELF = frozenset(("nolock", "local_lock=all", "local_lock=posix", "nobrl"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Mount:
    """A mounted file system: where, of which kind, and the options of mount and file system."""

    point: str
    kind: str  # "ext4", "nfs4", "fuse.sshfs"; empty: not known
    options: frozenset[str]

    @property
    def is_network(self) -> bool:
        """Whether other machines may see the same files."""
        is_fuse = self.kind.startswith("fuse") and self.kind not in LOCAL_FUSE
        return is_fuse or self.kind in NETWORK_KINDS

    @property
    def shares_locks(self) -> bool:
        """Whether all who can open a file here see each other's record locks on it."""
        if not self.is_network:
            return True
        if self.kind == "lustre":
            return "flock" in self.options
        return self.kind in _SHARING_KINDS and not self.options & _KEEPS_LOCKS_TO_ITSELF


UNKNOWN = Mount(point="/", kind="", options=frozenset())


def mount_of(folder: Path) -> Mount:
    """Return the mount that a folder is on, or will be; ``UNKNOWN`` where the system does not say."""
    try:
        text = MOUNTS.read_text(encoding="utf-8", errors="surrogateescape")
    except OSError:
        return UNKNOWN
    return find_mount(os.path.realpath(folder), text)


def find_mount(path: str, mountinfo: str) -> Mount:
    r"""Return the mount that an absolute path without links is on, from the text of mountinfo.

    Of mounts on the same point the last one is seen, and of points above a path the longest.

    >>> line = "36 35 98:0 / /data\\040sets rw,noatime shared:1 - nfs4 box:/x rw,local_lock=none"
    >>> find_mount("/data sets/reports", line).kind
    'nfs4'
    >>> find_mount("/data sets2", line).kind
    ''
    """
    found = UNKNOWN
    for line in mountinfo.splitlines():
        before, separator, after = line.partition(" - ")
        fields, rest = before.split(" "), after.split(" ")
        if not separator or len(fields) < 6 or not rest[0]:
            continue
        point = re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), fields[4])
        above = path == point or path.startswith(point.rstrip("/") + "/")
        if above and len(point) >= len(found.point):
            options = [*fields[5].split(","), *",".join(rest[2:]).split(",")]
            found = Mount(point=point, kind=rest[0], options=frozenset(options))
    return found
