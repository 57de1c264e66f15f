"""The model of the caching allocator against cases worked out by hand, and against its own rules.

The hand cases follow ``CUDACachingAllocator``: which segment a size comes from, when a block is split,
which block is taken, and what happens when the device is full. MiB are 2**20 bytes.
"""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_tune.memory.allocator import AllocationEvent, ReplayResult, replay

MIB = 1 << 20


def made(storage: int, num_bytes: int) -> AllocationEvent:
    return AllocationEvent(True, storage, num_bytes)


def freed(storage: int) -> AllocationEvent:
    return AllocationEvent(False, storage, 0)


def played(*events: AllocationEvent, capacity: int | None = None) -> ReplayResult:
    return replay(events, capacity_bytes=capacity)


@pytest.mark.parametrize(
    ("num_bytes", "reserved", "allocated"),
    [
        (1, 2 * MIB, 512),
        (513, 2 * MIB, 1024),
        (MIB, 2 * MIB, MIB),  # the largest small request
        (MIB + 1, 20 * MIB, MIB + 512),
        (10 * MIB - 512, 20 * MIB, 10 * MIB - 512),
        (10 * MIB, 10 * MIB, 10 * MIB),  # a segment of its own
        (10 * MIB + 1, 12 * MIB, 10 * MIB + 512),  # 2 MiB - 512 left: split
        (11 * MIB, 12 * MIB, 12 * MIB),  # 1 MiB left is not worth splitting, and counts
        (11 * MIB - 512, 12 * MIB, 11 * MIB - 512),
    ],
)
def test_one_request_takes_its_segment(num_bytes: int, reserved: int, allocated: int) -> None:
    result = played(made(0, num_bytes))
    assert (result.peak_reserved_bytes, result.peak_allocated_bytes) == (reserved, allocated)


def test_small_requests_share_a_segment_until_it_is_full() -> None:
    full = [made(number, MIB // 2) for number in range(4)]
    assert played(*full).peak_reserved_bytes == 2 * MIB
    assert played(*full, made(4, 512)).peak_reserved_bytes == 4 * MIB


def test_small_and_large_requests_do_not_share() -> None:
    # 18 MiB of the large segment are free, and a small request does not take them
    assert played(made(0, 2 * MIB), made(1, 512)).peak_reserved_bytes == 22 * MIB


def test_the_smallest_block_that_is_large_enough_is_taken() -> None:
    # Free are 12 MiB and 30 MiB; 12 MiB go into the first, so that 30 MiB fit again.
    events = (made(0, 30 * MIB), made(1, 12 * MIB), freed(0), freed(1))
    result = played(*events, made(2, 12 * MIB), made(3, 30 * MIB))
    assert result.peak_reserved_bytes == 42 * MIB


def test_a_freed_block_joins_its_free_neighbours() -> None:
    # Three parts of one 20 MiB segment; freed in an order that joins to both sides.
    parts = [made(number, 6 * MIB) for number in range(3)]
    result = played(*parts, freed(0), freed(2), freed(1), made(3, 9 * MIB), made(4, 9 * MIB))
    assert result.peak_reserved_bytes == 20 * MIB


def test_pieces_that_are_not_neighbours_can_not_serve_a_large_request() -> None:
    parts = [made(number, 4 * MIB) for number in range(5)]
    result = played(*parts, freed(0), freed(2), freed(4), made(5, 8 * MIB))
    assert result.peak_reserved_bytes == 40 * MIB
    assert result.peak_allocated_bytes == 20 * MIB


def test_with_little_room_cached_segments_are_given_back_and_the_request_tried_again() -> None:
    events = (made(0, 40 * MIB), freed(0), made(1, 50 * MIB))
    assert played(*events).peak_reserved_bytes == 90 * MIB
    tight = played(*events, capacity=64 * MIB)
    assert tight.fits
    assert tight.peak_reserved_bytes == 50 * MIB


def test_a_segment_that_is_partly_used_is_not_given_back() -> None:
    # 30 MiB of the 40 are free but split off: 34 MiB more need 74.
    events = (made(0, 40 * MIB), freed(0), made(1, 10 * MIB), made(2, 34 * MIB))
    assert not played(*events, capacity=74 * MIB - 1).fits
    assert played(*events, capacity=74 * MIB).fits


def test_more_than_the_device_has_does_not_fit() -> None:
    assert not played(made(0, 24 * MIB), capacity=24 * MIB - 1).fits
    assert played(made(0, 24 * MIB), capacity=24 * MIB).fits


def test_what_is_not_alive_can_not_be_freed() -> None:
    with pytest.raises(KeyError):
        played(made(0, 512), freed(1))


@st.composite
def histories(draw: st.DrawFn) -> list[AllocationEvent]:
    """Makes and frees in any order; nothing is freed twice."""
    events: list[AllocationEvent] = []
    alive: list[int] = []
    for number in range(draw(st.integers(1, 40))):
        if alive and draw(st.booleans()):
            events.append(freed(alive.pop(draw(st.integers(0, len(alive) - 1)))))
        events.append(made(number, draw(st.integers(1, 40 * MIB))))
        alive.append(number)
    return events


def rounded_peak(events: list[AllocationEvent]) -> int:
    sizes: dict[int, int] = {}
    now = peak = 0
    for event in events:
        if event.made:
            sizes[event.storage] = -(-event.num_bytes // 512) * 512
            now += sizes[event.storage]
        else:
            now -= sizes.pop(event.storage)
        peak = max(peak, now)
    return peak


@given(histories())
def test_reserved_is_at_least_allocated_and_that_at_least_what_was_asked(
    events: list[AllocationEvent],
) -> None:
    result = replay(events, capacity_bytes=None)
    assert result.fits
    assert rounded_peak(events) <= result.peak_allocated_bytes <= result.peak_reserved_bytes
    assert result.peak_reserved_bytes % (2 * MIB) == 0


@given(histories())
def test_what_was_reserved_without_a_limit_is_room_enough(events: list[AllocationEvent]) -> None:
    reserved = replay(events, capacity_bytes=None).peak_reserved_bytes
    assert replay(events, capacity_bytes=reserved).fits
    short = replay(events, capacity_bytes=rounded_peak(events) - 512)
    assert not short.fits


@given(histories(), st.integers(1, 400))
def test_a_limit_is_never_passed(events: list[AllocationEvent], mebibytes: int) -> None:
    assert replay(events, capacity_bytes=mebibytes * MIB).peak_reserved_bytes <= mebibytes * MIB
