"""Budgets, the largest that fits, and the message when nothing does."""

import pytest

from lora_tune.catalog.gpus import find_gpu
from lora_tune.errors import StudyFileError
from lora_tune.memory.estimate import estimate_memory
from lora_tune.memory.fit import (
    explain_no_fit,
    largest_that_fits,
    resolve_budget,
)
from lora_tune.memory.request import LaneShape, MemoryRequest
from lora_tune.memory.shape import ModelShape
from lora_tune.units import GIB

SHAPE = ModelShape.from_config(
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


def request(rank: int, max_length: int = 2048) -> MemoryRequest:
    return MemoryRequest(
        quantization="nf4",
        compute_dtype="bfloat16",
        lanes=(LaneShape(rank=rank, targets=("q_proj", "v_proj"), lora_dropout=0.0),),
        micro_batch_size=1,
        max_length=max_length,
        gradient_checkpointing=True,
        compute_capability=None,
        gradient_accumulation=True,
    )


def peak(rank: int, max_length: int = 2048) -> int:
    return estimate_memory(SHAPE, request(rank, max_length)).peak_allocated_bytes


def test_the_budget_is_a_share_of_what_is_free_named_or_catalogued() -> None:
    assert resolve_budget("auto", safety=0.9, free_bytes=1000) == 900
    assert resolve_budget("8 GiB", safety=0.5, free_bytes=1000) == 4 * GIB
    card = find_gpu("RTX 4090").usable_bytes
    assert resolve_budget("rtx-4090", safety=0.95, free_bytes=1000) == int(card * 0.95)


def test_an_unknown_gpu_names_the_key_the_nearest_and_the_choices() -> None:
    with pytest.raises(StudyFileError) as caught:
        resolve_budget("RTX 4091", safety=0.95, free_bytes=0)
    message = str(caught.value)
    assert message.startswith('memory.gpu is "RTX 4091", which is no GPU of the catalogue; did you')
    assert "RTX 4090" in message
    assert 'Write "auto", a size such as "24GiB", or one of: T4,' in message


def test_the_largest_rank_is_the_last_whose_peak_is_within_the_budget() -> None:
    ranks = (4, 128, 16, 64, 8, 32)
    assert largest_that_fits(ranks, peak, peak(32)) == 32
    assert largest_that_fits(ranks, peak, peak(32) - 1) == 16
    assert largest_that_fits(ranks, peak, peak(128)) == 128
    assert largest_that_fits(ranks, peak, peak(4) - 1) == 0


def test_nothing_fits_is_zero() -> None:
    assert largest_that_fits([3, 1, 2], lambda value: value, 2) == 2
    assert largest_that_fits([3, 1, 2], lambda value: value, 0) == 0
    assert largest_that_fits([], lambda value: value, 9) == 0


def explained(budget_bytes: int, max_length: int = 8192) -> str:
    return explain_no_fit(
        estimate_memory(SHAPE, request(4, max_length)),
        budget_bytes,
        configuration="rank 4, attention-qv",
        budget="7.00 GiB, 95 %",
        safety=0.95,
        max_length=max_length,
        peak_at_length=lambda length: peak(4, length),
    )


def test_no_fit_names_the_largest_terms_and_what_would_help() -> None:
    message = explained(7 * GIB)
    first, second = message.splitlines()
    assert first.startswith(
        "no trial fits: the smallest configuration (rank 4, attention-qv) needs "
    )
    assert first.endswith("the budget is 7.00 GiB (7.00 GiB, 95 %).")
    assert second.startswith("  Largest terms: base weights 5.31 GiB, activations ")
    assert "Lower data.max_length from 8192 to 2048 (saves " in second
    assert "or choose a larger GPU, from RTX 3060 12GB (11.70 GiB) on." in second


def test_no_length_helps_when_the_base_alone_is_too_large() -> None:
    message = explained(4 * GIB)
    assert "max_length" not in message
    assert "Choose a larger GPU" in message


def test_when_no_gpu_is_large_enough_a_smaller_model_is_advised() -> None:
    message = explained(4 * GIB, max_length=2**21)
    assert message.endswith("Choose a smaller base model.")
