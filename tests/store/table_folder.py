"""A study folder on disk whose trials train nothing: losses come from the table of ``table_study``."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import optuna
from study_records import study_lock
from table_study import BUDGET_BYTES, SEED, TableExecutor, drive, make_anchors, predict, target_sets

from lora_tune.records import StudyLock, StudyPlan
from lora_tune.search.ladder import Ladder, LadderPlan
from lora_tune.search.proposals import Proposer
from lora_tune.search.restoring import SearchRecord
from lora_tune.store.database import open_study, read_trials
from lora_tune.store.folder import DATABASE, StudyFolder
from lora_tune.store.origin import resolved_spec
from lora_tune.study.loader import validate_study

NUM_TRIALS = 12
RANKS = (4, 8, 16, 32, 64, 128)


def table_lock(*, sampler: str = "tpe", storage: str | None = None) -> StudyLock:
    """Return the lock of a study on the table, as a first start would have written it."""
    values: dict[str, dict[str, object]] = {
        "study": {"name": "table", "seed": SEED},
        "model": {"base": "m"},
        "data": {"train": "rows.jsonl"},
        "train": {"effective_batch_size": 16},
        "space": {"rank": list(RANKS)},
        "search": {"sampler": sampler, "startup_trials": 4},
        "run": {} if storage is None else {"storage": storage},
    }
    spec = validate_study(values, source=Path("table.toml"))
    lock = study_lock("table")
    return replace(
        lock,
        study_file="table.toml",
        spec=spec.model_dump(mode="json"),
        data=replace(lock.data, num_train=5000),
        plan=replace(lock.plan, lanes=2, budget_bytes=BUDGET_BYTES),
        rungs=(10, 40),
        eval_rows=(),
        target_sets=target_sets(),
        study_plan=StudyPlan(
            num_train=5000,
            num_selection=5,
            num_confirmation=5,
            total_steps=40,
            rungs=(10, 40),
            num_trials=NUM_TRIALS,
            finalists=2,
            seeds=2,
            search_steps=1000,
            confirmation_steps=100,
        ),
    )


def begin(folder: Path, lock: StudyLock) -> StudyFolder:
    """Write a folder in which a study has been planned and nothing was tried."""
    folder.mkdir(parents=True)
    store = StudyFolder(folder)
    store.save_lock(lock)
    return store


def open_ladder(
    store: StudyFolder,
    lock: StudyLock,
    *,
    num_trials: int = NUM_TRIALS,
    storage: str | None = None,
    note: Callable[[str], None] = print,
) -> tuple[Ladder, optuna.Study]:
    """Return the ladder of a process that was just started on a folder which it owns."""
    spec = resolved_spec(lock, store.path)
    search = SearchRecord(spec, lock)
    records = store.load_trials()
    study = open_study(
        store, lock, records, storage=storage, differences=search.differences, note=note
    )
    ladder = Ladder(
        LadderPlan(
            num_trials=num_trials,
            rungs=lock.rungs,
            warmup_steps=2,
            cooldown_ratio=spec.train.cooldown_ratio,
            window=search.plan.window,
            budget_bytes=BUDGET_BYTES,
        ),
        search.space,
        Proposer(
            study,
            search.space,
            make_anchors(search.space, effective_batch_size=16, num_train=5000),
            sampler=spec.search.sampler,
            startup_trials=spec.search.startup_trials,
            seed=SEED,
        ),
        records=records,
        save=store.save_trial,
        predict=predict,
        trial_folder=store.trial_folder,
    )
    return ladder, study


def run_on(
    store: StudyFolder,
    lock: StudyLock,
    *,
    most_takes: int | None = None,
    num_trials: int = NUM_TRIALS,
    storage: str | None = None,
    note: Callable[[str], None] = print,
) -> bool:
    """Go on with a study until it ends, or until so many results; return whether it ended."""
    with store.owned():
        ladder, _ = open_ladder(store, lock, num_trials=num_trials, storage=storage, note=note)
        ended = drive(ladder, TableExecutor(2), most_takes=most_takes)
        if ended:
            ladder.finalists(2)
        return ended


def optuna_of(store: StudyFolder) -> list[tuple[object, ...]]:
    """Return all that the database has of the trials but the times, without changing it."""
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
        for t in read_trials(store.path / DATABASE, name="table")
    ]
