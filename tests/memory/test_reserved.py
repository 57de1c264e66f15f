"""Reserved memory of the closed form: what a replay of the ledger's bookings gives.

The replay over all layers is compared with the shortened ledger: both must see the same peak. Against
the trace's replay see ``tests/trace``.
"""

import pytest

from lora_tune.memory.estimate import estimate_memory
from lora_tune.memory.ledger import RecordingBook
from lora_tune.memory.request import LaneShape, MemoryRequest, resolve_request
from lora_tune.memory.reserved import reserved_bytes, reserved_within
from lora_tune.memory.shape import ModelShape
from lora_tune.memory.solve import ClosedForm, fit_on
from lora_tune.memory.step import Step
from lora_tune.memory.verdict import Verdict, find_device
from lora_tune.units import GIB

LLAMA_8B = ModelShape.from_config(
    {
        "model_type": "llama",
        "num_hidden_layers": 32,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    }
)
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def request(stack: str, *, checkpointing: bool = True, lanes: int = 1) -> MemoryRequest:
    lane = LaneShape(rank=16, targets=ALL, lora_dropout=0.05)
    return resolve_request(
        stack=stack,
        quantization="nf4",
        compute_dtype="bfloat16",
        lanes=(lane,) * lanes,
        micro_batch_size=4 // lanes,
        max_length=2048,
        gradient_checkpointing=checkpointing,
        gradient_accumulation=False,
    )


REQUESTS = {
    "trainer": request("trainer"),
    "trainer, kept": request("trainer", checkpointing=False),
    "trl": request("trl"),
    "lora-tune": request("lora-tune"),
    "lora-tune, 4 lanes": request("lora-tune", lanes=4),
    "lora-tune, kept": request("lora-tune", checkpointing=False),
}


@pytest.mark.parametrize("name", REQUESTS)
def test_going_through_every_layer_gives_the_peak_of_three(name: str) -> None:
    asked = REQUESTS[name]
    book = RecordingBook()
    assert sum(Step(LLAMA_8B, asked, book).run()[1:]) == sum(Step(LLAMA_8B, asked).run()[1:])


@pytest.mark.parametrize("name", REQUESTS)
def test_more_is_reserved_than_allocated_but_not_much(name: str) -> None:
    found = estimate_memory(LLAMA_8B, REQUESTS[name], reserved=True)
    assert 1.0 <= found.peak_reserved_bytes / found.peak_allocated_bytes < 1.25
    assert found.peak_reserved_bytes == reserved_bytes(LLAMA_8B, REQUESTS[name])


def test_with_less_room_the_allocator_does_with_less_until_it_cannot() -> None:
    asked = REQUESTS["trainer"]
    found = estimate_memory(LLAMA_8B, asked, reserved=True)
    free = found.peak_reserved_bytes
    assert reserved_within(LLAMA_8B, asked, free) == free
    squeezed = reserved_within(LLAMA_8B, asked, free - 2 * GIB)
    assert squeezed is not None
    assert found.peak_allocated_bytes * 0.99 < squeezed <= free - 2 * GIB
    assert reserved_within(LLAMA_8B, asked, found.peak_allocated_bytes - GIB // 2) is None


def test_what_the_allocator_only_likes_to_keep_does_not_make_a_card_too_small() -> None:
    asked, card = REQUESTS["trainer"], find_device("rtx-3090", key="--gpu")
    relaxed = estimate_memory(LLAMA_8B, asked, reserved=True).peak_reserved_bytes
    fit = fit_on(card, asked, ClosedForm(LLAMA_8B))
    assert fit.verdict is Verdict.FITS
    assert fit.process.high_bytes <= card.usable_bytes
    assert fit.estimate.peak_reserved_bytes < relaxed
