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

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError
from pydantic_core import to_json

from lora_tune.errors import LoraTuneError, StoreError
from lora_tune.files import links_below, naming_full_disk, write_text
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
from lora_tune.stats.plausibility import implausible_in
from lora_tune.store.leftovers import TRACKER_FOLDERS, leftovers_below
from lora_tune.store.owner import OWNER_FILE, held

STUDY_FILE = "study.toml"
LOCK_FILE = "study.lock.json"
DATABASE = "study.db"
TRIAL_FILE = "trial.json"
CONFIRMATION_FILE = "confirmation.json"
RUNS_FOLDER = "confirmation"
LOG_FOLDER = "log"  # of workers that died
RUNTIME_FILE = "runtime.json"
MEMORY_FILE = "memory.json"
BEHAVIOUR_FILE = "behaviour.json"
ADAPTER_FOLDER = "adapter"
WEIGHTS_FILE = "adapter_model.safetensors"  # peft's name, which cannot be imported here
# Of the whole folder, in study.lock.json. Raised when an older lora-tune would misread what a newer wrote.
FORMAT = 1

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Runtime:
    wall_s: float


class StudyFolder:
    """Reads and writes one study's folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._closing = ExitStack()

    @contextmanager
    def owned(self) -> Iterator[None]:
        """Hold the study for this process, or say who does.

        Raises:
            DiskFullError: There is no room to say who holds it.
            StoreError: Another process runs this study, the folder cannot be written, or a link in it
                leads out of it.
        """
        with ExitStack() as stack:
            try:
                with naming_full_disk(self.path / OWNER_FILE):
                    stack.enter_context(held(self.path))
            except LoraTuneError:
                raise
            except OSError as error:
                raise StoreError(f"{self.path}: cannot be written ({error.strerror})") from error
            stack.callback(self._remove_if_unused)
            stack.callback(self._release)
            self.check_links()
            yield

    def on_release(self, close: Callable[[], None]) -> None:
        """Have something closed when this process gives the study back."""
        self._closing.callback(close)

    def _release(self) -> None:
        self._closing.close()

    def check_links(self) -> None:
        """Refuse a folder through whose links something would be written elsewhere."""
        for link in self.links_out():
            raise StoreError(
                f"{link}: is a link that leads out of the study's folder, and nothing is written through "
                "such links. Put the files themselves there, or delete the link."
            )

    def links_out(self) -> list[Path]:
        """Return the symbolic links of the folder that lead out of it, those of trackers left out."""
        inside = self.path.resolve()
        return [
            link
            for link in links_below(self.path)
            if link.relative_to(self.path).parts[0] not in TRACKER_FOLDERS
            and not link.resolve().is_relative_to(inside)
        ]

    def tidy(self) -> tuple[str, ...]:
        """Remove what killed writers left, and bring back what one had put aside; for the owner alone.

        Returns:
            Sentences on what was brought back.
        """
        return tuple(filter(None, [left.clear() for left in leftovers_below(self.path)]))

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
        write_text(self.path / LOCK_FILE, _dump(lock, format=FORMAT))

    def load_lock(self) -> StudyLock | None:
        """Return what the first start resolved, None before it did.

        Raises:
            StoreError: The file is damaged, or of a newer version.
        """
        path = self.path / LOCK_FILE
        if not path.exists():
            return None
        _check_format(path)
        return _load(path, StudyLock)

    def save_trial(self, record: TrialRecord) -> None:
        """Make a trial's record durable."""
        folder = self.trial_folder(record.number)
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / TRIAL_FILE, _dump(record))

    def load_trial(self, number: int) -> TrialRecord:
        """Return one trial's record."""
        return _load(self.trial_folder(number) / TRIAL_FILE, TrialRecord)

    def load_trials(self) -> list[TrialRecord]:
        """Return all trial records, by number."""
        paths = (self.path / "trials").glob(f"*/{TRIAL_FILE}")
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


def _dump(value: object, **first: int) -> str:
    """Return a record as JSON; texts in it that look like credentials are replaced by ``***``.

    A number that is not finite (a gradient that overflowed in float16) is written as text: JSON has none,
    and null would not be read back as a number.

    Args:
        value: The record.
        first: Keys that come before the record's own.
    """
    text = to_json(value, indent=1, inf_nan_mode="strings").decode()
    plain = json.loads(text)
    redacted = redact_values({**first, **plain})
    if redacted != plain:
        text = json.dumps(redacted, indent=1, ensure_ascii=False)
    return text + "\n"


def _check_format(path: Path) -> None:
    """Refuse a folder that a newer version wrote, before anything of it is misread."""
    try:
        found = json.loads(path.read_bytes()).get("format", FORMAT)
    except (OSError, ValueError, AttributeError, RecursionError):
        return  # damaged: the one who reads it says so
    if isinstance(found, int) and found > FORMAT:
        raise StoreError(
            f"{path}: written by a newer lora-tune (format {found}; this one knows format {FORMAT}). "
            "Upgrade lora-tune to go on with this study or to read it."
        )


def _load(path: Path, kind: type[T]) -> T:
    try:
        record: T = _adapter(kind).validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise StoreError(
            f"{path}: cannot be read as a study record ({_short(error)}). {_way_out(path)}"
        ) from error
    problem = implausible_in(record) if isinstance(record, TrialRecord | Confirmation) else ""
    if problem:
        raise StoreError(f"{path}: holds what cannot be a result ({problem}). {_way_out(path)}")
    return record


def _way_out(path: Path) -> str:
    if path.name != TRIAL_FILE:
        return "Restore the file."
    study = path.parents[2]
    return f"Restore the file, or make it again: lora-tune doctor {study} --rebuild"


def _short(error: OSError | ValidationError) -> str:
    """Return what is wrong, the first of several; nothing of the file's content."""
    if isinstance(error, OSError):
        return error.strerror or type(error).__name__
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    place = ".".join(map(str, first["loc"]))
    return f"{place}: {first['msg']}" if place else first["msg"]
