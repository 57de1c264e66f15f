"""Standard errors against a bootstrap, t quantiles against printed tables, ranks by hand."""

from math import sqrt

import numpy as np
import pytest
from report_studies import evaluation

from lora_tune.report.statistics import ratio_estimate, spearman, t_quantile_975


def bootstrap_error(y, x, *, resamples: int = 2000) -> float:
    """Return the spread of the ratio when whole examples are drawn again."""
    picks = np.random.default_rng(0).integers(len(y), size=(resamples, len(y)))
    return float((np.asarray(y)[picks].sum(axis=1) / np.asarray(x)[picks].sum(axis=1)).std())


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_standard_error_of_the_paired_difference_agrees_with_a_bootstrap(seed):
    winner = evaluation(2.3, seed=seed)
    base = evaluation(2.9, seed=99 + seed)
    y = np.asarray(winner.loss_sums) - np.asarray(base.loss_sums)
    estimate = ratio_estimate(list(y), winner.label_counts)
    assert estimate.value == pytest.approx(winner.mean_loss - base.mean_loss)
    # 15 %: the bootstrap itself is off by 1/sqrt(2 * 2000), and both by their order in 1/n.
    assert estimate.standard_error == pytest.approx(
        bootstrap_error(y, winner.label_counts), rel=0.15
    )


def test_standard_errors_of_loss_and_relative_loss_agree_with_a_bootstrap():
    winner, base = evaluation(2.3, seed=4), evaluation(2.9, seed=5)
    for y, x in ((winner.loss_sums, winner.label_counts), (winner.loss_sums, base.loss_sums)):
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


@pytest.mark.parametrize(
    ("degrees", "quantile"),
    [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (7, 2.365), (30, 2.042), (1000, 1.962)],
)
def test_t_quantiles_are_those_of_the_printed_table(degrees, quantile):
    assert t_quantile_975(degrees) == pytest.approx(quantile, abs=0.01)


def test_spearman_gives_equal_values_their_mean_rank():
    # Ranks 1, 2.5, 2.5, 4 against 1, 2, 3, 4: covariance 4.5, spread sqrt(4.5 * 5).
    assert spearman([1, 2, 2, 3], [1, 2, 3, 4]) == pytest.approx(4.5 / sqrt(4.5 * 5))
    assert spearman([1, 2], [1, 2]) is None
