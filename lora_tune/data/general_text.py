"""A general text to see what a model has forgotten: prose, instructions, talk, sums and a little code.

It was written for this purpose and lies beside this file, so every study of a base is measured on the same
words, without a download.
"""

from functools import cache
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from lora_tune.data.encode import NO_LOSS
from lora_tune.records import TokenizedRow

_FILE = Path(__file__).parent / "general_text.txt"


@cache
def general_text() -> str:
    """Return the text."""
    return _FILE.read_text(encoding="utf-8")


def describe_general_text() -> str:
    """Return in a few words what the text is."""
    return f"{len(general_text().split()):,} words of plain English"


def general_rows(
    tokenizer: PreTrainedTokenizerBase, *, max_length: int
) -> tuple[TokenizedRow, ...]:
    """Return the text in rows of at most ``max_length`` tokens that follow each other.

    All tokens but the first of a row carry loss. No chat template; where the tokenizer puts a token before
    every text, each row begins with it, since some models expect nothing without.

    Args:
        tokenizer: Of the base; it is not changed.
        max_length: At least 3.
    """
    ids = tokenizer(general_text(), add_special_tokens=False, verbose=False)["input_ids"]
    begins = tokenizer("a", verbose=False)["input_ids"][:1]
    prefix = tuple(begins) if begins == [tokenizer.bos_token_id] else ()
    size = max_length - len(prefix)
    parts = [(*prefix, *ids[start : start + size]) for start in range(0, len(ids), size)]
    return tuple(
        TokenizedRow(input_ids=part, labels=(NO_LOSS, *part[1:])) for part in parts if len(part) > 1
    )
