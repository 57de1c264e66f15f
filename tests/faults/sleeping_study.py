"""A study of sleeping workers as a program of its own: real ladder, store, database and children.

    python sleeping_study.py FOLDER [--workers N] [--lanes N] [--trials N] ...

The same command goes on with the study, as ``lora-tune run`` does. ``--workers 0``: no children, all lanes
in this process, for the table that the others are compared with.
"""

import argparse
import os
import sys
from pathlib import Path

from table_worker import TableTask, TableWorker

from lora_tune.errors import LoraTuneError
from lora_tune.executors.process import PoolSettings, ProcessExecutor
from lora_tune.records import TrialRecord
from lora_tune.store.database import open_optuna_study
from lora_tune.store.folder import DATABASE, StudyFolder

RUNGS = (6, 16, 30)


class _Records:
    """The trials of a study folder, as ``table_study`` wants them."""

    def __init__(self, store: StudyFolder) -> None:
        self.records: dict[int, TrialRecord] = {r.number: r for r in store.load_trials()}
        self.save = store.save_trial


def main(options: argparse.Namespace) -> None:
    """Run the study to its finalists, or go on with it."""
    from table_study import make_ladder  # of tests/search, which is not on every process's path

    options.folder.mkdir(parents=True, exist_ok=True)
    os.chdir(options.folder)  # the jobs of the table name folders below it
    store = StudyFolder(Path("."))
    task = TableTask(
        folder=Path("."),
        step_s=options.step_s,
        jitter_s=options.jitter_s,
        save_every=options.save_every,
        deadly=tuple(options.deadly),
        deadly_step=3,
        fails_to_open="crash" if options.does_not_open else "",
    )
    with store.owned():
        store.tidy()
        records = _Records(store)
        study = open_optuna_study(
            Path(DATABASE).absolute(), name="table", num_records=len(records.records)
        )
        slots = options.workers * options.lanes or options.slots
        ladder = make_ladder(
            study,
            records,  # type: ignore[arg-type]
            num_trials=options.trials,
            window=slots + max(1, slots // 2),
            rungs=RUNGS,
            half_step=False,
        )
        if not options.workers:
            worker = TableWorker(task)
            worker.max_lanes = slots
            train(ladder, worker)
            ladder.finalists(2)
            return
        pool = ProcessExecutor(
            PoolSettings(
                workers=options.workers,
                lanes=options.lanes,
                log_folder=Path("logs"),
                first_pause_s=0.02,
            ),
            note=lambda text: print(text, flush=True),
        )
        try:
            pool.open(task)
            pool.hire(task)
            train(ladder, pool)
        finally:
            pool.close()
        store.tidy()
        ladder.finalists(2)


def train(ladder: object, executor: object) -> None:
    """Ask, train, record: what the tuner does, without what it imports."""
    while True:
        for job in ladder.next_jobs(executor.free_slots):  # type: ignore[attr-defined]
            executor.submit(job)  # type: ignore[attr-defined]
        if not executor.busy:  # type: ignore[attr-defined]
            return
        for outcome in executor.wait():  # type: ignore[attr-defined]
            ladder.take(outcome)  # type: ignore[attr-defined]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--lanes", type=int, default=1)
    parser.add_argument("--slots", type=int, default=1)  # of a study without children
    parser.add_argument("--trials", type=int, default=8)
    parser.add_argument("--step-s", type=float, default=0.001)
    parser.add_argument("--jitter-s", type=float, default=0.0)
    parser.add_argument("--save-every", type=int, default=4)
    parser.add_argument("--deadly", type=int, nargs="*", default=())
    parser.add_argument("--does-not-open", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    try:
        main(_options())
    except LoraTuneError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
