"""One lane: a trial's adapter, its AdamW state and where it is in its segment.

A batch may be easy or hard, so a loss alone says little about a lane. One whose losses are far above what the
untuned model is known to lose is in doubt, and has diverged when it also loses far more than the untuned
model on the very rows of these steps. Whoever trains the lane asks for the doubted steps and answers them.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lora_tune.engine.lora import LaneAdapter
from lora_tune.engine.schedule import learning_rate_at
from lora_tune.records import LaneJob, Point
from lora_tune.stats.smoothing import RunningLoss

STATE_FILE = "lane_state.safetensors"

# A lane has diverged after this many steps in a row, each on its own rows above the untuned model's loss
# plus this margin (nats).
DIVERGED_STEPS = 3
DIVERGED_MARGIN = 0.5
# In float16 a step whose gradient overflows is left out and the loss scale is halved; a lane has diverged
# when so many in a row had to be left out.
MOST_SKIPPED_STEPS = 20


@dataclass(kw_only=True, eq=False)
class Lane:
    """A lane that is being trained. ``step`` counts the optimizer steps of the trial.

    ``scaler`` is there in float16 only. A parked lane has its state on the host and no adapter.
    """

    job: LaneJob
    adapter: LaneAdapter | None
    optimizer: torch.optim.AdamW | None
    step: int
    scaler: torch.amp.GradScaler | None = None
    points: list[Point] = field(default_factory=list)
    held: dict[str, Tensor] | None = None  # the state at ``job.hold_step``, for the next rung
    parked: dict[str, Tensor] | None = None
    steps_above: int = 0  # steps in a row far above the untuned model
    # the untuned model's losses on the rows of steps, by step, where they had to be asked for
    base_losses: dict[int, float] = field(default_factory=dict)
    skipped: int = 0  # steps in a row that float16 left out
    num_tokens: int = 0  # of the points noted
    wall_s: float = 0.0
    pack_lanes: int = 1
    smoothed: RunningLoss = field(default_factory=RunningLoss)
    over_limit: str = ""  # how the loss exceeded a limit of the job's
    saved_step: int | None = None  # that the state on disk is of

    @property
    def finished(self) -> bool:
        """Whether the segment has no step left."""
        return self.step >= self.job.end_step

    @property
    def first_loss(self) -> float:
        """Loss at the trial's first step: the untuned model's on that step's rows."""
        known = self.job.first_loss
        return self.points[0].train_loss if known is None else known

    @property
    def base_loss(self) -> float:
        """Loss of the untuned model, as far as it is known: the mean over the batches that it was seen on."""
        known = [self.first_loss, *self.base_losses.values()]
        return sum(known) / len(known)

    @property
    def doubted_steps(self) -> tuple[int, ...]:
        """Steps for which ``compare_with_base`` has to be told the untuned model's loss."""
        if self.steps_above < DIVERGED_STEPS:
            return ()
        last = self.points[-DIVERGED_STEPS:]
        return tuple(point.step for point in last if point.step not in self.base_losses)

    @property
    def next_learning_rate(self) -> float:
        """Learning rate of the step that comes next."""
        config = self.job.config
        assert config is not None
        return learning_rate_at(
            self.step + 1,
            peak=config.learning_rate,
            warmup_steps=self.job.warmup_steps,
            hold_step=self.job.hold_step,
            end_step=self.job.end_step,
        )

    def note_point(self, point: Point) -> None:
        """Record a step's reading and keep the state of the hold step; nothing after divergence."""
        if self.divergence:
            return
        self._count(point)
        if point.step == self.job.hold_step and self.job.keep_state:
            self.held = self.state()

    def replay(self, points: Iterable[Point], base_losses: Mapping[int, float]) -> None:
        """Count readings of a lane that is gone as it did, asking ``base_losses`` where it was in doubt."""
        for point in points:
            self._count(point)
            if steps := self.doubted_steps:
                self.compare_with_base({step: base_losses[step] for step in steps})

    def compare_with_base(self, losses: Mapping[int, float]) -> None:
        """Settle a doubt: ``losses`` are the untuned model's on the rows of the doubted steps."""
        self.base_losses.update(losses)
        above = (
            point.train_loss > self.base_losses[point.step] + DIVERGED_MARGIN
            for point in self.points[: -DIVERGED_STEPS - 1 : -1]
        )
        self.steps_above = sum(takewhile(bool, above))

    def _count(self, point: Point) -> None:
        self.points.append(point)
        self.num_tokens += point.num_tokens
        self.step = max(self.step, point.step)
        self._compare_with_limits(point)
        above = point.train_loss > self.base_loss + DIVERGED_MARGIN
        self.steps_above = self.steps_above + 1 if above else 0
        self.skipped = 0 if _is_finite(point.grad_norm) else self.skipped + 1

    def _compare_with_limits(self, point: Point) -> None:
        loss = self.smoothed.add(point.step, point.train_loss)
        for step, limit in self.job.loss_limits:
            if step == point.step and loss > limit:
                self.over_limit = (
                    f"smoothed loss {loss:.2f} at step {step}, above {limit:.2f}, the limit that finished "
                    "trials set there"
                )

    @property
    def divergence(self) -> str:
        """Why the lane has to end, or an empty string."""
        if not self.points:
            return ""
        last = self.points[-1]
        most_skipped = MOST_SKIPPED_STEPS if self._scales_loss else 0
        if not _is_finite(last.train_loss) or self.skipped > most_skipped:
            return f"loss {last.train_loss} at step {last.step}, gradient norm {last.grad_norm}"
        if self.over_limit:
            return self.over_limit
        if self.steps_above >= DIVERGED_STEPS and not self.doubted_steps:
            return (
                f"loss {last.train_loss:.2f} at step {last.step}, for {DIVERGED_STEPS} steps more than "
                f"{DIVERGED_MARGIN} above the untuned model on the same rows "
                f"({self.base_losses[last.step]:.2f})"
            )
        return ""

    @property
    def _scales_loss(self) -> bool:
        return self.scaler is not None or "scale" in (self.parked or {})

    def tensors(self) -> list[Tensor]:
        """Return all tensors that are alive because of this lane, on the device and on the host."""
        found = [*(self.held or {}).values(), *(self.parked or {}).values()]
        if self.adapter is not None:
            found.append(self.adapter.flat)
            if self.adapter.flat.grad is not None:
                found.append(self.adapter.flat.grad)
            if self.optimizer is not None:
                found += self.optimizer.state[self.adapter.flat].values()
        return found

    def state(self) -> dict[str, Tensor]:
        """Return copies, on the CPU, of all that the lane needs to go on from here.

        Flat tensors, in the order of the configuration's target modules: the adapter's elements, both
        moments of AdamW and its step count; in float16 the loss scale.
        """
        if self.parked is not None:
            return self.parked
        return {name: _to_host(tensor) for name, tensor in self._state_now().items()}

    def _state_now(self) -> dict[str, Tensor]:
        assert self.adapter is not None
        assert self.optimizer is not None
        moments = self.optimizer.state[self.adapter.flat]
        found = {"step": torch.tensor(self.step), "adapter": self.adapter.flat}
        found |= {f"optimizer.{key}": value for key, value in moments.items()}
        if self.scaler is not None:
            scale = self.scaler.state_dict()
            found["scale"] = torch.tensor(scale["scale"])
            found["scale.growth"] = torch.tensor(scale["_growth_tracker"])
        return found

    def accepts(self, state: Mapping[str, Tensor]) -> bool:
        """Return whether a lane of this configuration has left ``state``: the same names and shapes."""
        found = {name: tensor.shape for name, tensor in state.items()}
        return found == {name: tensor.shape for name, tensor in self._state_now().items()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from ``state``: same numbers as if the lane had never stopped."""
        assert self.adapter is not None
        assert self.optimizer is not None
        self.step = int(state["step"])
        self.adapter.flat.copy_(state["adapter"])
        for key, value in self.optimizer.state[self.adapter.flat].items():
            value.copy_(state[f"optimizer.{key}"])
        if self.scaler is not None:
            self.scaler.load_state_dict(
                {
                    **self.scaler.state_dict(),
                    "scale": float(state["scale"]),
                    "_growth_tracker": int(state["scale.growth"]),
                }
            )

    def park(self) -> None:
        """Move the state to the host and free the device of it."""
        if self.adapter is not None and self.optimizer is not None:
            self.parked = self.state()
            self.adapter = self.optimizer = self.scaler = None


def new_adamw(adapter: LaneAdapter, *, weight_decay: float) -> torch.optim.AdamW:
    """Return a lane's AdamW, one fused kernel over all its elements, its moments already there.

    The learning rate is set before each step.
    """
    optimizer = torch.optim.AdamW([adapter.flat], lr=0.0, weight_decay=weight_decay, fused=True)
    optimizer.state[adapter.flat] = {
        "step": torch.zeros((), device=adapter.flat.device),
        "exp_avg": torch.zeros_like(adapter.flat),
        "exp_avg_sq": torch.zeros_like(adapter.flat),
    }
    return optimizer


def save_state(state: dict[str, Tensor], folder: Path) -> None:
    """Write a lane state into a folder that is being published."""
    save_file(state, folder / STATE_FILE)


def load_state(folder: Path) -> dict[str, Tensor]:
    """Return the lane state saved in ``folder``, on the CPU."""
    return load_file(folder / STATE_FILE)


def _to_host(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)


def _is_finite(value: float) -> bool:
    return abs(value) < float("inf")
