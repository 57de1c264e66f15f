"""Files and folders that appear whole or not at all, and disks that are full.

A file is written to a temporary sibling, synced and renamed. A folder is filled under a temporary
name, gets a manifest with the SHA-256 of every file last, and takes its place in one step. Nothing that a
reader can see is ever half-written, whatever kills the writer.

What a killed writer leaves beside a target ``NAME``: ``.NAME.XXXXXXXX``, never needed, and, where the kernel
cannot exchange two folders, ``.NAME.old.XXXXXXXX/NAME``, which is the only one while ``NAME`` is missing.
"""

import ctypes
import errno
import hashlib
import json
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from lora_tune.errors import DiskFullError
from lora_tune.redaction import mask_tokens
from lora_tune.units import MIB, format_bytes

MANIFEST = "manifest.json"
# Left free when something large is written, for the small records that follow it.
RESERVE_BYTES = 64 * MIB

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
# Libraries that are not Python's own say it in words: Rust's, SQLite's, and tempfile's of a full /tmp.
_NO_ROOM_WORDS = re.compile(
    rf"\(os error (?:{errno.ENOSPC}|{errno.EDQUOT})\)|database or disk is full"
    r"|No usable temporary directory"
)
# SQLite's shared memory beside a WAL could not grow; its message is only "disk I/O error".
_NO_ROOM_SQLITE = ("SQLITE_FULL", "SQLITE_IOERR_SHMSIZE")

_LONGEST_NAME = 255  # bytes, of all file systems in use here
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_NO_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP)


def is_full(error: BaseException) -> bool:
    """Return whether there was no room: the disk is full, or a quota is used up.

    Causes are looked at as well: Optuna and SQLAlchemy wrap what SQLite said.
    """
    seen: BaseException | None = error
    while seen is not None:
        if _says_full(seen):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def _says_full(error: BaseException) -> bool:
    return (
        isinstance(error, DiskFullError)
        or (isinstance(error, OSError) and error.errno in _NO_ROOM)
        or getattr(error, "sqlite_errorname", None) in _NO_ROOM_SQLITE
        or _NO_ROOM_WORDS.search(str(error)) is not None
    )


@contextmanager
def naming_full_disk(place: Path) -> Iterator[None]:
    """Turn a full disk, in whatever words a library says it, into one message about ``place``.

    Raises:
        DiskFullError: There was no room.
    """
    try:
        yield
    except DiskFullError:
        raise
    except Exception as error:
        if not is_full(error):
            raise
        raise DiskFullError(
            f"{place}: cannot be written, {_what_is_full(error)} ({_free_text(place)}). {_WAY_OUT}"
        ) from error


def _what_is_full(error: BaseException) -> str:
    used_up = isinstance(error, OSError) and error.errno == errno.EDQUOT
    return "your disk quota is used up" if used_up else "the disk is full"


_WAY_OUT = "Nothing that was finished is lost: make room, then give the same command again."


def check_room(place: Path, needed_bytes: int, *, reserve_bytes: int = RESERVE_BYTES) -> None:
    """Refuse to write what would not fit, before it is begun.

    Args:
        place: What is going to be written; it and folders above it may not exist yet.
        needed_bytes: How much that is, at least.
        reserve_bytes: What must be left free for what is written after it.

    Raises:
        DiskFullError: There is less room.
    """
    free = free_bytes(place)
    if free < needed_bytes + reserve_bytes:
        size = f"{format_bytes(needed_bytes)} are to be written, and " if needed_bytes else ""
        raise DiskFullError(
            f"{place}: {size}{format_bytes(reserve_bytes)} are kept free for what follows, but only "
            f"{_free_text(place)}. {_WAY_OUT}"
        )


def free_bytes(place: Path) -> int:
    """Return what this user may still write where ``place`` is, or will be."""
    return shutil.disk_usage(_existing_folder(place)).free


def size_below(folder: Path) -> int:
    """Return the bytes of all files in a folder and in those below it; links are not followed."""
    sizes = (
        os.lstat(os.path.join(place, name)) for place, _, names in os.walk(folder) for name in names
    )
    return sum(found.st_size for found in sizes if stat.S_ISREG(found.st_mode))


def _free_text(place: Path) -> str:
    folder = _existing_folder(place)
    found = os.statvfs(folder)
    if found.f_files and not found.f_favail:
        return f"no further file can be made at {folder}: its file system has no inodes left"
    return f"{format_bytes(free_bytes(folder))} are free at {folder}"


def _existing_folder(place: Path) -> Path:
    """Return the place, or the nearest folder above it that is there."""
    absolute = place.absolute()
    return next(path for path in (absolute, *absolute.parents) if os.path.isdir(path))


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file atomically; an existing file is replaced, a link too and not what it leads to.

    Tokens of a known form and secret values of the environment are written as ``***``, whoever let them
    through. Lone surrogates, which a file name that is not UTF-8 becomes in Python, are written as escapes.

    Raises:
        DiskFullError: There was no room; an earlier file is as it was.
    """
    with naming_full_disk(path):
        _replace_file(path, mask_tokens(text).encode("utf-8", "backslashreplace"))


def _replace_file(path: Path, content: bytes) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=_hidden_prefix(path.name))
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


@contextmanager
def publish_folder(target: Path, *, expected_bytes: int | None = None) -> Iterator[Path]:
    """Yield an empty folder to fill; on leaving without an error it becomes ``target``.

    An existing ``target`` and the new folder change places in one step, and the old one is removed after
    that. Where the kernel or the file system cannot do this, the old one is moved aside first: then a reader
    finds for an instant none, and a writer killed in it leaves the old one in ``.NAME.old.XXXXXXXX``.

    Args:
        target: The folder; a link there is replaced, and not what it leads to.
        expected_bytes: About what will be written; None: not known.

    Raises:
        DiskFullError: There was no room, or would not be; an earlier folder is as it was.
    """
    if expected_bytes is not None:
        check_room(target, expected_bytes)
    with naming_full_disk(target):
        make_folder(target.parent)
        staging = Path(tempfile.mkdtemp(dir=target.parent, prefix=_hidden_prefix(target.name)))
    try:
        with naming_full_disk(target):  # what is free is read before the unfinished part is removed
            yield staging
            staging.chmod(0o777 & ~_umask())
            _write_manifest(staging)
            _put_in_place(staging, target)
    except BaseException:
        _remove(staging)
        raise


def _put_in_place(staging: Path, target: Path) -> None:
    """Let a synced folder take the place of ``target``, and remove what was there."""
    if not os.path.lexists(target):
        os.replace(staging, target)
        _sync_folder(target.parent)
        return
    if _exchange(staging, target):
        _sync_folder(target.parent)  # before the old one goes
        _remove(staging)
        return
    aside = Path(tempfile.mkdtemp(dir=target.parent, prefix=f"{_hidden_prefix(target.name)}old."))
    os.replace(target, aside / target.name)
    try:
        os.replace(staging, target)
    except BaseException:
        os.replace(aside / target.name, target)
        aside.rmdir()
        raise
    _sync_folder(target.parent)
    _remove(aside)


def _exchange(first: Path, second: Path) -> bool:
    """Let two paths change places in one step; False where that is not possible.

    Raises:
        OSError: It is, but it failed.
    """
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:  # no Linux, or a C library before glibc 2.28
        return False
    paths = os.fsencode(first), os.fsencode(second)
    if renameat2(_AT_FDCWD, paths[0], _AT_FDCWD, paths[1], _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in _NO_EXCHANGE:
        return False
    raise OSError(number, os.strerror(number), str(first), None, str(second))


def _remove(path: Path) -> None:
    """Remove a folder as far as that is possible, of a link the link: what is left over is hidden."""
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path, ignore_errors=True)


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, so that they are still there after a power cut."""
    if folder.is_dir():
        return
    make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    _sync_folder(folder.parent)


def is_complete(folder: Path) -> bool:
    """Return whether ``folder`` was published and its files still have the sizes and hashes noted."""
    digests = published_digests(folder)
    return digests is not None and all(
        _is_regular(folder / name) and sha256_of(folder / name) == digest
        for name, digest in digests.items()
    )


def published_digests(folder: Path) -> dict[str, str] | None:
    """Return the SHA-256 of every file published in ``folder``; None without a manifest that can be read.

    A manifest that names a file outside of the folder is none.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        digests = dict(manifest["sha256"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return digests if all(map(_is_inside, digests)) else None


def _is_inside(name: str) -> bool:
    """Return whether a name in a manifest is that of a file in the folder."""
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts and "\0" not in name


def _is_regular(path: Path) -> bool:
    """Return whether this is a file itself: no link to one, which may be anywhere, and no pipe."""
    try:
        return stat.S_ISREG(os.lstat(path).st_mode)
    except OSError:
        return False


def drop_from(folder: Path, name: str) -> None:
    """Remove a file from a published folder, which is complete before, meanwhile and after.

    Nothing happens where there is no such file, or no manifest that can be read.
    """
    digests = published_digests(folder)
    if digests is None or not os.path.lexists(folder / name):
        return
    if digests.pop(name, None) is not None:  # else a process was killed between the two
        _write_digests(folder, digests)
    (folder / name).unlink()


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file's bytes as hex digits."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def links_below(folder: Path) -> list[Path]:
    """Return the symbolic links in a folder and in the folders below it, none of them followed."""
    return sorted(
        Path(place) / name
        for place, folders, files in os.walk(folder)
        for name in (*folders, *files)
        if os.path.islink(os.path.join(place, name))
    )


def _hidden_prefix(name: str) -> str:
    """Return the beginning of a hidden sibling's name, short enough for what is added to it."""
    room = _LONGEST_NAME - len(b"..old.12345678")
    return f".{os.fsdecode(os.fsencode(name)[:room])}."


def _write_manifest(folder: Path) -> None:
    """Sync a folder's files, and note their digests in a manifest, which is there last."""
    digests = {}
    for path in sorted(folder.rglob("*")):
        if path.is_dir():
            _sync_folder(path)
            continue
        with path.open("rb") as stream:
            os.fsync(stream.fileno())
        digests[path.relative_to(folder).as_posix()] = sha256_of(path)
    _write_digests(folder, digests)


def _write_digests(folder: Path, digests: dict[str, str]) -> None:
    text = json.dumps({"sha256": digests}, indent=1) + "\n"
    _replace_file(folder / MANIFEST, mask_tokens(text).encode("utf-8", "backslashreplace"))


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
