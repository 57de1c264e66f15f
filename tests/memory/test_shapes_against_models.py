"""ModelShape of every catalogue row and of odd configs, against the models that transformers builds.

The models are built on the meta device: real classes, real names, no memory. A catalogue row keeps
its widths but gets few layers; its whole depth is compared with the published parameter count.
"""

from functools import cache

import pytest
import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_tune.catalog.models import CatalogModel, load_models
from lora_tune.catalog.targets import named_sets
from lora_tune.memory.shape import COVERED, ModelShape, target_suffixes

SIZES = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 131,
    "pad_token_id": 0,  # some defaults lie beyond so small a vocabulary
}
WITHOUT_KV = {key: value for key, value in SIZES.items() if key != "num_key_value_heads"}
EXPERTS = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
GPT2 = {"n_embd": 48, "n_layer": 3, "n_head": 6, "n_positions": 40, "vocab_size": 131}
# Every switch of a family that adds, drops or resizes a tensor, the absent and the null key too.
VARIANTS: dict[str, dict[str, object]] = {
    "llama": {"model_type": "llama", **SIZES},
    "llama-tied-biased": {
        "model_type": "llama",
        **SIZES,
        "tie_word_embeddings": True,
        "attention_bias": True,
        "mlp_bias": True,
    },
    "llama-no-kv-heads": {"model_type": "llama", **WITHOUT_KV},
    "llama-nulls": {"model_type": "llama", **SIZES, "num_key_value_heads": None, "head_dim": None},
    "mistral-head-size": {"model_type": "mistral", **SIZES, "head_dim": 16},
    "mistral-ignores-bias": {"model_type": "mistral", **SIZES, "attention_bias": True},
    "mistral-no-kv-heads": {"model_type": "mistral", **WITHOUT_KV, "num_attention_heads": 8},
    "qwen2": {"model_type": "qwen2", **SIZES},
    "qwen2-windows": {
        "model_type": "qwen2",
        **SIZES,
        "use_sliding_window": True,
        "max_window_layers": 1,
    },
    "qwen3": {"model_type": "qwen3", **SIZES},
    "qwen3-biased": {"model_type": "qwen3", **SIZES, "head_dim": 8, "attention_bias": True},
    "smollm3": {"model_type": "smollm3", **SIZES, "num_hidden_layers": 9},
    "smollm3-biased": {
        "model_type": "smollm3",
        **SIZES,
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": False,
        "no_rope_layers": [1, 0, 0],
    },
    "gemma": {"model_type": "gemma", **SIZES},
    "gemma-biased": {"model_type": "gemma", **SIZES, "head_dim": 16, "attention_bias": True},
    "gemma2": {"model_type": "gemma2", **SIZES},
    "gemma3": {"model_type": "gemma3_text", **SIZES, "num_hidden_layers": 7},
    "gemma3-one-layer-type": {"model_type": "gemma3_text", **SIZES},
    "gemma3-published-keys": {  # the text_config of google/gemma-3-4b-pt names no heads, no words
        "model_type": "gemma3_text",
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 2,
        "sliding_window": 1024,
    },
    "phi3": {"model_type": "phi3", **SIZES},
    "phi3-partly-rotated": {
        "model_type": "phi3",
        **SIZES,
        "hidden_size": 96,
        "partial_rotary_factor": 0.5,
        "tie_word_embeddings": True,
    },
    "gpt2": {"model_type": "gpt2", **GPT2},
    "gpt2-width": {"model_type": "gpt2", **GPT2, "n_inner": 70, "tie_word_embeddings": False},
    "gpt_neox": {"model_type": "gpt_neox", **WITHOUT_KV, "hidden_size": 96},
    "gpt_neox-unbiased-serial": {
        "model_type": "gpt_neox",
        **WITHOUT_KV,
        "attention_bias": False,
        "use_parallel_residual": False,
        "rotary_pct": 1.0,
    },
    "falcon": {"model_type": "falcon", **WITHOUT_KV},
    "falcon-biased": {"model_type": "falcon", **WITHOUT_KV, "bias": True, "multi_query": False},
    "falcon-serial": {"model_type": "falcon", **WITHOUT_KV, "parallel_attn": False},
    "falcon-new": {
        "model_type": "falcon",
        **WITHOUT_KV,
        "new_decoder_architecture": True,
        "num_kv_heads": 2,
        "ffn_hidden_size": 72,
    },
    "falcon-new-one-norm": {
        "model_type": "falcon",
        **WITHOUT_KV,
        "new_decoder_architecture": True,
        "num_ln_in_parallel_attn": 1,
        "tie_word_embeddings": False,
    },
    "mixtral": {"model_type": "mixtral", **SIZES, "num_local_experts": 5, "num_experts_per_tok": 2},
    "qwen2_moe": {
        "model_type": "qwen2_moe",
        **SIZES,
        **EXPERTS,
        "shared_expert_intermediate_size": 40,
    },
    "qwen2_moe-unbiased": {
        "model_type": "qwen2_moe",
        **SIZES,
        **EXPERTS,
        "shared_expert_intermediate_size": 40,
        "qkv_bias": False,
    },
    "qwen3_moe": {"model_type": "qwen3_moe", **SIZES, **EXPERTS},
    "qwen3_moe-biased": {
        "model_type": "qwen3_moe",
        **SIZES,
        **EXPERTS,
        "head_dim": 16,
        "attention_bias": True,
    },
}


def short(model: CatalogModel) -> dict[str, object]:
    """Return a row's config with its widths and few layers, two periods of its pattern."""
    config = dict(model.config)
    layers = "n_layer" if "n_layer" in config else "num_hidden_layers"
    periods = {"gemma2": 2, "gemma3_text": 6, "smollm3": 4}
    config[layers] = 2 * periods.get(str(config["model_type"]), 1)
    return config


CONFIGS = VARIANTS | {f"catalogue {model.name}": short(model) for model in load_models()}


def build(config: dict[str, object]) -> nn.Module:
    options = {key: value for key, value in config.items() if key != "model_type"}
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.for_model(str(config["model_type"]), **options)
        )


@cache
def meta_model(name: str) -> nn.Module:
    return build(CONFIGS[name])


def real_linears(model: nn.Module) -> dict[str, tuple[int, int]]:
    head = model.get_output_embeddings()
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module is not head:
            found[name] = (module.in_features, module.out_features)
        elif isinstance(module, Conv1D):
            found[name] = (module.nx, module.nf)
    return found


@pytest.mark.parametrize("name", CONFIGS)
def test_linear_layers_have_the_real_names_order_and_sizes(name: str) -> None:
    shape, real = ModelShape.from_config(CONFIGS[name]), real_linears(meta_model(name))
    assert shape.linear_names == tuple(real)
    mine = [(linear.in_features, linear.out_features) for linear in shape.layer_linears]
    assert mine * shape.num_layers == list(real.values())


@pytest.mark.parametrize("name", CONFIGS)
def test_every_other_parameter_is_listed_with_its_elements(name: str) -> None:
    shape, model = ModelShape.from_config(CONFIGS[name]), meta_model(name)
    linear = {f"{name}.weight" for name in real_linears(model)}
    inside, outside = [], []
    for tensor, parameter in model.named_parameters():
        if tensor not in linear:
            first = tensor.startswith(shape.layer_prefix)
            (inside if first else outside).append(parameter.numel())
    assert sorted(shape.layer_tensors * shape.num_layers) == sorted(inside)
    assert sorted(shape.outer_tensors) == sorted(outside)
    assert shape.num_parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", CONFIGS)
def test_buffers_are_the_real_ones(name: str) -> None:
    buffers = list(meta_model(name).buffers())
    assert {buffer.dtype for buffer in buffers} <= {torch.float32}
    mine = ModelShape.from_config(CONFIGS[name]).buffers
    assert sorted(mine) == sorted(buffer.numel() for buffer in buffers)


@pytest.mark.parametrize("name", CONFIGS)
def test_named_sets_from_the_shape_are_those_from_the_model(name: str) -> None:
    shape, model = ModelShape.from_config(CONFIGS[name]), meta_model(name)
    real = named_sets(shape.model_type, tuple(real_linears(model)))
    assert named_sets(shape.model_type, shape.linear_names) == real
    for set_name, modules in real.items():
        suffixes = target_suffixes(shape, set_name)
        inside = {linear.name for linear in shape.layer_linears}
        assert set(suffixes) <= inside
        assert sum(module.endswith(suffixes) for module in modules) == len(modules)
        assert len(modules) == len(suffixes) * shape.num_layers


@pytest.mark.parametrize("name", CONFIGS)
def test_heads_dropouts_and_windows_are_those_of_the_config_class(name: str) -> None:
    shape, config = ModelShape.from_config(CONFIGS[name]), meta_model(name).config
    assert (shape.hidden, shape.num_heads) == (config.hidden_size, config.num_attention_heads)
    assert shape.tied == config.tie_word_embeddings
    activation = next(
        value
        for key in ("hidden_activation", "hidden_act", "activation_function", "activation")
        if (value := getattr(config, key, None)) is not None
    )
    assert shape.activation == activation
    types = getattr(config, "layer_types", None)
    if types is not None:
        slides = [kind == "sliding_attention" for kind in types]
        assert list(shape.sliding_layers) == (slides if any(slides) else [])
    if shape.num_sliding_layers:
        assert shape.sliding_window == config.sliding_window
    if shape.model_type == "smollm3":
        assert shape.num_rotary_layers == sum(config.no_rope_layers)
    softcaps = [getattr(config, f"{k}_logit_softcapping", None) for k in ("attn", "final")]
    assert [shape.attention_softcap, shape.final_softcap] == [cap is not None for cap in softcaps]
    rates = {
        "gpt2": ("embd_pdrop", "resid_pdrop", "attn_pdrop"),
        "phi3": ("", "resid_pdrop", "attention_dropout"),
        "gpt_neox": ("hidden_dropout", "hidden_dropout", "attention_dropout"),
        "falcon": ("", "hidden_dropout", "attention_dropout"),
    }.get(shape.model_type, ("", "", "attention_dropout"))
    expected = [getattr(config, key) if key else 0.0 for key in rates]
    mine = [shape.embedding_dropout, shape.hidden_dropout, shape.attention_dropout]
    assert mine == expected


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_as_transformers_saves_it_gives_the_same_shape(name: str) -> None:
    saved = meta_model(name).config.to_dict()
    assert ModelShape.from_config(saved) == ModelShape.from_config(CONFIGS[name])


@pytest.mark.parametrize("model", load_models(), ids=lambda model: model.name)
def test_a_catalogue_row_has_the_published_parameter_count(model: CatalogModel) -> None:
    count = ModelShape.from_config(model.config).num_parameters
    if model.parameters is not None:
        assert count == model.parameters
    else:
        real = build(dict(model.config))
        assert count == sum(parameter.numel() for parameter in real.parameters())


def test_every_covered_family_is_in_the_catalogue_and_among_the_variants() -> None:
    assert {model.config["model_type"] for model in load_models()} == set(COVERED)
    assert {config["model_type"] for config in VARIANTS.values()} == set(COVERED)


def test_a_mixture_of_experts_names_what_its_linear_layers_are() -> None:
    qwen = ModelShape.from_config(VARIANTS["qwen2_moe"])
    assert target_suffixes(qwen, "mlp") == tuple(
        f"mlp.shared_expert.{name}_proj" for name in ("gate", "up", "down")
    )
    assert "mlp.shared_expert_gate" in target_suffixes(qwen, "all-linear")
    mixtral = ModelShape.from_config(VARIANTS["mixtral"])
    assert target_suffixes(mixtral, "all-linear") == target_suffixes(mixtral, "attention")
    sizes = (mixtral.num_experts, mixtral.experts_per_token, mixtral.expert_intermediate)
    assert sizes == (5, 2, 80)
