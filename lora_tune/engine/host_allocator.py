"""The host's allocator, told to keep what a step frees: the next step wants it again."""

import ctypes

# Numbers of glibc's malloc.h; its values are C ints.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_AS_MUCH_AS_CAN_BE_SAID = 2**31 - 1
_LARGEST_TENSOR = 1 << 30  # larger ones are mapped and given back each time


def keep_freed_memory() -> bool:
    """Keep freed blocks in this process instead of giving them back to the kernel at once.

    By default glibc maps large blocks one by one and unmaps them when they are freed; training on a CPU
    then has every page of every activation made again, and zeroed, in each step (docs/log.md has
    numbers). What the process holds at its widest does not change.

    Returns:
        Whether the allocator took it; other C libraries than glibc have no such setting.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(
        mallopt(_M_MMAP_THRESHOLD, _LARGEST_TENSOR)
        and mallopt(_M_TRIM_THRESHOLD, _AS_MUCH_AS_CAN_BE_SAID)
    )
