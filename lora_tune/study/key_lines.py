"""In which line of a TOML text each key stands, and whether the text can be parsed in sensible time.

``tomllib`` keeps no positions. It also takes square time and memory for a key of very many parts (0.2 MB
of ``a.a.a...`` need more than 20 GB), recurses once for each bracket, and refuses long numbers without
saying where they are. So the text is read once before, token by token, without recursion, in linear time.
On a text that is not valid TOML the lines up to the fault are right; ``tomllib`` then names the fault.
"""

import re
import tomllib
from dataclasses import dataclass, field
from typing import NamedTuple

Key = tuple[str | int, ...]

# A study file needs three of each.
MOST_PARTS = 32
MOST_BRACKETS = 32
MOST_ITEMS = 10_000  # in one pair of brackets
MOST_CHARACTERS = 1000  # of a number; Python itself refuses decimal ones of more than 4300 digits

_TOKEN = re.compile(
    r"""
      (?P<skipped> [ \t\r]++ | \#[^\n]*+ )
    | (?P<newline> \n )
    | (?P<text>
          \"{3} (?: [^\\"] | \\. | \"{1,2}(?!\") )*+ \"{3,5}
        | '{3} (?: [^'] | '{1,2}(?!') )*+ '{3,5}
        | \"(?!\"\") (?: [^\\"\n] | \\[^\n] )*+ \"
        | '(?!'') [^'\n]*+ '
      )
    | (?P<word> [^\s\#"'\[\]{}=,.]++ )
    | (?P<mark> [\[\]{}=,.] )
    """,
    re.VERBOSE | re.DOTALL,
)


class UnfitTextError(ValueError):
    """The text is nothing that a study file can be: the line, and what is wrong in it."""

    def __init__(self, line: int, fault: str) -> None:
        super().__init__(fault)
        self.line = line


def key_lines(text: str) -> dict[Key, int]:
    r"""Return the line, from 1 on, in which each key and each item of a list begins.

    Raises:
        UnfitTextError: It has more brackets, parts of a key, items in a bracket, or digits of a number than
            any study file.

    >>> key_lines("[space]\nrank = [\n  4,\n  8]")
    {('space',): 1, ('space', 'rank'): 2, ('space', 'rank', 0): 3, ('space', 'rank', 1): 4}
    """
    reader = _Reader()
    place = 0
    while match := _TOKEN.match(text, place):
        reader.read(str(match.lastgroup), match[0])
        place = match.end()
    return reader.found


class _Bracket(NamedTuple):
    """An open ``[`` or ``{`` of a value; ``key`` is that of the value."""

    key: Key
    is_list: bool


@dataclass(slots=True)
class _Reader:
    """Where the reading stands: below which section, inside which brackets, in a key or in a value."""

    found: dict[Key, int] = field(default_factory=dict)
    line: int = 1
    section: Key = ()
    parts: list[str] = field(default_factory=list)  # of the key that is being read
    value: Key | None = None  # the key of the value that is being read; None: a key is being read
    header: int = 0  # brackets of a [section] or [[section]] that is being read
    brackets: list[_Bracket] = field(default_factory=list)
    counts: dict[Key, int] = field(
        default_factory=dict
    )  # items of a list, written [[section]] or [...]

    def read(self, kind: str, token: str) -> None:
        """Take the next token."""
        if kind == "newline":
            self.line += 1
            if not self.brackets:
                self.parts, self.value, self.header = [], None, 0
        elif kind == "mark":
            self._read_mark(token)
        elif kind in ("text", "word"):
            self._read_text(token, is_word=kind == "word")
            self.line += token.count("\n")

    def _read_text(self, token: str, *, is_word: bool) -> None:
        if self.value is None:
            self.parts.append(token if is_word else _unquoted(token))
            if len(self.parts) > MOST_PARTS:
                raise UnfitTextError(self.line, f"a key has more than {MOST_PARTS} parts")
            return
        self._note_item()
        if is_word and len(token) > MOST_CHARACTERS:
            raise UnfitTextError(self.line, f"a value without quotes has {len(token):,} characters")

    def _read_mark(self, mark: str) -> None:
        if mark == "=" and self.value is None:
            self.value = self._below(self._base, self.parts)
            self._note(self.value)
        elif mark == "[" and self.value is None and not self.parts:
            self.header += 1
        elif mark in "[{":
            self._open(mark)
        elif mark in "]}":
            self._close()
        elif mark == "," and self.brackets:
            bracket = self.brackets[-1]
            self.counts[bracket.key] = self.counts.get(bracket.key, 0) + 1
            if self.counts[bracket.key] > MOST_ITEMS:
                raise UnfitTextError(
                    self.line, f"one pair of brackets holds more than {MOST_ITEMS:,} items"
                )
            self.parts, self.value = [], bracket.key if bracket.is_list else None

    @property
    def _base(self) -> Key:
        return self.brackets[-1].key if self.brackets else self.section

    def _open(self, mark: str) -> None:
        if self.value is None:
            return
        key = self._note_item()
        self.brackets.append(_Bracket(key, mark == "["))
        if len(self.brackets) > MOST_BRACKETS:
            raise UnfitTextError(self.line, f"more than {MOST_BRACKETS} brackets are open")
        self.parts, self.value = [], key if mark == "[" else None

    def _close(self) -> None:
        if self.header:
            self._begin_section()
        elif self.brackets:
            self.brackets.pop()
            self.value = self._base  # what may follow is a comma or a bracket

    def _begin_section(self) -> None:
        if self.parts:
            key = self._below((), self.parts)
            if self.header > 1:
                self.counts[key] = self.counts.get(key, -1) + 1
                key = (*key, self.counts[key])
            self.section, self.parts = key, []
            self._note(key)

    def _below(self, base: Key, parts: list[str]) -> Key:
        """Return a key whose first parts may name lists of sections, of which the last item is meant."""
        key = base
        for number, part in enumerate(parts, start=1):
            key = (*key, part)
            if number < len(parts) and key in self.counts:
                key = (*key, self.counts[key])
        return key

    def _note_item(self) -> Key:
        """Return the key of the value that begins, in a list with its place there."""
        assert self.value is not None
        key = self.value
        if self.brackets and self.brackets[-1].is_list and self.brackets[-1].key == key:
            key = (*key, self.counts.get(key, 0))
            self._note(key)
        return key

    def _note(self, key: Key) -> None:
        for length in range(1, len(key) + 1):
            self.found.setdefault(key[:length], self.line)


def _unquoted(token: str) -> str:
    """Return a key in quotes as the name that it stands for; as it is where it stands for none."""
    try:
        name = tomllib.loads(f"key = {token}")["key"]
    except tomllib.TOMLDecodeError:
        return token
    return str(name)
