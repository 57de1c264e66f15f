"""A stand-in for a study's worker: it sleeps where another would train.

Its tasks are pickled to child processes, which find this module on PYTHONPATH.
"""

import ctypes
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_tune.errors import LoraTuneError, ModelError
from lora_tune.records import EvalResult, LaneJob, LaneOutcome, LaneReading, LaneSpan, TrialState


@dataclass(frozen=True, kw_only=True)
class SleepingTask:
    """How a sleeping worker behaves.

    ``folder`` has a file ``T-R`` a segment: the last step that was saved, and a file ``steps`` with a
    line for every step that was taken. ``deadly`` trials kill the worker at ``deadly_step``, by
    ``deadly_signal``.
    """

    folder: Path
    step_s: float = 0.01
    save_every: int = 5
    opened: object = "open"
    open_s: float = 0.0
    fails_to_open: str = ""  # "crash", "refuse"
    deadly: tuple[int, ...] = ()
    deadly_step: int = 7
    deadly_signal: int = signal.SIGSEGV
    deadly_pid_file: Path | None = None  # only a worker that can make this file is killed

    def open(self, note: Callable[[str], None]) -> "SleepingWorker":
        note(f"opening {os.getpid()}")
        time.sleep(self.open_s)
        if self.fails_to_open == "crash":
            raise RuntimeError("no base today")
        if self.fails_to_open == "refuse":
            raise ModelError("this base is refused")
        return SleepingWorker(self)


@dataclass
class _Lane:
    job: LaneJob
    step: int
    slot: int = 0


class SleepingWorker:
    """Takes ``step_s`` for a step of all its lanes together."""

    def __init__(self, task: SleepingTask) -> None:
        self.task = task
        self.opened = task.opened
        self.max_lanes = 1
        self.on_step: Callable[[], None] = lambda: None
        self.lanes: list[_Lane] = []
        self.num_tokens = 0

    @property
    def free_slots(self) -> int:
        return max(0, self.max_lanes - len(self.lanes))

    @property
    def busy(self) -> bool:
        return bool(self.lanes)

    def submit(self, job: LaneJob) -> None:
        path = self._state(job)
        step = int(path.read_text()) if path.exists() else job.start_step
        taken = {lane.slot for lane in self.lanes}
        slot = next(slot for slot in range(len(taken) + 1) if slot not in taken)
        self.lanes.append(_Lane(job, step, slot))

    def wait(self) -> list[LaneOutcome]:
        while self.lanes:
            done = [lane for lane in self.lanes if lane.step >= lane.job.end_step]
            if done:
                self.lanes = [lane for lane in self.lanes if lane not in done]
                return [self._outcome(lane) for lane in done]
            time.sleep(self.task.step_s)
            for lane in self.lanes:
                self._step(lane)
            self.on_step()
        return []

    def ended(self) -> list[LaneOutcome]:
        return []

    def readings(self) -> tuple[LaneReading, ...]:
        return tuple(
            LaneReading(
                trial=lane.job.trial,
                rung=lane.job.rung,
                step=lane.step,
                end_step=lane.job.end_step,
                train_loss=None,
            )
            for lane in self.lanes
        )

    def take_pack_peaks(self) -> list[Any]:
        return []

    def memory_bytes(self) -> int:
        return 1000

    def answer(self, question: Callable[[Any], Any]) -> object:
        return question(self)

    def save_states(self) -> None:
        for lane in self.lanes:
            self._save(lane)

    def close(self) -> None:
        pass

    def _step(self, lane: _Lane) -> None:
        task = self.task
        lane.step += 1
        self.num_tokens += 10
        with (task.folder / "steps").open("a") as log:
            log.write(f"{lane.job.trial} {lane.job.rung} {lane.step} {os.getpid()}\n")
        if lane.job.trial in task.deadly and lane.step == task.deadly_step and self._may_die():
            os.kill(os.getpid(), task.deadly_signal)
            ctypes.string_at(0)  # a handler that only prints would come back
        if lane.step % task.save_every == 0:
            self._save(lane)

    def _may_die(self) -> bool:
        once = self.task.deadly_pid_file
        if once is None:
            return True
        try:
            once.touch(exist_ok=False)
        except FileExistsError:
            return False
        return True

    def _save(self, lane: _Lane) -> None:
        path = self._state(lane.job)
        temporary = path.with_suffix(f".{os.getpid()}")
        temporary.write_text(str(lane.step))
        temporary.replace(path)

    def _state(self, job: LaneJob) -> Path:
        return self.task.folder / f"{job.trial}-{job.rung}"

    def _outcome(self, lane: _Lane) -> LaneOutcome:
        loss = 2.0 + (lane.job.trial * 7919 % 100) / 100 - 0.001 * lane.step
        return LaneOutcome(
            trial=lane.job.trial,
            rung=lane.job.rung,
            state=TrialState.COMPLETE,
            span=LaneSpan(slot=lane.slot, began_s=0.0, ended_s=1.0),
            evaluation=EvalResult(
                split=lane.job.eval_split,
                loss_sums=(loss * 10,) * 8,
                label_counts=(10,) * 8,
                compute_dtype="float32",
            ),
        )


def ask_for_pid(worker: SleepingWorker) -> int:
    """A question: which process is it?"""
    return os.getpid()


def die_when_asked(worker: SleepingWorker) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def refuse_when_asked(worker: SleepingWorker) -> None:
    raise LoraTuneError("no answer to that")


def sleep_when_asked(worker: SleepingWorker) -> None:
    time.sleep(60)
