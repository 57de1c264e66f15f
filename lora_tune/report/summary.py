"""What a study found, as numbers: the winner, how sure that is, what it cost.

Everything is computed from the snapshot. Losses are nats per target token, differences and
leads likewise; shares are fractions of 1. Texts for people are made in ``wording``.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from math import isfinite
from statistics import median

from lora_tune.errors import StoreError
from lora_tune.records import (
    EvalResult,
    RungResult,
    StudyLock,
    StudySnapshot,
    TrialConfig,
    TrialRecord,
    TrialState,
)
from lora_tune.report import formatting as fmt
from lora_tune.report.memory import MemorySummary, summarize_memory
from lora_tune.report.statistics import Interval, ratio_estimate, spearman, t_quantile_975

FAILED_STATES = frozenset({TrialState.DIVERGED, TrialState.INFEASIBLE, TrialState.FAILED})


class Outcome(StrEnum):
    """How far the study is."""

    FINISHED = "finished"  # the winner is confirmed
    UNFINISHED = "unfinished"  # trials or the confirmation are still to come
    NOTHING = "nothing succeeded"  # all trials are over and none can be recommended


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfirmationSummary:
    """The winner against the untuned base on rows that the search never saw.

    Standard errors are clustered by example (see ``ratio_estimate``) and, for the difference
    and the reduction, paired; with a single row they and the intervals are None.
    """

    num_examples: int
    num_labels: int
    compute_dtype: str
    winner_loss: float
    winner_standard_error: float | None
    winner_interval: Interval | None
    base_loss: float
    base_interval: Interval | None
    difference: float  # winner - base: below 0 is better
    difference_standard_error: float | None
    difference_interval: Interval | None
    relative_reduction: float  # 1 - winner / base: above 0 is better
    reduction_interval: Interval | None
    selection_loss: float | None  # what the search saw of the winner, at its highest rung
    selection_dtype: str | None
    selection_examples: int | None  # rows that it was evaluated on there
    gap: float | None  # winner_loss - selection_loss
    base_selection_loss: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class PairedComparison:
    """The leader against another trial at one rung, on the same selection rows.

    ``z`` is lead / standard error. It is not corrected for the number of trials tried.
    """

    trial: int
    origin: str
    rung: int
    steps: int
    leader_loss: float
    trial_loss: float
    lead: float  # trial_loss - leader_loss: above 0, the leader is better
    standard_error: float | None
    z: float | None
    within_noise: bool  # the 95 % interval of the lead includes 0, or there is no interval
    within_margin: bool  # |lead| is below the study's practical margin


@dataclass(frozen=True, slots=True, kw_only=True)
class RungSummary:
    """One rung of the ladder over all trials that were evaluated there."""

    rung: int
    steps: int
    eval_rows: int  # of the selection split, the first ones: losses compare within a rung
    selection_rows: int  # of the split
    num_trials: int
    num_promoted: int  # of these, trials with a result at a later rung
    best_trial: int | None
    best_loss: float | None
    median_loss: float | None
    num_tokens: int
    lane_s: float  # summed over lanes, so lanes that train together each count


@dataclass(frozen=True, slots=True, kw_only=True)
class RungCorrelation:
    """Spearman correlation of the losses at two neighbouring rungs, over trials with both."""

    rung: int
    next_rung: int
    num_trials: int
    spearman: float
    eval_rows: int  # rows behind the losses at ``rung``
    next_eval_rows: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportSummary:
    """All that a report states about a study.

    ``winner`` is the confirmed trial, ``leader`` the winner or, before the confirmation, the
    best trial so far; ``config`` is the leader's. All are None when no trial succeeded.
    """

    name: str
    outcome: Outcome
    winner: int | None
    leader: int | None
    leader_origin: str | None
    config: TrialConfig | None
    confirmation: ConfirmationSummary | None
    best_selection_loss: float | None  # the lowest at the leader's highest rung, any trial
    runner_up: PairedComparison | None
    best_anchor: PairedComparison | None  # None also when the leader is itself an anchor
    states: dict[str, int]
    trials_planned: int | None
    rungs: tuple[RungSummary, ...]
    correlations: tuple[RungCorrelation, ...]
    device: str
    wall_s: float
    num_tokens: int
    tokens_per_s: float | None  # over all wall time, so loading and evaluation are in it
    steps_trained: int  # highest rung of each trial; re-trained cool-downs not counted
    steps_if_all_full: int
    highest_peak_bytes: int
    memory: MemorySummary | None  # None: nothing was measured, as on a CPU
    warnings: tuple[str, ...]


def summarize(snapshot: StudySnapshot) -> ReportSummary:
    """Compute what the report states.

    Raises:
        StoreError: The confirmation names a trial that the study does not have, or its two
            evaluations are not over the same rows.
    """
    ranking = ranked(snapshot.trials)
    leader = _leader(snapshot, ranking)
    runner_up = _comparison(snapshot, leader, ranking) if leader else None
    anchors = [t for t in ranking if _is_anchor(t)]
    best_anchor = None
    if leader and not _is_anchor(leader):
        best_anchor = _comparison(snapshot, leader, anchors)
    num_tokens = sum(r.num_tokens for t in snapshot.trials for r in t.rungs)
    planned = _planned(snapshot)
    return ReportSummary(
        name=snapshot.lock.name,
        outcome=_outcome(snapshot, leader, planned),
        winner=snapshot.confirmation.winner if snapshot.confirmation else None,
        leader=leader.number if leader else None,
        leader_origin=leader.origin if leader else None,
        config=leader.config if leader else None,
        confirmation=_confirmation(snapshot, leader),
        best_selection_loss=_best_selection_loss(leader, ranking),
        runner_up=runner_up,
        best_anchor=best_anchor,
        states=dict(Counter(t.state.value for t in snapshot.trials)),
        trials_planned=planned,
        rungs=_rungs(snapshot),
        correlations=_correlations(snapshot),
        device=snapshot.lock.plan.device,
        wall_s=snapshot.wall_s,
        num_tokens=num_tokens,
        tokens_per_s=num_tokens / snapshot.wall_s if snapshot.wall_s > 0 else None,
        steps_trained=sum(t.steps for t in snapshot.trials),
        steps_if_all_full=len(snapshot.trials) * max(snapshot.lock.rungs, default=0),
        highest_peak_bytes=max((measured_peak(t) for t in snapshot.trials), default=0),
        memory=summarize_memory(snapshot),
        warnings=_warnings(snapshot, leader),
    )


def ranked(trials: Sequence[TrialRecord]) -> list[TrialRecord]:
    """Return the trials best first.

    Trials that could be recommended come first: by the highest rung reached, then by the loss
    there. Then those without a result yet, then diverged, infeasible and failed ones.
    """
    return sorted(trials, key=_rank_key)


def measured_peak(trial: TrialRecord) -> int:
    """Return the highest measured peak of the packs that the trial trained in, 0 if none."""
    return max((r.peak_bytes for r in trial.rungs), default=0)


def effective_step(config: TrialConfig) -> float:
    """Return learning_rate * lora_alpha / 32, the axis that the search bounds."""
    return config.learning_rate * config.lora_alpha / 32


def eval_rows(lock: StudyLock, rung: int) -> int:
    """Return how many selection rows a rung is evaluated on; all in a study of an older version."""
    return lock.eval_rows[rung] if lock.eval_rows else lock.data.num_selection


def spec_value(spec: object, *keys: str) -> object:
    """Return a nested value of a study file, None where a key is missing."""
    for key in keys:
        spec = spec.get(key) if isinstance(spec, dict) else None
    return spec


def _rank_key(trial: TrialRecord) -> tuple[int, int, float, int]:
    loss = trial.best_loss
    group = 2 if trial.state in FAILED_STATES else 0 if _has_result(trial) else 1
    rung = trial.rungs[-1].rung if trial.rungs else -1
    finite = loss if loss is not None and isfinite(loss) else float("inf")
    return group, -rung, finite, trial.number


def _has_result(trial: TrialRecord) -> bool:
    return trial.best_loss is not None and isfinite(trial.best_loss)


def _is_candidate(trial: TrialRecord) -> bool:
    return trial.state not in FAILED_STATES and _has_result(trial)


def _is_anchor(trial: TrialRecord) -> bool:
    return trial.origin.startswith("anchor")


def _leader(snapshot: StudySnapshot, ranking: Sequence[TrialRecord]) -> TrialRecord | None:
    if snapshot.confirmation is None:
        return ranking[0] if ranking and _is_candidate(ranking[0]) else None
    winner = snapshot.confirmation.winner
    for trial in ranking:
        if trial.number == winner:
            return trial
    raise StoreError(
        f"{snapshot.folder}: the confirmation names trial {winner}, which the study does not "
        f"have ({len(ranking)} trials). Restore the folder trials/{winner:04d}."
    )


def _planned(snapshot: StudySnapshot) -> int | None:
    planned = spec_value(snapshot.lock.spec, "search", "trials")
    return planned if isinstance(planned, int) else None


def _outcome(snapshot: StudySnapshot, leader: TrialRecord | None, planned: int | None) -> Outcome:
    running = any(t.state is TrialState.RUNNING for t in snapshot.trials)
    if snapshot.confirmation is not None and not running:
        return Outcome.FINISHED
    short = len(snapshot.trials) < (planned or 1)
    return Outcome.UNFINISHED if running or short or leader else Outcome.NOTHING


def _confirmation(
    snapshot: StudySnapshot, leader: TrialRecord | None
) -> ConfirmationSummary | None:
    confirmation = snapshot.confirmation
    if confirmation is None:
        return None
    winner, base = confirmation.winner_evaluation, confirmation.base_evaluation
    if winner.label_counts != base.label_counts:
        raise StoreError(
            f"{snapshot.folder}: winner and untuned base were confirmed on different rows "
            f"({len(winner.label_counts)} and {len(base.label_counts)}). Run the study again."
        )
    counts = winner.label_counts
    winner_loss = ratio_estimate(winner.loss_sums, counts)
    base_loss = ratio_estimate(base.loss_sums, counts)
    difference = ratio_estimate(_differences(winner, base), counts)
    relative = ratio_estimate(winner.loss_sums, base.loss_sums)
    selection = leader.rungs[-1] if leader and leader.rungs else None
    return ConfirmationSummary(
        num_examples=len(counts),
        num_labels=sum(counts),
        compute_dtype=winner.compute_dtype,
        winner_loss=winner_loss.value,
        winner_standard_error=winner_loss.standard_error,
        winner_interval=winner_loss.interval,
        base_loss=base_loss.value,
        base_interval=base_loss.interval,
        difference=difference.value,
        difference_standard_error=difference.standard_error,
        difference_interval=difference.interval,
        relative_reduction=1 - relative.value,
        reduction_interval=_complement(relative.interval),
        selection_loss=selection.eval_loss if selection else None,
        selection_dtype=selection.evaluation.compute_dtype if selection else None,
        selection_examples=len(selection.evaluation.label_counts) if selection else None,
        gap=winner_loss.value - selection.eval_loss if selection else None,
        base_selection_loss=confirmation.base_selection_loss,
    )


def _complement(interval: Interval | None) -> Interval | None:
    return None if interval is None else Interval(1 - interval.high, 1 - interval.low)


def _differences(first: EvalResult, second: EvalResult) -> list[float]:
    return [a - b for a, b in zip(first.loss_sums, second.loss_sums, strict=True)]


def _at(trial: TrialRecord, rung: int) -> RungResult | None:
    for result in trial.rungs:
        if result.rung == rung and isfinite(result.eval_loss):
            return result
    return None


def _comparison(
    snapshot: StudySnapshot, leader: TrialRecord, others: Sequence[TrialRecord]
) -> PairedComparison | None:
    """Compare with the best of the others at the highest rung that the leader shares with any."""
    for own in reversed(leader.rungs):
        rivals = [
            (result, trial)
            for trial in others
            if trial.number != leader.number and _is_candidate(trial)
            if (result := _at(trial, own.rung)) is not None
            and result.evaluation.label_counts == own.evaluation.label_counts
        ]
        if rivals:
            result, trial = min(rivals, key=lambda pair: (pair[0].eval_loss, pair[1].number))
            return _paired(snapshot, own=own, result=result, trial=trial)
    return None


def _paired(
    snapshot: StudySnapshot, *, own: RungResult, result: RungResult, trial: TrialRecord
) -> PairedComparison:
    counts = own.evaluation.label_counts
    lead = ratio_estimate(_differences(result.evaluation, own.evaluation), counts)
    margin = spec_value(snapshot.lock.spec, "select", "practical_margin")
    error = lead.standard_error
    return PairedComparison(
        trial=trial.number,
        origin=trial.origin,
        rung=own.rung,
        steps=own.steps,
        leader_loss=own.eval_loss,
        trial_loss=result.eval_loss,
        lead=lead.value,
        standard_error=error,
        z=lead.value / error if error else None,
        within_noise=error is None or abs(lead.value) <= t_quantile_975(len(counts) - 1) * error,
        within_margin=isinstance(margin, float)
        and abs(lead.value) < margin * min(own.eval_loss, result.eval_loss),
    )


def _best_selection_loss(
    leader: TrialRecord | None, ranking: Sequence[TrialRecord]
) -> float | None:
    if leader is None or not leader.rungs:
        return None
    rung = leader.rungs[-1].rung
    results = [_at(t, rung) for t in ranking if _is_candidate(t)]
    return min((r.eval_loss for r in results if r is not None), default=None)


def _rungs(snapshot: StudySnapshot) -> tuple[RungSummary, ...]:
    summaries = []
    for rung, steps in enumerate(snapshot.lock.rungs):
        pairs = [(r, t) for t in snapshot.trials for r in t.rungs if r.rung == rung]
        finite = [(r.eval_loss, t.number) for r, t in pairs if isfinite(r.eval_loss)]
        best_loss, best_trial = min(finite, default=(None, None))
        summaries.append(
            RungSummary(
                rung=rung,
                steps=steps,
                eval_rows=eval_rows(snapshot.lock, rung),
                selection_rows=snapshot.lock.data.num_selection,
                num_trials=len(pairs),
                num_promoted=sum(t.rungs[-1].rung > rung for _, t in pairs),
                best_trial=best_trial,
                best_loss=best_loss,
                median_loss=median(loss for loss, _ in finite) if finite else None,
                num_tokens=sum(r.num_tokens for r, _ in pairs),
                lane_s=sum(r.wall_s for r, _ in pairs),
            )
        )
    return tuple(summaries)


def _correlations(snapshot: StudySnapshot) -> tuple[RungCorrelation, ...]:
    found = []
    for rung in range(len(snapshot.lock.rungs) - 1):
        pairs = [
            (low.eval_loss, high.eval_loss)
            for t in snapshot.trials
            if (low := _at(t, rung)) is not None and (high := _at(t, rung + 1)) is not None
        ]
        value = spearman([low for low, _ in pairs], [high for _, high in pairs])
        if value is not None:
            found.append(
                RungCorrelation(
                    rung=rung,
                    next_rung=rung + 1,
                    num_trials=len(pairs),
                    spearman=value,
                    eval_rows=eval_rows(snapshot.lock, rung),
                    next_eval_rows=eval_rows(snapshot.lock, rung + 1),
                )
            )
    return tuple(found)


def _warnings(snapshot: StudySnapshot, leader: TrialRecord | None) -> tuple[str, ...]:
    warnings: list[str] = []
    if leader is not None:
        warnings += _edge_warnings(snapshot, leader)
        warnings += _divergence_warnings(snapshot, leader)
    budget = snapshot.lock.plan.budget_bytes
    over = [t.number for t in snapshot.trials if measured_peak(t) > budget > 0]
    if over:
        warnings.append(
            f"The measured peak of {_named(over)} was above the budget of "
            f"{fmt.format_memory(budget)}."
        )
    warnings += [
        f"The lanes of a pack were lowered from {limit.lanes_before} to {limit.lanes} after "
        f"{fmt.plural(limit.num_readings, 'pack')}: measured peaks may exceed the estimate by "
        f"{fmt.format_percent(limit.margin)}."
        for limit in snapshot.memory.limits
    ]
    return tuple(warnings)


def _edge_warnings(snapshot: StudySnapshot, leader: TrialRecord) -> list[str]:
    space = spec_value(snapshot.lock.spec, "space")
    config = leader.config
    warnings = [
        *_edge_warning("rank", config.rank, spec_value(space, "rank"), key="space.rank"),
        *_edge_warning(
            "effective step (learning rate times lora_alpha / 32)",
            effective_step(config),
            spec_value(space, "learning_rate"),
            key="space.learning_rate",
        ),
    ]
    if spec_value(space, "lora_alpha") is None:
        warnings += _edge_warning(
            "alpha ratio",
            config.lora_alpha / config.rank,
            spec_value(space, "alpha_ratio"),
            key="space.alpha_ratio",
        )
    if leader.suggested.rank > config.rank:
        warnings.append(
            f"Trial {leader.number} was proposed with rank {leader.suggested.rank} and trained "
            f"with {config.rank}, the largest that fits the memory budget."
        )
    return warnings


def _edge_warning(name: str, value: float, choices: object, *, key: str) -> list[str]:
    """Warn when a value is within 5 % of the lowest or highest of at least two choices."""
    if not isinstance(choices, list | tuple):
        return []
    numbers = sorted({float(c) for c in choices if isinstance(c, int | float)})
    if len(numbers) < 2:
        return []
    text = fmt.format_scientific(value) if value < 0.01 else fmt.format_plain(value)
    for bound, side, advice in ((numbers[0], "lower", "down"), (numbers[-1], "upper", "up")):
        if abs(value - bound) <= 0.05 * bound:
            return [
                f"The {name} of {text} is at the {side} end of the space: a better one may lie "
                f"beyond it. Extend {key} {advice}ward."
            ]
    return []


def _divergence_warnings(snapshot: StudySnapshot, leader: TrialRecord) -> list[str]:
    """Warn when a diverged trial took a step less than twice the leader's (or half of it)."""
    own = effective_step(leader.config)
    near = [
        t.number
        for t in snapshot.trials
        if t.state is TrialState.DIVERGED and own / 2 < effective_step(t.config) < own * 2
    ]
    if not near:
        return []
    return [
        f"The learning rate of trial {leader.number} is less than a factor of 2 from where "
        f"{_named(near)} diverged (compared as learning rate times lora_alpha / 32). "
        f"Results vary more from run to run there; a smaller one is the safer choice."
    ]


def _named(numbers: Sequence[int]) -> str:
    return f"{'trial' if len(numbers) == 1 else 'trials'} {', '.join(map(str, numbers))}"
