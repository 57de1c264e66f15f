"""Which rows train, which choose between trials, and which confirm the winner.

A row's place is decided by a hash of the study's seed and the row's own content. The order of the
file does not matter, and rows that are added later move few of the others.
"""

from collections.abc import Mapping
from typing import NamedTuple

from lora_tune.errors import DataError
from lora_tune.records import TokenizedRow

MIN_ROWS = 8
MAX_DEFAULT_ROWS = 1000


class KeyedRow(NamedTuple):
    """A row and the hash that orders it."""

    key: bytes
    row: TokenizedRow


UniqueRows = Mapping[tuple[int, ...], KeyedRow]
"""Rows by their token ids, so that exact duplicates cannot exist."""


class Splits(NamedTuple):
    """The rows of each split in the order of their hashes."""

    train: tuple[TokenizedRow, ...]
    selection: tuple[TokenizedRow, ...]
    confirmation: tuple[TokenizedRow, ...]


def default_split_rows(num_rows: int) -> int:
    """Return how many rows a held-out split takes by default: min(1000, max(8, rows // 10)).

    >>> [default_split_rows(n) for n in (40, 3400, 50_000)]
    [8, 340, 1000]
    """
    return min(MAX_DEFAULT_ROWS, max(MIN_ROWS, num_rows // 10))


def split_rows(
    rows: UniqueRows, *, selection_rows: int | None, confirmation_rows: int | None
) -> Splits:
    """Carve the two held-out splits from the rows of one source.

    Selection takes the smallest hashes, confirmation the next ones, training keeps the rest.

    Args:
        rows: The rows, without duplicates.
        selection_rows: Size of the selection split, or None for the default.
        confirmation_rows: Size of the confirmation split, or None for the default.

    Raises:
        DataError: Fewer than 8 rows would be left for training.
    """
    num_selection = selection_rows or default_split_rows(len(rows))
    num_confirmation = confirmation_rows or default_split_rows(len(rows))
    num_train = len(rows) - num_selection - num_confirmation
    if num_train < MIN_ROWS:
        raise DataError(
            f"data.train has {len(rows)} usable rows; {num_selection} for selection "
            f"and {num_confirmation} for confirmation leave {max(num_train, 0)} for training, at "
            f"least {MIN_ROWS} are needed. Add rows, or lower data.selection_rows "
            "and data.confirmation_rows."
        )
    ordered = _in_order(rows)
    held_out = num_selection + num_confirmation
    return Splits(
        train=ordered[held_out:],
        selection=ordered[:num_selection],
        confirmation=ordered[num_selection:held_out],
    )


def split_with_eval(
    rows: UniqueRows,
    eval_rows: UniqueRows,
    *,
    selection_rows: int | None,
    confirmation_rows: int | None,
) -> Splits:
    """Make the two held-out splits from a source of their own, by default half of it each.

    Args:
        rows: The training rows, without duplicates and without the rows of ``eval_rows``.
        eval_rows: The rows of ``data.eval``.
        selection_rows: Size of the selection split, or None for half of the rows.
        confirmation_rows: Size of the confirmation split, or None for half of the rows.

    Raises:
        DataError: A split would have fewer than 8 rows.
    """
    half = len(eval_rows) // 2
    num_selection = selection_rows or half
    num_confirmation = confirmation_rows or half
    if min(num_selection, num_confirmation) < MIN_ROWS:
        raise DataError(
            f"data.eval has {len(eval_rows)} usable rows; selection and confirmation need at least "
            f"{MIN_ROWS} each. Add rows, or leave data.eval out."
        )
    if num_selection + num_confirmation > len(eval_rows):
        raise DataError(
            f"data.eval has {len(eval_rows)} usable rows, fewer than {num_selection} for selection "
            f"and {num_confirmation} for confirmation. Lower data.selection_rows "
            "and data.confirmation_rows."
        )
    if len(rows) < MIN_ROWS:
        raise DataError(
            f"data.train has {len(rows)} usable rows that are not in data.eval; at least "
            f"{MIN_ROWS} are needed."
        )
    ordered = _in_order(eval_rows)
    return Splits(
        train=_in_order(rows),
        selection=ordered[:num_selection],
        confirmation=ordered[num_selection : num_selection + num_confirmation],
    )


def _in_order(rows: UniqueRows) -> tuple[TokenizedRow, ...]:
    return tuple(row for _, row in sorted(rows.values(), key=lambda keyed: keyed.key))
