"""Rows that come from one conversation or document: they stay in one split, and count as one cluster.

``data.group`` names the column that says so. Without it every row stands for itself.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence

from lora_tune.data.reading import RowError, brief_names
from lora_tune.errors import DataError, nearest
from lora_tune.records import TokenizedRow


def check_group_column(source: str, column: str, rows: Sequence[Mapping[str, object]]) -> None:
    """Refuse a source whose first rows do not have the group column.

    Raises:
        DataError: None of the rows has it.
    """
    columns = sorted({str(name) for row in rows for name in row})
    if column not in columns:
        raise DataError(
            f"{source}: data.group is {column!r}, but the rows have no such column"
            f"{nearest(column, columns) or '.'} They have {brief_names(columns) or 'none'}."
        )


def group_of(value: object, column: str) -> str:
    """Return the name of a raw row's group.

    Raises:
        RowError: The row has no such field, or it holds neither text nor a whole number.

    >>> group_of({"conversation": 12}, "conversation")
    '12'
    """
    name = value.get(column) if isinstance(value, Mapping) else None
    if isinstance(name, int) and not isinstance(name, bool):
        return str(name)
    if name is None or name == "":
        raise RowError("missing field", column)
    if not isinstance(name, str):
        raise RowError("wrong type", f"{column} is neither text nor a whole number")
    return name


def group_key(group: str, seed: int) -> bytes:
    """Return the hash of seed and name that decides a group's split."""
    text = f"{seed}\x1egroup\x1e{group}".encode("utf-8", "surrogatepass")
    return hashlib.blake2b(text, digest_size=16).digest()


def row_clusters(rows: Iterable[TokenizedRow]) -> tuple[int, ...]:
    """Return the cluster of each row, numbered from 0 in the order of their first rows.

    >>> def row(group):
    ...     return TokenizedRow(input_ids=(1,), labels=(1,), group=group)
    >>> row_clusters([row("a"), row(""), row("a"), row("")])
    (0, 1, 0, 2)
    """
    found: dict[object, int] = {}
    keys = (row.group or index for index, row in enumerate(rows))
    return tuple(found.setdefault(key, len(found)) for key in keys)
