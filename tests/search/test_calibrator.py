"""From readings to lanes: what the gate predicts of a pack, and when packs to come are made smaller.

The witness of the gate is the estimate asked directly; that of the decision is arithmetic by hand.
"""

from dataclasses import replace

import pytest

from lora_tune.memory.estimate import estimate_memory
from lora_tune.memory.request import LaneShape, MemoryRequest
from lora_tune.memory.shape import ModelShape
from lora_tune.records import (
    NO_READINGS,
    DataFingerprint,
    LanePlan,
    MemoryLog,
    ModelIdentity,
    PackPeak,
    StudyLock,
    TargetSet,
    TrialConfig,
)
from lora_tune.search.calibrator import Calibrator
from lora_tune.search.gate import Gate, PackPlan
from lora_tune.study.spec import StudySpec
from lora_tune.units import GIB

SHAPE = ModelShape.from_config(
    {
        "model_type": "llama",
        "num_hidden_layers": 4,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 8000,
    }
)
SETS = tuple(
    TargetSet(name=name, modules=modules, max_rank=rank, trainable_parameters_per_rank=1)
    for name, modules, rank in (("attention", ("q_proj", "v_proj"), 16), ("mlp", ("up_proj",), 8))
)
PLAN = PackPlan(micro_batch_size=2, gradient_checkpointing=False, most_lanes=8)
MAX_TOKENS = 128


def gate() -> Gate:
    spec = StudySpec.model_validate(
        {
            "model": {"base": "model", "quantization": "none"},
            "data": {"train": "rows.jsonl"},
            "train": {"effective_batch_size": 4},
            "memory": {"safety": 0.9},
        }
    )
    return Gate(
        spec,
        SHAPE,
        compute_dtype="bfloat16",
        max_tokens=MAX_TOKENS,
        budget_bytes=GIB,
        group_rank=128,
        compute_capability="8.9",
    )


def config(trial: int) -> TrialConfig:
    target = SETS[trial % 2]
    return TrialConfig(
        rank=(4, 8)[trial % 2],
        lora_alpha=16.0,
        lora_dropout=0.1 * (trial % 2),
        target_set=target.name,
        target_modules=target.modules,
        learning_rate=1e-4,
    )


def estimate(lanes: tuple[LaneShape, ...], *, max_length: int, label_fraction: float = 1.0) -> int:
    """Ask the estimate directly for a pack of this study."""
    request = MemoryRequest(
        quantization="none",
        compute_dtype="bfloat16",
        lanes=lanes,
        micro_batch_size=2,
        max_length=max_length,
        gradient_checkpointing=False,
        gradient_accumulation=True,
        group_rank=128,
        label_fraction=label_fraction,
        compute_capability="8.9",
    )
    return estimate_memory(SHAPE, request).peak_allocated_bytes


def largest(lanes: int) -> int:
    """Predict a pack of the largest configuration of the space."""
    return max(
        estimate(
            (LaneShape(rank=s.max_rank, targets=s.modules, lora_dropout=0.1),) * lanes,
            max_length=MAX_TOKENS,
        )
        for s in SETS
    )


def lock(capacity_bytes: int) -> StudyLock:
    return StudyLock(
        name="calibrated",
        created="2026-01-15T09:30:00+00:00",
        command="lora-tune run study.toml",
        study_file="study.toml",
        spec={},
        spec_sha256="00" * 32,
        model=ModelIdentity(
            base="model",
            hub_id=None,
            revision=None,
            architecture="LlamaForCausalLM",
            model_type="llama",
            num_parameters=1,
            license=None,
            quantization="none",
        ),
        data=DataFingerprint(
            source="rows.jsonl",
            format="text",
            sha256="00" * 32,
            num_train=1,
            num_selection=1,
            num_confirmation=1,
            num_train_tokens=1,
            num_train_labels=1,
            num_bad_rows=0,
            num_duplicates=0,
            num_unlabelled=0,
            num_truncated=0,
            max_tokens=MAX_TOKENS,
            chat_template="none",
        ),
        notes=(),
        versions={},
        hardware={},
        plan=LanePlan(
            compute_dtype="bfloat16",
            device="cuda",
            lanes=8,
            micro_batch_size=2,
            gradient_checkpointing=False,
            group_rank=128,
            budget_bytes=int(capacity_bytes * 0.9),
            capacity_bytes=capacity_bytes,
        ),
        rungs=(10,),
        warmup_steps=1,
        target_sets=SETS,
    )


def peak(allocated: int, *, trials: tuple[int, ...] = (0, 1), **changes: object) -> PackPeak:
    value = PackPeak(
        device="Replay 9000",
        trials=trials,
        steps=10,
        rows=2 * len(trials),
        max_length=96,
        num_labels=100,
        allocated_bytes=allocated,
        reserved_bytes=allocated,
        process_bytes=allocated,
        free_bytes=GIB,
    )
    return replace(value, **changes)


def lane_shapes(*trials: int) -> tuple[LaneShape, ...]:
    return tuple(
        LaneShape(
            rank=config(t).rank,
            targets=config(t).target_modules,
            lora_dropout=config(t).lora_dropout,
        )
        for t in trials
    )


def calibrator(capacity_bytes: int, log: MemoryLog = NO_READINGS) -> Calibrator:
    return Calibrator(gate(), PLAN, lock(capacity_bytes), log=log, config_of=config)


def test_a_reading_stands_beside_the_estimate_of_that_very_pack() -> None:
    found = calibrator(100 * GIB)
    assert found.add([peak(10**8, trials=(0, 1, 2))]) == ""
    [reading] = found.log.readings
    # 6 rows of 96 tokens, of which 100 carry a label
    assert reading.predicted_allocated_bytes == estimate(
        lane_shapes(0, 1, 2), max_length=96, label_fraction=100 / (6 * 96)
    )
    assert reading.predicted_reserved_bytes >= reading.predicted_allocated_bytes
    assert reading.predicted_allocated_bytes < estimate(lane_shapes(0, 1, 2), max_length=MAX_TOKENS)


def test_peaks_within_the_margin_change_nothing() -> None:
    capacity = int(largest(8) / 0.9) + 1  # eight lanes, and not a byte more than the prior's share
    found = calibrator(capacity)
    predicted = estimate(lane_shapes(0, 1), max_length=96, label_fraction=100 / (4 * 96))
    for _ in range(30):
        assert found.add([peak(int(1.1 * predicted))]) == ""  # 0.9 leaves 11.1 %
    assert (found.lanes, found.log.limits) == (8, ())
    assert len(found.log.readings) == 30


def test_a_peak_above_the_margin_lowers_the_lanes_to_what_fits_with_it() -> None:
    capacity = int(largest(8) / 0.9) + 1
    predicted = estimate(lane_shapes(0, 1), max_length=96, label_fraction=100 / (4 * 96))
    found = calibrator(capacity)
    note = found.add([peak(3 * predicted // 2)])
    wanted = max(lanes for lanes in range(1, 9) if 1.5 * largest(lanes) <= capacity)
    assert 1 < wanted < 8
    assert found.lanes == wanted
    [limit] = found.log.limits
    assert (limit.num_readings, limit.lanes_before, limit.lanes) == (1, 8, wanted)
    assert limit.margin == pytest.approx(0.5, abs=1 / predicted)
    assert limit.budget_bytes == pytest.approx(capacity / 1.5, abs=capacity / predicted + 1)
    assert note == (
        f"measured peaks may exceed the estimate by 50.0%: packs have {wanted} lanes from now on "
        "instead of 8."
    )
    assert found.add([peak(3 * predicted // 2)]) == ""  # said once


def test_lanes_are_never_raised_again() -> None:
    capacity = int(largest(8) / 0.9) + 1
    predicted = estimate(lane_shapes(0, 1), max_length=96, label_fraction=100 / (4 * 96))
    found = calibrator(capacity)
    found.add([peak(2 * predicted)])
    lowered = found.lanes
    for _ in range(60):  # the one bad reading is now beyond the quantile
        found.add([peak(predicted)])
    assert found.lanes == lowered < 8


def test_a_pack_that_nothing_fits_still_gets_one_lane() -> None:
    found = calibrator(int(largest(8) / 0.9) + 1)
    found.add([peak(GIB * 50)])
    assert found.lanes == 1


@pytest.mark.parametrize("cut", range(5))
def test_a_resumed_study_decides_as_one_that_went_on(cut: int) -> None:
    capacity = int(largest(8) / 0.9) + 1
    predicted = estimate(lane_shapes(0, 1), max_length=96, label_fraction=100 / (4 * 96))
    peaks = [peak(int(share * predicted)) for share in (1.0, 1.3, 1.2, 1.6, 1.0)]
    whole = calibrator(capacity)
    for value in peaks:
        whole.add([value])
    first = calibrator(capacity)
    for value in peaks[:cut]:
        first.add([value])
    second = calibrator(capacity, log=first.log)
    assert second.lanes == first.lanes
    for value in peaks[cut:]:
        second.add([value])
    assert second.log == whole.log
    assert len(whole.log.limits) == 2


def test_an_older_study_without_a_capacity_is_calibrated_by_its_budget() -> None:
    capacity = int(largest(8) / 0.9) + 1
    predicted = estimate(lane_shapes(0, 1), max_length=96, label_fraction=100 / (4 * 96))
    new, old = calibrator(capacity), calibrator(capacity)
    old.lock = replace(old.lock, plan=replace(old.lock.plan, capacity_bytes=0))
    for found in (new, old):
        found.add([peak(2 * predicted)])
    assert new.lanes == old.lanes
    assert abs(new.log.limits[0].budget_bytes - old.log.limits[0].budget_bytes) <= 1
