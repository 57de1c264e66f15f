"""Packed LoRA layers: every lane's adapter on one frozen linear layer.

Shape key: K lanes, N tokens of all lanes, I in_features, O out_features, r rank of a lane,
R ranks of a group added up.

The tokens of the lanes lie one lane after the other. The frozen layer runs once on all of them; each
lane adds ``scaling * dropout(x) @ A.T @ B.T`` to its own tokens. Neighbouring lanes whose ranks
add up to at most ``group_rank`` form a group: their A matrices stacked are one (R, I) matrix, their B
matrices one (O, R), and a mask on the (N, R) product in the middle keeps each lane to its own
columns. That is one product instead of K, with no padding of ranks and no copy of the tokens; lanes
may have any number of tokens. What a lane shares with its neighbours are zeros, so its numbers are those
that it would have alone.

Dropout masks are a function of (lane seed, step, micro-step, module), not of a generator that runs
on: a lane draws the same masks alone, in a pack, after resuming, and when a
checkpointed layer is computed again. A mask has a row for each real token, none for padding.
"""

import hashlib
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lora_tune.memory.request import GROUP_RANK_OF_CPUS, GROUP_RANK_OF_GPUS
from lora_tune.records import LinearShape, TrialConfig


def default_group_rank(device: str) -> int:
    """Return up to which sum of ranks lanes share one product.

    A product over R ranks multiplies every token with the columns of all its lanes. On two CPU cores
    one product of four lanes took 0.3 to 0.6 times as long as four up to R = 64 and longer at
    256 (docs/log.md); on a GPU 128 columns are one tile of its tensor cores.
    """
    return GROUP_RANK_OF_CPUS if device == "cpu" else GROUP_RANK_OF_GPUS


class LaneAdapter:
    """The trainable matrices of one lane, as views of one flat float32 tensor.

    Master weights are float32 whatever the compute type of the pack.

    Attributes:
        flat: All elements; what the optimizer steps. ``flat.grad`` is there if the lane is trained.
        weights: Module name -> (A of shape (r, I), B of shape (O, r)); their ``.grad`` are views of
            ``flat.grad``.
    """

    def __init__(
        self,
        config: TrialConfig,
        shapes: Sequence[LinearShape],
        device: torch.device | str,
        *,
        trained: bool,
    ) -> None:
        """Make an adapter whose elements are all zero.

        Args:
            config: Rank and target modules.
            shapes: The base's linear layers.
            device: Where it lives.
            trained: Whether to make room for gradients.
        """
        self.config = config
        by_name = {shape.name: shape for shape in shapes}
        layers = [by_name[name] for name in config.target_modules]
        size = sum(config.rank * (layer.in_features + layer.out_features) for layer in layers)
        self.flat = torch.zeros(size, device=device)
        if trained:
            self.flat.grad = torch.zeros_like(self.flat)
        self.weights: dict[str, tuple[Tensor, Tensor]] = {}
        # B is stored transposed, so that the matrices of a group stack without being transposed
        self.stored: dict[str, tuple[Tensor, Tensor]] = {}
        start = 0
        for layer in layers:
            pair = []
            for columns in (layer.in_features, layer.out_features):
                pair.append(self._view(start, columns))
                start += config.rank * columns
            self.stored[layer.name] = (pair[0], pair[1])
            self.weights[layer.name] = (pair[0], _transposed(pair[1]))

    def _view(self, start: int, columns: int) -> Tensor:
        rank = self.config.rank
        part = slice(start, start + rank * columns)
        view = self.flat[part].view(rank, columns)
        if self.flat.grad is not None:
            view.grad = self.flat.grad[part].view(rank, columns)
        return view

    @classmethod
    def initialize(
        cls,
        config: TrialConfig,
        shapes: Sequence[LinearShape],
        device: torch.device | str,
        *,
        trained: bool = True,
    ) -> "LaneAdapter":
        """Return a fresh adapter: A as PEFT's default (Kaiming uniform, a = sqrt(5)), B zero.

        Each module draws from a generator of its own, seeded by (``config.init_seed``, name), on
        the CPU, so that the numbers depend neither on the device nor on other lanes.

        Source of the distribution: ``peft.tuners.lora.LoraLayer.reset_lora_parameters``.
        """
        adapter = cls(config, shapes, device, trained=trained)
        for name, (a_RI, _) in adapter.weights.items():
            generator = torch.Generator().manual_seed(keyed_seed(config.init_seed, "init", name))
            drawn_RI = torch.empty(a_RI.shape)
            nn.init.kaiming_uniform_(drawn_RI, a=5**0.5, generator=generator)
            a_RI.copy_(drawn_RI)
        return adapter


def _transposed(stored: Tensor) -> Tensor:
    matrix = stored.mT
    if stored.grad is not None:
        matrix.grad = stored.grad.mT
    return matrix


class Group(NamedTuple):
    """Neighbouring lanes that share one product on the modules that all of them adapt."""

    tokens: slice
    lanes: tuple[int, ...]
    scaling: float | Tensor  # float32 (N, R): a lane's scaling in its own columns, zero elsewhere


class RowCut(NamedTuple):
    """How the flat tokens of a pass are cut into rows, for attention."""

    num_rows: int
    length: int  # of the longest row
    slots_N: Tensor | None  # where each token lies in (num_rows * length); None: rows are equal


@dataclass
class PackLayout:
    """Who owns which tokens of the batch that is being computed; shared by all packed layers."""

    adapters: tuple[LaneAdapter | None, ...] = ()
    tokens: tuple[slice, ...] = ()  # of each lane
    real: tuple[Tensor | None, ...] = ()  # its tokens that are no padding, counted in its own
    steps: tuple[int, ...] = ()  # optimizer step of each lane
    micro_step: int = 0
    training: bool = False
    group_rank: int = 0
    rows: RowCut | None = None
    _groups: dict[tuple[int, ...], tuple[Group, ...]] = field(default_factory=dict)
    _generators: dict[torch.device, torch.Generator] = field(default_factory=dict)

    def set_pass(
        self,
        tokens: Sequence[slice],
        real: Sequence[Tensor | None],
        rows: RowCut | None,
        *,
        micro_step: int = 0,
    ) -> None:
        """Describe the batch of the next pass through the base."""
        self.tokens, self.real, self.rows = tuple(tokens), tuple(real), rows
        self.micro_step = micro_step
        self._groups.clear()

    def clear(self) -> None:
        """Forget the lanes and the batch, so that nothing of them is held."""
        self.adapters, self.steps, self.training = (), (), False
        self.set_pass((), (), None)

    def groups(self, name: str, device: torch.device) -> tuple[Group, ...]:
        """Return the groups of the lanes that adapt the module ``name``."""
        lanes = tuple(
            k
            for k, adapter in enumerate(self.adapters)
            if adapter is not None and name in adapter.stored
        )
        if lanes not in self._groups:
            self._groups[lanes] = tuple(self._group(part, device) for part in self._split(lanes))
        return self._groups[lanes]

    def _split(self, lanes: tuple[int, ...]) -> list[tuple[int, ...]]:
        """Cut the lanes, in their order, where the ranks would add up to more than allowed."""
        parts: list[list[int]] = []
        total = 0
        for k in lanes:
            rank = self._config(k).rank
            if not parts or total + rank > self.group_rank:
                parts.append([])
                total = 0
            parts[-1].append(k)
            total += rank
        return [tuple(part) for part in parts]

    def _group(self, lanes: tuple[int, ...], device: torch.device) -> Group:
        tokens = slice(self.tokens[lanes[0]].start, self.tokens[lanes[-1]].stop)
        scalings = [self._config(k).scaling / (1.0 - self.dropout(k)) for k in lanes]
        if len(lanes) == 1:
            return Group(tokens, lanes, scalings[0])
        # float32: in 16 bit a group would scale otherwise than a lane alone
        ranks = [self._config(k).rank for k in lanes]
        scaling_NR = torch.zeros(tokens.stop - tokens.start, sum(ranks), device=device)
        column = 0
        for k, rank, scaling in zip(lanes, ranks, scalings, strict=True):
            own = self.tokens[k]
            rows = slice(own.start - tokens.start, own.stop - tokens.start)
            scaling_NR[rows, column : column + rank] = scaling
            column += rank
        return Group(tokens, lanes, scaling_NR)

    def _config(self, lane: int) -> TrialConfig:
        adapter = self.adapters[lane]
        assert adapter is not None
        return adapter.config

    def dropout(self, lane: int) -> float:
        """Return the probability with which the lane drops an input now."""
        return self._config(lane).lora_dropout if self.training else 0.0

    def masks(self, group: Group, name: str, x_NI: Tensor) -> Tensor | None:
        """Return which inputs of the group's tokens are kept; None when all are."""
        if not any(self.dropout(k) for k in group.lanes):
            return None
        mask_NI = torch.ones(x_NI.shape, dtype=torch.bool, device=x_NI.device)
        for k in group.lanes:
            probability = self.dropout(k)
            if probability:
                own = self.tokens[k]
                start = own.start - group.tokens.start
                self._draw(mask_NI[start : start + own.stop - own.start], k, name, probability)
        return mask_NI

    def _draw(self, mask_NI: Tensor, lane: int, name: str, probability: float) -> None:
        config = self._config(lane)
        seed = keyed_seed(config.dropout_seed, "dropout", self.steps[lane], self.micro_step, name)
        generator = self._generator(mask_NI.device, seed)
        real = self.real[lane]
        if real is None:
            mask_NI.bernoulli_(1.0 - probability, generator=generator)
            return
        drawn = mask_NI.new_empty(len(real), mask_NI.shape[1])
        mask_NI[real] = drawn.bernoulli_(1.0 - probability, generator=generator)

    def _generator(self, device: torch.device, seed: int) -> torch.Generator:
        """Return this device's generator, freshly seeded."""
        if device not in self._generators:
            # torch has no generator for the meta device, whose masks have no values
            where = torch.device("cpu") if device.type == "meta" else device
            self._generators[device] = torch.Generator(where)
        return self._generators[device].manual_seed(seed)


class ThreadLayout(threading.local, PackLayout):
    """A layout of which each thread has values of its own."""


def new_layout(device: torch.device) -> PackLayout:
    """Return an empty layout for a model on a device.

    On a CPU each thread has its own, since parts of a pack are computed beside each other (lane_threads.py).
    Not on a GPU: there backward runs in a thread of autograd's, which must see the layout when a checkpointed
    layer is computed again.
    """
    return ThreadLayout() if device.type == "cpu" else PackLayout()


class PackedLinear(nn.Module):
    """A frozen linear layer that adds the adapters of the lanes named by the shared layout."""

    def __init__(self, base_layer: nn.Module, name: str, layout: PackLayout) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.name = name
        self.layout = layout
        # autograd records a function when an input needs a gradient: in the first layer nothing else does
        self.recorder = torch.zeros((), requires_grad=True)

    def forward(self, x: Tensor) -> Tensor:
        """Return the frozen layer's output plus every lane's share, same leading shape as x."""
        out: Tensor = self.base_layer(x)
        groups = self.layout.groups(self.name, x.device)
        if not groups:
            return out
        if out._is_view() or not out.is_contiguous():
            out = out.clone(memory_format=torch.contiguous_format)
        updated: Tensor = _LowRankUpdate.apply(  # type: ignore[no-untyped-call]
            out, x, self.recorder, self.name, self.layout, groups
        )
        return updated


class _LowRankUpdate(torch.autograd.Function):
    """Add ``scaling * (mask * x) @ A.T @ B.T`` to ``out`` in place, group by group.

    Keeps x itself, which the neighbouring layers share, the one-byte masks, the rank-R products, and
    A and B in the compute type; the masked input is made again in backward. The scaling goes to the rank-R
    side, the smallest of all tensors here. Gradients of A and B are added to the matrices' ``.grad``
    directly, in float32; out's gradient passes through.
    """

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        out: Tensor,
        x: Tensor,
        recorder: Tensor,
        name: str,
        layout: PackLayout,
        groups: tuple[Group, ...],
    ) -> Tensor:
        x_NI, out_NO = x.reshape(-1, x.shape[-1]), out.view(-1, out.shape[-1])
        saved: list[Tensor | None] = [x]
        pairs = []
        for group in groups:
            own = _stored_pairs(layout, group, name)
            a_RI, b_RO = (_stack(matrices, x.dtype) for matrices in zip(*own, strict=True))
            part_NI = x_NI[group.tokens]
            mask_NI = layout.masks(group, name, part_NI)
            kept_NI = part_NI if mask_NI is None else part_NI * mask_NI
            low_NR = ((kept_NI @ a_RI.mT) * group.scaling).to(x.dtype)
            del kept_NI
            out_NO[group.tokens].addmm_(low_NR, b_RO)
            saved += [mask_NI, a_RI, b_RO, low_NR]
            pairs.append(own)
        ctx.save_for_backward(*saved)  # type: ignore[arg-type]
        ctx.mark_dirty(out)
        ctx.groups, ctx.pairs = groups, pairs  # type: ignore[attr-defined]
        return out

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, *grads: Tensor
    ) -> tuple[Tensor | None, ...]:
        x, *saved = ctx.saved_tensors  # type: ignore[attr-defined]
        groups: tuple[Group, ...] = ctx.groups  # type: ignore[attr-defined]
        x_NI, grad_NO = x.reshape(-1, x.shape[-1]), grads[0].reshape(-1, grads[0].shape[-1])
        grad_x = None
        whole = len(groups) == 1 and len(x_NI[groups[0].tokens]) == len(x_NI)
        if ctx.needs_input_grad[1] and not whole:  # type: ignore[attr-defined]
            grad_x = x.new_zeros(x.shape)
        for number, group in enumerate(groups):
            mask_NI, a_RI, b_RO, low_NR = saved[4 * number : 4 * number + 4]
            part_NO = grad_NO[group.tokens]
            grad_low_NR = ((part_NO @ b_RO.mT) * group.scaling).to(x.dtype)
            own = ctx.pairs[number]  # type: ignore[attr-defined]
            _add_gradients([b for _, b in own], low_NR.mT @ part_NO)
            part_NI = x_NI[group.tokens]
            kept_NI = part_NI if mask_NI is None else part_NI * mask_NI
            _add_gradients([a for a, _ in own], grad_low_NR.mT @ kept_NI)
            del kept_NI
            if not ctx.needs_input_grad[1]:  # type: ignore[attr-defined]
                continue
            if grad_x is None:
                # of x's own shape, not a view: autograd adds other gradients of x to it in place
                grad_x = x.new_empty(x.shape)
            made_NI = grad_x.view(x_NI.shape)[group.tokens]
            torch.mm(grad_low_NR, a_RI, out=made_NI)
            if mask_NI is not None:
                made_NI.mul_(mask_NI)
        return grads[0], grad_x, None, None, None, None


def _stored_pairs(layout: PackLayout, group: Group, name: str) -> list[tuple[Tensor, Tensor]]:
    adapters = [layout.adapters[k] for k in group.lanes]
    return [adapter.stored[name] for adapter in adapters if adapter is not None]


def _stack(matrices: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Return the matrices under each other in ``dtype``; a lone float32 one is not copied."""
    stacked = matrices[0] if len(matrices) == 1 else torch.cat(list(matrices))
    return stacked.to(dtype)


def _add_gradients(matrices: Sequence[Tensor], made: Tensor) -> None:
    """Add each matrix's rows of ``made`` to its float32 gradient."""
    grads = [matrix.grad for matrix in matrices if matrix.grad is not None]
    if len(grads) == 1:
        grads[0].add_(made)
    elif grads:
        parts = torch.split(made.float(), [len(matrix) for matrix in matrices])
        torch._foreach_add_(grads, list(parts))


def keyed_seed(seed: int, *key: object) -> int:
    """Return a 63-bit seed that depends on ``seed`` and every part of ``key``, and nothing else.

    >>> keyed_seed(0, "dropout", 1) == keyed_seed(0, "dropout", 1)
    True
    >>> keyed_seed(0, "dropout", 1) == keyed_seed(0, "dropout", 2)
    False
    """
    text = repr((seed, *key)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1
