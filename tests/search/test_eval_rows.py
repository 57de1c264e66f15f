"""How many selection rows a rung is evaluated on, and how long a study is: arithmetic by hand."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from table_study import Disk, TableExecutor, drive, make_ladder, new_study

from lora_tune.search.evaluation import MIN_EVAL_ROWS, RungCosts
from lora_tune.search.plan import planned_steps

QUICKSTART = RungCosts(
    rungs=(6, 24), cooldown_ratio=0.2, effective_batch_size=8, gradient_checkpointing=False
)


@pytest.mark.parametrize(
    ("changes", "selection_rows", "whole_at_last", "wanted"),
    [
        ({}, 64, True, (19, 64)),  # 6 steps of 8 rows, twice forward's cost, a fifth: 19.2
        ({}, 64, False, (19, 60)),  # from step 5: 19 steps of 8 rows: 60.8
        ({"gradient_checkpointing": True}, 64, True, (28, 64)),  # three times: 28.8
        ({}, 12, True, (12, 12)),
        ({"effective_batch_size": 2}, 64, True, (8, 64)),  # 4.8, but never fewer than 8
        ({"effective_batch_size": 2}, 64, False, (8, 15)),
        ({"rungs": (100, 400, 800)}, 1000, True, (320, 1000, 1000)),
        ({"rungs": (24,)}, 64, True, (64,)),
    ],
)
def test_rows_cost_a_fifth_of_the_rung_or_are_eight_or_were_asked_for(
    changes: dict[str, Any], selection_rows: int, whole_at_last: bool, wanted: tuple[int, ...]
) -> None:
    costs = replace(QUICKSTART, **changes)
    assert costs.eval_rows(selection_rows, whole_at_last=whole_at_last) == wanted


@given(
    costs=st.builds(
        RungCosts,
        rungs=st.sets(st.integers(1, 2000), min_size=1, max_size=4).map(
            lambda ends: tuple(sorted(ends))
        ),
        cooldown_ratio=st.floats(0, 0.9),
        effective_batch_size=st.integers(1, 64),
        gradient_checkpointing=st.booleans(),
    ),
    selection_rows=st.integers(8, 1000),
)
def test_evaluation_never_costs_more_than_a_fifth_of_a_rung_beyond_the_least_rows(
    costs: RungCosts, selection_rows: int
) -> None:
    found = costs.eval_rows(selection_rows, whole_at_last=False)
    for rung, rows in enumerate(found):
        assert MIN_EVAL_ROWS <= rows <= selection_rows
        assert rows == MIN_EVAL_ROWS or costs.eval_share(rung, rows) <= 0.2 * (1 + 1e-9)
        assert rows == selection_rows or costs.eval_share(rung, rows + 1) > 0.2


def test_notes_say_what_is_used_and_what_is_dear() -> None:
    assert QUICKSTART.notes((19, 64), 64) == (
        "of 64 selection rows 19 at rung 0, 64 at rung 1: evaluation may cost 20% of a rung's training.",
        "rung 1: evaluation on 64 rows costs 21% of its 19 steps; data.selection_rows asks for them.",
    )
    few = replace(QUICKSTART, effective_batch_size=2)
    assert few.notes((8, 8), 8) == (
        "rung 0: evaluation on 8 rows costs 33% of its 6 steps; fewer would say too little.",
    )
    assert replace(QUICKSTART, rungs=(400, 800)).notes((64, 64), 64) == ()


def test_the_planned_steps_are_those_that_a_study_without_faults_trains() -> None:
    ladder = make_ladder(new_study(), Disk(), num_trials=8, rungs=(100, 400, 800), num_anchors=3)
    assert ladder.planned_steps() == 8 * 100 + 2 * (400 - 80) + 2 * (800 - 320)
    assert ladder.planned_steps() == planned_steps(
        (100, 400, 800), cooldown_ratio=0.2, num_trials=8
    )


def test_every_job_of_a_rung_is_evaluated_on_the_same_rows() -> None:
    ladder = make_ladder(new_study(), Disk(), num_trials=12, rungs=(10, 40, 80))
    ladder.plan = replace(ladder.plan, eval_rows=(3, 5, 9))
    executor = TableExecutor()
    drive(ladder, executor)
    assert {(job.rung, job.eval_rows) for job in executor.trained} == {(0, 3), (1, 5), (2, 9)}


def test_a_study_of_an_older_version_is_evaluated_on_all_rows() -> None:
    ladder = make_ladder(new_study(), Disk(), num_trials=2, rungs=(10,))
    executor = TableExecutor()
    drive(ladder, executor)
    assert {job.eval_rows for job in executor.trained} == {None}
