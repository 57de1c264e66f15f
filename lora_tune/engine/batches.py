"""Which rows a step trains on, and rows of several lanes as the tensors of one pass.

The order of the rows is a function of (data seed, epoch), so it is the same for every
trial of a study and after resuming.

Shape key: B rows of all lanes, T tokens of the longest, N tokens of the pass, L label positions.

Where the model's attention can cut rows (engine/attention.py) all rows lie in one line, (1, N), without
padding. Elsewhere, and where padding is little, rows are padded on the right: under causal attention no
real token ever attends to padding, so no attention mask is needed and padding changes nothing.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lora_tune.engine.lora import RowCut, keyed_seed
from lora_tune.records import TokenizedRow

# Padding a line's rows to equal length spares attention three copies a layer: worth this share of padding.
LITTLE_PADDING = 0.1
IGNORED = -100


class RowArrays(NamedTuple):
    """A row's token ids, and the positions that predict a label with the labels."""

    ids: np.ndarray
    positions: np.ndarray
    targets: np.ndarray


class Batch(NamedTuple):
    """Rows of several lanes under each other; label positions in that order."""

    ids: Tensor  # (1, N) flat, else (B, T)
    position_ids: Tensor | None  # (1, N) of a flat batch
    cut: RowCut | None  # of a flat batch
    tokens: tuple[slice, ...]  # of each lane in the flattened ids
    real: tuple[Tensor | None, ...]  # of each lane: its tokens that are no padding, None for all
    positions_L: Tensor  # index into the flattened ids
    targets_L: Tensor
    labels: tuple[int, ...]  # label positions of each lane
    row_labels: np.ndarray  # label positions of each row


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


def as_arrays(row: TokenizedRow) -> RowArrays:
    """Return a row as arrays; the first token is never a label: nothing predicts it."""
    labels = np.array(row.labels[1:], dtype=np.int64)
    positions = np.flatnonzero(labels != IGNORED)
    return RowArrays(np.array(row.input_ids, dtype=np.int64), positions, labels[positions])


def collate(lane_rows: Sequence[Sequence[RowArrays]], device: torch.device, *, flat: bool) -> Batch:
    """Lay the lanes' rows under each other, lane by lane.

    Args:
        lane_rows: The rows of each lane.
        device: Where the tensors go: one copy, from pinned memory if it is a GPU.
        flat: Whether the model takes rows in one line.
    """
    rows = [row for own in lane_rows for row in own]
    lengths = np.array([len(row.ids) for row in rows])
    longest = int(lengths.max())
    ragged = flat and lengths.sum() < (1 - LITTLE_PADDING) * longest * len(rows)
    sizes = lengths if ragged else np.full(len(rows), longest)
    starts = np.concatenate([[0], np.cumsum(sizes)])
    line = np.zeros(starts[-1], dtype=np.int64)
    for row, start in zip(rows, starts[:-1], strict=True):
        line[start : start + len(row.ids)] = row.ids
    row_labels = np.array([len(row.positions) for row in rows])
    arrays = {
        "ids": line,
        "positions": np.concatenate(
            [row.positions + start for row, start in zip(rows, starts[:-1], strict=True)]
        ),
        "targets": np.concatenate([row.targets for row in rows]),
    }
    if flat:
        arrays["position_ids"] = np.arange(len(line)) - np.repeat(starts[:-1], sizes)
    if ragged:
        arrays["slots"] = arrays["position_ids"] + np.repeat(np.arange(len(rows)) * longest, sizes)
    edges = np.concatenate([[0], np.cumsum([len(own) for own in lane_rows])])
    lanes = [slice(int(a), int(b)) for a, b in zip(edges[:-1], edges[1:], strict=True)]
    for k, lane in enumerate(lanes):
        if not ragged and lengths[lane].sum() < longest * len(lengths[lane]):
            filled = np.arange(longest) < lengths[lane][:, None]
            arrays[f"real {k}"] = np.flatnonzero(filled)
    found = _to_device(arrays, device)
    return Batch(
        ids=found["ids"][None] if flat else found["ids"].view(len(rows), longest),
        position_ids=found["position_ids"][None] if flat else None,
        cut=RowCut(len(rows), longest, found.get("slots")) if flat else None,
        tokens=tuple(slice(int(starts[s.start]), int(starts[s.stop])) for s in lanes),
        real=tuple(found.get(f"real {k}") for k in range(len(lanes))),
        positions_L=found["positions"],
        targets_L=found["targets"],
        labels=tuple(int(row_labels[lane].sum()) for lane in lanes),
        row_labels=row_labels,
    )


def _to_device(arrays: dict[str, np.ndarray], device: torch.device) -> dict[str, Tensor]:
    """Return int64 arrays as tensors on the device, moved in one copy that nobody waits for."""
    joined = torch.from_numpy(np.concatenate(list(arrays.values())))
    if device.type == "cuda":
        joined = joined.pin_memory()
    sizes = [len(array) for array in arrays.values()]
    parts = torch.split(joined.to(device, non_blocking=True), sizes)
    return dict(zip(arrays, parts, strict=True))
