"""What a training step makes the GPU do: operations, bytes and kernel launches, as plain counts.

Nothing here knows how fast a GPU is; ``throughput.py`` divides these counts by rates.

Notation: T padded tokens of a micro-batch, all lanes together, S tokens per row, P parameters of the
frozen linear layers, h hidden, f MLP width, q all query heads, k all key heads, V vocabulary, N label
positions, e bytes per element of the compute type.

A *pass* is one run of all decoder layers over a micro-batch: forward, with gradient checkpointing
once more in backward, and backward itself. A frozen layer has no weight gradient, so its backward
costs one product, like its forward: 4*P*T operations without checkpointing, 6*P*T with it, against 6 and
8 of full fine-tuning.

Coefficients of bytes count what the eager kernels of transformers 5.23.0 read and write: its modeling
files, peft's ``Linear4bit.forward``, the engine's ``lora.py`` and ``loss.py``. Kernel launches are counted
the same way, to about a fifth. Left out: evaluation, saving, data loading, the fused 4-bit kernel for
a few tokens.

Experts of a mixture stay 16-bit parameters: a token meets ``experts_per_token`` of them, a batch
reads all.
"""

from dataclasses import dataclass

from lora_tune.memory.groups import in_order, lane_groups
from lora_tune.memory.request import DTYPE_BYTES, STACKS, LaneShape, MemoryRequest
from lora_tune.memory.shape import ModelShape, adapted_copies

# One RMSNorm in eager: cast, square, mean, scale, cast, weight. 2 bytes in and out, float32 between.
_NORM_BYTES = 36
# Rotary embedding: rotate_half's slices, negation and cat, two products and a sum, on queries and keys.
_ROTARY_ELEMENTS = 9
_RESIDUAL_ELEMENTS = 6  # two additions, three tensors each
_MLP_ELEMENTS = 5  # activation in and out, product of two into a third
# Adapter of one target in forward: x read (twice with the cast), the product written, read, scaled, added.
_ADAPTER_IN_ELEMENTS, _ADAPTER_OUT_ELEMENTS = 2, 4
_DROPOUT_ELEMENTS = 3  # read, write, mask
_BACKWARD_OVER_FORWARD = 2.0  # bytes of elementwise kernels in backward
# Full score matrices of eager attention: mask, float32 softmax, cast, dropout; and their gradients.
_EAGER_SCORE_BYTES = 40

# Bytes moved per logit: logits, float32 copy, softmax, gradient; counted in the stacks' own code.
_LOGIT_BYTES = {"lora-tune": 54, "trainer": 40, "trainer-kbit": 44, "trl": 40}
# Products of V*h per position: logits and gradient; TRL's chunks make the logits again in backward.
_HEAD_PRODUCTS = {"lora-tune": 2, "trainer": 2, "trainer-kbit": 2, "trl": 3}

# Kernels that a layer launches in one forward pass without adapters: two norms (14), rotary (14),
# attention with its transposes (8), residuals and MLP (6), seven products.
_LAYER_LAUNCHES = 49
_DEQUANTIZE_LAUNCHES = 3  # absmax, its offset, the weight
# PEFT's adapter: casts of A and B, two products, scaling, addition, views. A group of our lanes: A and B of
# its lanes stacked and cast, two products, the scaling, its cast.
_ADAPTER_LAUNCHES = 8
_BACKWARD_LAUNCHES = 2.0  # per forward launch
_FUSED_ADAMW_LAUNCHES = 12
_OPTIMIZER_TENSOR_LAUNCHES = 0.4  # Python work per tensor, as a share of a launch

# Bytes per adapter parameter of one optimizer step with clipping: parameter, gradient, two states read and
# written once.
_ADAMW_FUSED_BYTES, _ADAMW_8BIT_BYTES = 40, 30


@dataclass(frozen=True, slots=True, kw_only=True)
class StepWork:
    """Counts of one micro-batch, and of the optimizer step that follows ``accumulation`` of them."""

    tokens: int
    passes: int  # over the layers: 3 with checkpointing, else 2
    layer_operations: float  # per pass, frozen products only
    weight_bytes: float  # per pass: what these products read
    adapter_operations: float  # all passes
    adapters_in_float32: bool
    attention_operations: float  # all passes
    head_operations: float
    activation_bytes: float  # all passes: elementwise kernels, logits, score matrices
    dequantized_bytes: float  # all passes: 4-bit weights read, 16-bit weights written
    launches: float
    optimizer_bytes: float
    optimizer_launches: float


def step_work(shape: ModelShape, request: MemoryRequest) -> StepWork:
    """Return the counts of a step.

    Args:
        shape: The base model.
        request: The trial pack; a token is a padded token.

    Raises:
        TargetModulesError: A lane names a module that the model does not have.
    """
    tokens = request.micro_batch_size * request.max_length * len(request.lanes)
    checkpointed = request.gradient_checkpointing
    parameters, expert = frozen_parameters(shape), _expert_parameters(shape)
    active = parameters + shape.experts_per_token * expert
    e = DTYPE_BYTES[request.compute_dtype]
    adapter_operations, adapter_bytes = _adapter_work(shape, request, e)
    elementwise = _layer_bytes(shape, request, e) * shape.num_layers * tokens + adapter_bytes
    forwards = 2 if checkpointed else 1
    head_operations, head_bytes = _head_work(shape, request, tokens)
    return StepWork(
        tokens=tokens,
        passes=forwards + 1,
        layer_operations=2.0 * active * tokens,
        weight_bytes=float(e * (parameters + shape.num_experts * expert)),
        adapter_operations=adapter_operations * (forwards + 2),
        adapters_in_float32=request.adapter_dtype == "float32"
        and not request.autocast
        and request.stack != "lora-tune",
        attention_operations=_attention_operations(shape, request, tokens) * (forwards + 2.5),
        head_operations=head_operations,
        activation_bytes=elementwise * (forwards + _BACKWARD_OVER_FORWARD)
        + _score_bytes(shape, request, tokens)
        + head_bytes,
        dequantized_bytes=_dequantized_bytes(parameters, request, e) * (forwards + 1),
        launches=_launches(shape, request) * (forwards + _BACKWARD_LAUNCHES),
        optimizer_bytes=_optimizer_bytes(shape, request),
        optimizer_launches=_optimizer_launches(shape, request),
    )


def frozen_parameters(shape: ModelShape) -> int:
    """Count the weights of all linear layers but the head and routed experts.

    Every pass multiplies each token with them.

    >>> shape = ModelShape.from_config(
    ...     {"model_type": "llama", "num_hidden_layers": 32, "hidden_size": 4096,
    ...      "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8,
    ...      "vocab_size": 128256}
    ... )
    >>> frozen_parameters(shape)
    6979321856
    """
    return sum(
        copies * linear.in_features * linear.out_features
        for linear, copies in zip(shape.linears, shape.copies, strict=True)
    )


def _expert_parameters(shape: ModelShape) -> int:
    """Return the parameters of one routed expert over all layers: gate, up and down."""
    return 3 * shape.num_layers * shape.hidden * shape.expert_intermediate


def _layer_bytes(shape: ModelShape, request: MemoryRequest, e: int) -> float:
    """Return the bytes per token of one layer's elementwise kernels in a forward pass.

    After k-bit preparation the residual stream and the MLP's tensors are float32.
    """
    wide = 4 if request.stack == "trainer-kbit" else e
    heads = shape.query_size + shape.kv_size
    attention = 2 * heads * e
    mask = 4 * e * (shape.query_size - shape.kv_size) if request.padded else 0
    return (
        2 * _NORM_BYTES * shape.hidden
        + _ROTARY_ELEMENTS * heads * e
        + attention
        + mask
        + wide * (_RESIDUAL_ELEMENTS * shape.hidden + _MLP_ELEMENTS * shape.intermediate)
    )


def _adapter_work(shape: ModelShape, request: MemoryRequest, e: int) -> tuple[float, float]:
    """Return operations and elementwise bytes of all lanes' adapters in one forward pass."""
    lane_tokens = request.micro_batch_size * request.max_length
    operations = moved = 0.0
    for lane in request.lanes:
        for linear, copies in zip(shape.linears, adapted_copies(shape, lane.targets), strict=True):
            ins, outs = linear.in_features, linear.out_features
            operations += 2.0 * copies * lane.rank * (ins + outs) * lane_tokens
            into = _ADAPTER_IN_ELEMENTS + (_DROPOUT_ELEMENTS if lane.lora_dropout else 0)
            moved += copies * e * (into * ins + _ADAPTER_OUT_ELEMENTS * outs) * lane_tokens
    return operations, moved


def _attention_operations(shape: ModelShape, request: MemoryRequest, tokens: int) -> float:
    """Return the two products of a forward pass: 4*S*q per token, half of it where causal.

    Flash backward has five products where forward has two: 2.5 times as many operations.
    Source: FlashAttention-2, arXiv 2307.08691, section 4.1.
    """
    causal = 1 if request.padded or _is_eager(shape, request) else 2
    full, window = shape.num_layers - shape.num_sliding_layers, shape.sliding_window
    reach = full * request.max_length / causal
    if window is not None:
        # A sliding layer sees the last ``window`` tokens, and where rows are shorter it is a full one.
        reach += shape.num_sliding_layers * min(request.max_length / causal, window)
    return 4.0 * reach * shape.query_size * tokens


def _is_eager(shape: ModelShape, request: MemoryRequest) -> bool:
    """Say whether score matrices are made: on request, or because scores are capped (Gemma 2)."""
    return request.attention == "eager" or shape.attention_softcap


def _score_bytes(shape: ModelShape, request: MemoryRequest, tokens: int) -> float:
    """Return what eager attention moves: its S x S matrices, forward and backward."""
    if not _is_eager(shape, request):
        return 0.0
    scores = float(request.max_length * shape.num_heads * shape.num_layers * tokens)
    return scores * _EAGER_SCORE_BYTES * (2 if request.gradient_checkpointing else 1)


def _head_work(shape: ModelShape, request: MemoryRequest, tokens: int) -> tuple[float, float]:
    """Return operations and bytes of head and loss: on all tokens, or on labels where in chunks."""
    chunked = request.stack in ("lora-tune", "trl")
    positions = max(1, round(request.label_fraction * tokens)) if chunked else tokens
    weights = shape.vocab_size * shape.hidden
    operations = 2.0 * _HEAD_PRODUCTS[request.stack] * weights * positions
    moved = float(_LOGIT_BYTES[request.stack] * shape.vocab_size * positions)
    if request.stack == "trainer-kbit":
        moved += 6.0 * weights  # the float32 head is cast for autocast, once a micro-batch
    return operations, moved


def _dequantized_bytes(parameters: int, request: MemoryRequest, e: int) -> float:
    """Return the bytes of making every 4-bit weight a 16-bit one, once.

    Reads 4 bits and the block constants, writes e bytes; double quantization writes and
    reads the float32 constants of each block of 64 as well.
    """
    if request.quantization == "none":
        return 0.0
    constants = (1 / 64 + 8 / 64) if request.quantization == "nf4" else 4 / 64
    return parameters * (0.5 + constants + e)


def _launches(shape: ModelShape, request: MemoryRequest) -> float:
    """Return the kernels of one forward pass over all layers."""
    quantized = request.quantization != "none"
    products = sum(shape.copies)
    count = float(_LAYER_LAUNCHES * shape.num_layers)
    count += _DEQUANTIZE_LAUNCHES * products if quantized else 0
    adapted = [sum(adapted_copies(shape, lane.targets)) for lane in request.lanes]
    own = STACKS[request.stack].own_engine
    count += _ADAPTER_LAUNCHES * (_num_groups(shape, request) if own else sum(adapted))
    dropped = sum(n for n, lane in zip(adapted, request.lanes, strict=True) if lane.lora_dropout)
    return count + 2 * dropped


def _num_groups(shape: ModelShape, request: MemoryRequest) -> int:
    """Return the low-rank products of a forward pass: over all layers, the groups of their lanes."""
    lanes = in_order(shape, request.lanes)
    copies = [adapted_copies(shape, lane.targets) for lane in lanes]
    return sum(
        max(counts) * len(lane_groups(lanes, [count > 0 for count in counts], request))
        for counts in zip(*copies, strict=True)
    )


def _optimizer_bytes(shape: ModelShape, request: MemoryRequest) -> float:
    per_parameter = _ADAMW_FUSED_BYTES if request.optimizer == "adamw" else _ADAMW_8BIT_BYTES
    width = 0.5 if request.adapter_dtype == "bfloat16" and request.optimizer == "adamw" else 1.0
    return width * per_parameter * sum(_adapter_parameters(shape, lane) for lane in request.lanes)


def _optimizer_launches(shape: ModelShape, request: MemoryRequest) -> float:
    """Return the optimizer's launches; the 8-bit optimizers step tensor by tensor, ours has one a lane."""
    total = 0.0
    for lane in request.lanes:
        own = STACKS[request.stack].own_engine
        tensors = 1 if own else 2 * sum(adapted_copies(shape, lane.targets))
        if request.optimizer != "adamw":
            total += 2 * tensors
            continue
        total += _FUSED_ADAMW_LAUNCHES + _OPTIMIZER_TENSOR_LAUNCHES * tensors
    return total


def _adapter_parameters(shape: ModelShape, lane: LaneShape) -> int:
    return sum(
        copies * lane.rank * (linear.in_features + linear.out_features)
        for linear, copies in zip(shape.linears, adapted_copies(shape, lane.targets), strict=True)
    )
