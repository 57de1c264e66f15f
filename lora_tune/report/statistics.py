"""Interval estimates of ratios of sums, and the rank correlation of two series.

A loss per token is a ratio: summed nats over counted tokens. Its examples, not its tokens,
are independent draws, so every standard error here is clustered by example. Seed noise is
not covered: a study trains each configuration once.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import fsum, sqrt
from statistics import NormalDist
from typing import NamedTuple


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


def t_quantile_975(degrees: int) -> float:
    """Return the 97.5 % quantile of Student's t.

    Four terms of the expansion around the normal quantile; the error is below 0.01 from 4
    degrees of freedom on. Below that the tabled values stand.

    Source: Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.5 and table 26.10.

    >>> round(t_quantile_975(7), 2), round(t_quantile_975(30), 3)
    (2.36, 2.042)
    """
    if degrees < 4:
        return {1: 12.706, 2: 4.303, 3: 3.182}[degrees]
    z = NormalDist().inv_cdf(0.975)
    return (
        z
        + (z**3 + z) / (4 * degrees)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * degrees**3)
    )


def spearman(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Return the rank correlation of two series, -1 to 1; None for under 3 pairs or no spread.

    Equal values share their mean rank.

    >>> spearman([1, 2, 3], [10, 30, 20])
    0.5
    >>> spearman([1, 1, 1], [1, 2, 3]) is None
    True
    """
    if len(first) < 3:
        return None
    a, b = _ranks(first), _ranks(second)
    mean = (len(first) + 1) / 2
    covariance = fsum((x - mean) * (y - mean) for x, y in zip(a, b, strict=True))
    spread = fsum((x - mean) ** 2 for x in a) * fsum((y - mean) ** 2 for y in b)
    return covariance / sqrt(spread) if spread > 0 else None


def _ranks(values: Sequence[float]) -> list[float]:
    ordered = sorted(values)
    return [ordered.index(value) + (ordered.count(value) + 1) / 2 for value in values]
