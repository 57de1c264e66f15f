"""A study on PostgreSQL: a real server, real outages, and the same table as on SQLite."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from campaign_results import record
from cutting_proxy import CuttingProxy
from postgres_server import PASSWORD, PostgresServer
from postgres_server import postgres as postgres  # the fixture
from table_folder import begin, open_ladder, optuna_of, run_on, table_lock
from table_study import TableExecutor, drive

from lora_tune import signals
from lora_tune.commands.doctor import doctor, examine
from lora_tune.errors import DatabaseAwayError, StoreError, Terminated
from lora_tune.records import LaneOutcome, StudyLock, TrialRecord
from lora_tune.store import postgres as postgres_module
from lora_tune.store.folder import DATABASE, StudyFolder
from lora_tune.store.postgres import (
    check_server,
    new_postgres_study,
    open_postgres_study,
    read_postgres_trials,
)
from lora_tune.tuner import train

Rows = list[tuple[object, ...]]


@pytest.fixture
def url(postgres: PostgresServer, request: pytest.FixtureRequest) -> str:
    return postgres.make_database(f"d{abs(hash(request.node.name))}")


@pytest.fixture(scope="module")
def on_sqlite(tmp_path_factory: pytest.TempPathFactory) -> tuple[Rows, list[TrialRecord]]:
    """The table and records of the study on SQLite."""
    store = begin(tmp_path_factory.mktemp("sqlite") / "table", table_lock())
    run_on(store, table_lock())
    return optuna_of(store), store.load_trials()


def rows_of(url: str) -> Rows:
    return [
        (
            t.number,
            t.state.name,
            t.params,
            t.values,
            t.constraints,
            t.user_attrs,
            t.intermediate_values,
        )
        for t in read_postgres_trials(url, name="table")
    ]


def start(tmp_path: Path, url: str) -> StudyFolder:
    return begin(tmp_path / "table", table_lock(storage=url))


def test_a_study_on_postgres_is_the_study_on_sqlite_also_resumed(
    tmp_path: Path, url: str, on_sqlite: tuple[Rows, list[TrialRecord]]
) -> None:
    lock = table_lock(storage=url)
    store = start(tmp_path, url)
    for _ in range(3):
        assert not run_on(store, lock, most_takes=3, storage=url)
    assert run_on(store, lock, storage=url)
    assert (rows_of(url), store.load_trials()) == on_sqlite
    assert not (store.path / DATABASE).exists()


def test_the_password_is_in_no_file_and_no_message(tmp_path: Path, url: str) -> None:
    lock, notes = table_lock(storage=url), list[str]()
    store = start(tmp_path, url)
    run_on(store, lock, most_takes=1, storage=url, note=notes.append)
    for path in store.path.rglob("*"):
        assert not path.is_file() or PASSWORD.encode() not in path.read_bytes()
    locked = store.load_lock()
    assert locked is not None
    assert "tuner:***@127.0.0.1" in str(locked.spec["run"])
    found = str(examine(store))
    assert "is in the study file alone" in found  # which is not there
    for bad in (url.replace("tuner", "nobody"), url.replace("127.0.0.1", "127.0.0.1:1/x?x=")):
        with pytest.raises(StoreError) as caught, store.owned():
            open_ladder(store, lock, storage=bad)
        found += str(caught.value)
    assert PASSWORD not in found + " ".join(notes)


def test_a_server_that_cannot_be_reached_is_one_message(
    tmp_path: Path, postgres: PostgresServer
) -> None:
    for bad, said in (
        (postgres.url("nowhere"), 'database "nowhere" does not exist'),
        (postgres.url(password="wr0ng"), "password authentication failed"),
        ("postgresql://tuner@127.0.0.1:1/x", "Connection refused"),
    ):
        began = time.monotonic()
        with pytest.raises(StoreError) as caught:
            open_postgres_study(
                bad, name="x", created="now", folder=tmp_path, num_records=0, note=print
            )
        assert str(caught.value).startswith("run.storage: the PostgreSQL database ")
        assert said in str(caught.value)
        with pytest.raises(StoreError) as early:  # as a run does before it loads the base
            check_server(bad, name="x")
        assert str(early.value) == str(caught.value)
        assert "\n" not in str(caught.value)
        assert time.monotonic() - began < 10


def test_without_the_driver_the_extra_is_named(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['psycopg'] = None\n"
        "from lora_tune.store.postgres import check_driver\ncheck_driver()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "pip install 'lora-tune[postgres]'" in done.stderr
    assert "MachineError" in done.stderr


# One owner.

HOLDER = """
import sys
from pathlib import Path
from lora_tune.store.postgres import open_postgres_study
study = open_postgres_study(
    sys.argv[1], name="table", created=sys.argv[2], folder=Path("x"), num_records=0, note=print)
print("held", flush=True)
sys.stdin.read()
"""


def test_a_study_on_a_server_has_one_owner_wherever_its_folder_is(tmp_path: Path, url: str) -> None:
    lock, store = table_lock(storage=url), start(tmp_path, url)
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, url, lock.created],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(
            StoreError, match=rf"being run by another process \(pid {other.pid} on "
        ):
            run_on(store, lock, storage=url)
        other.kill()
        other.wait()
        deadline = time.monotonic() + 10  # the server notices when it reads from the connection
        while True:
            try:
                assert not run_on(store, lock, most_takes=1, storage=url)
                break
            except StoreError:
                assert time.monotonic() < deadline
                time.sleep(0.05)


def test_another_folder_s_study_of_the_same_name_is_refused(tmp_path: Path, url: str) -> None:
    run_on(start(tmp_path, url), table_lock(storage=url), most_takes=2, storage=url)
    before = rows_of(url)
    other = begin(tmp_path / "other" / "table", table_lock(storage=url))
    with pytest.raises(StoreError, match="that another study folder began"):
        run_on(other, replace(table_lock(storage=url), created="2031-01-01"), storage=url)
    assert rows_of(url) == before
    with pytest.raises(StoreError, match="that another study folder began"):
        read_postgres_trials(url, name="table", created="2031-01-01")
    with pytest.raises(StoreError, match="that another study folder began"):
        new_postgres_study(
            url, name="table", created="2031-01-01", folder=other.path, fill=lambda study: None
        )
    assert rows_of(url) == before


# Outages.


def test_no_write_is_lost_or_made_twice_when_the_answer_to_its_commit_is_lost(
    tmp_path: Path, postgres: PostgresServer, url: str, on_sqlite: tuple[Rows, list[TrialRecord]]
) -> None:
    store, lock, notes = start(tmp_path, url), table_lock(storage=url), list[str]()
    with CuttingProxy(postgres.port, cut_every=9) as proxy:
        through = url.replace(str(postgres.port), str(proxy.port))
        assert run_on(store, lock, storage=through, note=notes.append)
        assert proxy.cuts > 20
        assert sum("is away" in note for note in notes) >= proxy.cuts - 1
    assert (rows_of(url), store.load_trials()) == on_sqlite


def test_a_connection_that_dies_between_two_reads_of_one_call_is_an_outage_too(
    tmp_path: Path, postgres: PostgresServer, url: str
) -> None:
    # Optuna catches the first error there, and asks once more on the dead connection
    store, lock, notes = start(tmp_path, url), table_lock(storage=url), list[str]()
    with CuttingProxy(postgres.port, cut_every=5, phrase=b"FROM trial_user_attributes") as proxy:
        through = url.replace(str(postgres.port), str(proxy.port))
        run_on(store, lock, most_takes=4, storage=through, note=notes.append)
        assert proxy.cuts > 1
    assert any("is away (consuming input failed: server closed" in note for note in notes)
    assert len(store.load_trials()) == len(rows_of(url))


class BreakingExecutor(TableExecutor):
    """Has a result, and tells it only when somebody has stopped the server, as often as agreed."""

    def __init__(self, times: int) -> None:
        super().__init__(2)
        self.left = times
        self.result, self.stopped = threading.Semaphore(0), threading.Semaphore(0)

    def wait(self) -> list[LaneOutcome]:
        if self.left:
            self.left -= 1
            self.result.release()
            assert self.stopped.acquire(timeout=60)
        return super().wait()


def outages(
    postgres: PostgresServer, store: StudyFolder, url: str, lengths: list[float]
) -> list[str]:
    """Run a study whose server dies again and again, for so many seconds; return the notes."""
    lock, notes = table_lock(storage=url), list[str]()
    executor = BreakingExecutor(len(lengths))

    def break_it() -> None:
        for length in lengths:
            executor.result.acquire()
            postgres.stop()
            executor.stopped.release()
            time.sleep(length)
            postgres.start()

    breaker = threading.Thread(target=break_it)
    breaker.start()
    try:
        with store.owned():
            ladder, _ = open_ladder(store, lock, storage=url, note=notes.append)
            assert drive(ladder, executor)
            ladder.finalists(2)
    finally:
        for _ in lengths:
            executor.result.release()
        breaker.join()
    return notes


def test_two_outages_are_waited_for_and_told_of_once(
    tmp_path: Path, postgres: PostgresServer, url: str, on_sqlite: tuple[Rows, list[TrialRecord]]
) -> None:
    store = start(tmp_path, url)
    notes = outages(postgres, store, url, [2.0, 0.2])
    assert (rows_of(url), store.load_trials()) == on_sqlite
    assert 1 <= sum("is away" in note for note in notes) <= 2
    assert sum("is away" in n for n in notes) == sum("is back after" in n for n in notes)
    assert PASSWORD not in " ".join(notes)


@pytest.mark.campaign
def test_ten_outages_of_one_to_sixty_seconds(
    tmp_path: Path, postgres: PostgresServer, url: str, on_sqlite: tuple[Rows, list[TrialRecord]]
) -> None:
    store = start(tmp_path, url)
    lengths = [1.0, 60.0, 2.0, 30.0, 5.0, 1.5, 15.0, 3.0, 45.0, 8.0]
    began = time.monotonic()
    notes = outages(postgres, store, url, lengths)
    away = sum("is away" in note for note in notes)
    assert (rows_of(url), store.load_trials()) == on_sqlite
    record(
        "database-outages",
        outages=len(lengths),
        outages_noticed=away,
        shortest_s=min(lengths),
        longest_s=max(lengths),
        trials=len(store.load_trials()),
        trials_lost=0,
        told_twice=0,
        seconds=round(time.monotonic() - began),
    )


def test_a_server_that_stays_away_ends_the_study_with_75_and_it_goes_on_later(
    tmp_path: Path, postgres: PostgresServer, url: str, on_sqlite: tuple[Rows, list[TrialRecord]]
) -> None:
    lock, store = table_lock(storage=url), start(tmp_path, url)
    run_on(store, lock, most_takes=2, storage=url)
    study = open_postgres_study(
        url,
        name="table",
        created=lock.created,
        folder=store.path,
        num_records=0,
        note=print,
        longest_outage_s=0.5,
    )
    postgres.stop()
    try:
        with pytest.raises(DatabaseAwayError) as caught:
            study.get_trials()
        assert caught.value.exit_code == 75
        assert str(caught.value).endswith("when it is back, the same command goes on.")
    finally:
        postgres.start()
    study._storage._backend.engine.dispose()
    assert run_on(store, lock, storage=url)
    assert (rows_of(url), store.load_trials()) == on_sqlite


class StoppingExecutor(TableExecutor):
    """Lets others act before the first result is told, and has one more when the study is stopped."""

    def __init__(self, act: Callable[[], None]) -> None:
        super().__init__(2)
        self.act = act
        self.last: list[LaneOutcome] = []

    def wait(self) -> list[LaneOutcome]:
        self.act()
        self.act = lambda: None
        return super().wait()

    def save_states(self) -> None:
        pass

    def ended(self) -> list[LaneOutcome]:
        self.last = [self.fate(job) for job in self.jobs[:1]]
        return self.last


class SignalSoon:
    """Sends this process a signal half a second after it was asked to."""

    def __init__(self) -> None:
        self.timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM))

    def __call__(self, text: str = "") -> None:
        self.timer.start()


def train_until_stopped(
    store: StudyFolder,
    lock: StudyLock,
    url: str,
    executor: StoppingExecutor,
    note: Callable[[str], None],
) -> None:
    with signals.stoppable(), signals.deferred(), store.owned():
        ladder, _ = open_ladder(store, lock, storage=url, note=note)
        work: Any = executor
        train(ladder, work, told=lambda: None, track=lambda outcome: None)


@pytest.mark.parametrize("takes", [2, 10])  # the server is missed by a proposal, by a result
def test_a_study_whose_server_is_away_is_stopped_by_a_signal_and_goes_on_later(
    tmp_path: Path,
    postgres: PostgresServer,
    url: str,
    on_sqlite: tuple[Rows, list[TrialRecord]],
    takes: int,
) -> None:
    lock, store, notes = table_lock(storage=url), start(tmp_path, url), list[str]()
    run_on(store, lock, most_takes=takes, storage=url)
    executor, signal_soon = StoppingExecutor(postgres.stop), SignalSoon()

    def note(text: str) -> None:
        notes.append(text)
        signal_soon()

    began = time.monotonic()
    try:
        with pytest.raises(Terminated):
            train_until_stopped(store, lock, url, executor, note)
        assert time.monotonic() - began < 10
    finally:
        signal_soon.timer.cancel()
        postgres.start()
    assert len(notes) == 1
    ended = {record.number for record in store.load_trials() if record.rungs}
    assert {outcome.trial for outcome in executor.last} <= ended
    assert executor.last
    assert run_on(store, lock, storage=url)
    assert (rows_of(url), store.load_trials()) == on_sqlite


def test_a_statement_that_blocks_does_not_hold_up_a_signal(
    tmp_path: Path,
    url: str,
    on_sqlite: tuple[Rows, list[TrialRecord]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import psycopg

    monkeypatch.setattr(postgres_module, "_MOST_BLOCKED_S", 0.5)
    lock, store = table_lock(storage=url), start(tmp_path, url)
    run_on(store, lock, most_takes=2, storage=url)
    signal_soon = SignalSoon()
    with psycopg.connect(url) as other:
        release = threading.Timer(30, other.rollback)  # or it would wait for ever

        def block() -> None:
            other.execute("LOCK TABLE trials")
            release.start()
            signal_soon()

        began = time.monotonic()
        with pytest.raises(Terminated):
            train_until_stopped(store, lock, url, StoppingExecutor(block), print)
        assert time.monotonic() - began < 10
        signal_soon.timer.cancel()
        release.cancel()
        other.rollback()
    assert run_on(store, lock, storage=url)
    assert (rows_of(url), store.load_trials()) == on_sqlite


def test_a_server_that_is_silent_does_not_hold_up_a_signal(tmp_path: Path) -> None:
    signal_soon = SignalSoon()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"postgresql://lora@127.0.0.1:{silent.getsockname()[1]}/studies"
        store, lock = start(tmp_path, url), table_lock(storage=url)
        signal_soon()
        began = time.monotonic()
        with pytest.raises(Terminated):
            train_until_stopped(store, lock, url, StoppingExecutor(lambda: None), print)
        signal_soon.timer.cancel()
    assert time.monotonic() - began < 5


def test_a_frozen_owner_that_lost_its_lock_writes_nothing(tmp_path: Path, url: str) -> None:
    """The first owner's connection dies, another process takes over, the first one comes back."""
    import psycopg

    lock, store = table_lock(storage=url), start(tmp_path, url)
    with store.owned():
        _, study = open_ladder(store, lock, storage=url)
        with psycopg.connect(url, autocommit=True) as admin:
            admin.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid() "
                "AND application_name LIKE 'lora-tune%'"
            )
        admin.close()
        with subprocess.Popen(
            [sys.executable, "-c", HOLDER, url, lock.created],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as other:
            assert other.stdout is not None
            assert other.stdout.readline() == "held\n"
            with pytest.raises(StoreError, match=f"pid {other.pid} on "):
                study.enqueue_trial({"effective_step": 1e-4})
            os.kill(other.pid, signal.SIGKILL)
    assert rows_of(url) == []


# The doctor.


def test_a_study_that_the_server_lost_is_made_again(
    tmp_path: Path,
    url: str,
    on_sqlite: tuple[Rows, list[TrialRecord]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import psycopg

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PGPASSWORD", PASSWORD)
    url = url.replace(f":{PASSWORD}", "")
    lock, store = table_lock(storage=url), start(tmp_path, url)
    run_on(store, lock, most_takes=9, storage=url)
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("UPDATE trial_values SET value = value + 0.5 WHERE trial_value_id = 2")
    connection.close()
    with pytest.raises(StoreError, match=r"does not fit the records: trial .* has another loss"):
        run_on(store, lock, storage=url)
    assert [f.path for f in examine(store).findings] == ["run.storage"]
    assert doctor(str(store.path), fix=False, rebuild=True, as_json=False)
    assert read_postgres_trials(url, name="table (damaged 1)")
    assert run_on(store, lock, storage=url)
    assert (rows_of(url), store.load_trials()) == on_sqlite
