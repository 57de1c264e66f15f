"""Holm's correction for several comparisons."""

from collections.abc import Sequence


def holm(p_values: Sequence[float]) -> tuple[float, ...]:
    """Return the adjusted p values, in the order given.

    The smallest p is multiplied by the number of comparisons, the next by one less, and so on; none
    becomes smaller than one before it, none larger than 1.

    Source: Holm, A simple sequentially rejective multiple test procedure, Scand. J. Stat. 6 (1979).

    >>> holm([0.04, 0.01, 0.03])
    (0.06, 0.03, 0.06)
    """
    order = sorted(range(len(p_values)), key=lambda place: p_values[place])
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for done, place in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - done) * p_values[place]))
        adjusted[place] = largest
    return tuple(adjusted)
