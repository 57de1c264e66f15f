"""The decision after confirmation: what is tied with the best, what is chosen, and the verdict.

The rule, each sentence of which is a test in ``tests/stats/test_selection.py``:

1. A candidate's score is its mean loss over seeds; the best has the lowest. Candidates are compared
   row by row (cluster by cluster), with both errors of ``run_losses``.
2. Tied with the best is what differs from it by less than noise (the 95 % interval includes zero) or by
   less than the practical margin. The default is tied too while the p value of the best candidate's
   lead over it is above 5 % after Holm's correction: several were tried against the one default.
3. The verdict is *better* when the default is not tied with a better candidate, *worse* when the default
   is the best and nothing ties with it, else *not distinguishable*.
4. Of what is tied the cheapest is chosen: memory, then time, then rank, then loss. When the
   verdict is *better*, only what itself leads the default beyond noise and margin can be chosen. Otherwise
   nothing can be that was measured worse than the default beyond noise or beyond the margin.
5. The adapter of the chosen candidate's median seed is shipped, of an even number the upper of the two
   in the middle: luck is not shipped.

With a single seed there is no seed part: intervals and verdict then hold for the adapters that were
trained, not for what their configurations give with other seeds.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

from lora_tune.records import CandidateScore, Comparison, Decision, EvalResult, Verdict
from lora_tune.stats.holm import holm
from lora_tune.stats.pareto import CostPoint, pareto_front
from lora_tune.stats.power import rows_needed, smallest_visible_difference
from lora_tune.stats.run_losses import RunLosses, TwoPartError
from lora_tune.units import GIB

# Less memory than that is no reason to prefer a candidate: it is within the estimate's own error.
MEMORY_STEP_BYTES = GIB // 2
TIME_STEP = 1.05  # seconds a step within 5 % are equal: timing noise
SIGNIFICANCE = 0.05
# A tie whose interval reaches further, relative to the best's loss, proves nothing.
UNRESOLVED_SHARE = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class CandidateRuns:
    """A candidate's confirmation: one evaluation a seed (None for a run that failed), and its cost."""

    name: str
    evaluations: tuple[EvalResult | None, ...]
    peak_bytes: int
    step_s: float  # 0 when not known
    rank: int
    lora_dropout: float

    @property
    def complete(self) -> bool:
        """Whether every run came to its end."""
        return bool(self.evaluations) and None not in self.evaluations


def decide(
    runs: Sequence[CandidateRuns],
    *,
    default: str | None,
    practical_margin: float,
    clusters: Sequence[int] = (),
    seed: int = 0,
) -> Decision:
    """Decide which candidate to recommend, by the rule of this module.

    Args:
        runs: Candidates with distinct names; the order of their seeds is the same for all.
        default: Name of the default configuration, None where it could not be tried.
        practical_margin: Relative difference that is no reason to pay for.
        clusters: Cluster number of every row; empty: every row is its own.
        seed: Of the bootstrap over rows.

    Raises:
        ValueError: No candidate came to its end, two have one name, or runs cannot be compared.
    """
    complete = [candidate for candidate in runs if candidate.complete]
    failed = tuple(candidate.name for candidate in runs if not candidate.complete)
    if len({candidate.name for candidate in runs}) < len(runs):
        raise ValueError("two candidates of a confirmation have the same name")
    if not complete:
        raise ValueError(
            f"no candidate of the confirmation came to its end; failed: {', '.join(failed) or 'none'}"
        )
    return _Confirmed(
        complete, default=default, margin=practical_margin, clusters=clusters, seed=seed
    ).decision(failed)


class _Confirmed:
    """Candidates all of whose runs came to their end, by loss."""

    def __init__(
        self,
        complete: Sequence[CandidateRuns],
        *,
        default: str | None,
        margin: float,
        clusters: Sequence[int],
        seed: int,
    ) -> None:
        by_name = sorted(complete, key=lambda candidate: candidate.name)
        losses = RunLosses(
            [[found for found in c.evaluations if found is not None] for c in by_name],
            clusters=clusters,
            seed=seed,
        )
        self.losses = losses
        self.places = {candidate.name: place for place, candidate in enumerate(by_name)}
        scores = (_score(candidate, losses, self.places[candidate.name]) for candidate in by_name)
        self.scores = tuple(sorted(scores, key=lambda score: (score.loss, score.candidate)))
        self.best = self.scores[0]
        self.default = default if default in self.places else None
        self.margin = margin
        self.visible = margin * self.best.loss  # nats per target token
        self.against_best = self._compared_with(self.best.candidate)
        self.against_default = self._compared_with(self.default) if self.default else ()

    def decision(self, failed: tuple[str, ...]) -> Decision:
        """Return everything that follows; ``failed`` are the candidates left out."""
        tied = self._tied()
        verdict = self._verdict(tied)
        chosen = _cheapest([s for s in self.scores if s.candidate in self._eligible(tied, verdict)])
        return Decision(
            scores=self.scores,
            failed=failed,
            best=self.best.candidate,
            against_best=self.against_best,
            tied=tied,
            unresolved=tuple(c.candidate for c in self.against_best if self._unresolved(c, tied)),
            chosen=chosen.candidate,
            median_seed=chosen.median_seed,
            default=self.default,
            against_default=self.against_default[0] if self.against_default else None,
            verdict=verdict,
            practical_margin=self.margin,
            num_rows=self.losses.num_rows,
            num_clusters=self.losses.num_clusters,
            seeds=self.losses.num_seeds,
            seed_sd=self.losses.seed_sd,
            smallest_visible=self._smallest_visible(),
            rows_needed=self._rows_needed(),
            front=pareto_front(
                [_cost_point(score) for score in self.scores], practical_margin=self.margin
            ),
        )

    def _compared_with(self, reference: str) -> tuple[Comparison, ...]:
        """Return the other candidates less ``reference``, by difference."""
        base = next(score for score in self.scores if score.candidate == reference)
        others = [score for score in self.scores if score is not base]
        errors = [self._error(score.candidate, reference) for score in others]
        differences = [score.loss - base.loss for score in others]
        p_values = [e.p_value(d) for e, d in zip(errors, differences, strict=True)]
        return tuple(
            _comparison(score, base, error, p_value, adjusted)
            for score, error, p_value, adjusted in zip(
                others, errors, p_values, holm(p_values), strict=True
            )
        )

    def _error(self, first: str, second: str) -> TwoPartError:
        return self.losses.difference_error(self.places[first], self.places[second])

    def _tied(self) -> tuple[str, ...]:
        """Return what is tied with the best, the best first, by loss (rule 2)."""
        found = [
            comparison.candidate
            for comparison in self.against_best
            if comparison.low <= 0
            or comparison.difference < self.visible
            or (comparison.candidate == self.default and not self._leads(self.best.candidate))
        ]
        return (self.best.candidate, *found)

    def _leads(self, name: str) -> bool:
        """Return whether a candidate is better than the default beyond noise and margin."""
        comparison = next(c for c in self.against_default if c.candidate == name)
        return (
            comparison.difference <= -self.visible
            and comparison.high < 0
            and comparison.p_adjusted <= SIGNIFICANCE
        )

    def _verdict(self, tied: Sequence[str]) -> Verdict:
        if self.default is None:
            return Verdict.NONE
        if self.default not in tied:
            return Verdict.BETTER
        alone = self.default == self.best.candidate and len(tied) == 1
        return Verdict.WORSE if alone and self.against_default else Verdict.SAME

    def _eligible(self, tied: Sequence[str], verdict: Verdict) -> set[str]:
        """Return what of the tie set may be chosen (rule 4); never nothing."""
        if verdict is Verdict.NONE:
            return set(tied)
        if verdict is Verdict.BETTER:
            return {name for name in tied if self._leads(name)}
        harmful = {
            c.candidate for c in self.against_default if c.low > 0 or c.difference > self.visible
        }
        return set(tied) - harmful

    def _unresolved(self, comparison: Comparison, tied: Sequence[str]) -> bool:
        return (
            comparison.candidate in tied
            and comparison.difference >= self.visible
            and comparison.high > UNRESOLVED_SHARE * self.best.loss
        )

    def _typical_error(self) -> tuple[float, float]:
        """Return both parts of the error of a difference: with the default, else with the best.

        A candidate without any other gets that of two like it on rows of their own.
        """
        comparisons = self.against_default or self.against_best
        if comparisons:
            return comparisons[0].row_error, comparisons[0].seed_error
        own = self.losses.score_error(0)
        return own.rows * sqrt(2), own.seeds * sqrt(2)

    def _smallest_visible(self) -> float:
        rows, seeds = self._typical_error()
        noise = self.losses.seed_noise(of_differences=True)
        return smallest_visible_difference(
            sigma_d=rows * sqrt(self.losses.num_rows),
            num_rows=self.losses.num_rows,
            seed_sd=seeds * sqrt(self.losses.num_seeds / 2),
            seeds=self.losses.num_seeds,
            row_degrees=max(1, self.losses.num_clusters - 1),
            seed_degrees=max(1, noise.degrees),
        )

    def _rows_needed(self) -> int | None:
        rows, seeds = self._typical_error()
        noise = self.losses.seed_noise(of_differences=True)
        return rows_needed(
            self.visible,
            sigma_d=rows * sqrt(self.losses.num_rows),
            seed_sd=seeds * sqrt(self.losses.num_seeds / 2),
            seeds=self.losses.num_seeds,
            seed_degrees=max(1, noise.degrees),
        )


def median_place(losses: Sequence[float]) -> int:
    """Return the place of the loss in the middle; of an even number the upper of the two.

    >>> median_place([2.3, 2.1, 2.2]), median_place([2.1, 2.2])
    (2, 1)
    """
    order = sorted(range(len(losses)), key=lambda place: (losses[place], place))
    return order[len(order) // 2]


def _score(candidate: CandidateRuns, losses: RunLosses, place: int) -> CandidateScore:
    seed_losses = tuple(float(loss) for loss in losses.losses[place])
    loss = sum(seed_losses) / len(seed_losses)
    error = losses.score_error(place)
    return CandidateScore(
        candidate=candidate.name,
        loss=loss,
        standard_error=error.total,
        low=loss - error.half_width(),
        high=loss + error.half_width(),
        seed_losses=seed_losses,
        median_seed=median_place(seed_losses),
        peak_bytes=candidate.peak_bytes,
        step_s=candidate.step_s,
        rank=candidate.rank,
        lora_dropout=candidate.lora_dropout,
    )


def _comparison(
    score: CandidateScore,
    reference: CandidateScore,
    error: TwoPartError,
    p_value: float,
    p_adjusted: float,
) -> Comparison:
    difference = score.loss - reference.loss
    return Comparison(
        candidate=score.candidate,
        reference=reference.candidate,
        difference=difference,
        standard_error=error.total,
        row_error=error.rows,
        seed_error=error.seeds,
        low=difference - error.half_width(),
        high=difference + error.half_width(),
        p_value=p_value,
        p_adjusted=p_adjusted,
    )


def _cheapest(scores: Sequence[CandidateScore]) -> CandidateScore:
    """Return the cheapest: of those within half a GiB of the least memory, within 5 % of the least time.

    Time is left out when it is not known of every one. Then rank, loss, dropout and name decide.
    """
    least = min(score.peak_bytes for score in scores)
    scores = [score for score in scores if score.peak_bytes - least < MEMORY_STEP_BYTES]
    fastest = min(score.step_s for score in scores)
    if fastest > 0:
        scores = [score for score in scores if score.step_s <= TIME_STEP * fastest]
    return min(scores, key=lambda s: (s.rank, s.loss, s.lora_dropout, s.candidate))


def _cost_point(score: CandidateScore) -> CostPoint:
    return CostPoint(
        name=score.candidate, loss=score.loss, peak_bytes=score.peak_bytes, step_s=score.step_s
    )
