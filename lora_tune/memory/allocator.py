"""What PyTorch's caching allocator would reserve for a sequence of allocations.

A model of ``CUDACachingAllocator`` with one stream and default settings:

* sizes are rounded up to 512 bytes;
* requests up to 1 MiB come from segments of 2 MiB, those below 10 MiB from segments of 20 MiB, larger
  ones get a segment of their own, rounded up to 2 MiB;
* the smallest free block that is large enough is taken (best fit), of equal ones that at the lowest
  address, where the newest segment is (``cudaMalloc`` hands out falling addresses: inferred from the
  reserved memory of ten public runs on a T4, not read in a source); it is split if what is left is at
  least 512 bytes (small) or more than 1 MiB (large);
* a freed block is merged with its free neighbours; segments stay cached;
* when a new segment does not fit, all segments without a used block are given back and the request
  is tried once more.

Source: torch ``c10/core/AllocatorConfig.h`` (sizes) and ``c10/cuda/CUDACachingAllocator.cpp``
(``get_free_block``, ``alloc_block``, ``should_split``, ``release_cached_blocks``). Not here:
expandable segments, several streams, garbage collection thresholds.
"""

from bisect import bisect_left, insort
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

MIN_BLOCK = 512
SMALL_SIZE = 1 << 20
SMALL_SEGMENT = 2 << 20
LARGE_SEGMENT = 20 << 20
MIN_LARGE_ALLOC = 10 << 20
ROUND_LARGE = 2 << 20


class AllocationEvent(NamedTuple):
    """A tensor's storage is made, or freed; ``num_bytes`` matters only when it is made."""

    made: bool
    storage: int
    num_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayResult:
    """What the allocator held at most; ``fits`` is false if it ran out of memory.

    Allocated counts whole blocks, as ``torch.cuda.max_memory_allocated`` does: a block that was
    not worth splitting counts with its slack.
    """

    peak_reserved_bytes: int
    peak_allocated_bytes: int
    fits: bool


def replay(events: Iterable[AllocationEvent], *, capacity_bytes: int | None) -> ReplayResult:
    """Return what the allocator reserves when it is given these events.

    Args:
        events: Storages made and freed, in order. A storage that is made has a number no living one
            has.
        capacity_bytes: What the device can give; None for no limit. With a limit the replay
            decides feasibility, since the allocator then gives cached segments back.

    Raises:
        KeyError: A storage is freed that is not alive.

    >>> events = [AllocationEvent(True, 0, 100), AllocationEvent(True, 1, 3 << 20)]
    >>> replay(events, capacity_bytes=None).peak_reserved_bytes == (2 << 20) + (20 << 20)
    True
    """
    allocator = _Allocator(capacity_bytes)
    blocks: dict[int, _Block] = {}
    fits = True
    for event in events:
        if not event.made:
            allocator.free(blocks.pop(event.storage))
            continue
        block = allocator.allocate(event.num_bytes)
        if block is None:
            fits = False
            break
        blocks[event.storage] = block
    return ReplayResult(
        peak_reserved_bytes=allocator.peak_reserved,
        peak_allocated_bytes=allocator.peak_allocated,
        fits=fits,
    )


class _Block:
    """A piece of a segment, linked to the pieces beside it."""

    __slots__ = ("after", "before", "number", "size", "small", "used")

    def __init__(self, number: int, size: int, small: bool) -> None:
        self.number = (
            number  # an address: larger for pieces further back, smaller for later segments
        )
        self.size = size
        self.small = small
        self.used = False
        self.before: _Block | None = None
        self.after: _Block | None = None


class _Allocator:
    def __init__(self, capacity: int | None) -> None:
        self.capacity = capacity
        self.reserved = self.peak_reserved = 0
        self.allocated = self.peak_allocated = 0
        self._next_address = 1 << 62  # falls from segment to segment
        self._free: dict[bool, list[tuple[int, int]]] = {True: [], False: []}
        self._blocks: dict[int, _Block] = {}  # free blocks by address

    def allocate(self, num_bytes: int) -> _Block | None:
        """Return a block, or None when the device has no room even without the cache."""
        size = _rounded(num_bytes, MIN_BLOCK)
        small = size <= SMALL_SIZE
        block = self._best_fit(size, small) or self._new_segment(size, small)
        if block is None:
            return None
        rest = block.size - size
        if rest >= (MIN_BLOCK if small else SMALL_SIZE + 1):
            self._split(block, size)
        block.used = True
        self.allocated += block.size
        self.peak_allocated = max(self.peak_allocated, self.allocated)
        return block

    def free(self, block: _Block) -> None:
        """Put a block back, joined with free blocks beside it."""
        self.allocated -= block.size
        block.used = False
        before, after = block.before, block.after
        if before is not None and not before.used:
            self._take(before)
            before.size += block.size
            before.after = after
            if after is not None:
                after.before = before
            block = before
        if after is not None and not after.used:
            self._take(after)
            block.size += after.size
            block.after = after.after
            if after.after is not None:
                after.after.before = block
        self._put(block)

    def _best_fit(self, size: int, small: bool) -> _Block | None:
        free = self._free[small]
        place = bisect_left(free, (size, -1))
        if place == len(free):
            return None
        block = self._blocks[free[place][1]]
        self._take(block)
        return block

    def _new_segment(self, size: int, small: bool) -> _Block | None:
        if small:
            segment = SMALL_SEGMENT
        elif size < MIN_LARGE_ALLOC:
            segment = LARGE_SEGMENT
        else:
            segment = _rounded(size, ROUND_LARGE)
        if not self._has_room(segment):
            self._release_cached()
            if not self._has_room(segment):
                return None
        self._next_address -= segment
        block = _Block(self._next_address, segment, small)
        self.reserved += segment
        self.peak_reserved = max(self.peak_reserved, self.reserved)
        return block

    def _has_room(self, num_bytes: int) -> bool:
        return self.capacity is None or self.reserved + num_bytes <= self.capacity

    def _release_cached(self) -> None:
        whole = [b for b in self._blocks.values() if b.before is None and b.after is None]
        for block in whole:
            self._take(block)
            self.reserved -= block.size

    def _split(self, block: _Block, size: int) -> None:
        rest = _Block(block.number + size, block.size - size, block.small)
        rest.before, rest.after = block, block.after
        if block.after is not None:
            block.after.before = rest
        block.after, block.size = rest, size
        self._put(rest)

    def _put(self, block: _Block) -> None:
        insort(self._free[block.small], (block.size, block.number))
        self._blocks[block.number] = block

    def _take(self, block: _Block) -> None:
        free = self._free[block.small]
        del free[bisect_left(free, (block.size, block.number))]
        del self._blocks[block.number]


def _rounded(num_bytes: int, unit: int) -> int:
    return -(-num_bytes // unit) * unit
