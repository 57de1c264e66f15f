"""Predicted peak memory of a training step of a trial pack, in closed form.

The peak is the largest of a few moments (``peak_phase``), each a sum of terms:

    forward    the last layer's MLP runs, everything before it is kept
    loss       a chunk of logits beside everything that is kept
    last norm  backward begins in float32
    backward   the last layer's MLP, everything before it still kept
    end of backward  the first layer's MLP, when nearly all gradients exist
    optimizer  all gradients and one temporary of AdamW

"Peak" means peak allocated (``torch.cuda.max_memory_allocated``). With gradient checkpointing each
layer keeps only its input, ``e*h`` per token, and is computed again in backward.
"""

from functools import cached_property

from lora_tune.memory import terms
from lora_tune.memory.request import DTYPE_BYTES, LaneShape, MemoryRequest
from lora_tune.memory.shape import ModelShape, adapted_copies
from lora_tune.memory.terms import LORA_TUNE, Adapted, Stack, rounded
from lora_tune.records import MemoryEstimate


def estimate_memory(
    shape: ModelShape, request: MemoryRequest, *, stack: Stack = LORA_TUNE
) -> MemoryEstimate:
    """Return the predicted peak of a training step and the terms that it is the sum of.

    ``base_weights``, ``adapters`` and ``optimizer`` are the tensors' own bytes; the allocator's
    rounding, buffers, casts and transient weights are ``workspace``.

    Raises:
        TargetModulesError: A lane names a module that the model does not have.
    """
    step = _Step(shape, request, stack)
    phases = {
        "forward": step.forward(),
        "loss": step.loss(),
        "last norm": step.last_norm(),
        "backward": step.backward(),
        "end of backward": step.end_of_backward(),
        "optimizer": step.optimizer(),
    }
    phase = max(phases, key=lambda name: sum(phases[name].values()))
    return MemoryEstimate(
        peak_allocated_bytes=sum(phases[phase].values()),
        peak_phase=phase,
        terms=phases[phase],
        trainable_parameters=step.num_trainable,
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


class _Step:
    """One training step: what every phase has in common, computed once."""

    def __init__(self, shape: ModelShape, request: MemoryRequest, stack: Stack) -> None:
        self.shape, self.request, self.stack = shape, request, stack
        self.e = DTYPE_BYTES[request.compute_dtype]
        self.lane_tokens = request.micro_batch_size * request.max_length
        self.tokens = self.lane_tokens * len(request.lanes)
        self.label_tokens = max(1, round(request.label_fraction * self.tokens))
        self.lane_copies = [adapted_copies(shape, lane.targets) for lane in request.lanes]
        self.lane_params = [trainable_parameters(shape, lane) for lane in request.lanes]
        self.num_trainable = sum(self.lane_params)
        self.adapted = self._adapted()
        self.down = next((a for a in self.adapted if a.linear.name == "mlp.down_proj"), None)

    def forward(self) -> dict[str, int]:
        """Return the terms when the last layer's MLP is computed, its adapters' products kept."""
        if self.request.gradient_checkpointing:
            kept = self._checkpoints()  # the moment comes again, wider, in ``backward``
        else:
            kept = self._kept() - terms.final_norm_bytes(self.shape) * self.tokens
        return self._terms(
            activations=kept + self._forward_work(recomputed=False),
            gradients=self._held_gradients(),
            workspace=self._casts() + self._weight_transient(),
        )

    def loss(self) -> dict[str, int]:
        """Return the terms when a chunk's gradient is made."""
        return self._terms(
            activations=self._kept() + self._leftover(),
            gradients=self._held_gradients(),
            logits_and_loss=terms.loss_bytes(
                self.shape,
                e=self.e,
                label_tokens=self.label_tokens,
                chunk_tokens=self.request.chunk_tokens,
            ),
            workspace=0 if self.request.gradient_checkpointing else self._casts(),
        )

    def last_norm(self) -> dict[str, int]:
        """Return the terms in the last norm's backward."""
        work = terms.norm_backward_bytes(self.shape) * self.tokens
        return self._terms(
            activations=self._kept() + self._leftover() + work,
            gradients=self._held_gradients(),
            logits_and_loss=self._label_hidden(),
            workspace=0 if self.request.gradient_checkpointing else self._casts(),
        )

    def backward(self) -> dict[str, int]:
        """Return the terms at the last layer, where backward begins."""
        if self.request.gradient_checkpointing:
            kept = self._checkpoints() + self._layer_bytes()
        else:
            kept = self._kept() - terms.final_norm_bytes(self.shape) * self.tokens
        return self._terms(
            activations=kept + self._backward_work(),
            gradients=self._held_gradients(),
            logits_and_loss=self._label_hidden(),
            workspace=self._casts(),
        )

    def end_of_backward(self) -> dict[str, int]:
        """Return the terms at layer 0, when nearly all gradients exist and one layer is kept."""
        one_input = self.e * self.shape.hidden * self.tokens
        return self._terms(
            activations=one_input + self._layer_bytes() + self._backward_work(),
            gradients=4 * self.num_trainable,
            logits_and_loss=self._label_hidden(),
            workspace=self._layer_casts() + self._adapter_rounding,
        )

    def optimizer(self) -> dict[str, int]:
        """Return the terms in AdamW: lane after lane, a temporary as large as the lane's adapter.

        Source: torch ``optim/adam.py``, ``_multi_tensor_adam`` (square roots of the second moments).
        """
        return self._terms(
            activations=0,
            gradients=4 * self.num_trainable,
            workspace=self._adapter_rounding + 4 * max(self.lane_params, default=0),
        )

    def _terms(
        self, *, activations: int, gradients: int, logits_and_loss: int = 0, workspace: int = 0
    ) -> dict[str, int]:
        base, base_rounding, inputs = self._static
        return {
            "base_weights": base,
            "adapters": 4 * self.num_trainable,
            "gradients": gradients,
            "optimizer": 8 * self.num_trainable,
            "activations": activations,
            "logits_and_loss": logits_and_loss,
            "workspace": workspace
            + base_rounding
            + inputs
            + 3 * self._adapter_rounding  # of the adapters and AdamW's two states
            + (self._adapter_rounding if self.request.gradient_accumulation else 0)
            + terms.cublas_workspace_bytes(self.request.compute_capability),
        }

    @cached_property
    def _static(self) -> tuple[int, int, int]:
        """The base's bytes, what rounding adds, and the batch with its rotary tables."""
        request, shape = self.request, self.shape
        tensors = terms.base_tensor_bytes(
            shape, quantization=request.quantization, compute_dtype=request.compute_dtype
        )
        base = sum(size * count for size, count in tensors)
        booked = sum(rounded(size) * count for size, count in tensors)
        inputs = terms.input_bytes(
            tokens=self.tokens, max_length=request.max_length, label_tokens=self.label_tokens
        )
        rotary = terms.rotary_bytes(shape, e=self.e, max_length=request.max_length)
        buffers = 2 * rounded(2 * shape.head_dim)  # inv_freq and its original
        return base, booked - base, inputs + rotary + buffers

    def _adapted(self) -> list[Adapted]:
        """Return the linear layers that some lane adapts."""
        found = []
        for i, linear in enumerate(self.shape.linears):
            with_it = [k for k, copies in enumerate(self.lane_copies) if copies[i]]
            if with_it:
                lanes = [self.request.lanes[k] for k in with_it]
                found.append(
                    Adapted(
                        linear=linear,
                        ranks=tuple(lane.rank for lane in lanes),
                        dropouts=tuple(lane.lora_dropout for lane in lanes),
                        copies=max(self.lane_copies[k][i] for k in with_it),
                        grouped=self.request.grouped and len(lanes) > 1,
                    )
                )
        return found

    @cached_property
    def _adapter_bytes(self) -> tuple[int, int]:
        """What adapters keep for backward, casts aside: in the whole model, in one layer."""
        kept = [
            (
                terms.adapter_saved_bytes(
                    adapted, e=self.e, lane_tokens=self.lane_tokens, stack=self.stack
                ),
                adapted.copies,
            )
            for adapted in self.adapted
        ]
        kept += terms.shared_input_bytes(
            self.shape, self.adapted, e=self.e, tokens=self.tokens, stack=self.stack
        )
        return sum(size * copies for size, copies in kept), sum(size for size, _ in kept)

    def _kept(self) -> int:
        """Return what is kept between forward and backward, the last norm included."""
        shape, tokens = self.shape, self.tokens
        last = terms.final_norm_bytes(shape) * tokens
        if self.request.gradient_checkpointing:
            return shape.num_layers * self.e * shape.hidden * tokens + last
        attention = any(a.linear.name.startswith("self_attn.") for a in self.adapted)
        frozen = terms.frozen_start_bytes(shape, self.e, adapts_attention=attention)
        layers = shape.num_layers * terms.layer_saved_bytes(shape, self.e) - frozen
        return layers * tokens + last + self._adapter_bytes[0]

    def _checkpoints(self) -> int:
        """Return all layers' inputs; in float32 the recomputed layer's norm shares one of them."""
        layers = self.shape.num_layers - (1 if self.e == 4 else 0)
        return layers * self.e * self.shape.hidden * self.tokens

    def _layer_bytes(self) -> int:
        """Return what one layer keeps while it is computed again and differentiated."""
        frozen = terms.layer_saved_bytes(self.shape, self.e) * self.tokens
        return frozen + self._adapter_bytes[1]

    def _leftover(self) -> int:
        """Return what the last recomputed layer leaves behind until Python collects garbage.

        Its input and its residual, ``2*e*h``: the frame is in a cycle with the exception by which
        torch's non-reentrant checkpointing ends a recomputation early. Traced.
        """
        if not self.request.gradient_checkpointing:
            return 0
        return 2 * self.e * self.shape.hidden * self.tokens

    def _forward_work(self, *, recomputed: bool) -> int:
        return terms.forward_work_bytes(
            self.shape,
            self.down,
            e=self.e,
            tokens=self.tokens,
            lane_tokens=self.lane_tokens,
            recomputed=recomputed,
        )

    def _backward_work(self) -> int:
        """Return the wider of the MLP's backward and, with 4-bit weights, down_proj's own.

        With the gradient of the layer's output, ``e*h``; under checkpointing also the moment
        when the layer's forward has just been done again.
        """
        shape, e = self.shape, self.e
        work = terms.backward_work_bytes(
            shape,
            self.down,
            e=e,
            tokens=self.tokens,
            lane_tokens=self.lane_tokens,
            stack=self.stack,
        )
        through_down = (2 if self.down else 1) * e * shape.intermediate * self.tokens
        work = max(work, through_down + self._weight_transient())
        if self.request.gradient_checkpointing:
            recomputed = self._forward_work(recomputed=True)
            work = max(work, recomputed + self._weight_transient())
        return work + e * shape.hidden * self.tokens

    def _weight_transient(self) -> int:
        if self.request.quantization != "nf4":
            return 0
        return terms.dequantized_bytes(self.shape, self.e)

    def _label_hidden(self) -> int:
        """Return the hidden states of the label positions, which live until backward ends."""
        return self.e * self.shape.hidden * self.label_tokens

    def _held_gradients(self) -> int:
        """Return the gradients of earlier micro-batches: the adapters' size, float32."""
        return 4 * self.num_trainable if self.request.gradient_accumulation else 0

    def _casts(self) -> int:
        """Return the kept copies of A and B: of all layers, or of the one computed again."""
        if self.request.gradient_checkpointing:
            return self._layer_casts()
        return sum(a.copies * terms.cast_bytes(a, e=self.e) for a in self.adapted)

    def _layer_casts(self) -> int:
        return sum(terms.cast_bytes(a, e=self.e) for a in self.adapted)

    @cached_property
    def _adapter_rounding(self) -> int:
        """What the allocator adds to the adapters' matrices."""
        added = 0
        for lane, copies in zip(self.request.lanes, self.lane_copies, strict=True):
            for linear, count in zip(self.shape.linears, copies, strict=True):
                sizes = (4 * lane.rank * linear.in_features, 4 * lane.rank * linear.out_features)
                added += count * sum(rounded(size) - size for size in sizes)
        return added
