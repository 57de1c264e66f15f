"""The study folder on disk: one owner, one writer, every record atomic.

reports/<study>/
  study.toml         as the user wrote it, with *** for what looks like a credential
  study.lock.json    what the first start resolved and measured
  study.db           an ordinary Optuna study (SQLite in WAL mode)
  owner.lock         held by the running coordinator
  trials/NNNN/       trial.json and one folder a rung: adapter and lane state
  confirmation.json  finalists, default and untuned base on the confirmation split, and the decision
  confirmation/      the adapters of the finalists' runs with fresh seeds
  runtime.json       seconds spent by all runs so far
  behaviour.json     answers to held-out prompts and losses on general text, before and after
  memory.json        predicted and measured peaks of the packs that ran on a GPU
  adapter/           the winner
"""

import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from lora_tune.errors import StoreError
from lora_tune.files import write_text
from lora_tune.records import (
    NO_READINGS,
    Behaviour,
    Confirmation,
    MemoryLog,
    StudyLock,
    StudySnapshot,
    TrialRecord,
)
from lora_tune.redaction import redact, redact_values

STUDY_FILE = "study.toml"
LOCK_FILE = "study.lock.json"
DATABASE = "study.db"
OWNER_FILE = "owner.lock"
CONFIRMATION_FILE = "confirmation.json"
RUNS_FOLDER = "confirmation"
RUNTIME_FILE = "runtime.json"
MEMORY_FILE = "memory.json"
BEHAVIOUR_FILE = "behaviour.json"
ADAPTER_FOLDER = "adapter"
WEIGHTS_FILE = "adapter_model.safetensors"  # peft's name, which cannot be imported here

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Runtime:
    wall_s: float


class StudyFolder:
    """Reads and writes one study's folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @contextmanager
    def owned(self) -> Iterator[None]:
        """Hold the study for this process, or say who does.

        Raises:
            StoreError: Another process runs this study, or the folder cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            stream = (self.path / OWNER_FILE).open("a+", encoding="utf-8")
        except OSError as error:
            raise StoreError(f"{self.path}: cannot be written ({error.strerror})") from error
        with stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                stream.seek(0)
                owner = stream.read().strip() or "unknown"
                raise StoreError(
                    f"{self.path}: this study is being run by another process ({owner}). "
                    "Wait for it, or stop it and run the same command again."
                ) from None
            stream.truncate(0)
            stream.write(f"pid {os.getpid()} on {socket.gethostname()}")
            stream.flush()
            try:
                yield
            finally:
                stream.truncate(0)
                self._remove_if_unused()

    def _remove_if_unused(self) -> None:
        """Leave no folder behind when the study failed before it wrote anything."""
        if [path.name for path in self.path.iterdir()] == [OWNER_FILE]:
            (self.path / OWNER_FILE).unlink()
            self.path.rmdir()

    def trial_folder(self, number: int) -> Path:
        """Return the folder of a trial; it may not exist yet."""
        return self.path / "trials" / f"{number:04d}"

    def save_study_file(self, text: str) -> None:
        """Keep a copy of the study file for people, without what looks like a credential."""
        write_text(self.path / STUDY_FILE, redact(text))

    def save_lock(self, lock: StudyLock) -> None:
        """Write study.lock.json."""
        write_text(self.path / LOCK_FILE, _dump(lock))

    def load_lock(self) -> StudyLock | None:
        """Return what the first start resolved, None before it did."""
        path = self.path / LOCK_FILE
        return _load(path, StudyLock) if path.exists() else None

    def save_trial(self, record: TrialRecord) -> None:
        """Make a trial's record durable."""
        folder = self.trial_folder(record.number)
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "trial.json", _dump(record))

    def load_trial(self, number: int) -> TrialRecord:
        """Return one trial's record."""
        return _load(self.trial_folder(number) / "trial.json", TrialRecord)

    def load_trials(self) -> list[TrialRecord]:
        """Return all trial records, by number."""
        paths = (self.path / "trials").glob("*/trial.json")
        records = [_load(path, TrialRecord) for path in paths if path.parent.name.isdigit()]
        return sorted(records, key=lambda record: record.number)

    def save_confirmation(self, confirmation: Confirmation) -> None:
        """Write what is known of the candidates on the confirmation split."""
        write_text(self.path / CONFIRMATION_FILE, _dump(confirmation))

    def load_confirmation(self) -> Confirmation | None:
        """Return the confirmation, None while there is none."""
        path = self.path / CONFIRMATION_FILE
        return _load(path, Confirmation) if path.exists() else None

    def save_runtime(self, wall_s: float) -> None:
        """Write the seconds that all runs of the study took together."""
        write_text(self.path / RUNTIME_FILE, _dump(_Runtime(wall_s)))

    def load_runtime(self) -> float:
        """Return the seconds spent so far."""
        path = self.path / RUNTIME_FILE
        return _load(path, _Runtime).wall_s if path.exists() else 0.0

    def save_memory(self, log: MemoryLog) -> None:
        """Write all that was measured of the packs' memory."""
        write_text(self.path / MEMORY_FILE, _dump(log))

    def load_memory(self) -> MemoryLog:
        """Return what was measured of the packs' memory; empty on a CPU, and in older studies."""
        path = self.path / MEMORY_FILE
        return _load(path, MemoryLog) if path.exists() else NO_READINGS

    def save_behaviour(self, behaviour: Behaviour) -> None:
        """Write how base, default and chosen candidate answer, and what they forgot."""
        write_text(self.path / BEHAVIOUR_FILE, _dump(behaviour))

    def load_behaviour(self) -> Behaviour | None:
        """Return what was written of the answers, None while there is nothing."""
        path = self.path / BEHAVIOUR_FILE
        return _load(path, Behaviour) if path.exists() else None

    def _adapter_bytes(self) -> int:
        """Return the size of the winner's weights; 0 without one, also for a moment while it is replaced."""
        try:
            return (self.path / ADAPTER_FOLDER / WEIGHTS_FILE).stat().st_size
        except (FileNotFoundError, NotADirectoryError):
            return 0

    def snapshot(self) -> StudySnapshot:
        """Return all that a report may use.

        Raises:
            StoreError: No study here, or a file of it is damaged.
        """
        lock = self.load_lock()
        if lock is None:
            raise StoreError(
                f"{self.path}: no {LOCK_FILE}, so no study has been started here. "
                "Start one with: lora-tune run STUDY.toml"
            )
        # Before the trials: while the study runs, its confirmation names none that is not yet recorded.
        confirmation = self.load_confirmation()
        return StudySnapshot(
            folder=self.path,
            lock=lock,
            trials=tuple(self.load_trials()),
            confirmation=confirmation,
            wall_s=self.load_runtime(),
            memory=self.load_memory(),
            behaviour=self.load_behaviour(),
            adapter_bytes=self._adapter_bytes(),
        )


_ADAPTERS: dict[type, TypeAdapter[Any]] = {}


def _adapter(kind: type) -> TypeAdapter[Any]:
    """Return the reader and writer of a kind of record: to make one takes longer than to read a trial."""
    if kind not in _ADAPTERS:
        _ADAPTERS[kind] = TypeAdapter(kind)
    return _ADAPTERS[kind]


def _dump(value: object) -> str:
    """Return a record as JSON; texts in it that look like credentials are replaced by ``***``."""
    text = _adapter(type(value)).dump_json(value, indent=1).decode()
    plain = json.loads(text)
    redacted = redact_values(plain)
    if redacted != plain:
        text = json.dumps(redacted, indent=1, ensure_ascii=False)
    return text + "\n"


def _load(path: Path, kind: type[T]) -> T:
    try:
        record: T = _adapter(kind).validate_json(path.read_bytes())
        return record
    except (OSError, ValidationError) as error:
        raise StoreError(
            f"{path}: cannot be read as a study record ({_short(error)}). Restore the file."
        ) from error


def _short(error: OSError | ValidationError) -> str:
    """Return what is wrong, the first of several; nothing of the file's content."""
    if isinstance(error, OSError):
        return error.strerror or type(error).__name__
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    place = ".".join(map(str, first["loc"]))
    return f"{place}: {first['msg']}" if place else first["msg"]
