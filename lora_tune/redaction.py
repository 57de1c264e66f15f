"""Secrets in text, found and replaced by ``***`` before anything is written or shown.

Three kinds are known: tokens whose form says what they are (``hf_...``, ``ghp_...``, ``AKIA...``), passwords
in addresses and values beside a name such as ``api_key``, and the values of environment variables that have
such a name. What only looks random (a SHA-256, a git revision, a path) is left alone: a record without these
could not be checked. A secret of none of the three kinds is therefore not found.

``redact`` is for text that people and libraries wrote, ``redact_values`` for what is about to become JSON.
``mask_tokens`` does not guess from names, so it may be given anything, program text included.
"""

import os
import re
from collections.abc import Iterator, Mapping
from urllib.parse import quote

MASK = "***"
LEAST_LENGTH = 8  # characters of a value that is hidden for the name beside it
_SURE_LENGTH = 16  # from here on a value is hidden inside of longer words too

# Lines of base64, as they are, behind a comment's sign, or with their ends escaped. Nothing else may go with
# them: where a key was cut short, what follows belongs to the text around it.
_BREAK = r"(?:[\s#]|\\+[nrt])"
_BASE64 = "[A-Za-z0-9+/=]"
_PRIVATE_KEY = (
    rf"-----BEGIN [A-Z ]*PRIVATE KEY-----{_BASE64}*+"
    rf"(?:{_BREAK}++{_BASE64}{{16,}}+)*"
    rf"(?:{_BREAK}*+{_BASE64}*+{_BREAK}*+-----END [A-Z ]*KEY-----)?"
)

# A part of the text without which the form is not looked for, and the form, as its issuer documents it.
# `sk-` is looked at more closely: many issuers use it, and file names have it too.
_FORMS = tuple(
    (marker, re.compile(rf"(?<![A-Za-z0-9]){form}"))
    for marker, form in (
        ("hf_", r"hf_(?=[a-z]*[A-Z0-9])[A-Za-z0-9]{20,}"),
        ("api_org_", r"api_org_(?=[a-z]*[A-Z0-9])[A-Za-z0-9]{20,}"),
        ("gh", r"gh[opsru]_(?=[a-z]*[A-Z0-9])[A-Za-z0-9]{20,}"),
        ("github_pat_", r"github_pat_[A-Za-z0-9_]{22,}"),
        ("glpat-", r"glpat-[A-Za-z0-9_-]{20,}"),
        ("sk-", r"sk-(?=[A-Za-z_-]*[0-9])(?=[A-Za-z0-9_-]*[A-Za-z0-9]{16})[A-Za-z0-9_-]{20,}"),
        ("AKIA", r"AKIA[A-Z0-9]{16}(?![A-Za-z0-9])"),
        ("ASIA", r"ASIA[A-Z0-9]{16}(?![A-Za-z0-9])"),
        ("AIza", r"AIza[A-Za-z0-9_-]{35}"),
        ("xox", r"xox[abeoprs]-[A-Za-z0-9-]{10,}"),
        ("npm_", r"npm_[A-Za-z0-9]{36}"),
        ("pypi-", r"pypi-[A-Za-z0-9_-]{50,}"),
        ("wandb_v1_", r"wandb_v1_[A-Za-z0-9_]{20,}"),
        ("eyJ", r"eyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]+"),
        ("PRIVATE KEY-", _PRIVATE_KEY),
    )
)

_NAME = (
    r"(?:token|secret|passphrase|passw(?:or)?d|credentials?"
    r"|(?:api|access|secret|private|auth|encryption|signing)[_-]?key(?:[_-]id)?)"
)
_VARIABLE = re.compile(rf"(?:{_NAME}|_pass|_pwd)$", re.IGNORECASE)
_VALUE = (
    r"(?:\"(?P<double>[^\"\\\n]*)\"|'(?P<single>[^'\\\n]*)'"
    r"|\\?\"?(?P<bare>[^\s\"'`,;&<>(){}\[\]\\]++)(?![(\[]))"  # not what is called: `token = first2(text)`
)
_NAMED = tuple(
    re.compile(pattern + _VALUE, re.IGNORECASE)
    for pattern in (
        rf"{_NAME}(?![A-Za-z0-9_-])\\?[\"']?[ \t]*(?:=>|=|:)[ \t]*",
        rf"--[a-z0-9-]*{_NAME}[ \t]+",
    )
)
# Of these the third group is the secret.
_SHOWN = (
    re.compile(
        r"()(\b(?:bearer|authorization\W{1,4}(?:basic|token))\s+)([A-Za-z0-9._~+/-]{16,}=*)", re.I
    ),
    # An address that went through a Path has one slash.
    re.compile(r"(://?)([^\s/:@\"'<>\\]*:)([^\s/\"'<>\\]+)(?=@)"),
    re.compile(r"(://?)()((?=[A-Za-z_-]*[0-9])[A-Za-z0-9_-]{20,})(?=@)"),
)

_WORDS = re.compile(r"[A-Za-z_.:/|-]+")
_NUMBER = re.compile(r"[+-]?[\d.,_]+(?:e[+-]?\d+)?", re.IGNORECASE)
_PATH = re.compile(r"(?:~|\.{1,2})?[/\\]|[A-Za-z]:[\\/]|[a-z][a-z0-9+.-]*://", re.IGNORECASE)


def redact(text: str, environ: Mapping[str, str] = os.environ) -> str:
    """Return the text with every secret that is known for one replaced by ``***``.

    Doing it again changes nothing, and a JSON or TOML text keeps its structure.

    >>> redact("api_key = 'k3yk3yk3y' for https://me:pa55@host/x", {})
    "api_key = '***' for https://me:***@host/x"
    >>> redact("max_new_tokens = 256, learning_rate = 2e-4", {})
    'max_new_tokens = 256, learning_rate = 2e-4'
    """
    return _redact(text, _values_of(environ))


def mask_tokens(text: str, environ: Mapping[str, str] = os.environ) -> str:
    """Return the text without tokens of a known form and without secret values of the environment."""
    return _mask_tokens(text, _values_of(environ))


def redact_values(value: object, environ: Mapping[str, str] = os.environ) -> object:
    """Return a value of dicts, lists and plain values with every text in it redacted; keys stay."""
    return _redact_values(value, _values_of(environ))


def keys_with_secrets(
    values: Mapping[str, object], environ: Mapping[str, str] = os.environ
) -> tuple[str, ...]:
    """Return the keys, ``model.base``, below which a text holds a secret."""
    secrets = _values_of(environ)
    leaves = _leaves(values, "")
    found = (key for key, text in leaves if _redact(text, secrets) != text)
    return tuple(dict.fromkeys(found))


def same_when_masked(masked: object, value: object) -> bool:
    """Return whether ``value`` can be what ``masked`` was before its secrets were replaced."""
    if isinstance(masked, dict) and isinstance(value, dict):
        return masked.keys() == value.keys() and all(
            same_when_masked(masked[key], value[key]) for key in masked
        )
    if isinstance(masked, list) and isinstance(value, list):
        return len(masked) == len(value) and all(map(same_when_masked, masked, value))
    if isinstance(masked, str) and isinstance(value, str) and MASK in masked:
        parts = map(re.escape, masked.split(MASK))
        return re.fullmatch(".+".join(parts), value, re.DOTALL) is not None
    return masked == value


def _redact(text: str, secrets: tuple[str, ...]) -> str:
    text = _mask_tokens(text, secrets)
    for pattern in _SHOWN:
        text = pattern.sub(rf"\1\2{MASK}", text)
    for pattern in _NAMED:
        text = pattern.sub(_without_value, text)
    return text


def _mask_tokens(text: str, secrets: tuple[str, ...]) -> str:
    for secret in secrets:
        if secret in text:
            pattern = re.escape(secret)
            if len(secret) < _SURE_LENGTH:
                pattern = rf"(?<![A-Za-z0-9]){pattern}(?![A-Za-z0-9])"
            text = re.sub(pattern, MASK, text)
    for marker, form in _FORMS:
        if marker in text:
            text = form.sub(MASK, text)
    return text


def _redact_values(value: object, secrets: tuple[str, ...]) -> object:
    if isinstance(value, str):
        return _redact(value, secrets)
    if isinstance(value, dict):
        return {key: _redact_values(part, secrets) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_redact_values(part, secrets) for part in value]
    return value


def _leaves(value: object, key: str) -> Iterator[tuple[str, str]]:
    """Yield every text of a structure with the key that a user would look for."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, Mapping):
        for name, part in value.items():
            yield from _leaves(part, f"{key}.{name}".removeprefix("."))
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _leaves(part, key)


def _without_value(match: re.Match[str]) -> str:
    group = match.lastgroup
    assert group is not None
    if not _looks_secret(match[group]):
        return match[0]
    begin, end = (place - match.start() for place in match.span(group))
    return match[0][:begin] + MASK + match[0][end:]


def _values_of(environ: Mapping[str, str]) -> tuple[str, ...]:
    """Return secret values of the environment, as they are and as an address has them, longest first."""
    found = {v for name, v in environ.items() if _VARIABLE.search(name) and _looks_secret(v)}
    found |= {quote(value, safe="") for value in found}
    return tuple(sorted(found, key=lambda value: (-len(value), value)))


def _looks_secret(value: str) -> bool:
    """Return whether a value with a secret's name is one: no word, number, path or placeholder."""
    if (
        len(value) < LEAST_LENGTH
        or MASK in value
        or value[0] in "$<%{[|"
        or re.search(r"\s", value)
    ):
        return False
    if _WORDS.fullmatch(value) or _NUMBER.fullmatch(value):
        return False
    return not _PATH.match(value) or _is_dense(value)


def _is_dense(value: str) -> bool:
    """Return whether it is one long run of mixed characters: base64 may begin with a slash, as paths do."""
    kinds = (r"[a-z]", r"[A-Z]", r"[0-9]")
    return (
        re.fullmatch(r"/[A-Za-z0-9+/]{31,}={0,2}", value) is not None
        and all(re.search(kind, value) for kind in kinds)
        and value.count("/") < 4
    )
