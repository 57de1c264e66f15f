"""The margin from a study's own readings: by hand, against the theorem, and by simulation.

The witness of the rank rule is the distribution-free fact that it rests on: the k-th smallest of n
exchangeable values is at least the next one with probability k/(n+1).
"""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_tune.memory.calibration import (
    Residual,
    calibrate,
    counted,
    least_residuals,
    quantile_rank,
    safety_margin,
    supported_safety,
)
from lora_tune.records import MemoryReading, PackPeak

PREDICTED = 1_000_000


def residuals(*relative: float) -> list[Residual]:
    return [
        Residual(predicted_bytes=PREDICTED, measured_bytes=round(PREDICTED * (1 + r)))
        for r in relative
    ]


def reading(
    allocated: int,
    *,
    predicted: int = PREDICTED,
    outside: int = 0,
    cached: int = 0,
    steps: int = 5,
    free: int = 10_000_000,
    out_of_memory: bool = False,
) -> MemoryReading:
    return MemoryReading(
        measured=PackPeak(
            device="Replay 9000",
            trials=(0,),
            steps=steps,
            rows=4,
            max_length=32,
            num_labels=60,
            allocated_bytes=allocated,
            reserved_bytes=allocated + cached,
            process_bytes=allocated + cached + outside,
            free_bytes=free,
            out_of_memory=out_of_memory,
        ),
        predicted_allocated_bytes=predicted,
        predicted_reserved_bytes=predicted,
    )


# The rule.


def test_below_nineteen_readings_the_prior_stands_unless_one_exceeds_it() -> None:
    assert safety_margin([], prior=0.95) == 1 / 0.95 - 1
    assert safety_margin(residuals(*[0.01] * 18), prior=0.95) == 1 / 0.95 - 1
    assert safety_margin(residuals(0.08, -0.01, 0.02), prior=0.95) == 0.08
    assert safety_margin([], prior=1.0) == 0.0


def test_from_nineteen_readings_on_the_quantile_replaces_the_prior() -> None:
    values = [0.001 * k for k in range(1, 40)]  # 0.1 % to 3.9 %
    # n = 19: rank ceil(20 * 0.95) = 19, the largest; n = 39: rank 38, the second largest
    assert safety_margin(residuals(*values[:19]), prior=0.95) == pytest.approx(0.019)
    assert safety_margin(residuals(*values), prior=0.95) == pytest.approx(0.038)
    assert safety_margin(residuals(*values), prior=0.5) == pytest.approx(0.038)


def test_an_estimate_that_is_too_high_makes_no_negative_margin() -> None:
    assert safety_margin(residuals(*[-0.2] * 30), prior=0.9) == 0.0


@pytest.mark.parametrize("quantile", [0.5, 0.8, 0.9, 0.95, 0.99])
def test_the_rank_is_the_smallest_that_covers_the_quantile(quantile: float) -> None:
    share = Fraction(str(quantile))
    for n in range(400):
        rank = quantile_rank(n, quantile)
        if rank is None:
            assert Fraction(n, n + 1) < share  # not even the largest covers it
            assert n < least_residuals(quantile)
        else:
            assert Fraction(rank, n + 1) >= share > Fraction(rank - 1, n + 1)
            assert n >= least_residuals(quantile)


@pytest.mark.parametrize("draw", ["normal", "cauchy", "exponential", "few values"])
@pytest.mark.parametrize("n", [19, 30, 60])
def test_the_margin_covers_the_next_pack_as_often_as_promised(draw: str, n: int) -> None:
    """Simulated studies: n packs, then one more. Coverage is k/(n+1), more with ties."""
    generator = np.random.default_rng([n, len(draw)])
    sample = {
        "normal": lambda size: generator.normal(0.01, 0.01, size),
        "cauchy": lambda size: 0.01 * np.abs(generator.standard_cauchy(size)),
        "exponential": lambda size: generator.exponential(0.02, size),
        "few values": lambda size: generator.choice([0.0, 0.01, 0.05], size, p=[0.5, 0.3, 0.2]),
    }[draw]
    studies = 20_000
    drawn = sample((studies, n + 1))
    rank = quantile_rank(n)
    assert rank is not None
    bounds = np.maximum(0, np.sort(drawn[:, :n], axis=1)[:, rank - 1])
    for study in range(0, studies, 4000):  # the sorted column is what safety_margin returns
        found = safety_margin(
            [
                Residual(predicted_bytes=10**12, measured_bytes=round(10**12 * (1 + r)))
                for r in drawn[study, :n]
            ],
            prior=0.95,
        )
        assert found == pytest.approx(bounds[study], abs=1e-11)
    covered = np.mean(drawn[:, n] <= bounds)
    exact = rank / (n + 1)
    error = math.sqrt(exact * (1 - exact) / studies)
    assert covered >= exact - 4 * error  # four standard errors of the simulation
    assert exact >= 0.95
    if draw != "few values":
        assert covered <= exact + 4 * error


@given(st.lists(st.floats(-0.5, 2.0), max_size=60), st.floats(0.5, 1.0), st.floats(0.5, 0.99))
def test_a_margin_is_never_negative_and_never_above_all_that_was_seen(
    values: list[float], prior: float, quantile: float
) -> None:
    found = residuals(*values)
    margin = safety_margin(found, prior=prior, quantile=quantile)
    assert 0 <= margin <= max([1 / prior - 1, *(r.relative for r in found)])


@given(st.lists(st.floats(-0.5, 2.0), min_size=1, max_size=60), st.data())
def test_a_higher_reading_never_lowers_the_margin(values: list[float], data: st.DataObject) -> None:
    place = data.draw(st.integers(0, len(values) - 1))
    higher = [*values[:place], values[place] + 0.1, *values[place + 1 :]]
    assert safety_margin(residuals(*higher), prior=0.95) >= safety_margin(
        residuals(*values), prior=0.95
    )


@given(st.lists(st.floats(-0.5, 2.0), max_size=40), st.randoms())
def test_the_order_of_readings_does_not_matter(values: list[float], random: object) -> None:
    shuffled = list(values)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert safety_margin(residuals(*values), prior=0.9) == safety_margin(
        residuals(*shuffled), prior=0.9
    )


@pytest.mark.parametrize("prior", [0.0, -0.1, 1.01])
def test_a_prior_that_is_no_share_is_refused(prior: float) -> None:
    with pytest.raises(ValueError, match="above 0 and at most 1"):
        safety_margin([], prior=prior)


@pytest.mark.parametrize("quantile", [0.0, 1.0, 1.5])
def test_a_quantile_that_is_none_is_refused(quantile: float) -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        quantile_rank(10, quantile)


# The budget.


def test_without_readings_the_budget_is_the_prior_s_share() -> None:
    found = calibrate([], capacity_bytes=1000, prior=0.95)
    assert (found.budget_bytes, found.num_readings, found.outside_bytes) == (950, 0, 0)


def test_few_readings_lower_the_budget_when_they_exceed_the_prior() -> None:
    # 8 % above the estimate, 50,000 B beside the allocator: (10,000,000 - 50,000) / 1.08
    readings = [reading(1_080_000, outside=50_000), reading(990_000, outside=20_000)]
    found = calibrate(readings, capacity_bytes=10_000_000, prior=0.95)
    assert found.budget_bytes == 9_212_962
    assert (found.margin, found.outside_bytes) == (0.08, 50_000)


def test_memory_outside_the_allocator_is_not_charged_beside_the_prior() -> None:
    readings = [reading(1_000_000, outside=400_000)]  # 4 % of the capacity; the prior leaves 5 %
    assert calibrate(readings, capacity_bytes=10_000_000, prior=0.95).budget_bytes == 9_500_000
    readings = [reading(1_000_000, outside=700_000)]
    assert calibrate(readings, capacity_bytes=10_000_000, prior=0.95).budget_bytes == 9_300_000


def test_cached_blocks_do_not_lower_the_budget() -> None:
    readings = [reading(1_000_000, cached=5_000_000)]
    assert calibrate(readings, capacity_bytes=10_000_000, prior=0.95).budget_bytes == 9_500_000


def test_a_pack_that_ran_out_of_memory_would_not_be_planned_again() -> None:
    full = reading(
        1_300_000, predicted=1_400_000, outside=100_000, free=1_500_000, steps=0, out_of_memory=True
    )
    found = calibrate([full], capacity_bytes=1_500_000, prior=0.95)
    assert found.budget_bytes < 1_400_000
    assert found.margin == pytest.approx(1 / 0.95 - 1)  # 1,400,001 / 1,400,000: hardly a margin


def test_packs_too_short_to_have_optimizer_states_do_not_count() -> None:
    short, enough = reading(5_000_000, steps=1), reading(1_000_000, steps=2)
    assert counted([short, enough]) == [enough]
    assert calibrate([short], capacity_bytes=1000, prior=0.95).num_readings == 0


@given(
    st.lists(st.tuples(st.integers(1, 10**7), st.integers(0, 10**6)), max_size=50),
    st.floats(0.5, 1.0),
)
def test_a_budget_never_exceeds_the_memory_there_is(
    packs: list[tuple[int, int]], prior: float
) -> None:
    readings = [reading(allocated, outside=outside) for allocated, outside in packs]
    found = calibrate(readings, capacity_bytes=10**7, prior=prior)
    assert 0 <= found.budget_bytes <= 10**7 - found.outside_bytes * (len(packs) >= 19)
    if len(packs) < 19:
        assert found.budget_bytes <= int(10**7 * prior)


def test_the_supported_safety_charges_everything_that_the_process_took() -> None:
    readings = [reading(1_000_000, cached=20_000, outside=30_000)] * 19
    assert supported_safety(readings[:18]) is None
    assert supported_safety(readings) == pytest.approx(1 / 1.05)
    assert supported_safety([reading(800_000)] * 19) == 1.0
