"""The study's own training rows as files, written by a fresh process that shares nothing with this one.

Splits, duplicates and labels are found on tokens, so the rows have to be read as the study read them, which
takes its tokenizer and with it torch. That process is ``export/row_writer.py``.
"""

import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import TypeAdapter

import lora_tune
from lora_tune.export.job import ExportJob
from lora_tune.export.settings import WinnerSettings

TRAIN_FILE, CONFIRMATION_FILE = "train.jsonl", "confirmation.jsonl"
TEMPLATE_FILE = "chat_template.jinja"
_MODULE = "lora_tune.export.row_writer"
_LIMIT_S = 3600


@dataclass(frozen=True, slots=True, kw_only=True)
class RowRequest:
    """What to write: the rows of a study into a folder."""

    study: str  # folder of the study
    base_dir: str  # that paths of the study file are relative to
    folder: str
    tokens: bool  # with token ids and labels, and the confirmation rows as well


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingRows:
    """What was written. ``reason`` says why nothing was; then all else is a guess from the study's record."""

    files: tuple[str, ...] = ()  # names in the folder
    is_text: bool = False  # rows of plain text; else conversations
    loss: str = "all"  # "all" assistant turns carry it, the "last" turn, or "mixed"
    template: str | None = None  # name of the file, where it is not the tokenizer's own
    not_alternating: int = 0  # conversations that are no user and assistant turns in turn
    base_folder: str = ""  # safetensors made from a base that is a GGUF file of the user's own
    notes: tuple[str, ...] = ()
    reason: str = ""


def write_rows(job: ExportJob, settings: WinnerSettings, *, tokens: bool) -> TrainingRows:
    """Write ``train.jsonl`` into the job's folder, and what else the rows need.

    Args:
        job: The export.
        settings: For the folder that the study's paths are relative to.
        tokens: Write token ids and labels beside the text, and the confirmation rows.

    Raises:
        RuntimeError: The process failed by a bug; the text is its traceback.
    """
    job.note("reading the study's rows again with its tokenizer ...")
    request = RowRequest(
        study=str(job.snapshot.folder.resolve()),
        base_dir=str(settings.base_dir.resolve()),
        folder=str(job.folder.resolve()),
        tokens=tokens,
    )
    done = subprocess.run(
        [sys.executable, "-P", "-m", _MODULE, json.dumps(asdict(request))],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        encoding="utf-8",
        errors="replace",
        check=False,
        timeout=_LIMIT_S,
        env=_environment(),
    )
    if done.returncode != 0:
        raise RuntimeError(f"{_MODULE} ended with {done.returncode}:\n{done.stderr}")
    found = TypeAdapter(TrainingRows).validate_json(done.stdout)
    if found.reason:
        return _guess(job, settings, found.reason)
    return found


def _guess(job: ExportJob, settings: WinnerSettings, reason: str) -> TrainingRows:
    """Return what the record of a study says of rows that cannot be read."""
    is_text = job.snapshot.lock.data.format == "text"
    last_only = not is_text and settings.train_on == "last-assistant"
    row = '{"text": ...}' if is_text else '{"messages": [{"role": ..., "content": ...}, ...]}'
    note = (
        f"{TRAIN_FILE} was not written ({reason}). Put your rows there, one {row} a line, without those "
        "that the study kept for its confirmation."
    )
    loss = "last" if last_only else "all"
    return TrainingRows(is_text=is_text, loss=loss, notes=(note,), reason=reason)


def _environment() -> dict[str, str]:
    """Return this process's environment with the package where it was imported from."""
    root = str(Path(lora_tune.__file__).parent.parent)
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "TOKENIZERS_PARALLELISM": "false"}
