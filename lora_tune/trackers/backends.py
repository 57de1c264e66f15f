"""What each tracker needs beside accelerate's own classes: where a run is kept, its id, its configuration."""

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING

from lora_tune.errors import MachineError
from lora_tune.records import StudyLock
from lora_tune.trackers.runs import Line, TrackedRun

if TYPE_CHECKING:  # importing accelerate takes torch with it
    from accelerate.tracking import GeneralTracker  # type: ignore[import-untyped]

TENSORBOARD_FOLDER = "tensorboard"
MLFLOW_DATABASE = "mlflow.db"
MLFLOW_ARTIFACTS = "mlflow-artifacts"
WANDB_PROJECT = "lora-tune"  # unless WANDB_PROJECT names another


def check_trackers(names: Sequence[str]) -> None:
    """Refuse trackers whose package is not installed here.

    Raises:
        MachineError: With the command that installs what is missing.
    """
    # A folder of that name, as W&B makes one where it runs, is found too, but has no origin.
    missing = [n for n in names if (found := find_spec(n)) is None or found.origin is None]
    if missing:
        listed = ", ".join(missing)
        raise MachineError(
            f"run.trackers names {listed}, and Python finds no such package here. Install with: "
            f"pip install {' '.join(missing)}, or take {listed} out of run.trackers."
        )


class Backend:
    """How one tracker opens a run and what it can be told; the rest is accelerate's."""

    stays_open = False  # whether several runs may be open at once

    def __init__(self, lock: StudyLock, folder: Path) -> None:
        self.lock = lock
        self.folder = folder
        self._open: dict[str, GeneralTracker] = {}

    def opened(self, run: TrackedRun, known: str) -> "GeneralTracker":
        """Return the run, opened if it is not; ``known`` is the tracker's id of a run that it has."""
        if run.name not in self._open:
            tracker = self.make(run, known)
            tracker.start()
            self._open[run.name] = tracker
            if not known:
                self.configure(tracker, run)
        return self._open[run.name]

    def finish(self, name: str) -> None:
        """Close a run."""
        self._open.pop(name).finish()

    def finish_all(self) -> None:
        """Close all runs that are open; one that fails keeps none of the others open."""
        with contextlib.ExitStack() as runs:
            for name in self._open:
                runs.callback(self.finish, name)

    def make(self, run: TrackedRun, known: str) -> "GeneralTracker":
        """Return accelerate's tracker of a run, not started."""
        raise NotImplementedError

    def run_id(self, tracker: "GeneralTracker") -> str:
        """Return what the tracker calls the run."""
        raise NotImplementedError

    def configure(self, tracker: "GeneralTracker", run: TrackedRun) -> None:
        """Tell the hyperparameters of a new run."""
        tracker.store_init_configuration(dict(run.config))

    def log(self, tracker: "GeneralTracker", line: Line) -> None:
        """Tell values at a step."""
        tracker.log(dict(line.values), step=line.step)

    def describe(self, tracker: "GeneralTracker", texts: Mapping[str, str]) -> None:
        """Tell what became of the run, in words."""
        tracker.log({name: text for name, text in texts.items() if text})


class _TensorBoard(Backend):
    """A folder a run below ``tensorboard/`` of the study; going on adds event files to it."""

    stays_open = True

    def make(self, run: TrackedRun, known: str) -> "GeneralTracker":
        from accelerate.tracking import TensorBoardTracker

        return TensorBoardTracker(run.name, self.folder / TENSORBOARD_FOLDER)

    def run_id(self, tracker: "GeneralTracker") -> str:
        return "known"  # the folder's name is the run's

    def configure(self, tracker: "GeneralTracker", run: TrackedRun) -> None:
        """Declare the hyperparameters in the run's own folder; accelerate would make another run for them."""
        from torch.utils.tensorboard.summary import hparams

        metrics = {"eval/loss": 0.0}  # the name of what they bring about; the value is not used
        summaries = hparams(dict(run.config), metrics)  # type: ignore[no-untyped-call]
        for summary in summaries:
            tracker.tracker.file_writer.add_summary(summary)


class _WandB(Backend):
    """A run each, in one group a study; below the study folder until it is sent."""

    stays_open = True

    def opened(self, run: TrackedRun, known: str) -> "GeneralTracker":
        is_new = run.name not in self._open
        tracker = super().opened(run, known)
        if is_new:
            # Charts count optimizer steps: a rung begins before the cool-down of the last one ends.
            tracker.tracker.define_metric("*", step_metric="step")
        return tracker

    def make(self, run: TrackedRun, known: str) -> "GeneralTracker":
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # the client's own telemetry
        import wandb  # type: ignore[import-not-found,unused-ignore]
        from accelerate.tracking import WandBTracker

        settings = wandb.Settings(
            silent=True,
            console="off",
            disable_git=True,
            disable_code=True,
            x_disable_meta=True,  # it has the command line
        )
        self._need_login(wandb.setup().settings.mode)
        return WandBTracker(
            os.environ.get("WANDB_PROJECT", WANDB_PROJECT),
            name=f"{self.lock.name}/{run.name}",
            id=known or None,
            resume="allow" if known else None,
            group=self.lock.name,
            job_type=run.kind,
            config=dict(run.config),
            dir=str(self.folder),
            reinit="create_new",
            settings=settings,
        )

    def run_id(self, tracker: "GeneralTracker") -> str:
        return str(tracker.tracker.id)

    def configure(self, tracker: "GeneralTracker", run: TrackedRun) -> None:
        """Nothing: the run was made with it."""

    def log(self, tracker: "GeneralTracker", line: Line) -> None:
        tracker.log({**line.values, "step": line.step})

    def describe(self, tracker: "GeneralTracker", texts: Mapping[str, str]) -> None:
        tracker.tracker.summary.update(dict(texts))

    def _need_login(self, mode: str) -> None:
        """Refuse before W&B asks for a key: nobody may sit before a study that runs."""
        import wandb

        if mode not in ("online", "shared"):
            return
        can_ask_quietly = "prompt" in signature(wandb.login).parameters  # not in older versions
        if not (wandb.login(prompt=False) if can_ask_quietly else wandb.api.api_key):
            raise MachineError("no login: run `wandb login`, or set WANDB_MODE=offline")


class _MLflow(Backend):
    """An experiment a study, a run each; in a database in the study folder unless a server is named."""

    def make(self, run: TrackedRun, known: str) -> "GeneralTracker":
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # the client's own
        import mlflow  # type: ignore[import-not-found,unused-ignore]
        from accelerate.tracking import MLflowTracker

        artifacts = None
        if "MLFLOW_TRACKING_URI" not in os.environ:
            mlflow.set_tracking_uri(f"sqlite:///{(self.folder / MLFLOW_DATABASE).resolve()}")
            artifacts = (self.folder / MLFLOW_ARTIFACTS).resolve().as_uri()
        return MLflowTracker(
            self.lock.name,
            logging_dir=artifacts,
            run_id=known or None,
            run_name=run.name,
            tags={"kind": run.kind},
        )

    def run_id(self, tracker: "GeneralTracker") -> str:
        return str(tracker.tracker.info.run_id)

    def describe(self, tracker: "GeneralTracker", texts: Mapping[str, str]) -> None:
        import mlflow

        mlflow.set_tags({name: text for name, text in texts.items() if text})


class _Trackio(Backend):
    """A project a study, a run each; in trackio's own folder unless a Space or a server is named."""

    def opened(self, run: TrackedRun, known: str) -> "GeneralTracker":
        remote = any(os.environ.get(name) for name in ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL"))
        with contextlib.nullcontext() if remote else _hub_left_alone():
            return super().opened(run, known)

    def make(self, run: TrackedRun, known: str) -> "GeneralTracker":
        from accelerate.tracking import TrackioTracker

        return TrackioTracker(
            self.lock.name,
            name=run.name,
            group=run.kind,
            config=dict(run.config),
            resume="must" if known else "never",
            auto_log_gpu=False,
            auto_log_cpu=False,
            embed=False,
        )

    def run_id(self, tracker: "GeneralTracker") -> str:
        return str(tracker.tracker.id)

    def configure(self, tracker: "GeneralTracker", run: TrackedRun) -> None:
        """Nothing: the run was made with it."""

    def finish(self, name: str) -> None:
        """Close a run through trackio itself: accelerate's leaves it to be closed again, loudly, at exit."""
        import trackio  # type: ignore[import-not-found,unused-ignore]

        del self._open[name]
        trackio.finish()  # type: ignore[no-untyped-call,unused-ignore]


BACKENDS: dict[str, type[Backend]] = {
    "tensorboard": _TensorBoard,
    "wandb": _WandB,
    "mlflow": _MLflow,
    "trackio": _Trackio,
}


@contextlib.contextmanager
def _hub_left_alone() -> Iterator[None]:
    """Keep trackio from asking the hub for the user's name, with the token, for a project that stays here."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
