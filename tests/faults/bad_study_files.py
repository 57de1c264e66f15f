"""Bad study files by the hundred, and what a good message about one is.

The table walks over every key of the schema, so a new key is tried without a line here. Which values a key
refuses is asked of ``jsonschema``, which shares no code with the loader.
"""

import json
import re
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema

from lora_tune.study.schema import study_schema

REQUIRED = '[model]\nbase = "smollm2-135m"\n[data]\ntrain = "rows.jsonl"\n'

# Values as they are written in TOML, each at home with some key and wrong with most others.
VALUES = (
    '"text"',
    '""',
    '"8"',
    '"a\\u0000b"',
    '"\\u001b[2J\\u001b[31m[bold red]x[/] \\u202e"',
    '"../../etc/passwd"',
    "\"__import__('os').system('touch hacked')\"",
    f'"{"x" * 5000}"',
    "0",
    "-1",
    "3",
    "123456789012345678901234567890",
    f"0x{'f' * 900}",
    "1.5",
    "-0.0",
    "1e400",
    "nan",
    "-inf",
    "true",
    "2026-01-15",
    "12:30:00",
    "2026-01-15T12:30:00Z",
    "[]",
    "[[]]",
    "[0]",
    "[-1, 1e999]",
    '["a", 2, true, 2026-01-15]',
    "[[[[[[1]]]]]]",
    "{}",
    "{x = 1}",
    '{"a.b" = {c = [1]}}',
)

# What pydantic, tomllib or Python say, and no user should read.
_INSIDE = re.compile(
    r"function-after|literal_error|tuple\[|Literal\[|list\[|constrained|Value error|Input should|Extra inputs"
    r"|validation error|pydantic|NoneType|<class|object at 0x|Traceback|Errno|\bint_|_type\b|Field required"
    r"|datetime\.|Exceeds the limit|\(at line|\bself\b"
)
LONGEST_LINE = 420  # characters, the path not counted
MOST_LINES = 21


def assert_good_message(message: str, path: Path, num_lines: int) -> None:
    """Hold that a message names the file, a line in it, and what is wrong, in words that a user knows.

    Args:
        message: Of the error.
        path: The study file.
        num_lines: How many lines it has.
    """
    lines = message.split("\n")
    assert 1 <= len(lines) <= MOST_LINES, message
    for line in lines:
        assert line.startswith(str(path)), line
        match = re.fullmatch(r"(?::(\d+))?: (.+)", line.removeprefix(str(path)))
        assert match, line
        place, fault = match.groups()
        assert place is None or 1 <= int(place) <= num_lines, line
        assert fault.endswith((".", ")")), line
        assert fault.isprintable(), repr(line)
        assert len(fault) <= LONGEST_LINE, line
        assert not _INSIDE.search(fault), line


def keys() -> Iterator[tuple[str, str]]:
    """Yield section and key of everything that a study file may have."""
    schema = study_schema()
    for section, reference in schema["properties"].items():
        for key in schema["$defs"][reference["$ref"].rpartition("/")[2]]["properties"]:
            yield section, key


def with_value(section: str, key: str, value: str) -> str:
    """Return a study file that is right but for this value, if it is wrong."""
    line = f"{key} = {value}"
    if f"[{section}]" not in REQUIRED:
        return f"{REQUIRED}[{section}]\n{line}\n"
    kept = [old for old in REQUIRED.splitlines() if not old.startswith(f"{key} =")]
    place = kept.index(f"[{section}]") + 1
    return "\n".join([*kept[:place], line, *kept[place:]]) + "\n"


def is_refused(text: str) -> bool:
    """Say whether the schema refuses a study file."""
    values = tomllib.loads(text)
    try:
        plain = json.loads(json.dumps(values, allow_nan=False))
    except (TypeError, ValueError):  # a date, not a number, or without end: JSON has none of them
        return True
    return not _validator().is_valid(plain)


@cache
def _validator() -> Any:
    return jsonschema.Draft202012Validator(study_schema())


def wrong_values() -> Iterator[tuple[str, str, str]]:
    """Yield section, key and text of every study file with one value that the schema refuses."""
    for section, key in keys():
        for value in VALUES:
            text = with_value(section, key, value)
            if is_refused(text):
                yield section, key, text
