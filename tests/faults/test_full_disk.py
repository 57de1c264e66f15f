"""A disk that is full: one message, exit 7, nothing half-written, and the same command goes on with room.

Real disks of a few MiB, filled from outside to the last byte; each library that writes for us is asked what
it does then.
"""

import errno
import json
import shutil
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import pytest
from campaign_results import record
from fault_studies import finish, lora_tune_run, write_study
from forked_commands import commands
from small_disk import SmallDisk, mounted

from lora_tune.errors import DiskFullError
from lora_tune.files import (
    RESERVE_BYTES,
    check_room,
    is_complete,
    is_full,
    publish_folder,
    write_text,
)
from lora_tune.store.folder import StudyFolder
from lora_tune.units import MIB

Results = list[tuple[object, ...]]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    with mounted(tmp_path / "disk", "8m") as found:
        yield found


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != "filler")


def publish(target: Path, size: int, *, expected_bytes: int | None = None) -> None:
    import torch
    from safetensors.torch import save_file

    with publish_folder(target, expected_bytes=expected_bytes) as folder:
        save_file({"weight": torch.zeros(size // 4)}, folder / "weights.safetensors")
        (folder / "config.json").write_text("{}")


# Files and folders.


def test_a_text_that_does_not_fit_leaves_the_earlier_one(disk: SmallDisk) -> None:
    path = disk.folder / "trial.json"
    write_text(path, "earlier")
    disk.fill()
    with pytest.raises(DiskFullError, match=r"trial\.json: cannot be written, the disk is full \("):
        write_text(path, "later" * 10_000)
    assert path.read_text() == "earlier"
    assert names(disk.folder) == ["trial.json"]


@pytest.mark.parametrize("leave", [0, 4096, 64 * 1024, MIB, 2 * MIB - 4096])
def test_a_folder_that_does_not_fit_leaves_the_earlier_one(disk: SmallDisk, leave: int) -> None:
    target = disk.folder / "adapter"
    publish(target, MIB)
    before = (target / "weights.safetensors").read_bytes()
    disk.fill(leave=leave)
    with pytest.raises(
        DiskFullError, match="disk/adapter: cannot be written, the disk is full"
    ) as seen:
        publish(target, 2 * MIB)
    assert seen.value.exit_code == 7
    assert str(seen.value).count("\n") == 0
    assert (target / "weights.safetensors").read_bytes() == before
    assert is_complete(target)
    assert names(disk.folder) == ["adapter"]
    disk.make_room()
    publish(target, 2 * MIB)
    assert (target / "weights.safetensors").stat().st_size > 2 * MIB


def test_what_would_not_fit_is_refused_before_it_is_begun(disk: SmallDisk) -> None:
    disk.grow("80m")
    with pytest.raises(
        DiskFullError, match=r"20\.0 MiB are to be written.* but only 80\.0 MiB are free at"
    ):
        publish(disk.folder / "state", 0, expected_bytes=20 * MIB)
    assert names(disk.folder) == []
    publish(disk.folder / "state", 0, expected_bytes=10 * MIB)
    check_room(disk.folder / "not" / "yet", 15 * MIB)
    with pytest.raises(DiskFullError):
        check_room(disk.folder / "not" / "yet", 80 * MIB - RESERVE_BYTES + 1)


def test_a_disk_without_inodes_is_called_so(tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", "8m") as disk:
        disk.grow("8m,nr_inodes=4")
        (disk.folder / "1").touch()
        (disk.folder / "2").touch()
        (disk.folder / "3").touch()
        with pytest.raises(DiskFullError, match="no inodes left"):
            write_text(disk.folder / "4", "x")


# What libraries say.


@pytest.mark.parametrize("journal", ["wal", "delete"])
def test_a_full_disk_is_recognised_in_what_sqlite_says(disk: SmallDisk, journal: str) -> None:
    connection = sqlite3.connect(disk.folder / "study.db")
    connection.execute(f"PRAGMA journal_mode={journal}")
    connection.execute("CREATE TABLE values_of (text)")
    connection.commit()
    disk.fill()

    def insert() -> None:
        for _ in range(100):
            connection.execute("INSERT INTO values_of VALUES (?)", ("x" * 10_000,))
            connection.commit()

    with pytest.raises(sqlite3.OperationalError) as seen:
        insert()
    assert is_full(seen.value)
    connection.close()


def test_a_full_disk_is_recognised_when_sqlite_cannot_even_begin(disk: SmallDisk) -> None:
    connection = sqlite3.connect(disk.folder / "study.db")
    disk.fill()
    with pytest.raises(sqlite3.OperationalError) as seen:
        connection.executescript("PRAGMA journal_mode=wal; CREATE TABLE values_of (text)")
    assert is_full(seen.value)
    connection.close()


def test_a_full_disk_is_recognised_in_what_optuna_says(disk: SmallDisk) -> None:
    import optuna

    storage = optuna.storages.RDBStorage(f"sqlite:///{disk.folder / 'study.db'}")
    study = optuna.create_study(storage=storage)
    disk.fill()

    def ask() -> None:
        for _ in range(100):
            study.ask().set_user_attr("text", "x" * 2000)

    with pytest.raises(optuna.exceptions.StorageInternalError) as seen:
        ask()
    assert is_full(seen.value)
    storage.engine.dispose()


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), True),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), True),
        (OSError(errno.EIO, "Input/output error"), False),
        (PermissionError(errno.EACCES, "Permission denied"), False),
        (RuntimeError("I/O error: No space left on device (os error 28)"), True),
        (FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp']"), True),
        (FileNotFoundError(errno.ENOENT, "No such file or directory"), False),
        (RuntimeError("CUDA out of memory"), False),
        (ValueError("the context is full"), False),
    ],
)
def test_only_a_lack_of_room_is_called_one(error: Exception, full: bool) -> None:
    assert is_full(error) is full
    wrapped = RuntimeError("while saving")
    wrapped.__cause__ = error
    assert is_full(wrapped) is full


# Whole studies.

# When these are there, the disk is filled to the last byte: from the first record to the last.
MOMENTS = (
    "study.db",
    "study.lock.json",
    "trials/0000",
    "trials/0000/trial.json",
    "trials/*/rung-0",
    "trials/0002/trial.json",
    "trials/0003/trial.json",
    "trials/*/rung-1",
    "confirmation",
    "confirmation.json",
)


class Full(NamedTuple):
    """How a run ended on a full disk, how the same command ended with room, and what it found."""

    code: int
    said: str
    code_with_room: int
    said_with_room: str
    found: Results


def study_on(disk: SmallDisk, place: Path, executor: str) -> Path:
    """Write a study whose folder is on the disk; return that folder."""
    path = write_study(place, executor=executor)
    text = f'[study]\nname = "full"\noutput = "{disk.folder}"\n{path.read_text()}'
    path.write_text(text)
    return disk.folder / "full"


def run(place: Path) -> tuple[int, str]:
    done = commands().run("run", "study.toml", cwd=place)
    return done.code, done.out + done.err


def run_until_full(disk: SmallDisk, place: Path, moment: str) -> tuple[int, str]:
    """Run the study; from the moment on nothing more fits on the disk."""
    running = commands()
    running.start("run", "study.toml", cwd=place)
    while not running.ended:
        if next((disk.folder / "full").glob(moment), None) is not None:
            disk.fill()
        time.sleep(0.002)
    done = running.finish()
    return done.code, done.out + done.err


def results_of(folder: Path) -> Results:
    """Return what a study found, without times and memory."""
    snapshot = StudyFolder(folder).snapshot()
    found: Results = [
        (t.number, t.state, t.config, *(round(rung.eval_loss, 4) for rung in t.rungs))
        for t in snapshot.trials
    ]
    assert snapshot.confirmation is not None
    assert snapshot.confirmation.decision is not None
    return [*found, (snapshot.confirmation.decision.chosen,)]


def check_database(folder: Path) -> None:
    """The database is sound: a copy of it, since SQLite cannot open one in WAL mode on a full disk."""
    with TemporaryDirectory() as copy:
        for path in folder.glob("study.db*"):
            shutil.copy(path, copy)
        with closing(sqlite3.connect(Path(copy) / "study.db")) as connection:
            assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def check_nothing_is_half_written(folder: Path) -> None:
    """Whatever is in the folder is whole, and nothing hidden was left."""
    for manifest in folder.rglob("manifest.json"):
        assert is_complete(manifest.parent), manifest.parent
    for record_file in folder.rglob("*.json"):
        json.loads(record_file.read_text())
    for result in folder.glob("trials/*/rung-*"):
        assert (result / "manifest.json").is_file(), result
    check_database(folder)
    assert list(folder.rglob(".*")) == []


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """What the study finds on a disk with room."""
    with mounted(tmp_path_factory.mktemp("undisturbed") / "disk", "200m") as disk:
        place = tmp_path_factory.mktemp("undisturbed-study")
        folder = study_on(disk, place, "in-process")
        code, said = run(place)
        assert code == 0, said
        return results_of(folder)


def ends_and_goes_on(place: Path, moment: str, executor: str) -> Full:
    with mounted(place / "disk", "80m") as disk:
        folder = study_on(disk, place, executor)
        ended = run_until_full(disk, place, moment)
        check_nothing_is_half_written(folder)
        disk.grow("200m")
        with_room = run(place)
        return Full(*ended, *with_room, results_of(folder) if with_room[0] == 0 else [])


def check_full(full: Full) -> None:
    assert full.code == 7, full.said
    messages = [line for line in full.said.splitlines() if line.startswith("lora-tune: ")]
    assert len(messages) == 1, full.said
    assert "the disk is full" in messages[0] or "are kept free" in messages[0]
    assert "Traceback" not in full.said
    assert full.code_with_room == 0, full.said_with_room


def test_a_disk_that_is_nearly_full_is_refused_at_once(tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", "60m") as disk:
        folder = study_on(disk, tmp_path, "in-process")
        code, said = finish(lora_tune_run(tmp_path))
        assert code == 7, said
        assert "are kept free" in said
        assert len(said.strip().splitlines()) == 1  # not a row was read
        assert not folder.exists()


@pytest.mark.parametrize("moment", ["trials/0002/trial.json"])
def test_a_study_on_a_full_disk_ends_with_one_message_and_goes_on_with_room(
    tmp_path: Path, undisturbed: Results, moment: str
) -> None:
    full = ends_and_goes_on(tmp_path, moment, "in-process")
    check_full(full)
    assert full.found == undisturbed


@pytest.mark.campaign
def test_at_ten_moments_a_full_disk_costs_nothing(tmp_path: Path, undisturbed: Results) -> None:
    ended, equal, faults = 0, 0, []
    for number, moment in enumerate(MOMENTS):
        place = tmp_path / str(number)
        place.mkdir()
        full = ends_and_goes_on(place, moment, ("process", "in-process")[number % 2])
        try:
            check_full(full)
            ended += 1
        except AssertionError as error:
            faults.append(f"{moment}: {error}")
        if full.found == undisturbed:
            equal += 1
        else:
            faults.append(f"{moment}: {full.found} is not {undisturbed}")
    record("full-disk", points=len(MOMENTS), ended_with_one_message=ended, equal_when_gone_on=equal)
    assert faults == []
