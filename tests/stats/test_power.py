"""Power against the published formula, its inverse, and tests on drawn differences."""

from math import sqrt

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from stats_runs import evaluation, noisy_runs

from lora_tune.stats.paired import paired_difference
from lora_tune.stats.power import rows_needed, smallest_visible_difference
from lora_tune.stats.selection import decide


def test_rows_needed_are_7_85_times_the_squared_ratio():
    assert rows_needed(0.005, sigma_d=0.05) == 785
    assert rows_needed(0.01, sigma_d=0.05) == 197


@given(
    st.floats(0.001, 0.5),
    st.floats(0.0, 0.01),
    st.integers(1, 5),
    st.floats(0.005, 0.1),
)
def test_the_rows_needed_see_the_difference_and_one_less_does_not(sigma_d, seed_sd, seeds, wanted):
    rows = rows_needed(wanted, sigma_d=sigma_d, seed_sd=seed_sd, seeds=seeds)
    seen = {"sigma_d": sigma_d, "seed_sd": seed_sd, "seeds": seeds}
    if rows is None:
        assert smallest_visible_difference(num_rows=10**12, **seen) > wanted * 0.999999
        return
    assert smallest_visible_difference(num_rows=rows, **seen) <= wanted * (1 + 1e-9)
    if rows > 1:
        assert smallest_visible_difference(num_rows=rows - 1, **seen) > wanted * (1 - 1e-9)


def test_seeds_set_a_limit_that_no_number_of_rows_lifts():
    assert rows_needed(0.005, sigma_d=0.05, seed_sd=0.01, seeds=3) is None
    limit = smallest_visible_difference(sigma_d=0.0, num_rows=1, seed_sd=0.01, seeds=2)
    assert limit == pytest.approx(2.8016 * 0.01, rel=1e-4)


def test_few_degrees_of_freedom_see_less():
    known = smallest_visible_difference(sigma_d=0.0, num_rows=1, seed_sd=0.01, seeds=3)
    few = smallest_visible_difference(
        sigma_d=0.0, num_rows=1, seed_sd=0.01, seeds=3, seed_degrees=4
    )
    assert few / known == pytest.approx((2.7764 + 0.9410) / 2.8016, rel=1e-4)


@pytest.mark.parametrize("wrong", [{"num_rows": 0}, {"seeds": 0}])
def test_no_rows_or_no_seeds_are_refused(wrong):
    with pytest.raises(ValueError, match="at least one row and one seed"):
        smallest_visible_difference(**{"sigma_d": 0.1, "num_rows": 1, **wrong})


def test_the_smallest_visible_difference_is_found_in_four_of_five_tests():
    rng, rows, found = np.random.default_rng(2), 80, 0
    visible = smallest_visible_difference(sigma_d=0.05, num_rows=rows, row_degrees=rows - 1)
    for _ in range(1000):
        first = evaluation(2 + rng.normal(visible, 0.05, rows))
        found += paired_difference(first, evaluation([2.0] * rows)).p_value < 0.05
    assert found / 1000 == pytest.approx(0.8, abs=3 * sqrt(0.16 / 1000))


def test_a_decision_says_what_it_can_see_and_which_rows_would_see_the_margin():
    runs = [noisy_runs("a", 2.0), noisy_runs("default", 2.02)]
    found = decide(runs, default="default", practical_margin=0.005)
    error = found.against_default
    expected = smallest_visible_difference(
        sigma_d=error.row_error * sqrt(200),
        num_rows=200,
        seed_sd=error.seed_error * sqrt(3 / 2),
        seeds=3,
        row_degrees=199,
        seed_degrees=4,
    )
    assert found.smallest_visible == pytest.approx(expected)
    assert (found.rows_needed <= 200) == (found.smallest_visible <= 0.01)
    wide = [
        noisy_runs("a", 2.0, shifts=(-0.05, 0.0, 0.05)),
        noisy_runs("default", 2.0, shifts=(0.05, 0.0, -0.05)),
    ]
    assert decide(wide, default="default", practical_margin=0.005).rows_needed is None
