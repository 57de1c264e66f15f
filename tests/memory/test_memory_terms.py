"""Weight bytes against real bitsandbytes weights, and against sums done by hand."""

import bitsandbytes.functional as bnb
import pytest
import torch

from lora_tune.memory.request import resolve_request
from lora_tune.memory.shape import ModelShape
from lora_tune.memory.terms import base_tensors, book, nf4_tensor_bytes

LLAMA_8B = {
    "model_type": "llama",
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}


@pytest.mark.parametrize(
    ("outs", "ins"), [(64, 64), (576, 192), (1536, 576), (33, 70), (1024, 4096)]
)
def test_nf4_bytes_equal_a_really_quantized_weight(outs: int, ins: int) -> None:
    weight = torch.randn(outs, ins, generator=torch.Generator().manual_seed(0))
    packed, state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    real = (
        packed.nbytes,
        state.absmax.nbytes,
        state.state2.absmax.nbytes,
        state.code.nbytes,
        state.offset.nbytes,
        state.state2.code.nbytes,
    )
    assert nf4_tensor_bytes(outs * ins) == real


@pytest.mark.parametrize(("outs", "ins"), [(64, 64), (33, 70), (1024, 4096)])
def test_single_quantization_bytes_equal_a_really_quantized_weight(outs: int, ins: int) -> None:
    weight = torch.randn(outs, ins, generator=torch.Generator().manual_seed(0))
    packed, state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=False)
    assert not state.nested
    real = (packed.nbytes, state.absmax.nbytes, state.code.nbytes)
    assert nf4_tensor_bytes(outs * ins, nested=False) == real


def base_bytes(quantization: str, compute_dtype: str, stack: str = "trainer") -> tuple[int, int]:
    request = resolve_request(
        stack=stack,
        quantization=quantization,
        compute_dtype=compute_dtype,
        lanes=(),
        micro_batch_size=1,
        max_length=1,
        gradient_checkpointing=True,
        gradient_accumulation=False,
    )
    booked = book(base_tensors(ModelShape.from_config(LLAMA_8B), request))
    return booked.size, booked.size + booked.rounding


def test_llama_8b_in_nf4_is_the_sum_done_by_hand() -> None:
    packed, absmax, absmax_of_absmax = 3_489_660_928, 109_051_904, 1_703_936
    embeddings_and_head, norms = 2_101_346_304, 532_480
    codes_and_offsets = 224 * (64 + 1024 + 4)
    by_hand = packed + absmax + absmax_of_absmax + embeddings_and_head + norms + codes_and_offsets
    assert by_hand == 5_702_540_160
    assert base_bytes("nf4", "bfloat16") == (by_hand, 5_702_755_328 - 2 * 512)  # two rotary buffers


def test_an_unquantized_base_is_its_parameters_in_the_compute_type() -> None:
    parameters = 8_030_261_248  # Llama-3.1-8B
    assert base_bytes("none", "bfloat16")[0] == 2 * parameters
    assert base_bytes("none", "float32")[0] == 4 * parameters


def test_kbit_preparation_widens_all_that_is_not_quantized() -> None:
    more = base_bytes("nf4", "bfloat16", "trainer-kbit")[0] - base_bytes("nf4", "bfloat16")[0]
    assert more == 2_101_346_304 + 532_480
    assert base_bytes("none", "bfloat16", "trainer-kbit")[0] == 4 * 8_030_261_248
