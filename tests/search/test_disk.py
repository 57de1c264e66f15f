"""What a study writes, counted by hand for a small plan, and refused where it does not fit."""

from dataclasses import replace
from pathlib import Path

import pytest
from study_records import study_lock

from lora_tune.errors import DiskFullError
from lora_tune.files import RESERVE_BYTES, free_bytes
from lora_tune.records import StudyLock, StudyPlan, TargetSet
from lora_tune.search.disk import check_study_room, study_bytes
from lora_tune.study.loader import validate_study
from lora_tune.study.spec import StudySpec


def spec() -> StudySpec:
    values = {
        "model": {"base": "m"},
        "data": {"train": "rows.jsonl"},
        "space": {"rank": [4, 16]},
        "select": {"refit": "none"},
    }
    return validate_study(values, source=Path("study.toml"))


def lock(parameters_per_rank: int) -> StudyLock:
    target = TargetSet(
        name="attention",
        modules=("q_proj",),
        max_rank=16,
        trainable_parameters_per_rank=parameters_per_rank,
    )
    plan = StudyPlan(
        num_train=1000,
        num_selection=50,
        num_confirmation=50,
        total_steps=40,
        rungs=(10, 40),
        num_trials=8,
        finalists=2,
        seeds=2,
        search_steps=140,
        confirmation_steps=240,
    )
    return replace(study_lock("study"), study_plan=plan, target_sets=(target,))


def test_adapters_and_lane_states_are_counted() -> None:
    study = lock(1000)
    assert study.study_plan is not None
    found = study_bytes(spec(), study.target_sets, study.study_plan, (), lanes=4)
    adapters = 8 + 2 + (2 + 1) * 2 + 1  # of two rungs, of the confirmation, the winner's copy
    with_a_tie = adapters + 1
    assert found.least == 4 * 1000 * (adapters * 4 + 8 * 12)
    assert found.most == 16 * 1000 * (with_a_tie * 4 + (8 + 4 * 5) * 12)
    assert found.least < found.about < found.most


def test_a_disk_that_cannot_hold_the_smallest_adapters_is_refused(tmp_path: Path) -> None:
    free = free_bytes(tmp_path)
    check_study_room(tmp_path, spec(), lock(1000))
    with pytest.raises(DiskFullError, match="are to be written"):
        check_study_room(tmp_path, spec(), lock(free // 500))


def test_what_is_there_already_counts(tmp_path: Path) -> None:
    study = lock(
        (free_bytes(tmp_path) - RESERVE_BYTES) // 656 + 2_000_000
    )  # 656 bytes of one parameter
    with pytest.raises(DiskFullError):
        check_study_room(tmp_path, spec(), study)
    with (tmp_path / "adapter").open("wb") as stream:
        stream.truncate(4 << 30)  # a hole: it takes no room
    check_study_room(tmp_path, spec(), study)


def test_a_study_of_an_older_version_is_not_refused(tmp_path: Path) -> None:
    check_study_room(tmp_path, spec(), replace(lock(1 << 50), study_plan=None))
