"""Bytes of a loaded base against a count by hand of its weights, their scales and tables."""

from pathlib import Path

import pytest
import torch
import transformers
from test_exactness import load

from lora_tune.engine.base_size import base_bytes

VOCAB, HIDDEN, MLP, LAYERS, HEAD_DIM = 131, 64, 128, 2, 16
# q and o are square, k and v have two of four heads
LINEARS = [(HIDDEN, HIDDEN)] * 2 + [(HIDDEN, HIDDEN // 2)] * 2 + [(HIDDEN, MLP)] * 3
NORMS = HIDDEN * (2 * LAYERS + 1)


def linear_sizes() -> list[int]:
    return [a * b for a, b in LINEARS] * LAYERS


@pytest.mark.parametrize(("dtype", "bytes_each"), [("float32", 4), ("bfloat16", 2)])
def test_a_base_without_quantization_is_its_parameters(
    tiny_llama: Path, dtype: str, bytes_each: int
) -> None:
    parameters = sum(linear_sizes()) + NORMS + 2 * VOCAB * HIDDEN
    rotary = 4 * HEAD_DIM // 2 * 2  # frequencies and their originals, float32
    assert base_bytes(load(tiny_llama, "none", dtype).model) == bytes_each * parameters + rotary


def test_an_nf4_base_has_half_a_byte_a_weight_and_doubly_quantized_scales(tiny_llama: Path) -> None:
    dense = 4 * (NORMS + 2 * VOCAB * HIDDEN) + 4 * HEAD_DIM // 2 * 2
    quantized = 0
    for size in linear_sizes():
        blocks = size // 64
        groups = -(-blocks // 256)
        # weights; scales of a byte; their scales, offset and two tables: 16 and 256 float32
        quantized += size // 2 + blocks + 4 * groups + 4 + 4 * 16 + 4 * 256
    found = base_bytes(load(tiny_llama, "nf4", "float32").model)
    assert abs(found - dense - quantized) <= 4 * (16 + 256) * len(
        linear_sizes()
    )  # tables may be shared
    assert found < base_bytes(load(tiny_llama, "none", "float32").model)


def test_tied_embeddings_count_once() -> None:
    sizes = []
    for tied in (True, False):
        config = transformers.LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=HIDDEN,
            intermediate_size=MLP,
            num_hidden_layers=1,
            num_attention_heads=4,
            tie_word_embeddings=tied,
        )
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        sizes.append(base_bytes(model))
    assert sizes[1] - sizes[0] == 4 * VOCAB * HIDDEN
