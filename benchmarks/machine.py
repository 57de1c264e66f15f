"""What the speed benchmarks share: the machine and its packages, a clock, memory peaks, result files.

A result file says on which machine, with which packages, which code and which command it was made.
It is written whole or not at all, as often as there is something new.
"""

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil
import torch

PACKAGES = ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "optuna")


def default_device() -> str:
    """Return ``cuda`` where torch can use it, else ``cpu``."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def describe_run(device: str) -> dict[str, object]:
    """Return the head of a result file: when, by which command and code, on what, with which packages."""
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": _command(sys.argv),
        "code": _code_version(),
        "hardware": hardware(device),
        "versions": package_versions(),
    }


def _command(arguments: Sequence[str]) -> str:
    """Return the command as typed in the repository, of files elsewhere the names alone.

    >>> _command(["/somewhere/benchmarks/packs.py", "--small", "--output", "/tmp/x/packs.json"])
    'python benchmarks/packs.py --small --output packs.json'
    """
    script, *rest = arguments
    shown = [Path(part).name if Path(part).is_absolute() else part for part in rest]
    return " ".join(["python", f"benchmarks/{Path(script).name}", *shown])


def hardware(device: str) -> dict[str, object]:
    """Return what decides speed: CPU, cores, threads, memory, and the GPU if it is used."""
    found: dict[str, object] = {
        "device": device,
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"),
        "host_memory_bytes": psutil.virtual_memory().total,
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "gpu": properties.name,
            "gpu_memory_bytes": properties.total_memory,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda,
        }
    return found


def package_versions() -> dict[str, str | None]:
    """Return the packages' versions, None for one that is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def seconds_of(work: Callable[[], object], device: str) -> float:
    """Return how long ``work`` takes, until the device has done all of it."""
    synchronize(device)
    begin = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - begin


def synchronize(device: str) -> None:
    """Wait until the device has done all that was asked of it."""
    if device == "cuda":
        torch.cuda.synchronize()


def forget_peak(device: str) -> None:
    """Begin a new reading of the peak; on CUDA cached blocks are given back first."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def memory_bytes(device: str) -> int:
    """Return the allocator's peak since ``forget_peak``; on a CPU what the process holds now."""
    if device == "cuda":
        return int(torch.cuda.max_memory_allocated())
    return int(psutil.Process().memory_info().rss)


def write_result(path: Path, result: Mapping[str, object]) -> None:
    """Write a result file in one step, so that a run that is cut leaves the one before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    part.replace(path)


def read_result(path: Path) -> dict[str, object]:
    """Return the object in a JSON file, a result or a config.

    Raises:
        SystemExit: There is none, or it is not JSON.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SystemExit(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise SystemExit(f"{path}: no JSON ({error})") from error
    if not isinstance(found, dict):
        raise SystemExit(f"{path}: no object; the top level is a {type(found).__name__}")
    return found


def machine_line(result: Mapping[str, object]) -> str:
    """Return a sentence for a document: the machine and the packages of a result file."""
    machine, versions = result["hardware"], result["versions"]
    assert isinstance(machine, Mapping)
    assert isinstance(versions, Mapping)
    where = machine.get("gpu") or f"{machine['cpu']}, {machine['cores']} cores"
    packages = ", ".join(f"{name} {text}" for name, text in versions.items() if text)
    return f"{where}; {packages}."


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table.

    >>> print(markdown_table(["lanes", "tokens/s"], [["1", "118"]]))
    | lanes | tokens/s |
    |---|---|
    | 1 | 118 |
    """
    lines = [header, ["---"] * len(header), *rows]
    text = [f"| {' | '.join(cells)} |" for cells in lines]
    text[1] = "|" + "---|" * len(header)
    return "\n".join(text)


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _code_version() -> str | None:
    """Return the commit, marked if the work tree differs from it; None outside a checkout."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
