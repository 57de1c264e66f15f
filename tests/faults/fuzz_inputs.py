"""Coverage-guided fuzzing of what reads people's files: study files, and rows in four kinds of data files.

    python tests/faults/fuzz_inputs.py --inputs 20000 --seed 0
    python tests/faults/fuzz_inputs.py --again FOLDER    # the inputs that an earlier run kept as bad

An input may be taken or refused with a ``LoraTuneError``. Anything else is a finding: another exception, a
message about a study file that is no good one (``bad_study_files.py``), a process that dies, or one that
takes more than 5 seconds of a core. Findings are kept with what is needed to see them again.

Inputs that reach a step from line to line that none has reached before join the corpus from which others are
made. Steps are counted with ``sys.settrace`` in ``lora_tune/study``, ``lora_tune/data`` and ``tomllib``; a
fork reads the inputs, so that the program outlives what kills a process.
"""

import argparse
import json
import os
import select
import signal
import sys
import tempfile
import time
import tomllib
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import count, islice
from pathlib import Path
from random import Random
from types import CodeType, FrameType
from typing import IO, Any, NoReturn

import psutil
from bad_study_files import assert_good_message
from campaign_results import record
from fuzz_mutations import DATA_KINDS, Input, mutated, seeds

import lora_tune
from lora_tune.data.estimate import estimate_data
from lora_tune.errors import LoraTuneError
from lora_tune.study.loader import load_study
from lora_tune.study.spec import DataSection

MOST_S = 5.0  # seconds of a core, an input
PACKAGE = Path(lora_tune.__file__).parent
WATCHED = (str(PACKAGE / "study"), str(PACKAGE / "data"), str(Path(tomllib.__file__).parent))


class Steps:
    """The steps from line to line that were taken in the watched files."""

    def __init__(self) -> None:
        self.known: set[tuple[CodeType, int, int]] = set()
        self.lines: set[tuple[str, int]] = set()
        self._new = False

    def of(self, call: Callable[[], str]) -> tuple[str, bool]:
        """Return what a call returns, and whether it took a step for the first time."""
        self._new = False
        sys.settrace(self._enter)
        try:
            return call(), self._new
        finally:
            sys.settrace(None)

    def _enter(self, frame: FrameType, event: str, argument: object) -> Any:
        code = frame.f_code
        if not code.co_filename.startswith(WATCHED):
            return None
        last = 0

        def step(frame: FrameType, event: str, argument: object) -> Any:
            nonlocal last
            if event == "line":
                key = (code, last, frame.f_lineno)
                if key not in self.known:
                    self.known.add(key)
                    self.lines.add((code.co_filename, frame.f_lineno))
                    self._new = True
                last = frame.f_lineno
            return step

        return step


def outcome_of(item: Input, folder: Path) -> str:
    """Read an input; return ``taken``, ``refused``, or what is wrong with how it was read."""
    path = folder / f"input.{'toml' if item.kind == 'study' else item.kind}"
    path.write_bytes(item.content)
    try:
        if item.kind == "study":
            load_study(path)
        else:
            data = DataSection(train=path.name, **item.options)
            estimate_data(data, seed=0, base_dir=folder)
    except LoraTuneError as error:
        return _judged(str(error), item, path)
    except BaseException:
        return traceback.format_exc()
    return "taken"


def _judged(message: str, item: Input, path: Path) -> str:
    if "Traceback" in message or not message.strip():
        return f"no message: {message}"
    if item.kind == "study":
        try:
            assert_good_message(message, path, item.content.count(b"\n") + 1)
        except AssertionError as error:
            return f"no good message: {error}"
    elif not message.replace("\n", "").isprintable():
        return f"no message that a terminal shows as it is: {message!a}"
    return "refused"


@dataclass(slots=True)
class Totals:
    """What a run has counted."""

    inputs: Counter[str] = field(default_factory=Counter)  # by kind
    outcomes: Counter[str] = field(default_factory=Counter)
    findings: Counter[str] = field(default_factory=Counter)  # by the last line of what went wrong
    lines: int = 0
    steps: int = 0
    corpus: int = 0

    def count(self, kind: str, outcome: str) -> None:
        """Count an input."""
        self.inputs[kind] += 1
        if outcome in ("taken", "refused"):
            self.outcomes[outcome] += 1
        else:
            self.findings[outcome.strip().split("\n")[-1][:200]] += 1


def inputs_from(
    seed: int, start: int, corpus: dict[str, list[Input]]
) -> Iterator[tuple[int, Input]]:
    """Yield numbered inputs without end, study files and data files in turn."""
    for number in count(start):
        random = Random(f"{seed}:{number}")
        kind = "study" if number % 2 == 0 else DATA_KINDS[number // 2 % len(DATA_KINDS)]
        known = corpus[kind]
        # the newest have reached what the others did not
        parent = random.choice(known[-20:] if random.random() < 0.5 else known)
        yield number, mutated(parent, random.choice(known), random)


def read_inputs(seed: int, numbers: range, folder: Path, kept: Path, out: int) -> None:
    """Read inputs, in a fork; what became of each goes to ``out`` as a line of JSON."""
    steps = Steps()
    corpus: dict[str, list[Input]] = {}
    for item in seeds():
        steps.of(partial(outcome_of, item, folder))
        corpus.setdefault(item.kind, []).append(item)
    for number, item in islice(inputs_from(seed, numbers.start, corpus), len(numbers)):
        about = [number, item.kind, item.options]
        (folder / "about.json").write_text(json.dumps(about))
        outcome, is_new = steps.of(partial(outcome_of, item, folder))
        if is_new:
            corpus[item.kind].append(item)
        if outcome not in ("taken", "refused"):
            keep(item, number, outcome, kept)
        size = sum(map(len, corpus.values()))
        told = [number, item.kind, outcome, len(steps.lines), len(steps.known), size]
        os.write(out, (json.dumps(told) + "\n").encode())


def keep(item: Input, number: int, why: str, kept: Path) -> None:
    """Keep a bad input with what is needed to see it again."""
    kept.mkdir(parents=True, exist_ok=True)
    (kept / f"{number}.input").write_bytes(item.content)
    about = {"kind": item.kind, "options": item.options, "why": why}
    (kept / f"{number}.json").write_text(json.dumps(about, indent=1) + "\n")


def run(num_inputs: int, seed: int, kept: Path) -> Totals:
    """Read inputs in forks until all are read; one that dies or hangs is a finding, the next goes on."""
    totals, start = Totals(), 0
    with tempfile.TemporaryDirectory(prefix="fuzz.") as name:
        folder = Path(name)
        while start < num_inputs:
            why, start = _run_fork(seed, range(start, num_inputs), folder, kept, totals)
            if why:
                number, kind, options = json.loads((folder / "about.json").read_text())
                path = folder / f"input.{'toml' if kind == 'study' else kind}"
                keep(Input(kind, path.read_bytes(), options), number, why, kept)
                totals.count(kind, why)
                start = number + 1
    return totals


def _run_fork(
    seed: int, numbers: range, folder: Path, kept: Path, totals: Totals
) -> tuple[str, int]:
    """Return why a fork ended early, or nothing, and the number of the input at which to go on."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        _be_child(partial(read_inputs, seed, numbers, folder, kept, writing))
    os.close(writing)
    done, slow = numbers.start, False
    with os.fdopen(reading, "rb") as told:
        for line in _lines_of(told, psutil.Process(child)):
            if line is None:
                os.kill(child, signal.SIGKILL)
                slow = True
                continue
            number, kind, outcome, totals.lines, totals.steps, totals.corpus = json.loads(line)
            totals.count(kind, outcome)
            done = number + 1
    _, status = os.waitpid(child, 0)
    if slow:
        return f"more than {MOST_S:.0f} s of a core", done
    ended = os.waitstatus_to_exitcode(status)
    if ended > 0:
        raise SystemExit("the fork failed of itself, not of an input")
    return (f"the process ended with {ended}" if ended else ""), done


def _be_child(work: Callable[[], None]) -> NoReturn:
    code = 1
    try:
        work()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _lines_of(told: IO[bytes], process: psutil.Process) -> Iterator[bytes | None]:
    """Yield what a process says, line by line; None when one line takes it too long."""
    used, began = None, False
    while True:
        ready, _, _ = select.select([told], [], [], 0.5)
        times = process.cpu_times()
        now = times.user + times.system
        if ready:
            line = told.readline()
            if not line:
                return
            used, began = now, True
            yield line
        elif began and used is not None and now - used > MOST_S:
            used = None
            yield None


def again(folder: Path) -> int:
    """Read the inputs that a run has kept; return how many are still bad."""
    bad = 0
    with tempfile.TemporaryDirectory(prefix="fuzz.") as name:
        for path in sorted(folder.glob("*.json")):
            about = json.loads(path.read_text())
            content = path.with_suffix(".input").read_bytes()
            outcome = outcome_of(Input(about["kind"], content, about["options"]), Path(name))
            bad += outcome not in ("taken", "refused")
            print(f"{path.stem}: {outcome}")
    return bad


def main(arguments: list[str] | None = None) -> int:
    """Run the program; 1 when there was a finding."""
    parser = argparse.ArgumentParser(description="Fuzz the readers of study files and data files.")
    parser.add_argument("--inputs", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, default=Path("fuzz-findings"), metavar="FOLDER")
    parser.add_argument("--again", type=Path, metavar="FOLDER")
    options = parser.parse_args(arguments)
    if options.again:
        return int(again(options.again) > 0)
    began = time.monotonic()
    totals = run(options.inputs, options.seed, options.keep)
    seconds = time.monotonic() - began
    tried = totals.inputs.total()
    print(
        f"{tried:,} inputs with seed {options.seed} in {seconds:.0f} s, {tried / seconds:.0f} a second"
    )
    print("  " + ", ".join(f"{number:,} {kind}" for kind, number in totals.inputs.most_common()))
    print(f"  {totals.outcomes['taken']:,} taken, {totals.outcomes['refused']:,} refused in words")
    print(f"  {totals.lines:,} lines, {totals.steps:,} steps, a corpus of {totals.corpus:,} inputs")
    print(
        f"  {totals.findings.total():,} findings"
        + (f", kept in {options.keep}" * bool(totals.findings))
    )
    for what, times in totals.findings.most_common():
        print(f"    {times:,} x {what}")
    record(
        "fuzzed-inputs",
        inputs=tried,
        seed=options.seed,
        lines=totals.lines,
        steps=totals.steps,
        findings=totals.findings.total(),
    )
    return int(totals.findings.total() > 0)


if __name__ == "__main__":
    sys.exit(main())
