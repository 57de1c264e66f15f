"""Build a model of some depth with a stack's adapters, and run one step of it under the tracker."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import transformers
from torch import Tensor, nn

from lora_tune.engine.base import BaseModel, linear_shapes
from lora_tune.memory.request import STACKS, MemoryRequest
from lora_tune.trace.engine_step import build_pack, empty_lane, engine_step, labels_per_row
from lora_tune.trace.model import add_peft_adapters, base_tensors, build_base, shortened
from lora_tune.trace.optimizer import shared_state_sizes, state_sizes
from lora_tune.trace.semantics import CudaSemantics
from lora_tune.trace.step import (
    Setting,
    checkpoint_layers,
    decoder_layers,
    mark_gradients,
    mark_layers,
    mark_loss,
    trainer_batch,
    trainer_step,
)
from lora_tune.trace.temporaries import cuda_temporaries
from lora_tune.trace.tracker import History, StorageTracker, Temporaries
from lora_tune.trace.trl_head import add_fused_head


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """A trainable matrix: its shape as a tensor, its lane, its decoder layer if it is in one."""

    matrix: Tensor
    lane: int
    layer: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class TracedStep:
    """One step's history up to the end of backward, and what was trained."""

    history: History
    trained: tuple[Trained, ...]


def run_step(
    config: transformers.PreTrainedConfig,
    request: MemoryRequest,
    *,
    num_layers: int,
    targets: Sequence[Sequence[str]],
    attention: str,
) -> TracedStep:
    """Return what a step of the model cut to ``num_layers`` makes and frees.

    Args:
        config: Of the whole model.
        request: Stack and training settings.
        num_layers: Decoder layers to build.
        targets: Full names of the adapted modules of the whole model, per lane.
        attention: transformers' name of the attention implementation.
    """
    model = build_base(shortened(config, num_layers), request, attention=attention)
    return run_model(model, request, targets=targets, temporaries=cuda_temporaries)


def run_model(
    model: nn.Module,
    request: MemoryRequest,
    *,
    targets: Sequence[Sequence[str]],
    temporaries: Temporaries | None,
) -> TracedStep:
    """Return what a step of this base model makes and frees, on whatever device it is.

    On the meta device nothing is computed; on the CPU the same statements run on real tensors, which
    is how the trace is checked.

    Args:
        model: The base, without adapters.
        request: Stack and training settings.
        targets: Full names of the modules to adapt, per lane; those the model has not are left out.
        temporaries: What kernels hold inside themselves; None counts only what is visible.
    """
    device = next(model.parameters()).device.type
    names = {linear.name for linear in linear_shapes(model)}
    kept = [[name for name in lane if name in names] for lane in targets]
    own = STACKS[request.stack].own_engine
    semantics = CudaSemantics(
        padded=request.padded and not own,
        compute_capability=request.compute_capability,
        device_type=device,
    )
    vocab_size: int = model.config.vocab_size  # type: ignore[union-attr, assignment]
    tracker = StorageTracker(device_type=device, vocab_size=vocab_size, temporaries=temporaries)
    setting = Setting(request=request, semantics=semantics, tracker=tracker, device=device)
    trained = (_engine if own else _trainer)(model, kept, setting)
    return TracedStep(history=tracker.history, trained=trained)


def _layers_of_tensors(model: nn.Module) -> dict[int, int]:
    """Return the decoder layer of each storage of the base that is inside one."""
    return {
        tensor.untyped_storage()._cdata: number
        for number, layer in enumerate(decoder_layers(model))
        for tensor in base_tensors(layer)
    }


def _layer_of_module(model: nn.Module, name: str) -> int | None:
    """Return the decoder layer that a module is in, from its full name."""
    layers = {id(layer): number for number, layer in enumerate(decoder_layers(model))}
    module = model
    for part in name.split("."):
        module = getattr(module, part)
        if id(module) in layers:
            return layers[id(module)]
    return None


def _engine(
    model: nn.Module, targets: Sequence[Sequence[str]], setting: Setting
) -> tuple[Trained, ...]:
    request, tracker = setting.request, setting.tracker
    base = BaseModel(model, compute_dtype=getattr(torch, request.compute_dtype))
    pack = build_pack(base, request, tracker)
    lanes = [
        empty_lane(shape, base, modules, setting.device)
        for shape, modules in zip(request.lanes, targets, strict=True)
    ]
    adapters = [lane.adapter for lane in lanes if lane.adapter is not None]
    _prepare(model, setting)
    for number, adapter in enumerate(adapters):
        assert adapter.flat.grad is not None
        tracker.register(adapter.flat, "adapters", lane=number)
        for size in state_sizes(request, adapter.flat):
            lane = number if size.category == "optimizer" else None
            tracker.register_bytes(size.num_bytes, size.category, lane=lane)
        tracker.register(adapter.flat.grad, "gradients", lane=number)
    _register_buffers(model, tracker)
    mark_loss(base.decoder, tracker)
    engine_step(pack, lanes, setting)
    return tuple(
        Trained(matrix=matrix, lane=number, layer=_layer_of_module(model, name))
        for number, adapter in enumerate(adapters)
        for name, pair in adapter.weights.items()
        for matrix in pair
    )


def _trainer(
    model: nn.Module, targets: Sequence[Sequence[str]], setting: Setting
) -> tuple[Trained, ...]:
    request, tracker = setting.request, setting.tracker
    wrapped = add_peft_adapters(model, request, targets[0], device=setting.device)
    wrapped.train()
    if request.gradient_checkpointing:
        wrapped.activation_checkpointing_enable()  # type: ignore[operator]
    inside = {
        id(parameter): number
        for number, layer in enumerate(decoder_layers(wrapped))
        for parameter in layer.parameters()
    }
    trained = tuple(
        Trained(matrix=parameter, lane=0, layer=inside.get(id(parameter)))
        for parameter in wrapped.parameters()
        if parameter.requires_grad
    )
    _prepare(wrapped, setting)
    mark_gradients([item.matrix for item in trained], tracker)
    _register_trained(trained, setting)
    _register_buffers(wrapped, tracker)
    if request.stack == "trl":
        add_fused_head(
            model,
            num_labels=request.micro_batch_size * labels_per_row(request),
            autocast=setting.semantics.autocast,
            tracker=tracker,
        )
    batch = trainer_batch(request, setting.device)
    num_items = torch.ones((), dtype=torch.int64, device=setting.device)
    for tensor in (*batch.values(), num_items):
        tracker.register(tensor, "inputs")
    trainer_step(wrapped, batch, num_items, setting)
    return trained


def _prepare(model: nn.Module, setting: Setting) -> None:
    """Mark the layers, and book the base."""
    tracker = setting.tracker
    if setting.request.gradient_checkpointing:
        checkpoint_layers(model, setting.semantics)
    mark_layers(model, tracker)
    layers = _layers_of_tensors(model)
    for tensor in base_tensors(model):
        tracker.register(tensor, "base", layer=layers.get(tensor.untyped_storage()._cdata))


def _register_trained(trained: Sequence[Trained], setting: Setting) -> None:
    """Book PEFT's matrices, what the optimizer keeps of them, and gradients that add up."""
    request, tracker = setting.request, setting.tracker
    for item in trained:
        tracker.register(item.matrix.data, "adapters", layer=item.layer)
        for size in state_sizes(request, item.matrix):
            tracker.register_bytes(size.num_bytes, size.category, layer=item.layer)
        if request.gradient_accumulation:
            item.matrix.grad = torch.empty_like(item.matrix)
            tracker.register(item.matrix.grad, "gradients", layer=item.layer)
    for size in shared_state_sizes(request):
        tracker.register_bytes(size.num_bytes, size.category)


def _register_buffers(model: nn.Module, tracker: StorageTracker) -> None:
    for buffer in model.buffers():
        tracker.register(buffer, "inputs")
