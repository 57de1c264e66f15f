"""The study folder: what is written is read back exactly, damage is named, and only one process owns it."""

import json
import math
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from study_records import confirmation, evaluation, memory_log, study_lock, trial_record

from lora_tune.errors import StoreError
from lora_tune.records import NO_READINGS, StudySnapshot, TrialState
from lora_tune.store.folder import LOCK_FILE, OWNER_FILE, StudyFolder

HOLDER = """
import sys
from pathlib import Path
from lora_tune.store.folder import StudyFolder
with StudyFolder(Path(sys.argv[1])).owned():
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def store(tmp_path: Path) -> StudyFolder:
    folder = StudyFolder(tmp_path / "reports" / "docstrings")
    folder.path.mkdir(parents=True)
    return folder


@contextmanager
def held_by_another_process(folder: Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", HOLDER, str(folder)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("state", list(TrialState))
def test_a_trial_is_read_back_as_it_was_written(store: StudyFolder, state: TrialState) -> None:
    record = trial_record(3, state)
    store.save_trial(record)
    [found] = store.load_trials()
    assert found == record
    assert type(found.state) is TrialState
    assert type(found.config.target_modules) is tuple
    assert (store.path / "trials" / "0003" / "trial.json").is_file()


def test_a_trial_is_replaced_by_its_later_record(store: StudyFolder) -> None:
    record = trial_record(0, TrialState.RUNNING)
    store.save_trial(record)
    store.save_trial(replace(record, state=TrialState.PRUNED))
    assert [found.state for found in store.load_trials()] == [TrialState.PRUNED]


def test_lock_and_confirmation_are_read_back_as_they_were_written(store: StudyFolder) -> None:
    assert store.load_lock() is None
    assert store.load_confirmation() is None
    store.save_lock(study_lock())
    assert store.load_lock() == study_lock()
    for given in (confirmation(), confirmation(None)):
        store.save_confirmation(given)
        assert store.load_confirmation() == given


def test_runtime_begins_at_zero_and_is_kept(store: StudyFolder) -> None:
    assert store.load_runtime() == 0.0
    store.save_runtime(1 / 3)
    assert store.load_runtime() == 1 / 3


def test_trials_come_by_number_also_beyond_four_digits(store: StudyFolder) -> None:
    for number in (10_000, 2, 10, 9_999):
        store.save_trial(trial_record(number))
    assert [record.number for record in store.load_trials()] == [2, 10, 9_999, 10_000]


def test_the_snapshot_is_the_whole_study(store: StudyFolder) -> None:
    store.save_lock(study_lock())
    records = (trial_record(0), trial_record(1, TrialState.DIVERGED))
    for record in records:
        store.save_trial(record)
    store.save_runtime(12.5)
    wanted = StudySnapshot(
        folder=store.path, lock=study_lock(), trials=records, confirmation=None, wall_s=12.5
    )
    assert store.snapshot() == wanted
    store.save_confirmation(confirmation())
    assert store.snapshot() == replace(wanted, confirmation=confirmation())
    store.save_memory(memory_log())
    assert store.snapshot() == replace(wanted, confirmation=confirmation(), memory=memory_log())


def test_memory_readings_are_read_back_as_they_were_written(store: StudyFolder) -> None:
    assert store.load_memory() == NO_READINGS
    store.save_memory(memory_log())
    assert store.load_memory() == memory_log()


def test_a_study_of_before_the_readings_still_loads(store: StudyFolder) -> None:
    store.save_lock(study_lock())
    path = store.path / LOCK_FILE
    lock = json.loads(path.read_text(encoding="utf-8"))
    del lock["plan"]["capacity_bytes"]
    path.write_text(json.dumps(lock), encoding="utf-8")
    snapshot = store.snapshot()
    assert snapshot.lock == study_lock()
    assert (snapshot.lock.plan.capacity_bytes, snapshot.memory) == (0, NO_READINGS)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_no_infinity_reaches_a_file(store: StudyFolder, value: float) -> None:
    # "Infinity" and "NaN" are no JSON: other readers refuse the whole file
    record = replace(trial_record(0, TrialState.DIVERGED), first_loss=value)
    store.save_trial(record)

    def refuse(word: str) -> float:
        raise AssertionError(f"{word} in the file")

    text = (store.trial_folder(0) / "trial.json").read_text(encoding="utf-8")
    json.loads(text, parse_constant=refuse)
    assert repr(store.load_trials()) == repr([record])  # a NaN does not equal itself


@pytest.mark.parametrize("damage", ["", "{", "[]", "{}", '{"number": "many"}', "\x00" * 40])
def test_a_damaged_record_is_named_by_its_path(store: StudyFolder, damage: str) -> None:
    store.save_lock(study_lock())
    store.save_trial(trial_record(0))
    store.save_confirmation(confirmation())
    store.save_runtime(1.0)
    store.save_memory(memory_log())
    files = [path for path in store.path.rglob("*.json") if path.is_file()]
    assert len(files) == 5
    for path in files:
        good = path.read_bytes()
        path.write_text(damage, encoding="utf-8")
        with pytest.raises(StoreError) as caught:
            store.snapshot()
        assert str(path) in str(caught.value)
        assert caught.value.exit_code == 4
        path.write_bytes(good)
    store.snapshot()


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ("{", "Invalid JSON: EOF while parsing an object at line 1 column 1"),
        ('{"number": "secret"}', "number: Input should be a valid integer"),
    ],
)
def test_a_damaged_record_says_what_is_wrong_and_what_to_do(
    store: StudyFolder, damage: str, said: str
) -> None:
    store.save_trial(trial_record(0))
    path = store.trial_folder(0) / "trial.json"
    path.write_text(damage, encoding="utf-8")
    with pytest.raises(StoreError) as caught:
        store.load_trials()
    assert f"({said}" in str(caught.value)
    assert str(caught.value).endswith(
        f" Restore the file, or make it again: lora-tune doctor {store.path} --rebuild"
    )
    assert "secret" not in str(caught.value)


def test_a_record_that_was_cut_short_is_damaged_at_any_length(store: StudyFolder) -> None:
    store.save_trial(trial_record(0))
    path = store.trial_folder(0) / "trial.json"
    whole = path.read_bytes()
    for length in range(0, len(whole.rstrip()), 97):
        path.write_bytes(whole[:length])
        with pytest.raises(StoreError, match="cannot be read as a study record"):
            store.load_trials()


def test_a_folder_without_a_study_says_how_to_start_one(store: StudyFolder) -> None:
    with pytest.raises(StoreError) as caught:
        store.snapshot()
    assert str(caught.value) == (
        f"{store.path}: no {LOCK_FILE}, so no study has been started here. "
        "Start one with: lora-tune run STUDY.toml"
    )


# Ownership.


def test_a_second_owner_is_refused_and_told_who_holds_the_study(store: StudyFolder) -> None:
    with held_by_another_process(store.path) as other:
        with pytest.raises(StoreError) as caught, store.owned():
            pytest.fail("owned by two processes")
        before, _, after = str(caught.value).partition(", started ")
        assert before == (
            f"{store.path}: this study is being run by another process "
            f"(pid {other.pid} on {socket.gethostname()}"
        )
        since, _, after = after.partition("). ")
        assert abs(datetime.fromisoformat(since) - datetime.now(UTC)) < timedelta(minutes=2)
        assert after == "Wait for it, or stop it and run the same command again."
        assert (store.path / OWNER_FILE).exists()


def test_a_killed_owner_leaves_the_study_free(store: StudyFolder) -> None:
    with held_by_another_process(store.path) as other:
        other.kill()
        other.wait()
        with store.owned():
            owner = (store.path / OWNER_FILE).read_text(encoding="utf-8")
            assert owner.startswith(f"pid {os.getpid()} on {socket.gethostname()}, started 20")


def test_an_owner_that_is_done_lets_the_next_one_in(store: StudyFolder) -> None:
    for _ in range(2):
        with store.owned():
            store.save_runtime(1.0)
    assert store.path.is_dir()


def test_a_study_that_wrote_nothing_leaves_no_folder(tmp_path: Path) -> None:
    store = StudyFolder(tmp_path / "reports" / "new")
    with suppress(RuntimeError), store.owned():
        assert store.path.is_dir()
        raise RuntimeError("failed before anything was written")
    assert not store.path.exists()


def test_a_study_that_wrote_something_keeps_it(tmp_path: Path) -> None:
    store = StudyFolder(tmp_path / "new")
    with suppress(RuntimeError), store.owned():
        store.save_lock(study_lock())
        raise RuntimeError("failed later")
    assert store.load_lock() == study_lock()


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder", encoding="utf-8")
    store = StudyFolder(tmp_path / "file" / "study")
    with pytest.raises(StoreError, match="cannot be written") as caught, store.owned():
        pytest.fail("owned a folder below a file")
    assert str(store.path) in str(caught.value)


def test_losses_keep_all_their_digits(store: StudyFolder) -> None:
    store.save_confirmation(confirmation())
    found = store.load_confirmation()
    assert found is not None
    assert found.runs[0].evaluation is not None
    assert found.runs[0].evaluation.loss_sums == evaluation().loss_sums
