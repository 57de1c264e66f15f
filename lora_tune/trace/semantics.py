"""What a step does on CUDA, done on the meta device.

``CudaSemantics`` is a function mode: it sees every torch call of the forward pass before autograd
does, and

* casts as autocast would (``autocast.py``);
* lets dropout keep its output and a mask of one byte, as the fused CUDA kernel does; the composite
  of other devices keeps a noise tensor in full width (``native/Dropout.cpp``);
* runs the attention kernel that CUDA would choose (``attention.py``);
* answers what reads data, which a meta tensor does not have: whether the batch has no
  padding, and the losses for the log.

A function mode is not active inside ``backward()``, as CUDA's autocast is not. The forward pass
of a checkpointed layer that is run again there enters the mode again with autocast as it was
(``checkpoint_contexts``), which is what ``torch.utils.checkpoint`` does on CUDA.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from lora_tune.trace.attention import AttentionKernels
from lora_tune.trace.autocast import EmulatedAutocast

Function = Callable[..., object]


class CudaSemantics(TorchFunctionMode):
    """Runs torch calls as CUDA would.

    Args:
        padded: What the model is told when it asks whether the batch has padding.
        compute_capability: Of the device; decides which attention kernels there are.
        device_type: ``meta``, or ``cpu`` to run the same step on real tensors.
    """

    def __init__(
        self, *, padded: bool, compute_capability: str | None, device_type: str = "meta"
    ) -> None:
        super().__init__()
        self._kernels = AttentionKernels(compute_capability=compute_capability)
        self.autocast = EmulatedAutocast()
        self._padded = padded
        self._reads_data = device_type != "meta"

    def __torch_function__(
        self,
        func: Function,
        types: Sequence[type],
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        """Run one torch call."""
        kwargs = kwargs or {}
        if func in _REPLACED:
            return _REPLACED[func](*args, **kwargs)
        if func is functional.scaled_dot_product_attention:
            return self.autocast.call(self._kernels.attention, args, kwargs, like=func)
        autocast = self.autocast.dtype is not None
        if func is functional.softmax and self._kernels.fuses_softmax(
            args, kwargs, autocast=autocast
        ):
            return torch.ops.aten._softmax(args[0], kwargs.get("dim", -1), True)
        if not self._reads_data:
            if func in _REPLACED_ON_META:
                return _REPLACED_ON_META[func](*args, **kwargs)
            if func in _READING and _is_meta(args):
                return _READING[func](self, args)
        return self.autocast.call(func, args, kwargs)

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Enter the mode; PEFT, which asks without an argument, is told of the autocast."""
        original = torch.is_autocast_enabled

        def is_autocast_enabled(device_type: str | None = None) -> bool:
            if device_type is None or device_type == "meta":
                return self.autocast.dtype is not None
            return original(device_type)

        torch.is_autocast_enabled = is_autocast_enabled
        try:
            with self:
                yield
        finally:
            torch.is_autocast_enabled = original

    def checkpoint_contexts(
        self,
    ) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """Return the contexts of a checkpointed layer's first forward pass and of its second."""
        return nullcontext(), self._recompute(self.autocast.dtype)

    @contextmanager
    def _recompute(self, dtype: torch.dtype | None) -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(self)
            if dtype is not None:
                stack.enter_context(self.autocast.context(dtype))
            yield


def _tensor_from_host(data: object, **kwargs: object) -> Tensor:
    """Make the tensor on the host and copy it, which the dispatch mode sees."""
    device = kwargs.pop("device", None)
    tensor: Tensor = torch.tensor(data, **kwargs)  # type: ignore[arg-type]
    return tensor if device is None else tensor.to(device)  # type: ignore[call-overload]


def _dropout(
    input: Tensor,  # noqa: A002 - torch's own name, callers pass it by keyword
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
) -> Tensor:
    if not training or p == 0.0:
        return input
    out: Tensor = torch.ops.aten.native_dropout(input, p, True)[0]
    return out


class _GroupedProduct(torch.autograd.Function):
    """A product of rows with the weights of their expert; the meta kernel knows bfloat16 only."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, rows: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(weights)
        ctx.width = rows.shape[-1]  # type: ignore[attr-defined]
        return rows.new_empty((len(rows), weights.shape[-1]))

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, *grads: Tensor
    ) -> tuple[Tensor | None, ...]:
        return grads[0].new_empty((len(grads[0]), ctx.width)), None  # type: ignore[attr-defined]


def _grouped_mm(mat_a: Tensor, mat_b: Tensor, **kwargs: object) -> object:
    """Source: torch ``derivatives.yaml``, ``_grouped_mm``; experts are frozen."""
    return _GroupedProduct.apply(mat_a, mat_b)  # type: ignore[no-untyped-call]


_REPLACED: dict[object, Function] = {functional.dropout: _dropout}
_REPLACED_ON_META: dict[object, Function] = {
    torch.tensor: _tensor_from_host,
    functional.grouped_mm: _grouped_mm,
    torch._grouped_mm: _grouped_mm,
}


def _is_meta(args: Sequence[object]) -> bool:
    return bool(args) and isinstance(args[0], Tensor) and args[0].device.type == "meta"


def _no_padding(mode: CudaSemantics, args: Sequence[object]) -> bool:
    return not mode._padded


def _zero(mode: CudaSemantics, args: Sequence[object]) -> float:
    return 0.0


def _zeros(mode: CudaSemantics, args: Sequence[object]) -> list[float]:
    tensor = args[0]
    assert isinstance(tensor, Tensor)
    return [0.0] * len(tensor)


_READING: dict[object, Callable[[CudaSemantics, Sequence[object]], object]] = {
    torch.Tensor.__bool__: _no_padding,
    torch.Tensor.__float__: _zero,
    torch.Tensor.item: _zero,
    torch.Tensor.tolist: _zeros,
}
