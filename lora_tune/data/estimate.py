"""Rows without a tokenizer: counted and dealt into splits as ever, their tokens guessed from their text.

A made-up encoder cuts text into pieces of four characters, and gives each turn of a conversation as many
further tokens as a chat template takes. SmolLM2's tokenizer gives 4.4 characters a token and 5 tokens
a turn on the docstrings of ``studies/pydoc_data.py``; languages other than English have fewer characters.
"""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from lora_tune.data.encode import NO_LOSS, EncodedRow
from lora_tune.data.formats import Conversation, Example, PlainText
from lora_tune.data.prepare import prepare_with
from lora_tune.data.reading import RowError
from lora_tune.records import PreparedData, TokenizedRow
from lora_tune.study.spec import DataSection

CHARACTERS_A_TOKEN = 4
TEMPLATE_TOKENS = 5  # of a turn


def estimate_data(data: DataSection, *, seed: int, base_dir: Path) -> PreparedData:
    """Return the splits of a study with made-up tokens: sizes and lengths count, contents do not.

    Args:
        data: The ``[data]`` section.
        seed: The study's seed.
        base_dir: Folder of the study file.

    Raises:
        DataError: As in ``prepare_data``.
    """
    return prepare_with(TextEncoder(data), data, tokenizer=None, seed=seed, base_dir=base_dir)


class TextEncoder:
    """Encodes examples as pieces of their text."""

    notes: Sequence[str] = ()
    chat_template = "none"

    def __init__(self, data: DataSection) -> None:
        self._data = data

    def encode(self, examples: Sequence[Example]) -> list[EncodedRow | RowError]:
        """Return a row for every example."""
        return [self._encode(example) for example in examples]

    def _encode(self, example: Example) -> EncodedRow:
        ids: list[int] = []
        labels: list[int] = []
        longest, full_length = self._data.max_length, 0
        for text, has_loss in self._parts(example):
            full_length += -(-len(text) // CHARACTERS_A_TOKEN)
            pieces = _pieces(text[: CHARACTERS_A_TOKEN * (longest - len(ids))])
            ids += pieces
            labels += pieces if has_loss else [NO_LOSS] * len(pieces)
        row = TokenizedRow(input_ids=tuple(ids), labels=tuple(labels))
        return EncodedRow(row, full_length)

    def _parts(self, example: Example) -> Iterator[tuple[str, bool]]:
        """Yield stretches of text, and whether they carry loss."""
        if isinstance(example, PlainText):
            yield example.text, True
            return
        last = max(i for i, turn in enumerate(example.messages) if turn.role == "assistant")
        for position, (role, content) in enumerate(example.messages):
            yield role.ljust(TEMPLATE_TOKENS * CHARACTERS_A_TOKEN), False
            yield content, self._has_loss(example, position, last)

    def _has_loss(self, example: Conversation, position: int, last: int) -> bool:
        wanted = self._data.train_on == "assistant" or position == last
        is_answer = example.messages[position].role == "assistant"
        return wanted and is_answer and position >= example.loss_from


def _pieces(text: str) -> list[int]:
    """Return a number for every four characters, the same for the same ones."""
    parts = (text[i : i + CHARACTERS_A_TOKEN] for i in range(0, len(text), CHARACTERS_A_TOKEN))
    return [
        int.from_bytes(hashlib.blake2b(part.encode(), digest_size=4).digest()) for part in parts
    ]
