"""Which rows say the same: hashes of text without case, punctuation, white space and forms of characters.

Rows that look alike, and rows with the same prompt, tell a split about another one if they are in both.
"""

import hashlib
import unicodedata
from typing import NamedTuple

from lora_tune.data.formats import Example, Message, PlainText


class Likeness(NamedTuple):
    """Two hashes of a row. Rows that look alike have the same ``whole`` and the same ``prompt``."""

    whole: bytes
    prompt: bytes  # of what comes before the last answer; of the whole where there is no prompt


def likeness(example: Example) -> Likeness:
    """Return the hashes of an example.

    >>> def row(question, answer):
    ...     return Conversation(messages=(Message("user", question), Message("assistant", answer)))
    >>> from lora_tune.data.formats import Conversation
    >>> one, other = likeness(row("Who?", "I.")), likeness(row(" who ", "You."))
    >>> one.prompt == other.prompt, one.whole == other.whole
    (True, False)
    """
    if isinstance(example, PlainText):
        whole = _folded(example.text)
        return Likeness(whole, whole)
    turns = [_turn(message) for message in example.messages]
    whole = _joined(turns)
    last = max(i for i, turn in enumerate(example.messages) if turn.role == "assistant")
    asked = any(turn.role != "system" for turn in example.messages[:last])
    return Likeness(whole, _joined(turns[:last]) if asked else whole)


def _turn(message: Message) -> bytes:
    return _folded(message.role) + _folded(message.content)


def _joined(turns: list[bytes]) -> bytes:
    return hashlib.blake2b(b"".join(turns), digest_size=12).digest()


def _folded(text: str) -> bytes:
    folded = unicodedata.normalize("NFKC", text).casefold().translate(_SPACED)
    content = " ".join(folded.split()).encode("utf-8", "surrogatepass")
    return hashlib.blake2b(content, digest_size=12).digest()


class _Spaced(dict[int, int]):
    """Maps characters that are no part of a word to a space, for ``str.translate``; learns as it goes."""

    def __missing__(self, code: int) -> int:
        character = chr(code)
        drop = unicodedata.category(character)[0] in "PZC" and character not in _OPERATORS
        self[code] = ord(" ") if drop else code
        return self[code]


_OPERATORS = "*/%&#@\\-_"  # punctuation that tells sums and names apart
_SPACED = _Spaced()
