"""What a device says about its memory: free at the start, peaks since the last restart.

A meter is opened before the base is loaded, so that ``free_bytes`` is all that the base and the lanes
may use together. CUDA's allocator counts its peaks; the driver only knows the present:

    process = peak reserved + (free at the start - free now - reserved now)

where the bracket is what lies outside torch's allocator: kernels that CUDA loads when they are first
used, and buffers of libraries. What other processes take or give back meanwhile is in it too.
"""

import gc
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import psutil
import torch


class MemoryPeaks(NamedTuple):
    """Peaks since the last restart, in bytes."""

    allocated_bytes: int
    reserved_bytes: int
    process_bytes: int


class MemoryMeter(Protocol):
    """Reads one device."""

    @property
    def device_name(self) -> str:
        """Which device it is, as the driver names it."""
        ...

    @property
    def device_id(self) -> str:
        """The device's own identity, whatever number it is shown under; empty on a CPU."""
        ...

    @property
    def free_bytes(self) -> int:
        """What was free on the device when the meter was opened."""
        ...

    def restart(self) -> None:
        """Forget the peaks, and give cached blocks back so that they are not read again."""
        ...

    def peaks(self) -> MemoryPeaks | None:
        """Return the peaks, None on a device that keeps none."""
        ...

    def in_use(self) -> int:
        """Return what a person is shown: peak allocated bytes, or resident bytes on a CPU."""
        ...

    def allocated_beside(self, tensors: Sequence[torch.Tensor]) -> int:
        """Return the bytes of all tensors alive on the device now, without the given ones."""
        ...


class HostMeter:
    """A CPU: resident memory of this process, without peaks of a pack."""

    device_name = "cpu"
    device_id = ""

    def __init__(self) -> None:
        self.free_bytes = int(psutil.virtual_memory().available)

    def restart(self) -> None:
        """Do nothing: the system keeps no peak that could be forgotten."""

    def peaks(self) -> None:
        """Return None: what a process holds does not tell what a pack needs."""
        return None

    def in_use(self) -> int:
        """Return the resident bytes of this process."""
        return int(psutil.Process().memory_info().rss)

    def allocated_beside(self, tensors: Sequence[torch.Tensor]) -> int:
        """Return the bytes of all other storages that a Python tensor refers to, each counted once.

        Tensors are only looked at: what bitsandbytes keeps beside a weight stays as it is.
        """
        sizes = {
            value.untyped_storage().data_ptr(): value.untyped_storage().nbytes()
            for value in gc.get_objects()
            if issubclass(type(value), torch.Tensor) and value.device.type == "cpu"
        }
        for tensor in tensors:
            sizes.pop(tensor.untyped_storage().data_ptr(), None)
        return sum(sizes.values())


class CudaMeter:
    """A CUDA GPU, the current one."""

    def __init__(self) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.device_name = torch.cuda.get_device_name(self.device)
        self.device_id = str(torch.cuda.get_device_properties(self.device).uuid)
        self.free_bytes = int(torch.cuda.mem_get_info(self.device)[0])

    def restart(self) -> None:
        """Forget the peaks, and give cached blocks back so that they are not read again."""
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.device)

    def peaks(self) -> MemoryPeaks:
        """Return the allocator's peaks, and what the process took with them."""
        reserved = int(torch.cuda.max_memory_reserved(self.device))
        return MemoryPeaks(
            allocated_bytes=int(torch.cuda.max_memory_allocated(self.device)),
            reserved_bytes=reserved,
            process_bytes=process_peak(
                free_at_start=self.free_bytes,
                free_now=int(torch.cuda.mem_get_info(self.device)[0]),
                reserved_now=int(torch.cuda.memory_reserved(self.device)),
                reserved_peak=reserved,
            ),
        )

    def in_use(self) -> int:
        """Return the peak allocated bytes since the last restart."""
        return int(torch.cuda.max_memory_allocated(self.device))

    def allocated_beside(self, tensors: Sequence[torch.Tensor]) -> int:
        """Return what torch's allocator was asked for and has given out for anything else.

        Not the blocks it gave: those may be up to 1 MiB larger than the tensor in them.
        """
        own = {
            tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
            for tensor in tensors
            if tensor.device.type == "cuda"
        }
        requested = torch.cuda.memory_stats(self.device)["requested_bytes.all.current"]
        return int(requested) - sum(own.values())


def open_meter(device: str) -> MemoryMeter:
    """Return the meter of ``cpu`` or ``cuda``; what is free is read now."""
    return CudaMeter() if device == "cuda" else HostMeter()


def process_peak(
    *, free_at_start: int, free_now: int, reserved_now: int, reserved_peak: int
) -> int:
    """Return what the process took at its peak; never less than the allocator reserved.

    >>> process_peak(free_at_start=1000, free_now=300, reserved_now=600, reserved_peak=650)
    750
    """
    outside = free_at_start - free_now - reserved_now
    return reserved_peak + max(0, outside)
