"""Lanes of a pack beside each other on the cores of a CPU: a thread for each part of them.

An operation on all cores ends with a wait for the slowest core, thousands of times in a pass, and small
operations gain little from a second core. Lanes share nothing but frozen weights, so they can be cut into
parts that are computed beside each other, each on its own cores, and wait for each other once a step:
1.4 times as fast on two cores, from 1.05 to 2.0 (``benchmarks/lane_threads.py``).

The price is that one interpreter tells all parts what to compute, which limits their number.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TypeVar

import torch

# Multiply-adds of a mean linear layer. With less in the smallest of two parts these were slower than one part
# in bfloat16 as often as not.
LEAST_WORK = 4e5
# What a core does while the interpreter prepares one layer, forward and backward: about half a millisecond.
WORK_OF_INTERPRETER = 1.25e7
MOST_GAIN = 2.0  # of a second core at most; of more it is not known
T = TypeVar("T")


def num_parts(sizes: Sequence[float], *, cores: int) -> int:
    """Return into how many parts to cut lanes, at least 1.

    Two wherever there is work for them. More only if the interpreter could prepare them one after the other
    while all cores compute what there is; this is reckoned, measured are two.

    Args:
        sizes: Multiply-adds of a mean linear layer in one pass, lane by lane.
        cores: How many threads an operation would use.

    >>> num_parts([4e7] * 3, cores=2), num_parts([4e7], cores=2), num_parts([1e5, 1e5], cores=2)
    (2, 1, 1)
    >>> num_parts([2e8] * 8, cores=8), num_parts([2e8] * 8, cores=64)
    (8, 4)
    """
    prepared = 2 + int(sum(sizes) / (cores * WORK_OF_INTERPRETER))
    count = min(len(sizes), cores, prepared)
    while count > 1 and _smallest_part(sizes, count) < LEAST_WORK:
        count -= 1
    return max(1, count)


def most_gain(device: torch.device) -> float:
    """Return how many times as fast parts can be as the same lanes in one."""
    return MOST_GAIN if device.type == "cpu" and torch.get_num_threads() > 1 else 1.0


def cut(sizes: Sequence[float], count: int) -> list[list[int]]:
    """Return which items form each part, each in rising order, so that the largest part is small.

    The largest item goes to the smallest part, and so on: at most 4/3 of the best there is (Graham 1969,
    "Bounds on multiprocessing timing anomalies").

    >>> cut([5.0, 1.0, 4.0, 2.0], 2)
    [[0, 1], [2, 3]]
    """
    parts: list[list[int]] = [[] for _ in range(count)]
    totals = [0.0] * count
    for item in sorted(range(len(sizes)), key=lambda k: -sizes[k]):
        least = totals.index(min(totals))
        parts[least].append(item)
        totals[least] += sizes[item]
    return [sorted(part) for part in parts]


def _smallest_part(sizes: Sequence[float], count: int) -> float:
    return min(sum(sizes[k] for k in part) for part in cut(sizes, count))


class LaneThreads:
    """Threads that live as long as a pack; on another device than a CPU there is never more than one part."""

    def __init__(self, device: torch.device) -> None:
        self._on_cpu = device.type == "cpu"
        self._pool: ThreadPoolExecutor | None = None
        self._size = 0  # threads of the pool

    @property
    def cores(self) -> int:
        """How many cores there are to share: as many as torch's operations would use."""
        return torch.get_num_threads() if self._on_cpu else 1

    def run(self, works: Sequence[Callable[[], T]]) -> list[T]:
        """Return what all of ``works`` return, each done in a thread of its own on its share of the cores.

        A single one is done where this is called. All have ended when this returns or raises.

        Raises:
            Exception: What the first of them raised that did not return.
        """
        if len(works) == 1:
            return [works[0]()]
        cores, pool = self.cores, self._pool_of(len(works))
        share = max(1, cores // len(works))
        futures: list[Future[T]] = []
        try:
            for work in works:
                futures.append(pool.submit(_on_cores, share, work))
            wait(futures)
        finally:
            wait(futures)  # whatever interrupted this thread: nobody else may have the lanes yet
            # a thread's own number is also what new threads would begin with
            torch.set_num_threads(cores)
        return [future.result() for future in futures]

    def _pool_of(self, size: int) -> ThreadPoolExecutor:
        """Return a pool of at least so many threads."""
        if self._pool is None or self._size < size:
            if self._pool is not None:
                self._pool.shutdown()
            self._pool, self._size = ThreadPoolExecutor(size, thread_name_prefix="lanes"), size
        return self._pool


def _on_cores(count: int, work: Callable[[], T]) -> T:
    """Do a piece of work with so many threads for each of its operations."""
    if (
        torch.get_num_threads() != count
    ):  # asked first: asking makes the thread take the process's number
        torch.set_num_threads(count)
    return work()
