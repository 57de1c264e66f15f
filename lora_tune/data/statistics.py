"""What rows are like before they are cut and dealt out: lengths, labels, and rows that look alike.

``MeasuredEncoder`` stands between the reading of rows and their encoder and looks on, so that what is
measured is what a study reads, whatever its format. Every row is looked at; none is kept.
"""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

from lora_tune.data.encode import EncodedRow
from lora_tune.data.formats import Example
from lora_tune.data.likeness import likeness
from lora_tune.data.prepare import Encoder
from lora_tune.data.reading import RowError
from lora_tune.data.splits import token_key
from lora_tune.records import PreparedData

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

    Two rows look alike when they differ in case, punctuation and white space alone. Of such rows none is
    held out where another one is trained on: ``prepare_data`` sees to that.
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
    num_without_label: int  # rows that are left out, most often because the cut takes their answer


class MeasuredEncoder:
    """Encodes as another encoder does, and notes what it sees."""

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder
        self._lengths = array("q")
        self._likes: dict[bytes, bytes] = {}
        self._num_without_label = 0

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
                self._likes[token_key(result.row)] = likeness(example).whole
                self._num_without_label += result.row.num_labels == 0
        return results

    def statistics(self, data: PreparedData, *, max_length: int) -> RowStatistics:
        """Return what was seen, when all rows have been encoded and dealt out.

        Args:
            data: The splits made of these rows.
            max_length: Tokens that rows were cut to.
        """
        lengths = sorted(self._lengths)
        trained = {self._likes[token_key(row)] for row in data.train}
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
            num_alike=len(data.train) - len(trained),
            num_without_label=self._num_without_label,
        )


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
