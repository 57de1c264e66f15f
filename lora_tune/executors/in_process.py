"""Lane jobs in this process, on one base.

A lane that ends frees its slot at once: the next job joins the pack at the next step, without touching
the base. A lane whose loss diverges leaves alone. Out of memory: the lanes allowed at once are halved
and the lanes that were running begin their segments again; a lane that does not fit alone is infeasible.
"""

import gc
import time
from collections.abc import Callable, Mapping, Sequence

import psutil
import torch

from lora_tune.engine.adapter_files import save_adapter
from lora_tune.engine.base import DTYPES, BaseModel
from lora_tune.engine.lane import Lane, save_state
from lora_tune.engine.memory_errors import is_out_of_memory
from lora_tune.engine.pack import TrialPack
from lora_tune.files import publish_folder
from lora_tune.records import (
    EvalResult,
    LaneJob,
    LaneOutcome,
    LaneReading,
    TokenizedRow,
    TrialState,
)

MAX_POINTS = 200  # readings kept of a segment; longer ones are thinned evenly


class InProcessExecutor:
    """Trains up to ``lanes`` jobs as one trial pack in this process."""

    def __init__(
        self,
        pack: TrialPack,
        splits: Mapping[str, Sequence[TokenizedRow]],
        *,
        lanes: int,
        base_model: str | None,
        on_step: Callable[[], None] = lambda: None,
    ) -> None:
        self.pack = pack
        self.splits = splits
        self.max_lanes = lanes
        self.base_model = base_model
        self.on_step = on_step
        self.num_tokens = 0
        self._waiting: list[LaneJob] = []
        self._lanes: list[Lane] = []
        self._train_dtype = pack.base.compute_dtype
        self.peak_bytes = 0
        if pack.base.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(pack.base.device)

    @property
    def free_slots(self) -> int:
        """Slots for further jobs."""
        return max(0, self.max_lanes - len(self._lanes) - len(self._waiting))

    @property
    def busy(self) -> bool:
        """Whether a job is waiting or running."""
        return bool(self._lanes or self._waiting)

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
                return outcomes
        return []

    def _advance(self) -> list[LaneOutcome]:
        self._fill()
        active = [lane for lane in self._lanes if not lane.finished]
        if active:
            begin = time.perf_counter()
            self.pack.train_step(active)
            elapsed = time.perf_counter() - begin
            for lane in active:
                lane.wall_s += elapsed / len(active)
                self.num_tokens += lane.points[-1].num_tokens
            self._note_peak()
            self.on_step()
        diverged = [lane for lane in active if lane.divergence]
        finished = [lane for lane in self._lanes if lane.finished and lane not in diverged]
        outcomes = [
            self._outcome(lane, TrialState.DIVERGED, reason=lane.divergence) for lane in diverged
        ]
        outcomes += self._evaluate(finished)
        self._lanes = [lane for lane in self._lanes if lane not in diverged + finished]
        return outcomes

    def _fill(self) -> None:
        while self._waiting and len(self._lanes) < self.max_lanes:
            self._lanes.append(self.pack.new_lane(self._waiting[0]))
            del self._waiting[0]

    def _evaluate(self, lanes: Sequence[Lane]) -> list[LaneOutcome]:
        """Evaluate finished lanes, those of the same split and type together, and publish them."""
        groups: dict[tuple[str, str], list[Lane]] = {}
        for lane in lanes:
            groups.setdefault((lane.job.eval_split, lane.job.eval_dtype), []).append(lane)
        outcomes = []
        for (split, dtype), group in groups.items():
            begin = time.perf_counter()
            results = self._losses(group, split, dtype)
            self._note_peak()
            elapsed = time.perf_counter() - begin
            for lane, result in zip(group, results, strict=True):
                lane.wall_s += elapsed / len(group)
                outcomes.append(self._finish(lane, result))
        return outcomes

    def _losses(self, lanes: Sequence[Lane], split: str, dtype: str) -> list[EvalResult]:
        base = self.pack.base
        try:
            if dtype != "train":
                base.set_compute_dtype(DTYPES[dtype])
            adapters = [lane.adapter for lane in lanes]
            return self.pack.evaluate(adapters, self.splits[split], split=split)
        finally:
            if dtype != "train":
                base.set_compute_dtype(self._train_dtype)

    def _finish(self, lane: Lane, result: EvalResult) -> LaneOutcome:
        if not abs(result.mean_loss) < float("inf"):
            reason = f"evaluation loss {result.mean_loss} at step {lane.step}"
            return self._outcome(lane, TrialState.DIVERGED, reason=reason)
        if lane.job.result_folder is not None and lane.adapter is not None:
            with publish_folder(lane.job.result_folder) as folder:
                save_adapter(lane.adapter, folder, base_model=self.base_model)
                if lane.held is not None:
                    save_state(lane.held, folder)
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
        return LaneOutcome(
            trial=lane.job.trial,
            rung=lane.job.rung,
            state=state,
            points=tuple(lane.points[::-1][::stride][::-1]),
            evaluation=evaluation,
            reason=reason,
            wall_s=lane.wall_s,
            num_tokens=sum(point.num_tokens for point in lane.points),
            peak_bytes=self.peak_bytes,
            pack_lanes=lane.pack_lanes,
        )

    def _note_peak(self) -> None:
        self.peak_bytes = max(self.peak_bytes, memory_in_use(self.pack.base))

    def _shrink(self) -> list[LaneOutcome]:
        """Free all lanes after running out of memory; halve the lanes, or give up on a lone one."""
        self._note_peak()
        jobs = [lane.job for lane in self._lanes]
        if self._waiting and len(jobs) < self.max_lanes:  # it was a lane that did not get in
            jobs.append(self._waiting.pop(0))
        lone = self._lanes[0] if len(self._lanes) == 1 else None
        self._lanes = []
        self.pack.base.layout.adapters = ()
        gc.collect()
        if self.pack.base.device.type == "cuda":
            torch.cuda.empty_cache()
        if len(jobs) > 1:
            self.max_lanes = max(1, len(jobs) // 2)
            self._waiting = jobs + self._waiting
            return []
        job = jobs[0]
        return [
            LaneOutcome(
                trial=job.trial,
                rung=job.rung,
                state=TrialState.INFEASIBLE,
                reason=f"out of memory as the only lane, at step {lone.step if lone else 0}",
                peak_bytes=self.peak_bytes,
            )
        ]


def memory_in_use(base: BaseModel) -> int:
    """Return CUDA's peak allocated bytes since the start, or this process's resident bytes on a CPU."""
    if base.device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(base.device))
    return int(psutil.Process().memory_info().rss)
