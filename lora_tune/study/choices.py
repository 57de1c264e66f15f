"""What a key of the study file may be, in words, from the JSON Schema; and values as TOML has them.

``init`` writes these words above each key, and an error says them of a value that is something else.
"""

import json
from collections.abc import Mapping
from typing import Any

_KINDS = {
    "integer": "a whole number",
    "number": "a number",
    "string": "text",
    "array": "a list",
}

Json = Mapping[str, Any]


def toml_literal(value: object) -> str:
    """Return a value as it is written in a study file.

    >>> toml_literal((3e-05, 2e-3)), toml_literal("auto"), toml_literal(True)
    ('[3e-5, 0.002]', '"auto"', 'true')
    """
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(toml_literal, value))}]"
    if isinstance(value, float):
        mantissa, mark, exponent = repr(value).partition("e")
        return f"{mantissa}e{int(exponent)}" if mark else mantissa
    if isinstance(value, str):
        return printable(json.dumps(value, ensure_ascii=False))
    return str(value)


def printable(text: str) -> str:
    r"""Return a text in one line that a terminal shows as it is: all else becomes an escape.

    >>> print(printable("red: \x1b[31m\n"))
    red: \u001b[31m\u000a
    """
    return "".join(c if c.isprintable() else _escape(ord(c)) for c in text)


def _escape(code: int) -> str:
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def choices(meaning: Json) -> str:
    """Say which values a key takes.

    >>> choices({"enum": ["nf4", "none"], "type": "string"})
    '"nf4" or "none"'
    >>> choices({"anyOf": [{"const": "auto"}, {"type": "integer", "minimum": 1}]})
    '"auto" or a whole number from 1'
    >>> choices({"type": "array", "items": {"type": "number", "exclusiveMinimum": 0}})
    'a list, each value a number above 0'
    """
    return _either(_options(meaning))


def _either(options: list[str]) -> str:
    *first, last = options
    return f"{', '.join(first)} or {last}" if first else last


def _options(meaning: Json) -> list[str]:
    members = meaning.get("anyOf") or meaning.get("oneOf")
    if members:
        return [option for member in members for option in _options(member)]
    if "const" in meaning:
        return [toml_literal(meaning["const"])]
    if "enum" in meaning:
        return [toml_literal(word) for word in meaning["enum"]]
    if "$ref" in meaning or "properties" in meaning:
        return ["a table"]
    kind = meaning.get("type")
    if kind == "boolean":
        return ["true", "false"]
    if kind == "array" and "prefixItems" in meaning:
        return [f"[lowest, highest], each {choices(meaning['prefixItems'][0])}"]
    if kind == "array" and "items" in meaning:
        options = _options(meaning["items"])
        inner = ["a list" if option.startswith("a list") else option for option in options]
        return [f"a list, each value {_either(inner)}"]
    return [f"{_KINDS.get(kind or '', '')}{_limits(meaning)}"]


def _limits(meaning: Json) -> str:
    """Say in which limits a number is.

    >>> _limits({"minimum": 1, "maximum": 20}), _limits({"exclusiveMinimum": 0}), _limits({})
    (' from 1 to 20', ' above 0', '')
    >>> _limits({"exclusiveMinimum": 0, "maximum": 1}), _limits({"minimum": 0, "exclusiveMaximum": 1})
    (' above 0, at most 1', ' from 0, below 1')
    """
    low, high = meaning.get("minimum"), meaning.get("maximum")
    above, below = meaning.get("exclusiveMinimum"), meaning.get("exclusiveMaximum")
    if low is not None and high is not None:
        return f" from {_bound(low)} to {_bound(high)}"
    parts = [
        "" if low is None else f"from {_bound(low)}",
        "" if above is None else f"above {_bound(above)}",
        "" if high is None else f"at most {_bound(high)}",
        "" if below is None else f"below {_bound(below)}",
    ]
    text = ", ".join(part for part in parts if part)
    return f" {text}" if text else ""


def _bound(number: float) -> str:
    """Return a bound as it may be written in TOML, long whole numbers in groups.

    >>> _bound(1024), _bound(10_000_000), _bound(1e6), _bound(1e-12)
    ('1024', '10_000_000', '1_000_000', '1e-12')
    """
    return f"{int(number):_}" if number > 10_000 and number == int(number) else toml_literal(number)
