"""Predicted peak memory of a training step, in closed form.

The static terms are sums over the tensors that exist before the step (``terms.py``); what the step
books on top is read off a ledger of one first, one middle and one last layer (``step.py``).
"Peak" means peak allocated (``torch.cuda.max_memory_allocated``) of the second or a later step.
"""

from lora_tune.errors import UncoveredModelError
from lora_tune.memory import terms
from lora_tune.memory.request import DTYPE_BYTES, LaneShape, MemoryRequest
from lora_tune.memory.reserved import reserved_bytes
from lora_tune.memory.shape import ModelShape, adapted_copies
from lora_tune.memory.step import Step
from lora_tune.records import MemoryEstimate


def estimate_memory(
    shape: ModelShape, request: MemoryRequest, *, reserved: bool = False
) -> MemoryEstimate:
    """Return the predicted peak of a training step and the terms that it is the sum of.

    With ``reserved`` the allocator is replayed over all layers, which takes tens of milliseconds; else
    ``peak_reserved_bytes`` is the peak allocated, its lower bound.

    ``base_weights``, ``adapters`` and ``optimizer`` are the tensors' own bytes; the allocator's
    rounding of them, buffers, the batch and library workspaces are ``workspace``.

    Raises:
        UncoveredModelError: The shape was counted on a model that has no closed form.
        TargetModulesError: A lane names a module that the model does not have.
    """
    if not shape.covered:
        raise UncoveredModelError(f'model_type "{shape.model_type}" has no closed form.')
    base = terms.book(terms.base_tensors(shape, request))
    tensors = list(terms.adapter_tensors(shape, request))
    adapter_e = DTYPE_BYTES[request.adapter_dtype]
    adapters = terms.book((adapter_e * elements, count) for elements, count in tensors)
    optimizer = terms.book(terms.optimizer_tensors(tensors, request))
    step = Step(shape, request)
    peak = step.run()
    gradients = adapters.size + adapters.rounding
    held = gradients if request.keeps_gradients else 0
    workspace = (
        base.rounding
        + adapters.rounding
        + optimizer.rounding
        + sum(terms.rounded(4 * elements) for elements in shape.buffers)
        + terms.step_counter_bytes(sum(count for _, count in tensors), request)
        + terms.input_bytes(
            shape, request, tokens=step.numbers.tokens, label_tokens=step.numbers.label_tokens
        )
        + terms.cublas_workspace_bytes(request.compute_capability)
    )
    phases = {
        peak.phase: (peak.activations, peak.logits_and_loss, peak.gradients + held),
        "optimizer": (0, 0, gradients),  # which works in place
    }
    phase = max(phases, key=lambda name: sum(phases[name]))
    activations, logits, gradients = phases[phase]
    own = {
        "base_weights": base.size,
        "adapters": adapters.size,
        "gradients": gradients,
        "optimizer": optimizer.size,
        "activations": activations,
        "logits_and_loss": logits,
        "workspace": workspace,
    }
    total = sum(own.values())
    return MemoryEstimate(
        peak_allocated_bytes=total,
        peak_reserved_bytes=max(total, reserved_bytes(shape, request)) if reserved else total,
        peak_phase=phase,
        terms=own,
        trainable_parameters=sum(elements * count for elements, count in tensors),
        base_parameters=shape.num_parameters,
    )


def trainable_parameters(shape: ModelShape, lane: LaneShape) -> int:
    """Count the adapter parameters of one lane.

    >>> shape = ModelShape.from_config(
    ...     {"model_type": "llama", "num_hidden_layers": 32, "hidden_size": 4096,
    ...      "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8,
    ...      "vocab_size": 128256}
    ... )
    >>> attention = ("q_proj", "k_proj", "v_proj", "o_proj")
    >>> trainable_parameters(shape, LaneShape(rank=16, targets=attention, lora_dropout=0.0))
    13631488
    """
    copies = adapted_copies(shape, lane.targets)
    return sum(
        count * terms.adapter_param_count([linear], lane.rank)
        for linear, count in zip(shape.linears, copies, strict=True)
    )
