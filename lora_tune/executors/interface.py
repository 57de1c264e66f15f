"""What every executor can do, wherever its lanes train."""

from collections.abc import Callable
from typing import Any, Protocol

from lora_tune.records import LaneJob, LaneOutcome, LaneReading, PackPeak


class Executor(Protocol):
    """Takes lane jobs, one trial segment each, and forms the trial packs itself."""

    max_lanes: int
    """Most jobs in one pack. The tuner may lower it; lanes that train already go on."""

    on_step: Callable[[], None]
    """Called between steps, when there is something new to show; it may raise to end ``wait``."""

    @property
    def free_slots(self) -> int:
        """How many more jobs it can train at once."""
        ...

    @property
    def busy(self) -> bool:
        """Whether any submitted job has not come back yet."""
        ...

    @property
    def num_tokens(self) -> int:
        """Tokens trained on so far, as far as readings of the lanes go."""
        ...

    def submit(self, job: LaneJob) -> None:
        """Hand over a job; it starts at the next step."""
        ...

    def wait(self) -> list[LaneOutcome]:
        """Train until at least one lane has ended; return the lanes that ended, one outcome each."""
        ...

    def ended(self) -> list[LaneOutcome]:
        """Return the outcomes that are there without waiting."""
        ...

    def take_pack_peaks(self) -> list[PackPeak]:
        """Return what packs were measured to take since this was last asked; nothing on a CPU."""
        ...

    def readings(self) -> tuple[LaneReading, ...]:
        """Where every lane is."""
        ...

    def memory_bytes(self) -> int:
        """Return what a person is shown as memory in use."""
        ...

    def answer(self, question: Callable[[Any], Any]) -> object:
        """Return what a question comes to when it is put to a worker, no lane training."""
        ...

    def save_states(self) -> None:
        """Save the state of every lane that trains, so that its job goes on from there; then end."""
        ...

    def close(self) -> None:
        """Leave nothing running."""
        ...


class Worker(Executor, Protocol):
    """An executor with a base of its own."""

    @property
    def opened(self) -> object:
        """What it found when it was opened; its coordinator knows the type."""
        ...
