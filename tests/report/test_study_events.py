"""Events of a running study, read off its folder: each once, in order, nothing of earlier runs."""

import os
from dataclasses import replace
from pathlib import Path

from report_studies import finished_study

from lora_tune.records import ProgressState, StudySnapshot, TrialRecord, TrialState
from lora_tune.report.events import LOOK_S, Event, StudyEvents, Views
from lora_tune.store.folder import StudyFolder

STATE = ProgressState(
    phase="rung 0",
    trials_done=0,
    trials_total=1,
    states={},
    lanes=(),
    best_trial=None,
    best_loss=None,
    tokens_per_s=0.0,
    memory_bytes=0,
    budget_bytes=0,
    elapsed_s=0.0,
    left_s=None,
)


class Clock:
    """Seconds that pass when they are told to."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        self.now_s += LOOK_S
        return self.now_s


def begun(trial: TrialRecord) -> TrialRecord:
    return replace(trial, state=TrialState.RUNNING, rungs=(), reason="")


def scored(study: StudySnapshot) -> TrialRecord:
    """Return a trial that finished more than one rung."""
    return next(t for t in study.trials if len(t.rungs) > 1 and t.state is TrialState.COMPLETE)


def watched(folder: Path) -> tuple[StudyFolder, StudyEvents, list[Event]]:
    store, events = StudyFolder(folder), list[Event]()
    return store, StudyEvents(store, events.append, clock=Clock()), events


def test_a_trial_begins_finishes_rungs_and_ends(tmp_path: Path) -> None:
    study = finished_study()
    trial = scored(study)
    store, watcher, events = watched(tmp_path / "study")
    watcher.update(STATE)
    assert events == []  # nothing is there yet
    (tmp_path / "study").mkdir()
    store.save_lock(study.lock)
    watcher.update(STATE)
    assert [event["event"] for event in events] == ["started"]
    store.save_trial(begun(trial))
    watcher.update(STATE)
    store.save_trial(replace(begun(trial), rungs=trial.rungs[:1]))
    watcher.update(STATE)
    store.save_trial(trial)
    watcher.update(STATE)
    watcher.update(STATE)
    kinds = [event["event"] for event in events[1:]]
    assert kinds == ["trial_began", *["rung"] * len(trial.rungs), "trial_ended"]
    assert events[1]["rank"] == trial.config.rank
    assert [event["loss"] for event in events[2:-1]] == [rung.eval_loss for rung in trial.rungs]
    assert (events[-1]["state"], events[-1]["loss"]) == ("complete", trial.best_loss)


def test_runs_and_the_decision_are_told_once(tmp_path: Path) -> None:
    study = finished_study()
    assert study.confirmation is not None
    store, watcher, events = watched(tmp_path)
    store.save_lock(study.lock)
    half = replace(study.confirmation, runs=study.confirmation.runs[:2], decision=None)
    store.save_confirmation(half)
    watcher.look()
    store.save_confirmation(study.confirmation)
    watcher.look()
    watcher.look()
    runs = [event for event in events if event["event"] == "confirmation_run"]
    assert [(run["candidate"], run["seed"]) for run in runs] == [
        (run.candidate, run.seed) for run in study.confirmation.runs
    ]
    [decision] = [event for event in events if event["event"] == "decision"]
    assert study.confirmation.decision is not None
    assert decision["chosen"] == study.confirmation.decision.chosen


def test_a_study_that_goes_on_does_not_repeat_what_was_told(tmp_path: Path) -> None:
    study = finished_study()
    store = StudyFolder(tmp_path)
    store.save_lock(study.lock)
    for trial in study.trials[:4]:
        store.save_trial(trial)
    _, watcher, events = watched(tmp_path)
    store.save_trial(begun(study.trials[6]))
    watcher.look()
    assert [event["event"] for event in events] == ["started", "trial_began"]
    assert (events[0]["resumed"], events[0]["trials_ended"]) == (True, 4)


def test_a_record_that_was_only_touched_is_no_event(tmp_path: Path) -> None:
    study = finished_study()
    store, watcher, events = watched(tmp_path)
    store.save_lock(study.lock)
    store.save_trial(study.trials[0])
    watcher.look()
    count = len(events)
    os.utime(store.trial_folder(0) / "trial.json")
    watcher.look()
    assert len(events) == count


def test_between_two_looks_time_passes(tmp_path: Path) -> None:
    store, events = StudyFolder(tmp_path), list[Event]()
    watcher = StudyEvents(store, events.append, clock=lambda: 0.0)
    watcher.update(STATE)
    store.save_lock(finished_study().lock)
    watcher.update(STATE)
    assert events == []
    watcher.look()
    assert len(events) == 1


def test_views_are_told_together_and_none_is_silence() -> None:
    class Recorder:
        def __init__(self) -> None:
            self.told: list[object] = []

        def update(self, state: ProgressState) -> None:
            self.told.append(state)

        def note(self, text: str) -> None:
            self.told.append(text)

    one, other = Recorder(), Recorder()
    both = Views(one, other)
    both.update(STATE)
    both.note("said")
    assert one.told == other.told == [STATE, "said"]
    Views().note("unheard")
