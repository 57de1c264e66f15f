"""Lane jobs in this process, on one base.

A lane that ends frees its slot at once: the next job joins the pack at the next step, without touching
the base. A lane whose loss diverges leaves alone. Out of memory: the lanes allowed at once are halved
and the lanes that were running are parked on the host and go on from where they were; a lane
that does not fit alone is infeasible. When lanes have left, what is allocated must be what it was.

A lane has a slot of the pack from joining to its end, also while it is parked: the spans of one slot do not
overlap.

Every ``checkpoint_every`` seconds of work, and when it is asked to, the executor saves where each lane is, in
the lane's own folder. Whoever is given the same job again, in whatever process, goes on from there.

Memory is read per stretch: the steps over which the pack's lanes do not change. The meter's peaks are
forgotten when a stretch begins and read when it ends, before anything is evaluated.
"""

import gc
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import count
from typing import NamedTuple

import torch

from lora_tune.engine.adapter_files import save_adapter
from lora_tune.engine.base import DTYPES
from lora_tune.engine.lane import Lane, save_state
from lora_tune.engine.memory_errors import is_out_of_memory
from lora_tune.engine.memory_guard import WORKSPACES_OF_GPUS, MemoryGuard
from lora_tune.engine.memory_reading import MemoryMeter
from lora_tune.engine.pack import NO_PASS, TrialPack
from lora_tune.executors.scorer import MetricScorer
from lora_tune.files import publish_folder
from lora_tune.records import (
    EvalResult,
    LaneJob,
    LaneOutcome,
    LaneReading,
    LaneSpan,
    MetricResult,
    PackPeak,
    TokenizedRow,
    TrialState,
)

MAX_POINTS = 200  # readings kept of a segment; longer ones are thinned evenly
# Work between two savings of the lanes is at least so many times what the last one took.
LEAST_WORK_PER_SAVING = 20


class InProcessExecutor:
    """Trains up to ``lanes`` jobs as one trial pack in this process."""

    def __init__(
        self,
        pack: TrialPack,
        splits: Mapping[str, Sequence[TokenizedRow]],
        *,
        lanes: int,
        base_model: str | None,
        meter: MemoryMeter,
        on_step: Callable[[], None] = lambda: None,
        scorer: MetricScorer | None = None,
        clock: Callable[[], float] = time.perf_counter,
        checkpoint_every: float = math.inf,
    ) -> None:
        """Begin with nothing to do.

        Args:
            pack: Trains and evaluates the lanes.
            splits: Rows that a job may be evaluated on, by name.
            lanes: Most jobs at once; ``max_lanes`` may be lowered later.
            base_model: What a published adapter names as its base.
            meter: Reads the device of the pack.
            on_step: Called after every optimizer step. It may submit jobs, change ``max_lanes`` and raise:
                the lanes are then between two steps, may be saved, and ``wait`` may be called again.
            scorer: Computes the metrics that jobs ask for; None when no job does.
            clock: Returns the seconds of the study so far, for the spans of the lanes.
            checkpoint_every: Seconds of training and evaluation after which lanes are saved.
        """
        self.pack = pack
        self.splits = splits
        self.max_lanes = lanes
        self.base_model = base_model
        self.meter = meter
        self.on_step = on_step
        self.scorer = scorer
        self.clock = clock
        self.checkpoint_every = checkpoint_every
        self.train_s = 0.0
        self.evaluation_s = 0.0
        self.saving_s = 0.0
        self._next_saving_s = checkpoint_every  # seconds of work
        self._ended_tokens = 0
        on_gpu = pack.base.device.type == "cuda"
        self._guard = MemoryGuard(meter, allowance=WORKSPACES_OF_GPUS if on_gpu else 0)
        self._parked: list[Lane] = []  # they go on before any job begins
        self._waiting: list[LaneJob] = []
        self._lanes: list[Lane] = []
        self._train_dtype = pack.base.compute_dtype
        self._stretch: _Stretch | None = None
        self._pack_peaks: list[PackPeak] = []
        self._peaks: dict[int, int] = {}  # by trial: peak bytes while it was here
        self._seats: dict[int, _Seat] = {}  # by trial: of lanes that train or are parked

    @property
    def free_slots(self) -> int:
        """Slots for further jobs."""
        return max(0, self.max_lanes - self._num_jobs)

    @property
    def busy(self) -> bool:
        """Whether a job is waiting or running."""
        return self._num_jobs > 0

    @property
    def _num_jobs(self) -> int:
        return len(self._lanes) + len(self._parked) + len(self._waiting)

    @property
    def num_tokens(self) -> int:
        """Tokens trained on so far, as far as readings of the lanes go."""
        return self._ended_tokens + sum(lane.num_tokens for lane in self._lanes + self._parked)

    def submit(self, job: LaneJob) -> None:
        """Queue a job for the next free slot."""
        self._waiting.append(job)

    def readings(self) -> tuple[LaneReading, ...]:
        """Return where every running lane is."""
        return tuple(
            LaneReading(
                trial=lane.job.trial,
                rung=lane.job.rung,
                step=lane.step,
                end_step=lane.job.end_step,
                train_loss=lane.points[-1].train_loss if lane.points else None,
            )
            for lane in self._lanes
        )

    def take_pack_peaks(self) -> list[PackPeak]:
        """Return what was measured since this was last asked."""
        taken, self._pack_peaks = self._pack_peaks, []
        return taken

    def save_states(self) -> None:
        """Save every lane that has trained since its last saving and has a folder for that.

        In the middle of a step, where only an exception can have left the executor, nothing is saved: what
        was saved before still holds.
        """
        if self._stretch is not None and self._stretch.stepping:
            return
        begin = time.perf_counter()
        self.pack.read()
        for lane in self._lanes + self._parked:
            if _is_worth_saving(lane):
                self.pack.save_lane(lane)
        elapsed = time.perf_counter() - begin
        self.saving_s += elapsed
        least_s = max(self.checkpoint_every, LEAST_WORK_PER_SAVING * elapsed)
        self._next_saving_s = self._work_s + least_s

    @property
    def _work_s(self) -> float:
        return self.train_s + self.evaluation_s

    @property
    def _is_saving_due(self) -> bool:
        return self._work_s >= self._next_saving_s

    def wait(self) -> list[LaneOutcome]:
        """Train until at least one lane has ended."""
        while self.busy:
            failed = False
            try:
                outcomes = self._advance()
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                failed = True  # leave the handler first: the traceback holds the tensors
            if failed:
                outcomes = self._shrink()
            if outcomes:
                trained = any(outcome.num_tokens for outcome in outcomes)
                self._guard.check(self._lanes + self._parked, trained=trained)
                return outcomes
        return []

    def _advance(self) -> list[LaneOutcome]:
        self._fill()
        if any(lane.finished or lane.divergence for lane in self._lanes):
            # Told first: the lanes that come after them must not depend on where the executor was left.
            self._end_stretch()
            self.meter.restart()  # what is only evaluated has no part in the peak before it
        elif self._lanes:
            self._train_step(self._lanes)
            if self._is_saving_due:
                self.save_states()
            self.on_step()
        diverged = [lane for lane in self._lanes if lane.divergence]
        finished = [lane for lane in self._lanes if lane.finished and lane not in diverged]
        outcomes = [
            self._outcome(lane, TrialState.DIVERGED, reason=lane.divergence) for lane in diverged
        ]
        outcomes += self._evaluate(finished)
        self._lanes = [lane for lane in self._lanes if lane not in diverged + finished]
        return [replace(outcome, span=self._leave(outcome.trial)) for outcome in outcomes]

    def _train_step(self, lanes: Sequence[Lane]) -> None:
        self._begin_stretch(lanes)
        begin = time.perf_counter()
        self.pack.train_step(lanes)
        elapsed = time.perf_counter() - begin
        self.train_s += elapsed
        for lane in lanes:
            lane.wall_s += elapsed / len(lanes)
        if self._is_saving_due:
            self.pack.read()  # now: a lane that turns out to have diverged ends the stretch
        self._end_step(lanes)

    def _fill(self) -> None:
        while self._parked and len(self._lanes) < self.max_lanes:
            self.pack.unpark(self._parked[0])
            self._lanes.append(self._parked.pop(0))
        while self._waiting and len(self._lanes) < self.max_lanes:
            lane = self.pack.new_lane(self._waiting[0])
            del self._waiting[0]
            self._lanes.append(lane)
            if (
                lane.job.start_step < lane.job.end_step
            ):  # what is only evaluated has no time of its own
                self._seats[lane.job.trial] = _Seat(self._free_slot(), self.clock())

    def _free_slot(self) -> int:
        taken = {seat.slot for seat in self._seats.values()}
        return next(slot for slot in count() if slot not in taken)

    def _leave(self, trial: int) -> LaneSpan | None:
        """Give a lane's slot back and return how long it had it; None if it had none."""
        seat = self._seats.pop(trial, None)
        if seat is None:
            return None
        return LaneSpan(slot=seat.slot, began_s=seat.began_s, ended_s=self.clock())

    def _evaluate(self, lanes: Sequence[Lane]) -> list[LaneOutcome]:
        """Evaluate finished lanes, those of the same rows and type together, and publish them."""
        groups: dict[tuple[str, int | None, str], list[Lane]] = {}
        for lane in lanes:
            job = lane.job
            groups.setdefault((job.eval_split, job.eval_rows, job.eval_dtype), []).append(lane)
        outcomes = []
        for (split, num_rows, dtype), group in groups.items():
            rows = self.splits[split][:num_rows]
            begin = time.perf_counter()
            with self._computing_in(dtype):
                results = self.pack.evaluate([lane.adapter for lane in group], rows, split=split)
            self._note_peak([lane.job for lane in group])
            elapsed = time.perf_counter() - begin
            self.evaluation_s += elapsed
            for lane, result in zip(group, results, strict=True):
                lane.wall_s += elapsed / len(group)
                outcome = self._finish(lane, result)
                if lane.job.metrics and outcome.state is TrialState.COMPLETE:
                    outcome = self._add_metrics(outcome, lane, rows)
                outcomes.append(outcome)
        return outcomes

    @contextmanager
    def _computing_in(self, dtype: str) -> Iterator[None]:
        """Compute in the type that a job is evaluated in, then in the study's own again."""
        base = self.pack.base
        try:
            if dtype != "train":
                base.set_compute_dtype(DTYPES[dtype])
            yield
        finally:
            if dtype != "train":
                base.set_compute_dtype(self._train_dtype)

    def _add_metrics(
        self, outcome: LaneOutcome, lane: Lane, rows: Sequence[TokenizedRow]
    ) -> LaneOutcome:
        """Return a lane's outcome with the metrics that its job asks for; failing ones have a reason."""
        assert self.scorer is not None, "a job asks for metrics, the executor has no scorer"
        begin = time.perf_counter()
        with self._computing_in(lane.job.eval_dtype):
            metrics = self.scorer.score(lane.adapter, rows, lane.job.metrics)
        self.meter.restart()  # writing answers has no part in the peaks of lanes
        elapsed = time.perf_counter() - begin
        self.evaluation_s += elapsed
        return replace(outcome, metrics=metrics, wall_s=outcome.wall_s + elapsed)

    def _finish(self, lane: Lane, result: EvalResult) -> LaneOutcome:
        if not abs(result.mean_loss) < float("inf"):
            reason = f"evaluation loss {result.mean_loss} at step {lane.step}"
            return self._outcome(lane, TrialState.DIVERGED, reason=reason)
        if lane.job.result_folder is not None and lane.adapter is not None:
            held = lane.held or {}
            needed = sum(tensor.nbytes for tensor in (lane.adapter.flat, *held.values()))
            with publish_folder(lane.job.result_folder, expected_bytes=needed) as folder:
                save_adapter(lane.adapter, folder, base_model=self.base_model)
                if held:
                    save_state(held, folder)
        return self._outcome(lane, TrialState.COMPLETE, evaluation=result)

    def _outcome(
        self,
        lane: Lane,
        state: TrialState,
        *,
        evaluation: EvalResult | None = None,
        reason: str = "",
    ) -> LaneOutcome:
        stride = -(-len(lane.points) // MAX_POINTS) or 1
        self._ended_tokens += lane.num_tokens
        return LaneOutcome(
            trial=lane.job.trial,
            rung=lane.job.rung,
            state=state,
            points=tuple(lane.points[::-1][::stride][::-1]),
            evaluation=evaluation,
            reason=reason,
            wall_s=lane.wall_s,
            num_tokens=lane.num_tokens,
            peak_bytes=self._peaks.pop(lane.job.trial, 0),
            pack_lanes=lane.pack_lanes,
            metrics=_without_values(lane.job, reason),
        )

    def _note_peak(self, jobs: Sequence[LaneJob]) -> None:
        in_use = self.meter.in_use()
        for job in jobs:
            self._peaks[job.trial] = max(in_use, self._peaks.get(job.trial, 0))

    def _begin_stretch(self, lanes: Sequence[Lane]) -> None:
        """Before a step: forget the peaks of other lanes, if the lanes are others."""
        members = tuple((lane.job.trial, lane.job.rung) for lane in lanes)
        if self._stretch is None or self._stretch.members != members:
            self.pack.largest_pass = NO_PASS
            self.meter.restart()
            self._stretch = _Stretch(members)
        self._stretch.stepping = True

    def _end_step(self, lanes: Sequence[Lane]) -> None:
        assert self._stretch is not None
        self._stretch.stepping = False
        self._stretch.steps += 1
        self._note_peak([lane.job for lane in lanes])
        if any(lane.finished or lane.divergence for lane in lanes):
            self._end_stretch()

    def _end_stretch(self, *, out_of_memory: bool = False) -> None:
        stretch, self._stretch = self._stretch, None
        size, peaks = self.pack.largest_pass, self.meter.peaks()
        if stretch is None or peaks is None or size == NO_PASS:
            return
        self._pack_peaks.append(
            PackPeak(
                device=self.meter.device_name,
                trials=tuple(trial for trial, _ in stretch.members),
                steps=stretch.steps,
                rows=size.rows,
                max_length=size.max_length,
                num_labels=size.num_labels,
                allocated_bytes=peaks.allocated_bytes,
                reserved_bytes=peaks.reserved_bytes,
                process_bytes=peaks.process_bytes,
                free_bytes=self.meter.free_bytes,
                out_of_memory=out_of_memory,
            )
        )

    def _shrink(self) -> list[LaneOutcome]:
        """Free all lanes after running out of memory; halve the lanes, or give up on a lone one."""
        if self._stretch is not None and self._stretch.stepping:  # not in joining or evaluation
            self._end_stretch(out_of_memory=True)
        self._stretch = None
        self._free_pass()
        self.pack.read()
        lanes, self._lanes = self._lanes, []
        jobs = [lane.job for lane in lanes]
        if self._parked and len(jobs) < self.max_lanes:  # it was a lane that did not get in
            jobs.append(self._parked[0].job)
        elif self._waiting and len(jobs) < self.max_lanes:
            jobs.append(self._waiting[0])
        self._note_peak(jobs)
        if len(jobs) > 1:
            self.max_lanes = max(1, min(self.max_lanes, len(jobs) // 2))
            self._park(lanes)
            return []
        step = lanes[0].step if lanes else 0
        if not lanes:
            (self._parked or self._waiting).pop(0)
        del lanes
        self._free_pass()
        return [
            LaneOutcome(
                trial=jobs[0].trial,
                rung=jobs[0].rung,
                state=TrialState.INFEASIBLE,
                reason=f"out of memory as the only lane, at step {step}",
                peak_bytes=self._peaks.pop(jobs[0].trial),
                metrics=_without_values(jobs[0], "out of memory as the only lane"),
                span=self._leave(jobs[0].trial),
            )
        ]

    def _park(self, lanes: Sequence[Lane]) -> None:
        """Put lanes aside in their order: on the host, or, with nothing trained, back to their jobs."""
        for lane in lanes:
            lane.park()
        self._parked = [lane for lane in lanes if lane.parked is not None] + self._parked
        self._waiting = [lane.job for lane in lanes if lane.parked is None] + self._waiting
        self._free_pass()

    def _free_pass(self) -> None:
        """Give back what a pass that failed has left."""
        self.pack.base.layout.clear()
        gc.collect()
        if self.pack.base.device.type == "cuda":
            torch.cuda.empty_cache()


def _is_worth_saving(lane: Lane) -> bool:
    """Return whether a lane has a place for its state and has trained since it was last there."""
    trained = lane.parked is not None or lane.optimizer is not None
    has_moved = lane.step > lane.job.start_step and lane.step != lane.saved_step
    return lane.job.state_folder is not None and trained and has_moved and not lane.divergence


def _without_values(job: LaneJob, reason: str) -> tuple[MetricResult, ...]:
    """Return a result of every metric that the job asks for: whoever asks is answered."""
    return tuple(MetricResult(metric=name, reason=reason) for name in job.metrics)


class _Seat(NamedTuple):
    """A lane's slot, and when it joined."""

    slot: int
    began_s: float


@dataclass
class _Stretch:
    """Steps over which the lanes of the pack did not change."""

    members: tuple[tuple[int, int], ...]  # trial and rung
    steps: int = 0
    stepping: bool = False  # whether a step has begun and not ended
