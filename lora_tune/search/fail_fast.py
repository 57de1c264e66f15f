"""Losses above which a trial at rung 0 is stopped, set by the trials that have finished it.

All trials of a study read the same rows in the same order, so their training losses at a step compare.
"""

from collections.abc import Sequence
from statistics import stdev

from lora_tune.records import RungResult
from lora_tune.stats.smoothing import smoothed_losses

LEAST_FINISHED = 3  # trials, before anything is called an outlier
FIRST_SHARE = 0.3  # of the rung's steps, before which nothing is stopped
MOST_DEVIATIONS = 5.0
LEAST_MARGIN = 0.1  # nats: dropout and a small step alone raise a training loss by some hundredths


def loss_limits(finished: Sequence[RungResult]) -> tuple[tuple[int, float], ...]:
    """Return (step, smoothed training loss) above which a trial has diverged, steps rising.

    The worst of the finished trials at the step, and five standard deviations of them more, at least
    0.1 nats; at the steps of which all have a reading, from 30 % of the rung on. Empty with fewer than
    three trials.
    """
    curves = [
        smoothed_losses((point.step, point.train_loss) for point in result.points)
        for result in finished
        if result.points
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
