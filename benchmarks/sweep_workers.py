"""Arms of ``sweep.py`` in several processes: the product's own pool of children, a base in each.

A child begins to count when its imports are done; those of the children after the first lie in the makespan,
since the first one trains meanwhile. That is how a study with ``run.workers`` runs.
"""

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from machine import memory_bytes
from sweep_arms import Clock, Result, Sweep, load_pack

from lora_tune.engine.host_allocator import keep_freed_memory
from lora_tune.engine.memory_reading import open_meter
from lora_tune.executors.in_process import InProcessExecutor
from lora_tune.executors.process import PoolSettings, ProcessExecutor, environments_of
from lora_tune.records import LaneOutcome


@dataclass(frozen=True, kw_only=True)
class ArmTask:
    """How a child becomes a worker of an arm; ``folder`` takes what it measures."""

    plan: Path
    choice: Result
    folder: Path

    def open(self, note: Callable[[str], None]) -> "ArmWorker":
        """Load the base."""
        began_s = time.monotonic()
        sweep = Sweep.read(self.plan)
        if sweep.device == "cpu":
            keep_freed_memory()
        clock = Clock(sweep.device)
        meter = open_meter(sweep.device)
        pack = load_pack(sweep, self.choice, clock)
        worker = ArmWorker(
            pack,
            {"selection": sweep.held_out},
            lanes=int(str(self.choice["lanes"])),
            base_model=None,
            meter=meter,
        )
        worker.measured = Measured(self.folder, clock, began_s)
        worker.measured.write()
        return worker


@dataclass
class Measured:
    """What a child has measured so far, in a file of its own."""

    folder: Path
    clock: Clock
    began_s: float  # of the machine's own clock

    def write(self) -> None:
        """Write it, whole."""
        part = self.folder / f"{os.getpid()}.part"
        found = {
            "began_s": self.began_s,
            "loading_s": self.clock.loading_s,
            "evaluation_s": self.clock.evaluation_s,
            "memory_bytes": memory_bytes(self.clock.device),
        }
        part.write_text(json.dumps(found), encoding="utf-8")
        part.replace(part.with_suffix(".json"))


class ArmWorker(InProcessExecutor):
    """The product's executor, which also writes down what it has measured."""

    measured: Measured
    opened: None = None

    def memory_bytes(self) -> int:
        """Return what this process has in use."""
        return memory_bytes(self.measured.clock.device)

    def wait(self) -> list[LaneOutcome]:
        """Train until a lane has ended."""
        outcomes = super().wait()
        self.measured.write()
        return outcomes


@dataclass
class PooledClock(Clock):
    """The clock of an arm whose children have clocks of their own: parts are their means."""

    folder: Path = field(default_factory=Path)
    workers: int = 1

    def children(self) -> list[Mapping[str, float]]:
        """Return what the children have measured."""
        return [json.loads(path.read_text()) for path in sorted(self.folder.glob("*.json"))]

    def begin(self) -> None:
        """Start the makespan where the first child had imported what it needs."""
        since = time.monotonic() - min(child["began_s"] for child in self.children())
        self._began = time.perf_counter() - since

    def end(self) -> Result:
        """Return the makespan and its parts."""
        found = self.children()
        if len(found) > self.workers:  # fewer: all was done before the others were there
            raise SystemExit("a child died and was started again: this is no reading")
        self.loading_s = statistics.fmean(child["loading_s"] for child in found)
        self.evaluation_s = statistics.fmean(child["evaluation_s"] for child in found)
        held = memory_bytes(self.device) + sum(int(child["memory_bytes"]) for child in found)
        return super().end() | {"memory_bytes": held}


@contextmanager
def pool_of(sweep: Sweep, choice: Result) -> Iterator[tuple[ProcessExecutor, PooledClock]]:
    """Open the children; the clock runs from where the first one had imported."""
    workers = int(str(choice["workers"]))
    environments = environments_of(
        sweep.device, workers=workers, num_gpus=torch.cuda.device_count()
    )
    here = os.pathsep.join(
        filter(None, (str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")))
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        plan = folder / "plan"
        sweep.write(plan)
        settings = PoolSettings(
            workers=workers,
            lanes=int(str(choice["lanes"])),
            preload=(__name__,),
            environments=tuple({**own, "PYTHONPATH": here} for own in environments),
        )
        pool = ProcessExecutor(settings, note=lambda text: print(text, flush=True))
        clock = PooledClock(sweep.device, folder=folder, workers=workers)
        try:
            task = ArmTask(plan=plan, choice=choice, folder=folder)
            pool.open(task)
            pool.hire(task)
            clock.begin()
            yield pool, clock
        finally:
            pool.close()
