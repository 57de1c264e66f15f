"""Raw rows out of a file or a hub data set, each with the place it came from.

A row that cannot be read becomes a ``RowError`` in the stream, so that the reader goes on and
the caller decides how many such rows are too many. What makes the whole file unreadable is a
``DataError``. Rows are streamed, except from a ``.json`` file, which is read whole.
"""

import csv
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import datasets
import pyarrow  # type: ignore[import-untyped]
import pyarrow.parquet  # type: ignore[import-untyped]

from lora_tune.errors import DataError, nearest

_OTHER_SUFFIXES = {".gz", ".zst", ".zip", ".bz2", ".xz", ".txt", ".tsv", ".arrow", ".xlsx", ".yaml"}
_PARQUET_BATCH = 1024  # rows held at once


class RowError(ValueError):
    """Why a row cannot be used: a reason to count by, and what was seen."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason


class RawRow(NamedTuple):
    """A row as it was read: ``where`` is ``file:line`` or ``file row n``."""

    where: str
    value: object


def read_rows(source: str, *, split: str, base_dir: Path) -> Iterator[RawRow]:
    """Read the rows of a file, or of a hub data set when ``source`` is not a file.

    Args:
        source: A path (relative to ``base_dir``, or absolute) or the name of a hub data set.
        split: Split of the hub data set; without effect on a file.
        base_dir: Folder of the study file.

    Returns:
        Rows in the order of the source; ``value`` is a ``RowError`` where reading failed.

    Raises:
        DataError: The source does not exist, or is unreadable as a whole.
    """
    path = find_file(source, base_dir)
    return _read_hub(source, split) if path is None else _read_file(path)


def find_file(source: str, base_dir: Path) -> Path | None:
    """Return the file that ``source`` names, or None when it is the name of a hub data set.

    Raises:
        DataError: It is a folder, an unsupported kind of file, or a file that is not there.
    """
    path = base_dir / source
    allowed = ", ".join(_READERS)
    if os.path.isdir(path):
        raise DataError(f"data: {path} is a folder; name one file in it ({allowed}).")
    if os.path.isfile(path):
        if path.suffix.lower() not in _READERS:
            raise DataError(
                f"data: {path} ends with {path.suffix or 'no extension'!r}; "
                f"files that can be read end with {allowed}."
            )
        return path
    if _looks_like_a_path(source):
        siblings = os.listdir(path.parent) if os.path.isdir(path.parent) else []
        raise DataError(
            f"data: file not found: {path}{nearest(path.name, siblings) or '.'}"
            " Paths are relative to the study file's folder."
        )
    return None


def _looks_like_a_path(source: str) -> bool:
    suffix = Path(source).suffix.lower()
    return (
        suffix in _READERS
        or suffix in _OTHER_SUFFIXES
        or source.count("/") > 1
        or source.startswith((".", "/", "~"))
        or "\\" in source
    )


def _read_file(path: Path) -> Iterator[RawRow]:
    try:
        yield from _READERS[path.suffix.lower()](path)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from error


def _read_jsonl(path: Path) -> Iterator[RawRow]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if number == 1:
                line = _without_mark(path, line)
            if line.strip():
                yield RawRow(f"{path}:{number}", _parse_json_line(line))


def _parse_json_line(line: bytes) -> object:
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return RowError("not UTF-8", f"byte {error.object[error.start]:#04x} at {error.start}")
    except json.JSONDecodeError as error:
        return RowError("not JSON", f"{error.msg} at column {error.colno}")
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, deep nesting
        return RowError("not JSON", str(error).split(";")[0])


def _without_mark(path: Path, start: bytes) -> bytes:
    """Drop a UTF-8 byte order mark; refuse UTF-16, of which every row would be unreadable."""
    if start.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError(f"{path} is UTF-16 text; save it as UTF-8.")
    return start.removeprefix(b"\xef\xbb\xbf")


def _read_json(path: Path) -> Iterator[RawRow]:
    content = _without_mark(path, path.read_bytes())
    if not content.lstrip().startswith(b"["):
        # Many .json files hold one object per line.
        yield from _read_jsonl(path)
        return
    try:
        rows = json.loads(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: {error}.") from error
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno} is not JSON: {error.msg}.") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON that can be read: {error}.") from error
    for number, value in enumerate(rows, start=1):
        yield RawRow(f"{path} row {number}", value)


def _read_csv(path: Path) -> Iterator[RawRow]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # the default refuses fields over 128 KiB
    with path.open("rb") as file:
        _without_mark(path, file.read(4))
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as text:
        table = csv.reader(text, strict=True)
        header: list[str] | None = None
        while True:
            line = table.line_num + 1
            try:
                cells = next(table)
            except StopIteration:
                return
            except csv.Error as error:
                yield RawRow(f"{path}:{line}", RowError("not CSV", str(error)))
                continue
            if not cells:
                continue
            if header is None:
                header = cells
            elif len(cells) != len(header):
                fault = RowError("not CSV", f"{len(cells)} cells, the header has {len(header)}")
                yield RawRow(f"{path}:{line}", fault)
            else:
                yield RawRow(f"{path}:{line}", dict(zip(header, cells, strict=True)))


def _read_parquet(path: Path) -> Iterator[RawRow]:
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=_PARQUET_BATCH):
                for value in batch.to_pylist():
                    number += 1
                    yield RawRow(f"{path} row {number}", value)
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        place = f" after row {number}" if number else ""
        raise DataError(f"{path} is not a readable parquet file{place}: {error}") from error


def _read_hub(name: str, split: str) -> Iterator[RawRow]:
    try:
        rows = datasets.load_dataset(name, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split())
        raise DataError(
            f"data: {name!r} is neither a file nor a hub data set that can be loaded"
            f" (data.split = {split!r}): {reason}"
        ) from error
    for number, value in enumerate(rows, start=1):
        yield RawRow(f"{name} [{split}] row {number}", value)


_READERS: dict[str, Callable[[Path], Iterator[RawRow]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
