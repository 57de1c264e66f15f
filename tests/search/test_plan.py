"""Sizes of a study against hand arithmetic: rungs, seats, trials, seeds, epochs, budgets and forecasts."""

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_tune.errors import StudyFileError
from lora_tune.records import LanePlan, ProbeReading, StudyPlan
from lora_tune.search.evaluation import RungCosts
from lora_tune.search.forecast import (
    PlannedStudy,
    StudySpeed,
    forecast_study,
    measured_speed,
    plan_and_forecast,
    study_tokens,
)
from lora_tune.search.plan import (
    SplitSizes,
    budget_hours,
    confirmation_runs,
    entered_trials,
    full_run_steps,
    plan_study,
    planned_steps,
    rung_steps,
    seats,
    start_steps,
    study_rungs,
)
from lora_tune.study.loader import validate_study
from lora_tune.study.spec import StudySpec


def study(**sections: dict[str, object]) -> StudySpec:
    values: dict[str, object] = {"model": {"base": "m"}, "data": {"train": "rows.jsonl"}}
    return validate_study({**values, **sections}, source=Path("a.toml"))


def splits(rows: int) -> SplitSizes:
    held_out = min(1000, max(8, rows // 10))
    return SplitSizes(train=rows - 2 * held_out, selection=held_out, confirmation=held_out)


def plan_of(rows: int, *, num_anchors: int = 6, **sections: dict[str, object]) -> StudyPlan:
    return plan_study(study(**sections), splits(rows), num_anchors=num_anchors)


# What the data decide.


@pytest.mark.parametrize(
    ("rows", "epochs", "rungs", "trials", "finalists", "seeds"),
    [
        (300, 1, (15,), 6, 2, 2),  # too small for halving: the anchors
        (300, 3, (22, 45), 24, 2, 3),
        (2_000, 1, (25, 50, 100), 24, 2, 2),  # 890 steps of search, 900 with a third seed
        (2_000, 3, (50, 150, 300), 24, 2, 2),
        (20_000, 1, (141, 562, 1125), 24, 2, 2),
        (20_000, 3, (422, 1688, 3375), 24, 2, 2),
    ],
)
def test_a_plan_fits_the_rows_and_the_epochs(
    rows: int, epochs: int, rungs: tuple[int, ...], trials: int, finalists: int, seeds: int
) -> None:
    plan = plan_of(rows, train={"epochs": epochs})
    assert plan.num_train >= 0.8 * rows
    assert plan.rungs == rungs
    assert (plan.num_trials, plan.finalists, plan.seeds) == (trials, finalists, seeds)
    assert plan.anchors_only == (len(rungs) == 1)
    assert any("too small for halving" in note for note in plan.notes) == plan.anchors_only


@given(
    rows=st.integers(24, 200_000),
    epochs=st.sampled_from([0.5, 1.0, 3.0]),
    batch=st.sampled_from([1, 8, 16, 128]),
    anchors=st.integers(0, 8),
)
def test_whatever_the_rows_the_plan_is_sound(
    rows: int, epochs: float, batch: int, anchors: int
) -> None:
    train: dict[str, object] = {"epochs": epochs, "effective_batch_size": batch}
    plan = plan_of(rows, num_anchors=anchors, train=train)
    assert list(plan.rungs) == sorted(set(plan.rungs))
    assert plan.rungs[-1] == plan.total_steps
    assert len(plan.rungs) == 1 or plan.rungs[0] >= 20
    assert plan.search_steps == planned_steps(
        plan.rungs, cooldown_ratio=0.15, num_trials=plan.num_trials
    )
    assert plan.confirmation_steps == (plan.finalists + 1) * plan.seeds * plan.total_steps
    assert plan.confirmation_steps <= plan.search_steps or plan.num_trials < 2
    assert plan.anchors_only == (len(plan.rungs) == 1 and anchors > 0)
    if len(plan.rungs) > 1:  # halving has to save something
        assert plan.search_steps < plan.num_trials * plan.total_steps


def test_a_number_of_trials_counts_also_where_halving_does_not() -> None:
    plan = plan_of(300, search={"trials": 10})
    assert (plan.num_trials, plan.anchors_only, plan.rungs) == (10, False, (15,))
    assert plan.notes[0].endswith("All 10 trials that search.trials asks for train to their end.")
    empty = plan_of(300, num_anchors=0)
    assert (empty.num_trials, empty.anchors_only) == (8, False)
    assert "There are no anchors: 8 trials" in empty.notes[0]


def test_one_rung_that_was_asked_for_is_not_too_small() -> None:
    plan = plan_of(300, search={"rungs": [1.0]})
    assert (plan.rungs, plan.num_trials, plan.anchors_only) == ((15,), 24, False)
    assert not any("halving" in note for note in plan.notes)


def test_held_out_rows_that_were_asked_for_may_leave_few_and_a_note_says_so() -> None:
    spec = study(data={"train": "rows.jsonl", "selection_rows": 300, "confirmation_rows": 300})
    sizes = SplitSizes(train=400, selection=300, confirmation=300)
    [note] = plan_study(spec, sizes, num_anchors=6).notes[:1]
    assert note.startswith("40% of the rows are left for training: data.selection_rows")


def test_a_note_says_when_the_smallest_splits_leave_few_rows() -> None:
    assert (
        plan_of(30).notes[0].startswith("47% of the rows are left for training: the two held-out")
    )
    assert not any("left for training" in note for note in plan_of(80).notes)


# Rungs.


@pytest.mark.parametrize(
    ("shares", "total", "least", "expected"),
    [
        ((0.125, 0.5, 1.0), 800, 50, (100, 400, 800)),
        ((0.125, 0.5, 1.0), 200, 50, (50, 100, 200)),  # the first is made longer
        ((0.125, 0.5, 1.0), 100, 50, (50, 100)),  # and coincides with the second
        ((0.125, 0.5, 1.0), 45, 20, (22, 45)),  # 20 steps are nearly 22: left out
        ((0.125, 0.5, 1.0), 90, 50, (90,)),  # 50 of 90 steps save little
        ((0.5, 0.75, 1.0), 100, 50, (50, 75, 100)),  # long enough as they are
    ],
)
def test_short_rungs_become_one_or_none(
    shares: tuple[float, ...], total: int, least: int, expected: tuple[int, ...]
) -> None:
    assert rung_steps(shares, total_steps=total, min_steps=least) == expected


def test_the_ends_of_the_epochs_are_rungs() -> None:
    spec = study(space={"epochs": [3, 1, 2]})
    assert full_run_steps(spec, 1600) == 300
    # an eighth of 300 is 37, made 50; half of 300 lies behind the first epoch and is no rung
    assert study_rungs(spec, 1600) == (50, 100, 200, 300)
    assert study_rungs(study(space={"epochs": [0.1]}), 1600) == (10,)
    # the user's own ends stay, however near
    assert study_rungs(study(space={"epochs": [0.9, 1.0]}), 1600)[-2:] == (90, 100)


@pytest.mark.parametrize("train", [{"max_steps": 5}, {"epochs": 2.0}])
def test_epochs_are_said_once(train: dict[str, object]) -> None:
    with pytest.raises(StudyFileError, match=r"a.toml: space.epochs and train\.\w+ both say"):
        study(space={"epochs": [1, 2]}, train=train)


def test_a_spec_with_epochs_survives_being_written_down() -> None:
    spec = study(space={"epochs": [1, 2]})
    assert StudySpec.model_validate(spec.model_dump(mode="json")) == spec


# Seats.


@pytest.mark.parametrize(
    ("entered", "expected"),
    [(1, (1, 1)), (2, (2, 2)), (6, (2, 3)), (9, (3, 4)), (24, (6, 8)), (64, (16, 21))],
)
def test_a_quarter_goes_on_and_ties_a_third_more(entered: int, expected: tuple[int, int]) -> None:
    assert seats(entered) == expected


@given(st.integers(0, 500))
def test_there_are_never_more_seats_than_trials(entered: int) -> None:
    nominal, most = seats(entered)
    assert min(entered, 2) <= nominal <= most <= entered
    assert nominal >= entered / 4


def test_the_cost_of_the_default_ladder_is_that_of_the_notes() -> None:
    # 24, 6 and 2 trials at 12.5, 50 and 100 %, a fifth of the steps cooled down and trained again
    rungs = (125, 500, 1000)
    assert entered_trials(24, 3) == (24, 6, 2)
    assert start_steps(rungs, cooldown_ratio=0.2) == (0, 100, 400)
    nominal = planned_steps(rungs, cooldown_ratio=0.2, num_trials=24)
    assert nominal == 24 * 125 + 6 * 400 + 2 * 600
    with_ties = planned_steps(rungs, cooldown_ratio=0.2, num_trials=24, tie_seats=True)
    assert with_ties == 24 * 125 + 8 * 400 + 3 * 600
    assert nominal / 24_000 < 0.28
    assert with_ties / 24_000 < 0.34


# Seeds.


def test_seeds_that_were_asked_for_are_kept_and_their_price_is_said() -> None:
    plan = plan_of(2000, select={"seeds": 8, "finalists": 3})
    assert (plan.seeds, plan.finalists, confirmation_runs(plan)) == (8, 3, 32)
    assert any(
        note == "the confirmation takes 78% of all steps: select.seeds asks for it."
        for note in plan.notes
    )


def test_first_seeds_then_finalists_are_given_up() -> None:
    # 8 trials of 100 steps at rungs 25, 50 and 100: 200 + 2 * 29 + 2 * 58 = 374 steps
    plan = plan_of(2000, search={"trials": 8})
    assert plan.search_steps == 374
    assert (plan.finalists, plan.seeds, plan.confirmation_steps) == (1, 1, 200)
    assert any(note.startswith("1 of 2 finalists is confirmed") for note in plan.notes)
    more = plan_of(2000, search={"trials": 12})  # 300 + 3 * 29 + 2 * 58
    assert (more.search_steps, more.finalists, more.seeds) == (503, 1, 2)


# A budget.

SPEED = StudySpeed(readings=((1, 1000.0),), lanes=1, row_tokens=50.0, measured=True)


def hours_of(hours: float, **sections: dict[str, object]) -> StudyPlan:
    search = {"max_hours": hours, **sections.pop("search", {})}
    planned = plan_and_forecast(
        study(search=search, **sections),
        splits(2000),
        num_anchors=6,
        gradient_checkpointing=False,
        speed=SPEED,
    )
    assert planned.forecast is not None
    fits = planned.forecast.total_s <= 3600 * hours
    assert fits == (not any("the budget is less" in note for note in planned.plan.notes))
    return planned.plan


def test_a_budget_decides_the_trials_confirmation_included() -> None:
    # 16 rows of 50 tokens at 1,000 tokens/s: 0.8 s a step; 24 trials and 9 runs of 100 steps: 0.4 h
    trials = [hours_of(hours).num_trials for hours in (0.1, 0.2, 0.3, 0.5, 0.8, 4.0)]
    assert trials == sorted(trials)
    assert (trials[0], trials[-1]) == (8, 64)
    assert 8 < trials[2] < 64


def test_the_trials_are_the_most_that_the_budget_pays_for() -> None:
    plan = hours_of(0.4)
    spec = study(search={"trials": plan.num_trials + 1, "max_hours": 0.4})
    more = plan_and_forecast(
        spec, splits(2000), num_anchors=6, gradient_checkpointing=False, speed=SPEED
    )
    assert any("the budget is less than the plan needs" in note for note in more.plan.notes)


def test_before_the_speed_is_known_a_note_says_that_the_budget_will_decide() -> None:
    def said(rows: int, speed: StudySpeed | None, **search: object) -> bool:
        planned = plan_and_forecast(
            study(search=search),
            splits(rows),
            num_anchors=6,
            gradient_checkpointing=False,
            speed=speed,
        )
        return any(note.startswith("search.trials is auto: 8 to 64") for note in planned.notes)

    assert said(2000, None, max_hours=1.0)
    assert said(2000, None, max_gpu_hours=1.0)
    assert not said(2000, SPEED, max_hours=1.0)
    assert not said(2000, None, max_hours=1.0, trials=12)
    assert not said(2000, None)
    assert not said(300, None, max_hours=1.0)  # only the anchors


def test_gpu_hours_are_shared_by_the_gpus() -> None:
    spec = study(search={"max_gpu_hours": 8.0, "max_hours": 3.0})
    assert budget_hours(spec) == 3.0
    assert budget_hours(spec, num_devices=4) == 2.0
    assert budget_hours(study()) is None


# A forecast.


def test_a_forecast_is_the_sum_of_its_passes() -> None:
    plan = replace(plan_of(2000), num_trials=4, rungs=(25, 100), total_steps=100, seeds=2)
    costs = RungCosts(
        rungs=plan.rungs, cooldown_ratio=0.2, effective_batch_size=16, gradient_checkpointing=False
    )
    speed = StudySpeed(
        readings=((1, 500.0), (2, 800.0)), lanes=2, row_tokens=50.0, measured=True, load_s=7.0
    )
    forecast = forecast_study(plan, costs, eval_rows=(40, 80), speed=speed)
    step = 16 * 50.0
    # 4 trials of 25 steps in two packs, then 2 of 80 in one: all full
    assert forecast.search_s == pytest.approx((4 * 25 + 2 * 80) * step / 800)
    # a row evaluated is one of the two passes of a row trained
    assert forecast.evaluation_s == pytest.approx((4 * 40 + 2 * 80) * 50.0 / (800 * 2))
    # 2 finalists and the default, 2 seeds: 6 runs; evaluated with the untuned base on 200 rows
    assert forecast.confirmation_s == pytest.approx(6 * 100 * step / 800 + 7 * 200 * 50 / 1600)
    assert (forecast.tokens_per_s, forecast.load_s) == (800.0, 7.0)
    assert forecast.total_s == pytest.approx(
        forecast.search_s + forecast.evaluation_s + forecast.confirmation_s + 7
    )


def test_a_training_on_all_rows_is_part_of_the_forecast() -> None:
    def planned(**select: object) -> PlannedStudy:
        return plan_and_forecast(
            study(select=select, search={"trials": 24}),
            splits(2000),
            num_anchors=6,
            gradient_checkpointing=False,
            speed=SPEED,
        )

    without, with_refit = planned(), planned(refit="all-rows")
    assert without.forecast is not None
    assert with_refit.forecast is not None
    # 100 steps see the 1,600 training rows once; 2,000 rows take 125 steps, of 0.8 s
    more_s = with_refit.forecast.confirmation_s - without.forecast.confirmation_s
    assert more_s == pytest.approx(125 * 0.8)
    assert with_refit.notes[-1].startswith("select.refit: one more run of up to 125 steps")
    assert not any("select.refit" in note for note in without.notes)


def test_a_pack_that_is_not_full_is_as_fast_as_its_lanes() -> None:
    speed = StudySpeed(
        readings=((1, 100.0), (2, 160.0), (4, 240.0)), lanes=4, row_tokens=1.0, measured=True
    )
    assert speed.training_s(8, 240.0) == pytest.approx(8.0)  # two full packs of 4 x 240 tokens
    assert speed.training_s(6, 240.0) == pytest.approx(4.0 + 2 * 240 / 160)


def reading(lanes: int, rows: int, dtype: str, tokens_per_s: float) -> ProbeReading:
    return ProbeReading(
        lanes=lanes,
        micro_batch_size=rows,
        compute_dtype=dtype,
        tokens_per_s=tokens_per_s,
        peak_bytes=None,
    )


LANES = LanePlan(
    compute_dtype="bfloat16",
    device="cpu",
    lanes=4,
    micro_batch_size=8,
    gradient_checkpointing=False,
    budget_bytes=1,
    probe_readings=(
        reading(1, 4, "bfloat16", 120.0),
        reading(1, 4, "float32", 100.0),
        reading(1, 8, "bfloat16", 150.0),
        reading(4, 8, "bfloat16", 200.0),
    ),
)


def test_the_speed_is_that_of_the_readings_nearest_to_the_plan() -> None:
    speed = measured_speed(LANES, row_tokens=50.0, confirmed_in_float32=True, load_s=1.0)
    assert speed is not None
    assert speed.readings == ((1, 150.0), (4, 200.0))
    assert speed.confirmation_slowdown == pytest.approx(1.2)  # the same rows in both types
    bare = replace(LANES, probe_readings=LANES.probe_readings[2:])
    unknown = measured_speed(bare, row_tokens=50.0, confirmed_in_float32=True, load_s=1.0)
    assert unknown is not None
    assert unknown.confirmation_slowdown == 2.0
    nothing = replace(LANES, probe_readings=())
    assert measured_speed(nothing, row_tokens=50, confirmed_in_float32=False, load_s=0) is None


# Tokens from the file alone.


@given(
    trials=st.integers(1, 200),
    max_steps=st.integers(1, 3000),
    cooldown=st.floats(0, 0.9),
    rungs=st.sampled_from([(1.0,), (0.125, 0.5, 1.0), (0.1, 0.2, 0.3, 1.0)]),
)
def test_the_tokens_of_a_file_are_those_of_its_plan(
    trials: int, max_steps: int, cooldown: float, rungs: tuple[float, ...]
) -> None:
    spec = study(
        search={"trials": trials, "rungs": rungs},
        train={"max_steps": max_steps, "cooldown_ratio": cooldown, "effective_batch_size": 8},
        data={"train": "rows.jsonl", "max_length": 512},
    )
    found = study_tokens(spec)
    assert found.steps == plan_study(spec, splits(2000), num_anchors=6).search_steps
    assert found.tokens == found.steps * 8 * 512


def test_a_study_in_epochs_needs_the_number_of_rows() -> None:
    spec = study(train={"epochs": 2.0, "effective_batch_size": 16})
    found = study_tokens(spec, num_train_rows=8000)
    assert found.steps == 24 * 125 + 6 * (500 - 106) + 2 * (1000 - 425)
    assert found.note.startswith(f"upper bound: {found.steps} optimizer steps of all trials")
    with pytest.raises(StudyFileError, match=r"train.max_steps is not set.*--tokens"):
        study_tokens(spec)
