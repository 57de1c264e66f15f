"""The front of candidates that no other beats in loss, memory and time at once."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lora_tune.records import ParetoFront


@dataclass(frozen=True, slots=True, kw_only=True)
class CostPoint:
    """Loss and cost of a candidate; ``step_s`` 0 when not known."""

    name: str
    loss: float
    peak_bytes: int
    step_s: float


def pareto_front(points: Sequence[CostPoint], *, practical_margin: float) -> ParetoFront:
    """Return the front and three points of it.

    ``best`` has the lowest loss, ``smallest`` the lowest memory of those within ``practical_margin``
    (relative) of the best, ``knee`` the largest distance to the chord from the best to the smallest of
    all, in logarithms scaled to 0..1, on the side of less; without a point there it is the best. Time is
    left out when it is not known of every point.

    Raises:
        ValueError: There is no point.

    >>> of = lambda name, loss, peak: CostPoint(name=name, loss=loss, peak_bytes=peak, step_s=0.0)
    >>> front = pareto_front([of("a", 2.0, 9), of("b", 2.01, 4), of("c", 2.5, 3), of("d", 2.6, 5)],
    ...                      practical_margin=0.005)
    >>> front.members, front.best, front.knee, front.smallest
    (('a', 'b', 'c'), 'a', 'b', 'b')
    """
    if not points:
        raise ValueError("a Pareto front needs at least one point")
    timed = all(point.step_s > 0 for point in points)
    members = sorted(
        (point for point in points if not any(_beats(other, point, timed) for other in points)),
        key=lambda point: (point.loss, point.peak_bytes, point.step_s, point.name),
    )
    best = members[0]
    near = (point for point in members if point.loss <= best.loss * (1 + practical_margin))
    return ParetoFront(
        members=tuple(point.name for point in members),
        best=best.name,
        knee=_knee(members, timed).name,
        smallest=min(near, key=_size).name,
    )


def _values(point: CostPoint, timed: bool) -> tuple[float, ...]:
    costs: tuple[float, ...] = (point.loss, float(point.peak_bytes))
    return (*costs, point.step_s) if timed else costs


def _beats(first: CostPoint, second: CostPoint, timed: bool) -> bool:
    a, b = _values(first, timed), _values(second, timed)
    return a != b and all(x <= y for x, y in zip(a, b, strict=True))


def _size(point: CostPoint) -> tuple[float, float, float, str]:
    return (point.peak_bytes, point.step_s, point.loss, point.name)


def _knee(members: Sequence[CostPoint], timed: bool) -> CostPoint:
    """Return the member farthest from the chord; ``members`` are by loss."""
    values = np.asarray([_values(point, timed) for point in members])
    if len(members) < 3 or not (values > 0).all():
        return members[0]
    logs = np.log(values)
    spread = np.ptp(logs, axis=0)
    scaled = (logs - logs.min(axis=0)) / np.where(spread > 0, spread, 1.0)
    chord = scaled[members.index(min(members, key=_size))] - scaled[0]
    length = np.linalg.norm(chord)
    if length == 0:
        return members[0]
    along = ((scaled - scaled[0]) @ chord / length**2)[:, None] * chord
    offsets = scaled - scaled[0] - along
    distances = np.where(offsets.sum(axis=1) < 0, np.linalg.norm(offsets, axis=1), 0.0)
    return members[int(distances.argmax())]
