"""The terms of the memory estimate, each a function from sizes to bytes.

Notation: e bytes per element of the compute type (2 or 4), h hidden, f MLP width, q all query
heads, k all key heads, H number of heads, V vocabulary, L layers, r rank, T padded tokens of a
step, all lanes together, S tokens per row, D head size.

What is kept for backward follows from the modeling files of transformers 5.23.0 and from
``engine/lora.py`` and ``engine/loss.py``; the working space of the backward pass was read off
a trace of the engine's own step (``tests/memory/test_against_engine_step.py`` repeats it).
Not here: what fragmentation and the CUDA context take outside the allocator's books.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lora_tune.memory.request import DTYPE_BYTES
from lora_tune.memory.shape import ModelShape
from lora_tune.records import LinearShape

ALIGNMENT = 512
"""The CUDA caching allocator rounds every tensor up to this (``c10/core/AllocatorConfig.h``)."""

NF4_BLOCK = 64
NF4_BLOCKS_PER_STATE = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Stack:
    """What a training stack keeps that another does not."""

    name: str
    private_dropped_inputs: bool  # every target keeps its own dropped-out copy of its input


LORA_TUNE = Stack(name="lora-tune", private_dropped_inputs=False)
"""Our engine: keeps the layer's input, which neighbours share, and a one-byte mask."""

PEFT_LAYERS = Stack(name="lora-tune with PEFT layers", private_dropped_inputs=True)
"""PEFT's ``Linear4bit.forward`` in place of our layers; the loss in chunks as ours."""


def rounded(num_bytes: int) -> int:
    """Return the bytes that the CUDA allocator books for a tensor.

    >>> rounded(1), rounded(512), rounded(513)
    (512, 512, 1024)
    """
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


def adapter_param_count(linears: Iterable[LinearShape], rank: int) -> int:
    """Count the trainable parameters that LoRA adds to these linear layers.

    A is (rank, in_features) and B is (out_features, rank): ``rank * (in_features + out_features)``.

    Source: LoRA, arXiv 2106.09685, section 4.2.

    >>> c_attn = LinearShape(name="attn.c_attn", in_features=768, out_features=2304)
    >>> adapter_param_count([c_attn] * 12, rank=8)  # GPT-2
    294912
    """
    return sum(rank * (linear.in_features + linear.out_features) for linear in linears)


def nf4_tensor_bytes(num_weights: int) -> tuple[int, ...]:
    """Return the bytes of each tensor that holds one NF4 weight with double quantization.

    Packed codes n/2; one absmax byte per block of 64; a float32 absmax per 256 blocks; and per
    weight the 16-entry code, the offset and the 256-entry code of the absmax, all float32.

    Source: ``bitsandbytes/functional.py``, ``quantize_4bit`` with ``compress_statistics``.

    >>> f"{sum(nf4_tensor_bytes(4096 * 14336)) / (4096 * 14336):.4f}"  # bytes per parameter
    '0.5159'
    """
    blocks = math.ceil(num_weights / NF4_BLOCK)
    return (
        math.ceil(num_weights / 2),
        blocks,
        4 * math.ceil(blocks / NF4_BLOCKS_PER_STATE),
        4 * 16,
        4,
        4 * 256,
    )


def base_tensor_bytes(
    shape: ModelShape, *, quantization: str, compute_dtype: str
) -> list[tuple[int, int]]:
    """Return (bytes, how many) of the base's tensors.

    Linear layers are NF4 or in the compute type; embeddings, norms, biases and an untied head are
    never quantized.
    """
    e = DTYPE_BYTES[compute_dtype]
    tensors = []
    for linear, count in zip(shape.linears, shape.copies, strict=True):
        n = linear.in_features * linear.out_features
        parts = nf4_tensor_bytes(n) if quantization == "nf4" else (e * n,)
        tensors += [(part, count) for part in parts]
    tensors += [(e * n, shape.num_layers) for n in shape.layer_tensors]
    return tensors + [(e * n, 1) for n in shape.outer_tensors]


def layer_saved_bytes(shape: ModelShape, e: int) -> int:
    """Return what one frozen decoder layer keeps for backward, bytes per token, adapters aside.

    ``8h + 8 + e*(2q + 2k) + 4H + 3*e*f``: two RMSNorms keep their input in float32 (4h) and
    the reciprocal root (4); attention keeps query, key, value, output and the log-sum-exp; the MLP
    keeps gate, up and silu(gate). A frozen linear layer keeps no input: bitsandbytes' MatMul4Bit and
    a linear layer without weight gradient need only the weight. Norms of queries and keys (Qwen3) add
    ``4*(q + k)`` and 4 per head.

    Key and value heads are not repeated: SDPA without a mask takes them as they are
    (``integrations/sdpa_attention.py``, ``use_gqa_in_sdpa``).

    For other families, a guess meant to be too high: two norms, every linear layer's output, the
    attention's output and an activation written out in four steps. On small GPT-2, OPT, GPT-NeoX
    and Phi-3 models a step adds 0.4 to 0.8 of it. Too low where attention is written out in full
    (the soft cap of Gemma-2): matrices of S x S per head are not in it.
    """
    h, f, q, k = shape.hidden, shape.intermediate, shape.query_size, shape.kv_size
    if not shape.covered:
        outputs = sum(linear.out_features for linear in shape.layer_linears)
        return 2 * (4 * h + 8) + e * (outputs + q + 4 * f) + 4 * shape.num_heads
    norms = 2 * (4 * h + 4)
    if shape.qk_norm:
        norms += 4 * (q + k) + 4 * (shape.num_heads + shape.num_kv_heads)
    return norms + e * (2 * q + 2 * k) + 4 * shape.num_heads + 3 * e * f


def final_norm_bytes(shape: ModelShape) -> int:
    """Return what the last norm keeps per token: its input in float32 and the reciprocal root."""
    return 4 * shape.hidden + 4


def frozen_start_bytes(shape: ModelShape, e: int, *, adapts_attention: bool) -> int:
    """Return what layer 0 need not keep per token, since nothing before an adapter has a gradient.

    Its first norm keeps nothing. Without an adapter in attention, neither attention nor the second
    norm does: ``4h + 4 + e*(2q + 2k) + 4H`` more.
    """
    if not shape.covered:
        return 0
    first_norm = 4 * shape.hidden + 4
    if adapts_attention:
        return first_norm
    attention = e * (2 * shape.query_size + 2 * shape.kv_size) + 4 * shape.num_heads
    return 2 * first_norm + attention


# Linear layers of a covered decoder that read the same tensor, which is then kept once. o_proj
# reads the attention's output, which attention keeps anyway.
_SHARED_INPUTS = {
    "self_attn.q_proj": "attention input",
    "self_attn.k_proj": "attention input",
    "self_attn.v_proj": "attention input",
    "self_attn.o_proj": None,
    "mlp.gate_proj": "MLP input",
    "mlp.up_proj": "MLP input",
    "mlp.down_proj": "MLP product",
}


def input_name(shape: ModelShape, linear: LinearShape) -> str | None:
    """Return which tensor a linear layer reads; None when it is kept without the adapter."""
    return _SHARED_INPUTS[linear.name] if shape.covered else linear.name


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapted:
    """The adapters of one kind of linear layer, all lanes together, in one decoder layer."""

    linear: LinearShape
    ranks: tuple[int, ...]  # of the lanes that adapt it
    dropouts: tuple[float, ...]
    copies: int  # decoder layers in which some lane adapts it
    grouped: bool  # one product over all lanes instead of one per lane

    @property
    def num_lanes(self) -> int:
        """Lanes with an adapter on it."""
        return len(self.ranks)


def adapter_saved_bytes(adapted: Adapted, *, e: int, lane_tokens: int, stack: Stack) -> int:
    """Return what the adapters of one layer keep for backward, their shared input aside.

    Per lane and token: the rank-r product ``e*r`` and, with dropout, one mask byte per input.
    A grouped product pads to the largest rank and stacks the lanes' inputs, a copy of
    ``e*in``, and every lane gets a mask once any has dropout. PEFT's layers keep the
    dropped-out copy, ``e*in``, beside the mask. Source: ``engine/lora.py``, ``_LowRankProduct``.
    """
    inputs = adapted.linear.in_features
    lanes, has_dropout = adapted.num_lanes, [p > 0 for p in adapted.dropouts]
    if adapted.grouped:
        masks = inputs * lanes if any(has_dropout) else 0
        per_token = lanes * e * (max(adapted.ranks) + inputs) + masks
    else:
        copies = e * inputs * sum(has_dropout) if stack.private_dropped_inputs else 0
        per_token = e * sum(adapted.ranks) + inputs * sum(has_dropout) + copies
    return per_token * lane_tokens


def shared_input_bytes(
    shape: ModelShape, layers: Sequence[Adapted], *, e: int, tokens: int, stack: Stack
) -> list[tuple[int, int]]:
    """Return (bytes, in how many layers) of the linear layers' inputs that adapters keep.

    Lanes keep slices, and a slice keeps the whole tensor: one lane's adapter costs ``e*in`` for
    the tokens of all lanes. Layers that read the same tensor keep it once.
    """
    kept: dict[str, tuple[int, int]] = {}
    for adapted in layers:
        name = input_name(shape, adapted.linear)
        all_dropped = stack.private_dropped_inputs and all(p > 0 for p in adapted.dropouts)
        if name is None or adapted.grouped or all_dropped:
            continue
        known = kept.get(name, (0, 0))[1]
        kept[name] = (e * adapted.linear.in_features * tokens, max(known, adapted.copies))
    return list(kept.values())


def cast_bytes(adapted: Adapted, *, e: int) -> int:
    """Return the copies of A and B in the compute type that one layer's products keep.

    Master weights are float32. A 16-bit product casts them, ``2*r*(in + out)``, and keeps
    the copies; a grouped product stacks and pads them in any type.
    """
    size = adapted.linear.in_features + adapted.linear.out_features
    if adapted.grouped:
        return e * max(adapted.ranks) * size * adapted.num_lanes
    return e * sum(adapted.ranks) * size if e < 4 else 0


def dequantized_bytes(shape: ModelShape, e: int) -> int:
    """Return the transient of one 4-bit product: its whole weight, and two float32 absmax vectors.

    ``e*n + 8*n/64`` for the largest linear layer. Source: bitsandbytes ``backends/cuda/ops.py``
    (forward above some hundred tokens) and ``autograd/_functions.py`` (backward, always).
    """
    n = max(linear.in_features * linear.out_features for linear in shape.layer_linears)
    return e * n + 8 * math.ceil(n / NF4_BLOCK)


def forward_work_bytes(
    shape: ModelShape,
    down: Adapted | None,
    *,
    e: int,
    tokens: int,
    lane_tokens: int,
    recomputed: bool,
) -> int:
    """Return the working space when the last linear layer of a decoder layer runs.

    Residual, norm and output tensors, ``5*e*h`` per token (``6*e*h`` with several lanes, whose
    shares are put together), in 16 bit ``6h`` more in the first
    forward for what the norms cast; the MLP's product unless its adapter keeps it; with dropout its
    masked copy, one lane at a time or all at once in a grouped product, which also has the masks
    twice. Traced.
    """
    h, f = shape.hidden, shape.intermediate
    work = (6 if tokens > lane_tokens else 5) * e * h * tokens
    if e < 4 and not recomputed:
        work += 6 * h * tokens
    if down is None or down.grouped:
        work += e * f * tokens
    if down is not None and any(down.dropouts):
        grouped_tokens = down.num_lanes * lane_tokens
        work += (e * f + f) * grouped_tokens if down.grouped else e * f * lane_tokens
    return work


def backward_work_bytes(
    shape: ModelShape, down: Adapted | None, *, e: int, tokens: int, lane_tokens: int, stack: Stack
) -> int:
    """Return the working space of the MLP's backward, the widest part of a layer.

    The larger of two moments:

    * the product gate * up: three tensors of width f, when what the adapter of down_proj kept is
      gone;
    * down_proj with an adapter: the gradients through the base and through the adapter and their
      sum, ``3*e*f``. In a grouped product with dropout also the masked input, ``e*f``. Alone and
      without dropout this is never the wider one.
      Lanes end one by one: all masks but the last lane's are gone.

    Traced; the order of the two branches at down_proj is autograd's.
    """
    h, f = shape.hidden, shape.intermediate
    if not shape.covered:
        return (4 * e * f + 2 * e * h) * tokens
    at_product = 3 * e * f * tokens
    if down is None:
        return at_product
    kept = adapter_saved_bytes(down, e=e, lane_tokens=lane_tokens, stack=stack)
    kept += 0 if down.grouped else e * f * tokens
    dropped = sum(p > 0 for p in down.dropouts)
    if not dropped and tokens == lane_tokens:
        return at_product - kept
    at_down = 3 * e * f * tokens
    if down.grouped:
        at_down += (e * f - f) * down.num_lanes * lane_tokens if dropped else 0
    else:
        at_down -= f * lane_tokens * max(0, dropped - 1)
    return max(at_product - kept, at_down)


def norm_backward_bytes(shape: ModelShape) -> int:
    """Return the working space per token of the last norm's backward: five float32 tensors.

    Traced: the gradient, its products with the input and with the root, the square's, and a sum
    (``20h``), in any compute type, since RMSNorm computes in float32.
    """
    return 20 * shape.hidden


def rotary_bytes(shape: ModelShape, *, e: int, max_length: int) -> int:
    """Return the cosines and sines that all layers share: ``2*e*S*D``."""
    return 2 * e * max_length * shape.head_dim


def input_bytes(*, tokens: int, max_length: int, label_tokens: int) -> int:
    """Return token ids (8 T), positions (8 S) and seven words per label of the batch."""
    return 8 * tokens + 8 * max_length + 56 * label_tokens


def loss_bytes(shape: ModelShape, *, e: int, label_tokens: int, chunk_tokens: int) -> int:
    """Return what the loss in chunks needs at its widest.

    Hidden states of the label positions and their gradient, ``2*e*h`` per label, and for a
    chunk of C positions: float32 logits that become their own gradient (4V), its cast to a 16-bit
    compute type (e*V) and the chunk's product with the head (e*h). The 16-bit logits are gone when
    the gradient is cast, so 6V is right for both moments. Source: ``engine/loss.py``.
    """
    chunk = min(chunk_tokens, label_tokens)
    per_position = (4 + (e if e < 4 else 0)) * shape.vocab_size + e * shape.hidden
    return 2 * e * shape.hidden * label_tokens + chunk * per_position


def cublas_workspace_bytes(compute_capability: str | None) -> int:
    """Return the cuBLAS and cuBLASLt workspaces that the allocator holds from the first product on.

    None stands for a CPU, which has none. Two handles (autograd's thread has its own) of
    8,519,680 bytes, or 32 MiB on compute capability
    9, 10 and 12, and 1 MiB for cuBLASLt. Source: torch 2.13 ``CublasHandlePool.cpp``,
    ``CUDABlas.cpp``.

    >>> cublas_workspace_bytes("8.9"), cublas_workspace_bytes("9.0")
    (18087936, 68157440)
    """
    if compute_capability is None:
        return 0
    large = compute_capability.partition(".")[0] in ("9", "10", "12")
    return 2 * (32 * 1024**2 if large else 8_519_680) + 1024**2
