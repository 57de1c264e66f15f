"""CUDA's autocast, emulated where torch has none: on the meta device, and alike on the CPU.

``EmulatedAutocast`` holds the state that ``torch.autocast`` holds for CUDA: the 16-bit type while it
is on, and the cast copies of trainable float32 weights, kept until the outermost context ends
(``aten/src/ATen/autocast_mode.cpp``, ``cached_cast``). ``call`` applies the lists of
``aten/src/ATen/autocast_mode.h`` to one call of a torch function:

* products run in 16 bit (``AT_FORALL_LOWER_PRECISION_FP``);
* powers, exponentials, logarithms, norms, losses run in float32 (``AT_FORALL_FP32``);
* softmax and sums take 16 bit and give float32 (``AT_FORALL_FP32_SET_OPT_DTYPE``).

Functions that no decoder here calls are left out. The promotion list is left out too: its
functions promote by themselves, only without an extra copy.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import functional

_PRODUCTS: frozenset[object] = frozenset(
    {
        functional.linear,
        functional.scaled_dot_product_attention,
        functional.conv1d,
        torch.matmul,
        torch.mm,
        torch.bmm,
        torch.addmm,
        torch.baddbmm,
        torch.einsum,
        torch.Tensor.matmul,
        torch.Tensor.__matmul__,
        torch.Tensor.__rmatmul__,
        torch.Tensor.mm,
        torch.Tensor.bmm,
        torch.Tensor.addmm,
        torch.Tensor.baddbmm,
    }
)
_FLOAT32: frozenset[object] = frozenset(
    {
        functional.layer_norm,
        functional.group_norm,
        functional.softplus,
        functional.nll_loss,
        torch.layer_norm,
        torch.pow,
        torch.exp,
        torch.log,
        torch.rsqrt,
        torch.reciprocal,
        torch.logsumexp,
        torch.Tensor.pow,
        torch.Tensor.__pow__,
        torch.Tensor.exp,
        torch.Tensor.log,
        torch.Tensor.rsqrt,
        torch.Tensor.reciprocal,
        torch.Tensor.logsumexp,
    }
)
_FLOAT32_RESULT: frozenset[object] = frozenset(
    {
        functional.softmax,
        functional.log_softmax,
        torch.softmax,
        torch.log_softmax,
        torch.sum,
        torch.cumsum,
        torch.Tensor.softmax,
        torch.Tensor.log_softmax,
        torch.Tensor.sum,
        torch.Tensor.cumsum,
    }
)

Function = Callable[..., object]


class EmulatedAutocast:
    """Autocast's state, and what it does to a call."""

    def __init__(self) -> None:
        self.dtype: torch.dtype | None = None
        self._cache: dict[int, tuple[Tensor, Tensor]] = {}
        self._depth = 0

    @contextmanager
    def context(self, dtype: torch.dtype | None) -> Iterator[None]:
        """Switch to ``dtype`` (None: off) inside; leaving the outermost context drops the copies."""
        before, self.dtype = self.dtype, dtype
        self._depth += 1
        try:
            yield
        finally:
            self.dtype = before
            self._depth -= 1
            if not self._depth:
                self._cache.clear()

    def call(
        self,
        function: Function,
        args: Sequence[object],
        kwargs: Mapping[str, object],
        *,
        like: Function | None = None,
    ) -> object:
        """Call the function as autocast would; ``like`` names the torch function it stands for."""
        listed = function if like is None else like
        if self.dtype is not None:
            if listed in _PRODUCTS:
                return function(
                    *self._cast(args, self.dtype), **self._cast_named(kwargs, self.dtype)
                )
            if listed in _FLOAT32:
                wide = torch.float32
                return function(*self._cast(args, wide), **self._cast_named(kwargs, wide))
            if listed in _FLOAT32_RESULT and kwargs.get("dtype") is None and _is_half(args):
                return function(*args, **{**kwargs, "dtype": torch.float32})
        return function(*args, **kwargs)

    def _cast(self, args: Sequence[object], dtype: torch.dtype) -> list[object]:
        return [self._cast_one(value, dtype) for value in args]

    def _cast_named(self, args: Mapping[str, object], dtype: torch.dtype) -> dict[str, object]:
        return {name: self._cast_one(value, dtype) for name, value in args.items()}

    def _cast_one(self, value: object, dtype: torch.dtype) -> object:
        if not isinstance(value, Tensor):
            return value
        if not value.is_floating_point() or value.dtype in (dtype, torch.float64):
            return value
        trainable = value.requires_grad and value.is_leaf and not value._is_view()
        if dtype == torch.float32 or value.dtype != torch.float32 or not trainable:
            return value.to(dtype)
        if id(value) not in self._cache:
            self._cache[id(value)] = (value, value.to(dtype))
        return self._cache[id(value)][1]


def _is_half(args: Sequence[object]) -> bool:
    first = args[0] if args else None
    return isinstance(first, Tensor) and first.dtype in (torch.float16, torch.bfloat16)
