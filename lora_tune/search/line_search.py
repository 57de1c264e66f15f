"""A line search on the effective step: the axis that matters most, with all else as in the best trial."""

import math
from collections.abc import Sequence
from dataclasses import replace

from lora_tune.records import SuggestedParams
from lora_tune.search.space import SearchSpace, training_key

STEP_FACTOR = 1.6  # half a notch of the x3 ladders of published sweeps, and a little less
NUM_REFINEMENTS = 3  # then the factor is 1.6 ** (1 / 8) = 1.06, which no evaluation can tell from 1


def next_step(
    space: SearchSpace,
    best: SuggestedParams,
    tried: Sequence[SuggestedParams],
    *,
    upward: bool,
) -> SuggestedParams | None:
    """Return the best configuration with another effective step, one factor up or down.

    The side that has not been tried comes first, ``upward`` decides when neither has; when both have,
    the factor becomes its square root: the best lies between them. A step counts as tried when one of
    the same configuration lies nearer to it than half of the factor. Steps stay within the space's
    bounds.

    Args:
        space: The search space.
        best: The best configuration so far.
        tried: All proposals so far, the best one and those that are still training among them.
        upward: Which side to look at first.

    Returns:
        The configuration; None when all the steps around the best have been tried.
    """
    line = _line_of(space, best)
    steps = [params.effective_step for params in tried if _line_of(space, params) == line]
    lowest, highest = space.step_bounds
    for level in range(NUM_REFINEMENTS):
        factor = STEP_FACTOR ** (0.5**level)
        for side in (factor, 1 / factor) if upward else (1 / factor, factor):
            step = min(max(best.effective_step * side, lowest), highest)
            if all(abs(math.log(step / other)) > math.log(factor) / 2 for other in steps):
                return replace(best, effective_step=step)
    return None


def _line_of(space: SearchSpace, params: SuggestedParams) -> object:
    """Return what two proposals share that differ by nothing but the effective step, once trained."""
    return training_key(space.effective(replace(params, effective_step=space.step_bounds[0])))
