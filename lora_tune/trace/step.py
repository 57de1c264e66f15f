"""One training step of each stack, run under the tracker.

The statements follow the real training loops, since what a name still refers to is alive:
transformers' ``Trainer.training_step`` and ``compute_loss``, accelerate's wrapper around ``forward``,
TRL's fused head (``trl_head.py``), and our engine's ``TrialPack.accumulate`` itself.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from accelerate.utils.operations import convert_to_fp32  # type: ignore[import-untyped]
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from lora_tune.memory.request import MemoryRequest
from lora_tune.trace.model import DTYPES
from lora_tune.trace.semantics import CudaSemantics
from lora_tune.trace.tracker import StorageTracker


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What a step runs under."""

    request: MemoryRequest
    semantics: CudaSemantics
    tracker: StorageTracker
    device: str


def decoder_layers(model: nn.Module) -> tuple[nn.Module, ...]:
    """Return the decoder layers in order."""
    return tuple(m for m in model.modules() if isinstance(m, GradientCheckpointingLayer))


def checkpoint_layers(model: nn.Module, semantics: CudaSemantics) -> None:
    """Let checkpointed layers enter CUDA's semantics again when they are run a second time."""
    for layer in decoder_layers(model):
        function = getattr(layer, "_gradient_checkpointing_func", None)
        if layer.gradient_checkpointing and function is not None:
            again = partial(function, context_fn=semantics.checkpoint_contexts)
            layer._gradient_checkpointing_func = again  # type: ignore[assignment]


def mark_layers(model: nn.Module, tracker: StorageTracker) -> None:
    """Let every decoder layer begin a block of the history, forward and backward.

    A layer's backward begins when the gradient of its output is there.
    """
    layers = decoder_layers(model)

    def before(module: nn.Module, args: object, *, layer: int) -> None:
        tracker.enter_block("forward", layer)

    def after(module: nn.Module, args: object, output: object, *, layer: int) -> None:
        hidden = output if isinstance(output, Tensor) else next(iter(output))  # type: ignore[call-overload]
        if hidden.requires_grad:
            hidden.register_hook(partial(begin_backward, layer=layer))
        if layer == len(layers) - 1:
            tracker.phase = "loss"
            tracker.enter_block("outside")

    def begin_backward(gradient: Tensor, *, layer: int) -> None:
        tracker.phase = "backward"
        tracker.enter_block("backward", layer)

    for number, layer in enumerate(layers):
        layer.register_forward_pre_hook(partial(before, layer=number))
        layer.register_forward_hook(partial(after, layer=number))


def mark_gradients(parameters: Sequence[Tensor], tracker: StorageTracker) -> None:
    """Let the gradients of parameters be booked as such once they are accumulated."""

    def found(parameter: Tensor) -> None:
        assert parameter.grad is not None
        tracker.relabel(parameter.grad, "gradients")

    for parameter in parameters:
        parameter.register_post_accumulate_grad_hook(found)  # type: ignore[no-untyped-call]


def trainer_batch(request: MemoryRequest, device: str) -> dict[str, Tensor]:
    """Return the tensors of a micro-batch as the Trainer's collator makes them."""
    shape = (request.micro_batch_size, request.max_length)
    batch = {
        name: torch.ones(shape, dtype=torch.int64, device=device)
        for name in ("input_ids", "attention_mask", "labels")
    }
    if request.padded:
        batch["attention_mask"][0, -1] = 0
    return batch


@contextmanager
def _autocast(setting: Setting) -> Iterator[None]:
    request = setting.request
    dtype = DTYPES[request.compute_dtype]
    if not request.autocast:
        yield
    else:
        with setting.semantics.autocast.context(dtype):
            yield


def trainer_step(
    model: nn.Module, batch: Mapping[str, Tensor], num_items: Tensor, setting: Setting
) -> None:
    """Run ``Trainer.training_step``; with held outputs, a plain loop instead.

    Source: transformers ``trainer.py`` (``training_step``, ``compute_loss``); accelerate
    ``prepare_model``, which converts 16-bit outputs to float32 after the forward pass.
    """
    with setting.semantics.installed(), setting.tracker:
        if setting.request.outputs_held:
            with _autocast(setting):
                outputs = model(**batch, num_items_in_batch=num_items)
            outputs["loss"].backward()
            del outputs
        else:
            _trainer_loss(model, batch, num_items, setting).backward()  # type: ignore[no-untyped-call]


def _trainer_loss(
    model: nn.Module, batch: Mapping[str, Tensor], num_items: Tensor, setting: Setting
) -> Tensor:
    outputs = _prepared_forward(model, batch, num_items, setting)
    loss: Tensor = outputs["loss"]
    return loss


def _prepared_forward(
    model: nn.Module, batch: Mapping[str, Tensor], num_items: Tensor, setting: Setting
) -> Mapping[str, Tensor]:
    if not setting.request.autocast:
        plain: Mapping[str, Tensor] = model(**batch, num_items_in_batch=num_items)
        return plain
    converted: Mapping[str, Tensor] = convert_to_fp32(
        _autocast_forward(model, batch, num_items, setting)
    )
    return converted


def _autocast_forward(
    model: nn.Module, batch: Mapping[str, Tensor], num_items: Tensor, setting: Setting
) -> Mapping[str, Tensor]:
    with _autocast(setting):
        outputs: Mapping[str, Tensor] = model(**batch, num_items_in_batch=num_items)
        return outputs


def mark_loss(decoder: nn.Module, tracker: StorageTracker) -> None:
    """Let what is made between the decoder's output and its gradient be booked as the loss's."""

    def after(module: nn.Module, args: object, output: object) -> None:
        tracker.default_category = "loss"
        hidden: Tensor = output.last_hidden_state  # type: ignore[attr-defined]
        hidden.register_hook(reset)  # type: ignore[no-untyped-call]

    def reset(gradient: Tensor) -> None:
        tracker.default_category = "activations"

    decoder.register_forward_hook(after)
