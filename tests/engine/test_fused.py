"""Norms and gated MLPs of a frozen base: the values and gradients of the model's own, less kept."""

import copy
from collections.abc import Callable

import pytest
import torch
import transformers
from small_models import small_model
from torch import Tensor, nn

from lora_tune.engine import fused
from lora_tune.engine.base import load_base_model
from lora_tune.engine.fused import FrozenGatedMLP, FrozenRMSNorm, fuse_frozen_parts


def kinds(model: nn.Module) -> dict[type[nn.Module], int]:
    found: dict[type[nn.Module], int] = {}
    for module in model.modules():
        found[type(module)] = found.get(type(module), 0) + 1
    return found


def run(module: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, int]:
    """Return output, gradient of x, and the bytes that autograd keeps beside x and the parameters."""
    own = {x.untyped_storage().data_ptr()} | {
        p.untyped_storage().data_ptr() for p in module.parameters()
    }
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    leaf = x.clone().requires_grad_()
    own.add(leaf.untyped_storage().data_ptr())
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = module(leaf)
    weights = torch.linspace(-1, 1, out.numel()).view_as(out).to(out.dtype)
    out.backward(weights)
    assert leaf.grad is not None
    return out.detach(), leaf.grad, sum(kept.values())


@pytest.mark.parametrize(
    ("model_type", "norms", "mlps"),
    [
        ("llama", 5, 2),
        ("mistral", 5, 2),
        ("qwen2", 5, 2),
        ("qwen3", 9, 2),  # and norms of query and key
        ("smollm3", 5, 2),
        ("granite", 5, 2),
        ("gemma", 0, 2),  # its norm multiplies by 1 + weight, in float32
        ("phi3", 5, 0),  # gate and up are one product
        ("stablelm", 0, 2),  # layer norms
        ("gpt_neox", 0, 0),
    ],
)
def test_known_formulas_are_exchanged_and_others_left(model_type, norms, mlps) -> None:
    model = small_model(model_type)
    fuse_frozen_parts(model)
    found = kinds(model)
    assert found.get(FrozenRMSNorm, 0) == norms
    assert found.get(FrozenGatedMLP, 0) == mlps


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gemma", "phi3"])
def test_the_meta_device_decides_alike(model_type) -> None:
    real = small_model(model_type)
    config = real.config
    with torch.device("meta"):
        traced = transformers.AutoModelForCausalLM.from_config(config)
    for model in (real, traced):
        for decided in (fused._is_rms_norm, fused._is_gated):
            decided.cache_clear()
        fuse_frozen_parts(model)
    assert kinds(real) == kinds(traced)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gemma"])
def test_a_whole_model_gives_the_same_bits_forward(model_type, dtype) -> None:
    model = small_model(model_type, dtype)
    ids = torch.arange(24).view(2, 12)
    theirs = model(input_ids=ids).logits
    fuse_frozen_parts(model)
    assert torch.equal(model(input_ids=ids).logits, theirs)


def parts(model_type: str, dtype: torch.dtype) -> dict[str, tuple[nn.Module, nn.Module, int]]:
    """Return the norm and the MLP of a layer: the model's own, ours, and the width of their input."""
    own = small_model(model_type, dtype)
    changed = copy.deepcopy(own)
    fuse_frozen_parts(changed)
    names = {"norm": "model.layers.0.input_layernorm", "mlp": "model.layers.0.mlp"}
    found = {
        part: (own.get_submodule(name), changed.get_submodule(name), 64)
        for part, name in names.items()
    }
    for theirs, ours, _ in found.values():
        assert type(theirs) is not type(ours)
    return found


@pytest.mark.parametrize("part", ["norm", "mlp"])
def test_gradients_are_those_of_autograd(part) -> None:
    theirs, ours, width = parts("llama", torch.float32)[part]
    x = torch.randn(3, 7, width) * 2 + 0.3
    out, grad, _ = run(theirs, x)
    our_out, our_grad, _ = run(ours, x)
    assert torch.equal(our_out, out)
    assert grad.abs().max() > 1e-2
    if part == "mlp":
        assert torch.equal(our_grad, grad)
    torch.testing.assert_close(our_grad, grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("part", ["norm", "mlp"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_gradients_are_as_near_to_exact_ones_as_autograds(part, dtype) -> None:
    theirs, ours, width = parts("llama", dtype)[part]
    torch.manual_seed(1)
    x = torch.randn(64, width).to(dtype)
    exact = run(copy.deepcopy(theirs).float(), x.float())[1]
    error, our_error = (
        float((run(module, x)[1].float() - exact).norm() / exact.norm())
        for module in (theirs, ours)
    )
    assert 0 < our_error < 1.05 * error


def test_a_gradient_is_that_of_finite_differences() -> None:
    source = OtherNorm()
    source.weight = nn.Parameter(torch.rand(8), requires_grad=False)
    source.variance_epsilon = 0.1
    norm = FrozenRMSNorm(source)
    x = torch.randn(2, 8)
    grad = run(norm, x)[1].double()
    weights = torch.linspace(-1, 1, 16).view(2, 8).double()

    def value(x: Tensor) -> float:
        wide = x.double()
        normed = wide / (wide.pow(2).mean(-1, keepdim=True) + 0.1).sqrt()
        return float((normed * norm.weight.double() * weights).sum())

    for i in range(2):
        for j in range(8):
            step = torch.zeros(2, 8, dtype=torch.float64)
            step[i, j] = 1e-4
            slope = (value(x + step) - value(x - step)) / 2e-4
            assert slope == pytest.approx(float(grad[i, j]), rel=1e-4, abs=1e-5)


def test_less_is_kept_for_backward() -> None:
    tokens, hidden, wide = 32, 64, 96
    found = parts("llama", torch.bfloat16)
    x = torch.randn(tokens, hidden).to(torch.bfloat16)
    theirs, ours, _ = found["norm"]
    assert run(theirs, x)[2] == 4 * tokens * hidden + 4 * tokens  # float32 x and the root
    assert run(ours, x)[2] == 4 * tokens  # x is there anyway
    theirs, ours, _ = found["mlp"]
    assert run(theirs, x)[2] - run(ours, x)[2] == 2 * tokens * wide  # the activation


@pytest.mark.parametrize("part", ["norm", "mlp"])
def test_checkpointing_takes_the_same_gradients(part) -> None:
    _, ours, width = parts("llama", torch.bfloat16)[part]
    x = torch.randn(16, width).to(torch.bfloat16)
    _, plain, _ = run(ours, x)

    class Again(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.utils.checkpoint.checkpoint(ours, x, use_reentrant=False)

    _, again, _ = run(Again(), x)
    assert torch.equal(plain, again)


class OtherNorm(nn.Module):
    """Llama's norm but for one thing, which the class decides."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(64))
        self.variance_epsilon = 1e-6
        self.scale = 2.0

    def normed(self, x: Tensor) -> Tensor:
        wide = x.float()
        return wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)


class InFloat32(OtherNorm):
    """Multiplied by the weight in float32, as Gemma's."""

    def forward(self, x: Tensor) -> Tensor:
        return (self.weight.float() * self.normed(x)).to(x.dtype)


class WithoutEps(OtherNorm):
    """No epsilon."""

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True))).to(x.dtype)


class Scaled(OtherNorm):
    """Uses an attribute more."""

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.weight * self.normed(x).to(x.dtype)


class Centered(OtherNorm):
    """A layer norm."""

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * self.normed(x - x.mean(-1, keepdim=True)).to(x.dtype)


class OptionalInput(OtherNorm):
    """Llama's as long as nobody gives the second input."""

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        return self.weight * self.normed(x if gate is None else x * gate).to(x.dtype)


class InPlanes(OtherNorm):
    """Llama's for rows of tokens alone."""

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * self.normed(x.flatten(0, 1) if x.dim() == 3 else x).to(x.dtype)


class TwoInputs(OtherNorm):
    """Takes two inputs."""

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        return self.weight * self.normed(x * gate).to(x.dtype)


@pytest.mark.parametrize(
    "kind", [InFloat32, WithoutEps, Scaled, Centered, OptionalInput, InPlanes, TwoInputs]
)
def test_a_norm_that_differs_is_left(kind) -> None:
    model = nn.ModuleDict({"norm": kind()})
    fuse_frozen_parts(model)
    assert type(model["norm"]) is kind


class OtherMLP(nn.Module):
    """The layers of a gated MLP."""

    def __init__(self, act: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(8, 8), nn.Linear(8, 8)
        self.down_proj, self.act_fn = nn.Linear(8, 8), act


class Same(OtherMLP):
    """The formula."""

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class ActOfUp(OtherMLP):
    """The activation is on the other factor."""

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.gate_proj(x) * self.act_fn(self.up_proj(x)))


class Residual(OtherMLP):
    """Adds its input."""

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


@pytest.mark.parametrize(
    ("kind", "act", "exchanged"),
    [
        (Same, nn.SiLU(), True),
        (Same, nn.GELU(approximate="tanh"), True),
        (Same, nn.GELU(), False),
        (Same, nn.ReLU(), False),
        (Same, nn.PReLU(), False),
        (Same, torch.nn.functional.silu, False),  # no module
        (ActOfUp, nn.SiLU(), False),
        (Residual, nn.SiLU(), False),
    ],
)
def test_an_mlp_that_differs_is_left(kind, act, exchanged) -> None:
    model = nn.ModuleDict({"mlp": kind(act)})
    fuse_frozen_parts(model)
    assert isinstance(model["mlp"], FrozenGatedMLP) is exchanged


class Plain(OtherNorm):
    """Llama's, written out."""

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * wide.to(x.dtype)


def test_a_module_with_a_hook_or_a_forward_of_its_own_is_left() -> None:
    plain, hooked, altered = Plain(), Plain(), Plain()
    hooked.register_forward_hook(lambda module, args, out: None)
    altered.forward = lambda x: x  # type: ignore[method-assign]
    model = nn.ModuleDict({"plain": plain, "hooked": hooked, "altered": altered})
    fuse_frozen_parts(model)
    found = {name: type(module) for name, module in model.items()}
    assert found == {"plain": FrozenRMSNorm, "hooked": Plain, "altered": Plain}


def test_loading_a_quantized_base_says_nothing(tiny_llama, caplog) -> None:
    fused._is_rms_norm.cache_clear()
    fused._is_gated.cache_clear()
    base = load_base_model(tiny_llama, quantization="nf4", compute_dtype="float32", device="cpu")
    assert kinds(base.model)[FrozenRMSNorm] > 0
    assert not caplog.records
