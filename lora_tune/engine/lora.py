"""Packed LoRA layers: every lane's adapter on one frozen linear layer.

Shape key: K lanes, B rows per lane, N = B * T tokens per lane, T tokens, I in_features,
O out_features, R rank (padded to the pack's largest in grouped products).

The batch is the concatenation of the lanes' rows. The frozen layer runs once on all of it; each
lane adds ``scaling * dropout(x) @ A.T @ B.T`` to its own rows. Two ways to do the same:
one product a lane (faster on a CPU) or one grouped product over all lanes with zero padding up to
the largest rank (faster on a GPU). The padding adds exactly zero and receives zero gradient.

Dropout masks are a function of (lane seed, step, micro-step, module), not of a generator that runs
on: a lane draws the same masks alone, in a pack, after resuming, and when a
checkpointed layer is computed again.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lora_tune.records import LinearShape, TrialConfig


class LaneAdapter:
    """The trainable matrices of one lane: module name -> (A of shape (R, I), B of shape (O, R)).

    Master weights are float32 whatever the compute type of the pack.
    """

    def __init__(self, config: TrialConfig, weights: dict[str, tuple[Tensor, Tensor]]) -> None:
        self.config = config
        self.weights = weights

    @classmethod
    def initialize(
        cls, config: TrialConfig, shapes: Sequence[LinearShape], device: torch.device
    ) -> "LaneAdapter":
        """Return a fresh adapter: A as PEFT's default (Kaiming uniform, a = sqrt(5)), B zero.

        Each module draws from a generator of its own, seeded by (``config.init_seed``, name), on
        the CPU, so that the numbers depend neither on the device nor on other lanes.

        Source of the distribution: ``peft.tuners.lora.LoraLayer.reset_lora_parameters``.
        """
        by_name = {shape.name: shape for shape in shapes}
        weights = {}
        for name in config.target_modules:
            shape = by_name[name]
            generator = torch.Generator().manual_seed(keyed_seed(config.init_seed, "init", name))
            a_RI = torch.empty(config.rank, shape.in_features)
            nn.init.kaiming_uniform_(a_RI, a=5**0.5, generator=generator)
            b_OR = torch.zeros(shape.out_features, config.rank)
            weights[name] = (
                a_RI.to(device).requires_grad_(),
                b_OR.to(device).requires_grad_(),
            )
        return cls(config, weights)

    def parameters(self) -> list[Tensor]:
        """Return all matrices, A before B, in the order of ``config.target_modules``."""
        return [matrix for pair in self.weights.values() for matrix in pair]


@dataclass(slots=True)
class PackLayout:
    """Who owns which rows of the batch that is being computed; shared by all packed layers."""

    adapters: tuple[LaneAdapter | None, ...] = ()
    rows: tuple[slice, ...] = ()
    steps: tuple[int, ...] = ()  # optimizer step of each lane
    micro_step: int = 0
    training: bool = False
    grouped: bool = False
    _generators: dict[torch.device, torch.Generator] = field(default_factory=dict)

    def generator(self, device: torch.device, seed: int) -> torch.Generator:
        """Return this device's generator, freshly seeded."""
        if device not in self._generators:
            # torch has no generator for the meta device, whose masks have no values
            where = torch.device("cpu") if device.type == "meta" else device
            self._generators[device] = torch.Generator(where)
        return self._generators[device].manual_seed(seed)


class PackedLinear(nn.Module):
    """A frozen linear layer that adds the adapters of the lanes named by the shared layout."""

    def __init__(self, base_layer: nn.Module, name: str, layout: PackLayout) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.name = name
        self.layout = layout

    def forward(self, x: Tensor) -> Tensor:
        """Return the frozen layer's output plus every lane's share, same leading shape as x."""
        out: Tensor = self.base_layer(x)
        layout = self.layout
        lanes = [
            k
            for k, adapter in enumerate(layout.adapters)
            if adapter is not None and self.name in adapter.weights
        ]
        if not lanes:
            return out
        num_rows = layout.rows[-1].stop
        # Some architectures flatten (rows, tokens) before their MLP; the row order is the same.
        x_BTI = x.reshape(num_rows, -1, x.shape[-1])
        out_BTO = out.reshape(num_rows, x_BTI.shape[1], -1)
        same_size = len({layout.rows[k].stop - layout.rows[k].start for k in lanes}) == 1
        if layout.grouped and same_size and len(lanes) > 1:
            deltas = self._grouped_deltas(x_BTI, lanes)
        else:
            deltas = {k: self._delta(x_BTI[layout.rows[k]], k) for k in lanes}
        parts = [
            deltas[k] if k in deltas else torch.zeros_like(out_BTO[rows])
            for k, rows in enumerate(layout.rows)
        ]
        delta_BTO = parts[0] if len(parts) == 1 else torch.cat(parts)
        return (out_BTO + delta_BTO).reshape(out.shape)

    def _delta(self, x_BTI: Tensor, lane: int) -> Tensor:
        adapter = self.layout.adapters[lane]
        assert adapter is not None
        a_RI, b_OR = adapter.weights[self.name]
        mask, keep = self._mask(x_BTI, lane)
        delta_NO: Tensor = _LowRankProduct.apply(  # type: ignore[no-untyped-call]
            x_BTI.flatten(0, 1),
            a_RI.to(x_BTI.dtype),
            b_OR.to(x_BTI.dtype),
            None if mask is None else mask.flatten(0, 1),
            adapter.config.scaling / keep,
        )
        return delta_NO.reshape(*x_BTI.shape[:2], -1)

    def _grouped_deltas(self, x_BTI: Tensor, lanes: list[int]) -> dict[int, Tensor]:
        layout = self.layout
        adapters = [adapter for k in lanes if (adapter := layout.adapters[k]) is not None]
        rank = max(adapter.config.rank for adapter in adapters)
        pad = [rank - adapter.config.rank for adapter in adapters]
        pairs = [adapter.weights[self.name] for adapter in adapters]
        dtype = x_BTI.dtype
        a_KRI = torch.stack(
            [
                nn.functional.pad(a.to(dtype), (0, 0, 0, p))
                for (a, _), p in zip(pairs, pad, strict=True)
            ]
        )
        b_KOR = torch.stack(
            [nn.functional.pad(b.to(dtype), (0, p)) for (_, b), p in zip(pairs, pad, strict=True)]
        )
        slices = [x_BTI[layout.rows[k]] for k in lanes]
        x_KNI = torch.stack([part.flatten(0, 1) for part in slices])
        masks = [self._mask(part, k) for part, k in zip(slices, lanes, strict=True)]
        mask_KNI = None
        if any(mask is not None for mask, _ in masks):
            mask_KNI = torch.stack(
                [
                    torch.ones(x_KNI.shape[1:], dtype=torch.bool, device=x_KNI.device)
                    if mask is None
                    else mask.flatten(0, 1)
                    for mask, _ in masks
                ]
            )
        scaling_K11 = torch.tensor(
            [a.config.scaling / keep for a, (_, keep) in zip(adapters, masks, strict=True)],
            dtype=torch.float32,  # in 16 bit a group would scale otherwise than a lane alone
            device=x_KNI.device,
        ).reshape(-1, 1, 1)
        delta_KNO = _LowRankProduct.apply(  # type: ignore[no-untyped-call]
            x_KNI, a_KRI, b_KOR, mask_KNI, scaling_K11
        )
        return {k: delta_KNO[i].reshape(*slices[i].shape[:2], -1) for i, k in enumerate(lanes)}

    def _mask(self, x_BTI: Tensor, lane: int) -> tuple[Tensor | None, float]:
        """Return the lane's dropout mask for this module and the share of inputs it keeps."""
        layout = self.layout
        adapter = layout.adapters[lane]
        assert adapter is not None
        probability = adapter.config.lora_dropout
        if not layout.training or probability == 0.0:
            return None, 1.0
        seed = keyed_seed(
            adapter.config.dropout_seed, "dropout", layout.steps[lane], layout.micro_step, self.name
        )
        generator = layout.generator(x_BTI.device, seed)
        return dropout_mask(x_BTI, probability, generator), 1.0 - probability


class _LowRankProduct(torch.autograd.Function):
    """``scaling * (mask * x) @ A.T @ B.T`` and its exact gradients, for one lane or a group.

    One lane: x (N, I), A (R, I), B (O, R); a group: the same with K in front. Keeps x itself, which the
    neighbouring layers share, the one-byte mask and the rank-R product; the masked input is made again
    in backward. The scaling goes to the rank-R side, the smallest of all tensors here.
    """

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        x: Tensor,
        a: Tensor,
        b: Tensor,
        mask: Tensor | None,
        scaling: float | Tensor,
    ) -> Tensor:
        kept = x if mask is None else x * mask
        low = ((kept @ a.mT) * scaling).to(x.dtype)
        ctx.save_for_backward(x, a, b, low, mask)  # type: ignore[arg-type]
        ctx.scaling = scaling  # type: ignore[attr-defined]
        return low @ b.mT

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, *grads: Tensor
    ) -> tuple[Tensor | None, ...]:
        x, a, b, low, mask = ctx.saved_tensors  # type: ignore[attr-defined]
        grad_low = ((grads[0] @ b) * ctx.scaling).to(x.dtype)  # type: ignore[attr-defined]
        kept = x if mask is None else x * mask
        grad_x = None
        if ctx.needs_input_grad[0]:  # type: ignore[attr-defined]
            grad_x = grad_low @ a
            if mask is not None:
                grad_x = grad_x * mask
        return grad_x, grad_low.mT @ kept, grads[0].mT @ low, None, None


def dropout_mask(x: Tensor, probability: float, generator: torch.Generator) -> Tensor:
    """Return a boolean mask of x's shape that keeps each element with ``1 - probability``."""
    mask = torch.empty(x.shape, dtype=torch.bool, device=x.device)
    return mask.bernoulli_(1.0 - probability, generator=generator)


def keyed_seed(seed: int, *key: object) -> int:
    """Return a 63-bit seed that depends on ``seed`` and every part of ``key``, and nothing else.

    >>> keyed_seed(0, "dropout", 1) == keyed_seed(0, "dropout", 1)
    True
    >>> keyed_seed(0, "dropout", 1) == keyed_seed(0, "dropout", 2)
    False
    """
    text = repr((seed, *key)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1
