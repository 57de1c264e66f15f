"""Cross entropy on the positions that carry a label, in chunks.

Shape key: N label positions of the whole pack, H hidden size, V vocabulary, C positions per chunk.

The head never sees a position without a label, and no [N, V] matrix ever exists: each chunk's
logits become their own gradient in place, and only the gradient of the hidden states, [N, H],
is kept for backward.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

CHUNK_TOKENS = 512


class TokenLosses(NamedTuple):
    """``total`` is differentiable: sum of weight * loss. ``losses_N`` is detached, float32, nats."""

    total: Tensor
    losses_N: Tensor


def label_losses(
    hidden_NH: Tensor,
    head: nn.Module,
    targets_N: Tensor,
    weights_N: Tensor | None,
    *,
    chunk_tokens: int = CHUNK_TOKENS,
) -> TokenLosses:
    """Return the weighted sum and each token's negative log-likelihood.

    Args:
        hidden_NH: Hidden states that predict the targets.
        head: The frozen output layer: ``weight`` of shape (V, H) and maybe ``bias``.
        targets_N: Token ids.
        weights_N: What each token counts in ``total``; None when only the losses are wanted.
        chunk_tokens: Positions per chunk; bounds the memory at about ``6 * V * chunk_tokens`` bytes.
    """
    if weights_N is None:
        with torch.no_grad():
            losses_N, _ = _forward(hidden_NH, head, targets_N, None, chunk_tokens)
        return TokenLosses(losses_N.sum(), losses_N)
    total, losses_N = _LabelLoss.apply(  # type: ignore[no-untyped-call]
        hidden_NH, head, targets_N, weights_N, chunk_tokens
    )
    return TokenLosses(total, losses_N)


class _LabelLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        hidden_NH: Tensor,
        head: nn.Module,
        targets_N: Tensor,
        weights_N: Tensor,
        chunk_tokens: int,
    ) -> tuple[Tensor, Tensor]:
        losses_N, grad_NH = _forward(hidden_NH, head, targets_N, weights_N, chunk_tokens)
        assert grad_NH is not None
        ctx.save_for_backward(grad_NH)
        ctx.mark_non_differentiable(losses_N)
        return (losses_N * weights_N).sum(), losses_N

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, *grads: Tensor
    ) -> tuple[Tensor | None, ...]:
        (grad_NH,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return grad_NH * grads[0], None, None, None, None


def _forward(
    hidden_NH: Tensor,
    head: nn.Module,
    targets_N: Tensor,
    weights_N: Tensor | None,
    chunk_tokens: int,
) -> tuple[Tensor, Tensor | None]:
    weight_VH, bias_V = head.weight, getattr(head, "bias", None)
    assert isinstance(weight_VH, Tensor)
    losses_N = torch.empty(len(targets_N), dtype=torch.float32, device=hidden_NH.device)
    grad_NH = None if weights_N is None else torch.empty_like(hidden_NH)
    for start in range(0, len(targets_N), chunk_tokens):
        part = slice(start, start + chunk_tokens)
        logits_CV = nn.functional.linear(hidden_NH[part], weight_VH, bias_V).float()
        logits_CV.sub_(logits_CV.amax(-1, keepdim=True))
        targets_C1 = targets_N[part, None]
        picked_C = logits_CV.gather(-1, targets_C1)[:, 0]
        logits_CV.exp_()
        sums_C = logits_CV.sum(-1)
        losses_N[part] = sums_C.log() - picked_C
        if weights_N is not None and grad_NH is not None:
            logits_CV.div_(sums_C[:, None])
            logits_CV.scatter_add_(-1, targets_C1, torch.full_like(sums_C, -1.0)[:, None])
            logits_CV.mul_(weights_N[part, None])
            grad_NH[part] = logits_CV.to(weight_VH.dtype) @ weight_VH
        del logits_CV  # else the name holds a chunk's logits while the next is made
    return losses_N, grad_NH
