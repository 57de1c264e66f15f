"""What a confirmation can see: the smallest difference, and the rows that a wanted one needs.

"Seen" means: with 80 % probability the two-sided test at 5 % finds it.
"""

from math import ceil, inf, isfinite, sqrt

from lora_tune.stats.student import t_quantile

LEVEL_TAIL = 0.975  # two-sided test at 5 %
POWER = 0.8


def smallest_visible_difference(
    *,
    sigma_d: float,
    num_rows: int,
    seed_sd: float = 0.0,
    seeds: int = 1,
    row_degrees: float = inf,
    seed_degrees: float = inf,
) -> float:
    """Return the smallest difference of two candidates that is seen, in the unit of the two deviations.

    sqrt((q * sigma_d)**2 / rows + (q' * seed_sd)**2 * 2 / seeds), where q and q' are the sum of the
    97.5 % and the 80 % quantile of Student's t with the degrees of freedom of each part (2.80 when many).

    Args:
        sigma_d: Standard deviation, over rows, of the difference of two candidates.
        num_rows: Rows of the split.
        seed_sd: Standard deviation of one run's loss over seeds.
        seeds: Runs of each candidate.
        row_degrees: Of the estimate of ``sigma_d``, rows or clusters less 1; infinite before any are seen.
        seed_degrees: Of the estimate of ``seed_sd``.

    Raises:
        ValueError: There is no row or no seed.

    >>> round(smallest_visible_difference(sigma_d=0.05, num_rows=785), 5)
    0.005
    """
    if num_rows < 1 or seeds < 1:
        raise ValueError(
            f"power needs at least one row and one seed; got {num_rows} rows, {seeds} seeds"
        )
    by_rows = _quantiles(row_degrees) * sigma_d / sqrt(num_rows) if sigma_d else 0.0
    return sqrt(by_rows**2 + _seed_part(seed_sd, seeds, seed_degrees) ** 2)


def rows_needed(
    difference: float,
    *,
    sigma_d: float,
    seed_sd: float = 0.0,
    seeds: int = 1,
    seed_degrees: float = inf,
) -> int | None:
    """Return the rows with which a difference is seen; None if its seeds alone hide it.

    >>> rows_needed(0.005, sigma_d=0.05)
    785
    >>> rows_needed(0.005, sigma_d=0.05, seed_sd=0.01, seeds=3) is None
    True
    """
    left = difference**2 - _seed_part(seed_sd, seeds, seed_degrees) ** 2
    if left <= 0 or not isfinite(sigma_d):
        return None
    return max(1, ceil((_quantiles(inf) * sigma_d) ** 2 / left))


def _seed_part(seed_sd: float, seeds: int, degrees: float) -> float:
    return _quantiles(degrees) * seed_sd * sqrt(2 / seeds) if seed_sd else 0.0


def _quantiles(degrees: float) -> float:
    return t_quantile(LEVEL_TAIL, degrees) + t_quantile(POWER, degrees)
