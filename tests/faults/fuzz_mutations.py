"""Inputs for the fuzz run: study files and data files, right ones and what becomes of them by mutation.

Half of the mutations know the grammar (a value for another, a key of the schema, a field of a row), the other
half knows bytes. Everything is drawn from a generator that is passed in, so a seed gives the same inputs.
"""

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import pyarrow
import pyarrow.parquet
from bad_study_files import REQUIRED, VALUES, keys, with_value

STUDIES = Path(__file__).parents[2] / "studies"
MOST_BYTES = 60_000  # of an input: mutants of mutants would grow
DATA_KINDS = ("jsonl", "json", "csv", "parquet")

_BYTES = (
    b"\0", b"\xff", b"\xef\xbb\xbf", b"\xff\xfe", b"\xe9", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\r",
    b"\r\n", b"\n", b"\x1a", b"\x1b[2J", b'"', b"'", b'"""', b"'''", b"\\", b"\\u0000", b"\\ud800", b"{",
    b"}", b"[", b"]", b"[[", b"=", b":", b",", b".", b"#", b"null", b"NaN", b"-Infinity", b"true", b"1e999",
    b"9" * 5000, b"[" * 3000, b'{"a":' * 3000, b"a." * 500, b" " * 4000, b"inf", b"0x", b"1979-05-27", b"-0",
)  # fmt: skip
_ODD: tuple[Any, ...] = (
    None, True, 0, -1, 1.5, 1e308, 10**30, "", " ", "\0", "\ud800", "\u202e", "x" * 3000, "<|im_end|>",
    [], {}, [[]], [None], [{}], {"role": "user"}, {"role": None, "content": None}, ["a", 1], "{}", "[]",
    "system", "user", "gpt",
)  # fmt: skip
_NAMES = (
    "messages", "conversations", "instruction", "input", "output", "prompt", "completion", "text", "system",
    "role", "content", "from", "value", "tool_calls", "name", "id", "", "Text", "chosen",
)  # fmt: skip


class Input(NamedTuple):
    """A file to be read, and what is asked of it."""

    kind: str  # "study", or the suffix of a data file
    content: bytes
    options: dict[str, Any]  # of [data], for a data file


def seeds() -> list[Input]:
    """Return right inputs of every kind."""
    files = [Input("study", path.read_bytes(), {}) for path in sorted(STUDIES.glob("*.toml"))]
    files.append(Input("study", REQUIRED.encode(), {}))
    random = Random(0)
    for rows in _ROWS:
        for kind in DATA_KINDS:
            made = [rows(number, random) for number in range(40)]
            if kind != "csv" or all(isinstance(v, str) for row in made for v in row.values()):
                files.append(Input(kind, _WRITERS[kind](made), {}))
    return files


def mutated(parent: Input, other: Input, random: Random) -> Input:
    """Return what becomes of an input by one to four changes.

    Args:
        parent: The input that is changed.
        other: Another of the same kind, from which pieces may come.
        random: Decides.
    """
    if parent.kind == "study":
        content = parent.content
        for _ in range(random.choice((1, 1, 2, 4))):
            content = random.choice(_STUDY_CHANGES)(content, other.content, random)[:MOST_BYTES]
        return Input("study", content, {})
    options = options_of(random)
    if random.random() < 0.5:
        made = _odd_rows(random)
        return Input(parent.kind, _WRITERS[parent.kind](made)[:MOST_BYTES], options)
    content = parent.content
    for _ in range(random.choice((1, 1, 2, 4))):
        content = _with_bytes(content, other.content, random)[:MOST_BYTES]
    return Input(parent.kind, content, options)


def options_of(random: Random) -> dict[str, Any]:
    """Return keys of [data] with which a file is read; seldom all of them right."""
    options: dict[str, Any] = {"max_bad_fraction": random.choice((0.01, 1.0, 1.0))}
    if random.random() < 0.15:
        options["format"] = random.choice(
            ("messages", "sharegpt", "alpaca", "prompt-completion", "text")
        )
    if random.random() < 0.15:
        options["group"] = random.choice(("id", "text", "messages", ""))
    if random.random() < 0.2:
        options["train_on"] = "last-assistant"
    if random.random() < 0.3:
        options["max_length"] = random.choice((8, 17, 4096))
    if random.random() < 0.2:
        options["selection_rows"] = random.choice((8, 9, 1000))
    return options


# Study files.


def _with_bytes(content: bytes, other: bytes, random: Random) -> bytes:
    """Return the bytes with some taken out, doubled, changed, or put in from elsewhere."""
    begin = random.randint(0, len(content))
    end = min(len(content), begin + random.choice((0, 0, 1, 2, 5, 30, 500)))
    way = random.randrange(5)
    if way == 0:
        put = random.choice(_BYTES)
    elif way == 1:
        put = content[begin:end] * random.choice((0, 2, 3))
    elif way == 2:
        put = bytes(byte ^ (1 << random.randrange(8)) for byte in content[begin:end])
    elif way == 3:
        place = random.randint(0, len(other))
        put = other[place : place + random.choice((1, 4, 40, 400))]
    else:
        put = random.randbytes(random.choice((1, 2, 8)))
    return content[:begin] + put + content[end:]


def _other_value(content: bytes, other: bytes, random: Random) -> bytes:
    """Replace a value by one that is at home with another key."""
    lines = content.split(b"\n")
    places = [number for number, line in enumerate(lines) if b"=" in line]
    if not places:
        return _with_bytes(content, other, random)
    place = random.choice(places)
    key = lines[place].partition(b"=")[0]
    value = random.choice(VALUES).encode()
    if random.random() < 0.3:
        value = b"[" + value + b", " + random.choice(VALUES).encode() + b"]"
    lines[place] = key + b"= " + value
    return b"\n".join(lines)


def _other_line(content: bytes, other: bytes, random: Random) -> bytes:
    """Take out, double or move a line, or take one from elsewhere."""
    lines, others = content.split(b"\n"), other.split(b"\n")
    place = random.randrange(len(lines))
    way = random.randrange(4)
    if way == 0:
        del lines[place]
    elif way == 1:
        lines.insert(random.randint(0, len(lines)), lines[place])
    elif way == 2:
        lines.insert(place, random.choice(others))
    else:
        section, key = random.choice(_KEYS)
        lines.insert(place, f"{section}.{key} = {random.choice(VALUES)}".encode())
    return b"\n".join(lines)


def _misspelt(content: bytes, other: bytes, random: Random) -> bytes:
    """Change a letter of a key or of a section."""
    lines = content.split(b"\n")
    place = random.randrange(len(lines))
    line = bytearray(lines[place])
    if line:
        line[random.randrange(len(line))] = random.choice(b"abcxyz_-.[]\"'= 019")
    lines[place] = bytes(line)
    return b"\n".join(lines)


def _one_key(content: bytes, other: bytes, random: Random) -> bytes:
    """Begin anew with a file that has one key, of any value."""
    return with_value(*random.choice(_KEYS), random.choice(VALUES)).encode()


_KEYS = list(keys())
_STUDY_CHANGES: tuple[Callable[[bytes, bytes, Random], bytes], ...] = (
    _with_bytes,
    _with_bytes,
    _other_value,
    _other_value,
    _other_line,
    _misspelt,
    _one_key,
)


# Rows.


def _words(number: int, random: Random) -> str:
    return f"{random.choice(('what', 'why', 'how'))} is number {number}?"


def _messages(number: int, random: Random) -> dict[str, Any]:
    turns = [
        {"role": "user", "content": _words(number, random)},
        {"role": "assistant", "content": f"answer {number}"},
    ]
    return {"messages": turns, "id": f"g{number // 3}"}


def _sharegpt(number: int, random: Random) -> dict[str, Any]:
    turns = [
        {"from": "human", "value": _words(number, random)},
        {"from": "gpt", "value": f"answer {number}"},
    ]
    return {"conversations": turns, "system": "be short"}


def _alpaca(number: int, random: Random) -> dict[str, Any]:
    return {"instruction": _words(number, random), "input": "", "output": f"answer {number}"}


def _prompt(number: int, random: Random) -> dict[str, Any]:
    return {"prompt": _words(number, random), "completion": f"answer {number}"}


def _text(number: int, random: Random) -> dict[str, Any]:
    return {"text": _words(number, random), "id": f"g{number // 2}"}


_ROWS = (_messages, _sharegpt, _alpaca, _prompt, _text)


def _odd_rows(random: Random) -> list[dict[str, Any]]:
    """Return rows of one format, some of them odd."""
    make = random.choice(_ROWS)
    rows = [make(number, random) for number in range(random.choice((0, 1, 30, 40, 60)))]
    share = random.choice((0.02, 0.2, 1.0))
    return [_odd(row, random) if random.random() < share else row for row in rows]


def _odd(row: Any, random: Random) -> Any:
    """Return a row, or a part of one, with something else in it."""
    way = random.randrange(6)
    if isinstance(row, dict) and row:
        key = random.choice(list(row))
        if way == 0:
            return {**row, key: random.choice(_ODD)}
        if way == 1:
            return {name: value for name, value in row.items() if name != key}
        if way == 2:
            return {**row, random.choice(_NAMES): random.choice(_ODD)}
        if way == 3:
            return {random.choice(_NAMES) if name == key else name: v for name, v in row.items()}
        return {**row, key: _odd(row[key], random)}
    if isinstance(row, list) and row and way:
        place = random.randrange(len(row))
        if way == 1:
            return row[:place]
        if way == 2:
            return row * 3
        return [*row[:place], _odd(row[place], random), *row[place + 1 :]]
    return random.choice(_ODD)


def _jsonl(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def _json(rows: list[Any]) -> bytes:
    return json.dumps(rows).encode()


def _csv(rows: list[Any]) -> bytes:
    text = io.StringIO()
    tables = [row for row in rows if isinstance(row, dict)]
    names = list(dict.fromkeys(name for row in tables for name in row))
    table = csv.DictWriter(text, names)
    table.writeheader()
    table.writerows(tables)
    return text.getvalue().encode("utf-8", "surrogatepass")


def _parquet(rows: list[Any]) -> bytes:
    """Return rows as Parquet; a column that it has no type for becomes bytes, which no format has."""
    tables = [row for row in json.loads(json.dumps(rows)) if isinstance(row, dict)]
    columns: dict[str, Any] = {}
    for name in dict.fromkeys(name for row in tables for name in row):
        values = [row.get(name) for row in tables]
        try:
            columns[name] = pyarrow.array(values)
            _parquet_file({name: columns[name]})
        except (pyarrow.ArrowException, UnicodeEncodeError, OverflowError, TypeError):
            columns[name] = pyarrow.array([json.dumps(value).encode() for value in values])
    return _parquet_file(columns)


def _parquet_file(columns: dict[str, Any]) -> bytes:
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), file)
    return file.getvalue()


_WRITERS: dict[str, Callable[[list[Any]], bytes]] = {
    "jsonl": _jsonl,
    "json": _json,
    "csv": _csv,
    "parquet": _parquet,
}
