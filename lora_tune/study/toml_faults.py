"""What is wrong with a text that is not valid TOML, in words: the line, and what to write instead."""

import re
import tomllib
from typing import NamedTuple

from lora_tune.study.choices import printable

_PLACE = re.compile(
    r"(?P<fault>.*) \(at (?:line (?P<line>\d+), column (?P<column>\d+)|end of .*)\)", re.S
)
_LONGEST = 60  # characters of a line that are shown


class TomlFault(NamedTuple):
    """A line, from 1 on, and the sentences about it."""

    line: int
    fault: str


# How tomllib words a fault, and what a user is told. The first that matches counts.
_SENTENCES = tuple(
    (re.compile(pattern), sentence)
    for pattern, sentence in (
        (r"Cannot overwrite a value|Duplicate inline table key", "The key is there twice: keep one."),
        (
            r"Cannot (declare|mutate|redefine)",
            "The section is there twice, or its name is also that of a key: keep one.",
        ),
        (
            r"Invalid value",
            "Text needs quotes; numbers, true and false have none, and each key needs a value.",
        ),
        (r"Invalid date", "There is no such date or time."),
        (r"Unclosed array", "In this list a comma or the closing ] is missing."),
        (r"Unclosed inline table|Expected '}'", "In this table a comma or the closing } is missing."),
        (r"Unterminated string|Illegal character '\\[nr]'|Expected (\"|')", "The closing quote is missing."),
        (
            r"Unescaped '\\'|Invalid hex value|Escaped character",
            "A backslash in quotes begins a special character: write it twice, or use 'single quotes'.",
        ),
        (
            r"Illegal character|invalid character",
            "There is a control character, which may have come in by copying: remove it.",
        ),
        (r"Expected newline or end", "After the value something is left: text needs quotes, notes a #."),
        (r"end of a table|end of an array", "The closing ] of the section is missing."),
        (r"Expected '='|Invalid (statement|initial)", "A line is KEY = VALUE, [SECTION] or # a note."),
    )
)  # fmt: skip


def explain_toml(error: tomllib.TOMLDecodeError, text: str) -> TomlFault:
    """Return where a text stops being TOML, and what is wrong there."""
    match = _PLACE.fullmatch(str(error))
    fault = match["fault"] if match else str(error)
    lines = text.split("\n")
    line = int(match["line"]) if match and match["line"] else _last_line(lines)
    sentence = next((words for form, words in _SENTENCES if form.search(fault)), f"{fault}.")
    seen = lines[line - 1].strip()
    column = int(match["column"]) if match and match["column"] else 0
    return TomlFault(line, f"not valid TOML: {_around(seen, column)} {printable(sentence)}")


def _last_line(lines: list[str]) -> int:
    """Return the number of the last line that is not empty."""
    return max((number for number, line in enumerate(lines, start=1) if line.strip()), default=1)


def _around(line: str, column: int) -> str:
    """Return the part of a line that ends shortly after a column."""
    begin = max(0, min(column, len(line)) - _LONGEST // 2) if len(line) > _LONGEST else 0
    part = printable(line[begin : begin + _LONGEST])
    is_cut = (
        begin + _LONGEST < len(line) or len(part) > _LONGEST
    )  # an escape is longer than its character
    return f"{'... ' if begin else ''}{part[:_LONGEST]}{' ...' if is_cut else ''} |"
