"""What the confirmation showed, as numbers: candidates, the untuned base, metrics, the price paid.

The decision itself (intervals, tie set, verdict) was made when the study ran and is only read here.
Losses are nats per target token. A difference above 0 means that the first of the two is worse.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from lora_tune.errors import StoreError
from lora_tune.records import (
    UNTUNED,
    Candidate,
    CandidateScore,
    Comparison,
    Confirmation,
    ConfirmationRun,
    Decision,
    EvalResult,
    MetricResult,
    RungResult,
    StudySnapshot,
    TrialRecord,
    TrialState,
)
from lora_tune.report.resolved import spec_value
from lora_tune.stats.ratio import Interval, RatioEstimate, ratio_estimate

DEFAULT = "default"


class Standing(StrEnum):
    """Where a candidate stands beside the best one."""

    BEST = "best"
    TIED = "tied"
    UNRESOLVED = "tied, unresolved"  # only because the interval is wide
    WORSE = "worse"
    FAILED = "failed"
    WAITING = "not decided"


@dataclass(frozen=True, slots=True, kw_only=True)
class CandidateSummary:
    """A candidate with its score and with what the search had seen of it."""

    candidate: Candidate
    origin: str  # of its trial; "default" when it is the default alone
    standing: Standing
    chosen: bool
    score: CandidateScore | None  # None before the decision, and when a run failed
    against_best: Comparison | None  # None for the best itself
    runs_done: int  # runs that ended, whether well or not
    reasons: tuple[str, ...]  # of runs that did not come to their end
    search_loss: float | None  # on the selection rows, at the candidate's number of steps
    search_rows: int | None
    search_dtype: str | None

    @property
    def name(self) -> str:
        """The candidate's name."""
        return self.candidate.name

    @property
    def gap(self) -> float | None:
        """Confirmed loss less what the search saw: the search's optimism, and other rows."""
        if self.score is None or self.search_loss is None:
            return None
        return self.score.loss - self.search_loss


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseSummary:
    """The untuned base, and the chosen candidate's mean over seeds beside it, paired by row.

    Intervals here cover the choice of rows, not the seeds. Without a decision only the base's own
    loss is known.
    """

    loss: float
    interval: Interval | None
    selection_loss: float | None
    difference: float | None = None  # chosen less base
    difference_standard_error: float | None = None
    relative_reduction: float | None = None  # 1 - chosen / base: above 0 is better
    reduction_interval: Interval | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Price:
    """What it costs and saves to choose another candidate than the one of the lowest loss."""

    chosen: str
    best: str
    relative_loss: float  # chosen / best - 1
    saved_bytes: int  # above 0: the chosen one needs less
    saved_step_s: float | None  # None where a time is not known
    chosen_rank: int
    best_rank: int


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricSummary:
    """A metric beside the loss for one candidate or the untuned base, mean over rows and seeds."""

    metric: str
    subject: str
    mean: float | None
    interval: Interval | None  # of the rows; None without values or with a single row
    num_rows: int
    num_seeds: int
    reasons: tuple[str, ...]  # why values are missing, each once


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfirmationSummary:
    """All that a report states about the confirmation."""

    candidates: tuple[CandidateSummary, ...]  # by loss, those without one last
    default: str | None
    seeds: int
    refit: bool
    refit_wanted: bool  # by the study file, whatever became of it
    num_runs: int  # that ended
    num_runs_planned: int
    num_rows: int | None
    num_labels: int | None
    compute_dtype: str | None
    base: BaseSummary | None
    price: Price | None  # None also when the best was chosen
    metrics: tuple[MetricSummary, ...]
    decision: Decision | None

    @property
    def chosen(self) -> CandidateSummary | None:
        """The recommended candidate, None before the decision."""
        return next((c for c in self.candidates if c.chosen), None)

    def call(self, name: str) -> str:
        """Return a candidate's name as it stands in a sentence."""
        return called(name, default=self.default)

    def candidate(self, name: str) -> CandidateSummary:
        """Return the candidate of this name."""
        return next(c for c in self.candidates if c.name == name)


def called(name: str, *, default: str | None) -> str:
    """Return a candidate's name as it stands in a sentence.

    The default may be a trial of the search, or a configuration of its own named "default".

    >>> called("trial 3", default="trial 3"), called("default", default="default")
    ('the default (trial 3)', 'the default')
    """
    if name == DEFAULT:
        return "the default"
    return f"the default ({name})" if name == default else name


def summarize_confirmation(snapshot: StudySnapshot) -> ConfirmationSummary | None:
    """Compute what the report states about the confirmation; None where there is none yet.

    Raises:
        StoreError: A candidate's trial or a candidate of the decision is missing, or evaluations
            that are compared are not over the same rows.
    """
    confirmation = snapshot.confirmation
    if confirmation is None:
        return None
    _check(snapshot, confirmation)
    evaluations = [run.evaluation for run in confirmation.runs if run.evaluation is not None]
    rows = evaluations[0] if evaluations else confirmation.base_evaluation
    return ConfirmationSummary(
        candidates=_candidates(snapshot, confirmation),
        default=confirmation.default,
        seeds=confirmation.seeds,
        refit=confirmation.refit,
        refit_wanted=spec_value(snapshot.lock.spec, "select", "refit") == "all-rows",
        num_runs=sum(run.state is not TrialState.RUNNING for run in confirmation.runs),
        num_runs_planned=confirmation.seeds * len(confirmation.candidates),
        num_rows=len(rows.label_counts) if rows else None,
        num_labels=sum(rows.label_counts) if rows else None,
        compute_dtype=rows.compute_dtype if rows else None,
        base=_base(confirmation),
        price=_price(confirmation.decision),
        metrics=_metrics(confirmation),
        decision=confirmation.decision,
    )


def _search_result(trial: TrialRecord, steps: int) -> RungResult | None:
    """Return what the search saw of a trial after so many steps; losses of other lengths do not compare."""
    return next((result for result in trial.rungs if result.steps == steps), None)


def _check(snapshot: StudySnapshot, confirmation: Confirmation) -> None:
    numbers = {trial.number for trial in snapshot.trials}
    names = {candidate.name for candidate in confirmation.candidates}
    for candidate in confirmation.candidates:
        if candidate.trial is not None and candidate.trial not in numbers:
            raise StoreError(
                f"{snapshot.folder}: the confirmation names trial {candidate.trial}, which the study "
                f"does not have ({len(numbers)} trials). Restore the folder "
                f"trials/{candidate.trial:04d}."
            )
    decision = confirmation.decision
    for name in (decision.chosen, decision.best) if decision else ():
        if name not in names:
            raise StoreError(
                f"{snapshot.folder}: the decision names {name}, which is no candidate of the "
                f"confirmation ({', '.join(sorted(names))}). Run the same command again."
            )
    evaluations = [run.evaluation for run in confirmation.runs] + [confirmation.base_evaluation]
    sizes = [evaluation.label_counts for evaluation in evaluations if evaluation is not None]
    if any(size != sizes[0] for size in sizes):
        lengths = sorted({len(size) for size in sizes})
        raise StoreError(
            f"{snapshot.folder}: candidates and untuned base were confirmed on different rows "
            f"({' and '.join(map(str, lengths))}). Run the study again."
        )


def _candidates(
    snapshot: StudySnapshot, confirmation: Confirmation
) -> tuple[CandidateSummary, ...]:
    trials = {trial.number: trial for trial in snapshot.trials}
    found = [
        _candidate(
            confirmation,
            candidate,
            trial=None if candidate.trial is None else trials[candidate.trial],
        )
        for candidate in confirmation.candidates
    ]
    return tuple(sorted(found, key=lambda c: float("inf") if c.score is None else c.score.loss))


def _candidate(
    confirmation: Confirmation, candidate: Candidate, *, trial: TrialRecord | None
) -> CandidateSummary:
    decision = confirmation.decision
    runs = confirmation.runs_of(candidate.name)
    scores = decision.scores if decision else ()
    comparisons = decision.against_best if decision else ()
    seen = _search_result(trial, candidate.steps) if trial else None
    return CandidateSummary(
        candidate=candidate,
        origin=trial.origin if trial else "default",
        standing=_standing(decision, candidate.name),
        chosen=decision is not None and decision.chosen == candidate.name,
        score=next((s for s in scores if s.candidate == candidate.name), None),
        against_best=next((c for c in comparisons if c.candidate == candidate.name), None),
        runs_done=sum(run.state is not TrialState.RUNNING for run in runs),
        reasons=tuple(_reason(run) for run in runs if _failed(run)),
        search_loss=seen.eval_loss if seen else None,
        search_rows=len(seen.evaluation.label_counts) if seen else None,
        search_dtype=seen.evaluation.compute_dtype if seen else None,
    )


def _standing(decision: Decision | None, name: str) -> Standing:
    if decision is None:
        return Standing.WAITING
    if name in decision.failed:
        return Standing.FAILED
    if name == decision.best:
        return Standing.BEST
    if name in decision.unresolved:
        return Standing.UNRESOLVED
    return Standing.TIED if name in decision.tied else Standing.WORSE


def _failed(run: ConfirmationRun) -> bool:
    return run.state not in (TrialState.RUNNING, TrialState.COMPLETE) or (
        run.state is TrialState.COMPLETE and run.evaluation is None
    )


def _reason(run: ConfirmationRun) -> str:
    return f"seed {run.seed} {run.state.value}: {run.reason or 'no reason recorded'}"


def _base(confirmation: Confirmation) -> BaseSummary | None:
    base, decision = confirmation.base_evaluation, confirmation.decision
    if base is None:
        return None
    clusters = confirmation.clusters
    sums, counts = _by_cluster(base.loss_sums, clusters), _by_cluster(base.label_counts, clusters)
    own = ratio_estimate(sums, counts)
    chosen = _evaluations(confirmation, decision.chosen) if decision else []
    if not chosen:
        return BaseSummary(
            loss=own.value,
            interval=own.interval,
            selection_loss=confirmation.base_selection_loss,
        )
    mean = _by_cluster(_mean_sums(chosen), clusters)
    difference = ratio_estimate([a - b for a, b in zip(mean, sums, strict=True)], counts)
    relative = ratio_estimate(mean, sums)
    return BaseSummary(
        loss=own.value,
        interval=own.interval,
        selection_loss=confirmation.base_selection_loss,
        difference=difference.value,
        difference_standard_error=difference.standard_error,
        relative_reduction=1 - relative.value,
        reduction_interval=_complement(relative),
    )


def _evaluations(confirmation: Confirmation, name: str) -> list[EvalResult]:
    runs = confirmation.runs_of(name)
    return [run.evaluation for run in runs if run.evaluation is not None]


def _mean_sums(evaluations: Sequence[EvalResult]) -> list[float]:
    """Return each row's summed loss, mean over the seeds."""
    columns = zip(*(evaluation.loss_sums for evaluation in evaluations), strict=True)
    return [sum(column) / len(evaluations) for column in columns]


def _by_cluster(values: Sequence[float], clusters: Sequence[int]) -> list[float]:
    """Return the sums over the rows of each cluster; the rows themselves where there are none."""
    if not clusters:
        return list(values)
    totals: dict[int, float] = {}
    for value, cluster in zip(values, clusters, strict=True):
        totals[cluster] = totals.get(cluster, 0.0) + value
    return list(totals.values())


def _complement(relative: RatioEstimate) -> Interval | None:
    interval = relative.interval
    return None if interval is None else Interval(1 - interval.high, 1 - interval.low)


def _price(decision: Decision | None) -> Price | None:
    if decision is None or decision.chosen == decision.best:
        return None
    scores = {score.candidate: score for score in decision.scores}
    chosen, best = scores[decision.chosen], scores[decision.best]
    timed = chosen.step_s > 0 and best.step_s > 0
    return Price(
        chosen=chosen.candidate,
        best=best.candidate,
        relative_loss=chosen.loss / best.loss - 1,
        saved_bytes=best.peak_bytes - chosen.peak_bytes,
        saved_step_s=best.step_s - chosen.step_s if timed else None,
        chosen_rank=chosen.rank,
        best_rank=best.rank,
    )


def _metrics(confirmation: Confirmation) -> tuple[MetricSummary, ...]:
    """Return every metric of every candidate and of the base, in the order in which they came."""
    by_subject = {
        candidate.name: [run.metrics for run in confirmation.runs_of(candidate.name)]
        for candidate in confirmation.candidates
    }
    by_subject[UNTUNED] = [confirmation.base_metrics]
    names = dict.fromkeys(
        result.metric for runs in by_subject.values() for results in runs for result in results
    )
    return tuple(
        _metric(
            [r for results in runs for r in results if r.metric == name],
            metric=name,
            subject=subject,
            clusters=confirmation.clusters,
        )
        for name in names
        for subject, runs in by_subject.items()
    )


def _metric(
    results: Sequence[MetricResult], *, metric: str, subject: str, clusters: Sequence[int]
) -> MetricSummary:
    measured = [result.values for result in results if result.values]
    rows = [sum(row) / len(row) for row in zip(*measured, strict=True)]
    counts = _by_cluster([1.0] * len(rows), clusters[: len(rows)])
    estimate = ratio_estimate(_by_cluster(rows, clusters[: len(rows)]), counts) if rows else None
    reasons = dict.fromkeys(result.reason for result in results if result.reason)
    return MetricSummary(
        metric=metric,
        subject=subject,
        mean=estimate.value if estimate else None,
        interval=estimate.interval if estimate else None,
        num_rows=len(rows),
        num_seeds=len(measured),
        reasons=tuple(reasons) or (() if rows else ("not computed",)),
    )
