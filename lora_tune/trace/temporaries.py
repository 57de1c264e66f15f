"""Bytes that CUDA kernels hold inside themselves while an operation runs.

A dispatch mode sees what operations return, not what a kernel allocates and frees in between.
One function per operation, each with its source; sizes are rounded as the allocator does.
"""

import math
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from lora_tune.memory.terms import NF4_BLOCK, rounded

Args = Sequence[object]
Named = Mapping[str, object]


def cuda_temporaries(op: str, args: Args, kwargs: Named) -> int:
    """Return the bytes that the operation holds while it runs and the trace does not see."""
    rule = _RULES.get(op)
    return 0 if rule is None else rule(args, kwargs)


def _tensor(value: object) -> Tensor:
    assert isinstance(value, Tensor)
    return value


def _softmax_backward(args: Args, kwargs: Named) -> int:
    """``grad * output`` as a tensor of its own. Source: torch ``SoftMax.cu``, softmax_backward."""
    gradient = _tensor(args[0])
    return rounded(gradient.numel() * gradient.element_size())


def _safe_softmax(args: Args, kwargs: Named) -> int:
    """The softmax before rows without an entry are set to zero, and one byte per score.

    Source: torch ``SoftMax.cpp``, ``_safe_softmax``; its inner operations run below the mode.
    """
    scores = _tensor(args[0])
    return rounded(scores.numel() * scores.element_size()) + rounded(scores.numel())


def _logsumexp(args: Args, kwargs: Named) -> int:
    """One copy of the input: its inner operations run below the dispatch mode."""
    values = _tensor(args[0])
    return rounded(values.numel() * values.element_size())


def _gemm_4bit(args: Args, kwargs: Named) -> int:
    """The dequantized weight, and with nested statistics the float32 absmax twice.

    The fused kernel for few tokens is never assumed.
    Source: bitsandbytes ``backends/cuda/ops.py``, ``_dequant_linear_fallback``.
    """
    x, shape = _tensor(args[0]), args[2]
    assert isinstance(shape, (tuple, list))
    n = math.prod(shape)
    total = rounded(n * x.element_size())
    nested = args[7] if len(args) > 7 else kwargs.get("absmax_8bit")
    if nested is not None:
        total += 2 * rounded(4 * math.ceil(n / NF4_BLOCK))
    return total


def _flash_backward(args: Args, kwargs: Named) -> int:
    """Float32 accumulators of flash attention's backward.

    ``dq_accum`` 4*B*S128*H*D32, ``softmax_d`` 4*B*H*S128 (S128, D32 rounded up to 128 and 32), and
    where key heads are fewer than query heads two expanded gradients of 2*B*S*H*D.
    Source: torch ``flash_attn/flash_api.cpp``, ``mha_bwd``.
    """
    query, key = _tensor(args[1]), _tensor(args[2])
    if query.dim() == 3:  # rows of unequal length in one, (tokens, heads, width)
        query, key = (t.transpose(0, 1).unsqueeze(0) for t in (query, key))
    batch, heads, length, width = query.shape
    s, d = -(-length // 128) * 128, -(-width // 32) * 32
    total = rounded(4 * batch * s * heads * d) + rounded(4 * batch * heads * s)
    if key.shape[1] != heads:
        total += 2 * rounded(query.element_size() * batch * key.shape[2] * heads * width)
    return total


def _efficient_backward(args: Args, kwargs: Named) -> int:
    """Float32 accumulators of about the size of query, key and value, and the row sums ``delta``.

    Source: torch ``attention_backward.cu``, ``_efficient_attention_backward`` (workspace).
    """
    query, key, value = (_tensor(args[i]) for i in (1, 2, 3))
    rows = query.shape[0] * query.shape[1] * query.shape[2]
    return sum(rounded(4 * t.numel()) for t in (query, key, value)) + rounded(4 * rows)


_RULES: dict[str, Callable[[Args, Named], int]] = {
    "aten::_softmax_backward_data": _softmax_backward,
    "aten::_safe_softmax": _safe_softmax,
    "aten::logsumexp": _logsumexp,
    "bitsandbytes::gemm_4bit": _gemm_4bit,
    "aten::_scaled_dot_product_flash_attention_backward": _flash_backward,
    "aten::_flash_attention_backward": _flash_backward,
    "aten::_scaled_dot_product_efficient_attention_backward": _efficient_backward,
}
