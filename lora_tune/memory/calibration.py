"""The safety margin of a study from its own readings: predicted peaks against measured ones.

    residual   r = measured / predicted - 1              above 0: the estimate was too low
    margin     m: a pack is counted with (1 + m) times its estimate
    budget     (capacity - outside) / (1 + m)            what the estimate of a pack may be

``memory.safety`` s of the study file is the margin before anything was measured: m = 1/s - 1.

After n readings the margin is an upper quantile of the residuals that holds for the next pack with
probability q whatever the residuals' distribution is. If the n residuals and the next one are
exchangeable, the rank of the next among all n + 1 is uniform, so it is at most the k-th smallest of
the n with probability k/(n+1) (more with ties). The smallest k that makes this at least q is
ceil((n+1)*q): the quantile of split conformal prediction. For n < q/(1-q) that rank is n + 1,
and no reading is high enough; then the prior counts, and the largest residual where it exceeds the
prior. With q = 0.95 that is so below 19 readings.

Packs of one study are not quite exchangeable: later ones have fewer lanes and continue the same
trials. So the quantile is a correction for the study that was measured, no promise about another.

Source: Vovk, Gammerman, Shafer, Algorithmic Learning in a Random World, 2005, chapter 2; Lei et
al., Distribution-Free Predictive Inference for Regression, JASA 113 (2018), section 2.2,
arXiv 1604.04173.

Not here: where readings come from (``engine/memory_reading.py``) and what a margin changes
(``tuner.py``).
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction

from lora_tune.records import MemoryReading, PackPeak

QUANTILE = 0.95
"""Share of the packs to come whose peak the margin is meant to cover."""

LEAST_STEPS = 2
"""Optimizer steps before a peak counts: a fresh lane has no optimizer state in its first step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Residual:
    """A prediction and what was measured, both in bytes and above 0."""

    predicted_bytes: int
    measured_bytes: int

    @property
    def relative(self) -> float:
        """Signed error of the estimate: above 0, more was needed than predicted.

        >>> Residual(predicted_bytes=1000, measured_bytes=1030).relative
        0.03
        """
        return (self.measured_bytes - self.predicted_bytes) / self.predicted_bytes


def quantile_rank(num_residuals: int, quantile: float = QUANTILE) -> int | None:
    """Return which residual, counted from the smallest (1), bounds the next; None: too few.

    The rank is ceil((n+1)*q), in exact arithmetic on the decimal that ``quantile`` is written as.

    Raises:
        ValueError: ``quantile`` is not between 0 and 1.

    >>> [quantile_rank(n) for n in (0, 18, 19, 38, 39, 100)]
    [None, None, 19, 38, 38, 96]
    """
    if not 0 < quantile < 1:
        raise ValueError(f"quantile is {quantile}, it lies between 0 and 1")
    rank = math.ceil((num_residuals + 1) * Fraction(str(quantile)))
    return rank if rank <= num_residuals else None


def least_residuals(quantile: float = QUANTILE) -> int:
    """Return the number of residuals from which on they alone make the margin.

    >>> least_residuals(0.95), least_residuals(0.9)
    (19, 9)
    """
    share = Fraction(str(quantile))
    return math.ceil(share / (1 - share))


def safety_margin(
    residuals: Sequence[Residual], *, prior: float, quantile: float = QUANTILE
) -> float:
    """Return the share by which a pack may need more than its estimate.

    - too few residuals (``least_residuals``): the prior's margin, or the largest residual if that
      is larger; so few readings can show that the prior is too small, never that it is too large.
    - enough: the residual of rank ceil((n+1)*q), the prior no longer counts. An estimate that is
      too high throughout makes no negative margin: a budget never exceeds the memory there is.

    Args:
        residuals: Of the study's packs.
        prior: ``memory.safety``, the share of the memory that may be used by the estimate.
        quantile: q.

    Returns:
        m >= 0.

    Raises:
        ValueError: ``prior`` is not above 0 and at most 1, or ``quantile`` not between 0 and 1.

    >>> few = [Residual(predicted_bytes=100, measured_bytes=peak) for peak in (99, 101)]
    >>> round(safety_margin(few, prior=0.95), 4), safety_margin(few, prior=1.0)
    (0.0526, 0.01)
    >>> safety_margin(few * 10, prior=0.95)
    0.01
    """
    if not 0 < prior <= 1:
        raise ValueError(f"prior is {prior}, it is above 0 and at most 1")
    ordered = sorted(residual.relative for residual in residuals)
    rank = quantile_rank(len(ordered), quantile)
    if rank is None:
        return max([1 / prior - 1, *ordered])
    return max(0.0, ordered[rank - 1])


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """What the readings of a study say about its packs to come."""

    num_readings: int  # that count; see ``counted``
    margin: float
    outside_bytes: int  # most that a process took beside torch's allocator
    budget_bytes: int  # what the estimate of a pack may be


def calibrate(
    readings: Iterable[MemoryReading],
    *,
    capacity_bytes: int,
    prior: float,
    quantile: float = QUANTILE,
) -> Calibration:
    """Return the margin and the budget after the readings.

    The margin is that of peak allocated. Reserved is not used: what the allocator keeps without
    pressure depends on how much was free, and is given back before memory runs out. Memory outside
    the allocator does not grow with the pack, so it is taken from the capacity in bytes. The
    prior's margin stands for it too: below ``least_residuals`` the budget is the smaller of prior
    and readings, and memory outside is not charged twice.

    Args:
        readings: All of the study.
        capacity_bytes: What was free before the base was loaded, or the size of the planned GPU.
        prior: ``memory.safety``.
        quantile: Share of packs to be covered.
    """
    kept = counted(readings)
    residuals = [allocated_residual(reading) for reading in kept]
    outside = max((reading.measured.outside_bytes for reading in kept), default=0)
    shown = safety_margin(residuals, prior=1.0, quantile=quantile)  # without what is only assumed
    budget = int((capacity_bytes - outside) / (1 + shown))
    if quantile_rank(len(residuals), quantile) is None:
        budget = min(budget, int(capacity_bytes * prior))
    return Calibration(
        num_readings=len(kept),
        margin=safety_margin(residuals, prior=prior, quantile=quantile),
        outside_bytes=outside,
        budget_bytes=max(0, budget),
    )


def counted(readings: Iterable[MemoryReading]) -> list[MemoryReading]:
    """Return the readings that a margin is made from.

    Left out are packs that ended before ``LEAST_STEPS`` steps; one that ran out of memory counts
    whenever it did.
    """
    return [
        reading
        for reading in readings
        if reading.measured.out_of_memory or reading.measured.steps >= LEAST_STEPS
    ]


def allocated_residual(reading: MemoryReading) -> Residual:
    """Return peak allocated against its estimate.

    Of a pack that ran out of memory only a bound is known: beside what lies outside the allocator
    it needed at least a byte more than was free.
    """
    measured = reading.measured
    needed = measured.allocated_bytes
    if measured.out_of_memory:
        needed = max(needed, measured.free_bytes - measured.outside_bytes + 1)
    return Residual(predicted_bytes=reading.predicted_allocated_bytes, measured_bytes=needed)


def reserved_residual(reading: MemoryReading) -> Residual:
    """Return peak reserved against its estimate."""
    return Residual(
        predicted_bytes=reading.predicted_reserved_bytes,
        measured_bytes=reading.measured.reserved_bytes,
    )


def process_residual(reading: MemoryReading) -> Residual:
    """Return what the process took against the estimate of reserved memory; bounded as above."""
    return Residual(
        predicted_bytes=reading.predicted_reserved_bytes,
        measured_bytes=_process_needed(reading.measured),
    )


def supported_safety(
    readings: Iterable[MemoryReading], *, quantile: float = QUANTILE
) -> float | None:
    """Return the ``memory.safety`` that the readings support, None when they are too few.

    It is 1 / (1 + the quantile of process / predicted allocated - 1): everything that the process
    took, cached blocks included, against what plans are made with. Without pressure the allocator
    keeps more than it needs, so this is on the safe side.
    """
    residuals = [
        Residual(
            predicted_bytes=reading.predicted_allocated_bytes,
            measured_bytes=_process_needed(reading.measured),
        )
        for reading in counted(readings)
    ]
    if quantile_rank(len(residuals), quantile) is None:
        return None
    return 1 / (1 + safety_margin(residuals, prior=1.0, quantile=quantile))


def _process_needed(measured: PackPeak) -> int:
    if measured.out_of_memory:
        return max(measured.process_bytes, measured.free_bytes + 1)
    return measured.process_bytes
