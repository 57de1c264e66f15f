"""Writes the records of a study to its trackers, each part of a run once.

``trackers.json`` in the study folder remembers what was written where. It is noted before it is written, so a
study that goes on repeats nothing; what a killed process was writing may be missing in the tracker.
"""

import contextlib
import io
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from lora_tune.files import write_text
from lora_tune.records import (
    Confirmation,
    ConfirmationRun,
    LaneOutcome,
    Point,
    StudyLock,
    TrialRecord,
    TrialState,
)
from lora_tune.redaction import redact
from lora_tune.signals import at_once, was_raised
from lora_tune.trackers.backends import BACKENDS, Backend
from lora_tune.trackers.runs import (
    Line,
    TrackedRun,
    confirmation_run,
    decision_values,
    early_end,
    point_lines,
    result_values,
    rung_line,
    study_run,
    trial_run,
)

LEDGER_FILE = "trackers.json"
FINISH_S = 4.0  # when the study is being stopped
FINISHING = "finishing trackers"  # name of the thread

Note = Callable[[str], None]


@dataclass(slots=True)
class _Entry:
    """What is known of a run in one tracker: its own id of it, and the parts that were written."""

    id: str = ""
    parts: list[str] = field(default_factory=list)


_LEDGER = TypeAdapter(dict[str, dict[str, _Entry]])


def open_trackers(
    names: Sequence[str], lock: StudyLock, folder: Path, *, cooldown_ratio: float, note: Note
) -> "Trackers":
    """Return the trackers of a study; none of them is reached before there is something to write.

    Args:
        names: As in ``run.trackers``.
        lock: Of the study.
        folder: Of the study.
        cooldown_ratio: Share of a segment's steps that cool down: these points have names of their own.
        note: Is told when a tracker fails.
    """
    if names:
        from accelerate.state import PartialState  # type: ignore[import-untyped]

        PartialState()  # accelerate's trackers log through it
    backends = {name: BACKENDS[name](lock, folder) for name in names}
    return Trackers(backends, lock, folder, cooldown_ratio=cooldown_ratio, note=note)


class Trackers:
    """Writes the records of a study to all of its trackers, each part once."""

    def __init__(
        self,
        backends: "Mapping[str, Backend]",
        lock: StudyLock,
        folder: Path,
        *,
        cooldown_ratio: float,
        note: Note,
    ) -> None:
        self._backends = dict(backends)
        self._failed: list[Backend] = []
        self._lock = lock
        self._path = folder / LEDGER_FILE
        self._cooldown_ratio = cooldown_ratio
        self._note = note
        self._ledger = _read_ledger(self._path) if backends else {}

    def trial_ended(self, record: TrialRecord, outcome: LaneOutcome) -> None:
        """Write the segment of a trial that has just ended, and what became of the trial."""
        if not self._backends:
            return
        if outcome.evaluation is None:
            steps = self._lock.rungs[outcome.rung]
            lines = [*self._points(outcome.points, steps), *early_end(outcome)]
            self._write(trial_run(record, self._lock), f"rung-{outcome.rung}", lines)
        self._write_trial(record)

    def confirmation_ended(self, confirmation: Confirmation, outcome: LaneOutcome) -> None:
        """Write the run of the confirmation that has just ended, if it was one, and the decision."""
        if not self._backends:
            return
        for run in confirmation.runs:
            is_last = run is confirmation.runs[-1] and run.evaluation is outcome.evaluation
            self._write_confirmation(confirmation, run, outcome.points if is_last else ())
        self._write_decision(confirmation)

    def catch_up(self, trials: Iterable[TrialRecord], confirmation: Confirmation | None) -> None:
        """Write what is on record and not yet in a tracker.

        Only search segments that were evaluated have their points on record.
        """
        if not self._backends:
            return
        for record in trials:
            self._write_trial(record)
        if confirmation is not None:
            for run in confirmation.runs:
                self._write_confirmation(confirmation, run, ())
            self._write_decision(confirmation)

    def close(self) -> None:
        """Finish all runs that are still open; who stops a study waits for that a few seconds at most."""
        if not was_raised():
            self._finish()
            return
        finishing = threading.Thread(target=self._finish, name=FINISHING, daemon=True)
        finishing.start()
        finishing.join(FINISH_S)

    def _finish(self) -> None:
        for name, backend in list(self._backends.items()):
            with self._leaving_out(name), _silent_stdout():
                backend.finish_all()
        for failed in self._failed:  # of these nothing more is said
            with contextlib.suppress(Exception), at_once(), _silent_stdout():
                failed.finish_all()

    def _write_trial(self, record: TrialRecord) -> None:
        if record.state is TrialState.CACHED:  # never trained: the trial that it repeats has it all
            return
        run = trial_run(record, self._lock)
        for result in record.rungs:
            lines = [*self._points(result.points, result.steps), rung_line(result)]
            self._write(run, f"rung-{result.rung}", lines)
        if record.state is not TrialState.RUNNING:
            texts = {"state": str(record.state), "reason": redact(record.reason)}
            self._write(run, f"state {record.state}", texts=texts, last=True)

    def _write_confirmation(
        self, confirmation: Confirmation, run: ConfirmationRun, points: Sequence[Point]
    ) -> None:
        candidate = confirmation.candidate(run.candidate)
        lines = list(self._points(points, candidate.steps))
        if run.evaluation is not None:
            lines.append(
                Line(candidate.steps, result_values(run.evaluation, run.peak_bytes, run.wall_s))
            )
        texts = {"state": str(run.state), "reason": redact(run.reason)}
        tracked = confirmation_run(candidate, run, self._lock)
        self._write(tracked, f"run of {candidate.steps} steps", lines, texts=texts, last=True)

    def _write_decision(self, confirmation: Confirmation) -> None:
        decision = confirmation.decision
        if decision is not None:
            part = f"decision for {decision.chosen} of {len(confirmation.runs)} runs"
            lines = [Line(confirmation.candidate(decision.chosen).steps, decision_values(decision))]
            texts = {
                "chosen": decision.chosen,
                "best": decision.best,
                "verdict": str(decision.verdict),
            }
            self._write(study_run(self._lock), part, lines, texts=texts, last=True)

    def _points(self, points: Iterable[Point], steps: int) -> Iterator[Line]:
        return point_lines(points, steps=steps, cooldown_ratio=self._cooldown_ratio)

    def _write(
        self,
        run: TrackedRun,
        part: str,
        lines: Sequence[Line] = (),
        *,
        texts: Mapping[str, str] | None = None,
        last: bool = False,
    ) -> None:
        """Write a part of a run to every tracker that does not have it; ``last``: the run may be closed."""
        for name, backend in list(self._backends.items()):
            entry = self._ledger.setdefault(name, {}).setdefault(run.name, _Entry())
            if part in entry.parts:
                continue
            with self._leaving_out(name), _silent_stdout():
                tracker = backend.opened(run, entry.id)
                entry.id = entry.id or backend.run_id(tracker)
                entry.parts.append(part)
                self._save_ledger()
                for line in lines:
                    backend.log(tracker, line)
                if texts:
                    backend.describe(tracker, texts)
                if last or not backend.stays_open:
                    backend.finish(run.name)

    def _save_ledger(self) -> None:
        write_text(self._path, _LEDGER.dump_json(self._ledger, indent=1).decode() + "\n")

    @contextlib.contextmanager
    def _leaving_out(self, name: str) -> Iterator[None]:
        """Turn any error of a tracker into one note, and go on without it; a signal does not wait for it."""
        try:
            with at_once():
                yield
        except Exception as error:  # whatever a tracker or its network does, the study goes on
            self._failed.append(self._backends.pop(name))
            cause = f"{type(error).__name__}: {error}".strip().splitlines()[0]
            self._note(
                f"{name} is left out from here on ({cause}). The study loses nothing by it, and the same "
                "command tries again."
            )


def _silent_stdout() -> contextlib.AbstractContextManager[object]:
    """Keep what trackers print about themselves off standard output, which is for results."""
    return contextlib.redirect_stdout(io.StringIO())


def _read_ledger(path: Path) -> dict[str, dict[str, _Entry]]:
    """Return what was written so far; of a ledger that cannot be read nothing, so all is written again."""
    try:
        return _LEDGER.validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return {}
