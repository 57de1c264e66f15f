"""The ladder with real Optuna on a table of losses: what is tried, promoted, told and recommended.

The strongest tests run a study as a whole and compare its final table: results in another order, other
slots, and a process killed at any point must not change it.
"""

import math
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from table_study import (
    BUDGET_BYTES,
    Disk,
    Killed,
    TableExecutor,
    drive,
    early,
    in_order,
    make_ladder,
    needed_bytes,
    new_study,
    optuna_table,
    predict,
    run_study,
    trained,
)

from lora_tune.errors import AllTrialsFailedError
from lora_tune.records import LaneJob, LaneOutcome, TrialRecord, TrialState
from lora_tune.search.ladder import FALLBACK_PENALTY, rung_steps
from lora_tune.store.database import open_optuna_study
from lora_tune.units import GIB

OPTUNA = optuna.trial.TrialState
ENDED = (TrialState.DIVERGED, TrialState.INFEASIBLE, TrialState.FAILED)
FIVE = {"rank_index", "alpha_ratio_index", "dropout_index", "target_set_index", "effective_step"}


@pytest.fixture(scope="module")
def finished() -> tuple[optuna.Study, list[TrialRecord]]:
    """A finished study of 40 trials in which every fate occurs."""
    study, disk = new_study(), Disk()
    run_study(study, disk, num_trials=40, num_anchors=6, window=4)
    return study, in_order(disk.records.values())


def test_the_table_has_every_fate(finished: tuple[optuna.Study, list[TrialRecord]]) -> None:
    _, records = finished
    assert {record.state for record in records} == set(TrialState) - {TrialState.RUNNING}
    clamped = [r for r in records if r.config.rank < r.suggested.rank]
    assert clamped


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
        if record.rungs:
            assert trial.state is OPTUNA.COMPLETE
            assert trial.value == record.rungs[0].eval_loss
            assert record.penalty is None
        else:
            assert trial.state is told[record.state]
            assert trial.value == record.penalty
        if record.state is TrialState.FAILED:
            assert record.penalty is None  # nothing was told of it
        assert trial.value is None or math.isfinite(trial.value)


def test_a_penalty_is_a_tenth_above_the_worst_loss_known_when_it_is_told(
    finished: tuple[optuna.Study, list[TrialRecord]],
) -> None:
    _, records = finished
    window, checked = 4, 0
    for record in records:
        if record.state not in (TrialState.DIVERGED, TrialState.INFEASIBLE) or record.rungs:
            continue
        known = records[: record.number - record.number % window + window]
        losses = [other.rungs[0].eval_loss for other in known if other.rungs]
        if record.first_loss is not None and math.isfinite(record.first_loss):
            losses.append(record.first_loss)
        assert record.penalty == pytest.approx(1.1 * max(losses))
        checked += 1
    assert checked


def test_anchors_come_first_and_the_sampler_after_them(
    finished: tuple[optuna.Study, list[TrialRecord]],
) -> None:
    _, records = finished
    origins = [record.origin for record in records]
    assert origins == [f"anchor A{number}" for number in range(1, 7)] + ["tpe"] * 34


def test_the_best_quarter_goes_on_rung_by_rung(
    finished: tuple[optuna.Study, list[TrialRecord]],
) -> None:
    _, records = finished
    for rung in (1, 2):
        able = [r for r in records if len(r.rungs) >= rung]
        went_on = [r for r in able if len(r.rungs) > rung]
        stayed = [r for r in able if len(r.rungs) == rung and r.state not in ENDED]
        assert len(went_on) == math.ceil(len(able) / 4)
        worst = max(r.rungs[rung - 1].eval_loss for r in went_on)
        assert all(r.rungs[rung - 1].eval_loss >= worst for r in stayed)
        assert all(r.state is TrialState.PRUNED for r in stayed)


def test_segments_follow_each_other_without_a_gap() -> None:
    executor = TableExecutor()
    ladder = make_ladder(new_study(), Disk())
    drive(ladder, executor)
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


@pytest.fixture(scope="module")
def undisturbed() -> tuple[list[TrialRecord], list[tuple[object, ...]], TrialRecord]:
    """Records, Optuna's table and winner of a study in which nothing happened."""
    study, disk = new_study(), Disk()
    winner = run_study(study, disk)
    return in_order(disk.records.values()), optuna_table(study), winner


def assert_same(
    study: optuna.Study,
    disk: Disk,
    winner: TrialRecord,
    undisturbed: tuple[list[TrialRecord], list[tuple[object, ...]], TrialRecord],
) -> None:
    records, table, wanted = undisturbed
    assert in_order(disk.records.values()) == records
    assert optuna_table(study) == table
    assert winner == wanted


def test_the_undisturbed_study_is_worth_comparing(
    undisturbed: tuple[list[TrialRecord], list[tuple[object, ...]], TrialRecord],
) -> None:
    records, _, winner = undisturbed
    assert {r.state for r in records} >= {
        TrialState.COMPLETE,
        TrialState.PRUNED,
        TrialState.DIVERGED,
    }
    assert len(winner.rungs) == 3


@settings(max_examples=40, deadline=None)
@given(order=st.integers(0, 2**32), slots=st.integers(1, 9))
def test_neither_the_order_of_results_nor_the_free_slots_change_the_study(
    undisturbed: tuple[list[TrialRecord], list[tuple[object, ...]], TrialRecord],
    order: int,
    slots: int,
) -> None:
    study, disk = new_study(), Disk()
    ladder = make_ladder(study, disk)
    drive(ladder, TableExecutor(slots, arrivals=random.Random(order)))
    winner = ladder.select_winner(practical_margin=0.005)
    assert_same(study, disk, winner, undisturbed)


def test_another_seed_is_another_study(
    undisturbed: tuple[list[TrialRecord], list[tuple[object, ...]], TrialRecord],
) -> None:
    disk = Disk()
    run_study(new_study(), disk, seed=99)
    assert in_order(disk.records.values()) != undisturbed[0]


@pytest.fixture(scope="module")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with Optuna's tables and nothing in them: making one takes most of a second."""
    path = tmp_path_factory.mktemp("empty") / "study.db"
    study = open_optuna_study(path, name="table", num_records=0)
    study._storage._backend.engine.dispose()  # type: ignore[attr-defined]
    return path


def test_a_study_on_sqlite_is_the_study_in_memory(
    tmp_path: Path,
    empty_database: Path,
    undisturbed: tuple[list[TrialRecord], list[tuple[object, ...]], TrialRecord],
) -> None:
    shutil.copy(empty_database, tmp_path / "study.db")
    study, disk = open_optuna_study(tmp_path / "study.db", name="table", num_records=0), Disk()
    winner = run_study(study, disk)
    assert_same(study, disk, winner, undisturbed)


def test_a_study_killed_after_any_result_ends_in_the_same_table(
    tmp_path: Path,
    empty_database: Path,
    undisturbed: tuple[list[TrialRecord], list[tuple[object, ...]], TrialRecord],
) -> None:
    """Every process takes one result and is gone; the next finds database and records alone."""
    path = tmp_path / "study.db"
    shutil.copy(empty_database, path)
    disk, processes, ended = Disk(), 0, False
    while not ended:
        study = open_optuna_study(path, name="table", num_records=len(disk.records))
        ladder = make_ladder(study, disk)
        ended = drive(ladder, TableExecutor(), most_takes=1)
        processes += 1
    winner = ladder.select_winner(practical_margin=0.005)
    assert processes == sum(max(1, len(record.rungs)) for record in undisturbed[0])
    assert_same(study, disk, winner, undisturbed)


def test_a_study_killed_once_after_each_number_of_results_ends_in_the_same_table(
    undisturbed: tuple[list[TrialRecord], list[tuple[object, ...]], TrialRecord],
) -> None:
    takes, ended = 0, False
    while not ended:
        storage, disk = optuna.storages.InMemoryStorage(), Disk()
        ended = drive(make_ladder(new_study(storage), disk), TableExecutor(), most_takes=takes)
        winner = run_study(new_study(storage), disk)
        assert_same(new_study(storage), disk, winner, undisturbed)
        takes += 1
    assert takes > 12


def test_a_study_killed_before_any_record_is_written_ends_in_the_same_table(
    undisturbed: tuple[list[TrialRecord], list[tuple[object, ...]], TrialRecord],
) -> None:
    """Also between a proposal that Optuna has stored and the record of it."""
    write, killed = 0, True
    while killed:
        storage, disk = optuna.storages.InMemoryStorage(), Disk()
        disk.killed_at = write
        try:
            run_study(new_study(storage), disk)
            killed = False
        except Killed:
            disk.killed_at = None
        winner = run_study(new_study(storage), disk)
        assert_same(new_study(storage), disk, winner, undisturbed)
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
) -> tuple[optuna.Study, list[TrialRecord], TrialRecord]:
    study, disk = new_study(), Disk()
    ladder = make_ladder(study, disk, num_trials=len(losses), **keys)  # type: ignore[arg-type]
    drive(ladder, TableExecutor(fate=fate_by_trial(losses)))
    winner = ladder.select_winner(practical_margin=0.0)
    return study, in_order(disk.records.values()), winner


def test_a_promoted_trial_that_diverges_makes_room_for_the_next() -> None:
    diverged = TrialState.DIVERGED
    losses: dict[int, list[float | TrialState]] = {
        0: [2.0, diverged],
        1: [2.1, diverged],
        2: [2.2, 1.9],
        3: [2.3, 1.5],
        **{number: [3.0 + number, 3.0] for number in range(4, 8)},
    }
    study, records, winner = run_fates(losses, rungs=(10, 20))
    assert [len(record.rungs) for record in records] == [1, 1, 2, 2, 1, 1, 1, 1]
    assert [record.state for record in records[:4]] == [diverged] * 2 + [TrialState.COMPLETE] * 2
    assert winner.number == 3
    # Optuna was told of rung 0, where both did well, and is not told a second time
    assert study.get_trials()[0].state is OPTUNA.COMPLETE
    assert study.get_trials()[0].value == pytest.approx(2.0)
    assert records[0].penalty is None


def test_a_tie_at_the_cut_is_won_by_the_earlier_trial() -> None:
    _, records, _ = run_fates({number: [2.0, 1.9] for number in range(4)}, rungs=(10, 20))
    assert [len(record.rungs) for record in records] == [2, 1, 1, 1]


@pytest.mark.parametrize("slots", [1, 2, 6])
def test_a_penalty_does_not_know_what_later_anchors_showed(slots: int) -> None:
    # anchors of later generations are trained before the first generation is told
    losses: dict[int, list[float | TrialState]] = {
        0: [TrialState.DIVERGED],
        1: [2.0],
        **{number: [2.0 + number] for number in range(2, 6)},
    }
    study = new_study()
    ladder = make_ladder(study, Disk(), num_trials=6, num_anchors=6, window=2, rungs=(10,))
    executor = TableExecutor(slots, fate=fate_by_trial(losses))
    last_first: list[LaneOutcome] = []
    for _ in range(6):
        for job in ladder.next_jobs(executor.free_slots):
            executor.submit(job)
        executor.jobs.sort(key=lambda job: -job.trial)
        last_first += executor.wait()
        ladder.take(last_first[-1])
    assert [outcome.trial for outcome in last_first] == (
        [5, 4, 3, 2, 1, 0]
        if slots == 6
        else [0, 1, 2, 3, 4, 5]
        if slots == 1
        else [1, 2, 3, 4, 5, 0]
    )
    assert study.get_trials()[0].value == pytest.approx(1.1 * 2.0)


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
        ladder.select_winner(practical_margin=0.005)
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
    assert ladder.select_winner(practical_margin=0.005).state is TrialState.COMPLETE


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
    winner = run_study(study, disk, num_trials=12)
    assert sorted(disk.records) == list(range(12))
    assert len(winner.rungs) == 3
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


def finished_record(
    number: int,
    loss: float,
    *,
    predicted_bytes: int = GIB,
    rank: int = 8,
    dropout: float = 0.0,
) -> TrialRecord:
    disk = Disk()
    run_study(new_study(), disk, num_trials=1, rungs=(10,))
    record = disk.records[0]
    config = replace(record.config, rank=rank, lora_dropout=dropout)
    [result] = record.rungs
    return replace(
        record,
        number=number,
        config=config,
        predicted_bytes=predicted_bytes,
        rungs=(replace(result, eval_loss=loss),),
    )


@pytest.mark.parametrize(
    ("others", "winner"),
    [
        ([{"loss": 2.1}], 0),  # clearly worse
        ([{"loss": 2.009, "predicted_bytes": GIB // 4}], 1),  # a tie, and cheaper
        ([{"loss": 2.011, "predicted_bytes": GIB // 4}], 0),  # cheaper, but outside the margin
        ([{"loss": 2.009, "predicted_bytes": GIB + 1}], 0),  # the same memory in practice
        ([{"loss": 2.009, "rank": 4}], 1),
        ([{"loss": 2.009, "rank": 4, "predicted_bytes": 2 * GIB}], 0),
        ([{"loss": 1.995, "dropout": 0.1}], 0),
        ([{"loss": 1.995}], 1),  # as cheap: the lower loss
        (
            [{"loss": 1.9, "rank": 64}, {"loss": 1.909, "rank": 32}],
            2,
        ),  # the margin is from the best
    ],
)
def test_the_cheapest_within_the_practical_margin_wins(
    others: list[dict[str, float]], winner: int
) -> None:
    disk = Disk()
    for number, keys in enumerate([{"loss": 2.0}, *others]):
        disk.save(finished_record(number, **keys))  # type: ignore[arg-type]
    study = new_study()
    for _ in disk.records:
        study.tell(study.ask(), 2.0)
    ladder = make_ladder(study, disk, num_trials=len(disk.records), rungs=(10,))
    assert ladder.select_winner(practical_margin=0.005).number == winner


def test_a_trial_that_was_not_promoted_is_never_recommended() -> None:
    losses: dict[int, list[float | TrialState]] = {n: [2.0 + n / 10, 5.0] for n in range(4)}
    _, records, winner = run_fates(losses, rungs=(10, 20))
    assert winner.number == 0
    assert [r.state for r in records] == [TrialState.COMPLETE] + [TrialState.PRUNED] * 3


def test_planned_and_finished_steps_meet_at_the_end() -> None:
    ladder = make_ladder(new_study(), Disk(), num_trials=8, rungs=(10, 20), num_anchors=0)
    mild: dict[int, list[float | TrialState]] = {n: [2.0 + n, 1.5 + n] for n in range(8)}
    assert ladder.finished_steps() == 0
    assert ladder.planned_steps() == 8 * 10 + 2 * (20 - 8)  # rung 1 goes on from the held step 8
    drive(ladder, TableExecutor(fate=fate_by_trial(mild)))
    assert ladder.finished_steps() == ladder.planned_steps()


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
