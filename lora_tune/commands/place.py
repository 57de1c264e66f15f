"""Whether a command may write where ``--output`` or a study file says; asked before anything is computed."""

import os
import tempfile
from pathlib import Path

from lora_tune.errors import StudyFileError
from lora_tune.files import check_room, naming_full_disk
from lora_tune.store.folder import DATABASE, StudyFolder
from lora_tune.study.spec import StudySpec

_LONGEST_DATABASE = 512  # bytes; MAX_PATHNAME of SQLite's os_unix.c


def check_writable(place: Path, *, option: str = "--output") -> None:
    """Refuse a file or folder that cannot be made, or a folder that cannot be written to.

    Nothing is left behind: a folder for temporary files is made in what is there of the path, and removed.

    Args:
        place: The folder that will be filled, or the file that will be written.
        option: What the message names as the way out.

    Raises:
        StudyFileError: Its place is below a file, is read-only, or cannot hold files.
        DiskFullError: The disk is full.
    """
    try:
        with (
            naming_full_disk(place),
            tempfile.TemporaryDirectory(dir=_nearest(place.absolute()), prefix=".lora-tune."),
        ):
            pass
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise StudyFileError(
            f"{_shown(place)}: cannot be written ({reason}). Name another place with {option}."
        ) from error


def check_study_place(spec: StudySpec) -> None:
    """Refuse a study whose folder cannot be written, leads elsewhere, or is on a disk that is nearly full.

    Raises:
        StudyFileError: The folder cannot be written.
        StoreError: A link in it leads out of it.
        DiskFullError: Not even records and reports would fit.
    """
    folder = Path(spec.study.output) / spec.study.name
    check_writable(folder, option="study.output")
    if spec.run.storage is None:
        _check_length(folder / DATABASE)
    StudyFolder(folder).check_links()
    check_room(folder, 0)


def _check_length(database: Path) -> None:
    """Refuse a path that SQLite cannot open; what it says itself is that the file cannot be opened."""
    length = len(os.fsencode(os.path.realpath(database))) + len("-journal")
    if length > _LONGEST_DATABASE:
        raise StudyFileError(
            f"{_shown(database)}: SQLite opens paths of {_LONGEST_DATABASE} bytes at most, its journal's has "
            f"{length}. Name a shorter folder with study.output."
        )


def _shown(path: Path | str) -> str:
    """Return a path on one line."""
    return str(path).encode("unicode_escape").decode() if not str(path).isprintable() else str(path)


def _nearest(place: Path) -> Path:
    """Return the folder of a file that exists, else the nearest part of a path that does."""
    for path in (place, *place.parents):
        try:
            os.lstat(path)
        except (FileNotFoundError, NotADirectoryError):
            continue
        return path
    return Path("/")
