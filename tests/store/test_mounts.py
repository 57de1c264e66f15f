"""Which file system a folder is on: samples of mountinfo as clusters, laptops and containers have them."""

from pathlib import Path

import pytest

from lora_tune.store.mounts import UNKNOWN, find_mount, mount_of

SAMPLE = """\
22 27 0:21 / /proc rw,relatime - proc proc rw
27 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw,errors=remount-ro
30 27 0:30 / /home rw,relatime shared:4 - nfs4 box:/home rw,vers=4.2,proto=tcp,local_lock=none
31 27 0:31 / /scratch rw,relatime - lustre 10.0.0.1@o2ib:/fs rw,flock,lazystatfs
32 27 0:32 / /scratch2 rw,relatime - lustre 10.0.0.1@o2ib:/fs rw,localflock
33 27 0:33 / /gpfs/work rw,relatime - gpfs work rw
34 27 0:34 / /mnt/share rw,relatime - cifs //srv/share rw,vers=3.1.1,nobrl
35 27 0:35 / /mnt/ssh rw,nosuid - fuse.sshfs me@far:/data rw,user_id=0
36 27 0:36 / /beegfs rw - beegfs beegfs_nodev rw
37 27 0:37 / /cephfs rw - ceph mon:/ rw,name=x
38 27 0:38 / /mnt/my\\040disk rw - 9p host rw,trans=virtio
39 27 8:1 / /home/me/local rw - xfs /dev/sda1 rw
40 27 0:40 / /old rw - nfs box:/old rw,vers=3,nolock,local_lock=all
41 27 0:41 / /over rw - overlay overlay rw,lowerdir=/a,upperdir=/b
42 27 0:42 / /usb rw - fuseblk /dev/sdb1 rw
43 27 8:2 / /twice rw - ext4 /dev/sdb2 rw
44 27 0:44 / /twice rw - nfs4 box:/twice rw,local_lock=none
"""


@pytest.mark.parametrize(
    ("path", "kind", "network", "shares_locks"),
    [
        ("/var/tmp/x", "ext4", False, True),
        ("/home/you/reports", "nfs4", True, True),
        ("/homestead", "ext4", False, True),
        ("/home/me/local/reports", "xfs", False, True),
        ("/scratch/reports", "lustre", True, True),
        ("/scratch2", "lustre", True, False),
        ("/gpfs/work/a/b", "gpfs", True, True),
        ("/mnt/share/a", "cifs", True, False),
        ("/mnt/ssh/a", "fuse.sshfs", True, False),
        ("/beegfs/a", "beegfs", True, False),
        ("/cephfs/a", "ceph", True, True),
        ("/mnt/my disk/reports", "9p", True, True),
        ("/old/a", "nfs", True, False),
        ("/over/a", "overlay", False, True),
        ("/usb/a", "fuseblk", False, True),
        ("/twice/a", "nfs4", True, True),  # mounted over: the last one is seen
    ],
)
def test_a_folder_is_on_the_longest_point_above_it(
    path: str, kind: str, network: bool, shares_locks: bool
) -> None:
    mount = find_mount(path, SAMPLE)
    assert (mount.kind, mount.is_network, mount.shares_locks) == (kind, network, shares_locks)


def test_nonsense_is_no_mount() -> None:
    for text in ("", "\n\n", "1 2 3", "a b c d / rw - ", SAMPLE.replace(" - ", " ")):
        assert find_mount("/home/x", text) == UNKNOWN
    assert not UNKNOWN.is_network


def test_this_machine_says_what_a_folder_is_on(tmp_path: Path) -> None:
    mount = mount_of(tmp_path / "not" / "yet" / "there")
    assert mount.kind
    assert str(tmp_path).startswith(mount.point)
    assert mount_of(Path("/proc")).kind == "proc"


def test_a_link_is_followed_to_what_it_leads_to(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("/proc")
    assert mount_of(tmp_path / "link").kind == "proc"
