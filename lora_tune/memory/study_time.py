"""How many tokens a study trains, from its file alone: an upper bound, since no row is read.

Every row is counted as ``data.max_length`` tokens and every trial of a rung as trained to its end; rows
are shorter in truth and trials may diverge. Evaluation (forward passes on held-out rows) is not counted.
"""

import math
from typing import NamedTuple

from lora_tune.errors import StudyFileError
from lora_tune.study.spec import StudySpec

_PROMOTED_SHARE = 4  # one trial of so many goes on; search/ladder.py, which is above this room


class StudyTokens(NamedTuple):
    """Optimizer steps and tokens of all trials together, and how they were counted."""

    steps: int
    tokens: int
    note: str


def study_tokens(spec: StudySpec, *, num_train_rows: int | None = None) -> StudyTokens:
    """Return an upper bound of the tokens that a study's trials train.

    A rung's trials go on from where the one before kept their state, before its cool-down:
    rung i costs ``end_i - hold_(i-1)`` steps, with ``hold = end - round(cooldown_ratio * end)``. A quarter
    of a rung's trials enters the next one.

    Args:
        spec: The study.
        num_train_rows: Rows of the training split; needed when the study gives epochs.

    Raises:
        StudyFileError: The study gives epochs and the number of rows is not known.
    """
    batch = spec.train.effective_batch_size
    total = spec.train.max_steps
    if total is None:
        if num_train_rows is None:
            raise StudyFileError(
                "train.max_steps is not set, so the length of the study depends on the number of rows. Set "
                "train.max_steps, or give the tokens with --tokens."
            )
        total = max(1, round(spec.train.epochs * num_train_rows / batch))
    shortest = spec.search.min_rung_steps
    ends = {min(total, max(shortest, round(share * total))) for share in spec.search.rungs}
    steps, trials, start = 0, spec.search.trials, 0
    for end in sorted(ends | {total}):
        steps += trials * (end - start)
        trials = max(1, math.ceil(trials / _PROMOTED_SHARE))
        start = max(1, end - round(spec.train.cooldown_ratio * end))
    tokens = steps * batch * spec.data.max_length
    note = (
        f"upper bound: {steps} optimizer steps of all trials, {batch} rows each, every row "
        f"{spec.data.max_length} tokens (data.max_length); evaluation not counted"
    )
    return StudyTokens(steps, tokens, note)
