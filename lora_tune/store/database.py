"""The Optuna study of a study folder: SQLite in WAL mode, readable by optuna-dashboard."""

from pathlib import Path

import optuna
import sqlalchemy
from sqlalchemy import event

from lora_tune.errors import StoreError


def open_optuna_study(path: Path, *, name: str, num_records: int) -> optuna.Study:
    """Open or create the database at ``path``.

    Args:
        path: study.db.
        name: Name of the Optuna study.
        num_records: Trials that the study folder has records of; with an empty or missing database
            these would be forgotten, so that is refused.

    Raises:
        StoreError: The file is no SQLite database, or it lost trials that the folder has.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    url = f"sqlite:///{path}"
    try:
        storage = optuna.storages.RDBStorage(url, engine_kwargs={"connect_args": {"timeout": 60}})
        event.listen(storage.engine, "connect", _use_wal)
        storage.engine.dispose()  # connections made before the listener are not in WAL mode
        study = optuna.create_study(
            storage=storage, study_name=name, direction="minimize", load_if_exists=True
        )
        num_trials = len(study.get_trials(deepcopy=False))
    except (sqlalchemy.exc.DatabaseError, optuna.exceptions.StorageInternalError) as error:
        cause = error if isinstance(error, sqlalchemy.exc.DatabaseError) else error.__cause__
        raise StoreError(
            f"{path}: is not a usable SQLite database ({getattr(cause, 'orig', cause)}). The finished "
            f"trials are safe in {path.parent / 'trials'}; move the study folder aside to start anew."
        ) from error
    if num_trials < num_records:
        raise StoreError(
            f"{path}: holds {num_trials} trials, but {path.parent / 'trials'} has records of "
            f"{num_records}. Put the database back, or move the study folder aside to start anew."
        )
    return study


def _use_wal(connection: object, record: object) -> None:
    cursor = connection.cursor()  # type: ignore[attr-defined]
    cursor.execute("PRAGMA journal_mode=WAL")
    cursor.execute("PRAGMA synchronous=FULL")
    cursor.close()
