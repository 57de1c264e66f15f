"""How fine a difference the rows of a rung tell, on trials whose spread is known."""

from math import sqrt

import numpy as np
import pytest

from lora_tune.records import EvalResult
from lora_tune.stats.evaluation_power import evaluation_power
from lora_tune.stats.power import rows_needed


def trials(spread: float, *, rows: int = 2000, count: int = 8) -> list[EvalResult]:
    """Trials whose per-row losses differ from each other by ``spread``, and one that is bad in every way."""
    generator = np.random.default_rng(3)
    difficulty = generator.normal(2.0, 0.5, rows)
    found = []
    for number in range(count):
        own = generator.normal(0.001 * number, spread / sqrt(2), rows)
        if number == count - 1:
            own += generator.normal(1.0, 3.0, rows)
        found.append(
            EvalResult(
                split="selection",
                loss_sums=tuple(10.0 * float(x) for x in difficulty + own),
                label_counts=(10,) * rows,
                compute_dtype="float32",
            )
        )
    return found


@pytest.mark.parametrize("spread", [0.02, 0.2])
def test_the_spread_between_good_trials_is_found_whatever_bad_ones_do(spread: float) -> None:
    power = evaluation_power(trials(spread), wanted=0.005)
    assert power is not None
    assert power.sigma_d == pytest.approx(spread, rel=0.1)
    assert power.smallest_visible == pytest.approx(2.80 * spread / sqrt(2000), rel=0.1)
    assert power.rows_needed == rows_needed(0.005, sigma_d=power.sigma_d)


def test_rows_of_few_documents_see_less() -> None:
    alone = evaluation_power(trials(0.1), wanted=0.005)
    found = trials(0.1)
    shared = np.repeat(np.random.default_rng(1).normal(0.0, 0.3, 20), 100)
    found[2] = EvalResult(
        split="selection",
        loss_sums=tuple(a + 10.0 * b for a, b in zip(found[2].loss_sums, shared, strict=True)),
        label_counts=found[2].label_counts,
        compute_dtype="float32",
    )
    by_document = evaluation_power(
        [found[0], found[2], found[2]], wanted=0.005, clusters=[i // 100 for i in range(2000)]
    )
    assert alone is not None
    assert by_document is not None
    assert by_document.smallest_visible > 2 * alone.smallest_visible


def test_too_few_trials_and_trials_without_spread_say_nothing() -> None:
    assert evaluation_power(trials(0.1)[:2], wanted=0.005) is None
    assert evaluation_power([trials(0.1)[0]] * 4, wanted=0.005) is None
    assert evaluation_power([], wanted=0.005) is None
