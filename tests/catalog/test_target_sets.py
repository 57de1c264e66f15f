"""Target sets against the linear layers of real transformers models, built on the meta device."""

from functools import cache

import pytest
import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_tune.catalog.targets import (
    FAMILIES,
    SET_NAMES,
    named_sets,
    resolve_target_set,
    set_label,
)
from lora_tune.errors import TargetModulesError

CONFIGS = {
    "llama": transformers.LlamaConfig,
    "qwen2": transformers.Qwen2Config,
    "qwen3": transformers.Qwen3Config,
    "mistral": transformers.MistralConfig,
    "gemma2": transformers.Gemma2Config,
    "phi3": transformers.Phi3Config,
    "gpt2": transformers.GPT2Config,
    "gpt_neox": transformers.GPTNeoXConfig,
    "falcon": transformers.FalconConfig,
    "bloom": transformers.BloomConfig,
    "opt": transformers.OPTConfig,
    "mixtral": transformers.MixtralConfig,
}
FUSED = ("gpt2", "gpt_neox", "falcon", "bloom", "phi3")


@cache
def real_linears(model_type: str) -> tuple[str, ...]:
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(CONFIGS[model_type]())
    head = model.get_output_embeddings()
    return tuple(
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head
    )


def resolve(name, model_type: str) -> tuple[str, ...]:
    return resolve_target_set(name, model_type=model_type, linears=real_linears(model_type))


def refusal(name, model_type: str, linears=None) -> str:
    with pytest.raises(TargetModulesError) as caught:
        resolve_target_set(name, model_type=model_type, linears=linears or real_linears(model_type))
    return str(caught.value)


@pytest.mark.parametrize("model_type", CONFIGS)
def test_attention_and_mlp_together_are_all_linear(model_type: str) -> None:
    sets = named_sets(model_type, real_linears(model_type))
    assert list(sets) == [name for name in SET_NAMES if name in sets]
    assert set(sets["all-linear"]) == set(real_linears(model_type))
    assert set(sets["attention"]).isdisjoint(sets.get("mlp", ()))
    assert set(sets["attention"]) | set(sets.get("mlp", ())) == set(sets["all-linear"])
    if "attention-qv" in sets:
        assert set(sets["attention-qv"]) < set(sets["attention"])


@pytest.mark.parametrize("model_type", CONFIGS)
def test_every_set_has_the_family_group_in_every_layer(model_type: str) -> None:
    config = CONFIGS[model_type]()
    for name, modules in named_sets(model_type, real_linears(model_type)).items():
        if name != "all-linear":
            group = FAMILIES[model_type].suffixes(name)
            assert len(modules) == len(group) * config.num_hidden_layers


def test_llama_modules_come_as_full_names_in_module_order() -> None:
    modules = resolve("attention-qv", "llama")
    assert modules[:3] == (
        "model.layers.0.self_attn.q_proj",
        "model.layers.0.self_attn.v_proj",
        "model.layers.1.self_attn.q_proj",
    )
    assert len(modules) == 64


def test_gpt2_tells_the_two_c_proj_apart() -> None:
    assert resolve("attention", "gpt2")[:2] == (
        "transformer.h.0.attn.c_attn",
        "transformer.h.0.attn.c_proj",
    )
    assert resolve("mlp", "gpt2")[:2] == ("transformer.h.0.mlp.c_fc", "transformer.h.0.mlp.c_proj")
    assert len(resolve("c_proj", "gpt2")) == 24


def test_a_module_that_gpt2_lacks_is_refused_with_what_it_has() -> None:
    assert refusal("q_proj", "gpt2") == (
        'space.target_modules: "q_proj" matches no linear layer of this model (gpt2). '
        "Its linear layers: c_attn, c_fc, c_proj. Named sets that fit: "
        "attention (c_attn, attn.c_proj), mlp (c_fc, mlp.c_proj), all-linear."
    )


@pytest.mark.parametrize("model_type", FUSED)
def test_fused_families_have_no_attention_qv_and_say_why(model_type: str) -> None:
    message = refusal("attention-qv", model_type)
    assert "are fused in" in message
    assert "Named sets that fit: attention (" in message


def test_a_misspelt_set_gets_the_nearest_name() -> None:
    assert "did you mean attention?" in refusal("atention", "llama")
    assert '"q_porj" matches no linear layer' in refusal(("q_porj", "v_proj"), "llama")


def test_experts_are_no_linear_layers() -> None:
    assert "3-D parameters" in refusal("mlp", "mixtral")


def test_a_list_matches_full_names_and_suffixes_as_peft_does() -> None:
    from peft import LoraConfig, get_peft_model

    names = ("q_proj", "model.layers.1.mlp.up_proj")
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=128,
    )
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
        linears = tuple(n for n, m in model.named_modules() if isinstance(m, nn.Linear))[:-1]
        peft_model = get_peft_model(model, LoraConfig(target_modules=list(names)))
    adapted = {
        name.removesuffix(".lora_A").removeprefix("base_model.model.")
        for name, _ in peft_model.named_modules()
        if name.endswith(".lora_A")
    }
    assert set(resolve_target_set(names, model_type="llama", linears=linears)) == adapted


def test_an_unknown_family_is_resolved_by_the_llama_names_it_has() -> None:
    linears = real_linears("llama")
    assert list(named_sets("brand-new", linears)) == list(SET_NAMES)
    message = refusal("attention", "brand-new", real_linears("gpt2"))
    assert "not in the catalogue" in message
    assert message.endswith("Named sets that fit: all-linear.")


def test_half_a_group_is_refused_and_names_the_layer() -> None:
    linears = tuple(n for n in real_linears("llama") if n != "model.layers.7.mlp.gate_proj")
    message = refusal("mlp", "llama", linears)
    assert "only part of its group in model.layers.7 of this model (llama): no gate_proj" in message
    assert "mlp" not in named_sets("llama", linears)
    assert "attention" in named_sets("llama", linears)


def test_towers_are_left_out_of_all_linear_and_refused_otherwise() -> None:
    tower = ("model.vision_tower.layers.0.self_attn.q_proj", "audio_encoder.layers.0.fc1")
    linears = (*real_linears("llama"), *tower)
    found = resolve_target_set("all-linear", model_type="llama", linears=linears)
    assert found == real_linears("llama")
    assert "vision or audio tower" in refusal("attention", "llama", linears)
    assert "vision or audio tower" in refusal(("fc1",), "llama", linears)
    assert list(named_sets("llama", linears)) == ["mlp", "all-linear"]


def test_an_empty_list_and_a_model_without_linear_layers_are_refused() -> None:
    assert "the list of modules is empty" in refusal((), "llama")
    with pytest.raises(TargetModulesError, match="has no linear layer"):
        resolve_target_set("all-linear", model_type="odd", linears=())


def test_labels_of_sets_and_lists() -> None:
    assert [set_label("all-linear"), set_label(("q_proj",)), set_label(("a", "b"))] == [
        "all-linear",
        "q_proj",
        "a+b",
    ]
