"""What is to be trained again: a trial of a study folder and the path of steps that it came along.

A trial that went on to a higher rung continued from the state that was kept before the cool-down, so the
path to its last rung is constant learning rate to that rung's hold step, then one cool-down. The
cool-downs of lower rungs are branches beside the path.
"""

from dataclasses import dataclass
from pathlib import Path

from lora_tune.errors import StoreError
from lora_tune.files import is_complete
from lora_tune.records import (
    LaneJob,
    Point,
    RungResult,
    StudyLock,
    StudySnapshot,
    TrialRecord,
    TrialState,
)
from lora_tune.search.plan import hold_step_of
from lora_tune.store.folder import StudyFolder
from lora_tune.store.origin import base_dir_of, spec_of
from lora_tune.study.spec import StudySpec


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyTask:
    """A trial that finished at least one rung, and the study that it belongs to."""

    folder: Path
    lock: StudyLock
    spec: StudySpec
    base_dir: Path  # that paths of the study file are relative to
    record: TrialRecord

    @property
    def result(self) -> RungResult:
        """What the trial showed at its highest finished rung."""
        return self.record.rungs[-1]

    @property
    def adapter_folder(self) -> Path:
        """Where the adapter of that rung was published."""
        return (
            StudyFolder(self.folder).trial_folder(self.record.number) / f"rung-{self.result.rung}"
        )

    def hold_step(self, rung: int) -> int:
        """Return the last step of a rung before its cool-down, where the trial's state was kept."""
        return hold_step_of(self.lock.rungs[rung], self.spec.train.cooldown_ratio)

    def job(self) -> LaneJob:
        """Return the whole path as one segment, from step 0 to the end of the highest finished rung."""
        return LaneJob(
            trial=self.record.number,
            rung=self.result.rung,
            config=self.record.config,
            start_step=0,
            hold_step=self.hold_step(self.result.rung),
            end_step=self.lock.rungs[self.result.rung],
            warmup_steps=self.lock.warmup_steps,
            eval_split=self.result.evaluation.split,
            eval_dtype="train",
            start_folder=None,
            result_folder=None,
        )

    def points(self) -> list[Point]:
        """Return the recorded readings on the path, by step; long segments were recorded thinned."""
        return [
            point
            for result in self.record.rungs
            for point in result.points
            if result is self.result or point.step <= self.hold_step(result.rung)
        ]

    def plain_seconds(self, num_runs: int) -> float:
        """Return what ``num_runs`` plain runs take if a step takes the trial's share of its packs."""
        trained = sum(
            result.steps - (self.hold_step(result.rung - 1) if result.rung else 0)
            for result in self.record.rungs
        )
        seconds = sum(result.wall_s for result in self.record.rungs)
        return num_runs * seconds * self.lock.rungs[self.result.rung] / trained


def verify_task(snapshot: StudySnapshot, trial: int | None) -> VerifyTask:
    """Return the task for ``trial``, or for the study's winner.

    Raises:
        StoreError: There is no such trial or no winner, the trial has no evaluation to compare with,
            or its adapter is gone or damaged.
    """
    spec = spec_of(snapshot)
    task = VerifyTask(
        folder=snapshot.folder,
        lock=snapshot.lock,
        spec=spec,
        base_dir=base_dir_of(snapshot, spec),
        record=_record_of(snapshot, trial),
    )
    if not is_complete(task.adapter_folder):
        raise StoreError(
            f"{task.adapter_folder}: missing or damaged (its files do not match manifest.json), so the "
            f"adapter of trial {task.record.number} cannot be verified. Bring the folder back, or name "
            "another trial with --trial."
        )
    return task


def _record_of(snapshot: StudySnapshot, trial: int | None) -> TrialRecord:
    name = snapshot.lock.name
    scored = [record.number for record in snapshot.trials if record.rungs]
    choice = (
        f"Trials with a finished rung: {_listed(scored)}." if scored else "No trial has one yet."
    )
    if trial is None:
        decision = snapshot.confirmation.decision if snapshot.confirmation is not None else None
        if snapshot.confirmation is None or decision is None:
            raise StoreError(
                f"{snapshot.folder}: the study {name} is not finished, so it has no winner. Finish it with "
                f"lora-tune run {snapshot.lock.study_file}, or name a trial with --trial. {choice}"
            )
        trial = snapshot.confirmation.candidate(decision.chosen).trial
        if trial is None:
            raise StoreError(
                f"{snapshot.folder}: the study recommends the default configuration, which is none of its "
                f"trials. Name a trial with --trial. {choice}"
            )
    found = [record for record in snapshot.trials if record.number == trial]
    if not found:
        raise StoreError(
            f"{snapshot.folder}: --trial is {trial}, but there is no such trial. {choice}"
        )
    record = found[0]
    if not record.rungs:
        raise StoreError(
            f"{snapshot.folder}: trial {trial} {_why_without_rung(record)}, so there is nothing to "
            f"compare. {choice}"
        )
    return record


def _why_without_rung(record: TrialRecord) -> str:
    why = f" ({record.reason})" if record.reason else ""
    if record.state is TrialState.DIVERGED:
        return f"diverged before it was evaluated{why}"
    if record.state is TrialState.INFEASIBLE:
        return f"did not fit the memory{why}"
    if record.state is TrialState.CACHED:
        return f"was not trained: it repeats trial {record.repeats}"
    if record.state is TrialState.FAILED:
        return f"failed before it was evaluated{why}"
    return "has not finished a rung yet"


def _listed(numbers: list[int], most: int = 12) -> str:
    shown = ", ".join(str(number) for number in numbers[:most])
    return f"{shown} and {len(numbers) - most} more" if len(numbers) > most else shown
