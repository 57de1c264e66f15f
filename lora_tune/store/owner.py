"""One coordinator for a study: a lock of the system on ``owner.lock``, whose text says who holds it.

The lock counts, not the text: it is free the moment its owner is dead, whatever the text says. On a local
disk it is flock's; on a network file system a record lock, which servers know. Where a file system keeps
locks to each machine, the text is believed as well: then an owner on another machine may be alive.

Locks belong to an open file. Programs that the owner starts do not inherit it (Python opens files so), but a
plain fork would, and keep the study locked when the owner is dead: children are started anew, never forked.
A record lock is lost as soon as its process closes any other stream of the file, so nobody reads the text
of a study that this same process owns.
"""

import errno
import fcntl
import os
import re
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TextIO

from lora_tune.errors import StoreError
from lora_tune.store.mounts import Mount, mount_of

OWNER_FILE = "owner.lock"
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")

_HELD = (errno.EAGAIN, errno.EACCES)
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
# Who only looks holds the lock for an instant, and who has just taken it has not yet written who it is.
_TRIES, _PAUSE_S = 6, 0.1

_FORM = re.compile(
    r"pid (?P<pid>\d+) on (?P<host>[^,\n]+)(?:, started (?P<started>[^,\n]+))?(?:, boot (?P<boot>\S+))?"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Owner:
    """Who runs a study."""

    pid: int
    host: str
    started: str = ""  # ISO 8601, UTC; empty in the lock of an older version
    boot: str = ""  # id of the host's running system

    @classmethod
    def this_process(cls) -> "Owner":
        """Return this process, as of now."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        return cls(pid=os.getpid(), host=socket.gethostname(), started=now, boot=_boot_id())

    @classmethod
    def parse(cls, text: str) -> "Owner | None":
        """Return what a lock's text says; None for an empty one, or one that is no owner's.

        >>> Owner.parse("pid 7 on node3, started 2026-01-15T09:30:00+00:00, boot 5f").host
        'node3'
        """
        found = _FORM.match(text)
        if found is None:
            return None
        return cls(
            pid=int(found["pid"]),
            host=found["host"].strip(),
            started=found["started"] or "",
            boot=found["boot"] or "",
        )

    @property
    def text(self) -> str:
        """What is written into the lock."""
        return f"{self}, boot {self.boot}" if self.boot else str(self)

    def __str__(self) -> str:
        """Return what people are told."""
        started = f", started {self.started}" if self.started else ""
        return f"pid {self.pid} on {self.host}{started}"


@contextmanager
def held(folder: Path, *, mount: Mount | None = None) -> Iterator[None]:
    """Hold the lock of a study's folder, made if it is not there.

    Args:
        folder: Of the study.
        mount: What the folder is on; found if not given.

    Raises:
        StoreError: Another process holds it, or there is no lock to be had here.
        OSError: The file cannot be opened or written.
    """
    mount = mount or mount_of(folder)
    with _locked_stream(folder, mount) as stream:
        stream.seek(0)
        before = Owner.parse(stream.read())
        if not mount.shares_locks and before is not None and before.host != socket.gethostname():
            raise StoreError(
                f"{folder}: {folder / OWNER_FILE} says that {before} runs this study, and on this file "
                f"system ({mount.kind}) a lock is not seen by other machines. If that process has ended, "
                f"delete {OWNER_FILE} and run the same command again."
            )
        stream.seek(0)
        stream.truncate()
        stream.write(Owner.this_process().text)
        stream.flush()
        try:
            yield
        finally:
            stream.truncate(0)


def find_owner(folder: Path) -> Owner | None:
    """Return who holds the lock of a study's folder now, None when nobody does.

    Not for a process that holds it itself. An owner that did not write who it is has pid 0.
    """
    path, mount = folder / OWNER_FILE, mount_of(folder)
    try:
        stream = path.open("r", encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return None
    with stream:
        owner = Owner.parse(stream.read())
        away = owner is not None and owner.host != socket.gethostname()
        if not mount.shares_locks and away:
            return owner
        try:
            _lock(stream.fileno(), mount, shared=True)
        except OSError as error:
            if error.errno not in _HELD:
                return None  # no locks here: nobody can hold one
            return owner or Owner(pid=0, host="an unknown host")
    return None


def _locked_stream(folder: Path, mount: Mount) -> TextIO:
    """Return the lock's file, open and locked; it is the one that the name means, not one removed since."""
    text = ""
    for _ in range(_TRIES):
        stream = _open(folder)
        try:
            _lock(stream.fileno(), mount, shared=False)
            if _is_named(stream, folder / OWNER_FILE):
                return stream
            stream.close()
            continue
        except OSError as error:
            stream.seek(0)
            text = stream.read()
            stream.close()
            if error.errno in _NO_LOCKS:
                raise StoreError(
                    f"{folder}: files cannot be locked on this file system ({mount.kind or 'unknown'}: "
                    f"{error.strerror}), so two runs could write the same study. Set study.output to a "
                    "folder on a local disk."
                ) from error
            if error.errno not in _HELD:
                raise
        time.sleep(_PAUSE_S)
    raise StoreError(
        f"{folder}: this study is being run by another process ({Owner.parse(text) or 'unknown'}). "
        "Wait for it, or stop it and run the same command again."
    )


def _open(folder: Path) -> TextIO:
    """Open the lock's file, made with its folder if it is not there; a link is not followed."""
    folder.mkdir(parents=True, exist_ok=True)
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    return os.fdopen(
        os.open(folder / OWNER_FILE, flags, 0o666), "r+", encoding="utf-8", errors="replace"
    )


def _lock(handle: int, mount: Mount, *, shared: bool) -> None:
    operation = (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB
    take = fcntl.lockf if mount.is_network else fcntl.flock
    take(handle, operation)


def _is_named(stream: TextIO, path: Path) -> bool:
    """Return whether the path still means this file: the last owner may have removed it, unused."""
    try:
        return os.path.samestat(os.fstat(stream.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _boot_id() -> str:
    try:
        return BOOT_ID.read_text(encoding="ascii").strip()
    except OSError:
        return ""
