"""Configurations to begin with: known good ones, before any sampler.

In published sweeps of 27 models the learning rate explains 77 % of the variance of the loss, and three
learning rates at the largest rank beat every blind sampler: see the anchors A1 to A3. A6 is the folklore
default that people copy. Source: the learning-rate and rank sweep of thinking-machines-lab/tinker-cookbook
(``recipes/chat_sl/results/sft_sweep.md``), re-analysed.
"""

from typing import NamedTuple

from lora_tune.records import SuggestedParams
from lora_tune.search.space import REFERENCE_ALPHA, SearchSpace

LARGEST_ANCHOR_RANK = 128
SMALL_DATA_ROWS = 2000  # below this, anchors start at rank 16 or less
SMALL_DATA_RANK = 16
LARGE_BATCH = 64
CENTRE_LARGE_BATCH = 3e-4  # best or next to best for 32 of 35 models at batch 128
CENTRE_SMALL_BATCH = 2e-4  # between folklore (2e-4) and the square-root rule (1.1e-4)
FOLKLORE_STEP = 2e-4


class Anchor(NamedTuple):
    """A named configuration of the space."""

    name: str
    params: SuggestedParams


def make_anchors(space: SearchSpace, *, effective_batch_size: int, num_train: int) -> list[Anchor]:
    """Return the anchors that the space can express, without repetitions.

    A1 the largest rank that fits on the largest target set, alpha 32, no dropout, centre step; A2 and A3
    three times and a third of the step; A4 two ranks lower; A5 A1 on ``mlp``; A6 q and v, rank 16, alpha 32,
    dropout 0.05, step 2e-4. Values are moved to the nearest choice of the space.
    """
    centre = CENTRE_LARGE_BATCH if effective_batch_size >= LARGE_BATCH else CENTRE_SMALL_BATCH
    largest = space.target_sets[-1]
    ceiling = SMALL_DATA_RANK if num_train < SMALL_DATA_ROWS else LARGEST_ANCHOR_RANK
    fitting = [rank for rank in space.ranks if rank <= min(largest.max_rank, ceiling)]
    top = fitting[-1] if fitting else space.ranks[0]
    low = space.ranks[max(0, space.ranks.index(top) - 2)]
    names = [target.name for target in space.target_sets]
    wanted = [
        ("A1", top, largest.name, 0.0, centre),
        ("A2", top, largest.name, 0.0, 3 * centre),
        ("A3", top, largest.name, 0.0, centre / 3),
        ("A4", low, largest.name, 0.0, centre),
    ]
    if "mlp" in names:
        wanted.append(("A5", top, "mlp", 0.0, centre))
    if "attention-qv" in names and 16 in space.ranks:
        wanted.append(("A6", 16, "attention-qv", 0.05, FOLKLORE_STEP))
    anchors: list[Anchor] = []
    for name, rank, target, dropout, step in wanted:
        params = SuggestedParams(
            rank=rank,
            alpha_ratio=space.nearest_ratio(REFERENCE_ALPHA, rank),
            lora_dropout=min(space.dropouts, key=lambda choice: abs(choice - dropout)),
            target_set=target,
            effective_step=min(max(step, space.step_bounds[0]), space.step_bounds[1]),
        )
        if params not in [anchor.params for anchor in anchors]:
            anchors.append(Anchor(name, params))
    return anchors
