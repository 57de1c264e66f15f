"""One lane: a trial's adapter, its AdamW state and where it is in its segment."""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lora_tune.engine.lora import LaneAdapter
from lora_tune.engine.schedule import learning_rate_at
from lora_tune.records import LaneJob, Point

STATE_FILE = "lane_state.safetensors"

# A lane has diverged after this many steps in a row above its first loss plus this margin (nats).
DIVERGED_STEPS = 3
DIVERGED_MARGIN = 0.5


@dataclass(kw_only=True)
class Lane:
    """A lane that is being trained. ``step`` counts finished optimizer steps of the trial."""

    job: LaneJob
    adapter: LaneAdapter | None
    optimizer: torch.optim.AdamW | None
    step: int
    points: list[Point] = field(default_factory=list)
    held: dict[str, Tensor] | None = None  # the state at ``job.hold_step``, for the next rung
    steps_above: int = 0
    wall_s: float = 0.0
    pack_lanes: int = 1

    @property
    def finished(self) -> bool:
        """Whether the segment has no step left."""
        return self.step >= self.job.end_step

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
        """Record a step's reading and count the steps above the first loss."""
        self.points.append(point)
        self.step = point.step
        above = point.train_loss > self.points[0].train_loss + DIVERGED_MARGIN
        self.steps_above = self.steps_above + 1 if above else 0
        if self.step == self.job.hold_step:
            self.held = self.state()

    @property
    def divergence(self) -> str:
        """Why the lane has to end, or an empty string."""
        if not self.points:
            return ""
        last = self.points[-1]
        if not (abs(last.train_loss) < float("inf") and abs(last.grad_norm) < float("inf")):
            return f"loss {last.train_loss} at step {last.step}, gradient norm {last.grad_norm}"
        if self.steps_above >= DIVERGED_STEPS:
            return (
                f"loss {last.train_loss:.2f} at step {last.step}, more than {DIVERGED_MARGIN} above the "
                f"first ({self.points[0].train_loss:.2f}) for {DIVERGED_STEPS} steps"
            )
        return ""

    def state(self) -> dict[str, Tensor]:
        """Return copies, on the CPU, of the adapter and its optimizer state."""
        assert self.adapter is not None
        assert self.optimizer is not None
        tensors = {"step": torch.tensor(self.step)}
        for name, pair in self.adapter.weights.items():
            for letter, matrix in zip("AB", pair, strict=True):
                tensors[f"{name}.{letter}"] = matrix.detach().to("cpu", copy=True)
                for key, value in self.optimizer.state.get(matrix, {}).items():
                    tensors[f"{name}.{letter}.{key}"] = value.detach().to("cpu", copy=True)
        return tensors


def new_adamw(adapter: LaneAdapter, *, weight_decay: float) -> torch.optim.AdamW:
    """Return a lane's AdamW; the learning rate is set before each step."""
    return torch.optim.AdamW(adapter.parameters(), lr=0.0, weight_decay=weight_decay, foreach=True)


def save_state(state: dict[str, Tensor], folder: Path) -> None:
    """Write a lane state into a folder that is being published."""
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / STATE_FILE)


def restore_lane(lane: Lane, folder: Path) -> None:
    """Put the state in ``folder`` into a fresh lane: same numbers as if it had never stopped."""
    assert lane.adapter is not None
    assert lane.optimizer is not None
    tensors = load_file(folder / STATE_FILE)
    lane.step = int(tensors["step"])
    for name, pair in lane.adapter.weights.items():
        for letter, matrix in zip("AB", pair, strict=True):
            key = f"{name}.{letter}"
            with torch.no_grad():
                matrix.copy_(tensors[key])
            if f"{key}.step" in tensors:
                lane.optimizer.state[matrix] = {
                    # foreach AdamW keeps its step count on the CPU
                    "step": tensors[f"{key}.step"],
                    "exp_avg": tensors[f"{key}.exp_avg"].to(matrix.device),
                    "exp_avg_sq": tensors[f"{key}.exp_avg_sq"].to(matrix.device),
                }
