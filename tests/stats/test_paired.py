"""The paired difference by hand, against the ratio estimator, and its symmetries."""

from math import inf, sqrt

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from stats_runs import evaluation

from lora_tune.stats.paired import paired_difference
from lora_tune.stats.ratio import ratio_estimate
from lora_tune.stats.student import t_quantile

rows_of_losses = st.lists(
    st.tuples(st.floats(0, 9), st.floats(0, 9), st.integers(1, 50)), min_size=2, max_size=12
)


def test_the_difference_of_three_rows_by_hand():
    # Differences 1, 2, 3 of one token each: mean 2, error 1 / sqrt(3), t(2) 4.3027 or 2.9200.
    found = paired_difference(evaluation([2.0, 3.0, 5.0]), evaluation([1.0, 1.0, 2.0]))
    assert (found.difference, found.standard_error) == pytest.approx((2.0, 1 / sqrt(3)))
    assert (found.low, found.high) == pytest.approx((-0.4841, 4.4841), abs=1e-4)
    narrow = paired_difference(evaluation([2, 3, 5]), evaluation([1, 1, 2]), level=0.90)
    assert narrow.high == pytest.approx(2 + 2.9200 / sqrt(3), abs=1e-4)
    assert found.within_noise
    assert not narrow.within_noise


def test_clusters_are_the_draws_not_their_rows():
    first, second = evaluation([1.0, 1.0, 3.0, 3.0]), evaluation([0.0] * 4)
    found = paired_difference(first, second, clusters=[5, 5, 9, 9])
    assert (found.num_rows, found.num_clusters) == (4, 2)
    # Two clusters with means 1 and 3: the error of their mean is 1, t has one degree.
    assert (found.difference, found.standard_error) == pytest.approx((2.0, 1.0))
    assert found.high == pytest.approx(2 + t_quantile(0.975, 1))
    assert found.standard_error > paired_difference(first, second).standard_error


def test_evaluations_of_unequal_length_are_compared_on_the_rows_of_both():
    long, short = evaluation([1.0, 2.0, 4.0, 100.0]), evaluation([0.5, 1.0, 2.0])
    cut = paired_difference(evaluation([1.0, 2.0, 4.0]), short)
    assert paired_difference(long, short, clusters=[1, 2, 3, 3]) == cut
    assert paired_difference(short, long).difference == -cut.difference


def test_a_single_cluster_shows_no_spread():
    found = paired_difference(evaluation([1.0, 2.0]), evaluation([0.0, 0.0]), clusters=[4, 4])
    assert (found.low, found.high, found.p_value) == (-inf, inf, 1.0)
    assert found.within_noise


@pytest.mark.parametrize(
    ("first", "second", "clusters", "message"),
    [
        (evaluation([]), evaluation([1.0]), (), "0 are shared"),
        (evaluation([1.0], [2]), evaluation([1.0], [3]), (), "other target tokens"),
        (evaluation([1.0, 2.0]), evaluation([1.0, 2.0]), (1,), "2 rows need 2 cluster numbers"),
    ],
)
def test_what_cannot_be_compared_is_refused(first, second, clusters, message):
    with pytest.raises(ValueError, match=message):
        paired_difference(first, second, clusters=clusters)


@given(rows_of_losses)
def test_it_is_the_ratio_estimate_of_the_differences(rows):
    first, second, counts = (list(column) for column in zip(*rows, strict=True))
    a, b = evaluation(first, counts), evaluation(second, counts)
    found = paired_difference(a, b)
    sums = [x - y for x, y in zip(a.loss_sums, b.loss_sums, strict=True)]
    expected = ratio_estimate(sums, counts)
    assert found.difference == pytest.approx(expected.value, abs=1e-9)
    assert found.standard_error == pytest.approx(expected.standard_error, abs=1e-9)
    assert (found.low, found.high) == pytest.approx(expected.interval, abs=1e-8)


@given(rows_of_losses, st.randoms(use_true_random=False))
def test_the_order_of_rows_does_not_matter_and_swapping_turns_the_sign(rows, random):
    clusters = [place // 2 for place in range(len(rows))]
    shuffled = list(zip(rows, clusters, strict=True))
    random.shuffle(shuffled)

    def compare(pairs, *, swap=False):
        first, second, counts = (
            list(column) for column in zip(*[r for r, _ in pairs], strict=True)
        )
        a, b = evaluation(first, counts), evaluation(second, counts)
        return paired_difference(*((b, a) if swap else (a, b)), clusters=[c for _, c in pairs])

    straight = compare(list(zip(rows, clusters, strict=True)))
    assert compare(shuffled).difference == pytest.approx(straight.difference, abs=1e-9)
    assert compare(shuffled).standard_error == pytest.approx(straight.standard_error, abs=1e-9)
    assert compare(shuffled, swap=True).low == pytest.approx(-straight.high, abs=1e-8)


def test_intervals_of_clustered_rows_hold_the_truth_as_often_as_they_say():
    rng, held, clusters = np.random.default_rng(1), 0, [row // 4 for row in range(120)]
    for _ in range(500):
        shared = rng.normal(size=30)[clusters]
        losses = 0.3 + shared + rng.normal(size=120)
        found = paired_difference(evaluation(losses), evaluation([0.0] * 120), clusters=clusters)
        held += found.low <= 0.3 <= found.high
    assert 0.92 <= held / 500 <= 0.98  # three standard errors of 500 draws around 95 %
