"""The grid: every combination of the ordered dimensions with a ladder of effective steps.

A full grid of the default space has thousands of cells, so it is always cut short. Its order is
balanced: at any length every choice of a dimension has been met about equally often, then every pair of
choices of two dimensions; among equals a seed decides. Cells that are the same training after the clamp
to the memory budget count once.
"""

import math
from collections.abc import Iterator
from itertools import combinations, product

import numpy as np
import numpy.typing as npt

from lora_tune.records import SuggestedParams
from lora_tune.search.space import SearchSpace, training_key

STEP_FACTOR = 3.0  # between neighbours on the ladder: that of published sweeps


def step_ladder(lowest: float, highest: float) -> tuple[float, ...]:
    """Return the grid's effective steps: the bounds, and between them equal factors of about 3.

    >>> [f"{step:.2g}" for step in step_ladder(3e-5, 2e-3)]
    ['3e-05', '8.6e-05', '0.00024', '0.0007', '0.002']
    """
    if lowest == highest:
        return (lowest,)
    notches = max(1, round(math.log(highest / lowest) / math.log(STEP_FACTOR)))
    factor = (highest / lowest) ** (1 / notches)
    return (lowest, *(lowest * factor**n for n in range(1, notches)), highest)


def grid_cells(space: SearchSpace, *, seed: int) -> Iterator[SuggestedParams]:
    """Yield every cell of the space's grid once, in the balanced order."""
    cells = list({training_key(space.effective(cell)): cell for cell in _product(space)}.values())
    names = [target.name for target in space.target_sets]
    values = [
        (c.rank, c.alpha_ratio or 0.0, c.lora_dropout, names.index(c.target_set), c.effective_step)
        for c in cells
    ]
    orders = [sorted(set(column)) for column in zip(*values, strict=True)]
    choices = np.array([[o.index(v) for o, v in zip(orders, row, strict=True)] for row in values])
    for row in balanced_order(choices, np.random.default_rng([seed, len(cells)])):
        yield cells[row]


def balanced_order(choices: npt.NDArray[np.int64], generator: np.random.Generator) -> Iterator[int]:
    """Yield the rows of a table of choices, each next one the least like those before it.

    Args:
        choices: Index of the choice, row by row (cells) and column by column (dimensions).
        generator: Decides among rows that are alike.

    Each row's score is how often its choices have been met, one dimension at a time; rows of equal
    score are told apart by how often its pairs of choices have been met.
    """
    num_rows, num_columns = choices.shape
    num_choices = choices.max(axis=0) + 1
    singles, doubles = np.zeros(num_rows), np.zeros(num_rows)
    left = generator.permutation(num_rows)
    while left.size:
        row = left[np.lexsort((doubles[left], singles[left]))[0]]
        left = left[left != row]
        same = choices == choices[row]
        singles += same @ num_choices
        for first, second in combinations(range(num_columns), 2):
            doubles += same[:, first] & same[:, second]
        yield int(row)


def _product(space: SearchSpace) -> Iterator[SuggestedParams]:
    """Yield all combinations, high ranks first: of those that a clamp makes equal the last one fits."""
    ratios: tuple[float | None, ...] = space.ratios or (None,)
    names = [target.name for target in space.target_sets]
    steps = step_ladder(*space.step_bounds)
    for rank, ratio, dropout, name, step in product(
        reversed(space.ranks), ratios, space.dropouts, names, steps
    ):
        yield SuggestedParams(
            rank=rank,
            alpha_ratio=ratio,
            lora_dropout=dropout,
            target_set=name,
            effective_step=step,
        )
