"""What the gate answers a measurement: which micro-batches are open, and how many lanes of each fit.

The witness is the estimate asked directly, lane by lane.
"""

from dataclasses import replace

import pytest
from test_calibrator import MAX_TOKENS, SETS, SHAPE

from lora_tune.memory.estimate import estimate_memory
from lora_tune.memory.request import LaneShape, MemoryRequest
from lora_tune.search.gate import MOST_LANES, Gate, PackPlan
from lora_tune.study.spec import StudySpec

BATCH = 16


def gate(budget_bytes: int, *, train: dict[str, object] | None = None, **run: object) -> Gate:
    spec = StudySpec.model_validate(
        {
            "model": {"base": "model", "quantization": "none"},
            "data": {"train": "rows.jsonl"},
            "train": {"effective_batch_size": BATCH, **(train or {})},
            "space": {"lora_dropout": [0.1]},
            "run": run,
        }
    )
    return Gate(
        spec,
        SHAPE,
        compute_dtype="bfloat16",
        max_tokens=MAX_TOKENS,
        budget_bytes=budget_bytes,
        group_rank=128,
        compute_capability="8.9",
    )


def needed(lanes: int, size: int, *, checkpointing: bool = False) -> int:
    """Return the peak of so many lanes of the set that needs most."""
    return max(
        estimate_memory(
            SHAPE,
            MemoryRequest(
                quantization="none",
                compute_dtype="bfloat16",
                lanes=(LaneShape(rank=s.max_rank, targets=s.modules, lora_dropout=0.1),) * lanes,
                micro_batch_size=size,
                max_length=MAX_TOKENS,
                gradient_checkpointing=checkpointing,
                gradient_accumulation=size < BATCH,
                group_rank=128,
                compute_capability="8.9",
            ),
        ).peak_allocated_bytes
        for s in SETS
    )


def plan(size: int, *, checkpointing: bool = False) -> PackPlan:
    return PackPlan(micro_batch_size=size, gradient_checkpointing=checkpointing, most_lanes=1)


def test_smaller_micro_batches_leave_room_for_more_lanes() -> None:
    budget = needed(4, 4)
    found = gate(budget)
    for size in (1, 2, 4, 8, 16):
        lanes = found.most_lanes(plan(size), SETS)
        assert needed(lanes, size) <= budget
        assert lanes == MOST_LANES or needed(2 * lanes, size) > budget
        assert lanes & (lanes - 1) == 0  # a power of two
    assert found.most_lanes(plan(4), SETS) == 4
    assert found.most_lanes(plan(1), SETS) > 4 > found.most_lanes(plan(16), SETS)


def test_checkpointing_leaves_room_for_more_lanes() -> None:
    found = gate(needed(2, 8))
    assert found.most_lanes(plan(8), SETS) == 2
    assert found.most_lanes(plan(8, checkpointing=True), SETS) > 2


def test_where_not_even_one_lane_fits_there_are_none() -> None:
    found = gate(needed(1, 4) - 1)
    assert found.most_lanes(plan(4), SETS) == 0


def test_every_micro_batch_up_to_the_largest_that_fits_is_open() -> None:
    found = gate(needed(1, 8))
    chosen = found.pack_plan(SETS)
    assert (chosen.micro_batch_size, chosen.most_lanes) == (8, 1)
    assert chosen.gradient_checkpointing is False
    assert found.open_sizes(chosen) == (8, 4, 2, 1)


@pytest.mark.parametrize(
    ("train", "run", "wanted"),
    [({"micro_batch_size": 4}, {}, (4,)), ({}, {"lanes": 2}, (8,))],
)
def test_what_the_study_file_gives_is_not_open(
    train: dict[str, object], run: dict[str, object], wanted: tuple[int, ...]
) -> None:
    found = gate(needed(2, 8), train=train, **run)
    assert found.open_sizes(found.pack_plan(SETS)) == wanted


def test_the_plan_of_a_measurement_is_judged_like_that_of_the_estimate() -> None:
    found = gate(needed(4, 4))
    chosen = found.pack_plan(SETS)
    assert found.most_lanes(replace(chosen, most_lanes=99), SETS) == chosen.most_lanes
