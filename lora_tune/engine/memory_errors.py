"""Recognising that memory ran out, in whatever words, of a device or of the host.

Libraries say it in a dozen forms. Two, ``CUDNN_STATUS_NOT_SUPPORTED`` and
``CUBLAS_STATUS_NOT_INITIALIZED``, are also said of other things; they count only while the device is
nearly full. An illegal memory access, an assertion in a kernel or a kernel that asks for more shared
memory than there is are no lack of memory: the next, smaller pack would meet them again.
"""

import errno
from collections.abc import Callable

import torch
from safetensors import SafetensorError

from lora_tune.errors import LoraTuneError

_OUT_OF_MEMORY = (
    "out of memory",  # CUDA, its driver, HIP, XPU, MPS, Triton
    "can't allocate memory",  # torch's allocator on a CPU
    "cannot allocate memory",  # the system's own words, as Rust repeats them
    "std::bad_alloc",  # what torch makes of a C++ exception
    "cublas_status_alloc_failed",
    "cudnn_status_alloc_failed",
    "is killed by signal: killed",  # a data-loader worker
)
_ONLY_WHEN_NEARLY_FULL = (
    "cudnn_status_not_supported",  # the workspace does not fit, or the operation has no kernel
    "cublas_status_not_initialized",  # no memory for its handle, or a device that is broken
)
# Free on a device that is nearly full. A workspace of cuDNN takes some hundred MiB.
_NEARLY_FULL = 0.05


def free_share() -> float | None:
    """Return the free share of the current device's memory, torch's unused blocks included.

    None where there is no such device.
    """
    if not torch.cuda.is_available():
        return None
    free, total = torch.cuda.mem_get_info()
    unused = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    return (free + unused) / total


def is_out_of_memory(
    error: BaseException, *, free: Callable[[], float | None] = free_share
) -> bool:
    """Return whether an error means that device or host memory ran out.

    The errors that it was raised from count as well; a group does when all of its errors do. A message
    that is already meant for the user stays what it is.

    Args:
        error: While it is handled: its traceback still holds what had been allocated.
        free: Returns the free share of the device's memory, None where that is not known; then a form that
            may mean something else is taken for a lack of memory.

    >>> is_out_of_memory(RuntimeError("CUDA error: out of memory"))
    True
    >>> is_out_of_memory(RuntimeError("shape mismatch"))
    False
    """
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, LoraTuneError):
            return False
        if isinstance(found, BaseExceptionGroup):
            return all(is_out_of_memory(member, free=free) for member in found.exceptions)
        if _says_so(found, free):
            return True
        found = found.__cause__
    return False


def _says_so(error: BaseException, free: Callable[[], float | None]) -> bool:
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    if not isinstance(error, (RuntimeError, SafetensorError)):
        return False
    text = str(error).lower()
    if any(form in text for form in _OUT_OF_MEMORY):
        return True
    return any(form in text for form in _ONLY_WHEN_NEARLY_FULL) and _is_nearly_full(free)


def _is_nearly_full(free: Callable[[], float | None]) -> bool:
    share = free()
    return share is None or share < _NEARLY_FULL
