"""``lora-tune run``: run a study to its end, or go on with one."""

import json
import os
import sys
from collections.abc import Callable
from contextlib import ExitStack
from datetime import UTC, datetime
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING

from lora_tune.commands.place import check_study_place
from lora_tune.errors import LoraTuneError
from lora_tune.metrics import check_metrics
from lora_tune.records import StudySnapshot
from lora_tune.redaction import redact
from lora_tune.report.terminal import open_console
from lora_tune.store.find import find_study
from lora_tune.store.folder import StudyFolder
from lora_tune.study.loader import load_study
from lora_tune.trackers import check_trackers

if TYPE_CHECKING:
    from lora_tune.report.events import Event, View


def run(study: str, *, command: str, allow_code: bool, as_json: bool, quiet: bool) -> None:
    """Run the study and print its report.

    Args:
        study: A study file, or a started study as ``store.find`` knows it.
        command: The command line, for the record.
        allow_code: Whether ``select.metrics`` may name functions of the user's own modules.
        as_json: Print events as they happen, a line each, instead of the report.
        quiet: Say nothing while it runs.
    """
    path = _study_file(study)
    spec = load_study(path)
    check_metrics(spec.select.metrics, allow_code=allow_code)
    check_trackers(spec.run.trackers)
    check_study_place(spec)
    # OpenMP reads this when torch is imported. By default its threads spin at every barrier, and on a
    # CPU that is shared with anything else training then slows down up to tenfold; see docs/log.md.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # torch's CUDA allocator reads this when it is first used. Passes differ in their number of tokens, and
    # segments that can grow do not break into pieces over them.
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    # Heavy imports come after the study file has been found good.
    from lora_tune.report import ProgressView, print_report
    from lora_tune.report.events import Views
    from lora_tune.tuner import run_study

    def train(*views: "View") -> StudySnapshot:
        with ExitStack() as stack:
            if not quiet:
                views = (*views, stack.enter_context(ProgressView(open_console(stderr=True))))
            return run_study(
                spec, study_file=path, command=command, view=Views(*views), allow_code=allow_code
            )

    if as_json:
        _run_with_events(StudyFolder(Path(spec.study.output) / spec.study.name), train)
        return
    snapshot = train()
    print_report(snapshot, open_console(), next_command=_next_command(snapshot))


def _run_with_events(folder: StudyFolder, train: "Callable[[View], StudySnapshot]") -> None:
    """Run the study, and print what happens to it as lines of JSON."""
    from lora_tune.report.best import best_json
    from lora_tune.report.events import StudyEvents

    events = StudyEvents(folder, _print_line)
    try:
        snapshot = train(events)
    except LoraTuneError as error:
        events.look()
        _print_line({"event": "failed", "message": redact(str(error))})
        raise
    events.look()
    _print_line({"event": "finished", **best_json(snapshot)})


def _print_line(event: "Event") -> None:
    """Print an event with the time at which it was told; a reader who goes away does not end the study."""
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    plain = {
        key: None if isinstance(value, float) and not isfinite(value) else value
        for key, value in event.items()
    }
    try:
        print(json.dumps({"time": now, **plain}, allow_nan=False), flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def dry_run(study: str, *, as_json: bool) -> None:
    """Print what a study would do, as ``lora-tune check`` does."""
    from lora_tune.commands.check import check

    check(str(_study_file(study)), gpu=None, as_json=as_json)


def _next_command(snapshot: StudySnapshot) -> str | None:
    """Return the command that checks the winner; None where it is a default that was no trial."""
    confirmation = snapshot.confirmation
    if confirmation is None or confirmation.decision is None:
        return None
    if confirmation.candidate(confirmation.decision.chosen).trial is None:
        return None
    return f"lora-tune verify {snapshot.folder}"


def _study_file(study: str) -> Path:
    path = Path(study)
    # pathlib's own raises for names that are too long
    if path.suffix == ".toml" or os.path.isfile(study):
        return path
    folder = find_study(study)
    lock = folder.load_lock()
    assert lock is not None
    return Path(lock.study_file)
