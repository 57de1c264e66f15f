"""``lora-tune init``: a commented study file; on a terminal what was not given is asked for.

Nothing is asked where nobody can answer: then the message names the options. Every answer is checked at
once, as ``lora-tune check`` would, and the file is read back by the loader before it is written.
"""

import os
import re
import shlex
import sys
import tomllib
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import typer

from lora_tune.catalog.models import find_catalog_model, load_models
from lora_tune.commands.place import check_writable
from lora_tune.errors import DataError, LoraTuneError, StudyFileError
from lora_tune.files import write_text
from lora_tune.hub import find_config
from lora_tune.memory.verdict import find_device
from lora_tune.report.formatting import plural
from lora_tune.report.terminal import open_console, say, say_unbroken
from lora_tune.study.loader import validate_study
from lora_tune.study.schema import TITLE, schema_text
from lora_tune.study.template import study_template

if TYPE_CHECKING:
    from lora_tune.data.reading import RawRow

SCHEMA_FILE = "study.schema.json"
_HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+")
_HEAD_ROWS = 200  # looked at to find the format
_MOST_COUNTED = 100_000  # rows; a larger file would keep the user waiting


class StudyChoices(NamedTuple):
    """What was given on the command line; None is asked for, or left at its default."""

    model: str | None
    data: str | None
    name: str | None
    gpu: str | None


class Checked(NamedTuple):
    """A value as it goes into the file, and a sentence about it."""

    value: str
    note: str = ""


Check = Callable[[str], Checked]


def init(path: Path, choices: StudyChoices, *, force: bool, may_ask: bool) -> None:
    """Write a study file and its schema, and say what comes next.

    Args:
        path: The file to write.
        choices: What is known already.
        force: Whether a file that exists may be replaced.
        may_ask: Whether to ask for what is missing, if there is a terminal.

    Raises:
        LoraTuneError: Something is missing and cannot be asked for, or is not usable.
    """
    _check_path(path, force=force)
    asks = may_ask and all(s.isatty() for s in (sys.stdin, sys.stdout, sys.stderr))
    if asks and choices.model is None:
        names = ", ".join(model.name for model in load_models())
        _say(f"Models of the catalogue: {names}; or a hub id, a folder, a .gguf file.")
    model = _value(choices.model, "--model", "Base model", lambda x: _model(x, path), asks=asks)
    data = _value(choices.data, "--data", "Training data", lambda x: _rows(x, path), asks=asks)
    gpu = choices.gpu
    if gpu is None and asks:
        _say("GPU: a name such as RTX 4090, a size such as 24GiB; auto is what is free here.")
        gpu = _ask("GPU", _gpu, default="auto")
    name = choices.name if choices.name is not None else _name_for(data)
    given = {
        "study": {"name": name},
        "model": {"base": model},
        "data": {"train": data},
        "memory": {"gpu": _gpu(gpu or "auto").value},
    }
    text = study_template(given, schema=f"./{SCHEMA_FILE}")
    validate_study(tomllib.loads(text), source=path)  # --name may not be usable
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text)
    write_text(path.parent / SCHEMA_FILE, schema_text())
    print(path)
    _say(f"{path.parent / SCHEMA_FILE} tells editors what may stand in it.")
    command = f"lora-tune check {shlex.quote(str(path))}"
    say_unbroken(open_console(stderr=True), f"Next: {command}")


def _check_path(path: Path, *, force: bool) -> None:
    if path.is_dir():
        raise StudyFileError(f"{path} is a folder. Give --output the name of a file in it.")
    if path.exists() and not force:
        raise StudyFileError(
            f"{path} exists. Write over it with --force, or choose another with --output."
        )
    schema = path.parent / SCHEMA_FILE
    if schema.exists() and f'"title": "{TITLE}"' not in schema.read_text("utf-8"):
        raise StudyFileError(
            f"{schema} exists and is no schema of lora-tune; it would be written over. Move it, or "
            "choose another folder."
        )
    check_writable(path.parent)


def _value(given: str | None, option: str, question: str, check: Check, *, asks: bool) -> str:
    """Return a checked value: the given one, or the answer to a question."""
    if given is None and asks:
        return _ask(question, check)
    if given is None:
        raise StudyFileError(
            f"{option} is missing, and there is no terminal to ask on. Give both: lora-tune init "
            "--model MODEL --data FILE."
        )
    found = check(given)
    if found.note:
        _say(found.note)
    return found.value


def _ask(question: str, check: Check, *, default: str | None = None) -> str:
    """Ask until an answer can be used."""
    while True:
        answer = str(typer.prompt(question, default=default, err=True)).strip()
        try:
            found = check(answer)
        except LoraTuneError as error:
            _say(str(error))
            continue
        if found.note:
            _say(found.note)
        return found.value


def _model(model: str, study: Path) -> Checked:
    """Check ``model.base``: a catalogue name, a path that exists, or what may be a hub id."""
    local = Path(model)
    if find_catalog_model(model) is None and _HUB_ID.fullmatch(model) and not local.exists():
        return Checked(
            model, f"{model} is not in the catalogue; check asks the hub for its config."
        )
    found = find_config(model, base_dir=study.parent)
    value = _beside(local, study) if local.exists() and found.source != "catalogue" else model
    return Checked(value, f"{found.label}, from the {found.source}.")


def _rows(data: str, study: Path) -> Checked:
    """Check ``data.train``: the file is there, its format is known, and it has rows."""
    from lora_tune.data.formats import choose_format
    from lora_tune.data.reading import find_file, read_rows

    beside = not Path(data).exists() and (study.parent / data).exists()
    base = study.parent if beside else Path()
    path = find_file(data, base)
    if path is None:
        return Checked(data, f"{data} is no file here: it is taken for a hub data set.")
    rows = read_rows(data, split="train", base_dir=base)
    head = list(islice(rows, _HEAD_ROWS))
    objects: list[Mapping[str, object]] = [x.value for x in head if isinstance(x.value, Mapping)]
    if not head:
        raise DataError(f"{path} has no rows.")
    if not objects:
        raise DataError(_no_objects(head))
    fmt = choose_format(data, "auto", objects)
    count = len(head) + sum(1 for _ in islice(rows, _MOST_COUNTED))
    more = "more than " if next(rows, None) is not None else ""
    return Checked(_beside(path, study), f"{path}: {more}{plural(count, 'row')}, format {fmt}.")


def _no_objects(head: Sequence["RawRow"]) -> str:
    """Return what is wrong with rows of which none can be used, and where the first one is."""
    first = head[0]
    seen = str(first.value) if isinstance(first.value, Exception) else "not an object"
    others = f" None of the first {len(head)} rows is an object." if len(head) > 1 else ""
    return f'{first.where}: {seen}.{others} A row is an object, such as {{"text": ...}}.'


def _gpu(gpu: str) -> Checked:
    if gpu.casefold() == "auto":
        return Checked("auto")
    device = find_device(gpu, key="memory.gpu")
    return Checked(device.name if device.compute_capability else gpu)


def _beside(path: Path, study: Path) -> str:
    """Return a path as it is written in a study file, relative to its folder."""
    if path.is_absolute():
        return str(path)
    return Path(os.path.relpath(path, study.parent)).as_posix()


def _name_for(data: str) -> str:
    """Return a name for the study made of that of its data.

    >>> _name_for("data/my rows.jsonl"), _name_for("org/set"), _name_for("...")
    ('my-rows', 'set', 'study')
    """
    name = re.sub(r"[^\w.-]+", "-", Path(data).name)
    name = re.sub(r"\.(jsonl|json|csv|parquet)$", "", name).strip("-.")
    return name or "study"


def _say(text: str) -> None:
    say(open_console(stderr=True), text)
