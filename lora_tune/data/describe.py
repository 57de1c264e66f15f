"""Rows as a person reads them, with the text that carries loss marked."""

from itertools import groupby

from transformers import PreTrainedTokenizerBase

from lora_tune.records import PreparedData, TokenizedRow

_OPEN, _CLOSE = "{+", "+}"


def describe_rows(
    prepared: PreparedData, tokenizer: PreTrainedTokenizerBase, n: int = 3
) -> list[str]:
    """Return the first ``n`` training rows decoded; ``{+...+}`` encloses text that carries loss."""
    return [decode_row(row, tokenizer) for row in prepared.train[:n]]


def decode_row(row: TokenizedRow, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return one row decoded, special tokens included, with ``{+...+}`` around the labels."""
    pairs = zip(row.input_ids, row.labels, strict=True)
    pieces = []
    for has_loss, group in groupby(pairs, key=lambda pair: pair[1] != -100):
        piece = str(tokenizer.decode([token for token, _ in group]))
        pieces.append(f"{_OPEN}{piece}{_CLOSE}" if has_loss else piece)
    return "".join(pieces)
