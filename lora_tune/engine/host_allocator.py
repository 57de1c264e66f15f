"""The host's allocator, told to keep what a step frees: the next step wants it again."""

import ctypes
import os
from collections.abc import Mapping

# Numbers of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
_NEVER = -1
# Smaller blocks are not mapped one by one. Before glibc 2.35 no more than 32 MiB could be asked for.
_LARGEST = (1 << 30, 1 << 25)
_SAID_BY_PEOPLE = ("GLIBC_TUNABLES", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")


def keep_freed_memory(environ: Mapping[str, str] = os.environ) -> bool:
    """Keep freed blocks in this process, for as long as it lives, instead of giving them back at once.

    By default glibc maps large blocks one by one and unmaps them when they are freed; training on a CPU
    then has every page of every activation made again, and zeroed, in each step (docs/log.md has
    numbers). What is free stays resident, and between pieces that are still used some of it is of no use.

    All threads share one arena: the others that glibc would give them are made of pieces of 64 MiB, which go
    back whatever it is told, and what one thread freed another could not use.

    Args:
        environ: Where a person may have said how the allocator works, which then stands.

    Returns:
        Whether the allocator took it; other C libraries than glibc have no such setting.
    """
    if any(name in environ for name in _SAID_BY_PEOPLE):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # no such function; on Windows no such library
        return False
    if "MALLOC_ARENA_MAX" not in environ:
        mallopt(_M_ARENA_MAX, 1)
    taken = any(mallopt(_M_MMAP_THRESHOLD, size) for size in _LARGEST)
    return bool(mallopt(_M_TRIM_THRESHOLD, _NEVER)) and taken
