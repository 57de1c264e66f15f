"""Lane jobs in supervised child processes, each with a base of its own.

A crash of CUDA, a segmentation fault or the kernel's out-of-memory killer takes a child, not the study. Its
end is noticed at once, the reason is named, the child is started again after a pause that doubles, and its
jobs are handed out again: each goes on from the state that it saved last. What a child was doing when it
died is held against its jobs as long as they do not get any further than before: after three such deaths a
job is tried alone, by another child if there is one, and one that kills its worker alone has failed. A
child is left out when it cannot be opened three times in a row, or when what it died of three times
in a row comes to its end elsewhere.

The children know nothing of the study's folder but where to publish; they end with this process.
"""

import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from multiprocessing import connection
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO, Any

from lora_tune import signals
from lora_tune.errors import LoraTuneError, MachineError
from lora_tune.executors.death import (
    HOST_OUT_OF_MEMORY,
    Death,
    count_memory_kills,
    reason_of_death,
)
from lora_tune.executors.messages import (
    Answered,
    Ask,
    Continue,
    Crashed,
    Ended,
    Limit,
    Note,
    Opened,
    Progress,
    Refused,
    Stop,
    Stopped,
    Submit,
    WorkerTask,
)
from lora_tune.records import (
    LaneJob,
    LaneOutcome,
    LaneReading,
    LaneSpan,
    MetricResult,
    PackPeak,
    TrialState,
)
from lora_tune.redaction import redact

MOST_DEATHS = 3  # without getting any further, before a job is tried alone
MOST_FAILURES = 3  # in a row, before a child is left out
SAME_SIZE_RETRIES = 1  # of a pack that the host's memory did not hold
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 30.0  # before a child is started again
LONGEST_SILENCE_S = 3600.0  # of a child, while nothing is known of its speed
LEAST_SILENCE_S = 600.0
SILENT_GAPS = 20  # as many times its longest silence so far, and it hangs
SAVE_S = 60.0  # for saving all lanes, when asked to stop
LOOK_S = 0.5  # between two looks at the clock
MOST_OUTPUT_BYTES = 65536  # of what a child printed, kept when it dies
_NO_PROGRESS = Progress((), 0, 0)


class WorkerLostError(MachineError):
    """A worker died over the same question again and again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolSettings:
    """How children are started and watched; seconds."""

    workers: int = 1
    lanes: int = 1  # jobs that a child trains at once
    log_folder: Path | None = None  # for what a child printed that died; None: nowhere
    preload: tuple[str, ...] = ()  # modules that a child imports while it waits for its task
    environments: tuple[Mapping[str, str], ...] = ()  # beside this process's own, child by child
    first_pause_s: float = FIRST_PAUSE_S
    longest_silence_s: float = LONGEST_SILENCE_S
    least_silence_s: float = LEAST_SILENCE_S
    save_s: float = SAVE_S
    memory_kills: Callable[[], int | None] = count_memory_kills


@dataclass
class _Held:
    """A job that has not come back."""

    job: LaneJob
    furthest: int = -1  # step that it was seen at
    deaths: int = 0  # of its workers, since it last got further
    died_on: set[int] = field(default_factory=set)  # these workers


@dataclass(eq=False)
class _Child:
    """One child process and what is known of it."""

    index: int
    process: subprocess.Popen[bytes] | None = None
    link: Connection | None = None
    sender: threading.Thread | None = None  # of its task
    output: IO[bytes] | None = None  # what it prints
    ready: bool = False
    waits: bool = True  # for the jobs that it trains next
    out: bool = False  # failed too often
    stopped: bool = False  # has saved its lanes, as it was asked to
    jobs: dict[int, _Held] = field(default_factory=dict)
    failures: int = 0  # in a row
    blamed: bool = False  # what it died of has come to its end elsewhere since it last did anything
    starts_at: float = 0.0
    kills_before: int | None = None
    crash: str = ""  # what it said before it ended
    heard_at: float = 0.0
    longest_gap: float = 0.0
    asked: bool = False  # a question that it has not answered
    ended_kinds: set[tuple[object, ...]] = field(default_factory=set)  # of jobs; see ``_kind_of``
    host_lanes: int | None = None  # most jobs, after the host's memory did not hold more
    host_kills: int = 0
    alone: bool = False  # it has a job that is tried alone
    progress: Progress = _NO_PROGRESS
    earlier_tokens: int = 0  # of its processes that have ended


class ProcessExecutor:
    """Trains lane jobs in child processes; an ``Executor`` for the tuner."""

    def __init__(
        self,
        settings: PoolSettings,
        *,
        note: Callable[[str], None],
        on_step: Callable[[], None] = lambda: None,
    ) -> None:
        """Begin without children; ``open`` starts the first.

        Args:
            settings: How many, and how they are watched.
            note: Is told what happens to children, in sentences.
            on_step: Called when a child has told where its lanes are.
        """
        self.settings = settings
        self.on_step = on_step
        self._note = note
        self._max_lanes = self._slots = settings.lanes
        self._task = b""
        self._children = [_Child(index) for index in range(settings.workers)]
        self._waiting: list[_Held] = []
        self._suspects: list[_Held] = []
        self._outcomes: list[LaneOutcome] = []
        self._pack_peaks: list[PackPeak] = []
        self._answers: list[object] = []
        self._opened: list[object] = []

    # What the tuner asks for

    def start(self) -> None:
        """Start the first child, if it is not, so that it imports what it needs while the task is made."""
        if self._children[0].process is None:
            self._start(self._children[0])

    def open(self, task: WorkerTask) -> object:
        """Start the first child with this task and return what it found.

        Raises:
            LoraTuneError: What the child refused, or ``MachineError``: it cannot be started.
        """
        self._task = pickle.dumps(task)
        self.start()
        if (
            self._children[0].link is not None
        ):  # else it died already, and gets the task when started again
            self._send_task(self._children[0])
        while not self._opened:
            self._look()
        return self._opened.pop()

    def hire(self, task: WorkerTask) -> None:
        """Start the other children; they and all that are started again get this task."""
        self._task = pickle.dumps(task)
        for child in self._children[1:]:
            self._start(child)
            self._send_task(child)

    @property
    def max_lanes(self) -> int:
        """Most jobs of one child."""
        return self._max_lanes

    @max_lanes.setter
    def max_lanes(self, lanes: int) -> None:
        if lanes == self._max_lanes:
            return
        self._max_lanes, self._slots = lanes, max(self._slots, lanes)
        for child in self._children:
            if child.ready:
                self._send(child, Limit(self._lanes_of(child)))

    @property
    def free_slots(self) -> int:
        """Slots for further jobs, those of children that are being started counted in."""
        slots = sum(self._lanes_of(child) for child in self._children if not child.out)
        return max(0, slots - self._num_jobs)

    @property
    def busy(self) -> bool:
        """Whether any submitted job has not come back yet."""
        return self._num_jobs > 0 or bool(self._outcomes)

    @property
    def num_tokens(self) -> int:
        """Tokens trained on so far, those of lost work counted in."""
        return sum(c.earlier_tokens + c.progress.num_tokens for c in self._children)

    def memory_bytes(self) -> int:
        """Return the most that one child has in use."""
        return max(child.progress.memory_bytes for child in self._children)

    def readings(self) -> tuple[LaneReading, ...]:
        """Return where every lane is, as last heard."""
        return tuple(reading for child in self._children for reading in child.progress.readings)

    def take_pack_peaks(self) -> list[PackPeak]:
        """Return what packs took since this was last asked."""
        taken, self._pack_peaks = self._pack_peaks, []
        return taken

    def submit(self, job: LaneJob) -> None:
        """Queue a job for the next free slot of any child."""
        self._waiting.append(_Held(job))

    def wait(self) -> list[LaneOutcome]:
        """Wait until at least one lane has ended; children that die meanwhile are replaced.

        Raises:
            LoraTuneError: What a child refused, or ``MachineError``: no child can be started.
        """
        while self.busy and not self._outcomes:
            self._hand_out()
            self._let_go_on()
            self._look()
        return self.ended()

    def ended(self) -> list[LaneOutcome]:
        """Return the outcomes that are there, without waiting."""
        outcomes, self._outcomes = self._outcomes, []
        return outcomes

    def answer(self, question: Callable[[Any], Any]) -> object:
        """Return a child's answer; asked again when the child dies over it.

        Raises:
            WorkerLostError: It has died over it three times.
        """
        for _ in range(MOST_FAILURES):
            child = self._any_ready()
            child.asked, child.heard_at = True, time.monotonic()
            self._send(child, Ask(question))
            while not self._answers and child.ready:
                self._look()
            if self._answers:
                return self._answers.pop()
        raise WorkerLostError(f"the worker died {MOST_FAILURES} times: {child.crash}")

    def save_states(self) -> None:
        """Have every child save its lanes, and end; wait for that, but not for ever."""
        self.on_step = lambda: None  # who shows it may have gone
        for child in self._children:
            if child.ready:
                self._send(child, Stop())
            elif child.process is not None:  # it has nothing to save
                child.process.kill()
                self._hang_up(child)
        until = time.monotonic() + self.settings.save_s
        while any(c.ready and not c.stopped for c in self._children) and time.monotonic() < until:
            for child in self._links_with_news():
                try:
                    self._read(child, while_stopping=True)
                except (
                    LoraTuneError
                ) as error:  # as when the disk is full: the states before these stay
                    child.ready = False
                    self._note(f"{self._name_of(child)} could not save its lanes: {error}")

    def close(self) -> None:
        """End all children at once; what they saved stays."""
        for child in self._children:
            if child.process is not None:
                child.process.kill()
                child.process.wait()
            self._hang_up(child)
            if child.output is not None:
                child.output.close()
            child.process = child.output = None
            child.ready = False

    # Handing out

    @property
    def _num_jobs(self) -> int:
        held = sum(len(child.jobs) for child in self._children)
        return held + len(self._waiting) + len(self._suspects)

    def _lanes_of(self, child: _Child) -> int:
        if child.host_lanes is None:
            return self._max_lanes
        return min(self._max_lanes, child.host_lanes)

    def _hand_out(self) -> None:
        ready = [child for child in self._children if child.ready and not child.alone]
        for held in list(self._suspects):
            fit = [child for child in ready if child.index not in self._shunned(held)]
            idle = [child for child in fit if not child.jobs]
            if idle:
                self._suspects.remove(held)
                idle[0].alone = True
                self._give(idle[0], held)
            ready = [child for child in ready if child not in (idle or fit)[:1]]  # or it runs empty
        while self._waiting:
            free = [child for child in ready if self._has_room(child)]
            if not free:
                return
            self._give(min(free, key=lambda child: len(child.jobs)), self._waiting.pop(0))

    def _let_go_on(self) -> None:
        for child in self._children:
            if child.ready and child.waits and child.jobs:
                child.waits = False
                child.heard_at = time.monotonic()  # until now it was to be silent
                self._send(child, Continue())

    def _shunned(self, held: _Held) -> set[int]:
        """Return the children that may not try this job alone: they died of it, and others did not."""
        staying = {child.index for child in self._children if not child.out}
        return held.died_on if staying - held.died_on else set()

    def _has_room(self, child: _Child) -> bool:
        return len(child.jobs) < self._lanes_of(child)

    def _give(self, child: _Child, held: _Held) -> None:
        child.jobs[held.job.trial] = held
        if not child.progress.readings:
            child.heard_at = time.monotonic()  # it had nothing to say
        self._send(child, Submit(held.job))

    def _send(self, child: _Child, message: object) -> None:
        assert child.link is not None
        with suppress(OSError):  # it died: seen when its pipe is read
            child.link.send(message)

    def _any_ready(self) -> _Child:
        while True:
            for child in self._children:
                if child.ready:
                    return child
            self._look()

    # Children

    def _start(self, child: _Child) -> None:
        ours, theirs = socket.socketpair()
        own = self.settings.environments
        environment = {**os.environ, **(own[child.index] if own else {})}
        with ours, theirs:
            child.kills_before = self.settings.memory_kills()
            child.output = tempfile.TemporaryFile()  # noqa: SIM115  # closed when the child is buried
            child.process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "lora_tune.executors.child"),
                    *(str(theirs.fileno()), *self.settings.preload),
                ],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=child.output,
                stderr=child.output,
                env=environment,
                start_new_session=True,  # Ctrl-C is for the coordinator, which then asks it to stop
            )
            child.link = Connection(ours.detach())
        child.crash, child.ready, child.alone = "", False, False
        child.stopped, child.asked = False, False
        child.heard_at = time.monotonic()

    def _send_task(self, child: _Child) -> None:
        """Send a child its task from a thread: it may be large, and is read when the child has imported."""
        link, task = child.link, self._task
        assert link is not None
        child.heard_at = time.monotonic()

        def send() -> None:
            with suppress(OSError):  # it died: seen when its pipe is read
                link.send_bytes(task)

        child.sender = threading.Thread(target=send, daemon=True)
        child.sender.start()

    def _hang_up(self, child: _Child) -> None:
        """Close the pipe of a child that is dead."""
        if child.sender is not None:
            child.sender.join()
        if child.link is not None:
            child.link.close()
        child.sender = child.link = None

    def _keep_output(self, child: _Child, death: Death) -> None:
        """Append the end of what a dead child printed, and what it died of, to its log."""
        assert child.output is not None
        with child.output as stream:
            size = stream.seek(0, os.SEEK_END)
            stream.seek(max(0, size - MOST_OUTPUT_BYTES))
            text = redact(stream.read().decode("utf-8", "replace"))
        child.output = None
        folder = self.settings.log_folder
        if folder is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        with self._log_of(child).open("a", encoding="utf-8") as log:
            log.write(f"{text}{self._name_of(child)} died: {redact(death.reason)}\n")

    def _log_of(self, child: _Child) -> Path:
        assert self.settings.log_folder is not None
        return self.settings.log_folder / f"worker-{child.index}.log"

    def _look(self) -> None:
        """Hear what children say, for half a second at most; replace those that died or hang.

        A signal that was held back raises here, after the last message.
        """
        for child in self._links_with_news():
            self._read(child)
        now = time.monotonic()
        for child in self._children:
            if child.link is not None and now - child.heard_at > self._most_silence(child):
                self._end_silent(child, now - child.heard_at)
            elif (
                child.link is None and not child.out and child.starts_at and now >= child.starts_at
            ):
                self._start(child)
                self._send_task(child)
        signals.check()

    def _links_with_news(self) -> list[_Child]:
        by_link = {child.link: child for child in self._children if child.link is not None}
        if not by_link:
            time.sleep(min(LOOK_S, self.settings.first_pause_s))
            return []
        return [by_link[link] for link in connection.wait(list(by_link), LOOK_S)]  # type: ignore[index]

    def _read(self, child: _Child, *, while_stopping: bool = False) -> None:
        assert child.link is not None
        try:
            message = child.link.recv()
        except (EOFError, OSError, pickle.UnpicklingError):
            if while_stopping:
                child.ready = False
                self._hang_up(child)
                return
            self._bury(child, self._why(child))
            return
        now = time.monotonic()
        if child.jobs:
            child.longest_gap = max(child.longest_gap, now - child.heard_at)
        child.heard_at = now
        self._take(child, message)

    def _take(self, child: _Child, message: object) -> None:
        if isinstance(message, Progress):
            self._note_progress(child, message)
            self.on_step()
        elif isinstance(message, Ended):
            child.failures, child.blamed, child.waits = 0, False, True
            self._pack_peaks += message.pack_peaks
            for outcome in message.outcomes:
                held = child.jobs.pop(outcome.trial, None)
                if held is not None and outcome.evaluation is not None:
                    child.ended_kinds.add(_kind_of(held.job))
                self._acquit(child, held)
                self._outcomes.append(self._seated(child, outcome))
            child.alone = child.alone and bool(child.jobs)
            self._note_progress(child, message.progress)
        elif isinstance(message, Opened):
            child.ready = child.waits = True
            self._opened = [message.found]
            self._send(child, Limit(self._lanes_of(child)))
        elif isinstance(message, Note):
            self._note(message.text)
        elif isinstance(message, Answered):
            child.failures, child.asked = 0, False
            self._answers = [message.value]
        elif isinstance(message, Refused):
            raise message.error
        elif isinstance(message, Crashed):
            child.crash = message.reason
        elif isinstance(message, Stopped):
            child.stopped = True

    def _note_progress(self, child: _Child, progress: Progress) -> None:
        child.progress = progress
        for reading in progress.readings:
            held = child.jobs.get(reading.trial)
            if held is not None and reading.step > held.furthest:
                if (
                    held.furthest >= 0
                ):  # the first reading of a process is where the lane went on from
                    held.deaths = child.failures = 0
                    child.blamed = False
                held.furthest = reading.step

    def _seated(self, child: _Child, outcome: LaneOutcome) -> LaneOutcome:
        """Return the outcome with a slot of its own among those of all children."""
        span = outcome.span
        if span is None:
            return outcome
        slot = child.index * self._slots + span.slot
        return replace(
            outcome, span=LaneSpan(slot=slot, began_s=span.began_s, ended_s=span.ended_s)
        )

    # Deaths

    def _acquit(self, child: _Child, held: _Held | None) -> None:
        """A job came to its end here: it was not its fault that others died of it."""
        for index in held.died_on - {child.index} if held is not None else ():
            other = self._children[index]
            other.blamed = True
            if other.failures >= MOST_FAILURES and not other.out:
                self._leave_out(other)

    def _leave_out(self, child: _Child) -> None:
        child.out = True
        if child.process is not None:
            child.process.kill()
        self._note(
            f"{self._name_of(child)} is left out: {child.crash}, {child.failures} times in a row."
        )

    def _name_of(self, child: _Child) -> str:
        return f"worker {child.index}" if len(self._children) > 1 else "the worker"

    def _most_silence(self, child: _Child) -> float:
        longest = self.settings.longest_silence_s
        if child.asked:
            return longest
        if not child.jobs and child.ready:
            return float("inf")
        # An evaluation of other rows or in another type may take longer than anything before.
        kinds = {_kind_of(held.job) for held in child.jobs.values()}
        if not child.ready or kinds - child.ended_kinds:
            return longest
        return min(longest, max(self.settings.least_silence_s, SILENT_GAPS * child.longest_gap))

    def _end_silent(self, child: _Child, seconds: float) -> None:
        assert child.process is not None
        child.process.kill()
        child.process.wait()
        self._bury(child, Death(f"killed after {seconds:.0f} s without a sign of life"))

    def _why(self, child: _Child) -> Death:
        """Return why a child died whose pipe has ended."""
        assert child.process is not None
        try:
            returncode = child.process.wait(timeout=5)
        except subprocess.TimeoutExpired:  # it closed its pipe and lives: nothing can be said to it
            child.process.send_signal(signal.SIGKILL)
            child.process.wait()
            return Death("it closed its pipe")
        death = reason_of_death(
            returncode,
            kills_before=child.kills_before,
            kills_now=self.settings.memory_kills(),
        )
        return death._replace(reason=child.crash) if child.crash else death

    def _bury(self, child: _Child, death: Death) -> None:
        """Take a dead child's jobs back and decide when it is started again, if ever."""
        self._hang_up(child)
        self._keep_output(child, death)
        was_ready, jobs = child.ready, list(child.jobs.values())
        was_alone, child.alone = child.alone, False
        child.earlier_tokens += child.progress.num_tokens
        child.process = None
        child.ready, child.progress, child.crash = False, _NO_PROGRESS, death.reason
        child.jobs.clear()
        child.failures += 1
        for held in jobs if not child.out else ():  # else it was ended from here
            held.deaths += 1
            held.died_on.add(child.index)
        if was_alone and not child.out and jobs and jobs[0].deaths > MOST_DEATHS:
            guilty = jobs.pop()
            self._outcomes.append(_failed(guilty.job, death))
            for index in guilty.died_on:  # the fault was the job's
                self._children[index].failures = 0
        if death.out_of_host_memory:
            self._lower_lanes(child, len(jobs))
        self._suspects += [held for held in jobs if held.deaths >= MOST_DEATHS]
        self._waiting = [held for held in jobs if held.deaths < MOST_DEATHS] + self._waiting
        self._leave_out_or_pause(child, death, was_ready=was_ready)

    def _lower_lanes(self, child: _Child, num_jobs: int) -> None:
        child.host_kills += 1
        if child.host_kills > SAME_SIZE_RETRIES and num_jobs > 1:
            child.host_lanes, child.host_kills = num_jobs // 2, 0

    def _leave_out_or_pause(self, child: _Child, death: Death, *, was_ready: bool) -> None:
        if child.out:
            return
        others = any(
            other is not child and not other.out and (other.process is not None or other.starts_at)
            for other in self._children
        )
        name = self._name_of(child)
        if child.failures >= MOST_FAILURES and others and (child.blamed or not was_ready):
            self._leave_out(child)
            return
        if child.failures >= MOST_FAILURES and not was_ready:
            log = f" See {self._log_of(child)}." if self.settings.log_folder else ""
            raise MachineError(
                f"{name} could not be started {child.failures} times in a row: {redact(death.reason)}.{log}"
            )
        pause = self.settings.first_pause_s * 2 ** max(0, child.failures - 1)
        child.starts_at = time.monotonic() + min(LONGEST_PAUSE_S, pause)
        self._note(
            f"{name} died: {death.reason}. It is started again; its lanes go on from where they were saved."
        )


def _kind_of(job: LaneJob) -> tuple[object, ...]:
    """Return what the time of a job's evaluation depends on."""
    return job.rung, job.eval_split, job.eval_rows, job.eval_dtype, job.metrics


def _failed(job: LaneJob, death: Death) -> LaneOutcome:
    """Return the outcome of a job that killed every worker, the last one alone."""
    reason = (
        f"its worker died {MOST_DEATHS + 1} times, at last with this lane alone: {death.reason}"
    )
    state = TrialState.INFEASIBLE if death.reason == HOST_OUT_OF_MEMORY else TrialState.FAILED
    metrics = tuple(MetricResult(metric=name, reason=reason) for name in job.metrics)
    return LaneOutcome(trial=job.trial, rung=job.rung, state=state, reason=reason, metrics=metrics)


def environments_of(
    device: str, *, workers: int, num_gpus: int, environ: Mapping[str, str] = os.environ
) -> tuple[Mapping[str, str], ...]:
    """Return what each child's environment has beside the coordinator's: its GPU, or its share of the cores.

    >>> environments_of("cuda", workers=2, num_gpus=2, environ={"CUDA_VISIBLE_DEVICES": "4,7"})
    ({'CUDA_VISIBLE_DEVICES': '4'}, {'CUDA_VISIBLE_DEVICES': '7'})
    """
    if device == "cuda":
        visible = environ.get("CUDA_VISIBLE_DEVICES")
        names: Sequence[str] = visible.split(",") if visible else [str(n) for n in range(num_gpus)]
        return tuple({"CUDA_VISIBLE_DEVICES": names[n].strip()} for n in range(workers))
    if workers == 1 or "OMP_NUM_THREADS" in environ:
        return ({},) * workers
    cores = len(os.sched_getaffinity(0))
    return ({"OMP_NUM_THREADS": str(max(1, cores // workers))},) * workers
