"""The emulated autocast against what CUDA's does, as its lists and its cache say.

Expected types and copies are written down from ``aten/src/ATen/autocast_mode.h`` (lists) and
``autocast_mode.cpp`` (``cached_cast``: only trainable float32 leaves, until the outermost context ends).
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from lora_tune.trace.semantics import CudaSemantics
from lora_tune.trace.tracker import StorageTracker

HALF, WIDE = torch.bfloat16, torch.float32


def empty(*shape: int, dtype: torch.dtype = HALF) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


CALLS: dict[str, tuple[Callable[[], Tensor], torch.dtype]] = {
    "linear": (lambda: functional.linear(empty(2, 8, dtype=WIDE), empty(4, 8)), HALF),
    "linear of float32": (
        lambda: functional.linear(empty(2, 8, dtype=WIDE), empty(4, 8, dtype=WIDE)),
        HALF,
    ),
    "matmul operator": (lambda: empty(2, 8, dtype=WIDE) @ empty(8, 2), HALF),
    "addmm": (lambda: torch.addmm(empty(4), empty(2, 8, dtype=WIDE), empty(8, 4)), HALF),
    "layer norm": (lambda: functional.layer_norm(empty(2, 8), (8,), empty(8), empty(8)), WIDE),
    "power": (lambda: torch.pow(empty(2), 3.0), WIDE),
    "power operator": (lambda: empty(2) ** 2, WIDE),
    "reciprocal root": (lambda: torch.rsqrt(empty(2)), WIDE),
    "softmax": (lambda: functional.softmax(empty(2, 8), dim=-1), WIDE),
    "softmax in a type": (lambda: functional.softmax(empty(2, 8), dim=-1, dtype=HALF), HALF),
    "sum": (lambda: empty(2, 8).sum(-1), WIDE),
    "mean": (lambda: empty(2, 8).mean(-1), HALF),
    "silu": (lambda: functional.silu(empty(2, 8)), HALF),
    "gelu": (lambda: functional.gelu(empty(2, 8)), HALF),
    "addition": (lambda: empty(2) + empty(2, dtype=WIDE), WIDE),
    "whole numbers": (lambda: torch.ones(2, dtype=torch.int64, device="meta").sum(), torch.int64),
}


@pytest.mark.parametrize("call", CALLS)
def test_a_function_runs_in_the_type_of_its_list(call: str) -> None:
    semantics = CudaSemantics(padded=False, compute_capability="8.9")
    function, expected = CALLS[call]
    with semantics.installed(), semantics.autocast.context(HALF):
        assert function().dtype == expected


def casts(trainable: bool, contexts: int) -> tuple[int, int]:
    """Return how many casts two uses of a weight make, per context, and what is left at the end."""
    semantics = CudaSemantics(padded=False, compute_capability="8.9")
    tracker = StorageTracker(device_type="meta", vocab_size=0)
    weight = empty(64, 64, dtype=WIDE).requires_grad_(trainable)
    x = empty(1, 64)
    with semantics.installed(), tracker, torch.no_grad():
        for _ in range(contexts):
            with semantics.autocast.context(HALF):
                functional.linear(x, weight)
                functional.linear(x, weight)
    events = tracker.history.blocks[0].events
    copies = [made for made, storage in events if storage.num_bytes == 2 * 64 * 64]
    return copies.count(True), copies.count(True) - copies.count(False)


def test_a_trainable_weight_is_cast_once_per_context_and_a_frozen_one_each_time() -> None:
    assert casts(trainable=True, contexts=1) == (1, 0)
    assert casts(trainable=True, contexts=2) == (2, 0)
    assert casts(trainable=False, contexts=1) == (2, 0)


def test_the_copy_of_a_trainable_weight_lives_until_the_outermost_context_ends() -> None:
    semantics = CudaSemantics(padded=False, compute_capability="8.9")
    tracker = StorageTracker(device_type="meta", vocab_size=0)
    weight = empty(64, 64, dtype=WIDE).requires_grad_()
    alive = []
    with semantics.installed(), tracker, torch.no_grad(), semantics.autocast.context(HALF):
        with semantics.autocast.context(HALF):
            functional.linear(empty(1, 64), weight)
        for made, storage in tracker.history.blocks[0].events:
            if storage.num_bytes == 2 * 64 * 64:
                alive.append(made)
        assert alive == [True]
    last = [e for e in tracker.history.blocks[0].events if e[1].num_bytes == 2 * 64 * 64]
    assert [made for made, _ in last] == [True, False]


def test_autocast_is_reported_to_who_asks_and_only_inside() -> None:
    semantics = CudaSemantics(padded=False, compute_capability="8.9")
    before = torch.is_autocast_enabled
    with semantics.installed():
        assert not torch.is_autocast_enabled()
        with semantics.autocast.context(HALF):
            assert torch.is_autocast_enabled()
            assert not torch.is_autocast_enabled("cpu")
        assert not torch.is_autocast_enabled()
    assert torch.is_autocast_enabled is before
