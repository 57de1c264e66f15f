"""Losses of candidates over seeds and rows, and the two errors of their means.

What a confirmation shows of a candidate errs for two reasons: other rows would have given another
loss (row part), and so would other seeds (seed part). Each has an estimate of its own here, and
``TwoPartError`` puts them together.

Shapes: K candidates, S seeds (the same for all), G clusters of rows, B bootstrap resamples.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from math import exp, sqrt

import numpy as np

from lora_tune.records import EvalResult
from lora_tune.stats.paired import Floats, cluster_index, sums_by_cluster
from lora_tune.stats.student import t_quantile, two_sided_p

RESAMPLES = 2000
MIN_DIFFERENCE_DEGREES = 4  # with fewer, Student's t is too wide for the gain (see ``seed_noise``)


@dataclass(frozen=True, slots=True, kw_only=True)
class TwoPartError:
    """Error of a mean loss or a difference: standard errors of both parts, with degrees of freedom."""

    rows: float
    row_degrees: float
    seeds: float  # 0 with a single seed
    seed_degrees: float

    @property
    def total(self) -> float:
        """Standard error of both parts together."""
        return sqrt(self.rows**2 + self.seeds**2)

    def half_width(self, level: float = 0.95) -> float:
        """Return half the interval, sqrt((t_rows * rows)**2 + (t_seeds * seeds)**2).

        Each part is widened by the quantile of its own degrees of freedom. One quantile with
        Welch-Satterthwaite degrees covers 92 % instead of 95 % when the few seeds carry the noise: an
        estimate that comes out small by luck also pretends to many degrees.

        Source: Banerjee, Simplified interval estimation for the difference between means, Sankhya 22 (1960).
        """
        if level == 0 or self.total == 0:
            return 0.0
        tail = (1 + level) / 2
        rows = t_quantile(tail, self.row_degrees) * self.rows if self.rows else 0.0
        seeds = t_quantile(tail, self.seed_degrees) * self.seeds if self.seeds else 0.0
        return sqrt(rows**2 + seeds**2)

    def p_value(self, difference: float) -> float:
        """Return the two-sided p: 1 less the level whose interval just reaches zero."""
        if difference == 0:
            return 1.0
        if self.seeds == 0:
            return two_sided_p(difference, self.rows, self.row_degrees)
        if self.rows == 0:
            return two_sided_p(difference, self.seeds, self.seed_degrees)
        low, high = -40.0, 0.0  # natural logarithm of p
        for _ in range(50):
            middle = (low + high) / 2
            wide = self.half_width(1 - exp(middle)) > abs(difference)
            low, high = (middle, high) if wide else (low, middle)
        return exp(high)


@dataclass(frozen=True, slots=True, kw_only=True)
class SeedNoise:
    """How much a run's loss varies with its seed, pooled over candidates."""

    between: float  # variance over seeds
    row_share: float  # of it, what the rows' own answers to seeds explain
    degrees: int  # of freedom; 0 with a single seed

    @property
    def variance(self) -> float:
        """Variance beyond what the draw of rows explains."""
        return max(0.0, self.between - self.row_share)


class RunLosses:
    """Losses of several candidates over the same seeds and rows."""

    def __init__(
        self,
        evaluations: Sequence[Sequence[EvalResult]],
        *,
        clusters: Sequence[int] = (),
        seed: int = 0,
    ) -> None:
        """Take evaluations by candidate, then by seed; ``seed`` is that of the bootstrap.

        Raises:
            ValueError: Runs differ in number, rows or target tokens, or a row has no cluster.
        """
        counts = evaluations[0][0].label_counts if evaluations and evaluations[0] else ()
        seeds = {len(runs) for runs in evaluations}
        if not counts or len(seeds) != 1:
            raise ValueError("every candidate needs the same number of evaluations, at least one")
        if any(found.label_counts != counts for runs in evaluations for found in runs):
            raise ValueError("candidates are compared on the same rows; their target tokens differ")
        index = cluster_index(clusters, len(counts))
        runs = np.asarray([found.loss_sums for runs in evaluations for found in runs])
        sums = sums_by_cluster(runs, index)
        self.sums_KSG = sums.reshape(len(evaluations), seeds.pop(), -1)
        self.counts_G = sums_by_cluster(np.asarray([counts], dtype=np.float64), index)[0]
        self.num_rows = len(counts)
        self._seed = seed

    @property
    def num_clusters(self) -> int:
        """Clusters of rows; the number of rows when each stands for itself."""
        return len(self.counts_G)

    @property
    def num_seeds(self) -> int:
        """Runs of each candidate."""
        return int(self.sums_KSG.shape[1])

    @cached_property
    def losses(self) -> Floats:
        """Loss of every run, nats per target token, (K, S)."""
        losses: Floats = self.sums_KSG.sum(axis=2) / self.counts_G.sum()
        return losses

    @cached_property
    def _resampled(self) -> Floats:
        """Mean losses over seeds on clusters drawn again, the same draws for all, (B, K)."""
        draws_BG = _draws(self.num_clusters, self._seed)
        means: Floats = (draws_BG @ self.sums_KSG.mean(axis=1).T) / (draws_BG @ self.counts_G)[
            :, None
        ]
        return means

    def row_error(self, weights_K: Floats) -> float:
        """Return the row part of a weighted sum of candidates: the bootstrap's spread.

        It is widened by sqrt(G / (G - 1)), as a resample is that much too narrow. A single cluster shows no
        spread; its error is taken as large as the loss itself, so that nothing is told apart.

        Source: Efron and Tibshirani, An Introduction to the Bootstrap, section 5.3.
        """
        if self.num_clusters < 2:
            return float(self.losses.max())
        spread = float((self._resampled @ weights_K).std(ddof=1))
        return spread * sqrt(self.num_clusters / (self.num_clusters - 1))

    @property
    def seed_sd(self) -> float | None:
        """Standard deviation over seeds of one run's loss, pooled over candidates; None with one seed."""
        candidates, seeds = self.losses.shape
        if seeds < 2:
            return None
        return sqrt(
            float((_centred(self.losses, double=False) ** 2).sum()) / candidates / (seeds - 1)
        )

    def seed_noise(self, *, of_differences: bool) -> SeedNoise:
        """Return the seed variance pooled over candidates; no degrees with a single seed.

        Within candidates it has K (S - 1) degrees of freedom. Seeds are common to the candidates, so
        what a seed does to all alike cancels in a difference; taken out first, (K - 1) (S - 1)
        degrees are left. For differences that is done from 4 degrees on; with fewer the variance within
        candidates stands in, which is too large rather than too small when seeds act alike.

        Rows answer to seeds one by one too. That part is already in the row error of the mean over seeds,
        so its estimate is taken off, and nothing is left below zero.
        """
        candidates, seeds = self.losses.shape
        if seeds < 2:
            return SeedNoise(between=0.0, row_share=0.0, degrees=0)
        without_common = (candidates - 1) * (seeds - 1)
        double = of_differences and without_common >= MIN_DIFFERENCE_DEGREES
        degrees = without_common if double else candidates * (seeds - 1)
        return SeedNoise(
            between=float((_centred(self.losses, double=double) ** 2).sum()) / degrees,
            row_share=self._row_share(double=double, degrees=degrees),
            degrees=degrees,
        )

    def _row_share(self, *, double: bool, degrees: int) -> float:
        """Return the variance between seeds that the rows' own answers to seeds explain."""
        if self.num_clusters < 2:
            return 0.0
        parts_KSG = self.sums_KSG - self.losses[:, :, None] * self.counts_G
        squares = (_centred(parts_KSG, double=double) ** 2).sum() / degrees
        scale = self.num_clusters / (self.num_clusters - 1) / self.counts_G.sum() ** 2
        return float(squares * scale)

    def score_error(self, candidate: int) -> TwoPartError:
        """Return the error of a candidate's mean loss over its seeds."""
        weights = np.zeros(len(self.losses))
        weights[candidate] = 1.0
        noise = self.seed_noise(of_differences=False)
        return self._error(weights, noise, variance=noise.variance / self.num_seeds)

    def difference_error(self, first: int, second: int) -> TwoPartError:
        """Return the error of the difference of two candidates' mean losses.

        Noise grows near the edge of divergence: among several candidates a pair whose own differences
        vary more over seeds than the pool keeps its own, larger variance.
        """
        weights = np.zeros(len(self.losses))
        weights[first], weights[second] = 1.0, -1.0
        noise = self.seed_noise(of_differences=True)
        if len(weights) > 2 and noise.degrees:
            own = float((self.losses[first] - self.losses[second]).var(ddof=1)) / 2
            noise = replace(noise, between=max(noise.between, own))
        return self._error(weights, noise, variance=2 * noise.variance / self.num_seeds)

    def _error(self, weights_K: Floats, noise: SeedNoise, *, variance: float) -> TwoPartError:
        return TwoPartError(
            rows=self.row_error(weights_K),
            row_degrees=max(1, self.num_clusters - 1),
            seeds=sqrt(variance),
            seed_degrees=max(1, noise.degrees),
        )


def _centred(values: Floats, *, double: bool) -> Floats:
    """Return values of shape (K, S, ...) less each candidate's mean, and less each seed's if ``double``."""
    within: Floats = values - values.mean(axis=1, keepdims=True)
    return within - within.mean(axis=0, keepdims=True) if double else within


@lru_cache(maxsize=4)
def _draws(clusters: int, seed: int) -> Floats:
    """Return how often each cluster is drawn in each resample, (RESAMPLES, clusters)."""
    picks = np.random.default_rng(seed).integers(clusters, size=(RESAMPLES, clusters))
    offsets = np.arange(RESAMPLES)[:, None] * clusters
    found = np.bincount((picks + offsets).ravel(), minlength=RESAMPLES * clusters)
    return found.reshape(RESAMPLES, clusters).astype(np.float64)
