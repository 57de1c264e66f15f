"""What is wrong with a study file, in words: the key, what was seen, what is allowed, what to write.

pydantic finds the faults; of what it says only the place and the kind of a fault are used. The value comes
from the file, and what is allowed from the JSON Schema, in the words that ``init`` writes above each key.
"""

import re
from collections.abc import Iterator, Mapping
from datetime import date, datetime, time
from functools import cache
from typing import Any

from pydantic_core import ErrorDetails

from lora_tune.errors import nearest
from lora_tune.study.choices import Json, choices, toml_literal
from lora_tune.study.key_lines import Key
from lora_tune.study.schema import study_schema
from lora_tune.study.spec import AnchorSection

MOST_SHOWN = 20  # faults; one file of rubbish has thousands
_LONGEST = 60  # characters of a value that are shown
_MOST_BITS = 400  # of a whole number that is shown with its digits

# In the order in which they are looked for: a bool is an int, a datetime is a date.
_KINDS: tuple[tuple[type, str], ...] = (
    (bool, "true/false"),
    (int, "a whole number"),
    (float, "a number"),
    (str, "text"),
    (list, "a list"),
    (dict, "a table"),
    (datetime, "a date and time"),
    (date, "a date"),
    (time, "a time"),
)
_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
_WORD = re.compile(r"[a-z_]+")
_UNION_TAG = re.compile(rf"int|str|bool|float|{AnchorSection.__name__}|.*[\[\](-].*", re.DOTALL)
_NAME = "letters, digits, _, . and -, at most 100, beginning with a letter, a digit or _"


def explain(
    details: list[ErrorDetails], values: dict[str, Any], lines: Mapping[Key, int]
) -> Iterator[tuple[int | None, str]]:
    """Yield the line and the sentence of each fault, in the order of the file; at most ``MOST_SHOWN``.

    Args:
        details: What pydantic found.
        values: The study file.
        lines: Where its keys are; empty when it does not come from a text.
    """
    found = _one_a_key(details)
    placed = sorted(found, key=lambda detail: _line_of(detail, lines) or 0)
    for detail in placed[:MOST_SHOWN]:
        yield _line_of(detail, lines), _sentence(detail, values)
    if len(placed) > MOST_SHOWN:
        yield None, f"and {len(placed) - MOST_SHOWN:,} more faults like these."


def shown(value: object) -> str:
    """Return a value as a study file has it, cut where it is long, and its kind.

    >>> shown(8), shown("8"), shown([True])
    ('8 (a whole number)', '"8" (text)', '[true] (a list)')
    """
    kind = next((word for known, word in _KINDS if isinstance(value, known)), "")
    text = _literal(value)
    if isinstance(value, str | list | dict) and len(text) > _LONGEST:
        unit = "characters" if isinstance(value, str) else "values"
        return f"{_cut(text)} ({kind} of {len(value):,} {unit})"
    return f"{_cut(text)} ({kind})"


def dotted(key: Key) -> str:
    """Return a key as it would be written in one line.

    >>> dotted(("space", "rank", 2)), dotted(("space", "a.b"))
    ('space.rank[2]', 'space."a.b"')
    """
    text = ""
    for part in key:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            text += f".{part if _BARE_KEY.fullmatch(part) else _literal(part)}"
        if len(text) > 2 * _LONGEST:
            return f"{text[: 2 * _LONGEST].removeprefix('.')}..."
    return text.removeprefix(".")


def _literal(value: object) -> str:
    """Return a value as TOML has it; of what is long at least as much as is shown."""
    if isinstance(value, int) and value.bit_length() > _MOST_BITS:
        return f"a number of about {round(value.bit_length() * 0.30103):,} digits"
    if isinstance(value, str):
        return toml_literal(value[: _LONGEST + 1])
    if isinstance(value, list):
        return f"[{', '.join(map(_literal, value[:_LONGEST]))}]"
    if isinstance(value, dict):
        pairs = list(value.items())[:_LONGEST]
        return f"{{{', '.join(f'{dotted((key,))} = {_literal(part)}' for key, part in pairs)}}}"
    return toml_literal(value)


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def _one_a_key(details: list[ErrorDetails]) -> list[ErrorDetails]:
    """Keep one error per key, and none for a list whose items have errors of their own.

    A union reports an error for each of its members, under the member's name.
    """
    kept: dict[Key, ErrorDetails] = {}
    for detail in details:
        *path, last = detail["loc"] or ("",)
        own_word = detail["type"] == "extra_forbidden"  # then the last part is the user's
        key = tuple(part for part in path if not _is_union_tag(part))
        if detail["loc"] and (own_word or not _is_union_tag(last)):
            key = (*key, last)
        if key not in kept:
            detail["loc"] = key
            kept[key] = detail
    holders = {key[:-1] for key in kept}  # what holds a key with an error of its own
    inner = {holder[:length] for holder in holders for length in range(len(holder) + 1)}
    return [detail for key, detail in kept.items() if key == () or key not in inner]


def _is_union_tag(part: int | str) -> bool:
    return isinstance(part, str) and _UNION_TAG.fullmatch(part) is not None


def _line_of(detail: ErrorDetails, lines: Mapping[Key, int]) -> int | None:
    """Return the line of a fault; of a missing key that of its section, of rivals that of the first."""
    key = detail["loc"]
    if detail["type"] == "value_error":
        words = _WORD.findall(detail["msg"])
        rivals = [lines[k] for k in ((*key, w) for w in words) if k in lines and len(k) > 1]
        if rivals:
            return rivals[0]
    while key and key not in lines:
        key = key[:-1]
    return lines.get(key)


def _sentence(detail: ErrorDetails, values: dict[str, Any]) -> str:
    location, kind = detail["loc"], detail["type"]
    if kind == "missing" and isinstance(location[-1], int):
        location = location[:-1]  # a list that is too short
    elif kind == "missing":
        return _missing(location)
    if kind == "extra_forbidden":
        return _unknown_key(location)
    if kind == "value_error":
        return f"{_rivals(location, detail['msg'].removeprefix('Value error, '))}."
    seen = _value_at(values, location)
    wanted = _node_at(location)
    near = nearest(seen, _words(wanted)) if isinstance(seen, str) else ""
    shown_key = f"{dotted(location)} is {shown(seen)}"
    start = f"{shown_key}{near} It should be" if near else f"{shown_key}; it should be"
    return f"{start} {_allowed(wanted, seen)}.{_hint(wanted, seen)}"


def _missing(location: Key) -> str:
    """Say which key is missing; of a section that is missing, which one it must have."""
    key: Key = (*location, *_node_at(location).get("required", ()))
    return f"{dotted(key)} is missing and has no default. Add it below [{dotted(key[:-1])}]."


def _rivals(location: Key, text: str) -> str:
    """Return what a check of a key, or of several keys of a section, says, with the name of either."""
    node = _node_at(location)
    if "properties" not in node:
        return f"{dotted(location)}: {text}"
    if text.partition(" ")[0] in node["properties"]:
        return f"{dotted(location)}.{text}"
    return f"{dotted(location)}: {text}" if location else text


def _unknown_key(location: Key) -> str:
    known = sorted(_keys_of(_node_at(location[:-1])))
    hint = nearest(str(location[-1]), known) or "."
    return f"unknown key {dotted(location)}{hint} Known: {', '.join(known)}."


def _value_at(values: object, location: Key) -> object:
    for part in location:
        assert isinstance(values, dict | list | tuple)
        values = values[part]  # type: ignore[index]
    return values


@cache
def _schema() -> Json:
    return study_schema()


def _node_at(location: Key) -> Json:
    """Return what the schema says of a key."""
    node = _schema()
    for part in location:
        if isinstance(part, int):
            lists = next(member for member in _members(node) if member.get("type") == "array")
            fixed = lists.get("prefixItems", ())
            node = _resolved(fixed[part] if part < len(fixed) else lists["items"])
        else:
            node = _resolved(_keys_of(node)[part])
    return node


def _keys_of(node: Json) -> Json:
    """Return the keys of a section, or of the table that is one of several choices."""
    members = map(_resolved, _members(node))
    keys: Json = next(member["properties"] for member in members if "properties" in member)
    return keys


def _members(node: Json) -> list[Json]:
    return list(node.get("anyOf") or node.get("oneOf") or [node])


def _resolved(node: Json) -> Json:
    if "$ref" not in node:
        return node
    found: Json = _schema()["$defs"][node["$ref"].rpartition("/")[2]]
    return found


def _words(node: Json) -> list[str]:
    """Return the words that a key takes."""
    return [
        word
        for member in _members(node)
        for word in member.get("enum", [member["const"]] if "const" in member else [])
    ]


def _allowed(node: Json, seen: object) -> str:
    """Say what may stand there, and of an empty value only that it is empty."""
    if "properties" in node:
        return "a section"
    if seen == [] and node.get("minItems") == 1:
        return "a list with at least one value"
    if seen == "" and node.get("minLength"):
        return "text that is not empty"
    if "pattern" in node and isinstance(seen, str):
        return _NAME
    return choices(node)


def _hint(node: Json, seen: object) -> str:
    """Say what to write where that is nearly certain."""
    kinds = {member.get("type") for member in _members(node)}
    if isinstance(seen, str) and kinds & {"integer", "number", "boolean"}:
        bare = seen.strip()
        if bare in ("true", "false") and "boolean" in kinds:
            return f" Write {bare} without quotes."
        if re.fullmatch(r"[+-]?\d{1,30}(\.\d{1,30})?(e[+-]?\d{1,3})?", bare):
            return f" Write {bare} without quotes." if kinds & {"integer", "number"} else ""
    if "items" in node and _is_one_of(node["items"], seen):
        return f" Write [{_literal(seen)}]."
    return ""


def _is_one_of(item: Json, seen: object) -> bool:
    """Say whether a value could stand in a list as it is."""
    if isinstance(seen, str):
        words = _words(item)
        return seen in words if words else 0 < len(seen) <= _LONGEST and _takes(item, "string")
    if isinstance(seen, bool) or not isinstance(seen, int | float):
        return False
    within = item.get("minimum", seen) <= seen <= item.get("maximum", seen)
    above = "exclusiveMinimum" not in item or seen > item["exclusiveMinimum"]
    kinds = ("integer", "number") if isinstance(seen, int) else ("number",)
    return within and above and any(_takes(item, kind) for kind in kinds)


def _takes(node: Json, kind: str) -> bool:
    return any(member.get("type") == kind for member in _members(node))
