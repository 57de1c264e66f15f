"""A study file to a StudySpec, with errors that say where, what was seen and what is allowed."""

import json
import tomllib
import typing
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from lora_tune.errors import StudyFileError, nearest
from lora_tune.redaction import MASK, keys_with_secrets, redact
from lora_tune.study.spec import AnchorSection, StudySpec

_TYPES = {str: "text", bool: "true/false", int: "a whole number", float: "a number"}
_TYPES |= {list: "a list", dict: "a table"}

_WANTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "int_parsing": "a whole number",
    "float_": "a number",
    "string_type": "text in quotes",
    "string_too_short": "text that is not empty",
    "string_pattern": "letters, digits, _, . and -, beginning with a letter, a digit or _",
    "bool_": "true or false",
    "tuple_type": "a list",
    "model_type": "a section",
    "too_short": "a list with at least one value",
    "too_long": "a shorter list",
}
_AUTO = {
    "run.lanes": ', or "auto"',
    "search.trials": ', or "auto"',
    "search.min_rung_steps": ', or "auto"',
    "select.seeds": ', or "auto"',
    "train.micro_batch_size": ', or "auto"',
    "train.gradient_checkpointing": ', or "auto"',
}


def load_study(path: Path) -> StudySpec:
    """Read and validate a study file; an empty ``study.name`` becomes the file's own name.

    Raises:
        StudyFileError: One message for all faults found.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise StudyFileError(
            f"{path}: no such study file. Give the path of a .toml file, e.g. studies/quickstart.toml."
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise StudyFileError(f"{path}: cannot be read as text ({error})") from error
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise StudyFileError(f"{path}: not valid TOML: {error}") from error
    return validate_study(values, source=path)


def validate_study(values: dict[str, Any], *, source: Path) -> StudySpec:
    """Validate the values of a study file read from ``source``."""
    study = values.get("study", {})
    if isinstance(study, dict) and study.get("name", "") == "":
        values = {**values, "study": {**study, "name": source.stem}}
    try:
        spec = StudySpec.model_validate(values)
    except ValidationError as error:
        lines = dict.fromkeys(_explain(detail) for detail in _without_union_noise(error.errors()))
        raise StudyFileError("\n".join(f"{source}: {line}" for line in lines)) from None
    if redact(spec.study.name) != spec.study.name:
        raise StudyFileError(
            f"{source}: study.name holds what looks like a credential, and it would be the name of the "
            "study's folder. Choose another name."
        )
    return spec


def notes_on_credentials(spec: StudySpec, study_file: Path) -> tuple[str, ...]:
    """Return what to tell of credentials in a study file, as sentences; nothing when it has none."""
    keys = keys_with_secrets(spec.model_dump(mode="json"))
    text = study_file.read_text(encoding="utf-8")
    if not keys and redact(text) == text:
        return ()
    where = ", ".join(keys) or "a comment"
    return (
        f"{study_file}: {where} holds what looks like a credential. The study folder, its reports and this "
        f"log have {MASK} in its place; better keep it in the environment, such as HF_TOKEN.",
    )


def _without_union_noise(details: list[ErrorDetails]) -> list[ErrorDetails]:
    """Keep one error per key, and none for a list whose items have errors of their own.

    A union reports an error for each of its members, under the member's name.
    """
    kept: dict[tuple[int | str, ...], ErrorDetails] = {}
    for detail in details:
        *path, last = detail["loc"] or ("",)
        own_word = detail["type"] == "extra_forbidden"  # then the last part is the user's
        key = tuple(part for part in path if not _is_union_tag(part))
        if detail["loc"] and (own_word or not _is_union_tag(last)):
            key = (*key, last)
        # what the value should be says more than that it is not the word "auto"; of a name, which names
        # there are says more than that it is no section
        if key not in kept or (
            kept[key]["type"] == "literal_error" and detail["type"] != "model_type"
        ):
            kept[key] = {**detail, "loc": key}
    return [
        detail
        for key, detail in kept.items()
        if not any(len(other) > len(key) and other[: len(key)] == key for other in kept)
    ]


def _is_union_tag(part: int | str) -> bool:
    return isinstance(part, str) and (
        part in ("int", "str", "bool", "float", AnchorSection.__name__)
        or any(mark in part for mark in "[](-")
    )


def _explain(detail: ErrorDetails) -> str:
    key = _dotted(detail["loc"])
    seen = detail["input"]
    kind = detail["type"]
    if kind == "extra_forbidden":
        known = sorted(_fields_at(detail["loc"][:-1]))
        hint = nearest(str(detail["loc"][-1]), known) or "."
        return f"unknown key {key}{hint} Known: {', '.join(known)}."
    if kind == "missing" and isinstance(detail["loc"][-1], int):
        return f"{_dotted(detail['loc'][:-1])} has too few values: give [lowest, highest]."
    if kind == "missing":
        return f"{key} is missing and has no default. Add it."
    if kind == "value_error":
        where = f"{key}: " if key else ""  # none: the sections do not go together
        return f"{where}{detail['msg'].removeprefix('Value error, ')}."
    allowed = _allowed(detail)
    hint = _hint(kind, seen)
    return f"{key} is {_show(seen)}; {allowed}.{hint}"


def _allowed(detail: ErrorDetails) -> str:
    key = ".".join(str(part) for part in detail["loc"] if not isinstance(part, int))
    if key == "space.rank":
        return "ranks are whole numbers from 1 to 1024"
    context = detail.get("ctx", {})
    if detail["type"] == "literal_error":
        return f"allowed: {context['expected']}"
    wanted = next((text for kind, text in _WANTED.items() if detail["type"].startswith(kind)), "")
    if not wanted:
        wanted = detail["msg"].removeprefix("Input should be ")
    return f"it should be {wanted}{_AUTO.get(key, '')}"


def _hint(kind: str, seen: object) -> str:
    if isinstance(seen, str) and kind.startswith(("int", "float")):
        try:
            float(seen)
        except ValueError:
            return ""
        return f" Write {seen} without quotes."
    return ""


def _show(value: object) -> str:
    name = _TYPES.get(type(value), type(value).__name__)
    return f"{json.dumps(value, default=str)} ({name})"


def _dotted(location: tuple[int | str, ...]) -> str:
    text = ""
    for part in location:
        text += f"[{part}]" if isinstance(part, int) else f".{part}"
    return text.removeprefix(".")


def _fields_at(location: tuple[int | str, ...]) -> list[str]:
    model: type[BaseModel] = StudySpec
    for part in location:
        if isinstance(part, str):
            found = _section_in(model.model_fields[part].annotation)
            assert found is not None
            model = found
    return list(model.model_fields)


def _section_in(annotation: object) -> type[BaseModel] | None:
    """Return the section that a type is, or holds in a list or a union."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(_section_in, typing.get_args(annotation))), None)
