"""What every executor can do, wherever its lanes train."""

from typing import Protocol

from lora_tune.records import LaneJob, LaneOutcome, LaneReading, PackPeak


class Executor(Protocol):
    """Takes lane jobs, one trial segment each, and forms the trial packs itself."""

    max_lanes: int
    """Most jobs at once. The tuner may lower it; lanes that train already go on."""

    @property
    def free_slots(self) -> int:
        """How many more jobs it can train at once."""
        ...

    @property
    def busy(self) -> bool:
        """Whether any submitted job has not come back yet."""
        ...

    def submit(self, job: LaneJob) -> None:
        """Hand over a job; it starts at the next step."""
        ...

    def wait(self) -> list[LaneOutcome]:
        """Train until at least one lane has ended; return the lanes that ended, one outcome each."""
        ...

    def take_pack_peaks(self) -> list[PackPeak]:
        """Return what packs were measured to take since this was last asked; nothing on a CPU."""
        ...

    def readings(self) -> tuple[LaneReading, ...]:
        """Where every lane is."""
        ...
