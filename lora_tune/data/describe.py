"""Rows as a person reads them, with the text that carries loss marked."""

from itertools import groupby
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from lora_tune.records import PreparedData, TokenizedRow

_OPEN, _CLOSE = "{+", "+}"


class TextPart(NamedTuple):
    """A stretch of a decoded row."""

    text: str
    has_loss: bool


def describe_rows(
    prepared: PreparedData, tokenizer: PreTrainedTokenizerBase, n: int = 3
) -> list[str]:
    """Return the first ``n`` training rows decoded; ``{+...+}`` encloses text that carries loss."""
    return [decode_row(row, tokenizer) for row in prepared.train[:n]]


def decode_row(row: TokenizedRow, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return one row decoded, special tokens included, with ``{+...+}`` around the labels."""
    return "".join(
        f"{_OPEN}{part.text}{_CLOSE}" if part.has_loss else part.text
        for part in decode_parts(row, tokenizer)
    )


def decode_parts(row: TokenizedRow, tokenizer: PreTrainedTokenizerBase) -> list[TextPart]:
    """Return one row decoded, special tokens included, cut where loss begins and ends."""
    pairs = zip(row.input_ids, row.labels, strict=True)
    return [
        TextPart(str(tokenizer.decode([token for token, _ in group])), has_loss)
        for has_loss, group in groupby(pairs, key=lambda pair: pair[1] != -100)
    ]
