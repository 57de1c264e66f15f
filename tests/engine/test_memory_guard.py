"""When memory that lanes leave behind counts as a leak."""

from collections.abc import Sequence

import pytest
import torch

from lora_tune.engine.memory_guard import TOLERANCE, WORKSPACES_OF_GPUS, MemoryGuard
from lora_tune.engine.memory_reading import HostMeter
from lora_tune.errors import MachineError
from lora_tune.units import GIB, MIB


class GivenMeter(HostMeter):
    """Says that so much is allocated as it was told."""

    allocated = GIB

    def allocated_beside(self, tensors: Sequence[torch.Tensor]) -> int:
        return self.allocated


def test_the_baseline_is_taken_when_the_first_lane_has_trained() -> None:
    meter = GivenMeter()
    guard = MemoryGuard(meter)
    guard.check([], trained=False)  # evaluated alone: backward has not run yet
    meter.allocated += 100 * MIB
    guard.check([], trained=True)
    meter.allocated += 1 * MIB
    guard.check([], trained=False)
    meter.allocated += 100 * MIB
    with pytest.raises(MachineError, match=r"101\.0 MiB have not been given back"):
        guard.check([], trained=False)


@pytest.mark.parametrize("allowance", [0, WORKSPACES_OF_GPUS])
def test_what_libraries_may_take_later_is_no_leak_and_no_byte_more(allowance: int) -> None:
    meter = GivenMeter()
    guard = MemoryGuard(meter, allowance=allowance)
    guard.check([], trained=True)
    meter.allocated = int(GIB * (1 + TOLERANCE)) + allowance
    guard.check([], trained=True)
    meter.allocated += 2
    with pytest.raises(MachineError, match="the same command goes on with fresh memory"):
        guard.check([], trained=True)
