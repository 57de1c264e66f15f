"""Our engine's own step: its base model, layers, loss and pack, on the meta device."""

from collections.abc import Sequence

import torch

from lora_tune.engine.base import BaseModel
from lora_tune.engine.batches import Batch, RowArrays
from lora_tune.engine.lane import Lane
from lora_tune.engine.lora import LaneAdapter
from lora_tune.engine.pack import PackSettings, TrialPack
from lora_tune.memory.request import LaneShape, MemoryRequest
from lora_tune.records import LaneJob, TokenizedRow, TrialConfig
from lora_tune.trace.step import Setting
from lora_tune.trace.tracker import StorageTracker

IGNORED = -100


class TracedPack(TrialPack):
    """The engine's pack; what it makes of the batch is booked as inputs."""

    tracker: StorageTracker

    def _pack_rows(self, lane_rows: Sequence[Sequence[RowArrays]], micro_step: int) -> Batch:
        with self.tracker.category("inputs"):
            return super()._pack_rows(lane_rows, micro_step)


def build_pack(base: BaseModel, request: MemoryRequest, tracker: StorageTracker) -> TracedPack:
    """Return the pack with one micro-batch of equal rows per step."""
    base.set_gradient_checkpointing(request.gradient_checkpointing)
    labels = labels_per_row(request)
    row = TokenizedRow(
        input_ids=(0,) * request.max_length,
        labels=(IGNORED,) * (request.max_length - labels) + (0,) * labels,
    )
    settings = PackSettings(
        effective_batch_size=request.micro_batch_size,
        micro_batch_size=request.micro_batch_size,
        max_grad_norm=1.0,
        weight_decay=0.0,
        group_rank=request.group_rank,
    )
    pack = TracedPack(base, (row,) * request.micro_batch_size, settings)
    pack.tracker = tracker
    return pack


def labels_per_row(request: MemoryRequest) -> int:
    """Return the label positions of a row: a share of its tokens, the first never being one."""
    wanted = round(request.label_fraction * request.max_length)
    return max(1, min(wanted, request.max_length - 1))


def empty_lane(shape: LaneShape, base: BaseModel, modules: Sequence[str], device: str) -> Lane:
    """Return a lane without an optimizer whose adapter's values do not matter."""
    config = TrialConfig(
        rank=shape.rank,
        lora_alpha=2.0 * shape.rank,
        lora_dropout=shape.lora_dropout,
        target_set="traced",
        target_modules=tuple(modules),
        learning_rate=1e-3,
    )
    job = LaneJob(
        trial=0,
        rung=0,
        config=config,
        start_step=0,
        hold_step=1,
        end_step=1,
        warmup_steps=0,
        eval_split="selection",
        eval_dtype="train",
        start_folder=None,
        result_folder=None,
    )
    adapter = LaneAdapter(config, base.linears, device, trained=True)
    scaler = torch.amp.GradScaler(device) if base.compute_dtype is torch.float16 else None
    return Lane(job=job, adapter=adapter, optimizer=None, step=0, scaler=scaler)


def engine_step(pack: TracedPack, lanes: Sequence[Lane], setting: Setting) -> None:
    """Run one micro-batch of all lanes forward and backward."""
    with setting.semantics.installed(), setting.tracker:
        pack.accumulate(lanes)
