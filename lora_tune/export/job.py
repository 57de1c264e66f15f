"""What an export is asked for and what it gives back; every target of ``lora-tune export`` has this form."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lora_tune.records import StudySnapshot


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportJob:
    """A finished study and where its export goes.

    A target writes into ``folder`` alone; the command publishes it under its final name in one step, so
    nothing half-written is left behind when a target raises.
    """

    snapshot: StudySnapshot
    folder: Path
    # Of the catalogue or a size, for which memory is estimated; None: the study's own.
    gpu: str | None
    note: Callable[[str], None]  # says a sentence while it works


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportResult:
    """What a target made."""

    files: tuple[Path, ...]
    # What to run with it, in the export's folder, so paths are relative to that; may have several lines.
    # The command prints a `cd` to the folder's final place before it.
    command: str
    notes: tuple[str, ...] = ()  # what was changed and why, what could not be carried, warnings
