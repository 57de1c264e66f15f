"""What the coordinator of a study takes: memory beyond its imports, and its share of the time.

    python benchmarks/coordinator.py STUDY.toml [--output benchmarks/results/coordinator-cpu.json]

Runs the study and reads the coordinator's resident memory and processor time ten times a second. Its imports
are what a process holds that has imported the same modules. The share of the time is its processor time from
the first trial on, over the seconds from there to the last outcome; reading the inputs before and
writing the reports after it are not in it, and given beside it.
"""

import argparse
import json
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import psutil
from machine import describe_run

MIB = 2**20
IMPORTS = (
    "import psutil, lora_tune.tuner, lora_tune.report; print(psutil.Process().memory_info().rss)"
)


def imports_bytes() -> int:
    """Return the resident bytes of a process that has imported what the coordinator imports."""
    found = subprocess.run(
        [sys.executable, "-c", IMPORTS], check=True, capture_output=True, text=True
    )
    return int(found.stdout.split()[-1])


def measure(study: Path) -> dict[str, float]:
    """Run the study; return bytes and seconds of its coordinator."""
    spec = tomllib.loads(study.read_text(encoding="utf-8"))
    name = spec.get("study", {}).get("name") or study.stem
    folder = Path(spec.get("study", {}).get("output", "reports")) / name
    imported = imports_bytes()
    began = time.monotonic()
    process = psutil.Popen(
        [sys.executable, "-m", "lora_tune.cli", "run", str(study), "--quiet"],
        stdout=subprocess.DEVNULL,
    )
    peak, cpu_s, first, last = 0, 0.0, None, (0.0, 0.0)
    while process.poll() is None:
        try:
            peak = max(peak, process.memory_info().rss)
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            break
        cpu_s, now = times.user + times.system, time.monotonic() - began
        if first is None and (folder / "trials").is_dir():
            first = (now, cpu_s)
        if not (folder / "adapter").is_dir():
            last = (now, cpu_s)
        time.sleep(0.1)
    if process.wait() or first is None:
        raise SystemExit(f"the study ended with {process.returncode}")
    wall_s, training_cpu_s = last[0] - first[0], last[1] - first[1]
    return {
        "imports_mib": round(imported / MIB),
        "peak_beyond_imports_mib": round((peak - imported) / MIB),
        "training_wall_s": round(wall_s, 1),
        "training_cpu_s": round(training_cpu_s, 2),
        "share_of_time": round(training_cpu_s / wall_s, 4),
        "whole_wall_s": round(time.monotonic() - began, 1),
        "whole_cpu_s": round(cpu_s, 1),
    }


def main() -> None:
    """Measure and print, and write JSON where asked to."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("study", type=Path)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    found = describe_run("cpu") | {"coordinator": measure(options.study)}
    text = json.dumps(found, indent=1) + "\n"
    print(text, end="")
    if options.output is not None:
        options.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
