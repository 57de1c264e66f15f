"""Losses that cannot be: looked for once in what an executor returns, and in a record when it is read.

A loss is finite and at least zero. One of thousands of nats a token is what is left of a model whose
numbers have overflowed somewhere: the trial has diverged, whatever its training losses said. So no such
value is ever a result: it is not ranked, not told to Optuna as a loss, and no finalist is chosen by it.
In a record it shows that the file was changed, since none is ever written.
"""

import math
from collections.abc import Iterator
from dataclasses import replace

from lora_tune.records import (
    Confirmation,
    EvalResult,
    LaneOutcome,
    MetricResult,
    TrialRecord,
    TrialState,
)

# Nats a token. All of a vocabulary of a million tokens being equally likely costs 14; wrong and sure of it, a
# model that has not been destroyed costs some tens.
MOST_LOSS = 1000.0
_LEAST = -1e-3  # nats a token: rounding, where every token is certain
_LEAST_ROW = -1.0  # nats of a row of thousands of such tokens


def checked(outcome: LaneOutcome) -> LaneOutcome:
    """Return an outcome as it came, or as diverged where its evaluation cannot be one.

    >>> found = EvalResult(
    ...     split="selection", loss_sums=(math.nan,), label_counts=(3,), compute_dtype="float32"
    ... )
    >>> outcome = LaneOutcome(trial=0, rung=0, state=TrialState.COMPLETE, evaluation=found)
    >>> checked(outcome).state, checked(outcome).reason
    (<TrialState.DIVERGED: 'diverged'>, 'evaluation loss nan (row 1)')
    """
    if outcome.state is not TrialState.COMPLETE or outcome.evaluation is None:
        return outcome
    problem = implausible(outcome.evaluation)
    if not problem:
        return outcome
    return replace(outcome, state=TrialState.DIVERGED, reason=problem, evaluation=None)


def implausible(evaluation: EvalResult) -> str:
    """Return why these losses cannot be those of a model that works; empty: they can."""
    labels = sum(evaluation.label_counts)
    if labels == 0:
        return "evaluation on rows without any target token"
    for row, loss in enumerate(evaluation.loss_sums, start=1):
        if not math.isfinite(loss):
            return f"evaluation loss {loss:g} (row {row})"
    mean = sum(evaluation.loss_sums) / labels
    if mean < _LEAST:
        return f"evaluation loss {mean:g}, below zero"
    if mean > MOST_LOSS:
        return f"evaluation loss {mean:g}, above {MOST_LOSS:g} nats per token"
    return ""


def implausible_in(record: TrialRecord | Confirmation) -> str:
    """Return the first place of a record that holds a result which cannot be one, and why; else nothing.

    Training points and a trial's first loss are not results: those of a trial that diverged, and in float16
    single gradients of any, may be anything.
    """
    for place, problem in _looked_at(record):
        if problem:
            return f"{place}: {problem}"
    return ""


def _spoiled(evaluation: EvalResult) -> str:
    """Return why this is no evaluation that was ever written: no row's sum is below zero either."""
    least = min(evaluation.loss_sums, default=0.0)
    return implausible(evaluation) or (f"a row's loss {least:g}" if least < _LEAST_ROW else "")


def _looked_at(record: TrialRecord | Confirmation) -> Iterator[tuple[str, str]]:
    if isinstance(record, TrialRecord):
        for number, result in enumerate(record.rungs):
            yield f"rungs.{number}.evaluation", _spoiled(result.evaluation)
            yield f"rungs.{number}.eval_loss", _no_loss(result.eval_loss)
        yield "penalty", _no_loss(record.penalty)
        return
    for number, run in enumerate(record.runs):
        if run.evaluation is not None:
            yield f"runs.{number}.evaluation", _spoiled(run.evaluation)
        yield f"runs.{number}.metrics", _no_metric(run.metrics)
    if record.base_evaluation is not None:
        yield "base_evaluation", _spoiled(record.base_evaluation)
    yield "base_selection_loss", _no_loss(record.base_selection_loss)
    yield "base_metrics", _no_metric(record.base_metrics)


def _no_loss(loss: float | None) -> str:
    usable = loss is None or _LEAST <= loss < math.inf
    return "" if usable else f"loss {loss:g}"


def _no_metric(results: tuple[MetricResult, ...]) -> str:
    values = (value for result in results for value in result.values)
    return next((f"metric {value:g}" for value in values if not math.isfinite(value)), "")
