"""How many selection rows a rung is evaluated on, so that evaluation stays a small part of the rung.

A row evaluated is one pass forward. A row trained is two: through a frozen base, backward needs only the
gradients of activations, about a forward pass; three when backward computes the layers again.
"""

import math
from dataclasses import dataclass

from lora_tune.search.plan import start_steps

MOST_EVAL_SHARE = 0.2  # cost of a rung's evaluation, as a share of its training
MIN_EVAL_ROWS = 8  # whatever they cost: fewer rows do not tell trials apart


@dataclass(frozen=True, slots=True, kw_only=True)
class RungCosts:
    """What the rungs of a study train, to set evaluation in proportion."""

    rungs: tuple[int, ...]  # optimizer steps at the end of each
    cooldown_ratio: float
    effective_batch_size: int
    gradient_checkpointing: bool

    @property
    def passes(self) -> int:
        """What a row trained costs, in passes forward through the base."""
        return 3 if self.gradient_checkpointing else 2

    def steps(self, rung: int) -> int:
        """Return the optimizer steps that a trial trains at a rung."""
        starts = start_steps(self.rungs, cooldown_ratio=self.cooldown_ratio)
        return self.rungs[rung] - starts[rung]

    def eval_share(self, rung: int, rows: int) -> float:
        """Return the cost of an evaluation as a share of that of the rung's training.

        >>> costs = RungCosts(
        ...     rungs=(10,), cooldown_ratio=0.2, effective_batch_size=8, gradient_checkpointing=False
        ... )
        >>> costs.eval_share(0, 32)
        0.2
        """
        return rows / (self.steps(rung) * self.effective_batch_size * self.passes)

    def eval_rows(self, selection_rows: int, *, whole_at_last: bool) -> tuple[int, ...]:
        """Return how many rows each rung is evaluated on: the first ones of the selection split.

        As many as cost a fifth of the rung's training, at least 8, at most all.

        Args:
            selection_rows: Rows of the split.
            whole_at_last: Whether the last rung takes the whole split, whatever it costs.

        >>> costs = RungCosts(
        ...     rungs=(6, 24), cooldown_ratio=0.2, effective_batch_size=8, gradient_checkpointing=False
        ... )
        >>> costs.eval_rows(64, whole_at_last=False), costs.eval_rows(64, whole_at_last=True)
        ((19, 60), (19, 64))
        """
        found = []
        for rung in range(len(self.rungs)):
            # a billionth: a share of exactly a fifth must not be lost to rounding
            affordable = math.floor(MOST_EVAL_SHARE / self.eval_share(rung, 1) + 1e-9)
            found.append(min(selection_rows, max(MIN_EVAL_ROWS, affordable)))
        if whole_at_last:
            found[-1] = selection_rows
        return tuple(found)

    def notes(self, eval_rows: tuple[int, ...], selection_rows: int) -> tuple[str, ...]:
        """Say which rungs use a part of the split, and which cost more than they should."""
        notes = []
        if any(rows < selection_rows for rows in eval_rows):
            used = ", ".join(f"{rows} at rung {rung}" for rung, rows in enumerate(eval_rows))
            notes.append(
                f"of {selection_rows} selection rows {used}: evaluation may cost {MOST_EVAL_SHARE:.0%} of "
                "a rung's training."
            )
        for rung, rows in enumerate(eval_rows):
            share = self.eval_share(rung, rows)
            if share > MOST_EVAL_SHARE * (1 + 1e-9):
                asked = rows > MIN_EVAL_ROWS
                why = "data.selection_rows asks for them" if asked else "fewer would say too little"
                notes.append(
                    f"rung {rung}: evaluation on {rows} rows costs {share:.0%} of its {self.steps(rung)} "
                    f"steps; {why}."
                )
        return tuple(notes)
