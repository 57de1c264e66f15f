"""Damaged databases and records: found at the start, said in one message, and made again from each other.

The study is a real one, in a real folder, with real Optuna; only its losses come from a table. A rebuilt
study has to end as one that was never damaged.
"""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from campaign_results import record
from table_folder import NUM_TRIALS, begin, optuna_of, run_on, table_lock

from lora_tune.commands.doctor import doctor, examine
from lora_tune.errors import StoreError
from lora_tune.records import TrialRecord, TrialState
from lora_tune.search.restoring import SearchRecord
from lora_tune.store.database import BESIDE, check_database, damage_of
from lora_tune.store.folder import DATABASE, StudyFolder
from lora_tune.store.origin import resolved_spec

SECTOR = 512
HALFWAY = 8  # results


class Template(NamedTuple):
    """A study folder to copy, with what its database and records hold."""

    folder: Path
    table: list[tuple[object, ...]]
    records: list[TrialRecord]

    def copy(self, target: Path) -> StudyFolder:
        shutil.copytree(self.folder, target)
        return StudyFolder(target)


@pytest.fixture(scope="module")
def halfway(tmp_path_factory: pytest.TempPathFactory) -> Template:
    """A study that was killed in the middle of its first rung."""
    store = begin(tmp_path_factory.mktemp("halfway") / "table", table_lock())
    assert not run_on(store, table_lock(), most_takes=HALFWAY)
    return Template(store.path, optuna_of(store), store.load_trials())


@pytest.fixture(scope="module")
def finished(halfway: Template, tmp_path_factory: pytest.TempPathFactory) -> Template:
    """The same study, run to its end."""
    store = halfway.copy(tmp_path_factory.mktemp("finished") / "table")
    assert run_on(store, table_lock())
    return Template(store.path, optuna_of(store), store.load_trials())


# What can happen to a file. Each is told a generator with a seed.


def cut(path: Path, rng: random.Random) -> None:
    path.write_bytes(path.read_bytes()[: rng.randrange(1, path.stat().st_size - 4096)])


def zero_pages(path: Path, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    for _ in range(3):
        start = 4096 * rng.randrange(1, len(content) // 4096)
        content[start : start + 4096] = bytes(4096)
    path.write_bytes(content)


def flip_header(path: Path, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[rng.randrange(16)] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def flip_sectors(path: Path, rng: random.Random) -> None:
    """Flip every bit of some sectors in use; what lies in none of SQLite's cells nobody would miss."""
    content = bytearray(path.read_bytes())
    used = [at for at in range(0, len(content), SECTOR) if any(content[at : at + SECTOR])]
    for at in rng.sample(used[1:], 6):
        content[at : at + SECTOR] = bytes(byte ^ 0xFF for byte in content[at : at + SECTOR])
    path.write_bytes(content)


def empty(path: Path, rng: random.Random) -> None:
    path.write_bytes(b"")


def noise(path: Path, rng: random.Random) -> None:
    path.write_bytes(rng.randbytes(path.stat().st_size))


def remove(path: Path, rng: random.Random) -> None:
    path.unlink()


def wrong_digit(path: Path, rng: random.Random) -> None:
    """Change a loss in a database that stays sound: SQLite has no checksums."""
    import sqlite3

    connection = sqlite3.connect(path)
    number = rng.randrange(3)
    connection.execute(
        "UPDATE trial_values SET value = value + 0.1 WHERE trial_value_id = ?", (number + 1,)
    )
    connection.commit()
    connection.close()


DAMAGES = (cut, zero_pages, flip_header, flip_sectors, empty, noise, remove, wrong_digit)


def damage_and_rebuild(
    template: Template, target: Path, damage: Callable[[Path, random.Random], None], seed: int
) -> StudyFolder:
    """Damage a database; see it found, said once, left alone; make it again, the old one aside."""
    store = template.copy(target)
    database = store.path / DATABASE
    damage(database, random.Random(seed))
    damaged = database.read_bytes() if database.exists() else None
    with pytest.raises(StoreError) as caught:
        run_on(store, table_lock())
    message = str(caught.value)
    lock = table_lock()
    search = SearchRecord(resolved_spec(lock, store.path), lock)
    with pytest.raises(StoreError) as caught:  # as a run does before it loads the base
        check_database(store, name="table", storage=None, differences=search.differences)
    assert str(caught.value) == message
    assert message.startswith(f"{database}: ")
    assert message.endswith(f"lora-tune doctor {store.path} --rebuild")
    assert "\n" not in message
    assert (database.read_bytes() if database.exists() else None) == damaged
    found = examine(store)
    assert [finding.path for finding in found.findings] == [DATABASE] * len(found.findings) != []
    assert doctor(str(store.path), fix=False, rebuild=True, as_json=False)
    aside = store.path / f"{DATABASE}.damaged-1"
    assert (aside.read_bytes() if aside.exists() else None) == damaged
    assert optuna_of(store) == template.table
    assert store.load_trials() == template.records
    return store


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_database_of_a_finished_study_is_found_and_made_again_as_it_was(
    finished: Template, tmp_path: Path, damage: Callable[[Path, random.Random], None]
) -> None:
    damage_and_rebuild(finished, tmp_path / "table", damage, seed=1)


def test_a_rebuilt_study_goes_on_as_if_nothing_had_happened(
    halfway: Template, finished: Template, tmp_path: Path
) -> None:
    store = damage_and_rebuild(halfway, tmp_path / "table", cut, seed=2)
    assert run_on(store, table_lock())
    assert optuna_of(store) == finished.table
    assert store.load_trials() == finished.records


@pytest.mark.campaign
def test_twenty_damaged_databases(halfway: Template, finished: Template, tmp_path: Path) -> None:
    rng, trials = random.Random(7), 0
    for number in range(20):
        template = (halfway, finished)[number % 2]
        damage = DAMAGES[number % len(DAMAGES)]
        folder = tmp_path / f"{number}"
        store = damage_and_rebuild(template, folder, damage, seed=rng.randrange(2**32))
        assert run_on(store, table_lock())
        assert optuna_of(store) == finished.table
        assert store.load_trials() == finished.records
        trials += len(template.records)
    record("damaged-databases", damages=20, found=20, rebuilt=20, trials=trials, trials_lost=0)


@pytest.mark.campaign
@pytest.mark.parametrize("sampler", ["tpe", "gp", "random", "grid"])
def test_a_study_whose_database_is_lost_after_any_result_ends_in_the_same_table(
    tmp_path: Path, sampler: str
) -> None:
    lock = table_lock(sampler=sampler)
    undisturbed = begin(tmp_path / "undisturbed", lock)
    run_on(undisturbed, lock)
    store, ended = begin(tmp_path / "table", lock), False
    while not ended:
        ended = run_on(store, lock, most_takes=1)
        before = optuna_of(store)
        (store.path / DATABASE).unlink()
        assert doctor(str(store.path), fix=False, rebuild=True, as_json=False)
        assert [trial[:6] for trial in optuna_of(store)] == [trial[:6] for trial in before]
    assert optuna_of(store) == optuna_of(undisturbed)
    assert store.load_trials() == undisturbed.load_trials()


def test_a_flipped_sector_is_found_or_changes_nothing(finished: Template, tmp_path: Path) -> None:
    found = 0
    for seed in range(12):
        path = tmp_path / f"{seed}" / DATABASE
        path.parent.mkdir()
        shutil.copyfile(finished.folder / DATABASE, path)
        flip_sectors(path, random.Random(seed))
        found += damage_of(path) is not None
    assert found >= 10


def test_a_database_is_refused_though_its_log_is_whole(finished: Template, tmp_path: Path) -> None:
    store = finished.copy(tmp_path / "table")
    for suffix in BESIDE[1:]:
        (store.path / f"{DATABASE}{suffix}").write_bytes(b"x" * 100)
    (store.path / DATABASE).write_bytes(b"")
    with pytest.raises(StoreError, match="is empty"):
        run_on(store, table_lock())
    assert doctor(str(store.path), fix=False, rebuild=True, as_json=False)
    for suffix in BESIDE[1:]:
        assert (store.path / f"{DATABASE}.damaged-1{suffix}").read_bytes() == b"x" * 100
        assert not (store.path / f"{DATABASE}{suffix}").exists()


# Records.


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:300])


def change_a_loss(path: Path) -> None:
    values = json.loads(path.read_text())
    values["rungs"][0]["eval_loss"] -= 0.5
    path.write_text(json.dumps(values))


def change_the_rank(path: Path) -> None:
    values = json.loads(path.read_text())
    values["config"]["rank"] += 1
    path.write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("which", "damage"),
    [
        ("trained", truncate),
        ("trained", change_a_loss),
        ("trained", change_the_rank),
        ("trained", Path.unlink),
        ("last", Path.unlink),
    ],
)
def test_a_damaged_record_is_found_and_its_trial_is_trained_again(
    finished: Template, tmp_path: Path, which: str, damage: Callable[[Path], None]
) -> None:
    trained = [r.number for r in finished.records if r.state is TrialState.COMPLETE]
    number = trained[0] if which == "trained" else NUM_TRIALS - 1
    store = finished.copy(tmp_path / "table")
    path = store.trial_folder(number) / "trial.json"
    damage(path)
    with pytest.raises(StoreError, match="--rebuild"):
        run_on(store, table_lock())
    found = examine(store)
    assert str(path.relative_to(store.path)) in {finding.path for finding in found.findings}
    assert doctor(str(store.path), fix=False, rebuild=True, as_json=False)
    assert run_on(store, table_lock())
    assert store.load_trials() == [
        again if again.number == number else before
        for before, again in zip(finished.records, store.load_trials(), strict=True)
    ]
    again, before = store.load_trial(number), finished.records[number]
    assert (again.config, again.state, again.rungs) == (before.config, before.state, before.rungs)
    assert optuna_of(store) == finished.table


def test_how_a_trial_ended_early_comes_back_from_the_database(
    finished: Template, tmp_path: Path
) -> None:
    ended = (TrialState.DIVERGED, TrialState.INFEASIBLE, TrialState.FAILED)
    store = finished.copy(tmp_path / "table")
    lost = [record for record in finished.records if record.state in ended]
    assert len({record.state for record in lost}) > 1
    for record_ in lost:
        (store.trial_folder(record_.number) / "trial.json").unlink()
    assert doctor(str(store.path), fix=False, rebuild=True, as_json=False)
    for record_ in lost:
        again = store.load_trial(record_.number)
        assert (again.state, again.reason, again.penalty) == (
            record_.state,
            record_.reason,
            record_.penalty,
        )
    assert optuna_of(store) == finished.table  # it was right, and was left alone
    assert not (store.path / f"{DATABASE}.damaged-1").exists()


def test_where_record_and_database_are_gone_it_is_said_and_nothing_is_changed(
    finished: Template, tmp_path: Path
) -> None:
    store = finished.copy(tmp_path / "table")
    (store.trial_folder(3) / "trial.json").write_text("{")
    (store.path / DATABASE).write_bytes(b"no database")
    before = {path: path.read_bytes() for path in store.path.rglob("*") if path.is_file()}
    with pytest.raises(StoreError) as caught:
        doctor(str(store.path), fix=False, rebuild=True, as_json=False)
    assert "trials/0003/trial.json cannot be read (Invalid JSON" in str(caught.value)
    assert "is no SQLite database" in str(caught.value)
    assert "Nothing was changed." in str(caught.value)
    after = {path: path.read_bytes() for path in store.path.rglob("*") if path.is_file()}
    assert after == before
