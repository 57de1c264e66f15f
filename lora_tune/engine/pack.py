"""A trial pack: lanes that share passes through the frozen base.

Shape key: K lanes, H hidden size, L label positions of all lanes.

Each lane's loss is the mean over the target tokens of its own effective batch, and the lanes' losses
are added up: since no parameter is shared, every lane gets exactly the gradient that it would get
alone.

Nothing in a step waits for the device. Losses and gradient norms stay there until they are read: every
``read_every`` steps, and whenever a lane reaches a step at which its state is kept or its segment ends. Lanes
that share products share their NaNs too, so from the first reading that is not finite on no
optimizer step of the pack takes effect (AdamW's ``found_inf``). When that is read, the lanes are put back
to that step and take it again, each with products of its own: the lane that failed is then told from its
neighbours, and these go on as if it had never been there.

On a CPU the lanes of a step are cut into parts that are computed beside each other (``lane_threads.py``).

A lane whose readings put it in doubt is compared at once with the bare base on the rows of those steps.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from lora_tune.engine.adapter_files import load_adapter
from lora_tune.engine.base import BaseModel
from lora_tune.engine.batches import Batch, RowArrays, as_arrays, collate, rows_of_step
from lora_tune.engine.lane import Lane, load_state, new_adamw
from lora_tune.engine.lane_files import job_key, load_lane, save_lane
from lora_tune.engine.lane_threads import LaneThreads, cut, num_parts
from lora_tune.engine.lora import LaneAdapter
from lora_tune.engine.loss import label_losses
from lora_tune.errors import StoreError
from lora_tune.files import is_complete
from lora_tune.records import EvalResult, LaneJob, Point, TokenizedRow

READ_EVERY_ON_GPUS = 10
# Without a backward pass nothing is kept for it: so many more rows fit (a layer's own tensors remain).
EVALUATION_ROWS = 2
_KEPT_ROWS = 8192  # rows that are kept as arrays
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class PackSettings:
    """What all lanes of a study have in common."""

    effective_batch_size: int
    micro_batch_size: int
    max_grad_norm: float
    weight_decay: float
    group_rank: int  # largest sum of ranks in one low-rank product; 0: each lane has its own


class Gradients(NamedTuple):
    """What a pack's backward pass left: mean loss and tokens per lane; gradients are in the lanes."""

    losses_K: Tensor
    num_tokens: list[int]


class PassSize(NamedTuple):
    """Sizes of a pass through the base, all lanes together."""

    rows: int
    max_length: int  # tokens a row, padding included; rows in one line: their mean
    num_labels: int  # label positions


NO_PASS = PassSize(0, 0, 0)


class _Unread(NamedTuple):
    """A step whose losses and gradient norms are still on the device."""

    lanes: tuple[Lane, ...]
    numbers: tuple[int, ...]  # of the step, lane by lane
    rates: tuple[float, ...]
    num_tokens: tuple[int, ...]
    readings: Tensor  # (2, K)
    apart: bool  # each lane had products of its own


class _Passes:
    """The largest pass of each part; what parts compute beside each other counts as one pass."""

    def __init__(self, num_parts: int) -> None:
        self._largest = [NO_PASS] * num_parts

    def noter(self, part: int) -> Callable[[PassSize], None]:
        """Return what a part calls before each of its passes."""

        def note(size: PassSize) -> None:
            self._largest[part] = PassSize(*map(max, self._largest[part], size))

        return note

    def together(self, other: PassSize) -> PassSize:
        """Return the larger of each size of all parts together and of another pass."""
        rows, lengths, labels = zip(*self._largest, strict=True)
        return PassSize(*map(max, other, (sum(rows), max(lengths), sum(labels))))


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
        self.read_every = READ_EVERY_ON_GPUS if base.device.type == "cuda" else 1
        self._unread: list[_Unread] = []
        self._halted = torch.zeros((), device=base.device)
        self._apart = False  # whether the next step is taken with products apart, and read at once
        self._arrays = lru_cache(maxsize=_KEPT_ROWS)(lambda number: as_arrays(train[number]))
        self._threads = LaneThreads(base.device)

    def new_lane(self, job: LaneJob) -> Lane:
        """Return a lane where the job's saved state is, else at ``job.start_step``, or the bare base.

        At its start a lane is fresh, or restored from its start folder.

        Raises:
            StoreError: The start folder is needed and damaged.
        """
        if job.config is None:
            return Lane(job=job, adapter=None, optimizer=None, step=job.end_step)
        if (lane := self._resumed(job)) is not None:
            return lane
        if job.start_folder is not None and not is_complete(job.start_folder):
            raise StoreError(
                f"{job.start_folder}: missing or damaged (its files do not match manifest.json). "
                "Bring the folder back, or run the study under another name."
            )
        base = self.base
        if job.start_folder is not None and job.end_step == job.start_step:
            adapter = load_adapter(job.config, job.start_folder, base.linears, base.device)
            return Lane(job=job, adapter=adapter, optimizer=None, step=job.end_step)
        lane = Lane(job=job, adapter=None, optimizer=None, step=0)
        if job.start_folder is not None:
            lane.parked = load_state(job.start_folder)
            self.unpark(lane)
            # short rungs may hold where the one before did
            if lane.step == job.hold_step and job.keep_state:
                lane.held = lane.state()
        else:
            adapter = LaneAdapter.initialize(job.config, base.linears, base.device)
            self._equip(lane, adapter)
        return lane

    def save_lane(self, lane: Lane) -> None:
        """Publish where a lane is into its job's state folder, between two steps and after ``read``."""
        assert lane.job.state_folder is not None
        save_lane(lane, lane.job.state_folder, key=self._key_of(lane.job))
        lane.saved_step = lane.step

    def _key_of(self, job: LaneJob) -> str:
        return job_key(job, asdict(self.settings) | {"dtype": str(self.base.compute_dtype)})

    def _resumed(self, job: LaneJob) -> Lane | None:
        """Return a lane that goes on from its job's saved state; None if there is none that it can use."""
        lane = load_lane(job, key=self._key_of(job))
        if lane is None or job.config is None or lane.parked is None:
            return None
        state, lane.parked = lane.parked, None
        adapter = LaneAdapter(job.config, self.base.linears, self.base.device, trained=True)
        self._equip(lane, adapter)
        if not lane.accepts(state):
            return None
        lane.restore(state)
        lane.saved_step = lane.step
        return lane

    def unpark(self, lane: Lane) -> None:
        """Bring a lane whose state is on the host back to the device."""
        if lane.parked is None:
            return
        assert lane.job.config is not None
        adapter = LaneAdapter(lane.job.config, self.base.linears, self.base.device, trained=True)
        self._equip(lane, adapter)
        state, lane.parked = lane.parked, None
        lane.restore(state)

    def _equip(self, lane: Lane, adapter: LaneAdapter) -> None:
        lane.adapter = adapter
        lane.optimizer = new_adamw(adapter, weight_decay=self.settings.weight_decay)
        if self.base.compute_dtype is torch.float16:
            lane.scaler = torch.amp.GradScaler(self.base.device.type)

    def train_step(self, lanes: Sequence[Lane]) -> None:
        """Do one optimizer step of every lane; each lane's reading goes into its points when read."""
        apart = self._apart or self._isolated
        self._step(lanes, isolated=apart)
        stops = self._apart or any(
            lane.step in (lane.job.hold_step, lane.job.end_step) for lane in lanes
        )
        if stops or len(self._unread) >= self.read_every:
            self.read()

    def read(self) -> None:
        """Put the losses and norms of the steps since the last reading into the lanes' points."""
        if not self._unread:
            return
        values = iter(torch.cat([step.readings for step in self._unread], 1).T.tolist())
        while self._unread:
            step = self._unread[0]
            readings = [next(values) for _ in step.lanes]
            finite = bool(np.isfinite(readings).all())
            if not finite and not step.apart and len(step.lanes) > 1:
                self._put_back()
                return
            del self._unread[0]
            _note(step, readings)
            for lane in step.lanes:
                self.settle_doubt(lane)
        self._apart = False

    def settle_doubt(self, lane: Lane) -> None:
        """Compare a lane in doubt with the untuned model."""
        if steps := lane.doubted_steps:
            lane.compare_with_base({step: self.base_loss(lane, step) for step in steps})

    def base_loss(self, lane: Lane, step: int) -> float:
        """Return the untuned model's loss on the rows of a lane's step, nats per target token."""
        largest = self.largest_pass  # of training
        rows = [self.train[number] for number in self._rows_of(lane, step)]
        [found] = self.evaluate([None], rows, split="train")
        self.largest_pass = largest
        return found.mean_loss

    @property
    def _isolated(self) -> bool:
        """Whether no lane's NaN can reach another: each has products of its own.

        Always so in float16, where an overflow is an ordinary event.
        """
        return self.settings.group_rank == 0 or self.base.compute_dtype is torch.float16

    def _put_back(self) -> None:
        """Put the lanes back to the first unread step, none of which took effect; the next is apart."""
        unread, self._unread = self._unread, []
        for step in reversed(unread):
            for lane, number in zip(step.lanes, step.numbers, strict=True):
                lane.step = number - 1
        self._halted.zero_()
        self._apart = True

    def _step(self, lanes: Sequence[Lane], *, isolated: bool) -> None:
        found = self._accumulate(lanes, 0 if isolated else self.settings.group_rank)
        grads = []
        for lane in lanes:
            assert lane.adapter is not None
            assert lane.optimizer is not None
            if lane.scaler is not None:
                lane.scaler.unscale_(lane.optimizer)
            assert lane.adapter.flat.grad is not None
            grads.append(lane.adapter.flat.grad)
        norms_K = torch.stack([torch.linalg.vector_norm(grad) for grad in grads])
        readings = torch.stack([found.losses_K, norms_K])
        bad_K = (~torch.isfinite(readings)).any(0).float()
        if not isolated and len(lanes) > 1:
            self._halted.copy_(torch.maximum(self._halted, bad_K.amax()))
        stop_K = bad_K if isolated or len(lanes) == 1 else self._halted.expand(len(lanes))
        # as torch.nn.utils.clip_grad_norm_
        shares_K = (self.settings.max_grad_norm / (norms_K + 1e-6)).clamp(max=1.0)
        rates = []
        for lane, grad, share, stop in zip(lanes, grads, shares_K, stop_K, strict=True):
            rates.append(lane.next_learning_rate)
            grad.mul_(share)
            _update(lane, rates[-1], stop)
            lane.step += 1
            lane.pack_lanes = max(lane.pack_lanes, len(lanes))
        self._unread.append(
            _Unread(
                lanes=tuple(lanes),
                numbers=tuple(lane.step for lane in lanes),
                rates=tuple(rates),
                num_tokens=tuple(found.num_tokens),
                readings=readings,
                apart=isolated,
            )
        )

    def accumulate(self, lanes: Sequence[Lane]) -> Gradients:
        """Run the effective batch of every lane forward and backward, micro-batch by micro-batch.

        Gradients begin at zero; in float16 they are left multiplied by the lane's loss scale.
        """
        return self._accumulate(lanes, 0 if self._isolated else self.settings.group_rank)

    def _accumulate(self, lanes: Sequence[Lane], group_rank: int) -> Gradients:
        own_rows = [self._micro_batches(lane) for lane in lanes]
        num_tokens = [sum(len(row.ids) for rows in own for row in rows) for own in own_rows]
        parts = self._cut([tokens / len(own_rows[0]) for tokens in num_tokens])
        passes = _Passes(len(parts))
        try:
            found = self._threads.run(
                [
                    partial(
                        self._accumulate_part,
                        [lanes[k] for k in part],
                        [own_rows[k] for k in part],
                        group_rank,
                        passes.noter(number),
                    )
                    for number, part in enumerate(parts)
                ]
            )
        finally:  # a pass that ran out of memory counts too
            self.largest_pass = passes.together(self.largest_pass)
        losses_K = _in_turn(parts, [part_losses_K.unbind() for part_losses_K in found])
        return Gradients(torch.stack(losses_K), num_tokens)

    def _cut(self, pass_tokens: Sequence[float]) -> list[list[int]]:
        """Return which lanes are computed in each thread: in all but a CPU one part."""
        if not self.base.is_thread_safe:
            return [list(range(len(pass_tokens)))]
        sizes = [tokens * self.base.mean_linear_size for tokens in pass_tokens]
        return cut(sizes, num_parts(sizes, cores=self._threads.cores))

    def _accumulate_part(
        self,
        lanes: Sequence[Lane],
        own_rows: Sequence[list[list[RowArrays]]],
        group_rank: int,
        note: Callable[[PassSize], None],
    ) -> Tensor:
        """Return the lanes' losses, in their order; gradients go into the lanes."""
        order = sorted(range(len(lanes)), key=lambda k: _group_key(lanes[k].adapter))
        ordered = [lanes[k] for k in order]
        parts = [own_rows[k] for k in order]
        labels = [sum(len(row.positions) for rows in own for row in rows) for own in parts]
        losses_K = torch.zeros(len(lanes), device=self.base.device)
        layout = self.base.layout
        layout.adapters = tuple(lane.adapter for lane in ordered)
        layout.steps = tuple(lane.step + 1 for lane in ordered)
        layout.training, layout.group_rank = True, group_rank
        try:
            for lane in ordered:
                assert lane.adapter is not None
                assert lane.adapter.flat.grad is not None
                lane.adapter.flat.grad.zero_()
            for micro_step in range(len(parts[0])):
                batch = self._pack_rows([own[micro_step] for own in parts], micro_step)
                note(_size_of(batch))
                losses_K += self._backward(ordered, batch, labels)
        finally:
            layout.clear()
        # by slices: an index tensor from the host would make the host wait for the device
        in_turn = losses_K.unbind()
        return torch.stack([in_turn[i] for i in np.argsort(order)])

    def _backward(self, lanes: Sequence[Lane], batch: Batch, labels: Sequence[int]) -> Tensor:
        """Return each lane's share of its loss in this micro-batch; gradients go into the lanes."""
        weights = np.repeat(1.0 / np.array(labels), batch.labels).astype(np.float32)
        weights_L = torch.from_numpy(weights).to(self.base.device, non_blocking=True)
        scaled_L = weights_L
        if lanes[0].scaler is not None:
            own = torch.split(weights_L, list(batch.labels))
            scalers = [lane.scaler for lane in lanes if lane.scaler is not None]
            scaled_L = torch.cat([s.scale(part) for s, part in zip(scalers, own, strict=True)])
        hidden_LH = self._label_hidden(batch)
        found = label_losses(hidden_LH, self.base.head, batch.targets_L, scaled_L)
        found.total.backward()  # type: ignore[no-untyped-call]
        weighted = torch.split(found.losses_N * weights_L, list(batch.labels))
        return torch.stack([part.sum() for part in weighted])

    def evaluate(
        self, adapters: Sequence[LaneAdapter | None], rows: Sequence[TokenizedRow], *, split: str
    ) -> list[EvalResult]:
        """Return every adapter's per-example losses on ``rows``; adapters share passes."""
        by_length = sorted(range(len(rows)), key=lambda i: (-len(rows[i].input_ids), i))
        size = EVALUATION_ROWS * self.settings.micro_batch_size
        chunks = [by_length[start : start + size] for start in range(0, len(rows), size)]
        num_tokens = sum(len(row.input_ids) for row in rows)
        parts = self._cut([num_tokens / len(chunks)] * len(adapters))
        passes = _Passes(len(parts))
        try:
            found = self._threads.run(
                [
                    partial(
                        self._evaluate_part,
                        [adapters[k] for k in part],
                        rows,
                        chunks,
                        passes.noter(number),
                    )
                    for number, part in enumerate(parts)
                ]
            )
        finally:
            self.largest_pass = passes.together(self.largest_pass)
        sums = _in_turn(parts, found)
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

    @torch.no_grad()
    def _evaluate_part(
        self,
        adapters: Sequence[LaneAdapter | None],
        rows: Sequence[TokenizedRow],
        chunks: Sequence[Sequence[int]],
        note: Callable[[PassSize], None],
    ) -> np.ndarray:
        """Return loss sums, (len(adapters), len(rows))."""
        order = sorted(range(len(adapters)), key=lambda k: _group_key(adapters[k]))
        layout = self.base.layout
        layout.adapters = tuple(adapters[k] for k in order)
        layout.steps = (0,) * len(adapters)
        layout.group_rank = 0 if self._isolated else self.settings.group_rank
        losses, row_labels = [], []
        try:
            for chunk in chunks:
                part = [as_arrays(rows[i]) for i in chunk]
                batch = self._pack_rows([part] * len(adapters), 0)
                note(_size_of(batch))
                hidden_LH = self._label_hidden(batch)
                losses.append(label_losses(hidden_LH, self.base.head, batch.targets_L, None))
                row_labels.append(batch.row_labels)
        finally:
            layout.clear()
        on_host = torch.cat([found.losses_N for found in losses]).cpu().double().numpy()
        counts = np.concatenate(row_labels)
        summed = np.bincount(
            np.repeat(np.arange(len(counts)), counts), weights=on_host, minlength=len(counts)
        )
        sums = np.zeros((len(adapters), len(rows)))
        start = 0
        for chunk in chunks:
            stop = start + len(adapters) * len(chunk)
            sums[np.ix_(order, chunk)] = summed[start:stop].reshape(len(adapters), len(chunk))
            start = stop
        return sums

    def _micro_batches(self, lane: Lane) -> list[list[RowArrays]]:
        """Return the lane's next effective batch, rows of similar length together."""
        numbers = self._rows_of(lane, lane.step + 1)
        rows = sorted((self._arrays(i) for i in numbers), key=lambda row: -len(row.ids))
        size = self.settings.micro_batch_size
        return [rows[start : start + size] for start in range(0, len(rows), size)]

    def _rows_of(self, lane: Lane, step: int) -> list[int]:
        config = lane.job.config
        assert config is not None
        return rows_of_step(
            len(self.train),
            step=step,
            batch_size=self.settings.effective_batch_size,
            data_seed=config.data_seed,
        )

    def _pack_rows(self, lane_rows: Sequence[Sequence[RowArrays]], micro_step: int) -> Batch:
        """Put the lanes' rows under each other and tell the packed layers whose they are."""
        batch = collate(lane_rows, self.base.device, flat=self.base.flat)
        self.base.layout.set_pass(batch.tokens, batch.real, batch.cut, micro_step=micro_step)
        return batch

    def _label_hidden(self, batch: Batch) -> Tensor:
        return self.base.hidden_states(batch).flatten(0, 1)[batch.positions_L]


def _size_of(batch: Batch) -> PassSize:
    rows = len(batch.row_labels)
    return PassSize(rows, -(-batch.ids.numel() // rows), len(batch.positions_L))


def _in_turn(parts: Sequence[Sequence[int]], found: Sequence[Iterable[T]]) -> list[T]:
    """Return what was found for the items of each part, in the order of the items."""
    by_item = {
        item: value
        for part, values in zip(parts, found, strict=True)
        for item, value in zip(part, values, strict=True)
    }
    return [by_item[item] for item in sorted(by_item)]


def _group_key(adapter: LaneAdapter | None) -> tuple[int, int]:
    """Lanes of like target sets and ranks lie side by side, so that their products join."""
    if adapter is None:
        return 0, 0
    return len(adapter.config.target_modules), adapter.config.rank


def _update(lane: Lane, rate: float, stop: Tensor) -> None:
    """Let the lane's AdamW step, on the device, unless ``stop`` is 1."""
    optimizer = lane.optimizer
    assert optimizer is not None
    for group in optimizer.param_groups:
        group["lr"] = rate
    if lane.scaler is not None:
        lane.scaler.step(optimizer)
        lane.scaler.update()
        return
    optimizer.found_inf = stop  # type: ignore[attr-defined]  # what GradScaler tells a fused optimizer
    try:
        optimizer.step()
    finally:
        del optimizer.found_inf  # type: ignore[attr-defined]


def _note(step: _Unread, readings: Sequence[Sequence[float]]) -> None:
    for lane, number, rate, tokens, (loss, norm) in zip(
        step.lanes, step.numbers, step.rates, step.num_tokens, readings, strict=True
    ):
        lane.note_point(
            Point(
                step=number, train_loss=loss, learning_rate=rate, grad_norm=norm, num_tokens=tokens
            )
        )
