"""The difference of two evaluations, row by row, in closed form.

Rows of one conversation or document are no independent draws: with clusters given, the clusters are.
Seeds are not looked at here; ``selection`` does both.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

import numpy as np
from numpy.typing import NDArray

from lora_tune.records import EvalResult
from lora_tune.stats.student import t_quantile, two_sided_p

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class PairedDifference:
    """The first evaluation less the second, nats per target token; above 0 the first is worse."""

    difference: float
    standard_error: float  # infinite with a single row or cluster: nothing shows the spread
    low: float
    high: float
    p_value: float  # two-sided, of no difference
    num_rows: int
    num_clusters: int

    @property
    def within_noise(self) -> bool:
        """Whether the interval includes zero."""
        return self.low <= 0 <= self.high


def paired_difference(
    first: EvalResult,
    second: EvalResult,
    *,
    clusters: Sequence[int] = (),
    level: float = 0.95,
) -> PairedDifference:
    """Compare two evaluations on the rows that both have: the first ones of the same split.

    With d the difference of two loss sums and n the target tokens of a row or cluster, the difference is
    R = sum(d) / sum(n), its error sqrt(G / (G - 1) * sum((d - R n)**2)) / sum(n) over G clusters, and
    the interval R +- t(G - 1) * error.

    Args:
        first: The one that is worse when the difference is above 0.
        second: What it is compared with.
        clusters: Cluster number of every row; empty: every row is its own. More than are shared are cut.
        level: Share of repetitions in which the interval holds the truth.

    Raises:
        ValueError: No row is shared, rows have other target tokens, or a row has no cluster.

    Source: Cochran, Sampling Techniques, 3rd edition, chapter 6; clusters as in section 9A.

    >>> def of(*sums): return EvalResult(
    ...     split="selection", loss_sums=sums, label_counts=(2, 2, 2), compute_dtype="float32")
    >>> paired_difference(of(4.0, 6.0, 5.0), of(3.0, 5.0, 4.0)).difference
    0.5
    """
    rows = min(len(first.label_counts), len(second.label_counts))
    if rows == 0 or first.label_counts[:rows] != second.label_counts[:rows]:
        raise ValueError(
            f"evaluations are compared on the same rows; {rows} are shared"
            + (", with other target tokens" if rows else "")
        )
    differences = np.subtract(first.loss_sums[:rows], second.loss_sums[:rows])[None, :]
    index = cluster_index(clusters, rows)
    sums = sums_by_cluster(differences, index)[0]
    counts = sums_by_cluster(np.asarray([first.label_counts[:rows]], dtype=np.float64), index)[0]
    return _estimate(sums, counts, num_rows=rows, level=level)


def _estimate(sums: Floats, counts: Floats, *, num_rows: int, level: float) -> PairedDifference:
    groups, total = len(sums), counts.sum()
    difference = float(sums.sum() / total)
    if groups == 1:
        error, half, p_value = inf, inf, 1.0
    else:
        squares = ((sums - difference * counts) ** 2).sum()
        error = float(np.sqrt(groups / (groups - 1) * squares) / total)
        half = t_quantile((1 + level) / 2, groups - 1) * error
        p_value = two_sided_p(difference, error, groups - 1)
    return PairedDifference(
        difference=difference,
        standard_error=error,
        low=difference - half,
        high=difference + half,
        p_value=p_value,
        num_rows=num_rows,
        num_clusters=groups,
    )


def cluster_index(clusters: Sequence[int], rows: int) -> NDArray[np.intp]:
    """Return for each of the first rows the place of its cluster: 0, 1, ...; alone when there are none.

    Raises:
        ValueError: Clusters are given, but for fewer rows.
    """
    if not clusters:
        return np.arange(rows)
    if len(clusters) < rows:
        raise ValueError(f"{rows} rows need {rows} cluster numbers; {len(clusters)} are given")
    index: NDArray[np.intp] = np.unique(np.asarray(clusters[:rows]), return_inverse=True)[1]
    return index


def sums_by_cluster(values: Floats, index: NDArray[np.intp]) -> Floats:
    """Return values of shape (runs, rows) summed over the rows of each cluster: (runs, clusters)."""
    if len(index) == 0 or index[-1] == len(index) - 1:  # every row is its own cluster
        return values
    totals = np.zeros((values.shape[0], int(index.max()) + 1))
    for run, row in enumerate(values):
        totals[run] = np.bincount(index, weights=row, minlength=totals.shape[1])
    return totals
