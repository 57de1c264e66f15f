"""In which lines keys stand: against the text itself, and against tomllib about what the keys are."""

import contextlib
import time
import tomllib
from pathlib import Path

import pytest

from lora_tune.study.key_lines import Key, UnfitTextError, key_lines

STUDIES = sorted((Path(__file__).parents[2] / "studies").glob("*.toml"))
TRICKY = '''
# [not.a.section] = 1
top."dotted key".x = """
many = "lines"
[nor.this]
""" # a note with = and [
[a]
list = [ # [
  1, 2.5,
  "x = [", [3,
  4]]
table = {b = 1, "c.d" = [ {e = '#'} ]}
[[rows]]
n = 1
[[rows]]
n = 2
[rows.inner]
when = 2026-01-15 12:30:00
'''
LINES = {
    ("top",): 3, ("top", "dotted key"): 3, ("top", "dotted key", "x"): 3,
    ("a",): 7, ("a", "list"): 8, ("a", "list", 0): 9, ("a", "list", 1): 9, ("a", "list", 2): 10,
    ("a", "list", 3): 10, ("a", "list", 3, 0): 10, ("a", "list", 3, 1): 11,
    ("a", "table"): 12, ("a", "table", "b"): 12, ("a", "table", "c.d"): 12, ("a", "table", "c.d", 0): 12,
    ("a", "table", "c.d", 0, "e"): 12,
    ("rows",): 13, ("rows", 0): 13, ("rows", 0, "n"): 14, ("rows", 1): 15, ("rows", 1, "n"): 16,
    ("rows", 1, "inner"): 17, ("rows", 1, "inner", "when"): 18,
}  # fmt: skip


def all_keys(values: object, key: Key = ()) -> set[Key]:
    """Return the key of everything that a parsed file holds."""
    if isinstance(values, dict):
        parts = list(values.items())
    elif isinstance(values, list):
        parts = list(enumerate(values))
    else:
        return set()
    found = {(*key, name) for name, _ in parts}
    return found.union(*(all_keys(value, (*key, name)) for name, value in parts))


def test_lines_of_a_tricky_text() -> None:
    assert key_lines(TRICKY) == LINES
    assert set(LINES) == all_keys(tomllib.loads(TRICKY))
    assert key_lines(TRICKY.replace("\n", "\r\n")) == LINES


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_keys_are_those_that_tomllib_finds_and_their_lines_begin_with_them(path: Path) -> None:
    text = path.read_text("utf-8")
    found = key_lines(text)
    assert set(found) == all_keys(tomllib.loads(text))
    lines = text.split("\n")
    for key, line in found.items():
        if len(key) == 1:
            assert lines[line - 1].startswith(f"[{key[0]}]")
        elif len(key) == 2:
            assert lines[line - 1].startswith(f"{key[1]} =")


@pytest.mark.parametrize(
    "text",
    [
        '"""' + '\\"""' * 60_000,
        'a="' * 80_000,
        '""""' * 60_000,
        "a = [" + "1," * 100_000,
        "= " * 100_000,
        "[[[[" * 60_000,
        "a='''" + "''" * 100_000,
        "\\" * 200_000,
    ],
    ids=lambda text: text[:8],
)
def test_no_text_takes_more_than_linear_time(text: str) -> None:
    began = time.process_time()
    with contextlib.suppress(UnfitTextError):
        key_lines(text)
    assert time.process_time() - began < 2  # a fifth is usual; square time would be minutes
