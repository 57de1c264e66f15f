"""Examples as token ids with labels: what carries loss repeats its id, the rest is -100.

A conversation is tokenized once, as a whole; its labels are the tokens whose characters touch a
span that carries loss. Plain text is tokenized as it stands, with the special tokens that the
tokenizer adds by itself and the end-of-text token behind it, and carries loss throughout.
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from lora_tune.data.chat import ChatRenderer, Rendered, choose_template
from lora_tune.data.formats import Conversation, Example, PlainText
from lora_tune.data.reading import RowError
from lora_tune.errors import DataError
from lora_tune.records import TokenizedRow
from lora_tune.study.spec import DataSection

NO_LOSS = -100
# Of a longer text only the beginning is tokenized, as far as data.max_length reaches and a bit further,
# since the last tokens of a beginning may differ from those of the whole. A megabyte takes a second.
_WHOLE_CHARACTERS = 200_000
_CHARACTERS_A_TOKEN = 8
_MARGIN_TOKENS = 64


class EncodedRow(NamedTuple):
    """A row cut to ``data.max_length``, and how many tokens it had before.

    Of a very long text that number is what its beginning lets expect.
    """

    row: TokenizedRow
    full_length: int


class _Tokens(NamedTuple):
    """A text's tokens, or those of its beginning: ids, character ranges, and how many it has in all."""

    ids: list[int]
    offsets: Sequence[tuple[int, int]]
    full_length: int


class RowEncoder:
    """Encodes examples by one tokenizer; the chat template is looked for when one is needed."""

    def __init__(
        self, data: DataSection, *, tokenizer: PreTrainedTokenizerBase, base_dir: Path
    ) -> None:
        self._data = data
        self._tokenizer = tokenizer
        self._base_dir = base_dir
        self._renderer: ChatRenderer | None = None
        self._num_open_turns = 0
        self._num_control_rows = 0
        self._has_text = False
        self._example_control = ""
        self._control = _control_tokens(tokenizer)
        self.chat_template = "none"

    @property
    def notes(self) -> list[str]:
        """What was special about the template and the special tokens, as sentences."""
        notes = list(self._renderer.notes) if self._renderer else []
        if self._renderer and self._data.chat_template and self._tokenizer.chat_template:
            notes.append(
                f"data.chat_template = {self._data.chat_template!r} is used in place of the "
                "model's own chat template."
            )
        if self._num_open_turns:
            notes.append(
                f"{self._num_open_turns} assistant turns have no end-of-turn token that the "
                "tokenizer knows: the adapter does not learn where to stop."
            )
        if self._num_control_rows:
            notes.append(
                f"{self._num_control_rows} conversations have special tokens of the model, such as "
                f"{self._example_control!r}, in the text of a turn; they are read as these tokens, so "
                "a turn may seem to end there. Leave them out of the data unless that is wanted."
            )
        if self._has_text:
            notes += self._text_notes()
        return notes

    def encode(self, examples: Sequence[Example]) -> list[EncodedRow | RowError]:
        """Encode examples together, in order; what the chat template refuses is a ``RowError``.

        Raises:
            DataError: A chat template is needed and there is none, or it is unusable.
        """
        results: list[EncodedRow | RowError | None] = [None] * len(examples)
        chats: dict[int, Rendered] = {}
        texts: dict[int, str] = {}
        for i, example in enumerate(examples):
            if isinstance(example, PlainText):
                texts[i] = example.text
                continue
            try:
                chats[i] = self._render(example)
            except RowError as fault:
                results[i] = fault
        for i, encoded in zip(chats, self._encode_chats(list(chats.values())), strict=True):
            results[i] = encoded
        for i, encoded in zip(texts, self._encode_texts(list(texts.values())), strict=True):
            results[i] = encoded
        return [result for result in results if result is not None]

    def _render(self, conversation: Conversation) -> Rendered:
        if self._renderer is None:
            self._renderer = self._make_renderer()
        rendered = self._renderer.render(conversation)
        self._num_open_turns += rendered.num_open_turns
        self._look_for_control_tokens(conversation)
        return rendered

    def _look_for_control_tokens(self, conversation: Conversation) -> None:
        if self._control is None:
            return
        contents = (message.content for message in conversation.messages)
        found = next(filter(None, map(self._control.search, contents)), None)
        if found is not None:
            self._num_control_rows += 1
            self._example_control = self._example_control or found[0]

    def _make_renderer(self) -> ChatRenderer:
        if not self._tokenizer.is_fast:
            raise DataError(
                "the model's tokenizer does not tell which characters a token stands for, which "
                "label masks need. Use a base model with a fast tokenizer (a tokenizer.json file)."
            )
        template = choose_template(
            self._data.chat_template, tokenizer=self._tokenizer, base_dir=self._base_dir
        )
        self.chat_template = template.label
        return ChatRenderer(
            template,
            tokenizer=self._tokenizer,
            last_only=self._data.train_on == "last-assistant",
        )

    def _encode_chats(self, chats: list[Rendered]) -> list[EncodedRow]:
        tokens = self._tokenize([chat.text for chat in chats], is_chat=True)
        return [
            self._cut(found, label_tokens(found.ids, found.offsets, chat.spans))
            for chat, found in zip(chats, tokens, strict=True)
        ]

    def _encode_texts(self, texts: list[str]) -> list[EncodedRow]:
        if not texts:
            return []
        self._has_text = True
        eos = self._tokenizer.eos_token_id
        rows = []
        for found in self._tokenize(texts, is_chat=False):
            if eos is not None and found.ids[-1:] != [eos]:
                found.ids.append(eos)
                found = found._replace(full_length=found.full_length + 1)
            rows.append(self._cut(found, found.ids))
        return rows

    def _tokenize(self, texts: list[str], *, is_chat: bool) -> Iterator[_Tokens]:
        """Yield the tokens of each text, in order."""
        short = [text for text in texts if len(text) <= self._whole_characters]
        together = iter(self._tokens_of(short, is_chat=is_chat) if short else ())
        for text in texts:
            if len(text) <= self._whole_characters:
                yield next(together)
            else:
                yield self._beginning(text, is_chat=is_chat)

    @property
    def _whole_characters(self) -> int:
        return max(_WHOLE_CHARACTERS, _CHARACTERS_A_TOKEN * self._data.max_length)

    def _beginning(self, text: str, *, is_chat: bool) -> _Tokens:
        size = self._whole_characters
        while True:
            [found] = self._tokens_of([text[:size]], is_chat=is_chat)
            if size >= len(text):
                return found
            if len(found.ids) >= self._data.max_length + _MARGIN_TOKENS:
                return found._replace(full_length=round(len(found.ids) * len(text) / size))
            size *= 4

    def _tokens_of(self, texts: list[str], *, is_chat: bool) -> list[_Tokens]:
        batch = self._tokenizer(
            texts,
            add_special_tokens=not is_chat,  # a chat template writes them
            return_offsets_mapping=is_chat,
            return_attention_mask=False,
            verbose=False,
        )
        none: list[Sequence[tuple[int, int]]] = [()] * len(texts)
        ranges = batch["offset_mapping"] if is_chat else none
        return [
            _Tokens(ids, offsets, len(ids))
            for ids, offsets in zip(batch["input_ids"], ranges, strict=True)
        ]

    def _cut(self, tokens: _Tokens, labels: Sequence[int]) -> EncodedRow:
        length = self._data.max_length
        row = TokenizedRow(input_ids=tokens.ids[:length], labels=labels[:length])
        return EncodedRow(row, tokens.full_length)

    def _text_notes(self) -> list[str]:
        notes = []
        if self._tokenizer.eos_token_id is None:
            notes.append("The tokenizer has no end-of-text token: text rows end without one.")
        unused = []
        if self._data.chat_template and self._renderer is None:
            unused.append(f"data.chat_template = {self._data.chat_template!r}")
        if self._data.train_on != "assistant" and self._renderer is None:
            unused.append(f"data.train_on = {self._data.train_on!r}")
        if unused:
            notes.append(f"Without effect on rows of plain text: {', '.join(unused)}.")
        return notes


def _control_tokens(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str] | None:
    """Return what finds a special token in a text; the longer ones are looked for first."""
    added = tokenizer.added_tokens_decoder.values()
    tokens = {str(token).strip() for token in added if getattr(token, "special", False)} - {""}
    ordered = sorted(tokens, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, ordered))) if ordered else None


def label_tokens(
    ids: Sequence[int],
    offsets: Sequence[tuple[int, int]],
    spans: Sequence[tuple[int, int]],
) -> list[int]:
    """Return the labels of a row: the ids of the tokens that touch a span, -100 for the others.

    A token that straddles the beginning of a span belongs to it: the model must predict it. Some
    tokenizers give a token of whitespace the empty range behind it; it belongs to the span that
    it ends in.

    Args:
        ids: Token ids.
        offsets: First character of each token, and the one after its last.
        spans: Rising, disjoint character ranges (start, end).

    >>> label_tokens([5, 6, 7, 8], [(0, 4), (4, 5), (5, 9), (9, 10)], [(5, 9)])
    [-100, -100, 7, -100]
    """
    labels = [NO_LOSS] * len(ids)
    remaining = iter(spans)
    span = next(remaining, None)
    for i, (start, end) in enumerate(offsets):
        while span is not None and (start > span[1] or start == span[1] < end):
            span = next(remaining, None)
        if span is None:
            break
        if end > span[0] and (start < span[1] or start == end):
            labels[i] = ids[i]
    return labels
