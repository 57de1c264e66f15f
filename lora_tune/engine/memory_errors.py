"""Recognising that memory ran out, in whatever words."""

import torch

_OUT_OF_MEMORY = (
    "out of memory",  # CUDA, the CUDA driver, HIP
    "can't allocate memory",  # DefaultCPUAllocator
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_NOT_SUPPORTED",  # what cuDNN says when its workspace does not fit
    "is killed by signal: Killed",  # a data-loader worker
)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that device or host memory ran out.

    >>> is_out_of_memory(RuntimeError("CUDA error: out of memory"))
    True
    >>> is_out_of_memory(RuntimeError("shape mismatch"))
    False
    """
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(form in str(error) for form in _OUT_OF_MEMORY)
