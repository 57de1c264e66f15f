"""RMSNorm and gated MLPs of a frozen base: the same values, and less kept for backward.

Shape key: N tokens (any leading shape), H width of a norm, F width of an MLP.

Autograd keeps what a weight's gradient would need, though nothing frozen gets one. Bytes per token in a
16-bit type:

* RMSNorm: the input in float32 (4H) where the input itself (2H) is enough;
* ``act(gate) * up``: both factors and the activation's input (6F), where gate and up (4F) are enough: the
  activation is taken again in backward.

A module is exchanged if it has the parts that the formula needs and its class's own ``forward`` gives the
same bits as ours. That is run on a stand-in which has nothing else: whatever uses more is left as it is.
"""

import inspect
from collections.abc import Callable, Mapping
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

_EPS = 1e-3  # of the stand-in: large enough to be seen in its values
_WIDTH = 64
_MLP_PARTS = {"gate_proj", "up_proj", "down_proj", "act_fn"}


def fuse_frozen_parts(model: nn.Module) -> None:
    """Exchange norms and gated MLPs of a frozen model, in place, where the formula is known.

    What is exchanged on a device is exchanged on the meta device too: classes are compared, not weights.
    """
    for name, module in list(model.named_modules()):
        if _is_altered(module):
            continue
        kind: Any = type(module)
        if _has_norm_parts(module) and _is_rms_norm(kind):
            model.set_submodule(name, FrozenRMSNorm(module))
        elif dict(module.named_children()).keys() >= _MLP_PARTS and _is_gated(kind):
            act = _activation(module.get_submodule("act_fn"))
            if act is not None:
                model.set_submodule(name, FrozenGatedMLP(module, act))


def _is_altered(module: nn.Module) -> bool:
    """Return whether somebody gave this very module another forward, or hooks, which would be lost."""
    own = vars(module)
    return "forward" in own or any(own[kind] for kind in own if kind.endswith("_hooks"))


def _has_norm_parts(module: nn.Module) -> bool:
    parameters = dict(module.named_parameters(recurse=False))
    return parameters.keys() == {"weight"} and "variance_epsilon" in vars(module)


class FrozenRMSNorm(nn.Module):
    """Llama's RMSNorm, ``weight * (x / rms(x)).to(x.dtype)``, whose weight gets no gradient."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.weight = norm.get_parameter("weight")
        self.variance_epsilon: float = vars(norm)["variance_epsilon"]

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Return the normed states, of the input's shape and type."""
        normed: Tensor = _RMSNorm.apply(  # type: ignore[no-untyped-call]
            hidden_states, self.weight, self.variance_epsilon
        )
        return normed


class _RMSNorm(torch.autograd.Function):
    """Keeps x in its own type and the reciprocal root of each token in float32.

    With r = (mean(x^2) + eps)^(-1/2) and g the gradient of x r:
    dx = r g - (r^3 / H) (g . x) x.
    """

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, x: Tensor, weight_H: Tensor, eps: float
    ) -> Tensor:
        wide = x.float()
        root = wide.pow(2).mean(-1, keepdim=True).add_(eps).rsqrt_()
        # a copy may be written over; in float32 ``wide`` is x itself
        normed = wide * root if wide is x else wide.mul_(root)
        ctx.save_for_backward(x, weight_H, root)
        return weight_H * normed.to(x.dtype)

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, *grads: Tensor
    ) -> tuple[Tensor | None, ...]:
        x, weight_H, root = ctx.saved_tensors  # type: ignore[attr-defined]
        grad = (grads[0] * weight_H).float()
        wide = x.float()
        along = (grad * wide).sum(-1, keepdim=True).mul_(root.pow(3)).div_(-x.shape[-1])
        return grad.mul_(root).addcmul_(wide, along).to(x.dtype), None, None


class FrozenGatedMLP(nn.Module):
    """``down_proj(act_fn(gate_proj(x)) * up_proj(x))``; the three layers stay the model's own modules."""

    def __init__(self, mlp: nn.Module, act: str) -> None:
        super().__init__()
        self.gate_proj = mlp.get_submodule("gate_proj")
        self.up_proj = mlp.get_submodule("up_proj")
        self.down_proj = mlp.get_submodule("down_proj")
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        """Return the MLP's output, of x's shape and type."""
        product: Tensor = _GatedProduct.apply(  # type: ignore[no-untyped-call]
            self.gate_proj(x), self.up_proj(x), self.act
        )
        out: Tensor = self.down_proj(product)
        return out


class _GatedProduct(torch.autograd.Function):
    """``act(gate) * up``; keeps both, takes the activation again in backward."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, gate: Tensor, up: Tensor, act: str
    ) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.act = act  # type: ignore[attr-defined]
        return _FORWARD[act](gate).mul_(up)

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, *grads: Tensor
    ) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors  # type: ignore[attr-defined]
        act: str = ctx.act  # type: ignore[attr-defined]
        # in this order at most five tensors of (N, F) are there at once, in the other six
        grad_gate = _BACKWARD[act](grads[0] * up, gate)
        grad_up = _FORWARD[act](gate).mul_(grads[0])
        return grad_gate, grad_up, None


def _gelu_tanh(x: Tensor) -> Tensor:
    return functional.gelu(x, approximate="tanh")


def _gelu_tanh_backward(grad: Tensor, x: Tensor) -> Tensor:
    made: Tensor = torch.ops.aten.gelu_backward(grad, x, approximate="tanh")
    return made


_FORWARD: Mapping[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu_tanh": _gelu_tanh,
}
_BACKWARD: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "silu": torch.ops.aten.silu_backward,
    "gelu_tanh": _gelu_tanh_backward,
}


@cache
def _is_rms_norm(kind: type[nn.Module]) -> bool:
    """Return whether a class's forward is Llama's RMSNorm, to the bit."""
    weight = _example(torch.float32)[0, 0] + 1.0

    def ours(x: Tensor) -> Tensor:
        normed: Tensor = _RMSNorm.apply(x, weight.to(x.dtype), _EPS)  # type: ignore[no-untyped-call]
        return normed

    def stand_in(x: Tensor) -> SimpleNamespace:
        return SimpleNamespace(weight=weight.to(x.dtype), variance_epsilon=_EPS)

    return _same_bits(kind, stand_in, ours)


@cache
def _is_gated(kind: type[nn.Module]) -> bool:
    """Return whether a class's forward is ``down_proj(act_fn(gate_proj(x)) * up_proj(x))``, to the bit."""

    def ours(x: Tensor) -> Tensor:
        product: Tensor = _GatedProduct.apply(x + 1.0, x * 2.0, "silu")  # type: ignore[no-untyped-call]
        return product - 3.0

    def stand_in(x: Tensor) -> SimpleNamespace:
        return SimpleNamespace(
            gate_proj=lambda x: x + 1.0,
            up_proj=lambda x: x * 2.0,
            down_proj=lambda x: x - 3.0,
            act_fn=functional.silu,
        )

    return _same_bits(kind, stand_in, ours)


def _activation(act_fn: nn.Module) -> str | None:
    """Return the name of an activation that ``_BACKWARD`` has; None if it is another."""
    if list(act_fn.parameters()):
        return None
    x = _example(torch.float32)
    found = act_fn(x)
    return next((name for name, ours in _FORWARD.items() if torch.equal(found, ours(x))), None)


def _same_bits(
    kind: type[nn.Module],
    stand_in: Callable[[Tensor], SimpleNamespace],
    ours: Callable[[Tensor], Tensor],
) -> bool:
    if len(inspect.signature(kind.forward).parameters) != 2:  # itself and x
        return False
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = _example(dtype)
        try:
            theirs = kind.forward(stand_in(x), x)
        except Exception:  # uses what the stand-in lacks, or takes other arguments: another formula
            return False
        if not (isinstance(theirs, Tensor) and theirs.dtype == dtype):
            return False
        if not torch.equal(theirs, ours(x)):
            return False
    return True


def _example(dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 4, _WIDTH, generator=generator, device="cpu").to(dtype)
