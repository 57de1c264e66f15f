"""The exact tier: what a training step needs, from running it on the meta device.

A real step (forward, loss, backward, optimizer) of the real classes runs without data; every storage
is counted (``tracker.py``), and what CUDA does otherwise is restored (``semantics.py``,
``temporaries.py``). Models with many equal layers are traced with a few of them, and
the history of the others is written from that (``repeat.py``): the result is that of the full depth.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import transformers
from torch import Tensor, nn

from lora_tune.engine.base import linear_shapes
from lora_tune.errors import LoraTuneError, ModelError
from lora_tune.memory.allocator import AllocationEvent, replay
from lora_tune.memory.request import STACKS, MemoryRequest
from lora_tune.memory.terms import cublas_workspace_bytes
from lora_tune.records import MemoryEstimate
from lora_tune.trace.model import (
    attention_name,
    build_base,
    quiet_libraries,
    read_config,
    target_modules,
)
from lora_tune.trace.optimizer import trace_optimizer_step
from lora_tune.trace.repeat import Depth, choose_depth, repeat_layers
from lora_tune.trace.run import TracedStep, run_step
from lora_tune.trace.step import decoder_layers
from lora_tune.trace.tracker import History, Storage, StorageKey

# Terms of the estimate whose bytes count unrounded; their rounding is workspace.
_UNROUNDED = {
    "base": "base_weights",
    "adapters": "adapters",
    "optimizer": "optimizer",
    "gradients": "gradients",
}
_ROUNDED = {"inputs": "workspace", "loss": "logits_and_loss", "activations": "activations"}


CUBLASLT_WORKSPACE = 1 << 20  # ``memory.terms.cublas_workspace_bytes`` has the source


# What modeling code raises on shapes, attributes and settings that it was not written for.
_MODELING_ERRORS = (
    RuntimeError,
    KeyError,
    AttributeError,
    ValueError,
    TypeError,
    IndexError,
    AssertionError,
)


def trace_memory(
    config: Mapping[str, object], request: MemoryRequest, *, full_depth: bool = False
) -> MemoryEstimate:
    """Return what one training step allocates and reserves at most, counted on the meta device.

    Args:
        config: A config.json; of a multimodal model its text part is taken.
        request: The stack and the training settings.
        full_depth: Trace every decoder layer instead of repeating the middle ones.

    Raises:
        ModelError: The config makes no causal language model, or its step does not run without data.
        TargetModulesError: A target matches none of the model's linear layers.
    """
    try:
        with quiet_libraries():
            return _trace(read_config(config), request, full_depth=full_depth)
    except LoraTuneError:
        raise
    except _MODELING_ERRORS as error:
        first = (str(error).strip() or "no message").splitlines()[0]
        raise ModelError(
            f"a training step of {config.get('model_type')} models cannot be traced with these settings "
            f"({type(error).__name__}: {first}). Try fewer tokens than the model's positions, attention "
            "sdpa, or another stack."
        ) from error


def _trace(
    text: transformers.PreTrainedConfig, request: MemoryRequest, *, full_depth: bool
) -> MemoryEstimate:
    outline = _read_outline(text, request)
    depth = choose_depth(outline.kinds, full_depth=full_depth)
    traced = _run(text, request, outline, depth)
    history = repeat_layers(traced.history, depth)
    if history is None:
        depth = choose_depth(outline.kinds, full_depth=True)
        traced = _run(text, request, outline, depth)
        history = traced.history
    lanes = _matrices(traced, depth, num_lanes=len(request.lanes))
    counts = [sum(matrix.numel() for matrix in lane) for lane in lanes]
    history.static = [_of_all_layers(storage, counts) for storage in history.static]
    own = STACKS[request.stack].own_engine
    last = trace_optimizer_step([[_flat(n)] for n in counts] if own else lanes)
    workspace = cublas_workspace_bytes(request.compute_capability)
    peak = _find_peak([history, last], workspace)
    reserved = replay(_events([history, last], workspace), capacity_bytes=None)
    return MemoryEstimate(
        peak_allocated_bytes=peak.num_bytes,
        peak_reserved_bytes=reserved.peak_reserved_bytes,
        peak_phase=peak.phase,
        terms=peak.terms,
        trainable_parameters=sum(counts),
        base_parameters=outline.num_parameters,
        method="trace",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Outline:
    """The whole model without its tensors: kinds of layers, targets of each lane, size."""

    kinds: tuple[object, ...]
    targets: tuple[tuple[str, ...], ...]
    num_parameters: int
    attention: str


def _read_outline(text: transformers.PreTrainedConfig, request: MemoryRequest) -> _Outline:
    attention = attention_name(text, request)
    model = build_base(text, replace(request, quantization="none"), attention=attention)
    linears = linear_shapes(model)
    targets = tuple(target_modules(linears, lane) for lane in request.lanes)
    prefixes = {id(layer): name for name, layer in model.named_modules()}
    kinds = tuple(
        _layer_kind(text, number, layer, prefixes[id(layer)] + ".", targets)
        for number, layer in enumerate(decoder_layers(model))
    )
    return _Outline(
        kinds=kinds,
        targets=targets,
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        attention=attention,
    )


def _layer_kind(
    text: transformers.PreTrainedConfig,
    number: int,
    layer: nn.Module,
    prefix: str,
    targets: Sequence[Sequence[str]],
) -> object:
    """Return what tells one decoder layer from another: type, shapes, who adapts it where."""
    types = getattr(text, "layer_types", None)
    shapes = tuple((name, tuple(p.shape)) for name, p in layer.named_parameters())
    adapted = tuple(
        tuple(name.removeprefix(prefix) for name in lane if name.startswith(prefix))
        for lane in targets
    )
    return types[number] if types else None, type(layer).__name__, shapes, adapted


def _run(
    text: transformers.PreTrainedConfig, request: MemoryRequest, outline: _Outline, depth: Depth
) -> TracedStep:
    return run_step(
        text,
        request,
        num_layers=depth.traced,
        targets=outline.targets,
        attention=outline.attention,
    )


def _matrices(traced: TracedStep, depth: Depth, *, num_lanes: int) -> list[list[Tensor]]:
    """Return the trainable matrices of the whole model, by lane."""
    lanes: list[list[Tensor]] = [[] for _ in range(num_lanes)]
    for item in traced.trained:
        copies = 1 if item.layer is None else len(depth.real_layers(item.layer))
        lanes[item.lane] += [item.matrix] * copies
    return lanes


def _of_all_layers(storage: Storage, counts: Sequence[int]) -> Storage:
    """Return a static storage at the size of the whole model, if it is one of a lane's flat tensors."""
    if storage.lane is None:
        return storage
    return replace(storage, num_bytes=4 * counts[storage.lane])


def _flat(count: int) -> Tensor:
    return torch.empty(count, device="meta")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Peak:
    num_bytes: int
    phase: str
    terms: dict[str, int]


def _find_peak(histories: Sequence[History], workspace: int) -> _Peak:
    """Return the largest sum of living storages, when it is, and what it is made of.

    Static storages are those of the first history.
    """
    alive: Counter[str] = Counter()
    exact: Counter[str] = Counter()
    for storage in histories[0].static:
        alive[storage.category] += storage.booked_bytes
        exact[storage.category] += storage.num_bytes
    now = most = sum(alive.values()) + workspace
    phase, at_peak = "forward", _terms(alive, exact, workspace)
    for history in histories:
        for block in history.blocks:
            for made, storage in block.events:
                sign = 1 if made else -1
                now += sign * storage.booked_bytes
                alive[storage.category] += sign * storage.booked_bytes
                exact[storage.category] += sign * storage.num_bytes
                if now > most:
                    most, phase = now, block.phase
                    at_peak = _terms(alive, exact, workspace)
    return _Peak(num_bytes=most, phase=phase, terms=at_peak)


def _terms(alive: Counter[str], exact: Counter[str], workspace: int) -> dict[str, int]:
    terms = {name: exact[category] for category, name in _UNROUNDED.items()}
    terms |= {name: alive[category] for category, name in _ROUNDED.items()}
    terms["workspace"] += workspace + sum(alive[c] - exact[c] for c in _UNROUNDED)
    return terms


def _events(histories: Sequence[History], workspace: int) -> Iterator[AllocationEvent]:
    """Yield what the caching allocator is asked for: static storages first, then the step."""
    numbers: dict[tuple[int, StorageKey], int] = {}
    number = -1
    for part in _workspaces(workspace):
        number += 1
        yield AllocationEvent(True, number, part)
    for storage in histories[0].static:
        number += 1
        numbers[0, storage.key] = number
        yield AllocationEvent(True, number, storage.num_bytes)
    for which, history in enumerate(histories):
        for block in history.blocks:
            for made, storage in block.events:
                if made:
                    number += 1
                    numbers[which, storage.key] = number
                    yield AllocationEvent(True, number, storage.num_bytes)
                else:
                    yield AllocationEvent(False, numbers.pop((which, storage.key)), 0)


def _workspaces(total: int) -> tuple[int, ...]:
    """Return the workspaces one by one: cuBLASLt's, and one per cuBLAS handle."""
    if not total:
        return ()
    handle = (total - CUBLASLT_WORKSPACE) // 2
    return CUBLASLT_WORKSPACE, handle, handle
