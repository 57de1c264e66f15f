"""All campaigns of faults, and the table of docs/reliability.md from what they counted.

    python tests/faults/campaign.py [--only NAME] [--quick] [--take FOLDER]

What is run are the tests that hand numbers to ``campaign_results.record``, those with the marker ``campaign``
included, and the fuzzer, ``fuzz_inputs.py``; of some others the cases are counted. What they record takes
the place of their earlier entry in benchmarks/results/reliability.json, each with its date; the rest of the
file stays. One that fails leaves its entry as it was, and the exit code says so.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from campaign_results import FOLDER_VARIABLE, record, recorded

ROOT = Path(__file__).parents[2]
RESULT = ROOT / "benchmarks" / "results" / "reliability.json"
PAGE = ROOT / "docs" / "reliability.md"
BEGIN, END = "<!-- campaign: begin -->", "<!-- campaign: end -->"
FUZZ = "fuzz"
FUZZER = ROOT / "tests" / "faults" / "fuzz_inputs.py"
PACKAGES = ("torch", "transformers", "peft", "optuna", "sqlalchemy", "pydantic")

# Name: the module and the beginning of the tests whose cases are counted.
CASES = {
    "out-of-memory-forms": ("test_out_of_memory_forms", "test_every_form_is_recognised"),
    "planted-numbers": ("test_planted_numbers", "test_"),
    "file-safety": ("test_file_safety", "test_"),
}
# What a campaign does, for the table; one that is not here is shown by its name.
TITLES = {
    "bad-study-values": "study files with a value that cannot be, key by key",
    "child-kills": "kill -9 of a training child, at moments drawn with a seed",
    "coordinator-kills": "kill -9 of the coordinator, then the same command again",
    "damaged-databases": "databases cut, emptied, overwritten or with bits flipped, then `doctor --rebuild`",
    "database-outages": "PostgreSQL stopped and started again while a study runs",
    "dirty-data-sets": "data sets with broken, mixed, hostile or missing rows",
    "file-safety": "code, links and archives in models and study folders, secrets in output",
    "full-disk": "the disk is full at a given file of a study; room is made, the same command again",
    "fuzzed-inputs": "fuzzing of the study loader and the data reader",
    "hostile-study-files": "study files made to hang, crash or escape",
    "large-file-to-splits": "a data file of 100 MB read into splits: resident memory against its size",
    "large-files": "data files of 100 MB of every kind read: resident memory against their size",
    "nasty-paths": "study and data folders with odd names and missing rights",
    "out-of-memory-forms": "the ways in which running out of memory is reported",
    "planted-numbers": "NaN, Inf, -Inf and absurd numbers planted in ten places; none wins",
    "publishing-kills": "kill -9 while an adapter is published, fresh or over a good one; PEFT beside it",
    "real-child-kills": "kill -9 of a training child that trains a real model",
    "real-coordinator-kills": "kill -9 of the coordinator of a real model, then the same command",
    "stops": "SIGINT, SIGTERM and SIGHUP while a real study loads, settles, trains, evaluates, saves",
    "slurm": "a Slurm job (stand-ins for Slurm's programs) that the time limit stops and that goes on",
}


def main() -> int:
    """Run what is asked for, keep what it recorded, write the table; return the exit code."""
    options = _options()
    failed = False
    if options.take:
        _keep(recorded(options.take), quick=options.quick)
    else:
        with tempfile.TemporaryDirectory(prefix="lora-tune-campaign-") as name:
            failed = not _run(Path(name), only=options.only, quick=options.quick)
            _keep(recorded(Path(name)), quick=options.quick)
    _write_table()
    return 1 if failed else 0


def _run(folder: Path, *, only: str, quick: bool) -> bool:
    """Run the campaigns; return whether all of them ended well."""
    environ = {**os.environ, FOLDER_VARIABLE: str(folder), "HF_HUB_OFFLINE": "1"}
    environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    commands = []
    junit = folder / "tests.xml"
    if only != FUZZ:
        marker = "not slow and not gpu and not network" + (" and not campaign" if quick else "")
        command = [sys.executable, "-m", "pytest", "-q", "-rs", "-m", marker, f"--junitxml={junit}"]
        commands.append(command + _modules() + (["-k", only] if only else []))
    if only in ("", FUZZ) and FUZZER.exists():
        commands.append([sys.executable, str(FUZZER.relative_to(ROOT))])
    codes = []
    for command in commands:
        began = time.monotonic()
        print("$", *command[1:], flush=True)
        codes.append(subprocess.run(command, cwd=ROOT, env=environ, check=False).returncode)
        print(f"exit code {codes[-1]} after {time.monotonic() - began:.0f} s", flush=True)
    if junit.exists():
        os.environ[FOLDER_VARIABLE] = str(folder)
        _count_cases(junit, only=only)
    return not any(codes)


def _modules() -> list[str]:
    """Return the test modules that record numbers or whose cases are counted."""
    counted = {module for module, _ in CASES.values()}
    return [
        str(path.relative_to(ROOT))
        for path in sorted((ROOT / "tests").rglob("test_*.py"))
        if path.stem in counted or "campaign_results" in path.read_text(encoding="utf-8")
    ]


def _count_cases(junit: Path, *, only: str) -> None:
    """Record how many cases of some tests ran, and how many passed; of a part nothing is recorded."""
    cases = list(ElementTree.parse(junit).iter("testcase"))  # our own pytest wrote it
    for name, (module, begins) in CASES.items():
        mine = [
            case
            for case in cases
            if case.get("classname", "").endswith(f".{module}")
            and case.get("name", "").startswith(begins)
            and case.find("skipped") is None
        ]
        bad = [c for c in mine if c.find("failure") is not None or c.find("error") is not None]
        if mine and (not only or name.replace("-", "_") in only.split()):
            record(name, cases=len(mine), passed=len(mine) - len(bad))


def _keep(found: list[dict[str, object]], *, quick: bool) -> None:
    """Put what was recorded into the result file, in place of what these campaigns recorded before."""
    earlier = _result().get("campaigns", {})
    campaigns = {**earlier, **{str(one["campaign"]): _entry(one, quick=quick) for one in found}}
    result = {
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": "python tests/faults/campaign.py",
        "campaigns": dict(sorted(campaigns.items())),
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def _entry(found: dict[str, object], *, quick: bool) -> dict[str, object]:
    kept = {"date": found["date"], "numbers": found["numbers"], "machine": _machine()}
    return {**kept, "quick": True} if quick else kept


def _machine() -> dict[str, object]:
    """Return on what it ran, without the machine's name."""
    return {
        "cores": os.cpu_count(),
        "system": platform.system(),
        "python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
    }


def _result() -> dict[str, Any]:
    return json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.exists() else {}


def _write_table() -> None:
    """Write the table between its markers in the page."""
    page = PAGE.read_text(encoding="utf-8")
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(f"{before}{BEGIN}\n{_table()}{END}{after}", encoding="utf-8")


def _table() -> str:
    rows = ["| campaign | what was counted | run on |", "|---|---|---|"]
    for name, found in _result().get("campaigns", {}).items():
        numbers = ", ".join(_counted(key, value) for key, value in found["numbers"].items())
        title = TITLES.get(name, name.replace("-", " "))
        quick = " (short form)" if found.get("quick") else ""
        rows.append(f"| {title} | {numbers} | {found['date']}{quick} |")
    return "\n".join(rows) + "\n"


def _counted(key: str, value: object) -> str:
    """Return a number with its name, as people read it.

    >>> _counted("trials_lost", 0)
    '0 trials lost'
    >>> _counted("inputs", 20000)
    '20,000 inputs'
    >>> _counted("slowest_s", 1.8)
    'slowest 1.8 s'
    >>> _counted("python", "3.11")
    'python: 3.11'
    """
    if key.endswith("_s"):
        return f"{key.removesuffix('_s').replace('_', ' ')} {value:,} s"
    name = key.replace("_", " ")
    if isinstance(value, str):
        return f"{name}: {value}"
    return f"{value:,} {name}"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--only", default="", help=f"tests of this name, or {FUZZ}")
    parser.add_argument("--quick", action="store_true", help="the short form of the normal tests")
    parser.add_argument(
        "--take", type=Path, help="run nothing, take what campaigns have recorded in this folder"
    )
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
