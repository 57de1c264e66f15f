"""Raw rows out of a file or a hub data set, each with the place it came from.

A row that cannot be read becomes a ``RowError`` in the stream, so that the reader goes on and
the caller decides how many such rows are too many. What makes the whole file unreadable is a
``DataError``. Rows are streamed, whatever the kind of file: a file larger than the memory can be read.
"""

import csv
import os
import re
import stat
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, NamedTuple

import datasets
import pyarrow  # type: ignore[import-untyped]
import pyarrow.parquet  # type: ignore[import-untyped]

from lora_tune.data.foreign import foreign_content
from lora_tune.data.json_rows import BrokenJsonError, DoubledKey, JsonParser
from lora_tune.errors import DataError, nearest

MAX_ROW_BYTES = 16 * 1024**2
"""A longer row is a bad row: it is nearly always a file whose line ends were lost."""

_OTHER_SUFFIXES = {".gz", ".zst", ".zip", ".bz2", ".xz", ".txt", ".tsv", ".arrow", ".xlsx", ".yaml"}
_PARQUET_BATCH = 64  # rows held at once
_PARQUET_BUFFER = 1024**2  # bytes; else a whole column of a row group is read at once
_START_BYTES = 512  # looked at to tell what a file is
_CHUNK_BYTES = 1024**2
_SHOWN_CHARACTERS = 200  # of a value of the user's, in a message
_SHOWN_NAMES = 12


class RowError(ValueError):
    """Why a row cannot be used: a reason to count by, and what was seen."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {brief(detail)}" if detail else reason)
        self.reason = reason


class RawRow(NamedTuple):
    """A row as it was read: ``where`` is ``file:line`` or ``file row n``."""

    where: str
    value: object


def brief(text: str, limit: int = _SHOWN_CHARACTERS) -> str:
    r"""Return foreign text fit for a message: not long, and without characters that do things.

    >>> brief("a\x1b[31m\ud800" + "b" * 300, limit=20)
    'a\\x1b[31m\\ud800bb...'
    """
    shown = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text[: limit + 1])
    return shown if len(shown) <= limit else f"{shown[: limit - 3]}..."


def brief_names(names: Iterator[str] | list[str] | set[str]) -> str:
    """Return the names of columns for a message, in order; of very many only the first.

    >>> brief_names({"b", "a"})
    'a, b'
    """
    ordered = sorted(names)
    shown = ", ".join(brief(name, 40) for name in ordered[:_SHOWN_NAMES])
    rest = len(ordered) - _SHOWN_NAMES
    return f"{shown} and {rest:,} more" if rest > 0 else shown


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
        DataError: It is a folder, a pipe, a device, an unsupported kind of file, or not there.
    """
    path = base_dir / source
    allowed = ", ".join(_READERS)
    mode = _mode(path)
    if mode is None:
        if _looks_like_a_path(source):
            siblings = os.listdir(path.parent) if os.path.isdir(path.parent) else []
            raise DataError(
                f"data: file not found: {path}{nearest(path.name, siblings) or '.'}"
                " Paths are relative to the study file's folder."
            )
        return None
    if stat.S_ISDIR(mode):
        raise DataError(f"data: {path} is a folder; name one file in it ({allowed}).")
    if not stat.S_ISREG(mode):
        raise DataError(
            f"data: {path} is a pipe or a device; write its rows to a file ({allowed})."
        )
    if path.suffix.lower() not in _READERS:
        raise DataError(
            f"data: {path} ends with {path.suffix or 'no extension'!r}; "
            f"files that can be read end with {allowed}."
        )
    return path


def _mode(path: Path) -> int | None:
    try:
        return os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:  # no permission, a loop of links, a NUL in the name
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise DataError(f"data: {brief(str(path))} cannot be read: {reason}.") from error


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
    suffix = path.suffix.lower()
    try:
        with path.open("rb") as file:
            what = foreign_content(file.read(_START_BYTES), suffix)
        if what is not None:
            raise DataError(f"{path} is {what}.")
        yield from _READERS[suffix](path)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from error


def _read_jsonl(path: Path) -> Iterator[RawRow]:
    parser = JsonParser()
    with path.open("rb") as file:
        for number, line in enumerate(_lines(file), start=1):
            if isinstance(line, RowError):
                yield RawRow(f"{path}:{number}", line)
                continue
            if number == 1:
                line = line.removeprefix(_MARK)
                if line.strip() == b"[":
                    raise DataError(
                        f"{path} is a JSON list, not one object a line; let its name end with .json."
                    )
            if line.strip():
                yield RawRow(f"{path}:{number}", _parse_json_line(parser, line))


def _lines(file: IO[bytes]) -> Iterator[bytes | RowError]:
    """Yield the lines of a file; of one that is too long only the fault is held."""
    while line := file.readline(MAX_ROW_BYTES + 1):
        if len(line) <= MAX_ROW_BYTES or line.endswith(b"\n"):
            yield line
            continue
        while line and not line.endswith(b"\n"):
            line = file.readline(_CHUNK_BYTES)
        yield RowError("too long", f"a line of more than {MAX_ROW_BYTES // 1024**2} MiB")


def _parse_json_line(parser: JsonParser, line: bytes) -> object:
    try:
        value = parser.parse(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return RowError("not UTF-8", f"byte {error.object[error.start]:#04x} at {error.start}")
    except BrokenJsonError as error:
        if b"\r" in line.strip():
            return RowError("not JSON", f"{error}; it holds line ends of CR alone, save with LF")
        return RowError("not JSON", str(error))
    return _as_fault(value)


def _as_fault(value: object) -> object:
    if isinstance(value, DoubledKey):
        return RowError("doubled key", f"{value.key!r} is there more than once")
    return value


def _read_json(path: Path) -> Iterator[RawRow]:
    with path.open("rb") as file:
        start = file.read(_CHUNK_BYTES).removeprefix(_MARK).lstrip()
    if not start.startswith(b"["):
        # Many .json files hold one object per line.
        yield from _read_objects(path)
        return
    with path.open("rb") as file:
        rows = JsonParser().parse_array(file, max_row=MAX_ROW_BYTES)
        try:
            for number, value in enumerate(rows, start=1):
                yield RawRow(f"{path} row {number}", _as_fault(value))
        except UnicodeDecodeError as error:
            raise DataError(f"{path} is not UTF-8 text: {error.reason}.") from error
        except BrokenJsonError as error:
            raise DataError(f"{path}:{error.line} is not JSON: {error.reason}.") from error


def _read_objects(path: Path) -> Iterator[RawRow]:
    """Read a ``.json`` file that is no list: its first line tells whether it holds an object a line."""
    rows = _read_jsonl(path)
    first = next(rows, None)
    if first is None:
        return
    if isinstance(first.value, RowError):
        raise DataError(
            f"{path} is neither a list of rows nor one object a line; its first line: {first.value}."
        )
    yield first
    yield from rows


def _read_csv(path: Path) -> Iterator[RawRow]:
    csv.field_size_limit(min(sys.maxsize, MAX_ROW_BYTES))  # the default refuses fields over 128 KiB
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as text:
        table = csv.reader(_short_lines(path, text), strict=True)
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
                header = _csv_header(path, cells)
            elif len(cells) != len(header):
                fault = RowError("not CSV", f"{len(cells)} cells, the header has {len(header)}")
                yield RawRow(f"{path}:{line}", fault)
            else:
                yield RawRow(f"{path}:{line}", dict(zip(header, cells, strict=True)))


def _short_lines(path: Path, text: IO[str]) -> Iterator[str]:
    number = 0
    while line := text.readline(MAX_ROW_BYTES):
        number += 1
        if len(line) == MAX_ROW_BYTES and not line.endswith(("\n", "\r")):
            raise DataError(f"{path}:{number} is longer than {MAX_ROW_BYTES // 1024**2} MiB.")
        yield line


def _csv_header(path: Path, cells: list[str]) -> list[str]:
    doubled = {cell for cell in cells if cells.count(cell) > 1}
    if doubled:
        raise DataError(f"{path}:1 names a column more than once: {brief_names(doubled)}.")
    if len(cells) == 1 and (found := re.search("[;\t|]", cells[0])):
        raise DataError(
            f"{path}:1 has one column, {brief(cells[0])!r}: cells are separated by commas in a .csv "
            f"file, not by {found[0]!r}. Save it with commas."
        )
    return cells


def _read_parquet(path: Path) -> Iterator[RawRow]:
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(
            path, buffer_size=_PARQUET_BUFFER, pre_buffer=False
        ) as file:
            for batch in file.iter_batches(batch_size=_PARQUET_BATCH, use_threads=False):
                for value in batch.to_pylist():
                    number += 1
                    yield RawRow(f"{path} row {number}", value)
    # OSError: what arrow says of pages that do not decode. ValueError and OverflowError: dates and names that
    # Python cannot hold.
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        place = f" after row {number}" if number else ""
        raise DataError(
            f"{path} is not a readable parquet file{place}: {brief(' '.join(str(error).split()))}"
        ) from error


def _read_hub(name: str, split: str) -> Iterator[RawRow]:
    if name in datasets.packaged_modules._PACKAGED_DATASETS_MODULES:
        # datasets would read whatever lies in the working directory
        raise DataError(
            f"data: {name!r} is a kind of file, no file and no hub data set; name the file itself."
        )
    try:
        rows = datasets.load_dataset(name, split=split)
        for number, value in enumerate(rows, start=1):
            yield RawRow(f"{name} [{split}] row {number}", value)
    except (OSError, ValueError, ImportError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split())
        raise DataError(
            f"data: {name!r} is neither a file nor a hub data set that can be loaded"
            f" (data.split = {split!r}): {reason}"
        ) from error


_MARK = b"\xef\xbb\xbf"  # UTF-8's byte order mark

_READERS: dict[str, Callable[[Path], Iterator[RawRow]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
