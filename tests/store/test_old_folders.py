"""Folders of other versions: an older one opens with defaults, a newer one is refused in one sentence."""

import json
from pathlib import Path

import pytest
from study_records import confirmation, study_lock, trial_record

from lora_tune.errors import StoreError
from lora_tune.records import TrialState
from lora_tune.store.database import close_study, open_optuna_study
from lora_tune.store.folder import FORMAT, LOCK_FILE, OWNER_FILE, StudyFolder

# What later versions added, by file; an older version wrote none of it.
ADDED_TO_LOCK = ("format", "eval_rows", "study_plan", "forecast")
ADDED_TO_PLAN = ("capacity_bytes", "probe_readings", "probe_s", "probe_cut", "workers")
ADDED_TO_TRIAL = ("span", "penalty", "repeats")
ADDED_TO_CONFIRMATION = ("base_metrics", "clusters", "refit")


@pytest.fixture
def old(tmp_path: Path) -> StudyFolder:
    """A folder as the first version left it: no format, no spans, no text in the lock, no later files."""
    store = StudyFolder(tmp_path / "old")
    store.path.mkdir()
    store.save_lock(study_lock())
    store.save_trial(trial_record(0))
    store.save_trial(trial_record(1, TrialState.DIVERGED))
    store.save_confirmation(confirmation())
    take_out(
        store.path / LOCK_FILE, ADDED_TO_LOCK, {"plan": ADDED_TO_PLAN, "model": ("base_bytes",)}
    )
    for number in range(2):
        path = store.trial_folder(number) / "trial.json"
        take_out(path, ADDED_TO_TRIAL)
        trial = json.loads(path.read_text())
        for result in trial["rungs"]:
            result.pop("span", None)
        path.write_text(json.dumps(trial))
    take_out(store.path / "confirmation.json", ADDED_TO_CONFIRMATION)
    (store.path / OWNER_FILE).touch()
    return store


def take_out(
    path: Path, keys: tuple[str, ...], inside: dict[str, tuple[str, ...]] | None = None
) -> None:
    values = json.loads(path.read_text())
    for key in keys:
        values.pop(key, None)
    for section, names in (inside or {}).items():
        for name in names:
            values[section].pop(name, None)
    path.write_text(json.dumps(values))


def test_an_older_folder_opens_with_defaults(old: StudyFolder) -> None:
    snapshot = old.snapshot()
    assert snapshot.lock.name == "docstrings"
    assert (snapshot.lock.eval_rows, snapshot.lock.study_plan) == ((), None)
    assert (snapshot.lock.plan.workers, snapshot.lock.plan.probe_readings) == (1, ())
    assert [trial.state for trial in snapshot.trials] == [TrialState.COMPLETE, TrialState.DIVERGED]
    assert snapshot.trials[0].rungs[0].span is None
    assert snapshot.trials[0].rungs[0] == trial_record(0).rungs[0]
    assert snapshot.confirmation is not None
    assert snapshot.confirmation.clusters == ()
    assert (snapshot.behaviour, snapshot.wall_s, snapshot.adapter_bytes) == (None, 0.0, 0)


def test_an_older_folder_can_be_owned_and_is_written_as_of_now(old: StudyFolder) -> None:
    with old.owned():
        lock = old.load_lock()
        assert lock is not None
        old.save_lock(lock)
    assert json.loads((old.path / LOCK_FILE).read_text())["format"] == FORMAT


def test_an_older_database_of_the_rollback_journal_opens(tmp_path: Path) -> None:
    import optuna

    path = tmp_path / "study.db"
    storage = optuna.storages.RDBStorage(f"sqlite:///{path}")
    study = optuna.create_study(storage=storage, study_name="old")
    study.tell(study.ask({"x": optuna.distributions.FloatDistribution(0, 1)}), 1.0)
    storage.engine.dispose()
    study = open_optuna_study(path, name="old", num_records=1)
    assert [trial.value for trial in study.trials] == [1.0]
    close_study(study)


def test_a_newer_folder_is_refused_in_one_sentence_before_anything_is_misread(
    old: StudyFolder,
) -> None:
    path = old.path / LOCK_FILE
    newer = {"format": FORMAT + 1, "study": "kept otherwise there"}
    path.write_text(json.dumps(newer))
    for read in (old.load_lock, old.snapshot):
        with pytest.raises(StoreError) as caught:
            read()
        assert str(caught.value) == (
            f"{path}: written by a newer lora-tune (format {FORMAT + 1}; this one knows format {FORMAT}). "
            "Upgrade lora-tune to go on with this study or to read it."
        )
    assert json.loads(path.read_text()) == newer
