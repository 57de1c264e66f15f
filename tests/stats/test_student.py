"""Quantiles and p values of Student's t against printed tables; ranks and Holm's correction by hand."""

from math import inf, sqrt

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_tune.stats.holm import holm
from lora_tune.stats.rank_correlation import spearman
from lora_tune.stats.student import t_quantile, t_quantile_975, two_sided_p


@pytest.mark.parametrize(
    ("degrees", "quantile"),
    [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (7, 2.365), (30, 2.042), (1000, 1.962)],
)
def test_t_quantiles_are_those_of_the_printed_table(degrees, quantile):
    assert t_quantile_975(degrees) == pytest.approx(quantile, abs=0.0005)


def test_with_infinite_degrees_quantiles_are_normal():
    assert t_quantile(0.8, inf) == pytest.approx(0.8416, abs=5e-5)
    assert two_sided_p(1.96, 1.0, inf) == pytest.approx(0.05, abs=5e-5)


@pytest.mark.parametrize("degrees", [1, 2.5, 40, inf])
def test_a_difference_at_the_end_of_the_95_percent_interval_has_p_5_percent(degrees):
    assert two_sided_p(-3 * t_quantile_975(degrees), 3.0, degrees) == pytest.approx(0.05)


def test_without_error_a_difference_is_certain_and_no_difference_is_none():
    assert two_sided_p(0.1, 0.0, 5) == 0.0
    assert two_sided_p(0.0, 0.0, 5) == 1.0


def test_spearman_gives_equal_values_their_mean_rank():
    # Ranks 1, 2.5, 2.5, 4 against 1, 2, 3, 4: covariance 4.5, spread sqrt(4.5 * 5).
    assert spearman([1, 2, 2, 3], [1, 2, 3, 4]) == pytest.approx(4.5 / sqrt(4.5 * 5))
    assert spearman([1, 2], [1, 2]) is None


def test_holm_corrects_the_smallest_most_and_keeps_the_order():
    # By hand: 3 * 0.01, then 2 * 0.02, then the third at least as large as the second.
    assert holm([0.02, 0.03, 0.01]) == pytest.approx((0.04, 0.04, 0.03))
    assert holm([]) == ()
    assert holm([0.7, 0.6]) == (1.0, 1.0)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=6))
def test_holm_never_lowers_a_p_value_and_never_reorders_them(p_values):
    adjusted = holm(p_values)
    assert all(p <= a <= 1 for p, a in zip(p_values, adjusted, strict=True))
    by_p = [a for _, a in sorted(zip(p_values, adjusted, strict=True))]
    assert by_p == sorted(by_p)
    assert adjusted[p_values.index(min(p_values))] <= min(1, len(p_values) * min(p_values))
