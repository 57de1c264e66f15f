"""The promise that a trial leaves nothing behind: allocated memory returns to its baseline.

The baseline is what is allocated, the remaining lanes left out, when the first lanes have trained, been
evaluated and left: the base, and what libraries keep for good from their first use on. On a GPU cuBLAS takes
32 MiB for each of its handles when that is first used, some later than others; so much is no leak.
"""

import gc
from collections.abc import Sequence

from lora_tune.engine.lane import Lane
from lora_tune.engine.memory_reading import MemoryMeter
from lora_tune.errors import MachineError
from lora_tune.units import MIB, format_bytes

TOLERANCE = 0.01  # of the baseline
WORKSPACES_OF_GPUS = 64 * MIB


class MemoryGuard:
    """Compares what is allocated when lanes have left with the first time."""

    def __init__(self, meter: MemoryMeter, *, allowance: int = 0) -> None:
        """Begin without a baseline; ``allowance`` are bytes that libraries may take later."""
        self._meter = meter
        self._allowance = allowance
        self._baseline: int | None = None

    def check(self, lanes: Sequence[Lane], *, trained: bool) -> None:
        """Compare now; ``lanes`` are those that stay. Nothing is known before one has trained and left.

        Raises:
            MachineError: More than a hundredth of the baseline has not been given back.
        """
        if self._baseline is None and not trained:
            return
        found = self._beside(lanes)
        if self._baseline is None:
            self._baseline = found
        limit = self._baseline * (1 + TOLERANCE) + self._allowance
        if found <= limit:
            return
        gc.collect()  # what hangs in a cycle is no leak
        found = self._beside(lanes)
        if found > limit:
            raise MachineError(
                f"{format_bytes(found - self._baseline)} have not been given back since the first trial "
                f"({format_bytes(self._baseline)} were allocated then, the running trials left out). Nothing "
                "of the study is lost: the same command goes on with fresh memory. Please report this."
            )

    def _beside(self, lanes: Sequence[Lane]) -> int:
        """Return the bytes allocated that no lane accounts for."""
        return self._meter.allocated_beside([tensor for lane in lanes for tensor in lane.tensors()])
