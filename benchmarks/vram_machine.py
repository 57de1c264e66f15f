"""The GPU that ``vram_truth.py`` measures: what it held before, what the process takes, and peaks."""

import gc
import platform
import subprocess
import time
from dataclasses import dataclass, field

import bitsandbytes
import torch
from vram_stacks import WARM_STEPS

from lora_tune.catalog.gpus import find_gpu
from lora_tune.errors import StudyFileError
from lora_tune.units import MIB


@dataclass(kw_only=True)
class Machine:
    """The device, what it held before this process, and what the process holds outside torch."""

    device: torch.device
    name: str
    compute_capability: str | None
    idle_bytes: int  # in use by others, before the CUDA context
    free_bytes: int  # after it
    total_bytes: int
    trace: bool = True
    notes: list[str] = field(default_factory=list)

    @classmethod
    def open(cls, kind: str) -> "Machine":
        """Return the device; on CUDA the context is made here."""
        if kind == "cpu":
            return cls(
                device=torch.device("cpu"),
                name=platform.processor() or "cpu",
                compute_capability=None,
                idle_bytes=0,
                free_bytes=0,
                total_bytes=0,
            )
        idle = _driver_used_bytes()
        device = torch.device("cuda", 0)
        torch.zeros(1, device=device)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(device)
        major, minor = torch.cuda.get_device_capability(device)
        notes = [] if idle is not None else ["no nvidia-smi: the GPU is taken to have been idle"]
        return cls(
            device=device,
            name=torch.cuda.get_device_name(device),
            compute_capability=f"{major}.{minor}",
            idle_bytes=idle or 0,
            free_bytes=free,
            total_bytes=total,
            notes=notes,
        )

    @property
    def catalogue_name(self) -> str:
        """The name in the GPU catalogue, by which a context is known; else the driver's."""
        try:
            return find_gpu(self.name).name
        except StudyFileError:
            return self.name

    @property
    def slug(self) -> str:
        """The name as part of a file name."""
        words = self.name.lower().removeprefix("nvidia ").replace("geforce ", "").split()
        return "-".join(words).replace("/", "-") if self.device.type == "cuda" else "cpu"

    def process_bytes(self) -> int:
        """Return what this process takes at the allocator's peak, its CUDA context included.

        What the driver says now, less what others held, with the reserved peak for reserved now.
        """
        free, total = torch.cuda.mem_get_info(self.device)
        now = total - free - self.idle_bytes
        return now - torch.cuda.memory_reserved() + torch.cuda.max_memory_reserved()


class Probe:
    """Starts the peaks after the warm-up step and reads them after each further one."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.steps = 0
        self._begin = self._end = 0.0
        self.readings: dict[str, int] = {}

    def begin(self, *, base_weights: int, adapters: int) -> None:
        """Note the bytes of the tensors that stay."""
        self.readings = {"base_weights": base_weights, "adapters": adapters}

    def step(self, finished_steps: int) -> None:
        """Note that so many optimizer steps are done."""
        self.steps = finished_steps
        on_cuda = self.machine.device.type == "cuda"
        if on_cuda:
            torch.cuda.synchronize()
        if finished_steps == WARM_STEPS:
            if on_cuda:
                torch.cuda.reset_peak_memory_stats()
            self._begin = time.perf_counter()
        elif finished_steps > WARM_STEPS:
            self._end = time.perf_counter()
            if on_cuda:
                self.readings |= {
                    "allocated": torch.cuda.max_memory_allocated(),
                    "reserved": torch.cuda.max_memory_reserved(),
                    "process": self.machine.process_bytes(),
                }

    @property
    def step_s(self) -> float | None:
        """Seconds of a measured optimizer step."""
        measured = self.steps - WARM_STEPS
        return (self._end - self._begin) / measured if measured > 0 else None


def clear_away(machine: Machine) -> int:
    """Give everything back and return the bytes that are still allocated."""
    gc.collect()
    if machine.device.type != "cuda":
        return 0
    # bitsandbytes never frees the pages of paged optimizers: what they take is there before the next
    pages = bitsandbytes.functional.GlobalPageManager.get_instance().paged_tensors
    machine.idle_bytes += sum(page.nbytes for page in pages)
    pages.clear()
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def _driver_used_bytes() -> int | None:
    """Return the bytes in use on the first GPU as nvidia-smi shows them; None without nvidia-smi."""
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "--id=0"]
    try:
        shown = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
        return int(shown.stdout.split()[0]) * MIB
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None
