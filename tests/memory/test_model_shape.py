"""ModelShape against real transformers models on the meta device: linear layers and parameters."""

from functools import cache

import pytest
import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_tune.catalog.targets import layer_suffix
from lora_tune.errors import ModelError, TargetModulesError, UncoveredModelError
from lora_tune.memory.estimate import trainable_parameters
from lora_tune.memory.request import LaneShape
from lora_tune.memory.shape import ModelShape, adapted_copies, target_suffixes
from lora_tune.records import LinearShape

TINY = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 131,
}
LLAMA_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
QWEN_7B = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
}
CONFIGS = {
    "llama-tiny": transformers.LlamaConfig(**TINY),
    "llama-tiny-tied-biased": transformers.LlamaConfig(
        **TINY, tie_word_embeddings=True, attention_bias=True, mlp_bias=True
    ),
    "llama-3.1-8b": transformers.LlamaConfig(**LLAMA_8B),
    "mistral-tiny": transformers.MistralConfig(**TINY, head_dim=16),
    "mistral-7b": transformers.MistralConfig(),
    "qwen2-tiny": transformers.Qwen2Config(**TINY),
    "qwen2.5-7b": transformers.Qwen2Config(**QWEN_7B),
    "qwen3-tiny": transformers.Qwen3Config(**TINY, head_dim=16, tie_word_embeddings=True),
    "qwen3-tiny-biased": transformers.Qwen3Config(**TINY, head_dim=8, attention_bias=True),
}


@cache
def meta_model(name: str) -> nn.Module:
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(CONFIGS[name])


def linears_of(model: nn.Module) -> list[LinearShape]:
    head = model.get_output_embeddings()
    found = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module is not head:
            ins, outs = module.in_features, module.out_features
        elif isinstance(module, Conv1D):
            ins, outs = module.nx, module.nf
        else:
            continue
        found.append(LinearShape(name=name, in_features=ins, out_features=outs))
    return found


@pytest.mark.parametrize("name", CONFIGS)
def test_a_covered_shape_has_the_real_models_parameters(name: str) -> None:
    model, shape = meta_model(name), ModelShape.from_config(CONFIGS[name].to_dict())
    assert shape.covered
    assert shape.num_parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", CONFIGS)
def test_a_covered_shape_has_the_real_models_linear_layers(name: str) -> None:
    shape = ModelShape.from_config(CONFIGS[name].to_dict())
    real = linears_of(meta_model(name))
    assert len(real) == len(shape.layer_linears) * shape.num_layers
    sizes = {linear.name: (linear.in_features, linear.out_features) for linear in real}
    for linear in shape.layer_linears:
        mine = [size for name, size in sizes.items() if layer_suffix(name) == linear.name]
        assert mine == [(linear.in_features, linear.out_features)] * shape.num_layers


def test_other_parameters_are_the_real_models_tensors() -> None:
    name = "qwen3-tiny-biased"
    shape, model = ModelShape.from_config(CONFIGS[name].to_dict()), meta_model(name)
    linear = {f"{linear.name}.weight" for linear in linears_of(model)}
    real = [p.numel() for n, p in model.named_parameters() if n not in linear]
    mine = [*shape.layer_tensors * shape.num_layers, *shape.outer_tensors]
    assert sorted(real) == sorted(mine)


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (("q_proj", "k_proj", "v_proj", "o_proj"), 13_631_488),
        (
            ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
            41_943_040,
        ),
    ],
)
def test_trainable_parameters_of_llama_8b_at_rank_16(
    targets: tuple[str, ...], expected: int
) -> None:
    shape = ModelShape.from_config(CONFIGS["llama-3.1-8b"].to_dict())
    lane = LaneShape(rank=16, targets=targets, lora_dropout=0.0)
    assert trainable_parameters(shape, lane) == expected
    full = tuple(
        linear.name
        for linear in linears_of(meta_model("llama-3.1-8b"))
        if linear.name.endswith(targets)
    )
    assert (
        trainable_parameters(shape, LaneShape(rank=16, targets=full, lora_dropout=0.0)) == expected
    )


def uncovered(config: transformers.PretrainedConfig) -> tuple[ModelShape, nn.Module]:
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    linears = linears_of(model)
    total = sum(p.numel() for p in model.parameters())
    other = total - sum(linear.in_features * linear.out_features for linear in linears)
    return ModelShape.from_linears(config.to_dict(), linears, other), model


def test_gpt2_is_counted_from_its_own_layers() -> None:
    shape, model = uncovered(transformers.GPT2Config())
    assert not shape.covered
    assert shape.num_parameters == sum(p.numel() for p in model.parameters())
    lane = LaneShape(rank=8, targets=("c_attn",), lora_dropout=0.0)
    assert trainable_parameters(shape, lane) == 294_912


def test_linear_layers_outside_the_decoder_layers_count_once() -> None:
    config = transformers.OPTConfig(
        hidden_size=64,
        word_embed_proj_dim=32,
        ffn_dim=96,
        num_hidden_layers=3,
        num_attention_heads=4,
    )
    shape, model = uncovered(config)
    assert [linear.name.rpartition(".")[2] for linear in shape.outer_linears] == [
        "project_out",
        "project_in",
    ]
    assert shape.num_parameters == sum(p.numel() for p in model.parameters())
    assert adapted_copies(shape, ("project_in", "fc1"))[-1] == 1


@pytest.mark.parametrize(
    "key", ["model_type", "num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size"]
)
def test_a_missing_key_is_named(key: str) -> None:
    config = CONFIGS["llama-tiny"].to_dict()
    del config[key]
    with pytest.raises(ModelError, match=key):
        ModelShape.from_config(config)


def test_an_old_config_without_newer_keys_takes_transformers_defaults() -> None:
    config = {key: TINY[key] for key in TINY if key != "num_key_value_heads"}
    shape = ModelShape.from_config({"model_type": "llama", **config})
    real = transformers.LlamaConfig(**config)
    assert (shape.num_kv_heads, shape.head_dim) == (real.num_key_value_heads, real.head_dim)
    assert not shape.tied


def test_a_family_without_closed_form_and_an_unknown_target_are_refused() -> None:
    with pytest.raises(UncoveredModelError, match='"bloom" has no closed form'):
        ModelShape.from_config(transformers.BloomConfig().to_dict())
    with pytest.raises(TargetModulesError, match="c_attn"):
        adapted_copies(ModelShape.from_config(CONFIGS["llama-tiny"].to_dict()), ("c_attn",))
    with pytest.raises(ModelError, match="no linear layer"):
        ModelShape.from_linears(CONFIGS["llama-tiny"].to_dict(), [], 0)


MOE = {
    **TINY,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 24,
}


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "qwen2_moe", **MOE, "mlp_only_layers": [0]},
        {"model_type": "qwen3_moe", **MOE, "decoder_sparse_step": 2},
        {"model_type": "falcon", **TINY, "alibi": True},
        {"model_type": "gpt2", **TINY, "n_positions": 8, "add_cross_attention": True},
        {"model_type": "smollm3", **TINY, "use_sliding_window": True},
    ],
    ids=lambda config: config["model_type"],
)
def test_layers_that_differ_are_left_to_the_trace(config: dict[str, object]) -> None:
    with pytest.raises(UncoveredModelError, match="no closed form"):
        ModelShape.from_config(config)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_attention_heads", 0),
        ("hidden_size", -4096),
        ("vocab_size", "32000"),
        ("num_hidden_layers", 2.5),
        ("intermediate_size", True),
    ],
)
def test_what_is_no_size_is_named_with_its_value(key: str, value: object) -> None:
    config = {"model_type": "llama", **TINY, key: value}
    with pytest.raises(ModelError, match=f"{key} is {value!r}; it must be a whole number"):
        ModelShape.from_config(config)


@pytest.mark.parametrize(
    ("family", "key"),
    [
        ("mixtral", "num_experts_per_tok"),
        ("qwen3_moe", "moe_intermediate_size"),
        ("qwen2_moe", "shared_expert_intermediate_size"),
        ("gpt_neox", "intermediate_size"),
        ("phi3", "intermediate_size"),
        ("falcon", "vocab_size"),
    ],
)
def test_a_familys_own_missing_key_is_named(family: str, key: str) -> None:
    config = {"model_type": family, **MOE}
    del config[key]
    with pytest.raises(ModelError, match=f"{key} is missing"):
        ModelShape.from_config(config)


def shape_of(name: str) -> ModelShape:
    return ModelShape.from_config(CONFIGS[name].to_dict())


def test_targets_are_named_inside_the_layer_where_every_layer_has_them() -> None:
    shape = shape_of("llama-tiny")
    assert target_suffixes(shape, "mlp") == ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    assert target_suffixes(shape, " q_proj , mlp.up_proj") == ("self_attn.q_proj", "mlp.up_proj")
    everywhere = ",".join(f"model.layers.{i}.self_attn.v_proj" for i in range(3))
    assert target_suffixes(shape, everywhere) == ("self_attn.v_proj",)
    one = "model.layers.2.self_attn.v_proj"
    assert target_suffixes(shape, f"q_proj,{one}") == ("self_attn.q_proj", one)
    for targets in ("all-linear", f"q_proj,{one}"):
        assert sum(adapted_copies(shape, target_suffixes(shape, targets))) == (
            21 if targets == "all-linear" else 4
        )


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("qproj", '"qproj" matches no linear layer'),
        ("atention", "did you mean attention"),
        ("", "the list of modules is empty"),
        ("lm_head", '"lm_head" matches no linear layer'),
    ],
)
def test_targets_that_match_nothing_list_the_real_modules(targets: str, expected: str) -> None:
    with pytest.raises(TargetModulesError) as caught:
        target_suffixes(shape_of("llama-tiny"), targets)
    message = str(caught.value)
    assert message.startswith("--targets: ")
    assert expected in message
    assert "down_proj, gate_proj, k_proj" in message


def test_a_set_that_a_fused_model_does_not_have_is_refused_with_the_reason() -> None:
    gpt2 = ModelShape.from_config(transformers.GPT2Config().to_dict())
    with pytest.raises(TargetModulesError, match="fused in c_attn"):
        target_suffixes(gpt2, "attention-qv")
    lane = LaneShape(rank=8, targets=target_suffixes(gpt2, "c_attn"), lora_dropout=0.0)
    assert trainable_parameters(gpt2, lane) == 294_912


def test_shapes_can_be_keys_of_a_cache() -> None:
    assert hash(shape_of("llama-tiny")) == hash(shape_of("llama-tiny"))
    assert shape_of("llama-tiny") != shape_of("llama-tiny-tied-biased")
