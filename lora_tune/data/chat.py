"""Conversations as text, with the character spans that carry loss.

A span runs from the first character the model must write itself (after the generation prompt)
to the end-of-turn token, that token included, the newline behind it not. Where the template marks
assistant text with ``{% generation %}`` (its own marks, or trl's training variant of a known
template) the marks give the spans; for any other template they are found by rendering prefixes of
the conversation. Nothing is tokenized here.
"""

import copy
import datetime
import re
from collections.abc import Iterable, Sequence
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

import trl.chat_template_utils
from jinja2 import TemplateError, TemplateSyntaxError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template
from trl.chat_template_utils import get_training_chat_template

from lora_tune.data.formats import Conversation, Message
from lora_tune.data.reading import RowError
from lora_tune.errors import DataError, nearest

_TEMPLATE_FOLDERS = (
    Path(trl.chat_template_utils.__file__).parent / "chat_templates",
    Path(__file__).parent / "chat_templates",
)
_FILE_SUFFIXES = (".jinja", ".jinja2", ".j2", ".txt")
# Some templates write today's date: the same rows would differ from day to day. This is the date
# that Llama 3.1 writes when it is told none.
_DATE = datetime.date(2024, 7, 26)
_PROBE = "zqxprobe"
# What a template can fail with, beside its own errors: it computes with what the row holds.
_TEMPLATE_FAULTS = (
    TemplateError,
    TypeError,
    ValueError,
    LookupError,
    ArithmeticError,
    AttributeError,
    RecursionError,
)


class ChosenTemplate(NamedTuple):
    """A chat template: its text, and how it is called in the fingerprint."""

    label: str
    text: str


class Rendered(NamedTuple):
    """A conversation as text, and the spans (start, end) of characters that carry loss."""

    text: str
    spans: tuple[tuple[int, int], ...]
    num_open_turns: int  # spans that do not end with an end-of-turn token


def template_names() -> dict[str, Path]:
    """Return the templates that ``data.chat_template`` may name: trl's files and our own."""
    return {
        path.stem: path
        for folder in _TEMPLATE_FOLDERS
        for path in sorted(folder.glob("*.jinja"))
        if not path.stem.endswith("_training")
    }


def choose_template(
    wanted: str | None, *, tokenizer: PreTrainedTokenizerBase, base_dir: Path
) -> ChosenTemplate:
    """Return the template that ``data.chat_template`` names, or else the tokenizer's own.

    Raises:
        DataError: There is neither, or the name or file does not exist.
    """
    if wanted is not None:
        return ChosenTemplate(wanted, _read_template(wanted, base_dir))
    try:
        return ChosenTemplate("model", tokenizer.get_chat_template())
    except ValueError as error:
        raise DataError(
            "data.chat_template is needed: the rows are conversations and the model's tokenizer "
            'has no chat template. Write data.chat_template = "chatml", or the template the base '
            f"model was made for, or a Jinja file. Known names: {', '.join(template_names())}."
        ) from error


def _read_template(wanted: str, base_dir: Path) -> str:
    names = template_names()
    path = names.get(wanted)
    if path is None:
        path = base_dir / wanted
        if not wanted.endswith(_FILE_SUFFIXES) and "/" not in wanted:
            raise DataError(
                f"data.chat_template is {wanted!r}, which is no known template"
                f"{nearest(wanted, names) or '.'} Known: {', '.join(names)}; or the path of a Jinja file."
            )
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise DataError(f"data.chat_template: {path} cannot be read: {reason}.") from error


class ChatRenderer:
    """Renders conversations by one template; ``notes`` say what was special about it."""

    def __init__(
        self,
        template: ChosenTemplate,
        *,
        tokenizer: PreTrainedTokenizerBase,
        last_only: bool,
        use_marks: bool = True,
    ) -> None:
        """Find out how the template is best read.

        Args:
            template: The template as chosen.
            tokenizer: Gives the special tokens; it is not changed.
            last_only: Only the last assistant turn carries loss.
            use_marks: False finds the spans by prefixes even where the template has marks.

        Raises:
            DataError: The template is not valid Jinja.
        """
        marked = _training_template(template, tokenizer) if use_marks else None
        self.notes: list[str] = []
        if marked not in (None, template.text):
            self.notes.append(
                "The chat template is known to trl; its training variant renders the rows."
            )
        self._marked = marked is not None
        self._template = _pin_date(marked or template.text)
        if self._template != (marked or template.text):
            self.notes.append(f"The chat template writes a date; every row gets {_DATE}.")
        self._constants = tokenizer.special_tokens_map
        self._end_tokens = _end_tokens(tokenizer)
        self._last_only = last_only
        self._prompt = self._generation_prompt()
        self._header = "" if self._prompt or self._marked else self._turn_header()

    def render(self, conversation: Conversation) -> Rendered:
        """Render a conversation and find the spans that carry loss.

        Raises:
            RowError: The template refuses the conversation, or does not show where a turn begins.
        """
        messages = conversation.messages
        turns = [i for i, message in enumerate(messages) if message.role == "assistant"]
        wanted = [i for i in turns if i >= conversation.loss_from]
        wanted = wanted[-1:] if self._last_only else wanted
        try:
            if self._marked:
                text, spans = self._spans_by_marks(messages, turns, wanted)
            else:
                text, spans = self._spans_by_prefixes(messages, wanted)
        except RowError:
            raise
        except _TEMPLATE_FAULTS as error:
            raise RowError("refused by the chat template", str(error)) from error
        for i, (start, end) in zip(wanted, spans, strict=True):
            _check_answer(messages[i].content, text[start:end], f"turn {i + 1} of {len(messages)}")
        ends = [self._turn_end(text, start, end) for start, end in spans]
        return Rendered(
            text,
            tuple((span[0], end) for span, (end, _) in zip(spans, ends, strict=True)),
            sum(not closed for _, closed in ends),
        )

    def _render(self, messages: Sequence[Message], *, prompt: bool = False) -> str:
        rendered, _ = render_jinja_template(
            [_as_dicts(messages)],
            chat_template=self._template,
            add_generation_prompt=prompt,
            **self._constants,
        )
        return str(rendered[0])

    def _spans_by_marks(
        self, messages: Sequence[Message], turns: list[int], wanted: list[int]
    ) -> tuple[str, list[tuple[int, int]]]:
        rendered, marks = render_jinja_template(
            [_as_dicts(messages)],
            chat_template=self._template,
            return_assistant_tokens_mask=True,
            **self._constants,
        )
        text, spans = str(rendered[0]), _merge_touching(marks[0])
        if len(spans) != len(turns):
            raise RowError(
                "assistant turns not marked",
                f"the chat template marks {len(spans)} of {len(turns)} assistant turns",
            )
        spans = [spans[turns.index(i)] for i in wanted]
        return text, [(_after_prompt(text, start, end, self._prompt), end) for start, end in spans]

    def _spans_by_prefixes(
        self, messages: Sequence[Message], wanted: list[int]
    ) -> tuple[str, list[tuple[int, int]]]:
        text = self._render(messages)
        spans = []
        for i in wanted:
            before = self._render(messages[:i], prompt=True)
            through = self._render(messages[: i + 1]) if i + 1 < len(messages) else text
            if not (text.startswith(before) and text.startswith(through)):
                raise RowError(
                    "assistant turn not found",
                    f"the chat template rewrites what comes before turn {i + 1} of {len(messages)}",
                )
            start = len(before)
            if self._header and text.startswith(self._header, start):
                start += len(self._header)
            spans.append((start, len(through)))
        return text, spans

    def _turn_end(self, text: str, start: int, end: int) -> tuple[int, bool]:
        """Cut whitespace behind the end-of-turn token; tell whether there is such a token."""
        turn = text[start:end].rstrip()
        if turn.endswith(self._end_tokens):
            return start + len(turn), True
        return end, False

    def _generation_prompt(self) -> str:
        """Return what the template writes to make the model answer; empty if it writes nothing."""
        question = [Message("user", _PROBE)]
        try:
            without = self._render(question)
            text = self._render(question, prompt=True)
        except TemplateSyntaxError as error:
            raise DataError(
                f"the chat template is not valid Jinja: line {error.lineno}: {error.message}."
            ) from error
        except _TEMPLATE_FAULTS:
            return ""
        return text.removeprefix(without) if text.startswith(without) else ""

    def _turn_header(self) -> str:
        """Return the role header of a template that ignores ``add_generation_prompt``."""
        question = [Message("user", "hello")]
        try:
            before = self._render(question)
            text = self._render([*question, Message("assistant", _PROBE)])
        except _TEMPLATE_FAULTS:
            return ""
        header = text.removeprefix(before).partition(_PROBE)[0]
        return header if text.startswith(before) and header.strip() else ""


def _check_answer(content: str, span: str, where: str) -> None:
    """Refuse a row whose answer the template leaves out, as templates made for images do.

    Reasoning before ``</think>`` is left aside, since templates rewrite or drop it.
    """
    if content.rpartition("</think>")[2].strip() not in span:
        raise RowError("assistant text not rendered", f"the chat template changes {where}")


def _training_template(template: ChosenTemplate, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return a template with generation marks for the same text, or None when trl knows none."""
    probe = copy.copy(tokenizer)
    probe.chat_template = template.text
    try:
        return str(get_training_chat_template(probe) or template.text)
    except (ValueError, TypeError, TemplateError):
        return None


def _pin_date(template: str) -> str:
    return re.sub(
        r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""",
        lambda call: repr(_DATE.strftime(call[2])),
        template,
    )


def _end_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    added: Iterable[object] = tokenizer.added_tokens_decoder.values()
    tokens = {str(token) for token in added if getattr(token, "special", False)}
    tokens |= {str(tokenizer.eos_token)} if tokenizer.eos_token else set()
    return tuple(sorted(token for token in tokens if token.strip()))


def _after_prompt(text: str, start: int, end: int, prompt: str) -> int:
    r"""Move ``start`` behind the part of the generation prompt that lies inside the span.

    The rest of the prompt is skipped when its beginning stands before the span. When nothing of
    it stands there, as much of it as the span begins with is skipped.

    >>> _after_prompt("<assistant>\nyes<end>", 11, 20, "<assistant>\n")
    12
    >>> _after_prompt("<assistant>yes<end>", 0, 20, "<assistant><think>")
    11
    """
    for written in range(len(prompt), 0, -1):
        if text.endswith(prompt[:written], 0, start):
            rest = prompt[written:]
            return start + len(rest) if text.startswith(rest, start, end) else start
    pairs = zip(text[start:end], prompt, strict=False)
    return start + sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def _merge_touching(spans: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Join spans that touch: some templates mark a turn's text and its end separately.

    >>> _merge_touching([(3, 5), (5, 9), (12, 14)])
    [(3, 9), (12, 14)]
    """
    merged: list[tuple[int, int]] = []
    for start, end in spans:
        if merged and merged[-1][1] == start:
            start = merged.pop()[0]
        merged.append((start, end))
    return merged


def _as_dicts(messages: Sequence[Message]) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in messages]
