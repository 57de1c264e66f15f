"""Whether a command may write where ``--output`` says; asked before anything is computed."""

import os
import tempfile
from pathlib import Path

from lora_tune.errors import MachineError, StudyFileError
from lora_tune.files import is_full


def check_writable(place: Path, *, option: str = "--output") -> None:
    """Refuse a file or folder that cannot be made, or a folder that cannot be written to.

    Nothing is left behind: a folder for temporary files is made in what is there of the path, and removed.

    Args:
        place: The folder that will be filled, or the file that will be written.
        option: What the message names as the way out.

    Raises:
        StudyFileError: Its place is below a file, is read-only, or cannot hold files.
        MachineError: The disk is full.
    """
    try:
        with tempfile.TemporaryDirectory(dir=_nearest(place.absolute()), prefix=".lora-tune."):
            pass
    except OSError as error:
        if is_full(error):
            raise MachineError(f"{place}: the disk is full. Make room and try again.") from error
        raise StudyFileError(
            f"{place}: cannot be written ({error.strerror}). Name another place with {option}."
        ) from error


def _nearest(place: Path) -> Path:
    """Return the folder of a file that exists, else the nearest part of a path that does."""
    for path in (place, *place.parents):
        try:
            os.lstat(path)
        except (FileNotFoundError, NotADirectoryError):
            continue
        return path
    return Path("/")
