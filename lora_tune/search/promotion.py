"""Which trials go on to the next rung, as functions of the trial records alone.

The best quarter goes on, with it those that the evaluation rows cannot tell from the last of them, and the
cheapest of those that are as good in practice. A trial's score is the best state that it has shown so far,
so one that overfits keeps its place by the state that it would be recommended for.

Short rungs favour high learning rates: a large step gains first and pays later. So the leader of rung 0 is
doubted in this direction: the half step, its configuration with half the effective step, goes through
rung 0 whatever it shows there, on the last seat that ties could take, and earns every later rung.

The choice is made once, when all trials have come to the rung's start, and afterwards only grows:
when so many of the chosen end early that the seats are not filled, the next in order goes on. So the
order in which results come back does not matter.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

from lora_tune.records import EvalResult, SuggestedParams, TrialRecord, TrialState
from lora_tune.search.plan import seats
from lora_tune.stats.paired import paired_difference
from lora_tune.stats.selection import MEMORY_STEP_BYTES

TIE_LEVEL = 0.90  # of the intervals by which a trial is tied with the last seat
HALF_STEP = "half step"  # origin of the trial that repeats rung 0's leader with half its step
HALF_STEP_FACTOR = 1.25  # a step is near another one within this factor

ENDED_EARLY = (TrialState.DIVERGED, TrialState.INFEASIBLE, TrialState.FAILED)


class ScoredTrial(NamedTuple):
    """A trial with the evaluation it is compared by, and its loss on the rows that all compared have."""

    record: TrialRecord
    evaluation: EvalResult
    loss: float  # nats per target token


def rank_trials(records: Iterable[TrialRecord], *, num_rungs: int) -> list[ScoredTrial]:
    """Return the trials by their best state over the first ``num_rungs`` rungs, lowest loss first.

    Compared on the first rows that all of these evaluations have; equal losses by number. Trials that did
    not come so far are left out.
    """
    able = [record for record in records if len(record.rungs) >= num_rungs]
    kept = [replace(record, rungs=record.rungs[:num_rungs]).kept for record in able]
    evaluations = [result.evaluation for result in kept if result is not None]
    rows = min((len(evaluation.label_counts) for evaluation in evaluations), default=0)
    scored = [
        ScoredTrial(record, evaluation, evaluation.loss_of_first(rows))
        for record, evaluation in zip(able, evaluations, strict=True)
    ]
    return sorted(scored, key=lambda trial: (trial.loss, trial.record.number))


def promoted(
    records: Iterable[TrialRecord],
    rung: int,
    *,
    practical_margin: float,
    clusters: Sequence[int] = (),
) -> list[int]:
    """Return the trials that train rung ``rung``, all having come to its start.

    Of ``entered`` trials ``seats(entered)`` go on: the best, then those whose paired 90 % interval against
    the last seat includes zero, up to the cap. One place within the cap is kept for the cheapest trial
    (predicted memory in half GiB, then rank) within the practical margin of the best. When a chosen trial
    ends early in the rung and fewer than the seats are left, the next in order takes its place.

    The half step, where there is one, goes to rung 1 whatever rung 0 showed of it, and has the last place
    within the cap; from rung 2 on it is a trial like the others.

    Args:
        records: All trials.
        rung: At least 1.
        practical_margin: Relative loss difference that is called a tie.
        clusters: Cluster number of each selection row; empty: each row its own.
    """
    found = list(records)
    half = next((r for r in found if rung == 1 and r.origin == HALF_STEP), None)
    ranked = rank_trials((r for r in found if r is not half), num_rungs=rung)
    chosen = choose_seats(
        ranked,
        practical_margin=practical_margin,
        clusters=clusters,
        num_taken=0 if half is None else 1,
    )
    nominal, _ = seats(len(ranked))
    alive = sum(not _ended_in(trial.record, rung) for trial in ranked if _number(trial) in chosen)
    for trial in ranked:
        if alive >= nominal:
            break
        if _number(trial) not in chosen:
            chosen.append(_number(trial))
            alive += not _ended_in(trial.record, rung)
    if half is None or _ended_in(half, 0):
        return chosen
    return [half.number, *chosen]  # first: it began later than the others


def choose_seats(
    ranked: Sequence[ScoredTrial],
    *,
    practical_margin: float,
    clusters: Sequence[int] = (),
    num_taken: int = 0,
) -> list[int]:
    """Return the trials of a ranking that go on, before any of them has ended early.

    ``num_taken`` of the places that ties could take are not free, at most all of them.
    """
    if not ranked:
        return []
    nominal, cap = seats(len(ranked))
    going = list(ranked[:nominal])
    ties = [trial for trial in ranked[nominal:] if is_tied(trial, going[-1], clusters=clusters)]
    cheapest = _cheapest_within(ranked, practical_margin)
    kept_place = [] if cheapest in going else [cheapest]
    free = max(0, cap - nominal - num_taken)
    if kept_place and free:
        ties = [trial for trial in ties if trial is not cheapest][: free - 1] + kept_place
    going += ties[:free]
    return [_number(trial) for trial in sorted(going, key=ranked.index)]


def is_tied(trial: ScoredTrial, other: ScoredTrial, *, clusters: Sequence[int] = ()) -> bool:
    """Return whether the paired 90 % interval of two trials' loss includes zero."""
    return paired_difference(
        trial.evaluation, other.evaluation, clusters=clusters, level=TIE_LEVEL
    ).within_noise


def choose_finalists(
    records: Iterable[TrialRecord], count: int, *, num_rungs: int, clusters: Sequence[int] = ()
) -> list[TrialRecord]:
    """Return the ``count`` best of the trials that came to the end of the last rung, best first.

    One more when its paired 90 % interval against the last seat includes zero.
    """
    complete = [record for record in records if record.state is TrialState.COMPLETE]
    ranked = rank_trials(complete, num_rungs=num_rungs)
    final = ranked[:count]
    if final and len(ranked) > count and is_tied(ranked[count], final[-1], clusters=clusters):
        final.append(ranked[count])
    return [trial.record for trial in final]


def half_step_of_leader(records: Iterable[TrialRecord], *, lowest: float) -> SuggestedParams | None:
    """Return the leader's proposal with half its effective step; None if there is no place for it.

    The leader is the best at the end of rung 0, whatever became of it afterwards. There is no place where
    the step is below the bound, where it has been tried, and where all that came so far go on anyway, so
    that ties have no seat to give.

    Args:
        records: All trials, before there is a half step.
        lowest: Lower bound of the effective step.
    """
    found = list(records)
    ranked = rank_trials(found, num_rungs=1)
    nominal, cap = seats(len(ranked))
    if nominal == cap:
        return None
    leader = ranked[0].record
    step = leader.suggested.effective_step / 2
    if step < lowest or is_tried_near(found, like=leader, step=step):
        return None
    return replace(leader.suggested, effective_step=step)


def is_tried_near(records: Iterable[TrialRecord], *, like: TrialRecord, step: float) -> bool:
    """Return whether a trial had about this effective step, at the rank and on the target set of ``like``."""
    return any(
        record.config.rank == like.config.rank
        and record.config.target_set == like.config.target_set
        and 1 / HALF_STEP_FACTOR <= record.suggested.effective_step / step <= HALF_STEP_FACTOR
        for record in records
    )


def _cheapest_within(ranked: Sequence[ScoredTrial], practical_margin: float) -> ScoredTrial:
    most = ranked[0].loss * (1 + practical_margin)
    return min(
        (trial for trial in ranked if trial.loss <= most),
        key=lambda trial: (
            trial.record.predicted_bytes // MEMORY_STEP_BYTES,
            trial.record.config.rank,
            trial.loss,
            trial.record.number,
        ),
    )


def _ended_in(record: TrialRecord, rung: int) -> bool:
    return len(record.rungs) == rung and record.state in ENDED_EARLY


def _number(trial: ScoredTrial) -> int:
    return trial.record.number
