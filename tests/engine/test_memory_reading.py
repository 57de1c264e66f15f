"""Memory meters: the arithmetic of a process' peak, a CPU without peaks, and a real GPU if there is one."""

import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lora_tune.engine.memory_reading import CudaMeter, HostMeter, open_meter, process_peak
from lora_tune.units import MIB

SIZES = st.integers(0, 2**37)


@given(free=SIZES, outside=SIZES, now=SIZES, above=SIZES)
def test_a_process_is_its_largest_reserve_and_what_lies_outside(
    free: int, outside: int, now: int, above: int
) -> None:
    found = process_peak(
        free_at_start=free,
        free_now=free - outside - now,
        reserved_now=now,
        reserved_peak=now + above,
    )
    assert found == now + above + outside


@given(free=SIZES, returned=SIZES, now=SIZES)
def test_memory_that_others_give_back_is_not_taken_from_the_process(
    free: int, returned: int, now: int
) -> None:
    found = process_peak(
        free_at_start=free, free_now=free + returned - now, reserved_now=now, reserved_peak=now
    )
    assert found == now


def test_a_cpu_is_read_but_has_no_peaks() -> None:
    meter = open_meter("cpu")
    assert isinstance(meter, HostMeter)
    assert 0 < meter.free_bytes <= psutil.virtual_memory().total
    meter.restart()
    assert meter.peaks() is None
    assert 0 < meter.in_use() <= psutil.virtual_memory().total


@pytest.mark.gpu
def test_a_gpu_s_peaks_are_those_since_the_restart() -> None:
    meter = open_meter("cuda")
    assert isinstance(meter, CudaMeter)
    held = torch.zeros(64 * MIB, dtype=torch.uint8, device="cuda")
    large = torch.zeros(512 * MIB, dtype=torch.uint8, device="cuda")
    assert meter.peaks().allocated_bytes >= 576 * MIB
    del large
    meter.restart()
    peaks = meter.peaks()
    assert 64 * MIB <= peaks.allocated_bytes < 512 * MIB
    assert peaks.reserved_bytes < 512 * MIB  # the freed block was given back
    small = torch.zeros(128 * MIB, dtype=torch.uint8, device="cuda")
    del small
    peaks = meter.peaks()
    assert 192 * MIB <= peaks.allocated_bytes < 256 * MIB
    assert peaks.process_bytes >= peaks.reserved_bytes >= peaks.allocated_bytes
    assert meter.in_use() == peaks.allocated_bytes
    assert held.numel() == 64 * MIB
