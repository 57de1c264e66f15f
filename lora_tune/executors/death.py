"""Why a child process died, in words."""

import signal
from pathlib import Path
from typing import NamedTuple

HOST_OUT_OF_MEMORY = "killed by the kernel: the host ran out of memory"
PROC = Path("/proc")
CGROUPS = Path("/sys/fs/cgroup")


class Death(NamedTuple):
    """How a child ended."""

    reason: str
    out_of_host_memory: bool = False


def reason_of_death(returncode: int, *, kills_before: int | None, kills_now: int | None) -> Death:
    """Return why a process died, from how it ended and the kernel's count of out-of-memory kills.

    Args:
        returncode: As of ``subprocess.Popen``: below zero a signal.
        kills_before: The count when the process was started; None: not known.
        kills_now: And after its end.

    >>> reason_of_death(-11, kills_before=0, kills_now=0).reason
    'killed by signal 11 (SIGSEGV)'
    >>> reason_of_death(-9, kills_before=3, kills_now=4).reason
    'killed by the kernel: the host ran out of memory'
    >>> reason_of_death(71, kills_before=None, kills_now=None).reason
    'exit code 71'
    """
    if returncode >= 0:
        return Death(f"exit code {returncode}")
    number = -returncode
    counted = kills_before is not None and kills_now is not None and kills_now > kills_before
    if number == signal.SIGKILL and counted:
        return Death(HOST_OUT_OF_MEMORY, out_of_host_memory=True)
    return Death(f"killed by signal {number} ({_name_of(number)})")


def _name_of(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return "unknown"


def count_memory_kills(*, proc: Path = PROC, cgroups: Path = CGROUPS) -> int | None:
    """Return how many processes the kernel has killed for memory, in this process's cgroup.

    ``oom_kill`` of the cgroup's ``memory.events`` (version 2) or ``memory.oom_control`` (version 1), else
    that of the whole machine in ``/proc/vmstat``; None where none of them can be read.
    """
    places = [*_cgroup_files(proc, cgroups), proc / "vmstat"]
    counts = (_oom_kills(place) for place in places)
    return next((count for count in counts if count is not None), None)


def _cgroup_files(proc: Path, cgroups: Path) -> list[Path]:
    try:
        lines = (proc / "self" / "cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        below = path.lstrip("/")
        if controllers == "":
            found += [cgroups / below / "memory.events", cgroups / "memory.events"]
        elif "memory" in controllers.split(","):
            memory = cgroups / "memory"
            found += [memory / below / "memory.oom_control", memory / "memory.oom_control"]
    return found


def _oom_kills(place: Path) -> int | None:
    try:
        lines = place.read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    counts = dict(line.rsplit(" ", 1) for line in lines if " " in line)
    return int(counts["oom_kill"]) if "oom_kill" in counts else None
