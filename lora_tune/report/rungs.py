"""The rungs of the ladder: what each showed, and how well each foretold the next."""

from dataclasses import dataclass
from math import isfinite
from statistics import median

from lora_tune.records import StudySnapshot, TrialRecord, TrialState
from lora_tune.report.ranking import result_at
from lora_tune.report.resolved import eval_rows
from lora_tune.stats.rank_correlation import spearman


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


def summarize_rungs(snapshot: StudySnapshot) -> tuple[RungSummary, ...]:
    """Return the rungs by number; cached trials are left out, they trained nothing."""
    summaries = []
    for rung, steps in enumerate(snapshot.lock.rungs):
        pairs = [(r, t) for t in _trained(snapshot) for r in t.rungs if r.rung == rung]
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


def correlate_rungs(snapshot: StudySnapshot) -> tuple[RungCorrelation, ...]:
    """Return the rank correlation of each rung with the next, where at least three trials have both."""
    found = []
    for rung in range(len(snapshot.lock.rungs) - 1):
        pairs = [
            (low.eval_loss, high.eval_loss)
            for t in _trained(snapshot)
            if (low := result_at(t, rung)) is not None
            and (high := result_at(t, rung + 1)) is not None
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


def place_at_first_rung(snapshot: StudySnapshot, number: int | None) -> tuple[int, int] | None:
    """Return a trial's place by loss at the first rung, from 1, and of how many; None without it."""
    losses = {
        t.number: first.eval_loss
        for t in _trained(snapshot)
        if (first := result_at(t, 0)) is not None
    }
    if number is None or number not in losses:
        return None
    return 1 + sum(loss < losses[number] for loss in losses.values()), len(losses)


def _trained(snapshot: StudySnapshot) -> list[TrialRecord]:
    return [t for t in snapshot.trials if t.state is not TrialState.CACHED]
