"""Which rows a step trains on, and rows as padded tensors.

The order of the rows is a function of (data seed, epoch), so it is the same for every
trial of a study and after resuming. Rows are padded on the right: under causal attention no real
token ever attends to padding, so no attention mask is needed and padding changes nothing.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lora_tune.engine.lora import keyed_seed
from lora_tune.records import TokenizedRow


class Batch(NamedTuple):
    """Rows of several lanes under each other; N label positions in row-major order."""

    ids_BT: Tensor
    positions_N: Tensor  # index into the flattened (B, T) hidden states
    targets_N: Tensor
    rows_N: Tensor  # row of each label position
    num_tokens: int  # without padding


def rows_of_step(num_rows: int, *, step: int, batch_size: int, data_seed: int) -> list[int]:
    """Return the row numbers of an optimizer step (1 is the first).

    Every epoch is a fresh permutation; a batch may straddle two epochs.

    >>> first = rows_of_step(10, step=1, batch_size=4, data_seed=0)
    >>> rest = [rows_of_step(10, step=s, batch_size=3, data_seed=0) for s in (1, 2, 3)]
    >>> sorted(sum(rest, []))[:3], len(first)
    ([0, 1, 2], 4)
    """
    start = (step - 1) * batch_size
    chosen = []
    for position in range(start, start + batch_size):
        epoch, offset = divmod(position, num_rows)
        chosen.append(int(_permutation(num_rows, epoch, data_seed)[offset]))
    return chosen


@lru_cache(maxsize=4)
def _permutation(num_rows: int, epoch: int, data_seed: int) -> np.ndarray:
    return np.random.default_rng(keyed_seed(data_seed, "order", epoch)).permutation(num_rows)


def collate(rows: Sequence[TokenizedRow], device: torch.device) -> Batch:
    """Pad rows on the right and list the positions that predict a label."""
    longest = max(len(row.input_ids) for row in rows)
    ids_BT = np.zeros((len(rows), longest), dtype=np.int64)
    positions, targets, owners = [], [], []
    for b, row in enumerate(rows):
        ids_BT[b, : len(row.input_ids)] = row.input_ids
        for t, label in enumerate(row.labels[1:]):
            if label != -100:
                positions.append(b * longest + t)
                targets.append(label)
                owners.append(b)
    return Batch(
        ids_BT=torch.from_numpy(ids_BT).to(device),
        positions_N=torch.tensor(positions, dtype=torch.int64, device=device),
        targets_N=torch.tensor(targets, dtype=torch.int64, device=device),
        rows_N=torch.tensor(owners, dtype=torch.int64, device=device),
        num_tokens=sum(len(row.input_ids) for row in rows),
    )
