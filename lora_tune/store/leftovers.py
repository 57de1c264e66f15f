"""What writers that were killed left in a study's folder; ``files`` says how it is named.

``.NAME.XXXXXXXX`` is a file or folder that did not become NAME. ``.NAME.old.XXXXXXXX/NAME`` is an earlier
NAME while it was replaced: where NAME is missing, it is the only one, and is brought back.
"""

import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# Eight characters of tempfile's; a database's journal is named after the database.
_LEFT = re.compile(
    r"\.(?P<name>.+?)(?P<old>\.old)?\.[a-z0-9_]{8}(?:-journal|-wal|-shm)?", re.DOTALL
)
# What is written so in a study's folder; a hidden file of somebody else's may look like a leftover.
_OURS = re.compile(
    r"[a-z][a-z.-]*\.(?:json|toml|md|html|csv|db|svg|png)|adapter|plots|rung-\d+|state-\d+"
    r"|refit(?:\.state)?|.+-seed-\d+(?:\.state)?"
)
TRACKER_FOLDERS = ("wandb", "tensorboard", "mlruns")  # what trackers put there is theirs
_NOT_OURS = ("export", *TRACKER_FOLDERS)  # an export may be on its way now


@dataclass(frozen=True, slots=True, kw_only=True)
class Leftover:
    """Something that no reader needs, or the only copy of what was being replaced."""

    path: Path
    rescued: Path | None = None  # in it: an earlier file or folder whose place is empty

    def clear(self) -> str:
        """Remove it, what is worth rescuing first; return a sentence on what was, or nothing."""
        said = ""
        if self.rescued is not None:
            target = self.path.parent / self.rescued.name
            os.replace(self.rescued, target)
            said = (
                f"{target}: a run was killed while it replaced this; the earlier one is back again."
            )
        if self.path.is_dir() and not self.path.is_symlink():
            shutil.rmtree(self.path)
        else:
            self.path.unlink(missing_ok=True)
        return said


def leftovers_below(folder: Path) -> list[Leftover]:
    """Return what killed writers left in a folder and below it; links are not followed."""
    return list(_found(folder))


def _found(folder: Path) -> Iterator[Leftover]:
    for place, folders, files in os.walk(folder):
        if Path(place) == folder:
            folders[:] = [name for name in folders if name not in _NOT_OURS]
        for name in sorted((*folders, *files)):
            match = _LEFT.fullmatch(name)
            if match is None or _OURS.fullmatch(match["name"]) is None:
                continue
            path = Path(place) / name
            if name in folders:
                folders.remove(name)
            aside = path / match["name"]
            rescued = bool(match["old"]) and not path.is_symlink() and os.path.lexists(aside)
            if rescued and not os.path.lexists(path.parent / match["name"]):
                yield Leftover(path=path, rescued=aside)
            else:
                yield Leftover(path=path)
