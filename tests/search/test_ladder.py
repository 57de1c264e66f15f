"""The ladder with real Optuna on a table of losses: what is tried, cached, promoted, told and kept.

The strongest tests run a study as a whole and compare its final table: results in another order, other
slots, and a process killed at any point must not change it. The choice of a rung alone: test_promotion.
"""

import math
import random
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from table_study import (
    BUDGET_BYTES,
    FIRST_POINT,
    SEED,
    Disk,
    Killed,
    TableExecutor,
    drive,
    early,
    in_order,
    make_ladder,
    make_space,
    needed_bytes,
    new_study,
    optuna_table,
    predict,
    run_study,
    suggestion,
    target_sets,
    trained,
)

from lora_tune.errors import AllTrialsFailedError
from lora_tune.records import (
    LaneJob,
    LaneOutcome,
    LaneSpan,
    Point,
    RungResult,
    SuggestedParams,
    TrialRecord,
    TrialState,
)
from lora_tune.search.anchors import Anchor, make_anchors
from lora_tune.search.fail_fast import loss_limits
from lora_tune.search.ladder import (
    FALLBACK_PENALTY,
    LAST_REPEAT,
    MOST_REPEATS,
    Ladder,
    num_counted,
)
from lora_tune.search.plan import rung_steps, seats
from lora_tune.search.promotion import HALF_STEP
from lora_tune.search.proposals import Proposer
from lora_tune.search.space import SearchSpace, describe, training_key
from lora_tune.store.database import open_optuna_study
from lora_tune.study.spec import SpaceSection

OPTUNA = optuna.trial.TrialState
ENDED = (TrialState.DIVERGED, TrialState.INFEASIBLE, TrialState.FAILED)
FIVE = {"rank_index", "alpha_ratio_index", "dropout_index", "target_set_index", "effective_step"}


# The step is fixed, so configurations come again.
COARSE: dict[str, object] = {
    "space": make_space(
        rank=[8, 16], alpha_ratio=[1, 2], lora_dropout=[0, 0.05], learning_rate=[2e-4, 2e-4]
    )
}


@pytest.fixture(scope="module", params=[{}, COARSE], ids=["wide", "coarse"])
def finished(request: pytest.FixtureRequest) -> tuple[optuna.Study, list[TrialRecord]]:
    """A finished study of 40 trials; in both together every fate occurs."""
    study, disk = new_study(), Disk()
    run_study(study, disk, num_trials=40, num_anchors=6, window=4, **request.param)
    return study, in_order(disk.records.values())


def test_the_table_has_every_fate() -> None:
    records: list[TrialRecord] = []
    for keys in ({}, COARSE):
        disk = Disk()
        run_study(new_study(), disk, num_trials=40, num_anchors=6, window=4, **keys)
        records += disk.records.values()
    assert {record.state for record in records} == set(TrialState) - {TrialState.RUNNING}
    assert any(r.config.rank < r.suggested.rank for r in records)
    assert any(r.reason == "above the limit" for r in records)


def test_every_trial_of_optuna_s_has_all_parameters_and_the_memory_constraint(
    finished: tuple[optuna.Study, list[TrialRecord]],
) -> None:
    study, records = finished
    trials = study.get_trials()
    assert [trial.number for trial in trials] == [record.number for record in records]
    for trial, record in zip(trials, records, strict=True):
        assert trial.params.keys() == FIVE
        assert trial.params["effective_step"] == record.suggested.effective_step
        assert trial.user_attrs["rank"] == record.suggested.rank
        [excess] = trial.constraints.values()
        if record.state is TrialState.INFEASIBLE:
            assert excess > 0
        else:
            assert excess == record.predicted_bytes - BUDGET_BYTES <= 0


def test_what_is_trained_fits_and_has_the_step_that_was_suggested(
    finished: tuple[optuna.Study, list[TrialRecord]],
) -> None:
    _, records = finished
    for record in records:
        config, suggested = record.config, record.suggested
        assert config.learning_rate * config.lora_alpha / 32 == pytest.approx(
            suggested.effective_step, rel=1e-14
        )
        assert suggested.alpha_ratio is not None
        assert config.lora_alpha == suggested.alpha_ratio * config.rank
        assert predict(config) == (record.predicted_bytes, record.trainable_parameters)
        fits = needed_bytes(suggested.rank, len(config.target_modules)) <= BUDGET_BYTES
        assert (config.rank == suggested.rank) == fits


def test_states_and_values_are_told_in_optuna_s_words(
    finished: tuple[optuna.Study, list[TrialRecord]],
) -> None:
    study, records = finished
    told = {
        TrialState.COMPLETE: OPTUNA.COMPLETE,
        TrialState.PRUNED: OPTUNA.COMPLETE,  # its rung-0 loss is a result like any other
        TrialState.DIVERGED: OPTUNA.PRUNED,
        TrialState.INFEASIBLE: OPTUNA.PRUNED,
        TrialState.FAILED: OPTUNA.FAIL,
    }
    for trial, record in zip(study.get_trials(), records, strict=True):
        source = record if record.repeats is None else records[record.repeats]
        if source.rungs:
            assert trial.state is OPTUNA.COMPLETE
            assert trial.value == source.rungs[0].eval_loss
            assert record.penalty is None
        else:
            assert trial.state is told[source.state]
            assert trial.value == record.penalty == source.penalty
        if source.state is TrialState.FAILED:
            assert record.penalty is None  # nothing was told of it
        assert trial.value is None or math.isfinite(trial.value)


def test_a_penalty_is_a_tenth_above_the_worst_loss_known_when_it_is_told() -> None:
    disk = Disk()
    run_study(new_study(), disk, num_trials=40, num_anchors=6, window=4)
    records, checked = in_order(disk.records.values()), 0
    for record in records:
        if record.state not in (TrialState.DIVERGED, TrialState.INFEASIBLE) or record.rungs:
            continue
        # nothing is told before trial 6, the sampler's first, is proposed from trials 0 to 2
        known = records[: max(record.number, 2) + 1]
        losses = [other.rungs[0].eval_loss for other in known if other.rungs]
        if record.first_loss is not None and math.isfinite(record.first_loss):
            losses.append(record.first_loss)
        assert record.penalty == pytest.approx(1.1 * max(losses))
        checked += 1
    assert checked


def test_anchors_come_first_and_the_sampler_after_them() -> None:
    disk = Disk()
    run_study(new_study(), disk, num_trials=20, num_anchors=6, half_step=False)
    origins = [record.origin for record in in_order(disk.records.values())]
    assert origins[:6] == [f"anchor A{number}" for number in range(1, 7)]
    assert origins[6:11] == ["tpe"] * 5
    assert len(origins) == 20


def test_seats_are_filled_rung_by_rung_and_the_others_are_pruned(
    finished: tuple[optuna.Study, list[TrialRecord]],
) -> None:
    _, records = finished
    for rung in (1, 2):
        able = [r for r in records if len(r.rungs) >= rung]
        went_on = [r for r in able if len(r.rungs) > rung]
        stayed = [r for r in able if len(r.rungs) == rung and r.state not in ENDED]
        nominal, cap = seats(len(able))
        assert nominal <= len(went_on) <= cap
        best = sorted(able, key=lambda r: r.rungs[rung - 1].eval_loss)[:nominal]
        assert all(record in went_on for record in best)
        assert all(r.state is TrialState.PRUNED for r in stayed)


def test_segments_follow_each_other_without_a_gap() -> None:
    executor = TableExecutor()
    ladder = make_ladder(new_study(), Disk())
    drive(ladder, executor)
    assert any(ladder.records[job.trial].origin == HALF_STEP for job in executor.trained)
    by_trial: dict[int, list[LaneJob]] = {}
    for job in executor.trained:
        by_trial.setdefault(job.trial, []).append(job)
    assert max(len(jobs) for jobs in by_trial.values()) == 3
    for number, jobs in by_trial.items():
        held, folder = 0, None
        for rung, job in enumerate(jobs):
            assert (job.rung, job.start_step, job.start_folder) == (rung, held, folder)
            assert job.start_step <= job.hold_step <= job.end_step
            assert job.end_step == ladder.plan.rungs[rung]
            held, folder = job.hold_step, job.result_folder
            assert folder == Path("trials") / f"{number:04d}" / f"rung-{rung}"


# The same study, whatever the order in which results come back and whatever kills the process.


class Undisturbed(NamedTuple):
    """Records, Optuna's table and finalists of a study in which nothing happened, and its keys."""

    records: list[TrialRecord]
    table: list[tuple[object, ...]]
    finalists: list[TrialRecord]
    keys: dict[str, object]


@pytest.fixture(scope="module", params=[{}, COARSE], ids=["wide", "coarse"])
def undisturbed(request: pytest.FixtureRequest) -> Undisturbed:
    study, disk = new_study(), Disk()
    finalists = run_study(study, disk, **request.param)
    return Undisturbed(
        in_order(disk.records.values()), optuna_table(study), finalists, request.param
    )


def assert_same(
    study: optuna.Study, disk: Disk, finalists: list[TrialRecord], wanted: Undisturbed
) -> None:
    assert in_order(disk.records.values()) == wanted.records
    assert optuna_table(study) == wanted.table
    assert finalists == wanted.finalists


def test_the_undisturbed_studies_are_worth_comparing() -> None:
    wide, coarse = Disk(), Disk()
    run_study(new_study(), wide)
    finalists = run_study(new_study(), coarse, **COARSE)
    assert {r.state for r in wide.records.values()} >= {
        TrialState.COMPLETE,
        TrialState.PRUNED,
        TrialState.DIVERGED,
        TrialState.FAILED,
    }
    assert HALF_STEP in [record.origin for record in wide.records.values()]
    assert TrialState.CACHED in [record.state for record in coarse.records.values()]
    assert all(len(record.rungs) == 3 for record in finalists)


@settings(max_examples=40, deadline=None)
@given(order=st.integers(0, 2**32), slots=st.integers(1, 9))
def test_neither_the_order_of_results_nor_the_free_slots_change_the_study(
    undisturbed: Undisturbed, order: int, slots: int
) -> None:
    study, disk = new_study(), Disk()
    ladder = make_ladder(study, disk, **undisturbed.keys)  # type: ignore[arg-type]
    drive(ladder, TableExecutor(slots, arrivals=random.Random(order)))
    assert_same(study, disk, ladder.finalists(2), undisturbed)


def test_another_seed_is_another_study(undisturbed: Undisturbed) -> None:
    disk = Disk()
    run_study(new_study(), disk, **{**undisturbed.keys, "seed": 99})
    assert in_order(disk.records.values()) != undisturbed.records


@pytest.fixture(scope="module")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with Optuna's tables and nothing in them: making one takes most of a second."""
    path = tmp_path_factory.mktemp("empty") / "study.db"
    study = open_optuna_study(path, name="table", num_records=0)
    study._storage._backend.engine.dispose()  # type: ignore[attr-defined]
    return path


def test_a_study_on_sqlite_is_the_study_in_memory(
    tmp_path: Path, empty_database: Path, undisturbed: Undisturbed
) -> None:
    shutil.copy(empty_database, tmp_path / "study.db")
    study, disk = open_optuna_study(tmp_path / "study.db", name="table", num_records=0), Disk()
    assert_same(study, disk, run_study(study, disk, **undisturbed.keys), undisturbed)


def test_a_study_killed_after_any_result_ends_in_the_same_table(
    tmp_path: Path, empty_database: Path, undisturbed: Undisturbed
) -> None:
    """Every process takes one result and is gone; the next finds database and records alone."""
    path = tmp_path / "study.db"
    shutil.copy(empty_database, path)
    disk, processes, ended = Disk(), 0, False
    while not ended:
        study = open_optuna_study(path, name="table", num_records=len(disk.records))
        ladder = make_ladder(study, disk, **undisturbed.keys)  # type: ignore[arg-type]
        ended = drive(ladder, TableExecutor(), most_takes=1)
        processes += 1
    trained = [record for record in undisturbed.records if record.repeats is None]
    results = sum(len(r.rungs) + (r.state in ENDED) for r in trained)
    assert processes == results
    assert_same(study, disk, ladder.finalists(2), undisturbed)


def test_a_study_killed_once_after_each_number_of_results_ends_in_the_same_table(
    undisturbed: Undisturbed,
) -> None:
    takes, ended, keys = 0, False, undisturbed.keys
    while not ended:
        storage, disk = optuna.storages.InMemoryStorage(), Disk()
        ladder = make_ladder(new_study(storage), disk, **keys)  # type: ignore[arg-type]
        ended = drive(ladder, TableExecutor(), most_takes=takes)
        finalists = run_study(new_study(storage), disk, **keys)
        assert_same(new_study(storage), disk, finalists, undisturbed)
        takes += 1
    assert takes > 12


def test_a_study_killed_before_any_record_is_written_ends_in_the_same_table(
    undisturbed: Undisturbed,
) -> None:
    """Also between a proposal that Optuna has stored and the record of it."""
    write, killed = 0, True
    while killed:
        storage, disk = optuna.storages.InMemoryStorage(), Disk()
        disk.killed_at = write
        try:
            run_study(new_study(storage), disk, **undisturbed.keys)
            killed = False
        except Killed:
            disk.killed_at = None
        finalists = run_study(new_study(storage), disk, **undisturbed.keys)
        assert_same(new_study(storage), disk, finalists, undisturbed)
        write += 1
    assert write > 24  # proposals and results of twelve trials at the least


def test_results_of_two_lanes_that_were_in_flight_are_trained_again() -> None:
    storage, disk = optuna.storages.InMemoryStorage(), Disk()
    jobs = make_ladder(new_study(storage), disk).next_jobs(3)
    again = make_ladder(new_study(storage), disk).next_jobs(3)
    assert again == jobs


# Promotion, budget and extension.


def fate_by_trial(
    losses: dict[int, list[float | TrialState]],
) -> Callable[[LaneJob], LaneOutcome]:
    """Return fates that are given trial by trial, one per rung."""

    def fate(job: LaneJob) -> LaneOutcome:
        told = losses[job.trial][job.rung]
        if isinstance(told, TrialState):
            return early(job, told, "told to")
        return trained(job, told)

    return fate


def run_fates(
    losses: dict[int, list[float | TrialState]], **keys: object
) -> tuple[optuna.Study, list[TrialRecord], list[TrialRecord]]:
    study, disk = new_study(), Disk()
    keys = {"num_trials": len(losses), "half_step": False, **keys}
    ladder = make_ladder(study, disk, **keys)  # type: ignore[arg-type]
    drive(ladder, TableExecutor(fate=fate_by_trial(losses)))
    finalists = ladder.finalists(1)
    return study, in_order(disk.records.values()), finalists


def test_a_promoted_trial_that_diverges_makes_room_for_the_next() -> None:
    diverged = TrialState.DIVERGED
    losses: dict[int, list[float | TrialState]] = {
        0: [2.0, diverged],
        1: [2.1, diverged],
        2: [2.2, 1.9],
        3: [2.3, 1.5],
        **{number: [3.0 + number, 3.0] for number in range(4, 8)},
    }
    study, records, finalists = run_fates(losses, rungs=(10, 20))
    assert [len(record.rungs) for record in records] == [1, 1, 2, 2, 1, 1, 1, 1]
    assert [record.state for record in records[:4]] == [diverged] * 2 + [TrialState.COMPLETE] * 2
    assert [record.number for record in finalists] == [3]
    # Optuna was told of rung 0, where both did well, and is not told a second time
    assert study.get_trials()[0].state is OPTUNA.COMPLETE
    assert study.get_trials()[0].value == pytest.approx(2.0)
    assert records[0].penalty is None


def test_trials_that_cannot_be_told_apart_go_on_together_up_to_the_cap() -> None:
    _, records, _ = run_fates({number: [2.0, 1.9] for number in range(4)}, rungs=(10, 20))
    # two seats, and one more for a tie, which the cheapest takes
    assert [len(record.rungs) for record in records] == [2, 2, 1, 2]
    assert records[3].config.rank < records[2].config.rank


@pytest.mark.parametrize("slots", [1, 2, 6])
def test_a_penalty_does_not_know_what_later_anchors_showed(slots: int) -> None:
    # anchors 3 to 5 are trained before trial 0 is told, and then only trials 0 to 4 count
    losses: dict[int, list[float | TrialState]] = {
        0: [TrialState.DIVERGED],
        1: [2.0],
        **{number: [2.0 + number] for number in range(2, 6)},
    }
    study = new_study()
    ladder = make_ladder(study, Disk(), num_trials=6, num_anchors=6, window=2, rungs=(10,))
    executor = TableExecutor(slots, fate=fate_by_trial(losses))
    last_first: list[int] = []
    while True:
        for job in ladder.next_jobs(executor.free_slots):
            executor.submit(job)
        if not executor.busy:
            break
        executor.jobs.sort(key=lambda job: -job.trial)
        [outcome] = executor.wait()
        last_first.append(outcome.trial)
        ladder.take(outcome)
    assert sorted(last_first) == list(range(6))
    if slots > 1:  # the first anchor ended last
        assert last_first[-1] == 0
    assert study.get_trials()[0].value == pytest.approx(1.1 * 6.0)


def test_with_no_finite_loss_the_penalty_is_the_fallback() -> None:
    study, disk = new_study(), Disk()
    ladder = make_ladder(study, disk, num_trials=4)
    infeasible = TrialState.INFEASIBLE
    drive(ladder, TableExecutor(fate=lambda job: early(job, infeasible, "out of memory")))
    assert [trial.value for trial in study.get_trials()] == [FALLBACK_PENALTY] * 4
    assert all(trial.state is OPTUNA.PRUNED for trial in study.get_trials())
    assert all(excess > 0 for t in study.get_trials() for excess in t.constraints.values())
    with pytest.raises(
        AllTrialsFailedError, match=r"none of the 4 trials.*out of memory"
    ) as caught:
        ladder.finalists(2)
    assert "Lower space.learning_rate" in str(caught.value)
    assert caught.value.exit_code == 6


def test_out_of_time_begins_no_trial_but_promotes_what_is_there() -> None:
    study, disk = new_study(), Disk()
    late = False
    ladder = make_ladder(study, disk, rungs=(10, 20), out_of_time=lambda: late)
    executor = TableExecutor()
    assert not drive(ladder, executor, most_takes=4)
    late = True
    begun = len(disk.records)
    ladder = make_ladder(study, disk, rungs=(10, 20), out_of_time=lambda: late)
    assert drive(ladder, executor := TableExecutor())
    assert len(disk.records) == begun < 12
    assert {job.rung for job in executor.trained} == {0, 1}
    assert ladder.finalists(1)[0].state is TrialState.COMPLETE


def test_a_study_without_any_time_still_trains_one_trial() -> None:
    disk = Disk()
    run_study(new_study(), disk, out_of_time=lambda: True, rungs=(10, 20))
    [record] = disk.records.values()
    assert record.state is TrialState.COMPLETE


def test_the_number_of_trials_is_a_total() -> None:
    study, disk = new_study(), Disk()
    run_study(study, disk, num_trials=5)
    before = dict(disk.records)
    executor = TableExecutor()
    ladder = make_ladder(study, disk, num_trials=5)
    assert drive(ladder, executor)
    assert executor.trained == []  # a finished study has nothing to do
    finalists = run_study(study, disk, num_trials=12)
    assert num_counted(disk.records.values()) == 12
    assert all(len(record.rungs) == 3 for record in finalists)
    for number, record in before.items():  # what was done is kept, and may go on
        now = disk.records[number]
        assert (now.config, now.rungs[: len(record.rungs)]) == (record.config, record.rungs)
    assert all(trial.state.is_finished() for trial in study.get_trials())


def test_an_extended_study_killed_after_any_result_ends_in_the_same_table() -> None:
    def begun() -> tuple[optuna.storages.InMemoryStorage, Disk]:
        storage, disk = optuna.storages.InMemoryStorage(), Disk()
        run_study(new_study(storage), disk, num_trials=5)
        return storage, disk

    storage, disk = begun()
    run_study(new_study(storage), disk)
    wanted, table = in_order(disk.records.values()), optuna_table(new_study(storage))
    takes, ended = 0, False
    while not ended:
        storage, disk = begun()
        ended = drive(make_ladder(new_study(storage), disk), TableExecutor(), most_takes=takes)
        run_study(new_study(storage), disk)
        assert in_order(disk.records.values()) == wanted
        assert optuna_table(new_study(storage)) == table
        takes += 1


def test_a_trial_that_was_not_promoted_is_no_finalist() -> None:
    losses: dict[int, list[float | TrialState]] = {
        n: [2.0 + n / 10, 2.5 - n / 10] for n in range(4)
    }
    _, records, finalists = run_fates(losses, rungs=(10, 20))
    assert [record.number for record in finalists] == [0]
    assert [r.state for r in records] == [TrialState.COMPLETE] * 2 + [TrialState.PRUNED] * 2


def test_planned_and_finished_steps_meet_at_the_end() -> None:
    ladder = make_ladder(
        new_study(), Disk(), num_trials=8, rungs=(10, 20), num_anchors=0, half_step=False
    )
    mild: dict[int, list[float | TrialState]] = {n: [2.0 + n, 1.5 + n] for n in range(8)}
    assert ladder.finished_steps() == 0
    assert ladder.planned_steps() == 8 * 10 + 2 * (20 - 8)  # rung 1 goes on from the held step 8
    drive(ladder, TableExecutor(fate=fate_by_trial(mild)))
    assert ladder.finished_steps() == ladder.planned_steps()


@pytest.mark.parametrize("order", range(6))
@pytest.mark.parametrize("keys", [{}, COARSE, {"num_trials": 24}], ids=["wide", "coarse", "many"])
def test_never_more_steps_are_finished_than_planned(keys: dict[str, object], order: int) -> None:
    """Ties, a half step, trials that end early and, after the end, an extended study."""
    study, disk = new_study(), Disk()
    extended = {**keys, "num_trials": 30}
    for now in (keys, extended):
        ladder = make_ladder(study, disk, **now)  # type: ignore[arg-type]
        executor = TableExecutor(4, arrivals=random.Random(order))
        while True:
            for job in ladder.next_jobs(executor.free_slots):
                executor.submit(job)
            if not executor.busy:
                break
            for outcome in executor.wait():
                ladder.take(outcome)
                assert ladder.finished_steps() <= ladder.planned_steps()
        assert ladder.finished_steps() == ladder.planned_steps()
        ladder.finalists(2)


# The window: a proposal knows the trials up to so many before it, and nothing else.


class RecordingProposer(Proposer):
    """Notes what Optuna had been told at each proposal, and how it was asked."""

    def __init__(self, *args: Any, **keys: Any) -> None:
        super().__init__(*args, **keys)
        self.told_at: dict[int, list[int]] = {}
        self.asked_for_steps: list[int] = []

    def propose(self, number: int, *, step_only: bool = False) -> SuggestedParams:
        trials = self.study.get_trials(deepcopy=False)
        self.told_at[number] = [trial.number for trial in trials if trial.state.is_finished()]
        if step_only:
            self.asked_for_steps.append(number)
        return super().propose(number, step_only=step_only)


def recording_ladder(**keys: Any) -> tuple[Ladder, RecordingProposer]:
    space = keys.setdefault("space", make_space())
    anchors = make_anchors(space, effective_batch_size=16, num_train=5000)
    proposer = RecordingProposer(
        new_study(), space, anchors[:3], sampler="tpe", startup_trials=4, seed=SEED
    )
    return make_ladder(proposer.study, Disk(), proposer=proposer, **keys), proposer


@pytest.mark.parametrize("window", [1, 3, 4])
@pytest.mark.parametrize("slots", [1, 3, 7])
def test_a_proposal_knows_the_trials_a_window_before_it_and_no_others(
    window: int, slots: int
) -> None:
    ladder, proposer = recording_ladder(num_trials=15, window=window, half_step=False)
    drive(ladder, TableExecutor(slots, arrivals=random.Random(3)))
    assert sorted(proposer.told_at) == list(range(15))
    for number, told in proposer.told_at.items():
        known = max(0, number - window + 1) if number >= 3 else 0  # anchors need to know nothing
        assert told == list(range(known))


def test_a_lane_that_ends_early_is_refilled_before_the_others_end() -> None:
    # three lanes and a window of four: the slowest of them does not hold up the next proposal
    ladder, _ = recording_ladder(num_trials=12, window=4)
    executor = TableExecutor(3)
    for job in ladder.next_jobs(3):
        executor.submit(job)
    quick, slow = executor.jobs[0], executor.jobs[2]
    assert (quick.trial, slow.trial) == (0, 2)
    ladder.take(executor.fate(quick))
    [job] = ladder.next_jobs(1)
    assert job.trial == 3


# Answers from records.


def test_a_repeated_configuration_is_told_but_neither_trained_nor_counted_nor_promoted() -> None:
    study, disk = new_study(), Disk()
    ladder = make_ladder(study, disk, num_trials=14, **COARSE)  # type: ignore[arg-type]
    executor = TableExecutor()
    drive(ladder, executor)
    finalists = ladder.finalists(2)
    records = in_order(disk.records.values())
    cached = [record for record in records if record.state is TrialState.CACHED]
    assert cached
    for record in cached:
        assert record.repeats is not None
        original = records[record.repeats]
        assert original.number < record.number
        assert original.repeats is None
        assert training_key(original.config) == training_key(record.config)
        assert record.rungs == ()
        trial = study.get_trials()[record.number]
        assert trial.value == original.rungs[0].eval_loss
        assert trial.user_attrs["state"] == "cached"
    numbers = {record.number for record in cached}
    assert numbers.isdisjoint(job.trial for job in executor.trained)
    assert numbers.isdisjoint(record.number for record in finalists)
    assert num_counted(records) == 14
    keys = [training_key(record.config) for record in records if record.repeats is None]
    assert len(set(map(str, keys))) == len(keys)


def one_cell(**keys: object) -> SearchSpace:
    """Return a space with a single configuration but for the step."""
    section = SpaceSection.model_validate(
        {"rank": [8], "alpha_ratio": [1], "lora_dropout": [0], **keys}
    )
    return SearchSpace(section, target_sets()[2:3], seed=SEED)


def test_a_repeat_waits_for_the_trial_that_it_repeats() -> None:
    study, disk = new_study(), Disk()
    space = one_cell(learning_rate=[2e-4, 2e-4])
    ladder = make_ladder(study, disk, space=space, num_anchors=0, num_trials=2, window=2)
    [job] = ladder.next_jobs(9)
    assert job.trial == 0
    assert disk.records[1].state is TrialState.CACHED
    assert not study.get_trials()[1].state.is_finished()
    diverged = early(job, TrialState.DIVERGED, "told to")
    ladder.take(diverged)
    assert drive(ladder, TableExecutor())
    assert {trial.state for trial in study.get_trials()} == {OPTUNA.PRUNED}
    assert [trial.value for trial in study.get_trials()] == [FALLBACK_PENALTY] * len(disk.records)
    assert {record.penalty for record in disk.records.values()} == {FALLBACK_PENALTY}


@pytest.mark.parametrize("state", ENDED)
def test_a_trial_that_ended_early_keeps_when_and_in_which_slot(state: TrialState) -> None:
    disk = Disk()
    ladder = make_ladder(new_study(), disk, num_trials=2, window=1)
    [job] = ladder.next_jobs(1)
    span = LaneSpan(slot=2, began_s=31.5, ended_s=33.0)
    ladder.take(replace(early(job, state, "told to"), span=span))
    assert disk.records[job.trial].span == span


def test_after_eight_repeats_steps_are_asked_for_until_the_space_is_exhausted() -> None:
    space = one_cell(learning_rate=[2e-4, 2e-4])
    ladder, proposer = recording_ladder(num_trials=5, window=1, space=space)
    assert drive(ladder, TableExecutor())
    records = in_order(ladder.records.values())
    assert [record.state for record in records] == [TrialState.COMPLETE] + [
        TrialState.CACHED
    ] * LAST_REPEAT
    assert proposer.asked_for_steps == list(range(MOST_REPEATS + 1, LAST_REPEAT + 1))
    assert all(trial.state is OPTUNA.COMPLETE for trial in proposer.study.get_trials())
    assert [record.number for record in ladder.finalists(2)] == [0]


def test_a_half_step_does_not_reopen_an_exhausted_space() -> None:
    disk, given = Disk(), suggestion(rank=8, alpha_ratio=1.0, lora_dropout=0.0)
    own = [
        Anchor(f"own {step}", replace(given, effective_step=step)) for step in (2e-4, 4e-4, 8e-4)
    ]
    proposer = SameAgain(new_study(), one_cell(), own, sampler="random", startup_trials=1, seed=1)
    ladder = make_ladder(
        proposer.study, disk, space=proposer.space, proposer=proposer, num_trials=5
    )
    assert drive(ladder, TableExecutor())
    cached = [record.state is TrialState.CACHED for record in in_order(disk.records.values())]
    assert cached == [*[False] * 3, *[True] * LAST_REPEAT, False]
    [half] = half_steps(disk.records.values())
    assert half.number == LAST_REPEAT + 3
    assert all(trial.state.is_finished() for trial in proposer.study.get_trials())


class SameAgain(Proposer):
    """Proposes the anchors, and the last of them for ever; what was enqueued comes first."""

    def propose(self, number: int, *, step_only: bool = False) -> SuggestedParams:
        if number == len(self.study.get_trials(deepcopy=False)):
            params = self.anchors[min(number, len(self.anchors) - 1)].params
            attrs = {**describe(params), "origin": "again"}
            self.study.enqueue_trial(self.space.as_optuna(params), user_attrs=attrs)
        return super().propose(number)


# Half the leader's step.


def half_steps(records: Iterable[TrialRecord]) -> list[TrialRecord]:
    return [record for record in records if record.origin == HALF_STEP]


def test_half_the_leader_s_step_begins_at_the_first_promotion_beyond_the_number_of_trials() -> None:
    study, disk = new_study(), Disk()
    ladder = make_ladder(study, disk)
    executor = TableExecutor()
    drive(ladder, executor)
    [half] = half_steps(disk.records.values())
    others = [record for record in disk.records.values() if record is not half]
    leader = min((r for r in others if r.rungs), key=lambda r: r.rungs[0].eval_loss)
    assert half.suggested == replace(
        leader.suggested, effective_step=leader.suggested.effective_step / 2
    )
    assert half.config.learning_rate == pytest.approx(leader.config.learning_rate / 2)
    assert half.number == 12
    assert num_counted(disk.records.values()) == 12
    assert half.rungs[0].eval_loss == study.get_trials()[12].value
    assert study.get_trials()[12].params.keys() == FIVE
    assert [job.rung for job in executor.trained if job.trial == 12][:2] == [0, 1]
    first = next(i for i, job in enumerate(executor.trained) if job.trial == 12)
    assert all(
        (job.rung == 0) == (n < first) for n, job in enumerate(executor.trained) if n != first
    )


def half_step_study(*half: float | TrialState) -> list[TrialRecord]:
    """Return the records of 24 trials that are all tied, and of a half step with these losses."""
    losses: dict[int, list[float | TrialState]] = {n: [2.0, 1.9 + n / 100, 1.8] for n in range(24)}
    space = make_space(learning_rate=[1e-5, 2e-3])
    steps = [Anchor(f"own {n}", suggestion(effective_step=2e-3 / 1.2**n)) for n in range(24)]
    steps.reverse()  # the leader, by its number, has the lowest step
    _, records, _ = run_fates(
        {**losses, 24: list(half)}, num_trials=24, anchors=steps, space=space, half_step=True
    )
    return records


@pytest.mark.parametrize(("loss", "num_rungs"), [(1.5, 3), (2.5, 2)])
def test_the_half_step_has_a_place_within_the_cap_and_earns_the_last_rung(
    loss: float, num_rungs: int
) -> None:
    records = half_step_study(9.0, loss, 1.0)
    assert records[24].origin == HALF_STEP
    assert len(records[24].rungs) == num_rungs
    assert sum(len(record.rungs) > 1 for record in records) == 8  # six seats, one tie and this
    assert sum(len(record.rungs) > 2 for record in records) == 2


def test_a_half_step_that_diverges_leaves_the_other_trials_as_they_are() -> None:
    at_once, later = half_step_study(TrialState.DIVERGED), half_step_study(2.0, TrialState.DIVERGED)
    assert at_once[:24] == later[:24]
    assert sum(len(record.rungs) > 1 for record in at_once) == 7


@pytest.mark.parametrize(
    ("keys", "why"),
    [
        ({"half_step": False}, "not wanted"),
        ({"space": make_space(learning_rate=[1.9e-4, 2e-3])}, "out of bounds"),
        ({"rungs": (10,)}, "no promotion"),
        ({"rungs": (10, 20)}, "a whole extra run"),
        ({"num_trials": 2, "num_anchors": 2}, "no seat for ties"),
        ({"out_of_time": lambda: True}, "no new trial is begun"),
    ],
)
def test_there_is_no_half_step_where_it_has_no_place(keys: dict[str, object], why: str) -> None:
    disk = Disk()
    run_study(new_study(), disk, **keys)
    assert half_steps(disk.records.values()) == [], why


def test_a_half_step_that_is_known_is_not_tried_again() -> None:
    anchors = make_anchors(make_space(), effective_batch_size=16, num_train=5000)
    best = replace(anchors[0].params, effective_step=2e-4)
    steps = [replace(best, effective_step=step) for step in (2e-4, 3e-4, 4e-4)]
    tried = replace(best, effective_step=1.1e-4, lora_dropout=0.05)
    given = [Anchor(f"own {n}", params) for n, params in enumerate([*steps, tried])]
    disk = Disk()
    run_study(new_study(), disk, num_trials=4, anchors=given)
    assert half_steps(disk.records.values()) == []
    disk = Disk()
    run_study(new_study(), disk, num_trials=3, anchors=given[:3])
    [half] = half_steps(disk.records.values())
    assert half.suggested.effective_step == 1e-4


def test_a_half_step_that_is_not_promoted_takes_no_seat_from_the_others() -> None:
    with_it, without = Disk(), Disk()  # a study whose ties do not fill the cap
    run_study(new_study(), with_it)
    run_study(new_study(), without, half_step=False)
    [half] = half_steps(with_it.records.values())
    assert half.state is TrialState.PRUNED
    others = [r for r in in_order(with_it.records.values()) if r.number != half.number]
    assert others == in_order(without.records.values())


# A run that overfits.


def test_a_finalist_is_scored_by_the_best_state_that_it_showed() -> None:
    losses: dict[int, list[float | TrialState]] = {
        0: [2.0, 1.5, 1.9],  # overfits after the second rung
        1: [2.1, 1.8, 1.6],
        **{n: [2.2 + n, 3.0 + n, 3.0] for n in range(2, 8)},
    }
    _, records, finalists = run_fates(losses, rungs=(10, 20, 40))
    assert [record.number for record in finalists] == [0]
    assert records[0].kept is not None
    assert records[0].kept.steps == 20


# Limits for those who come later.


def test_limits_are_set_by_the_trials_that_a_proposal_knew_of() -> None:
    executor = TableExecutor(3)
    ladder = make_ladder(new_study(), Disk(), num_trials=12, window=4)
    drive(ladder, executor)
    first_with_limits = 0
    for job in executor.trained:
        known = [ladder.records[n] for n in range(job.trial - 3)] if job.trial >= 3 else []
        finished = [record.rungs[0] for record in known if record.rungs]
        if job.rung == 0 and len(finished) >= 3:
            assert job.loss_limits == loss_limits(finished)
            assert [step for step, _ in job.loss_limits] == list(range(3, 11))  # 30 % of 10 steps
            first_with_limits = first_with_limits or job.trial
        else:
            assert job.loss_limits == ()
    assert 0 < first_with_limits < 12


def points_of(losses: Iterable[float]) -> tuple[Point, ...]:
    return tuple(
        replace(FIRST_POINT, step=step, train_loss=loss) for step, loss in enumerate(losses, 1)
    )


def rung_of(losses: Sequence[float]) -> RungResult:
    job = make_ladder(new_study(), Disk()).next_jobs(1)[0]
    disk = Disk()
    ladder = make_ladder(new_study(), disk, rungs=(len(losses),), num_trials=1)
    ladder.next_jobs(1)
    return ladder.take(trained(job, 2.0, points=points_of(losses))).rungs[0]


def test_a_limit_is_five_deviations_above_the_worst_and_never_nearer_than_a_tenth() -> None:
    level = [3.0, 3.2, 3.4]
    limits = loss_limits([rung_of([loss] * 10) for loss in level])
    assert [step for step, _ in limits] == list(range(3, 11))
    for _, limit in limits:
        assert limit == pytest.approx(3.4 + 5 * 0.2)
    equal = loss_limits([rung_of([3.0] * 10)] * 3)
    assert all(limit == pytest.approx(3.1) for _, limit in equal)
    assert loss_limits([rung_of([3.0] * 10)] * 2) == ()  # two trials show no spread


def test_limits_are_at_the_steps_of_which_all_trials_kept_a_reading() -> None:
    whole = rung_of([3.0] * 10)
    thinned = replace(whole, points=whole.points[::-1][::3][::-1])  # steps 1, 4, 7, 10
    assert [step for step, _ in loss_limits([whole, whole, thinned])] == [4, 7, 10]


@pytest.mark.parametrize(
    ("shares", "total", "least", "steps"),
    [
        ((0.125, 0.5, 1.0), 800, 50, (100, 400, 800)),
        ((0.125, 0.5, 1.0), 200, 50, (50, 100, 200)),  # the first rung is lengthened
        ((0.125, 0.5, 1.0), 100, 50, (50, 100)),  # the first two coincide
        ((0.125, 0.5, 1.0), 40, 50, (40,)),  # a full run is shorter than the shortest rung
        ((1.0,), 1, 1, (1,)),
        ((0.001, 1.0), 10, 1, (1, 10)),
    ],
)
def test_rungs_that_coincide_are_merged(
    shares: tuple[float, ...], total: int, least: int, steps: tuple[int, ...]
) -> None:
    assert rung_steps(shares, total_steps=total, min_steps=least) == steps


@given(
    shares=st.lists(st.floats(0.001, 1.0), min_size=1, max_size=6),
    total=st.integers(1, 5000),
    least=st.integers(1, 200),
)
def test_rungs_rise_to_a_full_run(shares: list[float], total: int, least: int) -> None:
    steps = rung_steps(shares, total_steps=total, min_steps=least)
    assert list(steps) == sorted(set(steps))
    assert steps[-1] == total
    assert steps[0] >= min(least, total)
