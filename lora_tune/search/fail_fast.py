"""When to stop early: a trial by the losses of those that have finished, and a study on a sick machine.

All trials of a study read the same rows in the same order, so their training losses at a step compare.
"""

import math
import re
from collections.abc import Iterable, Sequence
from statistics import stdev

from lora_tune.records import RungResult, TrialRecord, TrialState
from lora_tune.stats.smoothing import smoothed_losses

LEAST_FINISHED = 3  # trials, before anything is called an outlier
FIRST_SHARE = 0.3  # of the rung's steps, before which nothing is stopped
MOST_DEVIATIONS = 5.0
LEAST_MARGIN = 0.1  # nats: dropout and a small step alone raise a training loss by some hundredths
MOST_FAILING_ALIKE = 5  # trials, none of the others having come to an end

_NUMBER = re.compile(r"\d+")


def loss_limits(finished: Sequence[RungResult]) -> tuple[tuple[int, float], ...]:
    """Return (step, smoothed training loss) above which a trial has diverged, steps rising.

    The worst of the finished trials at the step, and five standard deviations of them more, at least
    0.1 nats; at the steps of which all have a reading, from 30 % of the rung on. Empty with fewer than
    three trials.
    """
    curves = [
        smoothed_losses((point.step, point.train_loss) for point in result.points)
        for result in finished
        if result.points and all(math.isfinite(point.train_loss) for point in result.points)
    ]
    if len(curves) < LEAST_FINISHED:
        return ()
    first = FIRST_SHARE * finished[0].steps
    shared = set.intersection(*(set(curve) for curve in curves))
    return tuple(
        (step, _limit([curve[step] for curve in curves]))
        for step in sorted(shared)
        if step >= first
    )


def _limit(losses: Sequence[float]) -> float:
    return max(losses) + max(MOST_DEVIATIONS * stdev(losses), LEAST_MARGIN)


def failing_alike(records: Iterable[TrialRecord]) -> str:
    """Return what every trial failed of, when nothing else has come of at least five; else nothing.

    Only a fault of the machine is meant (``TrialState.FAILED``): a trial that diverged or did not fit
    has shown that the machine can train. Reasons that differ in numbers alone, such as a step, are alike.
    """
    nothing_yet = (TrialState.RUNNING, TrialState.CACHED)
    ended = [r for r in records if r.rungs or r.state not in nothing_yet]
    if len(ended) < MOST_FAILING_ALIKE:
        return ""
    if any(record.rungs or record.state is not TrialState.FAILED for record in ended):
        return ""
    if len({_NUMBER.sub("#", record.reason) for record in ended}) > 1:
        return ""
    return ended[-1].reason
