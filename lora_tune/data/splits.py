"""Which rows train, which choose between trials, and which confirm the winner.

A row's place is decided by a hash of the study's seed and the row's own content. The order of the
file does not matter, and rows that are added later move few of the others. Rows with a group follow the
hash of seed and group, so that a conversation or document is never in two splits.
"""

from collections import defaultdict
from collections.abc import Mapping
from typing import NamedTuple

from lora_tune.data.groups import group_key, row_clusters
from lora_tune.errors import DataError
from lora_tune.records import TokenizedRow

MIN_ROWS = 8
MAX_DEFAULT_ROWS = 1000
MIN_GROUPS = 2  # of a held-out split: fewer show no scatter between groups


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
    rows: UniqueRows,
    *,
    selection_rows: int | None,
    confirmation_rows: int | None,
    seed: int = 0,
) -> Splits:
    """Carve the two held-out splits from the rows of one source.

    Selection takes the smallest hashes, confirmation the next ones, training keeps the rest. Where rows
    have groups, whole groups are taken, in the order of their own hashes, as long as they fit.

    Args:
        rows: The rows, without duplicates.
        selection_rows: Size of the selection split, or None for the default.
        confirmation_rows: Size of the confirmation split, or None for the default.
        seed: The study's seed, which with a group's name decides where it goes.

    Raises:
        DataError: Fewer than 8 rows would be left for training, or groups are too few or too large.
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
    return _carve(rows, "data.train", num_selection, num_confirmation, seed)


def split_with_eval(
    rows: UniqueRows,
    eval_rows: UniqueRows,
    *,
    selection_rows: int | None,
    confirmation_rows: int | None,
    seed: int = 0,
) -> Splits:
    """Make the two held-out splits from a source of their own, by default half of it each.

    Args:
        rows: The training rows, without duplicates and without the rows of ``eval_rows``.
        eval_rows: The rows of ``data.eval``.
        selection_rows: Size of the selection split, or None for half of the rows.
        confirmation_rows: Size of the confirmation split, or None for half of the rows.
        seed: The study's seed, which with a group's name decides where it goes.

    Raises:
        DataError: A split would have fewer than 8 rows, or groups are too few or too large.
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
    held_out = _carve(eval_rows, "data.eval", num_selection, num_confirmation, seed)
    return held_out._replace(train=_in_order(rows))


def _carve(
    rows: UniqueRows, source: str, num_selection: int, num_confirmation: int, seed: int
) -> Splits:
    """Return the first rows as selection, the next as confirmation, the rest as training split."""
    if any(keyed.row.group for keyed in rows.values()):
        return _carve_groups(rows, source, num_selection, num_confirmation, seed)
    ordered = _in_order(rows)
    held_out = num_selection + num_confirmation
    return Splits(
        train=ordered[held_out:],
        selection=ordered[:num_selection],
        confirmation=ordered[num_selection:held_out],
    )


def _carve_groups(
    rows: UniqueRows, source: str, num_selection: int, num_confirmation: int, seed: int
) -> Splits:
    """Deal whole groups: each into the first split that still has room for it, else into training."""
    groups: dict[str, dict[tuple[int, ...], KeyedRow]] = defaultdict(dict)
    for ids, keyed in rows.items():
        groups[keyed.row.group][ids] = keyed
    sizes = {"selection": num_selection, "confirmation": num_confirmation}
    dealt: dict[str, dict[tuple[int, ...], KeyedRow]] = {
        "train": {},
        **{name: {} for name in sizes},
    }
    for group in sorted(groups, key=lambda name: group_key(name, seed)):
        members = groups[group]
        room = (name for name, size in sizes.items() if len(dealt[name]) + len(members) <= size)
        dealt[next(room, "train")].update(members)
    splits = Splits(**{name: _in_order(members) for name, members in dealt.items()})
    for name in sizes:
        held_out: tuple[TokenizedRow, ...] = getattr(splits, name)
        num_groups = len(set(row_clusters(held_out)))
        if len(held_out) < MIN_ROWS or num_groups < MIN_GROUPS:
            raise DataError(
                f"{source} has {len(groups)} groups (data.group), which stay whole: {name} gets "
                f"{len(held_out)} rows of {num_groups} groups, at least {MIN_ROWS} rows of {MIN_GROUPS} "
                f"groups are needed. Add groups, raise data.{name}_rows, or leave data.group out."
            )
    return splits


def _in_order(rows: UniqueRows) -> tuple[TokenizedRow, ...]:
    return tuple(row for _, row in sorted(rows.values(), key=lambda keyed: keyed.key))
