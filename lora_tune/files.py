"""Files and folders that appear whole or not at all.

A file is written to a temporary sibling, synced and renamed. A folder is filled under a temporary
name, gets a manifest with the SHA-256 of every file last, and is renamed. Nothing that a
reader can see is ever half-written, whatever kills the writer.
"""

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lora_tune.redaction import mask_tokens

MANIFEST = "manifest.json"
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


def is_full(error: OSError) -> bool:
    """Return whether there was no room: the disk is full, or a quota is used up."""
    return error.errno in _NO_ROOM


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file atomically; an existing file is replaced.

    Tokens of a known form and secret values of the environment are written as ``***``, whoever let them
    through. Lone surrogates, which a file name that is not UTF-8 becomes in Python, are written as escapes.
    """
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(mask_tokens(text).encode("utf-8", "backslashreplace"))
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


@contextmanager
def publish_folder(target: Path) -> Iterator[Path]:
    """Yield an empty folder to fill; on leaving without an error it becomes ``target``.

    An existing ``target`` is moved aside first and removed after the rename, so that a reader finds
    the old folder, the new one, or for an instant none, but never a mixture.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    try:
        yield staging
        staging.chmod(0o777 & ~_umask())
        _write_manifest(staging)
        if target.exists():
            aside = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.old."))
            os.replace(target, aside / target.name)
            os.replace(staging, target)
            shutil.rmtree(aside)
        else:
            os.replace(staging, target)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    _sync_folder(target.parent)


def is_complete(folder: Path) -> bool:
    """Return whether ``folder`` was published and its files still have the sizes and hashes noted."""
    digests = published_digests(folder)
    return digests is not None and all(
        (folder / name).is_file() and sha256_of(folder / name) == digest
        for name, digest in digests.items()
    )


def published_digests(folder: Path) -> dict[str, str] | None:
    """Return the SHA-256 of every file published in ``folder``; None without a manifest that can be read."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return dict(manifest["sha256"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file's bytes as hex digits."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _write_manifest(folder: Path) -> None:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    digests = {}
    for path in files:
        with path.open("rb") as stream:
            os.fsync(stream.fileno())
        digests[path.relative_to(folder).as_posix()] = sha256_of(path)
    write_text(folder / MANIFEST, json.dumps({"sha256": digests}, indent=1) + "\n")


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
