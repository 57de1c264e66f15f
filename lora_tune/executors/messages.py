"""What a coordinator and its child processes say to each other, over a pipe that both own.

Messages are pickled. Both ends are this program, started by the same person, and nobody else has the pipe.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from lora_tune.errors import LoraTuneError
from lora_tune.executors.interface import Worker
from lora_tune.records import LaneJob, LaneOutcome, LaneReading, PackPeak


class WorkerTask(Protocol):
    """How to become a worker: the first message to a child, which opens it and serves what follows."""

    def open(self, note: Callable[[str], None]) -> Worker:
        """Return the worker, ready for jobs; ``note`` tells a person what happens meanwhile."""
        ...


@dataclass(frozen=True, slots=True)
class Submit:
    """Train this job."""

    job: LaneJob


@dataclass(frozen=True, slots=True)
class Continue:
    """All jobs that there are for now have been handed over: train.

    A child waits for it when it is opened and whenever lanes have ended, so that jobs join a pack at the
    same step in every run of a study, however long the coordinator takes to record an outcome.
    """


@dataclass(frozen=True, slots=True)
class Limit:
    """Train at most so many jobs at once."""

    max_lanes: int


@dataclass(frozen=True, slots=True)
class Ask:
    """Answer this when no lane trains."""

    question: Callable[[Any], Any]


@dataclass(frozen=True, slots=True)
class Stop:
    """Save all lanes between two steps, and end."""


@dataclass(frozen=True, slots=True)
class Opened:
    """The worker is ready for jobs."""

    found: object


@dataclass(frozen=True, slots=True)
class Note:
    """A sentence for people."""

    text: str


@dataclass(frozen=True, slots=True)
class Progress:
    """Where the lanes are, between two steps."""

    readings: tuple[LaneReading, ...]
    num_tokens: int
    memory_bytes: int


@dataclass(frozen=True, slots=True)
class Ended:
    """Lanes that ended, and what their packs took."""

    outcomes: tuple[LaneOutcome, ...]
    pack_peaks: tuple[PackPeak, ...]
    progress: Progress


@dataclass(frozen=True, slots=True)
class Answered:
    """The answer to the question asked."""

    value: object


@dataclass(frozen=True, slots=True)
class Refused:
    """A mistake that the user can mend: the study ends with it."""

    error: LoraTuneError


@dataclass(frozen=True, slots=True)
class Crashed:
    """The child ends of an error that is nobody's message; its traceback is in the child's log."""

    reason: str  # one line


@dataclass(frozen=True, slots=True)
class Stopped:
    """All lanes are saved; the child ends."""
