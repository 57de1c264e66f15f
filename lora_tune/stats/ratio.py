"""Interval estimates of ratios of sums.

A loss per token is a ratio: summed nats over counted tokens. Its examples, not its tokens,
are independent draws, so every standard error here is clustered by example. Seed noise is
not covered; ``selection`` adds it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import fsum, sqrt
from typing import NamedTuple

from lora_tune.stats.student import t_quantile_975


class Interval(NamedTuple):
    """Both ends of a 95 % interval."""

    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RatioEstimate:
    """A ratio of sums. With a single example there is no standard error and no interval."""

    value: float
    standard_error: float | None
    interval: Interval | None


def ratio_estimate(numerators: Sequence[float], denominators: Sequence[float]) -> RatioEstimate:
    """Estimate ``sum(y) / sum(x)`` with a standard error clustered by example.

    With R = sum(y) / sum(x) and the residuals e_i = y_i - R * x_i of n examples,

        SE(R) = sqrt(n / (n - 1) * sum(e_i**2)) / sum(x)

    which is the linearised (delta method) error of a ratio of means. The interval is
    R +- t(0.975, n - 1) * SE. Three uses:

    - a mean loss: y the loss sums, x the label counts;
    - a paired difference: y the differences of two models' loss sums, x the label counts;
    - a relative loss: y one model's loss sums, x the other's.

    Args:
        numerators: y, one value an example.
        denominators: x, one value an example; their sum is not 0.

    Raises:
        ValueError: The two differ in length, are empty, or the denominators sum to 0.

    Source: Cochran, Sampling Techniques, 3rd edition, chapter 6 (ratio estimators).

    >>> ratio_estimate([2.0, 4.0], [1.0, 1.0]).value
    3.0
    """
    n = len(numerators)
    total = fsum(denominators)
    if n != len(denominators) or total == 0:
        raise ValueError(
            f"a ratio needs as many numerators as denominators and a sum that is not 0; "
            f"got {n} and {len(denominators)}, sum {total}"
        )
    value = fsum(numerators) / total
    if n < 2:
        return RatioEstimate(value=value, standard_error=None, interval=None)
    squares = fsum((y - value * x) ** 2 for y, x in zip(numerators, denominators, strict=True))
    error = sqrt(n / (n - 1) * squares) / abs(total)
    half = t_quantile_975(n - 1) * error
    return RatioEstimate(
        value=value, standard_error=error, interval=Interval(value - half, value + half)
    )
