"""The Optuna study of a study folder: an ordinary one, readable by optuna-dashboard.

SQLite in the folder, or a PostgreSQL server by ``run.storage`` (see ``postgres``). SQLite writes ahead only
on a disk of this machine: on a network file system it keeps the rollback journal, since its log needs memory
that all who open the file share. There is one writer, so neither is slow.

A database that lost something is refused, never begun anew: the records in ``trials/`` know all that was
in it, and ``lora-tune doctor --rebuild`` makes it again from them.
"""

import os
import shutil
import sqlite3
import stat
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import optuna
import sqlalchemy
from sqlalchemy import event

from lora_tune.errors import StoreError
from lora_tune.files import is_full
from lora_tune.records import StudyLock, TrialRecord
from lora_tune.store.folder import DATABASE, TRIAL_FILE, StudyFolder
from lora_tune.store.mounts import Mount, mount_of

Differences = Callable[[Sequence[TrialRecord], Sequence[optuna.trial.FrozenTrial]], list[str]]

BESIDE = ("", "-wal", "-shm", "-journal")  # the files of a SQLite database
_MAGIC = b"SQLite format 3\0"
_FAST = ("journal_mode=MEMORY", "synchronous=OFF")  # for a file that is not yet anyone's
BUSY_S = 60.0  # how long SQLite waits for another program's lock
# What Optuna and SQLAlchemy raise when they read values that make no sense.
UNREADABLE = (
    sqlalchemy.exc.SQLAlchemyError,
    optuna.exceptions.OptunaError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)


def open_study(
    store: StudyFolder,
    lock: StudyLock,
    records: Sequence[TrialRecord],
    *,
    storage: str | None,
    differences: Differences,
    note: Callable[[str], None],
) -> optuna.Study:
    """Open or create the Optuna study of a folder that this process owns; it is closed with that.

    Args:
        store: The study's folder.
        lock: Of the study.
        records: Of all its trials.
        storage: ``run.storage``: the address of a PostgreSQL database; None: ``study.db``.
        differences: Returns what is otherwise in the database than in the records.
        note: Is told, once each time, when the connection to a server is lost.

    Raises:
        StoreError: The database is damaged, lost trials, or belongs to another study or process; or the
            folder lost the record of a trial.
        MachineError: The driver is not installed.
        DatabaseAwayError: Later, from the study: the server was away for too long.
    """
    check_numbers(store, records)
    num_records, place = len(records), store.path / DATABASE
    if storage is None:
        study = open_optuna_study(place, name=lock.name, num_records=num_records)
    else:
        from lora_tune.store.postgres import open_postgres_study

        study = open_postgres_study(
            storage,
            name=lock.name,
            created=lock.created,
            folder=store.path,
            num_records=num_records,
            note=note,
        )
        place = Path("run.storage")
    store.on_release(lambda: close_study(study))
    _check_fits(place, store, records, study.get_trials(deepcopy=False), differences)
    return study


def check_database(
    store: StudyFolder, *, name: str, storage: str | None, differences: Differences | None
) -> None:
    """Refuse at once what ``open_study`` would refuse when the base has been loaded.

    Args:
        store: The study's folder, owned by this process.
        name: Of the study.
        storage: ``run.storage``.
        differences: As for ``open_study``; None: the study begins.

    Raises:
        StoreError: As for ``open_study``.
        MachineError: The driver is not installed.
    """
    records = store.load_trials()
    check_numbers(store, records)
    if storage is not None:
        from lora_tune.store.postgres import check_server

        check_server(storage, name=name)
    elif records:
        path = store.path / DATABASE
        _check_fits(path, store, records, read_trials(path, name=name), differences)


def _check_fits(
    place: Path,
    store: StudyFolder,
    records: Sequence[TrialRecord],
    trials: Sequence[optuna.trial.FrozenTrial],
    differences: Differences | None,
) -> None:
    if found := differences(records, trials) if differences is not None else []:
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        raise _damaged(place, f"does not fit the records: {found[0]}{more}", folder=store.path)


def check_numbers(store: StudyFolder, records: Sequence[TrialRecord]) -> None:
    """Refuse a folder in which the record of a trial is missing, though later ones are there."""
    for number, record in enumerate(records):
        if record.number != number:
            raise StoreError(
                f"{store.trial_folder(number) / TRIAL_FILE}: is missing, and later trials are there. Bring "
                f"the file back, or make it again: lora-tune doctor {store.path} --rebuild"
            )


def close_study(study: optuna.Study) -> None:
    """Close the connections of a study; the last one puts SQLite's log back into its file."""
    study._storage._backend.engine.dispose()


def open_optuna_study(
    path: Path, *, name: str, num_records: int, mount: Mount | None = None, busy_s: float = BUSY_S
) -> optuna.Study:
    """Open or create the database at ``path``.

    Args:
        path: study.db.
        name: Name of the Optuna study.
        num_records: Trials that the study folder has records of; with an empty or missing database
            these would be forgotten, so that is refused.
        mount: What the file is on; found if not given.
        busy_s: How long another program's lock is waited for.

    Raises:
        StoreError: The file is no SQLite database, is damaged, or lost trials that the folder has.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    damage = damage_of(path)
    if damage is not None and (num_records or os.path.lexists(path)):
        empty_and_new = not num_records and damage == EMPTY
        if not empty_and_new:
            raise _damaged(path, damage)
    try:
        mode = "DELETE" if (mount or mount_of(path.parent)).is_network else "WAL"
        study = _open(path, name, (f"journal_mode={mode}", "synchronous=FULL"), busy_s)
        num_trials = len(study.get_trials(deepcopy=False))
    except UNREADABLE as error:
        if is_full(error):
            raise
        raise _damaged(path, _reason(error)) from error
    if num_trials < num_records:
        close_study(study)
        raise _damaged(path, f"holds {num_trials} of the {num_records} trials on record")
    return study


EMPTY = "is empty"


def damage_of(path: Path) -> str | None:
    """Return what is wrong with a SQLite file, as the rest of a sentence; None: nothing that SQLite sees.

    The file is only read, and so is the log beside it. SQLite keeps no checksums: a wrong value
    in a sound structure is found by comparing it with the records.
    """
    try:
        found = os.lstat(path)
        if not stat.S_ISREG(found.st_mode):
            return "is no regular file"
        if not found.st_size:
            return EMPTY
        with path.open("rb") as stream:
            if stream.read(len(_MAGIC)) != _MAGIC:
                return "is no SQLite database"
        return _damaged_structure(path)
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        if is_full(error):  # where it is copied to
            raise
        return f"cannot be read ({error.strerror})"


def _damaged_structure(path: Path) -> str | None:
    with tempfile.TemporaryDirectory() as folder:
        copy = copy_database(path, Path(folder))
        connection = sqlite3.connect(copy)
        try:
            [first, *_] = connection.execute("PRAGMA integrity_check(1)").fetchone()
        except (sqlite3.Error, UnicodeDecodeError) as error:
            return f"is damaged ({error})"
        finally:
            connection.close()
    return None if first == "ok" else f"is damaged ({' '.join(str(first).split())})"


def copy_database(path: Path, folder: Path) -> Path:
    """Copy a database with its log, which may not be opened without being changed; return the copy."""
    for suffix in ("", "-wal", "-journal"):
        beside = path.with_name(path.name + suffix)
        if beside.is_file() and not beside.is_symlink():
            shutil.copyfile(beside, folder / beside.name)
    return folder / path.name


def read_trials(path: Path, *, name: str) -> list[optuna.trial.FrozenTrial]:
    """Return the trials of a database without changing it.

    Raises:
        StoreError: It cannot be read, or has no study of this name.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    damage = damage_of(path)
    if damage is not None:
        raise _damaged(path, damage)
    with tempfile.TemporaryDirectory() as folder:
        storage = None
        try:
            storage = optuna.storages.RDBStorage(
                f"sqlite:///{copy_database(path, Path(folder))}",
                skip_table_creation=True,
                skip_compatibility_check=True,
            )
            return list(optuna.load_study(study_name=name, storage=storage).get_trials())
        except UNREADABLE as error:
            raise _damaged(path, _reason(error)) from error
        finally:
            if storage is not None:
                storage.engine.dispose()


def new_database(path: Path, *, name: str, fill: Callable[[optuna.Study], None]) -> Path | None:
    """Make a database anew and put the old one, if there is any, aside.

    Args:
        path: study.db.
        name: Name of the Optuna study.
        fill: Tells the new study what it has to know, before it takes the old one's place.

    Returns:
        Where the old database is now: ``study.db.damaged-1``; None: there was none.
    """
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        made = Path(folder) / path.name
        study = _open(made, name, _FAST)
        try:
            fill(study)
        finally:
            close_study(study)
        with made.open("rb") as stream:
            os.fsync(stream.fileno())
        aside = _put_aside(path)
        os.replace(made, path)
    return aside


def _put_aside(path: Path) -> Path | None:
    """Rename what there is of a database; return its new name."""
    number = 1
    while os.path.lexists(aside := path.with_name(f"{path.name}.damaged-{number}")):
        number += 1
    there = [suffix for suffix in BESIDE if os.path.lexists(f"{path}{suffix}")]
    for suffix in reversed(there):  # the log first: it must not meet another database
        os.replace(f"{path}{suffix}", f"{aside}{suffix}")
    return aside if "" in there else None


def _open(path: Path, name: str, pragmas: Sequence[str], busy_s: float = BUSY_S) -> optuna.Study:
    storage = optuna.storages.RDBStorage(
        f"sqlite:///{path}", engine_kwargs={"connect_args": {"timeout": busy_s}}
    )
    event.listen(storage.engine, "connect", lambda connection, _: _set(connection, pragmas))
    storage.engine.dispose()  # connections made before the listener have no such settings
    return optuna.create_study(
        storage=storage, study_name=name, direction="minimize", load_if_exists=True
    )


def _set(connection: sqlite3.Connection, pragmas: Sequence[str]) -> None:
    cursor = connection.cursor()
    for pragma in pragmas:
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _damaged(path: Path, what: str, *, folder: Path | None = None) -> StoreError:
    folder = folder or path.parent
    return StoreError(
        f"{path}: {what}. The finished trials are safe in {folder / 'trials'}. "
        f"Make the database again from them: lora-tune doctor {folder} --rebuild"
    )


def _reason(error: BaseException) -> str:
    """Return in the words of the rest of a sentence why a database could not be opened or read."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, sqlite3.OperationalError) and "locked" in str(seen):
            return "is locked by another program, which may only read it (optuna-dashboard does)"
        if isinstance(seen, sqlite3.Error):
            return f"is not usable ({seen})"
        seen = seen.__cause__ or seen.__context__
    return f"is not usable ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
