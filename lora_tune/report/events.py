"""What happens to a study while it runs, as values for machines: one event after the other.

Events are read off the study folder, in which a record is durable before anything else is told, so what was
announced is never lost. They say what changed since the run began: a study that goes on does not repeat
what earlier runs announced.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Protocol

from lora_tune.records import (
    Confirmation,
    ConfirmationRun,
    Decision,
    ProgressState,
    RungResult,
    StudyLock,
    TrialRecord,
    TrialState,
)
from lora_tune.store.folder import CONFIRMATION_FILE, StudyFolder

Event = dict[str, object]
LOOK_S = 0.5  # least seconds between two looks at the folder


class View(Protocol):
    """What is told how a study goes."""

    def update(self, state: ProgressState) -> None:
        """Show where the study is."""
        ...

    def note(self, text: str) -> None:
        """Say a sentence."""
        ...


class Views:
    """Several views as one; none at all is silence."""

    def __init__(self, *views: View) -> None:
        self._views = views

    def update(self, state: ProgressState) -> None:
        """Show the state in all of them."""
        for view in self._views:
            view.update(state)

    def note(self, text: str) -> None:
        """Say the sentence in all of them."""
        for view in self._views:
            view.note(text)


class StudyEvents:
    """Tells what is new in a study's folder, as a view of the study that runs.

    Args:
        store: The study's folder; it need not exist yet.
        emit: Takes an event, such as ``{"event": "rung", "trial": 3, ...}``.
        clock: Returns seconds that never run backward.
    """

    def __init__(
        self,
        store: StudyFolder,
        emit: Callable[[Event], None],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store, self._emit, self._clock = store, emit, clock
        self._lock: StudyLock | None = None
        self._resumed = store.load_lock() is not None
        self._trials = {record.number: record for record in store.load_trials()}
        self._ended_before = sum(
            record.state is not TrialState.RUNNING for record in self._trials.values()
        )
        self._confirmation = store.load_confirmation()
        self._seen = {path: _stamp(path) for path in self._files()}
        self._looked_s: float | None = None

    def update(self, state: ProgressState) -> None:
        """Tell what is new, unless the last look was a moment ago."""
        now = self._clock()
        if self._looked_s is None or now - self._looked_s >= LOOK_S:
            self._looked_s = now
            self.look()

    def note(self, text: str) -> None:
        """Leave sentences to the views of people."""

    def look(self) -> None:
        """Tell what is new since the last look."""
        if self._lock is None:
            self._lock = self._store.load_lock()
            if self._lock is None:
                return
            self._emit(self._started(self._lock))
        changed = [path for path in self._files() if _stamp(path) != self._seen.get(path)]
        if not changed:
            return
        self._seen |= {path: _stamp(path) for path in changed}
        for event in self._news(changed):
            self._emit(event)

    def _files(self) -> list[Path]:
        """Return the files of which every change is an event."""
        found = sorted((self._store.path / "trials").glob("*/trial.json"))
        confirmation = self._store.path / CONFIRMATION_FILE
        return [*found, confirmation] if confirmation.is_file() else found

    def _started(self, lock: StudyLock) -> Event:
        plan = lock.study_plan
        return {
            "event": "started",
            "study": lock.name,
            "folder": str(self._store.path),
            "resumed": self._resumed,
            "trials_planned": plan.num_trials if plan is not None else None,
            "trials_ended": self._ended_before,
            "rungs": list(lock.rungs),
            "forecast_s": lock.forecast.total_s if lock.forecast is not None else None,
        }

    def _news(self, changed: list[Path]) -> Iterator[Event]:
        for path in changed:
            if path.name == CONFIRMATION_FILE:
                confirmation = self._store.load_confirmation()
                assert confirmation is not None
                yield from confirmation_events(self._confirmation, confirmation)
                self._confirmation = confirmation
                continue
            record = self._store.load_trial(int(path.parent.name))
            yield from trial_events(self._trials.get(record.number), record)
            self._trials[record.number] = record


def trial_events(before: TrialRecord | None, now: TrialRecord) -> Iterator[Event]:
    """Yield what happened to a trial: it began, finished rungs, ended."""
    if before is None:
        config = asdict(now.config)
        del config["target_modules"]  # hundreds of names, which the target set stands for
        yield {
            "event": "trial_began",
            "trial": now.number,
            "origin": now.origin,
            **{key: value for key, value in config.items() if not key.endswith("_seed")},
            "predicted_bytes": now.predicted_bytes,
        }
    known = len(before.rungs) if before is not None else 0
    for result in now.rungs[known:]:
        yield _rung_event(now.number, result)
    was_running = before is None or before.state is TrialState.RUNNING
    if was_running and now.state is not TrialState.RUNNING:
        yield {
            "event": "trial_ended",
            "trial": now.number,
            "state": now.state.value,
            "loss": now.best_loss,
            "steps": now.steps,
            "reason": now.reason,
            "repeats": now.repeats,
        }


def confirmation_events(before: Confirmation | None, now: Confirmation) -> Iterator[Event]:
    """Yield the runs that ended with fresh seeds, and the decision when it has been made."""
    known = {(run.candidate, run.seed) for run in before.runs} if before is not None else set()
    for run in now.runs:
        if (run.candidate, run.seed) not in known:
            yield _run_event(run)
    decision = before.decision if before is not None else None
    if now.decision is not None and now.decision != decision:
        yield _decision_event(now.decision)


def _rung_event(trial: int, result: RungResult) -> Event:
    return {
        "event": "rung",
        "trial": trial,
        "rung": result.rung,
        "steps": result.steps,
        "loss": result.eval_loss,
        "wall_s": result.wall_s,
        "num_tokens": result.num_tokens,
        "peak_bytes": result.peak_bytes,
        "pack_lanes": result.pack_lanes,
    }


def _run_event(run: ConfirmationRun) -> Event:
    return {
        "event": "confirmation_run",
        "candidate": run.candidate,
        "seed": run.seed,
        "state": run.state.value,
        "loss": run.evaluation.mean_loss if run.evaluation is not None else None,
        "reason": run.reason,
        "wall_s": run.wall_s,
    }


def _decision_event(decision: Decision) -> Event:
    chosen = next(score for score in decision.scores if score.candidate == decision.chosen)
    return {
        "event": "decision",
        "chosen": decision.chosen,
        "verdict": decision.verdict.value,
        "loss": chosen.loss,
        "loss_low": chosen.low,
        "loss_high": chosen.high,
        "tied": list(decision.tied),
    }


def _stamp(path: Path) -> tuple[int, int]:
    """Return what differs after a file was replaced."""
    found = path.stat()
    return found.st_mtime_ns, found.st_ino
