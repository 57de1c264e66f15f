"""The simulation of decisions: its draws have the noise they claim, its counts are right, and it runs."""

import json
from dataclasses import replace

import numpy as np
import pytest
from selection_simulation import (
    BASE_LOSS,
    SURFACES,
    Noise,
    StudyOutcome,
    _confirm,
    _finalists,
    _seed_shifts,
    main,
    noise_regimes,
    report,
    run_study,
    shortfalls,
    simulate,
    summarize,
)

from lora_tune.records import Verdict

FLAT = SURFACES[0]


@pytest.mark.parametrize(
    "noise",
    [
        Noise(rows=60, seeds=2, finalists=1),
        Noise(rows=60, seed_ratio=4.0, seed_correlation=0.5, finalists=1),
        Noise(rows=60, cluster_size=5, seed_ratio=0.25, finalists=1),
        Noise(rows=60, first_finalist_seed=4.0, finalists=1),
    ],
    ids=lambda noise: noise.name,
)
def test_confirmed_differences_scatter_by_the_true_error(noise):
    rng, found = np.random.default_rng(0), []
    for _ in range(1500):
        runs = _confirm(noise, _seed_shifts(noise, rng), rng)
        means = [np.mean([run.mean_loss for run in candidate]) for candidate in runs]
        found.append(means[0] - means[1])
    # A deviation from 1500 draws has an error of 1.8 %.
    assert np.std(found) == pytest.approx(noise.true_error(0), rel=0.06)
    assert np.mean(found) == pytest.approx(0.0, abs=4 * noise.true_error(0) / 1500**0.5)


def test_finalists_are_lucky_in_the_search_and_never_better_than_the_surface():
    rng, noise = np.random.default_rng(0), Noise(finalists=3, seed_ratio=4.0)
    for surface in SURFACES:
        deltas = np.asarray([_finalists(noise, surface, rng) for _ in range(50)])
        assert deltas.shape == (50, 3)
        assert deltas.min() >= -surface.gain * BASE_LOSS
        assert surface.nothing_better == bool((deltas >= 0).all() and surface.gain == 0)


def test_a_study_is_a_function_of_its_seed_and_a_clear_gain_is_seen():
    noise = Noise(rows=1000, seed_ratio=0.25)
    first, again = (
        run_study(noise, SURFACES[-1], bootstrap_seed=0, rng=np.random.default_rng(3))
        for _ in range(2)
    )
    assert first == again
    assert first.verdict is Verdict.BETTER
    assert first.deficit < 0


OUTCOME = StudyOutcome(
    deficit=0.0,
    error=0.001,
    gain=0.0,
    gain_error=0.001,
    nothing_better=True,
    verdict=Verdict.SAME,
    covers_pair=True,
    covers_best=True,
    covers_score=False,
    optimism=0.5,
    claimed_optimism=-0.5,
)


def test_rates_are_counted_by_hand():
    found = summarize(
        [
            OUTCOME,
            replace(OUTCOME, deficit=0.0015, verdict=Verdict.WORSE),  # worse, within noise
            replace(OUTCOME, deficit=0.002),  # beyond 1.96 errors, within the margin of 0.01
            replace(OUTCOME, deficit=0.011, error=0.02, nothing_better=False),  # beyond the margin
            replace(OUTCOME, deficit=0.011, verdict=Verdict.BETTER, covers_pair=False),  # both
        ]
    )
    assert found["worse_at_all"] == 0.8
    assert found["worse_beyond_noise"] == 0.4
    assert found["worse_beyond_margin"] == 0.4
    assert found["harm"] == 0.2
    assert (found["coverage_pair"], found["coverage_score"]) == (0.8, 0.0)
    assert (found["nothing_better_studies"], found["not_better_said"]) == (4, 0.75)
    assert (found["clear_studies"], found["better_said_of_clear"]) == (0, None)
    assert found["worse_said"] == 0.2
    clear = summarize([replace(OUTCOME, gain=0.03, verdict=Verdict.BETTER), OUTCOME])
    assert (clear["clear_studies"], clear["better_said_of_clear"]) == (1, 1.0)


def test_what_misses_a_target_is_named():
    good = replace(OUTCOME, covers_score=True, optimism=0.1)
    outcomes = [replace(good, covers_pair=i % 20 > 0, covers_best=i % 20 > 1) for i in range(100)]
    cells = [(Noise(), FLAT, [replace(o, covers_score=i % 20 > 0) for i, o in enumerate(outcomes)])]
    named = shortfalls(report(cells))
    assert named
    assert all("coverage_best 0.9000, not in 0.93 to 0.97" in line for line in named)


def test_the_regimes_cover_rows_noise_finalists_and_seeds_once():
    regimes = noise_regimes()
    assert len({noise.name for noise in regimes}) == len(regimes)
    assert {noise.rows for noise in regimes} == {100, 300, 1000}
    assert {noise.seed_ratio for noise in regimes} == {0.25, 1.0, 4.0}
    assert {noise.finalists for noise in regimes} == {1, 2, 3}
    assert {noise.seeds for noise in regimes} == {1, 2, 3}


def test_decisions_on_a_few_hundred_studies_keep_the_promises_roughly():
    cells = list(simulate([Noise(rows=100, seed_ratio=4.0)], studies=60))
    found = report(cells)["all"]["all"]
    assert found["studies"] == 300
    assert found["harm"] <= 0.02
    assert 0.90 <= found["coverage_pair"] <= 0.995  # four standard errors of 300
    assert found["not_better_said"] >= 0.93


def test_the_command_prints_a_table_and_writes_its_result(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("selection_simulation.noise_regimes", lambda: (Noise(rows=40),))
    main(["--studies", "3", "--output", str(tmp_path / "out.json")])
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["all"]["all"]["studies"] == 15
    assert set(written["by_surface"]) == {surface.name for surface in SURFACES}
    assert "shortfalls" in written
    printed = capsys.readouterr().out
    assert "| 40 rows, seed 1x, 3 seeds, 2 finalists | 15 |" in printed
