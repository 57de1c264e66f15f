"""Attention over rows that lie flat, one after the other, in one sequence without padding.

Everything of a decoder but attention works on each token alone, so it may as well run on the tokens of all
rows in one line: (1, N, H). Attention cuts the line into rows again, pads their queries, keys and values to
the longest row, and takes the padding out of the result: no other layer ever computes on padding.
Equal rows are views, without a copy.

Rows are padded on the right and attention is causal, so no real token ever attends to padding and the
gradient of padding is zero.
"""

import inspect

import torch
import transformers
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from lora_tune.engine.lora import PackLayout, RowCut

NAME = "lora_tune_rows"
_LAYOUT = "lora_tune_layout"
SHORT = 256  # tokens of the longest row


def attend_by_rows(model: nn.Module, layout: PackLayout) -> bool:
    """Let a model's attention cut flat sequences into the layout's rows.

    Returns:
        Whether it does. The model's attention must be exchangeable and be no more than torch's own (no
        soft cap, no sinks), its decoder take position ids, and nothing else may look across tokens, as
        convolutions and recurrences do. ``load_base_model`` checks the result on real rows.
    """
    decoder = model.get_decoder()  # type: ignore[operator]
    kinds = set(getattr(decoder.config, "layer_types", None) or ())
    if not (
        "position_ids" in inspect.signature(decoder.forward).parameters
        and getattr(model, "_supports_attention_backend", False)
        and getattr(model, "_supports_sdpa", False)
        and not getattr(model, "_is_stateful", False)
        and kinds <= {"full_attention", "sliding_attention"}
    ):
        return False
    transformers.AttentionInterface.register(NAME, _attend)
    model.set_attn_implementation(NAME)  # type: ignore[operator]
    for module in model.modules():  # no common class or attribute tells the attention among them
        setattr(module, _LAYOUT, layout)
    return True


def attend_as_loaded(model: nn.Module) -> None:
    """Give a model torch's attention back: its rows are padded from now on."""
    model.set_attn_implementation("sdpa")  # type: ignore[operator]


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    sliding_window: int | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """Attend within each row; query (1, heads, N, D), result (1, N, heads, D).

    A batch that is not flat, (B, heads, T, D), attends causally within its rows as they are.
    """
    rows: RowCut | None = getattr(module, _LAYOUT).rows
    parts = [query, key, value]
    if rows is not None:
        parts = [_to_rows(part, rows) for part in parts]
    query = parts[0]
    mask = _sliding_mask(query.shape[2], sliding_window, query.device)
    if query.device.type == "cpu" and query.dtype != torch.float32 and _is_short(query):
        out = _attend_short(query, parts[1], parts[2], mask, kwargs.get("scaling"))
    else:
        out, _ = sdpa_attention_forward(module, *parts, mask, **kwargs)
    if rows is None:
        return out, None
    if rows.slots_N is None:
        return out.reshape(1, -1, *out.shape[2:]), None
    return _Gather.apply(out.flatten(0, 1), rows.slots_N)[None], None  # type: ignore[no-untyped-call]


def _is_short(query: Tensor) -> bool:
    return query.shape[2] <= SHORT


def _attend_short(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: object
) -> Tensor:
    """Attend by two matrix products and a float32 softmax; result (B, T, heads, D).

    torch's fused kernel takes four times as long on a CPU in 16 bit when rows are short: its backward
    works in blocks that short rows do not fill.
    """
    count, heads, length, size = query.shape
    shared = key.shape[1]  # heads of keys and values, each used by neighbouring heads of queries
    scale = scaling if isinstance(scaling, float) else size**-0.5
    scores = query.reshape(count, shared, -1, size) @ key.mT * scale
    scores = scores.view(count, heads, length, length)
    if mask is None:
        mask = torch.ones(length, length, dtype=torch.bool, device=query.device).tril_()
    weights = scores.masked_fill(~mask, float("-inf")).softmax(-1, dtype=torch.float32)
    out = weights.to(query.dtype).view(count, shared, -1, length) @ value
    return out.view(count, heads, length, size).transpose(1, 2)


def _to_rows(part: Tensor, rows: RowCut) -> Tensor:
    """Return (1, heads, N, D) as (rows, heads, T, D)."""
    flat = part.transpose(1, 2).flatten(0, 1)  # a view
    if rows.slots_N is not None:
        flat = _Scatter.apply(flat, rows.slots_N, rows.num_rows * rows.length)  # type: ignore[no-untyped-call]
    return flat.reshape(rows.num_rows, rows.length, *flat.shape[1:]).transpose(1, 2)


def _sliding_mask(length: int, window: int | None, device: torch.device) -> Tensor | None:
    """Return which keys a query sees; None when that is all before it."""
    if window is None or length <= window:
        return None
    keys = torch.arange(length, device=device)
    queries = keys[:, None]
    return ((keys <= queries) & (keys > queries - window))[None, None]


class _Scatter(torch.autograd.Function):
    """Rows of x, (N, ...), at their slots among ``count``, zeros elsewhere; each slot is used once."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, x: Tensor, slots_N: Tensor, count: int
    ) -> Tensor:
        ctx.save_for_backward(slots_N)
        return x.new_zeros(count, *x.shape[1:]).index_copy_(0, slots_N, x)

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, *grads: Tensor
    ) -> tuple[Tensor | None, ...]:
        (slots_N,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return grads[0].index_select(0, slots_N), None, None


class _Gather(torch.autograd.Function):
    """The slots of x, (count, ...); each slot is used at most once."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, slots_N: Tensor) -> Tensor:
        ctx.save_for_backward(slots_N)
        ctx.count = len(x)  # type: ignore[attr-defined]
        return x.index_select(0, slots_N)

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, *grads: Tensor
    ) -> tuple[Tensor | None, ...]:
        (slots_N,) = ctx.saved_tensors  # type: ignore[attr-defined]
        zeros = grads[0].new_zeros(ctx.count, *grads[0].shape[1:])  # type: ignore[attr-defined]
        return zeros.index_copy_(0, slots_N, grads[0]), None
