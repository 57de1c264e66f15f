"""The rank correlation of two series."""

from collections.abc import Sequence
from math import fsum, sqrt


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
