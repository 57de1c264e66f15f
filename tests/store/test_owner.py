"""One coordinator for a study: real processes that hold the lock, are killed, and race for it."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lora_tune.errors import StoreError
from lora_tune.store.folder import StudyFolder
from lora_tune.store.mounts import Mount
from lora_tune.store.owner import OWNER_FILE, Owner, find_owner, held

LOCAL = Mount(point="/", kind="ext4", options=frozenset())
NFS = Mount(point="/", kind="nfs4", options=frozenset(("rw", "local_lock=none")))
SSHFS = Mount(point="/", kind="fuse.sshfs", options=frozenset(("rw",)))

HOLDER = """
import subprocess, sys
from pathlib import Path
from lora_tune.store.mounts import Mount
from lora_tune.store.owner import held
with held(Path(sys.argv[1]), mount=Mount(point="/", kind=sys.argv[2], options=frozenset())):
    child = subprocess.Popen(["sleep", "60"], stdout=subprocess.DEVNULL)
    print(child.pid, flush=True)
    sys.stdin.read()
"""
RACER = """
import sys, time
from pathlib import Path
from lora_tune.errors import StoreError
from lora_tune.store.folder import StudyFolder
print("ready", flush=True)
sys.stdin.readline()
store = StudyFolder(Path(sys.argv[1]))
try:
    with store.owned():
        (store.path / "runtime.json").write_text("{}")
        print("runs", flush=True)
        time.sleep(3)
except StoreError as error:
    print("refused", error, flush=True)
    sys.exit(error.exit_code)
"""


def start_holder(folder: Path, kind: str = "ext4") -> "tuple[subprocess.Popen[str], int]":
    """Start a process that holds the lock and has a child; return it and the child's id."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder), kind],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    return process, int(process.stdout.readline())


def end(process: "subprocess.Popen[str]", child: int) -> None:
    process.kill()
    process.communicate()
    os.kill(child, signal.SIGKILL)


@pytest.mark.parametrize("kind", ["ext4", "nfs4"])
def test_a_killed_owner_frees_the_study_at_once_though_its_children_live(
    tmp_path: Path, kind: str
) -> None:
    process, child = start_holder(tmp_path, kind)
    mount = Mount(point="/", kind=kind, options=frozenset())
    try:
        with pytest.raises(StoreError, match=f"pid {process.pid} on "), held(tmp_path, mount=mount):
            pytest.fail("owned by two")
        process.kill()
        process.communicate()
        os.kill(child, 0)  # it is still there
        began = time.monotonic()
        with held(tmp_path, mount=mount):
            assert time.monotonic() - began < 0.5
            text = (tmp_path / OWNER_FILE).read_text() if kind == "ext4" else ""
            assert text.startswith(f"pid {os.getpid()} ") or kind != "ext4"
    finally:
        end(process, child)


def test_the_text_of_a_dead_owner_does_not_matter(tmp_path: Path) -> None:
    for text in (
        f"pid {os.getppid()} on {socket.gethostname()}",
        "pid 1 on elsewhere",
        "\0\xff",
        "x",
    ):
        (tmp_path / OWNER_FILE).write_text(text, encoding="latin-1")
        for mount in (LOCAL, NFS):
            with held(tmp_path, mount=mount):
                pass


def test_where_locks_do_not_reach_other_machines_the_text_of_another_one_counts(
    tmp_path: Path,
) -> None:
    text = "pid 77 on node3, started 2026-01-15T09:30:00+00:00, boot 5f"
    (tmp_path / OWNER_FILE).write_text(text)
    with pytest.raises(StoreError) as caught, held(tmp_path, mount=SSHFS):
        pytest.fail("owned by two machines")
    assert str(caught.value) == (
        f"{tmp_path}: {tmp_path / OWNER_FILE} says that pid 77 on node3, started "
        "2026-01-15T09:30:00+00:00 runs this study, and on this file system (fuse.sshfs) a lock is not seen "
        "by other machines. If that process has ended, delete owner.lock and run the same command again."
    )
    assert (tmp_path / OWNER_FILE).read_text() == text
    (tmp_path / OWNER_FILE).write_text(text.replace("node3", socket.gethostname()))
    with held(tmp_path, mount=SSHFS):  # of this machine: its lock would be seen
        pass
    with held(tmp_path, mount=SSHFS):  # given back: the text is gone
        pass


def test_eight_started_at_once_are_one_owner_and_seven_refusals(tmp_path: Path) -> None:
    folder = tmp_path / "reports" / "study"
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", RACER, str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(8)
    ]
    for racer in racers:
        assert racer.stdout is not None
        assert racer.stdout.readline() == "ready\n"
    for racer in racers:
        assert racer.stdin is not None
        racer.stdin.write("go\n")
        racer.stdin.flush()
    said = [racer.communicate(timeout=30)[0].strip() for racer in racers]
    codes = [racer.returncode for racer in racers]
    assert sorted(codes) == [0, *[StoreError.exit_code] * 7], said
    winner = racers[codes.index(0)]
    refusals = [text for text in said if text.startswith("refused")]
    assert len(refusals) == 7
    assert all(f"(pid {winner.pid} on {socket.gethostname()}, started 20" in t for t in refusals)


def test_a_lock_that_its_last_owner_removed_is_made_anew(tmp_path: Path) -> None:
    # who waits for the lock has the old file open, and would hold a lock that nobody else can see
    folder = tmp_path / "study"
    for _ in range(3):
        with StudyFolder(folder).owned():
            inode = (folder / OWNER_FILE).stat().st_ino
            assert find_owner_elsewhere(folder) == os.getpid()
        assert not folder.exists(), inode


def find_owner_elsewhere(folder: Path) -> int | None:
    """Return the owner's id as another process sees it."""
    code = (
        "import json, sys; from pathlib import Path; from lora_tune.store.owner import find_owner; "
        "owner = find_owner(Path(sys.argv[1])); print(json.dumps(owner and owner.pid))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True
    )
    found: int | None = json.loads(done.stdout)
    return found


def test_who_only_looks_sees_the_owner_and_disturbs_nobody(tmp_path: Path) -> None:
    assert find_owner(tmp_path) is None
    process, child = start_holder(tmp_path)
    try:
        owner = find_owner(tmp_path)
        assert owner is not None
        assert (owner.pid, owner.host) == (process.pid, socket.gethostname())
        assert owner.boot == Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    finally:
        end(process, child)
    assert find_owner(tmp_path) is None
    with held(tmp_path):
        pass


def test_a_lock_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("text")
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / OWNER_FILE).symlink_to(precious)
    with (
        pytest.raises(StoreError, match="cannot be written"),
        StudyFolder(tmp_path / "study").owned(),
    ):
        pytest.fail("owned through a link")
    assert precious.read_text() == "text"


def test_the_text_says_who_and_reads_back() -> None:
    owner = Owner(pid=7, host="node-3.example", started="2026-01-15T09:30:00+00:00", boot="5f-1")
    assert Owner.parse(owner.text) == owner
    assert str(owner) == "pid 7 on node-3.example, started 2026-01-15T09:30:00+00:00"
    assert Owner.parse("pid 7 on node3") == Owner(pid=7, host="node3")  # an older version's
    assert Owner.parse("") is None
