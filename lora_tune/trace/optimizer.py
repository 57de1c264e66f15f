"""What the optimizer keeps, and what its step allocates.

Bytes per tensor of n elements in a type of e bytes, which is a matrix of PEFT's adapter, or all
matrices of one of the engine's lanes:

* ``adamw``: two states of e*n; the fused one, which the engine and the Trainer (``adamw_torch_fused``)
  use, keeps its step count as a tensor on the device. Source: torch ``optim/adam.py``.
* ``adamw-8bit``, ``paged-adamw-8bit``: from 4096 elements on two states of n bytes and two
  float32 vectors of one entry per 256 elements, below that two float32 states; two
  tables of 256 float32 for all. Source: bitsandbytes ``optim/optimizer.py``, ``Optimizer2State``. Paged
  states count too: what is paged comes back to the GPU for the step.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lora_tune.memory.request import MemoryRequest
from lora_tune.trace.tracker import History, StorageTracker

SMALLEST_8BIT = 4096
BLOCK_8BIT = 256
MAX_GRAD_NORM = 1.0


class StateSize(NamedTuple):
    """One tensor of the optimizer: bytes, and whether it counts as state or as bookkeeping."""

    num_bytes: int
    category: str


def state_sizes(request: MemoryRequest, parameter: Tensor) -> Iterator[StateSize]:
    """Yield the tensors that the optimizer keeps for one parameter."""
    n = parameter.numel()
    if request.optimizer == "adamw":
        state = n * parameter.element_size()
        yield from (StateSize(state, "optimizer"),) * 2
        yield StateSize(4, "inputs")  # the step count
    elif n >= SMALLEST_8BIT:
        yield from (StateSize(n, "optimizer"),) * 2
        yield from (StateSize(4 * math.ceil(n / BLOCK_8BIT), "optimizer"),) * 2
    else:
        yield from (StateSize(4 * n, "optimizer"),) * 2


def shared_state_sizes(request: MemoryRequest) -> tuple[StateSize, ...]:
    """Return the tensors that the optimizer keeps once: the 8-bit tables."""
    if request.optimizer == "adamw":
        return ()
    return (StateSize(4 * 256, "inputs"),) * 2


def trace_optimizer_step(lanes: Sequence[Sequence[Tensor]]) -> History:
    """Return what clipping the gradients allocates.

    The step itself, fused or of bitsandbytes, works in place and makes nothing.

    Args:
        lanes: The trainable tensors of each lane; only shapes and types are looked at.
    """
    groups = [[_trained_twin(tensor) for tensor in lane] for lane in lanes]
    tracker = StorageTracker(device_type="meta", vocab_size=0)
    tracker.phase = "optimizer step"
    for twin in (twin for group in groups for twin in group):
        assert twin.grad is not None
        tracker.register(twin.data, "adapters")
        tracker.register(twin.grad, "gradients")
    tracker.enter_block("outside")
    with tracker:
        for group in groups:
            norm = nn.utils.clip_grad_norm_(group, MAX_GRAD_NORM)
            del norm
    return tracker.history


def _trained_twin(matrix: Tensor) -> nn.Parameter:
    """Return a parameter of the same size on the meta device, with a gradient."""
    twin = nn.Parameter(torch.empty(matrix.shape, dtype=matrix.dtype, device="meta"))
    twin.grad = torch.empty_like(twin)
    return twin
