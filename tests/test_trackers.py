"""Trackers beside the records of a study: what they were told is what the records say, and nothing twice.

TensorBoard's files are read back by TensorBoard. The others run in a process of their own, where no
connection to a network is let through; those that are not installed are skipped by name.
"""

import contextlib
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import closing
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_end_to_end import STUDY, copy_of
from test_end_to_end import workplace as workplace  # the fixture
from torch.utils.tensorboard import SummaryWriter

from lora_tune import signals
from lora_tune.errors import MachineError, Terminated
from lora_tune.records import LaneOutcome, Point, ProgressState, StudySnapshot, TrialState
from lora_tune.search.plan import hold_step_of
from lora_tune.store.folder import StudyFolder
from lora_tune.study.loader import load_study
from lora_tune.trackers import check_trackers, open_trackers, writer
from lora_tune.tuner import run_study

NETWORK_GUARD = """
import sys

def refuse(event, arguments):
    if event in ("socket.getaddrinfo", "socket.gethostbyname"):
        raise RuntimeError(f"{event} {arguments}")
    if event in ("socket.connect", "socket.sendto", "socket.bind") and isinstance(arguments[1], tuple):
        raise RuntimeError(f"{event} {arguments[1]}")

sys.addaudithook(refuse)
"""


@dataclass
class Listening:
    """A view that keeps the notes and may stop the study."""

    stop_after: int | None = None  # trials that have a result
    notes: list[str] = field(default_factory=list)

    def update(self, state: ProgressState) -> None:
        if self.stop_after is not None and state.trials_done >= self.stop_after:
            raise KeyboardInterrupt

    def note(self, text: str) -> None:
        self.notes.append(text)


def write_study(folder: Path, trackers: str) -> None:
    text = STUDY.format(quantization="none").replace("trials = 8", "trials = 3")
    text = text.replace("seeds = 2", "seeds = 1\nsamples = 0")
    (folder / "tracked.toml").write_text(
        text.replace('device = "cpu"', f'device = "cpu"\ntrackers = {trackers}')
    )


def run(folder: Path, view: Listening) -> StudySnapshot:
    with contextlib.chdir(folder):
        snapshot = run_study(
            load_study(Path("tracked.toml")),
            study_file=Path("tracked.toml"),
            command="lora-tune run tracked.toml",
            view=view,
        )
    return replace(snapshot, folder=folder / snapshot.folder)


@pytest.fixture(scope="module")
def tracked(workplace: Path, tmp_path_factory: pytest.TempPathFactory) -> StudySnapshot:
    """A study with TensorBoard that was stopped in its search, went on, and was then raised by a trial."""
    folder = copy_of(workplace, tmp_path_factory.mktemp("tracked") / "run")
    write_study(folder, '["tensorboard"]')
    with pytest.raises(KeyboardInterrupt):
        run(folder, Listening(stop_after=2))
    run(folder, Listening())
    toml = folder / "tracked.toml"
    toml.write_text(toml.read_text().replace("trials = 3", "trials = 4"))
    view = Listening()
    snapshot = run(folder, view)
    assert not any("tensorboard" in note for note in view.notes)
    return snapshot


class Events:
    """A run of TensorBoard as TensorBoard reads it."""

    def __init__(self, snapshot: StudySnapshot, run: str) -> None:
        folder = snapshot.folder / "tensorboard" / run
        self.read = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0})
        self.read.Reload()

    def scalars(self, tag: str) -> list[tuple[int, float]]:
        if tag not in self.read.Tags()["scalars"]:
            return []
        return [(event.step, event.value) for event in self.read.Scalars(tag)]

    def texts(self, tag: str) -> list[str]:
        events = self.read.Tensors(f"{tag}/text_summary")
        return [event.tensor_proto.string_val[0].decode() for event in events]


def as_float32(steps: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """TensorBoard keeps values in single precision."""
    return [(step, float(np.float32(value))) for step, value in steps]


def test_every_point_and_evaluation_of_a_trial_is_there_once(tracked: StudySnapshot) -> None:
    assert len(tracked.trials) == 4
    for record in tracked.trials:
        events = Events(tracked, f"trial-{record.number:04d}")
        train: list[tuple[int, Point]] = []
        cooldown: list[tuple[int, Point]] = []
        for result in record.rungs:
            hold_step = hold_step_of(result.steps, 0.2)
            for point in result.points:
                (train if point.step <= hold_step else cooldown).append((point.step, point))
        for branch, points in (("train", train), ("cooldown", cooldown)):
            for name, key in (
                ("loss", "train_loss"),
                ("learning_rate", "learning_rate"),
                ("grad_norm", "grad_norm"),
            ):
                expected = as_float32([(step, getattr(point, key)) for step, point in points])
                assert events.scalars(f"{branch}/{name}") == expected
        evaluations = [(result.steps, result.eval_loss) for result in record.rungs]
        assert events.scalars("eval/loss") == as_float32(evaluations)
        peaks = [(result.steps, result.peak_bytes / 1024**3) for result in record.rungs]
        assert events.scalars("cost/peak_gib") == as_float32(peaks)


def test_the_training_curve_of_a_trial_never_goes_back(tracked: StudySnapshot) -> None:
    """A rung goes on from before the cool-down of the last one, whose points are a curve of their own."""
    promoted = [record for record in tracked.trials if len(record.rungs) > 1]
    assert promoted
    for record in promoted:
        steps = [s for s, _ in Events(tracked, f"trial-{record.number:04d}").scalars("train/loss")]
        assert all(earlier < later for earlier, later in pairwise(steps))


def test_the_configuration_is_a_trials_hyperparameters(tracked: StudySnapshot) -> None:
    from tensorboard.plugins.hparams import plugin_data_pb2

    for record in tracked.trials:
        metadata = Events(tracked, f"trial-{record.number:04d}").read.SummaryMetadata(
            "_hparams_/session_start_info"
        )
        data = plugin_data_pb2.HParamsPluginData.FromString(metadata.plugin_data.content)
        told = data.session_start_info.hparams
        assert told["rank"].number_value == record.config.rank
        assert told["learning_rate"].number_value == record.config.learning_rate
        assert told["target_set"].string_value == record.config.target_set
        assert told["study"].string_value == "tracked"


def test_states_confirmation_and_decision_are_there(tracked: StudySnapshot) -> None:
    for record in tracked.trials:
        assert Events(tracked, f"trial-{record.number:04d}").texts("state")[-1] == record.state
    confirmation = tracked.confirmation
    assert confirmation is not None
    assert confirmation.decision is not None
    for done in confirmation.runs:
        assert done.evaluation is not None
        events = Events(tracked, f"confirm-{done.candidate.replace(' ', '-')}-seed-{done.seed}")
        steps = confirmation.candidate(done.candidate).steps
        assert events.scalars("eval/loss") == as_float32([(steps, done.evaluation.mean_loss)])
        assert events.scalars("train/loss")[0][0] == 1
    events = Events(tracked, "study")
    assert events.texts("chosen")[-1] == confirmation.decision.chosen
    [chosen] = [
        s for s in confirmation.decision.scores if s.candidate == confirmation.decision.chosen
    ]
    assert events.scalars("confirmed/loss")[-1][1] == pytest.approx(chosen.loss, rel=1e-6)


def test_a_finished_study_writes_nothing_again(tracked: StudySnapshot, tmp_path: Path) -> None:
    folder = tmp_path / "study"
    shutil.copytree(tracked.folder, folder)
    before = sorted(path.name for path in folder.rglob("events*"))
    trackers = open_trackers(
        ("tensorboard",), tracked.lock, folder, cooldown_ratio=0.2, note=pytest.fail
    )
    trackers.catch_up(tracked.trials, tracked.confirmation)
    trackers.close()
    assert sorted(path.name for path in folder.rglob("events*")) == before


def test_a_trial_that_diverged_shows_its_points_and_why(
    tracked: StudySnapshot, tmp_path: Path
) -> None:
    points = tuple(
        Point(step=step, train_loss=3.0**step, learning_rate=0.5, grad_norm=9.0, num_tokens=8)
        for step in (1, 2, 3)
    )
    record = replace(
        tracked.trials[0], number=7, rungs=(), state=TrialState.DIVERGED, reason="loss 27 at step 3"
    )
    outcome = LaneOutcome(trial=7, rung=0, state=TrialState.DIVERGED, points=points)
    trackers = open_trackers(
        ("tensorboard",), tracked.lock, tmp_path, cooldown_ratio=0.2, note=pytest.fail
    )
    trackers.trial_ended(record, outcome)
    trackers.close()
    events = Events(replace(tracked, folder=tmp_path), "trial-0007")
    assert events.scalars("train/loss") == [(1, 3.0), (2, 9.0), (3, 27.0)]
    assert events.texts("state") == ["diverged"]
    assert events.texts("reason") == ["loss 27 at step 3"]


def test_a_tracker_that_fails_is_left_out_with_one_note(
    tracked: StudySnapshot, tmp_path: Path
) -> None:
    (tmp_path / "tensorboard").write_text("in the way")
    notes: list[str] = []
    trackers = open_trackers(
        ("tensorboard",), tracked.lock, tmp_path, cooldown_ratio=0.2, note=notes.append
    )
    trackers.catch_up(tracked.trials, tracked.confirmation)
    trackers.close()
    [note] = notes
    assert note.startswith("tensorboard is left out from here on (")
    assert "The study loses nothing by it" in note


def test_the_runs_of_a_tracker_that_fails_are_finished_all_the_same(
    tracked: StudySnapshot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk: the first value is refused, and so is the end of the run that had it."""
    closed: list[str] = []

    def refuse(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    def close(writer: SummaryWriter) -> None:
        closed.append(Path(writer.log_dir).name)
        refuse()

    running = [replace(record, state=TrialState.RUNNING) for record in tracked.trials]
    notes: list[str] = []
    trackers = open_trackers(
        ("tensorboard",), tracked.lock, tmp_path, cooldown_ratio=0.2, note=notes.append
    )
    trackers.catch_up(running[:2], None)
    monkeypatch.setattr(SummaryWriter, "add_scalar", refuse)
    monkeypatch.setattr(SummaryWriter, "close", close)
    trackers.catch_up(running, None)
    trackers.close()
    assert len(notes) == 1
    assert sorted(closed) == ["trial-0000", "trial-0001", "trial-0002"]


def test_a_tracker_that_hangs_does_not_hold_up_who_stops_the_study(
    tracked: StudySnapshot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    goes_on, hung = threading.Event(), threading.Event()

    def hang(_: SummaryWriter) -> None:
        hung.set()
        goes_on.wait(60)

    monkeypatch.setattr(SummaryWriter, "close", hang)
    monkeypatch.setattr(writer, "FINISH_S", 0.2)
    running = [replace(record, state=TrialState.RUNNING) for record in tracked.trials]
    trackers = open_trackers(
        ("tensorboard",), tracked.lock, tmp_path, cooldown_ratio=0.2, note=print
    )

    def stopped() -> None:
        with signals.stoppable(), signals.deferred(), closing(trackers):
            trackers.catch_up(running[:1], None)
            os.kill(os.getpid(), signal.SIGTERM)
            signals.check()

    began = time.monotonic()
    with pytest.raises(Terminated):
        stopped()
    assert time.monotonic() - began < 10
    assert hung.is_set()
    goes_on.set()
    for thread in threading.enumerate():
        if thread.name == writer.FINISHING:
            thread.join(10)


def copy_of_study(tracked: StudySnapshot, target: Path) -> Path:
    """Return a copy of the folder that the finished study was run in."""
    shutil.copytree(tracked.folder.parent.parent, target)
    return target


def test_a_tracker_added_to_a_finished_study_gets_what_is_on_record_without_training(
    tracked: StudySnapshot, tmp_path: Path
) -> None:
    folder = copy_of_study(tracked, tmp_path / "run")
    study, toml = folder / "reports" / "tracked", folder / "tracked.toml"
    named = toml.read_text()
    toml.write_text(named.replace('trackers = ["tensorboard"]', "trackers = []"))
    assert run(folder, Listening()).lock.spec["run"]["trackers"] == []
    shutil.rmtree(study / "tensorboard")
    (study / "trackers.json").unlink()
    toml.write_text(named)
    view = Listening(stop_after=0)  # nothing is trained: no state is shown
    again = run(folder, view)
    assert again.lock == tracked.lock
    for record in tracked.trials:
        events = Events(again, f"trial-{record.number:04d}")
        evaluations = [(result.steps, result.eval_loss) for result in record.rungs]
        assert events.scalars("eval/loss") == as_float32(evaluations)
    assert Events(again, "study").texts("chosen")
    before = sorted(path.name for path in study.rglob("events*"))
    run(folder, view)
    assert sorted(path.name for path in study.rglob("events*")) == before


def test_a_tracker_that_failed_is_tried_again_by_the_same_command(
    tracked: StudySnapshot, tmp_path: Path
) -> None:
    folder = copy_of_study(tracked, tmp_path / "run")
    study = folder / "reports" / "tracked"
    shutil.rmtree(study / "tensorboard")
    (study / "trackers.json").unlink()
    (study / "tensorboard").write_text("in the way")
    view = Listening()
    run(folder, view)
    assert any("tensorboard is left out" in note for note in view.notes)
    (study / "tensorboard").unlink()
    again = run(folder, Listening())
    assert Events(again, "trial-0000").scalars("eval/loss")


def test_a_study_stopped_while_a_tracker_sends_has_its_reports_and_its_time(
    workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(_: SummaryWriter) -> None:
        raise KeyboardInterrupt

    folder = copy_of(workplace, tmp_path / "run")
    write_study(folder, '["tensorboard"]')
    study, ended = folder / "reports" / "tracked", []

    class Ending(Listening):
        def update(self, state: ProgressState) -> None:
            if state.trials_done:
                ended.append(StudyFolder(study).load_runtime())
                raise RuntimeError("stopped")

    monkeypatch.setattr(SummaryWriter, "close", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(folder, Ending())
    assert (study / "report.md").is_file()
    assert StudyFolder(study).load_runtime() > ended[0]


def test_trackers_that_are_not_installed_are_refused_with_the_command_that_helps(
    tmp_path: Path, workplace: Path
) -> None:
    missing = [name for name in ("wandb", "mlflow") if find_spec(name) is None]
    if not missing:
        pytest.skip("wandb and mlflow are installed")
    with pytest.raises(
        MachineError, match=rf"run\.trackers names .*pip install {' '.join(missing)}"
    ):
        check_trackers(("tensorboard", *missing))
    folder = copy_of(workplace, tmp_path / "run")
    write_study(folder, json.dumps(missing))
    with pytest.raises(MachineError, match="pip install"):
        run(folder, Listening())
    assert not (folder / "reports").exists()


def test_a_folder_named_as_a_package_is_no_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if find_spec("wandb") is not None:
        pytest.skip("wandb is installed")
    (tmp_path / "wandb").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(MachineError, match="pip install wandb"):
        check_trackers(("wandb",))


def test_a_study_without_trackers_reaches_for_no_network(workplace: Path, tmp_path: Path) -> None:
    folder = copy_of(workplace, tmp_path / "run")
    write_study(folder, "[]")
    script = NETWORK_GUARD + "from lora_tune.cli import main\nsys.argv[0] = 'lora-tune'\nmain()\n"
    ended = subprocess.run(
        [sys.executable, "-c", script, "run", "tracked.toml"],
        cwd=folder,
        env={
            "PATH": "/usr/bin:/bin",
            "HOME": str(tmp_path),
            "OMP_NUM_THREADS": "1",
            "HF_TOKEN": "x" * 20,
        },
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    study = folder / "reports" / "tracked"
    assert StudyFolder(study).load_confirmation() is not None
    assert not {"tensorboard", "trackers.json", "wandb", "mlflow.db"} & {
        p.name for p in study.iterdir()
    }


CATCH_UP = (
    NETWORK_GUARD
    + """
from pathlib import Path
from lora_tune.store.folder import StudyFolder
from lora_tune.trackers import open_trackers

name, source, target = sys.argv[1:]
snapshot = StudyFolder(Path(source)).snapshot()
trackers = open_trackers(
    (name,), snapshot.lock, Path(target), cooldown_ratio=0.2, note=lambda text: sys.exit(text)
)
trackers.catch_up(snapshot.trials, snapshot.confirmation)
trackers.close()
"""
)


def catch_up(name: str, tracked: StudySnapshot, target: Path, **environ: str) -> None:
    """Write a finished study to a tracker, in a process that may not use a network, and once more."""
    target.mkdir()
    home = target.parent / "home"
    home.mkdir()
    for _ in range(2):
        ended = subprocess.run(
            [sys.executable, "-c", CATCH_UP, name, str(tracked.folder), str(target)],
            cwd=home,
            env={
                **{"PATH": "/usr/bin:/bin", "HOME": str(home), "HF_TOKEN": "x" * 20},
                **{"PYTHONPATH": os.environ.get("PYTHONPATH", ""), **environ},
            },
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert ended.returncode == 0, ended.stderr[-2000:]
        assert ended.stdout == ""  # results alone belong there


def need(package: str) -> None:
    """Skip where a tracker is not installed, or fail where ``LORA_TUNE_TESTS_REQUIRE`` names it."""
    found = find_spec(package)
    if found is None or found.origin is None:
        if package in os.environ.get("LORA_TUNE_TESTS_REQUIRE", "").split(","):
            pytest.fail(f"{package} is required here and not installed")
        pytest.skip(f"{package} is not installed")


def num_parts(target: Path, name: str) -> int:
    ledger = json.loads((target / "trackers.json").read_text())[name]
    return sum(len(entry["parts"]) for entry in ledger.values())


def test_trackio_keeps_a_study_on_this_machine(tracked: StudySnapshot, tmp_path: Path) -> None:
    need("trackio")
    catch_up("trackio", tracked, tmp_path / "study", TRACKIO_DIR=str(tmp_path / "kept"))
    with sqlite3.connect(tmp_path / "kept" / "tracked.db") as database:
        rows = database.execute(
            "select run_name, step, metrics from metrics order by id"
        ).fetchall()
    for record in tracked.trials:
        losses = [
            (step, json.loads(text)["eval/loss"])
            for name, step, text in rows
            if name == f"trial-{record.number:04d}" and b"eval/loss" in text
        ]
        assert losses == [(result.steps, result.eval_loss) for result in record.rungs]


def test_mlflow_keeps_a_study_in_its_folder(tracked: StudySnapshot, tmp_path: Path) -> None:
    need("mlflow")
    catch_up("mlflow", tracked, tmp_path / "study")
    with sqlite3.connect(tmp_path / "study" / "mlflow.db") as database:
        rows = database.execute(
            "select runs.name, step, value from metrics join runs using (run_uuid) "
            "where key = 'eval/loss' order by step"
        ).fetchall()
    for record in tracked.trials:
        losses = [
            (step, value) for name, step, value in rows if name == f"trial-{record.number:04d}"
        ]
        assert losses == [(result.steps, result.eval_loss) for result in record.rungs]


def test_wandb_offline_has_a_run_for_each_trial(tracked: StudySnapshot, tmp_path: Path) -> None:
    need("wandb")
    catch_up("wandb", tracked, tmp_path / "study", WANDB_MODE="offline")
    confirmation = tracked.confirmation
    assert confirmation is not None
    expected = len(tracked.trials) + len(confirmation.runs) + 1
    assert len(list((tmp_path / "study" / "wandb").glob("offline-run-*"))) == expected
    assert num_parts(tmp_path / "study", "wandb") > expected
