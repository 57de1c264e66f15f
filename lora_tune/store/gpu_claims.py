"""Which GPUs the studies of this user train on: a lock for each, so that no two share a card unknown.

Sharing is not forbidden, small studies may well fit beside each other; but it is said. A lock lasts as long
as the process that took it.
"""

import os
import tempfile
from contextlib import ExitStack
from pathlib import Path

from lora_tune.errors import StoreError
from lora_tune.store.owner import Owner, find_owner, held

_claims = ExitStack()  # held until the process ends


def claim_gpu(uuid: str, *, folder: Path | None = None) -> Owner | None:
    """Take the lock of a GPU for the rest of this process, unless another one has it.

    Args:
        uuid: The GPU's own, whatever number it is shown under.
        folder: Of the locks; by default one of this user, in the folder for temporary files.

    Returns:
        Who else trains on it; None if nobody does, or where no lock is to be had.
    """
    try:
        place = (folder or _own_folder()) / uuid
        _claims.enter_context(held(place))
    except StoreError:
        other = find_owner(place)
        return None if other is None or other.pid == os.getpid() else other
    except OSError:
        return None
    return None


def _own_folder() -> Path:
    """Return this user's folder of locks.

    Raises:
        OSError: It cannot be made, or somebody else has made it.
    """
    folder = Path(tempfile.gettempdir()) / f"lora-tune-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if found.st_uid != os.getuid() or folder.is_symlink():
        raise PermissionError(f"{folder} is not this user's")
    return folder / "gpus"
