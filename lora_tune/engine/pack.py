"""A trial pack: lanes that share every pass through the frozen base.

Shape key: K lanes, B rows per lane, T tokens, H hidden size, N label positions of all lanes.

Each lane's loss is the mean over the target tokens of its own effective batch, and the lanes' losses
are added up: since no parameter is shared, every lane gets exactly the gradient that it would get
alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lora_tune.engine.adapter_files import load_adapter
from lora_tune.engine.base import BaseModel
from lora_tune.engine.batches import Batch, collate, rows_of_step
from lora_tune.engine.lane import Lane, new_adamw, restore_lane
from lora_tune.engine.lora import LaneAdapter
from lora_tune.engine.loss import label_losses
from lora_tune.errors import StoreError
from lora_tune.files import is_complete
from lora_tune.records import EvalResult, LaneJob, Point, TokenizedRow


@dataclass(frozen=True, slots=True, kw_only=True)
class PackSettings:
    """What all lanes of a study have in common."""

    effective_batch_size: int
    micro_batch_size: int
    max_grad_norm: float
    weight_decay: float
    grouped: bool


class Gradients(NamedTuple):
    """What a pack's backward pass left: mean loss and tokens per lane; gradients are in the lanes."""

    losses: list[float]
    num_tokens: list[int]


class PassSize(NamedTuple):
    """Sizes of a pass through the base, all lanes together."""

    rows: int
    max_length: int  # tokens a row, padding included
    num_labels: int  # label positions


NO_PASS = PassSize(0, 0, 0)


class TrialPack:
    """Trains and evaluates lanes on one base.

    ``largest_pass`` has the largest value of each size since it was last set to ``NO_PASS``.
    """

    def __init__(
        self, base: BaseModel, train: Sequence[TokenizedRow], settings: PackSettings
    ) -> None:
        self.base = base
        self.train = train
        self.settings = settings
        self.largest_pass = NO_PASS
        base.layout.grouped = settings.grouped

    def new_lane(self, job: LaneJob) -> Lane:
        """Return a lane at ``job.start_step``: fresh, restored from its folder, or the bare base."""
        if job.config is None:
            return Lane(job=job, adapter=None, optimizer=None, step=job.end_step)
        if job.start_folder is not None and not is_complete(job.start_folder):
            raise StoreError(
                f"{job.start_folder}: missing or damaged (its files do not match manifest.json). "
                "Bring the folder back, or run the study under another name."
            )
        if job.start_folder is not None and job.end_step == job.start_step:
            adapter = load_adapter(job.config, job.start_folder, self.base.device)
            return Lane(job=job, adapter=adapter, optimizer=None, step=job.end_step)
        adapter = LaneAdapter.initialize(job.config, self.base.linears, self.base.device)
        optimizer = new_adamw(adapter, weight_decay=self.settings.weight_decay)
        lane = Lane(job=job, adapter=adapter, optimizer=optimizer, step=0)
        if job.start_folder is not None:
            restore_lane(lane, job.start_folder)
            if lane.step == job.hold_step:  # short rungs may hold where the one before did
                lane.held = lane.state()
        return lane

    def train_step(self, lanes: Sequence[Lane]) -> None:
        """Do one optimizer step of every lane; each lane's reading goes into its points."""
        for lane in lanes:
            assert lane.optimizer is not None
            lane.optimizer.zero_grad(set_to_none=True)
        found = self.accumulate(lanes)
        for lane, loss, num_tokens in zip(lanes, found.losses, found.num_tokens, strict=True):
            assert lane.optimizer is not None
            assert lane.adapter is not None
            norm = torch.nn.utils.clip_grad_norm_(
                lane.adapter.parameters(), self.settings.max_grad_norm, foreach=True
            )
            rate = lane.next_learning_rate
            for group in lane.optimizer.param_groups:
                group["lr"] = rate
            lane.optimizer.step()
            lane.pack_lanes = max(lane.pack_lanes, len(lanes))
            lane.note_point(
                Point(
                    step=lane.step + 1,
                    train_loss=loss,
                    learning_rate=rate,
                    grad_norm=float(norm),
                    num_tokens=num_tokens,
                )
            )

    def accumulate(self, lanes: Sequence[Lane]) -> Gradients:
        """Run the effective batch of every lane forward and backward, micro-batch by micro-batch."""
        settings = self.settings
        micro_batches = [self._micro_batches(lane) for lane in lanes]
        labels = [sum(row.num_labels for rows in parts for row in rows) for parts in micro_batches]
        losses = torch.zeros(len(lanes), device=self.base.device)
        layout = self.base.layout
        layout.adapters = tuple(lane.adapter for lane in lanes)
        layout.steps = tuple(lane.step + 1 for lane in lanes)
        layout.training = True
        try:
            for micro_step in range(settings.effective_batch_size // settings.micro_batch_size):
                layout.micro_step = micro_step
                batch, lane_N = self._pack_rows([parts[micro_step] for parts in micro_batches])
                weights_N = 1.0 / torch.tensor(labels, device=self.base.device)[lane_N]
                hidden_NH = self._label_hidden(batch)
                found = label_losses(hidden_NH, self.base.head, batch.targets_N, weights_N)
                found.total.backward()  # type: ignore[no-untyped-call]
                losses.index_add_(0, lane_N, found.losses_N * weights_N)
        finally:
            layout.training = False
        num_tokens = [
            sum(len(row.input_ids) for rows in parts for row in rows) for parts in micro_batches
        ]
        return Gradients(losses.tolist(), num_tokens)

    @torch.no_grad()
    def evaluate(
        self, adapters: Sequence[LaneAdapter | None], rows: Sequence[TokenizedRow], *, split: str
    ) -> list[EvalResult]:
        """Return every adapter's per-example losses on ``rows``; all adapters share each pass."""
        layout = self.base.layout
        layout.adapters = tuple(adapters)
        layout.steps = (0,) * len(adapters)
        sums = np.zeros((len(adapters), len(rows)))
        by_length = sorted(range(len(rows)), key=lambda i: (len(rows[i].input_ids), i))
        for start in range(0, len(rows), self.settings.micro_batch_size):
            chunk = by_length[start : start + self.settings.micro_batch_size]
            part = [rows[i] for i in chunk]
            batch, _ = self._pack_rows([part] * len(adapters))
            hidden_NH = self._label_hidden(batch)
            losses_N = label_losses(hidden_NH, self.base.head, batch.targets_N, None).losses_N
            row_sums = torch.zeros(len(part) * len(adapters), device=losses_N.device)
            row_sums.index_add_(0, batch.rows_N, losses_N)
            sums[:, chunk] = row_sums.reshape(len(adapters), len(part)).cpu().numpy()
        dtype = str(self.base.compute_dtype).removeprefix("torch.")
        return [
            EvalResult(
                split=split,
                loss_sums=tuple(float(value) for value in lane_sums),
                label_counts=tuple(row.num_labels for row in rows),
                compute_dtype=dtype,
            )
            for lane_sums in sums
        ]

    def _micro_batches(self, lane: Lane) -> list[list[TokenizedRow]]:
        """Return the lane's next effective batch, rows of similar length together."""
        config = lane.job.config
        assert config is not None
        numbers = rows_of_step(
            len(self.train),
            step=lane.step + 1,
            batch_size=self.settings.effective_batch_size,
            data_seed=config.data_seed,
        )
        rows = sorted((self.train[i] for i in numbers), key=lambda row: -len(row.input_ids))
        size = self.settings.micro_batch_size
        return [rows[start : start + size] for start in range(0, len(rows), size)]

    def _pack_rows(self, lane_rows: Sequence[Sequence[TokenizedRow]]) -> tuple[Batch, Tensor]:
        """Put the lanes' rows under each other; also return the lane of each label position."""
        batch = collate([row for rows in lane_rows for row in rows], self.base.device)
        size = (*batch.ids_BT.shape, len(batch.positions_N))
        self.largest_pass = PassSize(*map(max, self.largest_pass, size))
        starts = np.cumsum([0, *(len(rows) for rows in lane_rows)])
        self.base.layout.rows = tuple(
            slice(int(a), int(b)) for a, b in zip(starts[:-1], starts[1:], strict=True)
        )
        lane_of_row = np.repeat(np.arange(len(lane_rows)), [len(rows) for rows in lane_rows])
        return batch, torch.from_numpy(lane_of_row).to(self.base.device)[batch.rows_N]

    def _label_hidden(self, batch: Batch) -> Tensor:
        return self.base.hidden_states(batch.ids_BT).flatten(0, 1)[batch.positions_N]
