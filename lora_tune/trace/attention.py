"""Which attention kernel CUDA would run, called by name so that the device does not choose.

``scaled_dot_product_attention`` on a CUDA device takes the first kernel that can:

* flash attention: no mask, 16 bit, heads up to 256 (up to 192 for training on compute capability
  8.6, 8.9 and 12 unless above 224 without dropout), compute capability 8 or later;
* the memory-efficient kernel: takes a mask as a bias, float32 too, bfloat16 from capability 8 on,
  but not key heads that are fewer than query heads (torch 2.13);
* else the written-out attention, with its matrices of S x S in float32.

transformers repeats key and value heads itself where there is a mask, so the last one is what
float32 without padding and cards before Ampere run on models with grouped heads.

Source: torch ``native/transformers/cuda/sdp_utils.cpp`` (``can_use_flash_attention``,
``can_use_mem_efficient_attention``), ``native/transformers/attention.cpp``
(``scaled_dot_product_attention``); transformers ``integrations/sdpa_attention.py``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask
from transformers.modeling_utils import AttentionInterface

FLASH_HEAD_LIMIT = 256
FLASH_HEAD_MULTIPLE = 8
BIAS_MULTIPLE = 8  # elements of 16 bit: the memory-efficient kernel wants 16 bytes

FLASH_ATTENTION_2 = "lora_tune_attention"
"""Name under which ``flash_attention_2`` is registered with transformers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionKernels:
    """The kernels of one kind of device; no capability stands for a CPU."""

    compute_capability: str | None

    def attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        *,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """Return attention as the kernel that the device would choose computes it."""
        if attn_mask is None and self._has_flash(query, dropout_p):
            return _flash(query, key, value, dropout_p, is_causal, scale)
        grouped = key.shape[1] != query.shape[1]
        if self.compute_capability is None and attn_mask is None:
            return _flash_on_cpu(query, key, value, dropout_p, is_causal, scale)
        if grouped or not self._has_efficient(query):
            written_out: Tensor = torch.ops.aten._scaled_dot_product_attention_math(
                query,
                key,
                value,
                attn_mask,
                dropout_p,
                is_causal,
                scale=scale,
                enable_gqa=enable_gqa,
            )[0]
            return written_out
        bias = None if attn_mask is None else _bias(attn_mask, query)
        out: Tensor = torch.ops.aten._scaled_dot_product_efficient_attention(
            query,
            key,
            value,
            bias,
            _needs_gradient(query, key, value),
            dropout_p,
            is_causal,
            scale=scale,
        )[0]
        return out

    def fuses_softmax(
        self, args: Sequence[object], kwargs: Mapping[str, object], *, autocast: bool
    ) -> bool:
        """Say whether softmax reads float16 and writes float32 in one kernel, as CUDA's does.

        The modeling code asks for float32, or autocast does.

        Source: torch ``native/SoftMax.cpp``, ``softmax`` (``half_to_float``).
        """
        scores = args[0]
        return (
            self.compute_capability is not None
            and isinstance(scores, Tensor)
            and scores.dtype == torch.float16
            and (kwargs.get("dtype") == torch.float32 or (autocast and "dtype" not in kwargs))
        )

    @property
    def _version(self) -> tuple[int, int]:
        major, _, minor = (self.compute_capability or "8.0").partition(".")
        return int(major), int(minor or 0)

    def _has_flash(self, query: Tensor, dropout_p: float) -> bool:
        width, (major, minor) = query.shape[-1], self._version
        if query.dtype == torch.float32 or width > FLASH_HEAD_LIMIT or major < 8:
            return False
        small_memory = (major == 8 and minor in (6, 7, 8, 9)) or major == 12
        trains_wide = width <= 192 or (width > 224 and dropout_p == 0.0)
        return trains_wide or not small_memory

    def _has_efficient(self, query: Tensor) -> bool:
        return self._version[0] >= 8 or query.dtype != torch.bfloat16


def _flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
) -> Tensor:
    width = query.shape[-1]
    padding = -width % FLASH_HEAD_MULTIPLE
    if padding:
        scale = width**-0.5 if scale is None else scale
        query, key, value = (functional.pad(t, (0, padding)) for t in (query, key, value))
    out: Tensor = torch.ops.aten._scaled_dot_product_flash_attention(
        query, key, value, dropout_p, is_causal, scale=scale
    )[0]
    return out[..., :width] if padding else out


def _flash_on_cpu(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
) -> Tensor:
    out: Tensor = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, dropout_p, is_causal, scale=scale
    )[0]
    return out


def _bias(mask: Tensor, query: Tensor) -> Tensor:
    """Return the mask as what is added to the scores, its rows padded to the kernel's alignment.

    Source: ``convert_boolean_attn_mask`` and ``pad_bias`` in ``attention.cpp``.
    """
    bias = mask
    if mask.dtype == torch.bool:
        lowest = torch.full((), float("-inf"), dtype=query.dtype, device=mask.device)
        bias = torch.where(mask, 0.0, lowest)
    length = bias.shape[-1]
    if padding := -length % BIAS_MULTIPLE:
        bias = functional.pad(bias, (0, padding))[..., :length]
    return bias.expand(query.shape[0], query.shape[1], query.shape[2], length)


def _needs_gradient(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def flash_attention_2(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """Return attention as transformers' ``flash_attention_2`` allocates it.

    Queries in float32 are cast to the model's type. A padded batch is unpadded first: copies of
    query, key and value, and of the output. How many tokens are real is not known here: all of them.
    Source: transformers ``modeling_flash_attention_utils.py``, ``_flash_attention_forward``.
    """
    batch, _, length, _ = query.shape
    parts = [part.transpose(1, 2) for part in (query, key, value)]
    if query.dtype == torch.float32:
        dtype: torch.dtype = module.config.dtype  # type: ignore[assignment]
        parts = [part.to(dtype) for part in parts]
    if attention_mask is None:
        query, key, value = (part.transpose(1, 2) for part in parts)
        return _flash(query, key, value, dropout, True, scaling).transpose(1, 2), None
    indices = torch.empty(batch * length, dtype=torch.int64, device=query.device)
    ends = torch.empty(batch + 1, dtype=torch.int32, device=query.device)
    query, key, value = (part.reshape(-1, *part.shape[2:])[indices] for part in parts)
    out = torch.ops.aten._flash_attention_forward(
        query, key, value, ends, ends, length, length, dropout, True, False, scale=scaling
    )[0]
    padded = torch.zeros_like(out)
    padded[indices] = out
    return padded.view(batch, length, *out.shape[1:]), None


AttentionInterface.register(FLASH_ATTENTION_2, flash_attention_2)
AttentionMaskInterface.register(FLASH_ATTENTION_2, flash_attention_mask)
