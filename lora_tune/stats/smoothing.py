"""Training losses smoothed over steps, the same way wherever they are compared.

The mean of all readings so far, each weighted by exp(-age / 10 steps). Ages are optimizer steps, so a
curve of which only every fifth reading was kept is smoothed over the same stretch as a whole one.
"""

import math
from collections.abc import Iterable

SMOOTHING_STEPS = 10.0  # age, in optimizer steps, at which a reading counts 1/e


class RunningLoss:
    """A smoothed loss that is brought up to date reading by reading.

    >>> loss = RunningLoss()
    >>> loss.add(1, 3.0)
    3.0
    >>> round(loss.add(11, 2.0), 4)  # the older one counts 1/e: (3/e + 2) / (1/e + 1)
    2.2689
    """

    def __init__(self) -> None:
        self._step = 0
        self._sum = 0.0
        self._weight = 0.0

    def add(self, step: int, loss: float) -> float:
        """Take the reading of a step, nats per target token; return the smoothed loss there."""
        fade = math.exp((self._step - step) / SMOOTHING_STEPS)
        self._sum = self._sum * fade + loss
        self._weight = self._weight * fade + 1.0
        self._step = step
        return self._sum / self._weight


def smoothed_losses(readings: Iterable[tuple[int, float]]) -> dict[int, float]:
    """Return the smoothed loss at every step of which there is a reading.

    Args:
        readings: Optimizer step and training loss, steps rising.
    """
    running = RunningLoss()
    return {step: running.add(step, loss) for step, loss in readings}
