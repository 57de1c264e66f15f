"""Standard errors of ratios of sums against a bootstrap and against that of a mean."""

from math import sqrt

import numpy as np
import pytest

from lora_tune.stats.ratio import ratio_estimate


def row_losses(loss, *, seed):
    """Return loss sums and label counts of 96 rows around ``loss``."""
    rows, own = np.random.default_rng(3), np.random.default_rng(seed)
    counts = rows.integers(8, 60, 96)
    hardness = rows.normal(0.0, 0.45, 96)
    return list(counts * (loss + hardness + own.normal(0.0, 0.05, 96))), counts.tolist()


def bootstrap_error(y, x, *, resamples: int = 2000) -> float:
    """Return the spread of the ratio when whole examples are drawn again."""
    picks = np.random.default_rng(0).integers(len(y), size=(resamples, len(y)))
    return float((np.asarray(y)[picks].sum(axis=1) / np.asarray(x)[picks].sum(axis=1)).std())


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_standard_error_of_the_paired_difference_agrees_with_a_bootstrap(seed):
    winner, counts = row_losses(2.3, seed=seed)
    base, _ = row_losses(2.9, seed=99 + seed)
    y = np.asarray(winner) - np.asarray(base)
    estimate = ratio_estimate(list(y), counts)
    assert estimate.value == pytest.approx((sum(winner) - sum(base)) / sum(counts))
    # 15 %: the bootstrap itself is off by 1/sqrt(2 * 2000), and both by their order in 1/n.
    assert estimate.standard_error == pytest.approx(bootstrap_error(y, counts), rel=0.15)


def test_standard_errors_of_loss_and_relative_loss_agree_with_a_bootstrap():
    (winner, counts), (base, _) = row_losses(2.3, seed=4), row_losses(2.9, seed=5)
    for y, x in ((winner, counts), (winner, base)):
        assert ratio_estimate(y, x).standard_error == pytest.approx(bootstrap_error(y, x), rel=0.15)


def test_with_equal_denominators_the_error_is_that_of_a_mean():
    values = [1.0, 2.0, 4.0, 7.0]
    estimate = ratio_estimate(values, [1.0] * 4)
    assert estimate.standard_error == pytest.approx(np.std(values, ddof=1) / sqrt(4))


def test_a_single_example_has_no_interval():
    estimate = ratio_estimate([3.0], [2])
    assert (estimate.value, estimate.standard_error, estimate.interval) == (1.5, None, None)


@pytest.mark.parametrize(("y", "x"), [([], []), ([1.0], []), ([1.0, 2.0], [0, 0])])
def test_a_ratio_without_a_denominator_is_refused(y, x):
    with pytest.raises(ValueError, match="a ratio needs as many numerators"):
        ratio_estimate(y, x)
