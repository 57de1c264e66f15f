"""TRL's fused head as the allocations that it makes on CUDA.

``SFTTrainer`` computes log-probabilities of the label positions in tiles of 4096 tokens by 32768
vocabulary entries; a Triton kernel folds each tile into running statistics in place. Triton does not
run on the meta device, and the torch fallback allocates otherwise, so this module repeats the
statements that allocate and leaves the kernels out.

Source: trl 1.16 ``kernels/chunked_logprob.py`` (``ChunkedLogProbFunction``) and
``trainer/utils.py`` (``add_fused_lm_head``).
"""

from types import MethodType

import torch
from torch import Tensor, nn

from lora_tune.trace.autocast import EmulatedAutocast
from lora_tune.trace.tracker import StorageTracker

TOKEN_CHUNK = 4096
VOCABULARY_CHUNK = 32768
IGNORED = -100


def add_fused_head(
    model: nn.Module, *, num_labels: int, autocast: EmulatedAutocast, tracker: StorageTracker
) -> None:
    """Let the model's forward pass return a loss over its label positions, as TRL's does.

    Args:
        model: The base model inside PEFT's wrapper.
        num_labels: Label positions of the batch; the meta device can not count them.
        autocast: Says in which type the tiles are.
        tracker: Told that what the head makes belongs to the loss.
    """

    def forward(
        self: nn.Module,
        input_ids: Tensor,
        labels: Tensor,
        num_items_in_batch: Tensor,
        **kwargs: object,
    ) -> dict[str, Tensor]:
        kwargs.pop("return_dict", None)
        outputs = self.base_model(input_ids=input_ids, **kwargs)  # type: ignore[operator]
        hidden = outputs.last_hidden_state[:, :-1]
        labels = labels[:, 1:]
        head = self.get_output_embeddings()  # type: ignore[operator]
        mask = labels != IGNORED
        with tracker.category("loss"):
            selected = _Select.apply(hidden, mask, num_labels)  # type: ignore[no-untyped-call]
            targets = _chosen(labels, num_labels)
            dtype = hidden.dtype if autocast.dtype is None else autocast.dtype
            log_probs, entropy, is_top1 = _ChunkedLogProbs.apply(  # type: ignore[no-untyped-call]
                selected, head.weight, head.bias, targets, dtype, tracker
            )
            spread = [_Spread.apply(x, mask) for x in (log_probs, entropy, is_top1)]  # type: ignore[no-untyped-call]
        loss = -spread[0].sum() / num_items_in_batch
        names = ("log_probs", "entropy", "is_top1")
        return {"loss": loss, **dict(zip(names, spread, strict=True)), "label_mask": mask}

    model.forward = MethodType(forward, model)


def _chosen(values: Tensor, num_labels: int) -> Tensor:
    """Return ``values[mask]`` with its temporary list of indices."""
    indices = torch.empty((num_labels, values.dim()), dtype=torch.int64, device=values.device)
    chosen = values.new_empty((num_labels, *values.shape[2:]))
    del indices
    return chosen


class _Select(torch.autograd.Function):
    """``hidden[mask]``: keeps the mask; backward puts the gradient into zeros of the full size."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, hidden: Tensor, mask: Tensor, num_labels: int
    ) -> Tensor:
        ctx.save_for_backward(mask)
        ctx.shape = hidden.shape  # type: ignore[attr-defined]
        return _chosen(hidden, num_labels)

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, *grads: Tensor
    ) -> tuple[Tensor | None, ...]:
        full = grads[0].new_zeros(ctx.shape)  # type: ignore[attr-defined]
        # index_put with accumulation sorts the positions: keys and their order, before and after
        work = torch.empty((6, len(grads[0])), dtype=torch.int64, device=full.device)
        del work
        return full, None, None


class _Spread(torch.autograd.Function):
    """``values.new_zeros(mask.shape).masked_scatter(mask, values)``, whose backward reads the mask."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, values: Tensor, mask: Tensor) -> Tensor:
        ctx.save_for_backward(mask)
        ctx.length = len(values)  # type: ignore[attr-defined]
        return values.new_zeros(mask.shape).clone()

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, *grads: Tensor
    ) -> tuple[Tensor | None, ...]:
        return grads[0].new_empty((ctx.length,)), None  # type: ignore[attr-defined]


class _ChunkedLogProbs(torch.autograd.Function):
    """The statements of TRL's function that allocate, for a frozen head."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        dtype: torch.dtype,
        tracker: StorageTracker,
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        n = len(hidden)

        def statistic() -> Tensor:
            return torch.zeros((n,), device=hidden.device, dtype=torch.float32)

        running_max, sum_exp, x_sum_exp, target_logit = (statistic() for _ in range(4))
        others = [statistic() for _ in range(3)]  # of outputs that are not asked for, and is_top1
        tile = _tile(hidden, dtype)
        for start in range(0, n, TOKEN_CHUNK):
            chunk = hidden[start : start + TOKEN_CHUNK].to(dtype)
            for first in range(0, len(weight), VOCABULARY_CHUNK):
                part = weight[first : first + VOCABULARY_CHUNK].to(dtype)
                torch.mm(chunk, part.t(), out=tile[: len(chunk), : len(part)])
                if bias is not None:
                    tile[: len(chunk), : len(part)].add_(
                        bias[first : first + VOCABULARY_CHUNK].to(dtype)
                    )
        log_z = running_max + torch.log(sum_exp)
        logprobs = target_logit - log_z
        entropy = log_z - x_sum_exp / sum_exp
        is_top1 = (target_logit >= running_max) & (target_logit > others[0])
        ctx.save_for_backward(hidden, weight, bias, targets, log_z, entropy)  # type: ignore[arg-type]
        ctx.dtype = dtype  # type: ignore[attr-defined]
        ctx.tracker = tracker  # type: ignore[attr-defined]
        ctx.mark_non_differentiable(is_top1)
        return logprobs, entropy, is_top1

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, *grads: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        with ctx.tracker.category("loss"):  # type: ignore[attr-defined]
            hidden, weight, bias, _targets, _log_z, _entropy = ctx.saved_tensors  # type: ignore[attr-defined]
            dtype = ctx.dtype  # type: ignore[attr-defined]
            gradient = torch.zeros(hidden.shape, device=hidden.device, dtype=torch.float32)
            tile = _tile(hidden, dtype)
            grad_logprobs = None if grads[0] is None else grads[0].float().contiguous()
            for start in range(0, len(hidden), TOKEN_CHUNK):
                chunk = hidden[start : start + TOKEN_CHUNK].to(dtype)
                for first in range(0, len(weight), VOCABULARY_CHUNK):
                    part = weight[first : first + VOCABULARY_CHUNK].to(dtype)
                    piece = tile[: len(chunk), : len(part)]
                    torch.mm(chunk, part.t(), out=piece)
                    if bias is not None:
                        piece.add_(bias[first : first + VOCABULARY_CHUNK].to(dtype))
            del grad_logprobs
            return gradient.to(hidden.dtype), None, None, None, None, None


def _tile(hidden: Tensor, dtype: torch.dtype) -> Tensor:
    shape = (min(len(hidden), TOKEN_CHUNK), VOCABULARY_CHUNK)
    return torch.empty(shape, device=hidden.device, dtype=dtype)
