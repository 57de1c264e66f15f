"""Which rows train, which choose between trials, and which confirm the winner.

A row's place is decided by a hash of the study's seed and the row's own content. The order of the
file does not matter, and rows that are added later move few of the others. Rows with a group follow the
hash of seed and group, so that a conversation or document is never in two splits. Without groups, rows
that look alike, and rows with the same prompt, are kept in one split.
"""

import hashlib
from array import array
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from lora_tune.data.groups import group_key, row_clusters
from lora_tune.data.likeness import Likeness
from lora_tune.errors import DataError
from lora_tune.records import TokenizedRow

MIN_ROWS = 8
MAX_DEFAULT_ROWS = 1000
MIN_GROUPS = 2  # of a held-out split: fewer show no scatter between groups
# A prompt that more rows share than this part of a held-out split is no question but an instruction to
# all; its rows are dealt one by one.
_MOST_OF_A_PROMPT = 0.25
_SHORT_BY = 0.1  # of its rows a split may lack to keep prompts together


class KeyedRow(NamedTuple):
    """A row, the hash that orders it, and the hashes of what it says."""

    key: bytes
    row: TokenizedRow
    likeness: Likeness


UniqueRows = Mapping[bytes, KeyedRow]
"""Rows by ``token_key``, so that exact duplicates cannot exist."""


def token_key(row: TokenizedRow) -> bytes:
    """Return a hash of the row's token ids."""
    return hashlib.blake2b(array("q", row.input_ids).tobytes(), digest_size=16).digest()


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
    return held_out._replace(train=_in_order(rows.values()))


def _carve(
    rows: UniqueRows, source: str, num_selection: int, num_confirmation: int, seed: int
) -> Splits:
    """Deal the rows into the three splits, groups whole, else rows that say the same."""
    sizes = {"selection": num_selection, "confirmation": num_confirmation}
    if any(keyed.row.group for keyed in rows.values()):
        return _carve_groups(rows, source, sizes, seed)
    most = int(_MOST_OF_A_PROMPT * min(sizes.values()))
    splits = _deal(_units(rows.values(), most), sizes)
    if any(len(getattr(splits, name)) < (1 - _SHORT_BY) * size for name, size in sizes.items()):
        splits = _deal(_units(rows.values(), 0), sizes)
    for name in sizes:
        num_rows = len(getattr(splits, name))
        if num_rows < MIN_ROWS:
            num_units = len({keyed.likeness.whole for keyed in rows.values()})
            raise DataError(
                f"{source} has {len(rows)} usable rows, but only {num_units} that differ by more than "
                f"case, punctuation and white space; rows that look alike stay together, so {name} gets "
                f"{num_rows} rows, at least {MIN_ROWS} are needed. Add rows that say something else."
            )
    return splits


def _units(rows: Iterable[KeyedRow], most: int) -> list[list[KeyedRow]]:
    """Return what stays together: rows of a prompt if it has at most so many, else rows that look alike."""
    units = []
    for same_prompt in _together(rows, lambda keyed: keyed.likeness.prompt):
        if len(same_prompt) <= most:
            units.append(same_prompt)
        else:
            units += _together(same_prompt, lambda keyed: keyed.likeness.whole)
    return sorted(units, key=lambda unit: min(keyed.key for keyed in unit))


def _together(
    rows: Iterable[KeyedRow], what: Callable[[KeyedRow], bytes]
) -> Iterator[list[KeyedRow]]:
    found: dict[bytes, list[KeyedRow]] = defaultdict(list)
    for keyed in rows:
        found[what(keyed)].append(keyed)
    return iter(found.values())


def _deal(units: Iterable[Sequence[KeyedRow]], sizes: Mapping[str, int]) -> Splits:
    """Deal each unit into the first split that still has room for it, else into training."""
    dealt: dict[str, list[KeyedRow]] = {"train": [], **{name: [] for name in sizes}}
    for unit in units:
        room = (name for name, size in sizes.items() if len(dealt[name]) + len(unit) <= size)
        dealt[next(room, "train")] += unit
    return Splits(**{name: _in_order(members) for name, members in dealt.items()})


def _carve_groups(rows: UniqueRows, source: str, sizes: Mapping[str, int], seed: int) -> Splits:
    """Deal whole groups, and leave out rows that look like one of another split."""
    groups: dict[str, list[KeyedRow]] = defaultdict(list)
    for keyed in rows.values():
        groups[keyed.row.group].append(keyed)
    ordered = sorted(groups, key=lambda name: group_key(name, seed))
    splits = _without_leaks(_deal([groups[name] for name in ordered], sizes), rows)
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


def _without_leaks(splits: Splits, rows: UniqueRows) -> Splits:
    """Leave out training rows that look like a held-out one, and selection rows like a confirmation one."""

    def likes(part: Iterable[TokenizedRow]) -> set[bytes]:
        return {rows[token_key(row)].likeness.whole for row in part}

    def without(part: Iterable[TokenizedRow], seen: set[bytes]) -> tuple[TokenizedRow, ...]:
        return tuple(row for row in part if rows[token_key(row)].likeness.whole not in seen)

    confirmed = likes(splits.confirmation)
    selection = without(splits.selection, confirmed)
    return Splits(
        train=without(splits.train, confirmed | likes(selection)),
        selection=selection,
        confirmation=splits.confirmation,
    )


def _in_order(rows: Iterable[KeyedRow]) -> tuple[TokenizedRow, ...]:
    return tuple(keyed.row for keyed in sorted(rows, key=lambda keyed: keyed.key))
