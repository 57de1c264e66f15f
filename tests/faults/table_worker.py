"""The sleeping worker in a whole study: it keeps what a real worker keeps, and its losses are a table's.

Every lane's state lies in its job's folder, results are published whole, and a lane goes on from its state or
from where the rung before left it. How a lane ends is looked up in ``table_study``, a pure function
of its job, so a study that was disturbed has to end as one that was not.
"""

import json
import os
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from sleeping_worker import SleepingTask, SleepingWorker, _Lane

from lora_tune.errors import StoreError
from lora_tune.files import is_complete, publish_folder
from lora_tune.records import LaneJob, LaneOutcome

STATE_FILE = "state.json"


class Step(NamedTuple):
    """A line of the log: a step of a lane, by the worker with this process id."""

    trial: int
    rung: int
    step: int
    pid: int


def read_log(study: Path) -> list[Step]:
    """Return all steps that workers of a study have taken; a line that is being written is left for later."""
    path = study / "steps"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [Step(*map(int, line.split())) for line in lines]


def repeated_steps(steps: Sequence[Step]) -> dict[tuple[int, ...], int]:
    """Return the steps that were taken more than once: how often beyond the first."""
    taken = Counter(step[:3] for step in steps)
    return {step: times - 1 for step, times in taken.items() if times > 1}


@dataclass(frozen=True, kw_only=True)
class TableTask(SleepingTask):
    """How a worker of a study behaves; ``jitter_s`` is the most that a lane's step takes longer."""

    jitter_s: float = 0.0

    def open(self, note: Callable[[str], None]) -> "TableWorker":
        super().open(note)
        return TableWorker(self)


class TableWorker(SleepingWorker):
    """A sleeping worker that uses the folders of its jobs."""

    task: TableTask

    def submit(self, job: LaneJob) -> None:
        self.lanes.append(_Lane(job, _first_step(job)))

    def _step(self, lane: _Lane) -> None:
        if self.task.jitter_s:
            time.sleep(random.Random(os.getpid() + lane.step).random() * self.task.jitter_s)
        super()._step(lane)

    def _save(self, lane: _Lane) -> None:
        assert lane.job.state_folder is not None
        _publish(lane, lane.job.state_folder)

    def _outcome(self, lane: _Lane) -> LaneOutcome:
        from table_study import outcome_of

        outcome = outcome_of(lane.job)
        if outcome.evaluation is not None and lane.job.result_folder is not None:
            _publish(lane, lane.job.result_folder)
        return outcome


def _first_step(job: LaneJob) -> int:
    """Return the step to go on from: the job's own state, else where the rung before left the trial."""
    if job.state_folder is not None and is_complete(job.state_folder):
        found = json.loads((job.state_folder / STATE_FILE).read_text())
        if (found["trial"], found["rung"]) != (job.trial, job.rung):
            raise StoreError(f"{job.state_folder}: the state of another lane, {found}")
        return int(found["step"])
    if job.start_folder is not None and not is_complete(job.start_folder):
        raise StoreError(f"{job.start_folder}: the rung before has left nothing")
    return job.start_step


def _publish(lane: _Lane, target: Path) -> None:
    found = {"trial": lane.job.trial, "rung": lane.job.rung, "step": lane.step}
    with publish_folder(target) as folder:
        (folder / STATE_FILE).write_text(json.dumps(found))
