"""Trials in the order in which a report lists them, and what can be said of one alone."""

from collections.abc import Sequence
from math import isfinite

from lora_tune.records import RungResult, TrialConfig, TrialRecord, TrialState

FAILED_STATES = frozenset({TrialState.DIVERGED, TrialState.INFEASIBLE, TrialState.FAILED})


def ranked(trials: Sequence[TrialRecord]) -> list[TrialRecord]:
    """Return the trials best first.

    Trials that could be recommended come first: by the highest rung reached, then by the loss of
    the state that they kept. Then those without a result yet, then those answered by an earlier
    trial, then diverged, infeasible and failed ones.
    """
    return sorted(trials, key=_rank_key)


def is_candidate(trial: TrialRecord) -> bool:
    """Say whether the trial has a result of its own and ended well so far."""
    ended_badly = trial.state in FAILED_STATES or trial.state is TrialState.CACHED
    return not ended_badly and has_result(trial)


def has_result(trial: TrialRecord) -> bool:
    """Say whether the trial has a finite loss."""
    return trial.best_loss is not None and isfinite(trial.best_loss)


def is_anchor(trial: TrialRecord) -> bool:
    """Say whether the search began with this configuration."""
    return trial.origin.startswith("anchor")


def kept_early(trial: TrialRecord) -> bool:
    """Say whether the trial was better at an earlier rung than at its last: it overfitted."""
    return trial.kept is not None and trial.kept.steps < trial.steps


def result_at(trial: TrialRecord, rung: int) -> RungResult | None:
    """Return what the trial showed at a rung, None where it has no finite loss there."""
    for result in trial.rungs:
        if result.rung == rung and isfinite(result.eval_loss):
            return result
    return None


def measured_peak(trial: TrialRecord) -> int:
    """Return the highest measured peak of the packs that the trial trained in, 0 if none."""
    return max((r.peak_bytes for r in trial.rungs), default=0)


def effective_step(config: TrialConfig) -> float:
    """Return learning_rate * lora_alpha / 32, the axis that the search bounds."""
    return config.learning_rate * config.lora_alpha / 32


def _rank_key(trial: TrialRecord) -> tuple[int, int, float, int]:
    rung = trial.rungs[-1].rung if trial.rungs else -1
    loss = trial.kept.eval_loss if trial.kept is not None and has_result(trial) else None
    finite = loss if loss is not None and isfinite(loss) else float("inf")
    return _group(trial), -rung, finite, trial.number


def _group(trial: TrialRecord) -> int:
    if trial.state in FAILED_STATES:
        return 3
    if trial.state is TrialState.CACHED:
        return 2
    return 0 if has_result(trial) else 1
