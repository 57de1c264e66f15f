"""JSON as rows of data need it: a list that is streamed, and keys that are there twice are seen.

The standard parser keeps the last of two equal keys without a word, and reads a list as a whole.
"""

import codecs
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO

_CHUNK_BYTES = 1024**2
_SPACE = re.compile(r"[ \t\n\r]*")


class BrokenJsonError(ValueError):
    """Text that is no JSON, or none that can be held: why, and on which line (1 is the first)."""

    def __init__(self, reason: str, line: int = 1, column: int | None = None) -> None:
        super().__init__(reason if column is None else f"{reason} at column {column}")
        self.reason = reason
        self.line = line


@dataclass(frozen=True, slots=True)
class DoubledKey:
    """Stands for a value of which an object has a key twice."""

    key: str


class JsonParser:
    """Parses values one after the other."""

    def __init__(self) -> None:
        self._decoder = json.JSONDecoder(object_pairs_hook=self._object)
        self._doubled: str | None = None

    def parse(self, text: str) -> object:
        """Return the value of a text, or a ``DoubledKey``.

        Raises:
            BrokenJsonError: It is not one JSON value.
        """
        self._doubled = None
        try:
            value = self._decoder.decode(text)
        except json.JSONDecodeError as error:
            raise BrokenJsonError(error.msg, error.lineno, error.colno) from error
        except (ValueError, RecursionError) as error:
            raise BrokenJsonError(_why(error)) from error
        return value if self._doubled is None else DoubledKey(self._doubled)

    def parse_array(self, file: IO[bytes], *, max_row: int) -> Iterator[object]:
        """Yield the elements of a list, or a ``DoubledKey`` in the place of one.

        Args:
            file: UTF-8 text that begins with ``[``, white space and byte order mark aside.
            max_row: Characters of an element, about, beyond which no end of it is looked for.

        Raises:
            BrokenJsonError: It is not a list, ends too early, or an element is too long.
            UnicodeDecodeError: It is not UTF-8.
        """
        text = _Window(file)
        text.skip("[")
        if text.next_is("]"):
            text.skip("]")
        else:
            yield self._element(text, max_row)
            while text.next_is(","):
                text.skip(",")
                yield self._element(text, max_row)
            text.skip("]")
        if not text.at_end():
            raise BrokenJsonError("text behind the end of the list", text.line)

    def _element(self, text: "_Window", max_row: int) -> object:
        """Parse at the window's position; what seems broken may only be cut, so more is read then."""
        text.skip_space()
        while True:
            self._doubled = None
            try:
                value, end = self._decoder.raw_decode(text.text, text.position)
            except json.JSONDecodeError as error:
                if text.pending <= max_row and text.grow():
                    continue
                line = text.line + text.text.count("\n", text.position, error.pos)
                is_open = text.pending > max_row and error.msg.startswith("Unterminated")
                reason = f"a row of more than {max_row:,} characters" if is_open else error.msg
                raise BrokenJsonError(reason, line) from error
            except (ValueError, RecursionError) as error:
                raise BrokenJsonError(_why(error), text.line) from error
            if end < len(text.text) or not text.grow():  # a number may go on in what follows
                text.position = end
                return value if self._doubled is None else DoubledKey(self._doubled)

    def _object(self, pairs: list[tuple[str, object]]) -> dict[str, object]:
        found = dict(pairs)
        if len(found) < len(pairs) and self._doubled is None:
            keys = [key for key, _ in pairs]
            self._doubled = next(key for key in found if keys.count(key) > 1)
        return found


def _why(error: ValueError | RecursionError) -> str:
    return "nested too deeply" if isinstance(error, RecursionError) else str(error).split(";")[0]


class _Window:
    """The part of a text that is being parsed."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._decode = codecs.getincrementaldecoder("utf-8-sig")().decode
        self._more = True
        self._dropped = 0  # lines before the text
        self.text = ""
        self.position = 0
        self.grow()

    @property
    def pending(self) -> int:
        """Characters that were read and not yet parsed."""
        return len(self.text) - self.position

    @property
    def line(self) -> int:
        """The line of the position; 1 is the first."""
        return 1 + self._dropped + self.text.count("\n", 0, self.position)

    def grow(self) -> bool:
        """Read on, by at least as much as is pending, and drop what was parsed; False at the end."""
        if not self._more:
            return False
        content = self._file.read(max(_CHUNK_BYTES, self.pending))
        self._more = bool(content)
        self._dropped += self.text.count("\n", 0, self.position)
        self.text = self.text[self.position :] + self._decode(content, not content)
        self.position = 0
        return True

    def skip_space(self) -> None:
        """Go to the next character that is no white space."""
        while True:
            match = _SPACE.match(self.text, self.position)
            self.position = match.end() if match else self.position
            if self.position < len(self.text) or not self.grow():
                return

    def next_is(self, character: str) -> bool:
        """Tell whether this character follows, white space aside."""
        self.skip_space()
        return self.text.startswith(character, self.position)

    def skip(self, character: str) -> None:
        """Go behind a character that has to follow.

        Raises:
            BrokenJsonError: Another one does.
        """
        if not self.next_is(character):
            seen = repr(self.text[self.position]) if self.pending else "the end of the file"
            raise BrokenJsonError(f"{character!r} expected, {seen} found", self.line)
        self.position += 1

    def at_end(self) -> bool:
        """Tell whether nothing but white space follows."""
        self.skip_space()
        return not self.pending
