"""The halving simulation: curves that do what the text says, costs by hand, and a small run of it."""

from pathlib import Path

import numpy as np
import pytest
from halving_simulation import (
    BEST_LOSS,
    COOLDOWN_RATIO,
    HALF_STEP_LOSS,
    RUNGS,
    TRIALS,
    TableExecutor,
    cost_table,
    draw_curves,
    draw_half_step,
    main,
    run_study,
)
from machine import read_result

from lora_tune.records import LaneJob
from lora_tune.stats.rank_correlation import spearman


def test_curves_are_falling_power_laws_that_cross() -> None:
    correlations = []
    for seed in range(100):
        curves = draw_curves(np.random.default_rng(seed))
        assert curves.shape == (TRIALS, len(RUNGS))
        assert (np.diff(curves, axis=1) < 0).all()
        assert curves.min() > BEST_LOSS
        correlations.append(spearman(curves[:, 0].tolist(), curves[:, -1].tolist()))
    assert 0.8 < np.mean([found for found in correlations if found is not None]) < 0.9


def test_costs_are_those_counted_by_hand() -> None:
    assert RUNGS == (100, 400, 800)
    held = 1 - COOLDOWN_RATIO
    second, last = 400 - 100 * held, 800 - 400 * held
    whole, found = 24 * 800, cost_table()
    assert found["without_ties"] == pytest.approx((24 * 100 + 6 * second + 2 * last) / whole)
    assert found["all_tie_seats"] == pytest.approx((24 * 100 + 8 * second + 3 * last) / whole)
    assert found["all_tie_seats_and_half_step"] == pytest.approx(
        (25 * 100 + 8 * second + 3 * last) / whole
    )


def job(trial: int, rung: int) -> LaneJob:
    return LaneJob(
        trial=trial,
        rung=rung,
        config=None,
        start_step=0,
        hold_step=1,
        end_step=1,
        warmup_steps=0,
        eval_split="selection",
        eval_dtype="train",
        start_folder=None,
        result_folder=None,
    )


def test_rows_scatter_as_much_as_they_should() -> None:
    curves = np.full((TRIALS + 1, len(RUNGS)), 0.7)
    executor = TableExecutor(curves, noise=1.0, rng=np.random.default_rng(1))
    tokens = executor.tokens
    losses = [
        np.array(executor.outcome(job(trial, 0)).evaluation.loss_sums) / tokens  # type: ignore[union-attr]
        for trial in range(TRIALS)
    ]
    differences = [
        np.std(first - second) for first, second in zip(losses, losses[1:], strict=False)
    ]
    assert np.mean(differences) == pytest.approx(0.05, rel=0.02)


def test_without_noise_the_ladder_sees_the_curves() -> None:
    study = run_study((0, 1), noise=0.0, half_step=True)
    assert study.seen_correlation == pytest.approx(study.rank_correlation)
    assert study.cost <= cost_table()["all_tie_seats_and_half_step"] + 1e-12
    assert study.cost_of_all_trained == pytest.approx(study.cost * 24 / 25)
    assert study.regret_of_best_finalist <= study.regret_of_first_finalist


def test_a_half_step_that_is_asked_for_stays_within_the_cap() -> None:
    with_it, without = (
        [run_study((0, n), noise=4.0, half_step=half_step) for n in range(5)]
        for half_step in (True, False)
    )
    assert {study.num_promoted for study in with_it + without} == {8}
    costs = cost_table()
    for name, studies in (
        ("all_tie_seats_and_half_step", with_it),
        ("all_tie_seats", without),
    ):
        assert [study.cost for study in studies] == pytest.approx([costs[name]] * 5)


def test_a_half_step_s_final_loss_lies_around_that_of_its_leader() -> None:
    leader, rng = np.array([0.7, 0.65, 0.6]), np.random.default_rng(1)
    curves = np.array([draw_half_step(leader, rng) for _ in range(2000)])
    excess, spread = HALF_STEP_LOSS
    above = curves[:, -1] / leader[-1] - 1
    assert above.mean() == pytest.approx(excess, abs=3 * spread / 2000**0.5)
    assert above.std() == pytest.approx(spread, rel=0.05)
    assert (np.diff(curves, axis=1) < 0).all()


def test_a_small_run_writes_its_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "halving.json"
    main(["--studies", "3", "--output", str(path)])
    printed = capsys.readouterr().out
    assert "| x4 |" in printed
    assert "with the half step as one of them" in printed
    regimes = read_result(path)["regimes"]
    assert isinstance(regimes, list)
    assert [regime["studies"] for regime in regimes] == [3, 3, 3]
