"""What a study found, as numbers: the recommendation, how sure that is, what it cost.

Everything is computed from the snapshot. Losses are nats per target token, differences and
leads likewise; shares are fractions of 1. Texts for people are made in ``wording``.
"""

from collections import Counter
from dataclasses import dataclass
from enum import StrEnum

from lora_tune.records import StudySnapshot, TrialConfig, TrialRecord, TrialState
from lora_tune.report.caveats import caveats
from lora_tune.report.confirmation import ConfirmationSummary, summarize_confirmation
from lora_tune.report.cost import CostSummary, summarize_cost
from lora_tune.report.memory import MemorySummary, summarize_memory
from lora_tune.report.ranking import (
    is_anchor,
    is_candidate,
    kept_early,
    measured_peak,
    ranked,
    result_at,
)
from lora_tune.report.resolved import planned_trials
from lora_tune.report.rivals import PairedComparison, best_rival
from lora_tune.report.rungs import (
    RungCorrelation,
    RungSummary,
    correlate_rungs,
    place_at_first_rung,
    summarize_rungs,
)
from lora_tune.stats.redundancy import Redundancy, ratio_redundancy


class Outcome(StrEnum):
    """How far the study is."""

    FINISHED = "finished"  # the confirmation has decided
    UNFINISHED = "unfinished"  # trials or the confirmation are still to come
    NOTHING = "nothing succeeded"  # all is over and nothing can be recommended


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportSummary:
    """All that a report states about a study.

    ``chosen`` is the recommended candidate; ``leader`` its trial (None for a default that was no
    trial) or, before the decision, the best trial so far. ``config`` is what was trained of it.
    All are None when no trial succeeded.
    """

    name: str
    outcome: Outcome
    chosen: str | None
    leader: int | None
    leader_origin: str | None
    config: TrialConfig | None
    steps: int  # of a full run of ``config``
    kept_early: tuple[int, int] | None  # the leader overfitted: step kept, steps trained
    first_rung_place: tuple[int, int] | None  # of the leader at rung 0: place, of how many
    confirmation: ConfirmationSummary | None
    runner_up: PairedComparison | None
    best_anchor: PairedComparison | None  # None also when the leader is itself an anchor
    tied_anchor: int | None  # trial of anchor A1, when it is tied with the best or is the best
    states: dict[str, int]
    waiting: tuple[int, ...]  # trials that go on when the study does
    trials_planned: int | None
    anchors_only: bool  # the data are too small for halving
    rungs: tuple[RungSummary, ...]
    correlations: tuple[RungCorrelation, ...]
    redundancy: Redundancy | None  # of learning rate and alpha ratio; None with too few trials
    device: str
    cost: CostSummary
    highest_peak_bytes: int
    memory: MemorySummary | None  # None: nothing was measured, as on a CPU
    warnings: tuple[str, ...]


def summarize(snapshot: StudySnapshot) -> ReportSummary:
    """Compute what the report states.

    Raises:
        StoreError: The confirmation names a trial that the study does not have, or its
            evaluations are not over the same rows.
    """
    ranking = ranked(snapshot.trials)
    confirmation = summarize_confirmation(snapshot)
    leader = _leader(ranking, confirmation)
    config = _config(leader, confirmation)
    outcome = _outcome(snapshot, confirmation, has_leader=leader is not None)
    plan = snapshot.lock.study_plan
    anchors = [t for t in ranking if is_anchor(t)]
    return ReportSummary(
        name=snapshot.lock.name,
        outcome=outcome,
        chosen=confirmation.chosen.name if confirmation and confirmation.chosen else None,
        leader=leader.number if leader else None,
        leader_origin=leader.origin if leader else None,
        config=config,
        steps=_steps(snapshot, confirmation),
        kept_early=_kept_early(leader),
        first_rung_place=place_at_first_rung(snapshot, leader.number if leader else None),
        confirmation=confirmation,
        runner_up=best_rival(snapshot, leader, ranking) if leader else None,
        best_anchor=best_rival(snapshot, leader, anchors)
        if leader and not is_anchor(leader)
        else None,
        tied_anchor=_tied_anchor(confirmation),
        states=dict(Counter(t.state.value for t in snapshot.trials)),
        waiting=tuple(t.number for t in snapshot.trials if t.state is TrialState.RUNNING),
        trials_planned=planned_trials(snapshot.lock),
        anchors_only=plan is not None and plan.anchors_only,
        rungs=summarize_rungs(snapshot),
        correlations=correlate_rungs(snapshot),
        redundancy=ratio_redundancy([t for t in snapshot.trials if result_at(t, 0) is not None]),
        device=snapshot.lock.plan.device,
        cost=summarize_cost(snapshot, finished=outcome is Outcome.FINISHED),
        highest_peak_bytes=_highest_peak(snapshot),
        memory=summarize_memory(snapshot),
        warnings=caveats(snapshot, number=leader.number if leader else None, config=config),
    )


def _leader(
    ranking: list[TrialRecord], confirmation: ConfirmationSummary | None
) -> TrialRecord | None:
    chosen = confirmation.chosen if confirmation else None
    if chosen is None:
        return ranking[0] if ranking and is_candidate(ranking[0]) else None
    return next((t for t in ranking if t.number == chosen.candidate.trial), None)


def _config(
    leader: TrialRecord | None, confirmation: ConfirmationSummary | None
) -> TrialConfig | None:
    if confirmation is not None and confirmation.chosen is not None:
        return confirmation.chosen.candidate.config
    return leader.config if leader else None


def _steps(snapshot: StudySnapshot, confirmation: ConfirmationSummary | None) -> int:
    if confirmation is not None and confirmation.chosen is not None:
        return confirmation.chosen.candidate.steps
    return max(snapshot.lock.rungs, default=0)


def _kept_early(leader: TrialRecord | None) -> tuple[int, int] | None:
    if leader is None or leader.kept is None or not kept_early(leader):
        return None
    return leader.kept.steps, leader.steps


def _tied_anchor(confirmation: ConfirmationSummary | None) -> int | None:
    """Return the trial of anchor A1 when the decision cannot tell it from the best."""
    if confirmation is None or confirmation.decision is None:
        return None
    for candidate in confirmation.candidates:
        if candidate.origin == "anchor A1" and candidate.name in confirmation.decision.tied:
            return candidate.candidate.trial
    return None


def _outcome(
    snapshot: StudySnapshot, confirmation: ConfirmationSummary | None, *, has_leader: bool
) -> Outcome:
    running = any(t.state is TrialState.RUNNING for t in snapshot.trials)
    if confirmation is not None and confirmation.decision is not None and not running:
        return Outcome.FINISHED
    if confirmation is not None and confirmation.num_runs >= confirmation.num_runs_planned:
        failed = all(len(c.reasons) > 0 for c in confirmation.candidates)
        return Outcome.NOTHING if failed else Outcome.UNFINISHED
    own = sum(t.state is not TrialState.CACHED for t in snapshot.trials)
    short = own < (planned_trials(snapshot.lock) or 1)
    return Outcome.UNFINISHED if running or short or has_leader else Outcome.NOTHING


def _highest_peak(snapshot: StudySnapshot) -> int:
    runs = snapshot.confirmation.runs if snapshot.confirmation else ()
    peaks = [measured_peak(t) for t in snapshot.trials] + [run.peak_bytes for run in runs]
    return max(peaks, default=0)
