"""A study file to a StudySpec, with errors that say where, what was seen and what is allowed.

Every fault is one line that begins with the file and, where it is known, the line in it. How a fault is
worded is in ``faults.py``, and of a text that is no TOML in ``toml_faults.py``.
"""

import os
import re
import stat
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from lora_tune.errors import StudyFileError
from lora_tune.redaction import MASK, keys_with_secrets, redact
from lora_tune.study.choices import printable
from lora_tune.study.faults import explain
from lora_tune.study.key_lines import Key, UnfitTextError, key_lines
from lora_tune.study.spec import StudySpec
from lora_tune.study.toml_faults import explain_toml

# A file with every key and its explanation has 12 kB. Of the worst text of this size all faults are known
# within a second.
MOST_BYTES = 2**18


def load_study(path: Path) -> StudySpec:
    """Read and validate a study file; an empty ``study.name`` becomes the file's own name.

    Raises:
        StudyFileError: One message for all faults found.
    """
    text = _read_text(path)
    try:
        lines = key_lines(text)
        values = tomllib.loads(text)
    except UnfitTextError as error:
        raise StudyFileError(
            f"{printable(str(path))}:{error.line}: {error}. This is no study file."
        ) from error
    except tomllib.TOMLDecodeError as error:
        place, fault = explain_toml(error, text)
        raise StudyFileError(f"{printable(str(path))}:{place}: {fault}") from error
    return validate_study(values, source=path, lines=lines)


def validate_study(
    values: dict[str, Any], *, source: Path, lines: Mapping[Key, int] | None = None
) -> StudySpec:
    """Validate the values of a study file.

    Args:
        values: Sections by their names.
        source: The file that they are from.
        lines: In which line of it each key is, for the messages.

    Raises:
        StudyFileError: One message for all faults found.
    """
    study = values.get("study", {})
    if isinstance(study, dict) and study.get("name", "") == "":
        values = {**values, "study": {**study, "name": _name_of(source)}}
    try:
        spec = StudySpec.model_validate(values)
    except ValidationError as error:
        details = error.errors(include_url=False)
        faults = explain(details, values, lines or {})
        where = printable(str(source))
        message = "\n".join(
            f"{where}: {fault}" if line is None else f"{where}:{line}: {fault}"
            for line, fault in faults
        )
        raise StudyFileError(message) from None
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


def _name_of(source: Path) -> str:
    """Return a study file's own name as one that a study may have."""
    name = source.stem
    if not re.fullmatch(r"\w[\w.-]*", name):
        name = re.sub(r"[^\w.-]+", "-", name).strip(".-")
    return name[:100].encode()[:200].decode(errors="ignore") or "study"


def _read_text(path: Path) -> str:
    """Return the text of a file; of a pipe or a device, which may never end, nothing is read."""
    where = printable(str(path))
    try:
        content = _read_bytes(path)
    except FileNotFoundError:
        raise StudyFileError(
            f"{where}: no such study file. Give the path of a .toml file, e.g. studies/quickstart.toml."
        ) from None
    except OSError as error:
        raise StudyFileError(f"{where}: cannot be read ({error.strerror}).") from error
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise StudyFileError(f"{where}: UTF-16 text; save it as UTF-8.")
    try:
        return content.removeprefix(b"\xef\xbb\xbf").decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise StudyFileError(
            f"{where}:{line}: byte {content[error.start]:#04x} is not UTF-8. Save the file as UTF-8 text."
        ) from error


def _read_bytes(path: Path) -> bytes:
    """Read a file.

    Raises:
        StudyFileError: It is none, or too large for a study file.
    """
    where = printable(str(path))
    # O_NONBLOCK: to open a pipe that nobody writes to would wait
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        found = os.fstat(handle)
        if stat.S_ISDIR(found.st_mode):
            raise StudyFileError(f"{where}: a folder; name the study file in it.")
        if not stat.S_ISREG(found.st_mode):
            raise StudyFileError(
                f"{where}: a pipe or a device; a study file is read more than once. Save it as a file."
            )
        with os.fdopen(handle, "rb", closefd=False) as file:
            content = file.read(MOST_BYTES + 1)
    finally:
        os.close(handle)
    if len(content) > MOST_BYTES:
        raise StudyFileError(
            f"{where}: more than {MOST_BYTES // 1024} KiB; a study file has a few kB. Is it the data? "
            "They are named in it, as data.train."
        )
    return content
