"""Errors of means over seeds and rows: by hand, against closed forms, and the coverage of intervals."""

from math import sqrt

import numpy as np
import pytest
from stats_runs import evaluation

from lora_tune.stats.paired import paired_difference
from lora_tune.stats.run_losses import RunLosses, TwoPartError
from lora_tune.stats.student import t_quantile


def runs_of(losses_KSN, counts=None):
    """Return run losses from an array (candidates, seeds, rows) of losses per token."""
    return [[evaluation(row, counts) for row in candidate] for candidate in losses_KSN]


def drawn(*, candidates=3, seeds=3, rows=300, seed_sd=0.0, common_sd=0.0, run_sd=0.0, salt=0):
    rng = np.random.default_rng(salt)
    own = rng.normal(0, 0.02, (candidates, 1, rows))
    shift = rng.normal(0, seed_sd, (candidates, seeds, 1)) if seed_sd else 0.0
    common = rng.normal(0, common_sd, (1, seeds, 1)) if common_sd else 0.0
    run = rng.normal(0, run_sd, (candidates, seeds, rows)) if run_sd else 0.0
    return 2 + rng.normal(0, 0.5, rows) + own + shift + common + run


def test_the_seed_variance_within_candidates_by_hand():
    # Two candidates of one row: seeds 1, 3 and 2, 6; variances 2 and 8, pooled 5 on 2 degrees.
    losses = RunLosses(runs_of([[[1.0, 1.0], [3.0, 3.0]], [[2.0, 2.0], [6.0, 6.0]]]))
    noise = losses.seed_noise(of_differences=True)
    assert (noise.variance, noise.degrees) == (5.0, 2)
    assert losses.seed_sd == pytest.approx(sqrt(5))
    assert losses.difference_error(0, 1).seeds == pytest.approx(sqrt(2 * 5 / 2))


def test_what_a_seed_does_to_all_candidates_cancels_where_degrees_allow():
    losses = RunLosses(runs_of(drawn(seed_sd=0.0005, common_sd=0.05)))
    assert losses.seed_noise(of_differences=True).degrees == 4
    assert sqrt(losses.seed_noise(of_differences=True).variance) < 0.003
    assert losses.seed_noise(of_differences=False).degrees == 6
    assert losses.seed_sd > 0.01


def test_what_rows_answer_to_seeds_is_not_counted_twice():
    # Only rows differ between seeds: on average nothing is left of the seed part.
    left, raw = [], []
    for salt in range(200):
        losses = RunLosses(runs_of(drawn(run_sd=0.05, salt=salt)))
        noise = losses.seed_noise(of_differences=True)
        assert noise.variance == max(0.0, noise.between - noise.row_share)
        left.append(noise.between - noise.row_share)
        raw.append(noise.between)
    assert abs(np.mean(left)) < 3 * np.std(left) / sqrt(200)
    assert np.mean(raw) == pytest.approx(0.05**2 / 300, rel=0.2)


def test_a_pair_noisier_than_the_pool_keeps_its_own_noise():
    shift = np.zeros((3, 3, 1))
    shift[0, :, 0] = (-0.1, 0.0, 0.1)
    found = RunLosses(runs_of(drawn() + shift))
    pooled = found.seed_noise(of_differences=True).variance
    assert found.difference_error(0, 1).seeds > 1.1 * sqrt(2 * pooled / 3)
    assert found.difference_error(1, 2).seeds == pytest.approx(sqrt(2 * pooled / 3))


def test_the_bootstrap_agrees_with_the_closed_form():
    counts = np.random.default_rng(5).integers(8, 60, 300).tolist()
    runs = runs_of(drawn(seeds=1), counts)
    for clusters in ((), tuple(row // 3 for row in range(300))):
        expected = paired_difference(runs[0][0], runs[1][0], clusters=clusters)
        error = RunLosses(runs, clusters=clusters).difference_error(0, 1)
        # 2000 resamples have an error of 1.6 % in the deviation.
        assert error.rows == pytest.approx(expected.standard_error, rel=0.06)
        assert error.row_degrees == expected.num_clusters - 1
        assert error.seeds == 0.0


def test_another_bootstrap_seed_changes_little_and_the_same_one_nothing():
    runs = runs_of(drawn())
    first, again, other = (RunLosses(runs, seed=seed).difference_error(0, 1) for seed in (0, 0, 1))
    assert first == again
    assert first.rows != other.rows
    assert first.rows == pytest.approx(other.rows, rel=0.1)


def test_each_part_is_widened_by_its_own_t_quantile():
    error = TwoPartError(rows=0.3, row_degrees=99, seeds=0.4, seed_degrees=2)
    assert error.total == pytest.approx(0.5)
    assert error.half_width() == pytest.approx(sqrt((1.98422 * 0.3) ** 2 + (4.30265 * 0.4) ** 2))
    assert error.half_width(0.5) < error.half_width(0.9) < error.half_width(0.99)


@pytest.mark.parametrize("level", [0.2, 0.9, 0.95, 0.9999])
@pytest.mark.parametrize(("rows", "seeds"), [(0.3, 0.4), (0.3, 0.0), (0.0, 0.4)])
def test_p_is_one_less_the_level_whose_interval_just_reaches_zero(rows, seeds, level):
    error = TwoPartError(rows=rows, row_degrees=50, seeds=seeds, seed_degrees=3)
    assert error.p_value(error.half_width(level)) == pytest.approx(1 - level, rel=1e-6)
    assert error.p_value(-error.half_width(level)) == pytest.approx(1 - level, rel=1e-6)
    assert error.p_value(0.0) == 1.0


def test_a_single_cluster_tells_nothing_apart():
    runs = runs_of([[[1.0, 1.1]], [[2.0, 2.2]]])
    error = RunLosses(runs, clusters=(3, 3)).difference_error(0, 1)
    assert error.half_width() > 10 * 1.1
    assert error.half_width() == pytest.approx(t_quantile(0.975, 1) * 2.1)


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        ([], "same number of evaluations, at least one"),
        ([[]], "same number of evaluations, at least one"),
        ([[evaluation([1.0])], [evaluation([1.0])] * 2], "same number of evaluations"),
        ([[evaluation([1.0], [2])], [evaluation([1.0], [3])]], "target tokens differ"),
    ],
)
def test_runs_that_do_not_compare_are_refused(runs, message):
    with pytest.raises(ValueError, match=message):
        RunLosses(runs)


@pytest.mark.parametrize(("candidates", "seeds"), [(2, 2), (3, 3)])
@pytest.mark.parametrize("seed_sd", [0.0, 0.005])
def test_intervals_hold_the_truth_as_often_as_they_say(candidates, seeds, seed_sd):
    held = 0
    for salt in range(300):
        losses = drawn(
            candidates=candidates, seeds=seeds, rows=60, seed_sd=seed_sd, run_sd=0.02, salt=salt
        )
        found = RunLosses(runs_of(losses), seed=1)
        difference = found.losses[0].mean() - found.losses[1].mean()
        held += abs(difference) <= found.difference_error(0, 1).half_width()
    assert 0.91 <= held / 300 <= 0.99  # three standard errors of 300 draws around 95 %
