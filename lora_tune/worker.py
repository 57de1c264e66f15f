"""A study's worker: its base on one device, and all that is done with it.

The coordinator decides and records without a base. It has one worker in its own process, or several in child
processes; a ``StudyTask`` is what a child is sent to become one.
"""

import pickle
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from lora_tune import signals
from lora_tune.assembly import make_executor
from lora_tune.engine.base import BaseModel, quiet_transformers
from lora_tune.engine.host_allocator import keep_freed_memory
from lora_tune.engine.memory_reading import MemoryMeter, open_meter
from lora_tune.engine.pack import TrialPack
from lora_tune.errors import StudyFileError
from lora_tune.executors.behaviour import BehaviourObserver, BehaviourPlan, Subject
from lora_tune.executors.in_process import InProcessExecutor
from lora_tune.executors.interface import Executor
from lora_tune.executors.process import PoolSettings, ProcessExecutor, environments_of
from lora_tune.metrics import Metric, resolve_metrics
from lora_tune.planning import Inputs, draft_plan, load_base, make_lock
from lora_tune.records import (
    Behaviour,
    LaneJob,
    LaneOutcome,
    LaneReading,
    PackPeak,
    StudyLock,
    TokenizedRow,
)
from lora_tune.store.gpu_claims import claim_gpu
from lora_tune.study.spec import StudySpec
from lora_tune.units import format_bytes

Note = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class StudyClock:
    """Seconds that a study has run: those of earlier runs, and of this one since it began.

    The monotonic clock is the machine's, so the coordinator and its children read the same time.
    """

    earlier_s: float
    began_s: float  # of ``time.monotonic``

    def __call__(self) -> float:
        """Return the seconds so far."""
        return self.earlier_s + time.monotonic() - self.began_s


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyTask:
    """How to become the worker of a study.

    Attributes:
        inputs: What the study starts from, pickled where it goes to another process.
        lock: What the first start resolved; None: this is the first start, and the worker resolves it.
        command: The command line, for the record.
        study_file: Where the study file is, for the record and for the modules of metrics.
        clock: The study's.
        workers: How many there are in all.
        allow_code: Whether metrics may be functions of the user's own modules.
        meter_of: Opens the meter of a device, before the base is loaded.
    """

    inputs: Inputs | bytes
    lock: StudyLock | None
    command: str
    study_file: Path
    clock: StudyClock
    workers: int = 1
    allow_code: bool = False
    meter_of: Callable[[str], MemoryMeter] = open_meter

    def open(self, note: Note) -> "StudyWorker":
        """Load the base, and on a first start measure and settle how the study trains.

        Raises:
            LoraTuneError: The base cannot be used, or nothing fits.
        """
        quiet_transformers()
        inputs: Inputs = (
            pickle.loads(self.inputs) if isinstance(self.inputs, bytes) else self.inputs
        )
        metrics = resolve_metrics(
            inputs.spec.select.metrics,
            allow_code=self.allow_code,
            base_dir=self.study_file.parent,
        )
        meter = self.meter_of(inputs.device)
        if inputs.device == "cpu":
            keep_freed_memory()
        _note_shared_gpu(meter, note)
        if self.lock is not None:
            base, lock = load_base(inputs, self.lock), self.lock
        else:
            base, lock = self._first_start(inputs, meter, note)
        _note_less_memory(meter, lock, note)
        base.set_gradient_checkpointing(lock.plan.gradient_checkpointing)
        return StudyWorker(inputs, lock, base, meter, metrics, clock=self.clock)

    def _first_start(
        self, inputs: Inputs, meter: MemoryMeter, note: Note
    ) -> tuple[BaseModel, StudyLock]:
        """Return the loaded base and what was resolved and measured with it."""
        draft = draft_plan(inputs, free_bytes=meter.free_bytes, workers=self.workers)
        for text in draft.notes:
            note(text)
        base = load_base(inputs, None)
        lock = make_lock(
            inputs,
            base,
            draft,
            command=self.command,
            study_file=self.study_file,
            note=note,
            load_s=self.clock(),
        )
        return base, lock


class StudyWorker:
    """Trains a study's lane jobs, and answers questions, on one loaded base.

    Jobs train on the rows of one split at a time; ``opened`` is the study's lock.
    """

    def __init__(
        self,
        inputs: Inputs,
        lock: StudyLock,
        base: BaseModel,
        meter: MemoryMeter,
        metrics: Mapping[str, Metric],
        *,
        clock: Callable[[], float],
    ) -> None:
        self.inputs = inputs
        self.opened = lock
        self.base = base
        self.meter = meter
        self.metrics = metrics
        self.clock = clock
        self._split = "train"
        self._executor = self._train_on(self._split)
        self._earlier_tokens = 0

    @property
    def pack(self) -> TrialPack:
        """What trains and evaluates the lanes."""
        return self._executor.pack

    def _train_on(self, split: str) -> InProcessExecutor:
        return make_executor(
            self.inputs,
            self.opened,
            self.base,
            self.meter,
            self._rows(split),
            self.metrics,
            clock=self.clock,
        )

    def _rows(self, split: str) -> Sequence[TokenizedRow]:
        data = self.inputs.data
        return (
            data.train if split == "train" else (*data.train, *data.selection, *data.confirmation)
        )

    @property
    def max_lanes(self) -> int:
        """Most jobs at once."""
        return self._executor.max_lanes

    @max_lanes.setter
    def max_lanes(self, lanes: int) -> None:
        self._executor.max_lanes = lanes

    @property
    def on_step(self) -> Callable[[], None]:
        """Called after every optimizer step."""
        return self._executor.on_step

    @on_step.setter
    def on_step(self, on_step: Callable[[], None]) -> None:
        self._executor.on_step = on_step

    @property
    def free_slots(self) -> int:
        """Slots for further jobs."""
        return self._executor.free_slots

    @property
    def busy(self) -> bool:
        """Whether a job is waiting or running."""
        return self._executor.busy

    @property
    def num_tokens(self) -> int:
        """Tokens trained on so far, as far as readings of the lanes go."""
        return self._earlier_tokens + self._executor.num_tokens

    def memory_bytes(self) -> int:
        """Return what the device has in use."""
        return self.meter.in_use()

    def readings(self) -> tuple[LaneReading, ...]:
        """Return where every running lane is."""
        return self._executor.readings()

    def take_pack_peaks(self) -> list[PackPeak]:
        """Return what was measured since this was last asked."""
        return self._executor.take_pack_peaks()

    def submit(self, job: LaneJob) -> None:
        """Queue a job for the next free slot; one of other rows than those before comes alone."""
        if job.train_split != self._split:
            assert not self._executor.busy, "jobs on other rows are training"
            before, self._split = self._executor, job.train_split
            self._earlier_tokens += before.num_tokens
            self._executor = self._train_on(self._split)
            self._executor.on_step, self._executor.max_lanes = before.on_step, before.max_lanes
        self._executor.submit(job)

    def wait(self) -> list[LaneOutcome]:
        """Train until at least one lane has ended."""
        return self._executor.wait()

    def ended(self) -> list[LaneOutcome]:
        """Return no outcome: ``wait`` has returned them all."""
        return []

    def save_states(self) -> None:
        """Save the state of every lane that trains."""
        self._executor.save_states()

    def close(self) -> None:
        """Do nothing: the base goes with the process."""

    def answer(self, question: "Callable[[StudyWorker], object]") -> object:
        """Return what a question comes to."""
        with signals.at_once():
            return question(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class HowTheyWrite:
    """Asks a study's worker how base, default and chosen candidate answer, and what they forgot."""

    subjects: tuple[Subject, ...]
    chosen: str
    default: str | None
    plan: BehaviourPlan

    def __call__(self, worker: StudyWorker) -> Behaviour:
        """Return what was seen; see ``BehaviourObserver``."""
        observer = BehaviourObserver(worker.pack, worker.inputs.tokenizer, self.plan)
        return observer.observe(
            self.subjects,
            worker.inputs.data.confirmation,
            chosen=self.chosen,
            default=self.default,
        )

    def unanswered(self, reason: str) -> Behaviour:
        """Return what is known when the question could not be answered: why."""
        return Behaviour(
            chosen=self.chosen,
            default=self.default,
            samples=(),
            max_new_tokens=0,
            general_text="",
            general_tokens=0,
            general_losses=(),
            reason=reason,
        )


class Crew:
    """Who trains a study: one worker in this process, or some in child processes."""

    def __init__(self, spec: StudySpec, *, log_folder: Path, note: Note) -> None:
        """Start the first child, which imports what it needs while the inputs are read.

        Args:
            spec: Of the study.
            log_folder: For what children print; made when a child starts.
            note: Is told what happens to children.

        Raises:
            StudyFileError: There are fewer GPUs than ``run.workers``.
        """
        self._note = note
        self._pool: ProcessExecutor | None = None
        self.executor: Executor | None = None
        self.num_workers = 1
        if spec.run.executor == "process":
            num_gpus = 0 if spec.run.device == "cpu" else torch.cuda.device_count()
            workers = self.num_workers = num_workers(spec, num_gpus)
            settings = PoolSettings(
                workers=workers,
                log_folder=log_folder,
                preload=(__name__,),
                environments=environments_of(
                    "cuda" if num_gpus else "cpu", workers=workers, num_gpus=num_gpus
                ),
            )
            self._pool = ProcessExecutor(settings, note=note)
            self._pool.start()

    def open(self, task: StudyTask) -> StudyLock:
        """Return the study's lock, resolved on a first start, when a worker is ready for jobs.

        Raises:
            LoraTuneError: The base cannot be used, or nothing fits, or no child can be started.
        """
        if self._pool is None:
            with signals.at_once():  # a base may take minutes to load
                worker = task.open(self._note)
            self.executor = worker
            return worker.opened
        task = replace(task, inputs=pickle.dumps(task.inputs))
        self.executor = self._pool
        lock = self._pool.open(task)
        assert isinstance(lock, StudyLock)
        self._pool.hire(replace(task, lock=lock))
        return lock

    def close(self) -> None:
        """Leave no child running."""
        if self._pool is not None:
            self._pool.close()


def num_workers(spec: StudySpec, num_gpus: int) -> int:
    """Return how many children train: on GPUs one each, on a CPU one unless the study file says more.

    Raises:
        StudyFileError: There are fewer GPUs than ``run.workers``.
    """
    wanted = spec.run.workers
    if wanted == "auto":
        return max(1, num_gpus)
    if num_gpus and wanted > num_gpus:
        raise StudyFileError(
            f"run.workers is {wanted}, but this machine shows {num_gpus} GPU{'s' if num_gpus > 1 else ''}: "
            'each worker needs one of its own. Lower it, or write "auto".'
        )
    return wanted


def without_tokens(inputs: Inputs) -> Inputs:
    """Return the inputs as a coordinator keeps them: of a row only what it belongs to."""
    data = inputs.data

    def bare(rows: Sequence[TokenizedRow]) -> tuple[TokenizedRow, ...]:
        return tuple(TokenizedRow(input_ids=(), labels=(), group=row.group) for row in rows)

    return inputs._replace(
        data=replace(
            data,
            train=bare(data.train),
            selection=bare(data.selection),
            confirmation=bare(data.confirmation),
        )
    )


def _note_shared_gpu(meter: MemoryMeter, note: Note) -> None:
    """Say that another study of this user trains on the same GPU."""
    if meter.device_id and (other := claim_gpu(meter.device_id)) is not None:
        note(
            f"another study trains on this {meter.device_name} ({other}): they share its memory, of which "
            f"{format_bytes(meter.free_bytes)} are free now, and its speed. CUDA_VISIBLE_DEVICES gives one a "
            "GPU of its own."
        )


def _note_less_memory(meter: MemoryMeter, lock: StudyLock, note: Note) -> None:
    """Say that a plan, made earlier or for another GPU, may use more than is free now."""
    if meter.peaks() is not None and meter.free_bytes < lock.plan.budget_bytes:
        note(
            f"{format_bytes(meter.free_bytes)} of the {meter.device_name} are free, the plan may use "
            f"{format_bytes(lock.plan.budget_bytes)}: a pack that runs out of memory is halved."
        )
