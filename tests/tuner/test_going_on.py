"""Studies that were stopped, raised or tidied up, and run again: they end as if nothing had happened."""

import contextlib
import os
import shutil
import signal
import sqlite3
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_end_to_end import STUDY, copy_of
from test_end_to_end import workplace as workplace  # the fixture

from lora_tune import tuner, worker
from lora_tune.assembly import proposing_seconds
from lora_tune.errors import Terminated
from lora_tune.records import Confirmation, Forecast, ProgressState, StudySnapshot
from lora_tune.signals import deferred, stoppable
from lora_tune.store.folder import StudyFolder
from lora_tune.study.loader import load_study
from lora_tune.tuner import run_study, train


class Stopping:
    """A view that stops the study at the first state of which ``when`` is true."""

    def __init__(self, when: Callable[[ProgressState], bool] = lambda state: False) -> None:
        self.when = when

    def update(self, state: ProgressState) -> None:
        if self.when(state):
            raise KeyboardInterrupt

    def note(self, text: str) -> None:
        pass


def run(folder: Path, view: Stopping | None = None, **changes: str) -> StudySnapshot:
    """Run the study of the folder; ``changes`` are lines of its file by their keys."""
    text = STUDY.format(quantization="none")
    for key, value in {"trials": "3", **changes}.items():
        lines = [line for line in text.splitlines() if line.startswith(f"{key} =")]
        text = text.replace(lines[0], f"{key} = {value}" if value else "")
    (folder / "going.toml").write_text(text)
    with contextlib.chdir(folder):
        snapshot = run_study(
            load_study(Path("going.toml")),
            study_file=Path("going.toml"),
            command="lora-tune run going.toml",
            view=view or Stopping(),
        )
    return replace(snapshot, folder=folder / snapshot.folder)


def stopped(folder: Path, when: Callable[[ProgressState], bool], **changes: str) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(folder, Stopping(when), **changes)


def outcome(confirmation: Confirmation | None) -> tuple[object, ...]:
    """What was decided, without times, which no two runs share."""
    assert confirmation is not None
    decision = confirmation.decision
    assert decision is not None
    losses = {score.candidate: score.seed_losses for score in decision.scores}
    return confirmation.candidates, decision.chosen, decision.verdict, decision.tied, losses


@pytest.fixture(scope="module")
def small(workplace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished study of three trials."""
    folder = copy_of(workplace, tmp_path_factory.mktemp("small") / "run")
    run(folder)
    return folder


@pytest.fixture(scope="module")
def raised(small: Path, tmp_path_factory: pytest.TempPathFactory) -> StudySnapshot:
    """The same, raised to eight trials."""
    folder = tmp_path_factory.mktemp("raised") / "run"
    shutil.copytree(small, folder)
    return run(folder, trials="8")


def test_a_raised_study_has_other_finalists_here(small: Path, raised: StudySnapshot) -> None:
    """What the other tests rest on."""
    before = StudyFolder(small / "reports" / "going").load_confirmation()
    assert before is not None
    assert raised.confirmation is not None
    assert before.candidates != raised.confirmation.candidates


STOPS: dict[str, Callable[[ProgressState], bool]] = {
    "in the search": lambda state: state.trials_done >= 5,
    "in the first run of the confirmation": lambda state: state.runs_total > 0,
    "before the last runs of the confirmation": lambda state: (
        state.runs_total - 3 < state.runs_done < state.runs_total
    ),
}


@pytest.mark.parametrize("stop", STOPS)
def test_a_raised_study_that_was_stopped_is_not_taken_for_the_finished_one(
    small: Path, raised: StudySnapshot, tmp_path: Path, stop: str
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(small, folder)
    stopped(folder, STOPS[stop], trials="8")
    again = run(folder, trials="8")
    assert len(again.trials) == len(raised.trials)
    assert outcome(again.confirmation) == outcome(raised.confirmation)


def test_a_raised_study_that_was_stopped_before_it_published_ships_the_new_adapter(
    small: Path, raised: StudySnapshot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    folder = tmp_path / "run"
    shutil.copytree(small, folder)
    with monkeypatch.context() as patch:
        patch.setattr(tuner, "_publish_adapter", interrupt)
        stopped(folder, lambda state: False, trials="8")
    run(folder, trials="8")
    name = "adapter/adapter_model.safetensors"
    shipped = (folder / "reports" / "going" / name).read_bytes()
    assert shipped != (small / "reports" / "going" / name).read_bytes()
    assert shipped == (raised.folder / name).read_bytes()


@pytest.mark.parametrize("gone", ["report.md", "adapter"])
def test_what_was_deleted_of_a_finished_study_is_made_again_without_training(
    small: Path, tmp_path: Path, gone: str
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(small, folder)
    path = folder / "reports" / "going" / gone
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    again = run(folder, Stopping(lambda state: bool(state.lanes)))
    assert path.exists()
    before = StudyFolder(small / "reports" / "going").load_confirmation()
    assert outcome(again.confirmation) == outcome(before)


def test_a_finished_study_whose_time_was_up_is_left_alone(
    workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        pytest.fail("the base of a finished study was loaded")

    folder = copy_of(workplace, tmp_path / "run")
    first = run(folder, trials="30\nmax_hours = 1e-6")
    assert len(first.trials) < 30
    monkeypatch.setattr(worker, "load_base", fail)
    assert run(folder, trials="30\nmax_hours = 1e-6") == first


def test_the_time_spent_is_on_disk_while_a_study_runs(workplace: Path, tmp_path: Path) -> None:
    folder = copy_of(workplace, tmp_path / "run")
    seen: list[float] = []

    def look(state: ProgressState) -> bool:
        if state.trials_done:
            seen.append(StudyFolder(folder / "reports" / "going").load_runtime())
        return bool(seen)

    stopped(folder, look)
    assert seen[0] > 0


def test_the_last_trial_begins_while_later_rungs_and_the_confirmation_still_fit(
    small: Path,
) -> None:
    snapshot = StudyFolder(small / "reports" / "going").snapshot()
    forecast = Forecast(
        tokens_per_s=100.0,
        measured=True,
        search_steps=800,
        confirmation_steps=300,
        search_s=700.0,
        evaluation_s=100.0,  # a second a step, with evaluation
        confirmation_s=300.0,
        load_s=0.0,
    )
    lock = replace(snapshot.lock, rungs=(20, 100), forecast=forecast)
    with contextlib.chdir(small):
        spec = load_study(Path("going.toml"))
    train = spec.train.model_copy(update={"cooldown_ratio": 0.1})
    search = spec.search.model_copy(update={"max_hours": 1.0})
    limited = spec.model_copy(update={"train": train, "search": search})
    assert proposing_seconds(spec, lock, num_trials=8) is None
    # of 8 trials 2 go on, from step 18 to 100; of 12 it is 3
    assert proposing_seconds(limited, lock, num_trials=8) == 3600 - 2 * 82 - 300
    assert proposing_seconds(limited, lock, num_trials=12) == 3600 - 3 * 82 - 300
    unknown = replace(lock, forecast=None)
    assert proposing_seconds(limited, unknown, num_trials=8) == 3600


class SignalInStatement:
    """Stands in for ``sqlite3.connect``: the reading of the statement with a number is met by a signal."""

    def __init__(self, number: int) -> None:
        self.left = number
        self.came_back = False
        self.connect = sqlite3.dbapi2.connect

    def __call__(self, *arguments: Any, **keys: Any) -> sqlite3.Connection:
        statement = self

        class Cursor(sqlite3.Cursor):
            def fetchall(self) -> list[object]:
                statement.left -= 1
                if statement.left == 0:
                    os.kill(os.getpid(), signal.SIGINT)
                    statement.came_back = True
                return super().fetchall()

        class Connection(sqlite3.Connection):
            def cursor(self, factory: Any = Cursor) -> Any:
                return super().cursor(factory)

        return self.connect(*arguments, **keys, factory=Connection)


@pytest.mark.parametrize("number", [8, 40])
def test_a_signal_in_the_middle_of_a_transaction_waits_for_its_end(
    workplace: Path,
    small: Path,
    tmp_path: Path,
    number: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = copy_of(workplace, tmp_path / "run")
    statement = SignalInStatement(number)
    with monkeypatch.context() as patch:
        patch.setattr(sqlite3.dbapi2, "connect", statement)
        with pytest.raises(KeyboardInterrupt), stoppable():
            run(folder)
    assert statement.came_back
    assert not caplog.records
    before = StudyFolder(small / "reports" / "going").load_confirmation()
    assert outcome(run(folder).confirmation) == outcome(before)


class Evaluating:
    """Stands in for source and executor of jobs that are only evaluated; the first is met by a signal."""

    def __init__(self) -> None:
        self.left, self.running, self.taken = 3, False, 0
        self.free_slots = 1

    def next_jobs(self, count: int) -> list[str]:
        return ["job"] * min(count, self.left)

    def submit(self, job: str) -> None:
        self.left, self.running = self.left - 1, True

    @property
    def busy(self) -> bool:
        return self.running

    def wait(self) -> list[str]:
        if not self.taken:
            os.kill(os.getpid(), signal.SIGTERM)
        self.running = False
        return ["outcome"]

    def take(self, outcome: str) -> None:
        self.taken += 1

    def save_states(self) -> None:
        pass

    def ended(self) -> list[str]:
        return []


def test_jobs_without_a_training_step_are_stopped_between_two_of_them() -> None:
    both: Any = Evaluating()

    def evaluate() -> None:
        with stoppable(), deferred():
            train(both, both, told=lambda: None, track=lambda outcome: None)

    with pytest.raises(Terminated):
        evaluate()
    assert (both.taken, both.left) == (1, 2)
