"""The Optuna database: an ordinary one, durable, and never silently begun anew."""

import sqlite3
from contextlib import suppress
from pathlib import Path

import optuna
import pytest

from lora_tune.errors import StoreError
from lora_tune.store.database import close_study, damage_of, open_optuna_study, read_trials
from lora_tune.store.mounts import Mount

NAME = "docstrings"


def told(path: Path, num_trials: int) -> optuna.Study:
    study = open_optuna_study(path, name=NAME, num_records=0)
    for number in range(num_trials):
        trial = study.ask()
        trial.suggest_float("effective_step", 1e-5, 1e-3, log=True)
        trial.set_constraint("vram_excess_bytes", -1.0)
        study.tell(trial, float(number))
    return study


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A database of three trials as one file."""
    path = tmp_path_factory.mktemp("database") / "study.db"
    study = told(path, 3)
    study._storage._backend.engine.dispose()  # type: ignore[attr-defined]
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    connection.close()
    return path.read_bytes()


def test_optuna_opens_the_database_by_itself(tmp_path: Path) -> None:
    path = tmp_path / "study.db"
    told(path, 3)
    study = optuna.load_study(study_name=None, storage=f"sqlite:///{path}")
    assert study.study_name == NAME
    assert study.direction is optuna.study.StudyDirection.MINIMIZE
    assert [trial.value for trial in study.trials] == [0.0, 1.0, 2.0]
    assert all(trial.constraints == {"vram_excess_bytes": -1.0} for trial in study.trials)


def test_the_database_is_in_wal_mode_for_every_reader(tmp_path: Path) -> None:
    path = tmp_path / "study.db"
    study = told(path, 1)
    with study._storage._backend.engine.connect() as inside:  # type: ignore[attr-defined]
        # FULL (2): a commit is on the disk when it returns
        assert inside.exec_driver_sql("PRAGMA synchronous").scalar() == 2
        assert inside.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
    connection = sqlite3.connect(path)
    assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    connection.close()


def journal_of(path: Path) -> str:
    connection = sqlite3.connect(path)
    [mode] = connection.execute("PRAGMA journal_mode").fetchone()
    connection.close()
    return str(mode)


def test_on_a_network_file_system_the_database_keeps_the_rollback_journal(tmp_path: Path) -> None:
    path = tmp_path / "study.db"
    network = Mount(point="/home", kind="nfs4", options=frozenset())
    study = open_optuna_study(path, name=NAME, num_records=0, mount=network)
    with study._storage._backend.engine.connect() as inside:  # type: ignore[attr-defined]
        assert inside.exec_driver_sql("PRAGMA synchronous").scalar() == 2
    study.ask()
    assert journal_of(path) == "delete"
    assert [file.name for file in tmp_path.iterdir()] == ["study.db"]
    close_study(study)


def test_a_database_that_moved_to_a_network_file_system_leaves_its_log(
    tmp_path: Path, database: bytes
) -> None:
    path = tmp_path / "study.db"
    path.write_bytes(database)
    assert journal_of(path) == "wal"
    network = Mount(point="/", kind="fuse.sshfs", options=frozenset())
    study = open_optuna_study(path, name=NAME, num_records=3, mount=network)
    assert len(study.trials) == 3
    close_study(study)
    assert journal_of(path) == "delete"


def test_looking_for_damage_changes_no_byte(tmp_path: Path) -> None:
    path = tmp_path / "study.db"
    study = told(path, 3)  # open, so that its log is beside it
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir() if "shm" not in file.name}
    assert set(before) == {"study.db", "study.db-wal"}
    assert damage_of(path) is None
    assert [trial.value for trial in read_trials(path, name=NAME)] == [0.0, 1.0, 2.0]
    after = {file.name: file.read_bytes() for file in tmp_path.iterdir() if "shm" not in file.name}
    assert after == before
    close_study(study)


def test_an_empty_database_does_not_cost_the_log_beside_it(tmp_path: Path) -> None:
    # SQLite deletes the log of an empty file as soon as it opens it
    path = tmp_path / "study.db"
    study = told(path, 3)
    log = (tmp_path / "study.db-wal").read_bytes()
    close_study(study)
    path.write_bytes(b"")
    (tmp_path / "study.db-wal").write_bytes(log)
    with pytest.raises(StoreError, match="is empty"):
        open_optuna_study(path, name=NAME, num_records=3)
    assert (tmp_path / "study.db-wal").read_bytes() == log


def test_a_database_that_another_program_holds_is_said_to_be_locked(
    tmp_path: Path, database: bytes
) -> None:
    path = tmp_path / "study.db"
    path.write_bytes(database)
    holder = sqlite3.connect(path, isolation_level=None)
    holder.execute("PRAGMA locking_mode=EXCLUSIVE")
    holder.execute("BEGIN EXCLUSIVE")
    with pytest.raises(StoreError, match="is locked by another program"):
        open_optuna_study(path, name=NAME, num_records=3, busy_s=0.5)
    holder.close()


def test_an_opened_database_goes_on(tmp_path: Path, database: bytes) -> None:
    path = tmp_path / "study.db"
    path.write_bytes(database)
    study = open_optuna_study(path, name=NAME, num_records=3)
    assert len(study.trials) == 3
    assert study.ask().number == 3


def test_a_new_study_may_have_no_records(tmp_path: Path) -> None:
    assert open_optuna_study(tmp_path / "study.db", name=NAME, num_records=0).trials == []


def test_a_lost_database_is_not_begun_anew(tmp_path: Path) -> None:
    path = tmp_path / "study.db"
    with pytest.raises(StoreError) as caught:
        open_optuna_study(path, name=NAME, num_records=5)
    assert str(caught.value) == (
        f"{path}: is missing. The finished trials are safe in {tmp_path / 'trials'}. "
        f"Make the database again from them: lora-tune doctor {tmp_path} --rebuild"
    )
    assert list(tmp_path.iterdir()) == []


def test_an_emptied_database_is_not_begun_anew(tmp_path: Path) -> None:
    path = tmp_path / "study.db"
    path.touch()
    with pytest.raises(StoreError, match="is empty"):
        open_optuna_study(path, name=NAME, num_records=1)
    assert path.stat().st_size == 0


def test_an_older_copy_of_the_database_is_refused(tmp_path: Path, database: bytes) -> None:
    path = tmp_path / "study.db"
    path.write_bytes(database)
    with pytest.raises(StoreError, match=r"holds 3 of the 4 trials on record"):
        open_optuna_study(path, name=NAME, num_records=4)


def test_a_file_that_is_no_database_is_named(tmp_path: Path) -> None:
    path = tmp_path / "study.db"
    path.write_text("This is a text about a study.\n" * 100, encoding="utf-8")
    with pytest.raises(StoreError) as caught:
        open_optuna_study(path, name=NAME, num_records=2)
    assert str(caught.value) == (
        f"{path}: is no SQLite database. The finished trials are safe in {tmp_path / 'trials'}. "
        f"Make the database again from them: lora-tune doctor {tmp_path} --rebuild"
    )


@pytest.mark.parametrize("filling", [b"\x00", b"\xff"])
def test_a_damaged_page_is_a_store_error_or_harmless(
    tmp_path: Path, database: bytes, filling: bytes
) -> None:
    page = int.from_bytes(database[16:18], "big")  # SQLite's file header, bytes 16 and 17
    refused = 0
    for start in range(0, len(database), 3 * page):
        path = tmp_path / f"{start}.db"
        path.write_bytes(database[:start] + filling * page + database[start + page :])
        with suppress(StoreError):
            assert len(open_optuna_study(path, name=NAME, num_records=3).trials) == 3
            continue
        refused += 1
    assert refused


def test_a_database_that_was_cut_short_is_refused(tmp_path: Path, database: bytes) -> None:
    for length in range(1, len(database), len(database) // 8):
        path = tmp_path / f"{length}.db"
        path.write_bytes(database[:length])
        with pytest.raises(StoreError, match=f"doctor {tmp_path} --rebuild"):
            open_optuna_study(path, name=NAME, num_records=3)
