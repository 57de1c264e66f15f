"""What measured peaks change in a running study: how many lanes the packs to come may have.

Lanes are all that a reading may change. A lane gives the same numbers in any pack, so the table of
trials stays that of the plan: proposals still come in generations of the plan's lanes, and ranks
are still lowered to what the plan found. Lanes are only ever lowered: a plan that proves too
careful is kept, since more lanes would be other generations.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from lora_tune.memory.calibration import calibrate
from lora_tune.records import LaneLimit, MemoryLog, MemoryReading, PackPeak, StudyLock, TrialConfig
from lora_tune.search.gate import Gate, PackPlan


class Calibrator:
    """Puts readings beside their estimates and lowers the lanes when the plan proves too large.

    Everything is a function of the log, which the caller stores, so a resumed study goes on alike.
    """

    def __init__(
        self,
        gate: Gate,
        pack_plan: PackPlan,
        lock: StudyLock,
        *,
        log: MemoryLog,
        config_of: Callable[[int], TrialConfig],
    ) -> None:
        """Begin or go on.

        Args:
            gate: The study's estimates.
            pack_plan: How its packs train.
            lock: Its budget and target sets.
            log: What earlier runs measured.
            config_of: Returns a trial's configuration.
        """
        self.gate, self.pack_plan, self.lock = gate, pack_plan, lock
        self.log = log
        self._config_of = config_of

    @property
    def lanes(self) -> int:
        """Most lanes of the packs to come."""
        return self.log.limits[-1].lanes if self.log.limits else self.pack_plan.most_lanes

    def add(self, peaks: Sequence[PackPeak]) -> str:
        """Add what was measured to the log; return a sentence if the lanes were lowered."""
        readings = (*self.log.readings, *map(self._reading, peaks))
        self.log = replace(self.log, readings=readings)
        limit = self._limit()
        if limit is None:
            return ""
        self.log = replace(self.log, limits=(*self.log.limits, limit))
        return (
            f"measured peaks may exceed the estimate by {limit.margin:.1%}: packs have {limit.lanes} "
            f"lanes from now on instead of {limit.lanes_before}."
        )

    def _reading(self, peak: PackPeak) -> MemoryReading:
        predicted = self.gate.predict_pack(
            [self._config_of(trial) for trial in peak.trials],
            self.pack_plan,
            max_length=peak.max_length,
            label_fraction=peak.num_labels / (peak.rows * peak.max_length),
        )
        return MemoryReading(
            measured=peak,
            predicted_allocated_bytes=predicted.peak_allocated_bytes,
            predicted_reserved_bytes=predicted.peak_reserved_bytes,
        )

    def _limit(self) -> LaneLimit | None:
        plan, safety = self.lock.plan, self.gate.spec.memory.safety
        found = calibrate(
            self.log.readings,
            capacity_bytes=plan.capacity_bytes or math.ceil(plan.budget_bytes / safety),
            prior=safety,
        )
        if found.budget_bytes >= plan.budget_bytes:
            return None
        lanes = self.gate.most_lanes_within(
            found.budget_bytes, self.pack_plan, self.lock.target_sets
        )
        if lanes >= self.lanes:
            return None
        return LaneLimit(
            num_readings=found.num_readings,
            margin=found.margin,
            budget_bytes=found.budget_bytes,
            lanes_before=self.lanes,
            lanes=lanes,
        )
