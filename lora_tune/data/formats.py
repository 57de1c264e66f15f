"""The row formats people use, as a table: which columns name a format, and what its rows mean.

Every row becomes a ``Conversation`` or a ``PlainText``. Prompts and instructions become turns, so
that the model's own chat template writes them; no prompt text is invented here.
"""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from lora_tune.data.reading import RowError, brief, brief_names
from lora_tune.errors import DataError

MAX_TURNS = 500  # finding the turns that carry loss takes time that grows with the square of them
_ROLES = ("system", "user", "assistant", "tool")
_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant"}


class Message(NamedTuple):
    """One turn of a conversation."""

    role: str
    content: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """Turns for the chat template. Assistant turns before ``loss_from`` never carry loss."""

    messages: tuple[Message, ...]
    loss_from: int = 0

    def sort_key(self, seed: int) -> bytes:
        """Hash of seed and content: decides the split, whatever the tokenizer or file order."""
        turns = (f"{role}\x1f{content}" for role, content in self.messages)
        return _hash("\x1e".join((str(seed), str(self.loss_from), *turns)))


@dataclass(frozen=True, slots=True, kw_only=True)
class PlainText:
    """Text that is trained on as it stands."""

    text: str

    def sort_key(self, seed: int) -> bytes:
        """Hash of seed and content, as for a conversation."""
        return _hash(f"{seed}\x1e{self.text}")


Example = Conversation | PlainText


class Format(NamedTuple):
    """How a format is told by its columns, and how one of its rows is read."""

    columns: tuple[str, ...]
    optional: tuple[str, ...]
    convert: Callable[[Mapping[str, object]], Example]


def detect_format(row: Mapping[str, object]) -> str | None:
    """Return the first format of the table whose columns the row has, or None.

    >>> detect_format({"instruction": "Add.", "output": "2", "id": 7})
    'alpaca'
    """
    for name, fmt in FORMATS.items():
        if _has_columns(row, fmt.columns):
            return name
    return None


def choose_format(source: str, wanted: str, rows: list[Mapping[str, object]]) -> str:
    """Return the format of a source from its first rows, or ``wanted`` when it fits one of them.

    Args:
        source: Name of the source, for messages.
        wanted: ``data.format``; ``auto`` detects.
        rows: The first rows that are objects, at least one.

    Raises:
        DataError: No format has these columns, or the wanted one has not.
    """
    found = next((name for row in rows if (name := detect_format(row))), None)
    columns = brief_names({str(column) for row in rows for column in row}) or "none"
    if wanted != "auto":
        if any(_has_columns(row, FORMATS[wanted].columns) for row in rows):
            return wanted
        hint = f", which look like {found}; write data.format = {found!r}" if found else ""
        raise DataError(
            f"{source}: data.format is {wanted!r}, which needs the columns "
            f"{' and '.join(FORMATS[wanted].columns)}; the rows have {columns}{hint}."
        )
    if found is None:
        known = "; ".join(f"{name} ({', '.join(fmt.columns)})" for name, fmt in FORMATS.items())
        raise DataError(
            f"{source}: no known format has the columns {columns}. Known formats and the columns "
            f"they need: {known}. Rename the columns."
        )
    return found


def unused_columns(name: str, row: Mapping[str, object]) -> set[str]:
    """Return the filled columns of a row, and keys of its turns, that the format does not read."""
    fmt = FORMATS[name]
    read = {*fmt.columns, *fmt.optional}
    unused = {str(column) for column, value in row.items() if column not in read and value}
    for column in read & row.keys():
        turns = row[column]
        for turn in turns if isinstance(turns, list) else ():
            if isinstance(turn, Mapping):
                keys = {str(key) for key, value in turn.items() if value}
                unused |= {f"{column}.{key}" for key in keys - set(_TURN_KEYS)}
    return unused


def convert_row(name: str, value: object) -> Example:
    """Return what a raw row means in the format ``name``.

    Raises:
        RowError: The row is not an object, lacks a field, or holds something unusable.
    """
    if isinstance(value, RowError):
        raise value
    if not isinstance(value, Mapping):
        raise RowError("not an object", f"it is {_kind(value)}")
    return FORMATS[name].convert(value)


def _convert_messages(row: Mapping[str, object]) -> Conversation:
    return _conversation(_turns(_field(row, "messages"), "messages"))


def _convert_sharegpt(row: Mapping[str, object]) -> Conversation:
    turns = _turns(_field(row, "conversations"), "conversations")
    system = row.get("system")
    if system and turns and turns[0].role != "system":
        turns.insert(0, Message("system", _text(system, "system")))
    return _conversation(turns)


def _convert_alpaca(row: Mapping[str, object]) -> Conversation:
    prompt = _filled(_field(row, "instruction"), "instruction")
    if row.get("input"):
        prompt += "\n\n" + _text(row["input"], "input")
    answer = _filled(_field(row, "output"), "output")
    return _conversation([Message("user", prompt), Message("assistant", answer)])


def _convert_prompt_completion(row: Mapping[str, object]) -> Conversation:
    prompt, completion = _field(row, "prompt"), _field(row, "completion")
    before = (
        _turns(prompt, "prompt")
        if isinstance(prompt, list)
        else [Message("user", _filled(prompt, "prompt"))]
    )
    after = (
        _turns(completion, "completion")
        if isinstance(completion, list)
        else [Message("assistant", _filled(completion, "completion"))]
    )
    return _conversation(before + after, loss_from=len(before))


def _convert_text(row: Mapping[str, object]) -> PlainText:
    return PlainText(text=_filled(_field(row, "text"), "text"))


def _conversation(turns: list[Message], loss_from: int = 0) -> Conversation:
    if all(turn.role != "assistant" for turn in turns[loss_from:]):
        raise RowError("no assistant turn", f"roles: {', '.join(t.role for t in turns) or 'none'}")
    return Conversation(messages=tuple(turns), loss_from=loss_from)


_TURN_KEYS = ("role", "content", "from", "value", "tool_calls")


def _turns(value: object, column: str) -> list[Message]:
    if not isinstance(value, list):
        raise RowError("wrong type", f"{column} is {_kind(value)}, not a list of turns")
    if len(value) > MAX_TURNS:
        raise RowError("too many turns", f"{column} has {len(value):,}, at most {MAX_TURNS:,}")
    return [_turn(turn, f"{column}[{index}]") for index, turn in enumerate(value)]


def _turn(turn: object, where: str) -> Message:
    """Read a turn with role and content, or with ShareGPT's from and value."""
    if not isinstance(turn, Mapping):
        raise RowError("wrong type", f"{where} is {_kind(turn)}, not an object")
    if turn.get("tool_calls"):
        raise RowError("tool calls", f"{where}.tool_calls cannot be trained on")
    role_key, content_key = ("role", "content") if "role" in turn else ("from", "value")
    if turn.get(role_key) is None or turn.get(content_key) is None:
        raise RowError("missing field", f"{where} needs role and content, or from and value")
    role = turn[role_key]
    role = _SHAREGPT_ROLES.get(role, role) if isinstance(role, str) else role
    if role not in _ROLES:
        raise RowError(
            "unknown role", f"{where} has {brief(repr(role), 40)}; roles are {', '.join(_ROLES)}"
        )
    # An empty system turn is meaningful: it replaces the template's default one.
    check = _text if role == "system" else _filled
    return Message(str(role), check(turn[content_key], f"{where}.{content_key}"))


def _field(row: Mapping[str, object], name: str) -> object:
    value = row.get(name)
    if value is None:
        raise RowError("missing field", name)
    return value


def _filled(value: object, name: str) -> str:
    text = _text(value, name)
    if not text.strip():
        raise RowError("empty content", name)
    return text


def _text(value: object, name: str) -> str:
    if not isinstance(value, str):
        raise RowError("wrong type", f"{name} is {_kind(value)}, not text")
    if "\0" in value:
        raise RowError("NUL character", name)
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:  # a lone surrogate, or a byte that was not UTF-8
            raise RowError("not UTF-8", f"{name} at character {error.start}") from error
    return value


def _kind(value: object) -> str:
    kinds: dict[type, str] = {
        str: "text",
        bool: "a truth value",
        int: "a number",
        float: "a number",
        list: "a list",
        dict: "an object",
        type(None): "null",
    }
    return kinds.get(type(value), type(value).__name__)


def _has_columns(row: Mapping[str, object], columns: tuple[str, ...]) -> bool:
    return all(row.get(column) is not None for column in columns)


def _hash(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8"), digest_size=16).digest()


FORMATS: dict[str, Format] = {
    "messages": Format(("messages",), (), _convert_messages),
    "sharegpt": Format(("conversations",), ("system",), _convert_sharegpt),
    "alpaca": Format(("instruction", "output"), ("input",), _convert_alpaca),
    "prompt-completion": Format(("prompt", "completion"), (), _convert_prompt_completion),
    "text": Format(("text",), (), _convert_text),
}
