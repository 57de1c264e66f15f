"""The Optuna study on a PostgreSQL server: one owner, and outages that are waited for.

The server's advisory lock on the study's name is held by the very connection that writes, and every new
connection takes it before anything else: nothing can be written without it, also after a reconnection.

Every call of Optuna's is one transaction. When the connection is lost in one, the call is made again until
it succeeds. If the answer to a commit was lost, what was written is found by the second attempt: there
is only one writer, so a trial more than before is ours, and a state that was to be set is set.
"""

import hashlib
import json
import logging
import time
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

import optuna
import sqlalchemy
from optuna.storages import RDBStorage
from optuna.storages._rdb import models

from lora_tune import signals
from lora_tune.errors import DatabaseAwayError, MachineError, StoreError
from lora_tune.redaction import redact
from lora_tune.store.database import UNREADABLE, close_study
from lora_tune.store.owner import Owner
from lora_tune.units import format_duration

LONGEST_OUTAGE_S = 600.0
_URL = (
    "postgresql+psycopg://"  # of no server: connections are made here, and Optuna knows no password
)
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 5.0
_LOOK_S = 0.5  # how soon a pause sees that the study is to stop
_CREATED = "created"  # user attribute of the study: says which study folder it belongs to
_SCHEMA_LOCK = 7_106_017  # held while tables are made: studies of one database may begin at once
_LONGEST_LABEL = 63  # bytes of an application's name that PostgreSQL keeps
# Seconds: how soon each side notices that the other has gone without a word.
_CONNECT_TIMEOUT_S = 10
_KEEPALIVE = {"keepalives_idle": 10, "keepalives_interval": 5, "keepalives_count": 3}
_UNANSWERED_MS = 30_000  # as long, when what was sent is not even acknowledged
_MOST_BLOCKED_S = 4.0  # how long a statement may hold up a signal

T = TypeVar("T")


class _LockTakenError(StoreError):
    """Another process holds the study's lock."""

    def __init__(self, message: str, *, own: bool) -> None:
        super().__init__(message)
        self.own = own  # it is this process: a connection that the server has not yet given up


def check_driver() -> None:
    """Say how to install the driver, if it is not there.

    Raises:
        MachineError: psycopg is missing.
    """
    try:
        import psycopg  # noqa: F401
    except ImportError as error:
        raise MachineError(
            f"run.storage: psycopg, which talks to PostgreSQL, cannot be imported ({error}). "
            "Install it: pip install 'lora-tune[postgres]'"
        ) from error


def open_postgres_study(
    url: str,
    *,
    name: str,
    created: str,
    folder: Path,
    num_records: int,
    note: Callable[[str], None],
    longest_outage_s: float = LONGEST_OUTAGE_S,
) -> optuna.Study:
    """Open or create a study on a server, and hold its lock until it is closed.

    Args:
        url: ``postgresql://user@host/database``.
        name: Name of the Optuna study.
        created: When the study folder was begun: another folder's study of the same name has another.
        folder: The study's folder, for messages.
        num_records: Trials that the study folder has records of.
        note: Is told when the connection is lost, and when it is back.
        longest_outage_s: How long the study waits for a server that is away.

    Raises:
        StoreError: The server cannot be reached or used, or the study belongs to another process or
            folder, or it lost trials that the folder has.
        MachineError: The driver is not installed.
    """
    check_driver()
    # An outage is told of by its note alone.
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    logging.getLogger("sqlalchemy.pool").setLevel(logging.CRITICAL)
    server = Server(url, name)
    try:
        _make_tables(server)
        storage = PostgresStorage(server, Patience(server.place, note, longest_s=longest_outage_s))
        study = optuna.create_study(
            storage=storage, study_name=name, direction="minimize", load_if_exists=True
        )
    except StoreError:
        raise
    except (*UNREADABLE, _driver_error()) as error:
        raise _unusable(server.place, error) from error
    try:
        _check_belonging(study, server.place, name, created, folder, num_records)
    except BaseException:
        close_study(study)
        raise
    return study


def check_server(url: str, *, name: str) -> None:
    """Say at once if the server cannot be reached, or another process runs the study.

    Raises:
        StoreError: It cannot, or one does.
        MachineError: The driver is not installed.
    """
    check_driver()
    server = Server(url, name)
    try:
        server.connect().close()
    except _driver_error() as error:
        raise _unusable(server.place, error) from error


def _make_tables(server: "Server") -> None:
    """Make Optuna's tables where there are none; those of another version of Optuna are refused.

    Optuna does this with two connections at a time, and the study has only one.
    """
    with server.connect_to_read() as connection:
        with signals.at_once():
            connection.execute("SELECT pg_advisory_lock(%s)", (_SCHEMA_LOCK,))
        RDBStorage(_URL, engine_kwargs={"creator": server.connect_to_read}).engine.dispose()


def _check_belonging(
    study: optuna.Study, place: str, name: str, created: str, folder: Path, num_records: int
) -> None:
    """Refuse another folder's study, and one that lost trials."""
    num_trials = len(study.get_trials(deepcopy=False))
    if _CREATED not in study.user_attrs and not num_trials:
        study.set_user_attr(_CREATED, created)
    if study.user_attrs.get(_CREATED) != created:
        raise _of_another_folder(place, name)
    if num_trials < num_records:
        raise StoreError(
            f'run.storage: the study "{name}" in {place} holds {num_trials} of the {num_records} trials '
            f"on record in {folder / 'trials'}. Make it again from them: "
            f"lora-tune doctor {folder} --rebuild"
        )


def _of_another_folder(place: str, name: str) -> StoreError:
    return StoreError(
        f'run.storage: {place} has a study "{name}" that another study folder began. Give this study '
        "another name (study.name), or another database."
    )


def read_postgres_trials(
    url: str, *, name: str, created: str | None = None
) -> list[optuna.trial.FrozenTrial]:
    """Return a study's trials, without its lock; ``created``: those of the folder begun then alone.

    Raises:
        StoreError: The server cannot be reached, or has no such study, or only that of another folder.
        MachineError: The driver is not installed.
    """
    check_driver()
    server = Server(url, name)
    try:
        storage = RDBStorage(
            _URL,
            engine_kwargs={"creator": server.connect_to_read, "pool_size": 1},
            skip_table_creation=True,
            skip_compatibility_check=True,
        )
        try:
            if name not in optuna.get_all_study_names(storage):
                raise StoreError(f'run.storage: the {server.place} has no study "{name}".')
            study = optuna.load_study(study_name=name, storage=storage)
            if created is not None and study.user_attrs.get(_CREATED, created) != created:
                raise _of_another_folder(server.place, name)
            return list(study.get_trials())
        finally:
            storage.engine.dispose()
    except UNREADABLE as error:
        raise _unusable(server.place, error) from error


def new_postgres_study(
    url: str,
    *,
    name: str,
    created: str,
    folder: Path,
    fill: Callable[[optuna.Study], None],
) -> str | None:
    """Make a study anew; one that is there gets the name ``NAME (damaged 1)``, and that is returned.

    Raises:
        StoreError: The server cannot be reached, or another process runs the study.
        MachineError: The driver is not installed.
    """
    check_driver()
    server = Server(url, name)
    making = f"{name} (being made)"
    try:
        with server.connect() as connection:
            _make_tables(server)
            _check_is_ours(connection, server.place, name, created)
            _delete(server, making)  # of an attempt that was killed
            study = open_postgres_study(
                url, name=making, created=created, folder=folder, num_records=0, note=_say_nothing
            )
            try:
                fill(study)
            finally:
                close_study(study)
            return _exchange(connection, name, making)
    except StoreError:
        raise
    except (*UNREADABLE, _driver_error()) as error:
        raise _unusable(server.place, error) from error


def _check_is_ours(connection: Any, place: str, name: str, created: str) -> None:
    """Refuse to put aside a study of this name that another study folder began."""
    row = connection.execute(
        "SELECT a.value_json FROM study_user_attributes a JOIN studies s USING (study_id) "
        "WHERE s.study_name = %s AND a.key = %s",
        (name, _CREATED),
    ).fetchone()
    connection.commit()
    if row is not None and json.loads(row[0]) != created:
        raise _of_another_folder(place, name)


def _delete(server: "Server", name: str) -> None:
    storage = RDBStorage(_URL, engine_kwargs={"creator": server.connect_to_read})
    if name in optuna.get_all_study_names(storage):
        optuna.delete_study(study_name=name, storage=storage)
    storage.engine.dispose()


def _exchange(connection: Any, name: str, made: str) -> str | None:
    """Give a study's name to the one that was made, in one transaction; return the old one's new name."""
    names = {row[0] for row in connection.execute("SELECT study_name FROM studies")}
    aside, number = f"{name} (damaged 1)", 1
    while aside in names:
        number += 1
        aside = f"{name} (damaged {number})"
    rename = "UPDATE studies SET study_name = %s WHERE study_name = %s"
    connection.execute(rename, (aside, name))
    connection.execute(rename, (name, made))
    connection.commit()
    return aside if name in names else None


def _say_nothing(text: str) -> None:
    """Keep an outage to oneself: who rebuilds a study sees the end of it."""


class Server:
    """A database on a server, and the lock of one study in it."""

    def __init__(self, url: str, name: str) -> None:
        parts = sqlalchemy.engine.make_url(url).set(drivername="postgresql")
        self._url = parts.render_as_string(hide_password=False)
        host = parts.host or parts.query.get("host") or "this machine"
        self.place = f'PostgreSQL database "{parts.database}" on {host}'
        self.name = name
        owner = Owner.this_process()
        self.label = f"lora-tune pid {owner.pid} on {owner.host[:30]}, {owner.started[:19]}"[
            :_LONGEST_LABEL
        ]
        digest = hashlib.sha256(f"lora-tune {name}".encode()).digest()
        self._key = int.from_bytes(digest[:8], "big", signed=True)

    def connect_to_read(self) -> Any:
        """Return a new connection of the driver's; a signal does not wait for a server that is silent."""
        import psycopg

        with signals.at_once():
            return psycopg.connect(
                self._url,
                connect_timeout=_CONNECT_TIMEOUT_S,
                application_name=self.label,
                tcp_user_timeout=_UNANSWERED_MS,
                **_KEEPALIVE,  # type: ignore[arg-type]
            )

    def connect(self) -> Any:
        """Return a new connection that holds the study's lock.

        Raises:
            StoreError: Another connection holds it.
        """
        connection = self.connect_to_read()
        try:
            with signals.at_latest(_MOST_BLOCKED_S):
                self._take_lock(connection)
        except BaseException:
            connection.close()
            raise
        return connection

    def _take_lock(self, connection: Any) -> None:
        for key, value in _KEEPALIVE.items():
            connection.execute(f"SET tcp_{key} = {value}")
        taken = connection.execute("SELECT pg_try_advisory_lock(%s)", (self._key,)).fetchone()
        if not taken[0]:
            raise self._taken(connection)
        connection.commit()

    def _taken(self, connection: Any) -> _LockTakenError:
        """Return the error that says who holds the lock."""
        key = self._key % 2**64
        row = connection.execute(
            "SELECT a.application_name FROM pg_locks l JOIN pg_stat_activity a USING (pid) "
            "WHERE l.locktype = 'advisory' AND l.granted AND l.objsubid = 1 AND l.classid = %s "
            "AND l.objid = %s AND l.database = "
            "(SELECT oid FROM pg_database WHERE datname = current_database())",
            (key >> 32, key % 2**32),
        ).fetchone()
        holder = row[0] if row else ""
        return _LockTakenError(
            f'run.storage: the study "{self.name}" in the {self.place} is being run by another process '
            f"({holder.removeprefix('lora-tune ') or 'unknown'}). Wait for it, or stop it and run the "
            "same command again.",
            own=holder == self.label,
        )


class Patience:
    """Makes a call again while the server is away."""

    def __init__(self, place: str, note: Callable[[str], None], *, longest_s: float) -> None:
        self.place = place
        self.longest_s = longest_s
        self._note = note
        self._gave_up = False

    def call(self, function: Callable[[bool], T]) -> T:
        """Return what ``function`` returns; it is told whether an earlier attempt may have done its work.

        Raises:
            DatabaseAwayError: The server was away for too long, or is while the study is being stopped.
            StoreError: Another process took the study over meanwhile.
        """
        if self._gave_up:  # who tidies up afterwards does not wait again
            raise self._away()
        try:
            return self._call(function)
        except BaseException as error:
            # the wait was too long, or a signal ended it; any other error is the call's own
            self._gave_up = isinstance(error, DatabaseAwayError) or not isinstance(error, Exception)
            raise

    def _call(self, function: Callable[[bool], T]) -> T:
        began, pause = 0.0, _FIRST_PAUSE_S
        while True:
            try:
                result = function(bool(began))
            except Exception as error:
                if not is_outage(error):
                    raise
                is_first, began = not began, began or time.monotonic()
                if signals.was_raised() or time.monotonic() - began > self.longest_s:
                    raise self._away() from error
                if is_first:
                    self._note(f"the {self.place} is away ({_said_by(error)}): waiting for it.")
                _wait(pause)
                pause = min(2 * pause, _LONGEST_PAUSE_S)
            else:
                if began:
                    away = format_duration(time.monotonic() - began)
                    self._note(f"the {self.place} is back after {away}.")
                return result

    def _away(self) -> DatabaseAwayError:
        return DatabaseAwayError(
            f"run.storage: the {self.place} was away for more than {format_duration(self.longest_s)}. "
            "Nothing is lost: when it is back, the same command goes on."
        )


def _wait(seconds: float) -> None:
    """Wait; a signal that was held back raises here."""
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0:
        signals.check()
        time.sleep(min(left, _LOOK_S))


# The last one: Optuna catches the first when it reads trials, and asks once more on the dead connection.
_OUTAGES = (
    sqlalchemy.exc.OperationalError,
    sqlalchemy.exc.InterfaceError,
    sqlalchemy.exc.PendingRollbackError,
)


def is_outage(error: BaseException) -> bool:
    """Return whether a call failed because of the connection, so that it may be made again."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, _LockTakenError):
            return seen.own
        if isinstance(seen, _OUTAGES):
            return True
        if isinstance(seen, sqlalchemy.exc.DBAPIError) and seen.connection_invalidated:
            return True
        seen = seen.__cause__
    return False


class PostgresStorage(RDBStorage):  # type: ignore[misc]
    """Optuna's storage, with one connection, whose calls wait for a server that is away."""

    def __init__(self, server: Server, patience: Patience) -> None:
        self._patience: Patience | None = (
            None  # a server that cannot be reached at first is refused
        )
        self._num_known: int | None = None
        super().__init__(
            _URL,
            engine_kwargs={"creator": server.connect, "pool_size": 1, "max_overflow": 0},
            skip_table_creation=True,
            skip_compatibility_check=True,
        )
        self._patience = patience

    def again(self, function: Callable[[bool], T]) -> T:
        """Return what a call returns, made again while the server is away."""
        with signals.at_latest(_MOST_BLOCKED_S):
            return function(False) if self._patience is None else self._patience.call(function)

    def _create_new_trial(
        self, study_id: int, template_trial: optuna.trial.FrozenTrial | None = None
    ) -> optuna.trial.FrozenTrial:
        """Make a trial, once, however often it is attempted, also by Optuna itself."""
        self._num_known = self.again(lambda _: self._count(study_id))
        try:
            found: optuna.trial.FrozenTrial = self.again(
                lambda _: RDBStorage._create_new_trial(self, study_id, template_trial)
            )
        finally:
            self._num_known = None
        return found

    def _count(self, study_id: int) -> int:
        with self.scoped_session() as session:
            trials = session.query(models.TrialModel).filter(models.TrialModel.study_id == study_id)
            return int(trials.count())

    def _get_prepared_new_trial(
        self, study_id: int, template_trial: optuna.trial.FrozenTrial | None, session: Any
    ) -> Any:
        """Return the trial that an earlier attempt made without knowing it, or else make one."""
        trials = session.query(models.TrialModel).filter(models.TrialModel.study_id == study_id)
        if self._num_known is not None and trials.count() > self._num_known:
            return trials.order_by(models.TrialModel.number.desc()).first()
        return super()._get_prepared_new_trial(study_id, template_trial, session)

    def set_trial_state_values(
        self,
        trial_id: int,
        state: optuna.trial.TrialState,
        values: Sequence[float] | None = None,
    ) -> bool:
        """Set state and values; an attempt whose answer was lost counts as done when they are set."""

        def attempt(is_second: bool) -> bool:
            if is_second and RDBStorage.get_trial(self, trial_id).state is state:
                return True
            return bool(RDBStorage.set_trial_state_values(self, trial_id, state, values))

        return self.again(attempt)


# Optuna's other calls can be made twice: they read, or set something to a value.
_CALLS = (
    "create_new_study",
    "get_study_id_from_name",
    "get_study_name_from_id",
    "get_study_directions",
    "get_study_user_attrs",
    "get_study_system_attrs",
    "set_study_user_attr",
    "set_study_system_attr",
    "set_trial_user_attr",
    "set_trial_system_attr",
    "set_trial_intermediate_value",
    "_set_trial_param",
    "get_trial",
    "get_trial_id_from_study_id_trial_number",
    "get_all_trials",
    "_get_trials",
    "get_all_studies",
    "_get_best_trial_id",
)


def _patient(name: str) -> Callable[..., Any]:
    method = getattr(RDBStorage, name)

    @wraps(method)
    def call(self: PostgresStorage, *args: Any, **keys: Any) -> Any:
        return self.again(lambda _: method(self, *args, **keys))

    return call


for _name in _CALLS:
    setattr(PostgresStorage, _name, _patient(_name))


def _driver_error() -> type[Exception]:
    import psycopg

    return psycopg.Error


def _unusable(place: str, error: BaseException) -> StoreError:
    return StoreError(f"run.storage: the {place} cannot be used ({_said_by(error)}).")


def _said_by(error: BaseException) -> str:
    """Return what driver or server said first, in a line and without the password."""
    seen: BaseException = error
    while (deeper := seen.__cause__ or _caught_before(seen)) is not None:
        seen = deeper
    said = redact(" ".join(str(getattr(seen, "orig", None) or seen).split()))
    return said[:300] or type(seen).__name__


def _caught_before(error: BaseException) -> BaseException | None:
    """Return what had failed when SQLAlchemy refused to go on with a dead connection."""
    return error.__context__ if isinstance(error, sqlalchemy.exc.PendingRollbackError) else None
