"""What rows are like before they are cut and dealt out: lengths, and rows that are nearly the same.

``MeasuredEncoder`` stands between the reading of rows and their encoder and looks on, so that what is
measured is what a study reads, whatever its format. Every row is looked at; none is kept.
"""

import hashlib
import unicodedata
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lora_tune.data.encode import EncodedRow
from lora_tune.data.formats import Example, PlainText
from lora_tune.data.prepare import Encoder
from lora_tune.data.reading import RowError
from lora_tune.records import PreparedData, TokenizedRow

_SHORTEST_BIN = 16  # tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class LengthBin:
    """Rows of ``low`` to ``high`` tokens, both included."""

    low: int
    high: int
    rows: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RowStatistics:
    """Lengths of all rows that were read, in tokens before they are cut, and rows that look alike.

    Two rows look alike when they differ in case, punctuation and white space alone.
    """

    num_rows: int
    median: int
    percentile_95: int
    percentile_99: int
    longest: int
    num_cut: int  # rows longer than data.max_length
    num_cut_tokens: int
    num_tokens: int
    bins: tuple[LengthBin, ...]  # one of them ends at data.max_length
    num_alike: int  # training rows like an earlier one
    num_leaked_selection: int  # rows like a training row
    num_leaked_confirmation: int  # rows like a training or selection row


class MeasuredEncoder:
    """Encodes as another encoder does, and notes what it sees."""

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder
        self._lengths = array("q")
        self._texts: dict[tuple[int, ...], bytes] = {}

    @property
    def notes(self) -> Sequence[str]:
        """As of the other encoder."""
        return self._encoder.notes

    @property
    def chat_template(self) -> str:
        """As of the other encoder."""
        return self._encoder.chat_template

    def encode(self, examples: Sequence[Example]) -> list[EncodedRow | RowError]:
        """Encode examples together, in order."""
        results = self._encoder.encode(examples)
        for example, result in zip(examples, results, strict=True):
            if isinstance(result, EncodedRow):
                self._lengths.append(result.full_length)
                self._texts[result.row.input_ids] = _likeness(example)
        return results

    def statistics(self, data: PreparedData, *, max_length: int) -> RowStatistics:
        """Return what was seen, when all rows have been encoded and dealt out.

        Args:
            data: The splits made of these rows.
            max_length: Tokens that rows were cut to.
        """
        lengths = sorted(self._lengths)
        train, selection = self._likes(data.train), self._likes(data.selection)
        trained, seen = set(train), {*train, *selection}
        return RowStatistics(
            num_rows=len(lengths),
            median=_quantile(lengths, 0.5),
            percentile_95=_quantile(lengths, 0.95),
            percentile_99=_quantile(lengths, 0.99),
            longest=lengths[-1],
            num_cut=sum(length > max_length for length in lengths),
            num_cut_tokens=sum(max(0, length - max_length) for length in lengths),
            num_tokens=sum(lengths),
            bins=length_bins(lengths, max_length=max_length),
            num_alike=len(train) - len(trained),
            num_leaked_selection=sum(like in trained for like in selection),
            num_leaked_confirmation=sum(like in seen for like in self._likes(data.confirmation)),
        )

    def _likes(self, rows: Iterable[TokenizedRow]) -> list[bytes]:
        return [self._texts[row.input_ids] for row in rows]


def length_bins(lengths: Sequence[int], *, max_length: int) -> tuple[LengthBin, ...]:
    """Return how many rows are how long, in bins of doubling width; one ends at ``max_length``.

    >>> [(b.low, b.high, b.rows) for b in length_bins([5, 17, 30, 96, 97, 200], max_length=96)]
    [(1, 16, 1), (17, 32, 2), (33, 64, 0), (65, 96, 1), (97, 128, 1), (129, 256, 1)]
    """
    longest, edge, edges = max(lengths), _SHORTEST_BIN, set()
    while edge < longest:
        edges.add(edge)
        edge *= 2
    if max_length < longest:
        edges.add(max_length)
    edges.add(edge)
    highs = sorted(edges)
    lows = [1, *(high + 1 for high in highs[:-1])]
    return tuple(
        LengthBin(low=low, high=high, rows=sum(low <= length <= high for length in lengths))
        for low, high in zip(lows, highs, strict=True)
    )


def _quantile(ordered: Sequence[int], share: float) -> int:
    """Return the shortest length that at least this share of the rows does not exceed."""
    return ordered[max(0, -int(-share * len(ordered) // 1) - 1)]


class _Spaced(dict[int, int]):
    """Maps characters that are no part of a word to a space, for ``str.translate``; learns as it goes."""

    def __missing__(self, code: int) -> int:
        character = chr(code)
        drop = unicodedata.category(character)[0] in "PZC" and character not in _OPERATORS
        self[code] = ord(" ") if drop else code
        return self[code]


_OPERATORS = "*/%&#@\\-_"  # punctuation that tells sums and names apart
_SPACED = _Spaced()


def _likeness(example: Example) -> bytes:
    """Return the same bytes for texts that differ in case, punctuation and white space alone."""
    if isinstance(example, PlainText):
        return _digest([example.text])
    return _digest([text for message in example.messages for text in message])


def _digest(texts: Iterable[str]) -> bytes:
    digest = hashlib.blake2b(digest_size=12)
    for text in texts:
        folded = unicodedata.normalize("NFKC", text).casefold().translate(_SPACED)
        digest.update(" ".join(folded.split()).encode("utf-8", "surrogatepass"))
        digest.update(b"\x1e")
    return digest.digest()
