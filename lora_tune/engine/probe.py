"""What only a measurement can decide: compute type on a CPU, rows a pass, and how many lanes pay.

A reading is one pass to warm up and two measured ones, each forward, backward and an optimizer step:
as little as gives an honest number. Gradients of earlier passes (accumulation) are in
neither its time nor its peak. All readings use the same rows, those whose length is nearest to the mean
of the training split: tokens/s compare, and a longest row decides nothing.

On a CPU the compute type whose bare matrix products are faster is read first: a probe of a short study is
cut after one reading, and stays in the type of that one.

Where the study file leaves no choice its own plan is read if that can be afforded, by a single pass: the
forecast needs its speed. The decision is a function of the readings, ``choose_reading``. Both are written to
``study.lock.json`` once, so that a resumed study does not measure again.
"""

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import NamedTuple

import torch

from lora_tune.engine.base import DTYPES, BaseModel
from lora_tune.engine.memory_errors import is_out_of_memory
from lora_tune.engine.pack import PackSettings, TrialPack
from lora_tune.memory.request import WORTHWHILE_GAIN
from lora_tune.records import LaneJob, ProbeReading, TokenizedRow, TrialConfig

# Seconds that the probe may take, as a share of those of the study.
MOST_COST = 0.05
# A pass of fewer tokens mostly reads weights, and says little of a compute type. SmolLM2-135M in NF4 on
# two cores with 1, 2, 4, 8 rows of 45 tokens a pass: 34, 55, 86, 121 tokens/s in float32 and 42, 72,
# 113, 131 in bfloat16 (best of two).
LEAST_PASS_TOKENS = 128
PASSES = 3  # of a reading: one to warm up, two measured
# Rows, in and out features of the bare product: of a small layer and pass.
_PRODUCT = (256, 1024, 1024)


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeOptions:
    """What is open, and how long the study will be."""

    micro_batch_sizes: tuple[int, ...]  # to choose from
    most_lanes: Callable[[int], int]  # how many lanes of a micro-batch may be chosen, at least 1
    compute_dtypes: tuple[str, ...]  # to choose from; the base's own alone if that is settled
    study_tokens: float  # that the study's trials will train
    most_study_s: float = float("inf")  # after which the study begins no new trial
    # lanes and rows a lane that the study file settles, to be read for the forecast; then there is always
    # a reading, though nothing may be open
    given: tuple[int, int] | None = None


class ProbeResult(NamedTuple):
    """The plan that was chosen, and what it was chosen from."""

    lanes: int
    micro_batch_size: int
    compute_dtype: str
    readings: tuple[ProbeReading, ...]  # in order of time; empty: nothing was open
    probe_s: float
    cut: bool  # the next reading could have taken the probe beyond ``MOST_COST``


def choose_reading(readings: Sequence[ProbeReading]) -> ProbeReading:
    """Return the reading whose plan the study keeps.

    Each reading, in the order of time, takes the place of the one kept so far if it has a tenth more
    tokens/s, be it of more rows or lanes or of another compute type: two passes of few rows on a shared
    machine tell no less apart. If memory ran out in all of them it is the first, which needs least.

    >>> def reading(lanes, tokens_per_s):
    ...     return ProbeReading(
    ...         lanes=lanes,
    ...         micro_batch_size=8,
    ...         compute_dtype="bfloat16",
    ...         tokens_per_s=tokens_per_s,
    ...         peak_bytes=None,
    ...     )
    >>> choose_reading([reading(1, 1000.0), reading(2, 1800.0), reading(4, 1900.0)]).lanes
    2
    """
    kept = readings[0]
    for reading in readings[1:]:
        needed = kept.tokens_per_s * (1.0 + WORTHWHILE_GAIN)
        if not reading.out_of_memory and reading.tokens_per_s > needed:
            kept = reading
    return kept


def rising_sizes(sizes: Sequence[int], *, mean_tokens: float) -> tuple[int, ...]:
    """Return the micro-batches to try with one lane, rising, each at least twice the one before.

    The last is the largest; none has passes below ``LEAST_PASS_TOKENS`` tokens unless the largest has.

    >>> rising_sizes((1, 2, 3, 4, 6, 12), mean_tokens=64), rising_sizes((1, 2), mean_tokens=8)
    ((3, 6, 12), (2,))
    """
    falling = [max(sizes)]
    while smaller := [
        size
        for size in sizes
        if 2 * size <= falling[-1] and size * mean_tokens >= LEAST_PASS_TOKENS
    ]:
        falling.append(max(smaller))
    return tuple(reversed(falling))


def by_product_speed(
    dtypes: Sequence[str], *, clock: Callable[[], float] = time.perf_counter
) -> tuple[str, ...]:
    """Return compute types by the time of a bare matrix product on the CPU, the fastest first.

    The better of three, after one to warm up; some milliseconds in all. Equal types keep their order.
    """
    rows, width, out = _PRODUCT
    seconds = {}
    for dtype in dtypes:
        x_NI = torch.ones(rows, width, dtype=DTYPES[dtype])
        w_OI = torch.ones(out, width, dtype=DTYPES[dtype])
        taken = []
        for _ in range(4):
            began = clock()
            torch.nn.functional.linear(x_NI, w_OI)
            taken.append(clock() - began)
        seconds[dtype] = min(taken[1:])
    return tuple(sorted(dtypes, key=seconds.__getitem__))


def average_rows(rows: Sequence[TokenizedRow], count: int) -> tuple[TokenizedRow, ...]:
    """Return ``count`` rows whose lengths are nearest to the mean; if there are too few, some twice."""
    mean = mean_length(rows)
    nearest = sorted(rows, key=lambda row: abs(len(row.input_ids) - mean))[:count]
    return tuple(nearest[i % len(nearest)] for i in range(count))


def mean_length(rows: Sequence[TokenizedRow]) -> float:
    """Return the mean number of tokens of a row."""
    return fmean(len(row.input_ids) for row in rows)


def measure_tokens_per_s(
    base: BaseModel,
    rows: Sequence[TokenizedRow],
    settings: PackSettings,
    config: TrialConfig,
    *,
    lanes: int,
    clock: Callable[[], float] = time.perf_counter,
    one_pass: bool = False,
) -> float:
    """Return tokens/s of equal lanes over two optimizer steps, after one to warm up; or over one alone.

    On a CPU, where other work only ever makes a step slower, it is the better of the two. On a GPU
    they are timed together: a step does not wait for the device, and is not made to.
    """
    pack = TrialPack(base, rows, settings)
    members = [pack.new_lane(_job(config)) for _ in range(lanes)]
    seconds = []
    several = (1, 2) if base.device.type == "cuda" else (1, 1, 1)
    for steps in (1,) if one_pass else several:
        begin = clock()
        for _ in range(steps):
            pack.train_step(members)
        if base.device.type == "cuda":
            torch.cuda.synchronize(base.device)
        seconds.append((clock() - begin) / steps)
    pack.read()
    return sum(lane.points[-1].num_tokens for lane in members) / min(seconds[1:] or seconds)


class Probe:
    """Measures plans on one base until more no longer pays, or measuring it would take too long.

    Attributes:
        readings: What was measured, in order of time.
        cut: Whether a reading was left out because of its cost.
    """

    def __init__(
        self,
        base: BaseModel,
        rows: Sequence[TokenizedRow],
        settings: PackSettings,
        config: TrialConfig,
        options: ProbeOptions,
        *,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Prepare; nothing is measured yet.

        Args:
            base: With gradient checkpointing as the study will train.
            rows: The training split.
            settings: Those of the study; the probe's batches are smaller.
            config: Of every lane: the largest that the study can propose.
            options: What is open.
            clock: Returns seconds.
        """
        self.base, self.settings, self.config, self.options = base, settings, config, options
        self.readings: list[ProbeReading] = []
        self.cut = False
        sizes = options.micro_batch_sizes
        self._rows = average_rows(rows, max(*sizes, options.given[1] if options.given else 0))
        self._sizes = rising_sizes(sizes, mean_tokens=mean_length(self._rows))
        self._setup_s = 0.0  # beside the passes, of a lane in the last reading
        self._clock = clock
        self._began = clock()

    def run(self) -> ProbeResult:
        """Measure and decide; the base is left in the chosen type, and nothing in memory.

        With one lane the compute types come first, then rising micro-batches; then 2, 4, ... lanes
        of the chosen micro-batch, or of the largest below it of which so many fit. A given plan is read last.
        """
        first, smallest = self._sizes[0], min(self.options.micro_batch_sizes)
        if not self.is_needed and self.options.given is None:
            return self._result(lanes=1, micro_batch_size=first)
        for dtype in self.options.compute_dtypes:
            self._try(lanes=1, micro_batch_size=first, compute_dtype=dtype)
        if self.kept.out_of_memory:  # the executor finds out which trials can train at all
            return self._result(lanes=1, micro_batch_size=smallest)
        for size in self._sizes[1:]:
            if not self._try(lanes=1, micro_batch_size=size):
                break
        if self.cut:  # not known, so as without a probe: the largest that fits
            return self._result(lanes=1, micro_batch_size=self._sizes[-1])
        chosen, lanes = self.kept.micro_batch_size, 2
        while (size := self._size_for(lanes, at_most=chosen)) and self._try(
            lanes=lanes, micro_batch_size=size
        ):
            lanes *= 2
        self._read_given()
        return self._result(lanes=self.kept.lanes, micro_batch_size=self.kept.micro_batch_size)

    @property
    def is_needed(self) -> bool:
        """Whether there is a choice."""
        options = self.options
        several = len(self._sizes) > 1 or len(options.compute_dtypes) > 1
        return several or options.most_lanes(min(options.micro_batch_sizes)) > 1

    @property
    def kept(self) -> ProbeReading:
        """The reading whose plan is the best so far."""
        return choose_reading(self.readings)

    def _result(self, *, lanes: int, micro_batch_size: int) -> ProbeResult:
        dtype = self.kept.compute_dtype if self.readings else self.options.compute_dtypes[0]
        self._compute_in(dtype)
        return ProbeResult(
            lanes=lanes,
            micro_batch_size=micro_batch_size,
            compute_dtype=dtype,
            readings=tuple(self.readings),
            probe_s=self._clock() - self._began if self.readings else 0.0,
            cut=self.cut,
        )

    def _size_for(self, lanes: int, *, at_most: int) -> int:
        """Return the largest micro-batch of which so many lanes fit, 0 if there is none."""
        for size in sorted(self.options.micro_batch_sizes, reverse=True):
            if size <= at_most and self.options.most_lanes(size) >= lanes:
                return size
        return 0

    def _read_given(self) -> None:
        """Read the plan that the study file settles, by one pass, if it was not read and can be afforded."""
        if self.options.given is None:
            return
        lanes, size = self.options.given
        known = [(reading.lanes, reading.micro_batch_size) for reading in self.readings]
        pass_s = self._passes_s(lanes * size, self.kept) / PASSES + lanes * self._setup_s
        if (lanes, size) not in known and self._within_share(pass_s, self._study_s(1.0)):
            self._take(lanes, size, self.kept.compute_dtype, one_pass=True)

    def _try(self, *, lanes: int, micro_batch_size: int, compute_dtype: str = "") -> bool:
        """Take a reading, unless that would take too long; return whether its plan is the best now."""
        dtype = compute_dtype or self.kept.compute_dtype
        if self.readings and not self._affordable(lanes * micro_batch_size, lanes):
            self.cut = True
            return False
        reading = self._take(lanes, micro_batch_size, dtype)
        return self.kept is reading

    def _take(
        self, lanes: int, micro_batch_size: int, dtype: str, *, one_pass: bool = False
    ) -> ProbeReading:
        """Take a reading and keep it."""
        self._compute_in(dtype)
        reading = ProbeReading(
            lanes=lanes,
            micro_batch_size=micro_batch_size,
            compute_dtype=dtype,
            tokens_per_s=0.0,
            peak_bytes=None,
            out_of_memory=True,
        )
        began = self._clock()
        try:
            tokens_per_s, peak = self._measure(lanes, micro_batch_size, one_pass=one_pass)
            reading = replace(
                reading, tokens_per_s=tokens_per_s, peak_bytes=peak, out_of_memory=False
            )
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        self._free(reading)  # after the handler: the traceback holds the tensors
        self.readings.append(reading)
        if not reading.out_of_memory:
            passes_s = self._passes_s(lanes * micro_batch_size, reading)
            self._setup_s = max(0.0, self._clock() - began - passes_s) / lanes
        return reading

    def _affordable(self, num_rows: int, lanes: int) -> bool:
        """Say whether the probe surely keeps to its share of the study with one more reading.

        The reading is taken to be as fast as the best one so far, and the study, whose seconds the share
        is of, to be faster in proportion to the rows.
        """
        best = self.kept
        if best.out_of_memory:
            return True
        growth = max(1.0, num_rows / (best.lanes * best.micro_batch_size))
        reading_s = self._passes_s(num_rows, best) + lanes * self._setup_s
        return self._within_share(reading_s, self._study_s(growth))

    def _study_s(self, growth: float) -> float:
        """Return the seconds of the study when it is ``growth`` times as fast as the best reading."""
        return self.options.study_tokens / (self.kept.tokens_per_s * growth)

    def _within_share(self, reading_s: float, study_s: float) -> bool:
        spent_s = self._clock() - self._began + reading_s
        return spent_s <= MOST_COST * min(study_s, self.options.most_study_s)

    def _passes_s(self, num_rows: int, reading: ProbeReading) -> float:
        return PASSES * num_rows * mean_length(self._rows) / reading.tokens_per_s

    def _measure(
        self, lanes: int, micro_batch_size: int, *, one_pass: bool
    ) -> tuple[float, int | None]:
        """Return tokens/s, and the peak of allocated bytes."""
        settings = replace(
            self.settings, effective_batch_size=micro_batch_size, micro_batch_size=micro_batch_size
        )
        rows, device = self._rows[:micro_batch_size], self.base.device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        tokens_per_s = measure_tokens_per_s(
            self.base,
            rows,
            settings,
            self.config,
            lanes=lanes,
            clock=self._clock,
            one_pass=one_pass,
        )
        peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
        return tokens_per_s, peak

    def _compute_in(self, dtype: str) -> None:
        if self.base.compute_dtype != DTYPES[dtype]:
            self.base.set_compute_dtype(DTYPES[dtype])

    def _free(self, reading: ProbeReading) -> None:
        self.base.layout.clear()
        if reading.out_of_memory:  # whatever it left behind; half a second, where there is nothing
            gc.collect()
        if self.base.device.type == "cuda":
            torch.cuda.empty_cache()


def _job(config: TrialConfig) -> LaneJob:
    """Return a segment that the probe does not come to the end of."""
    return LaneJob(
        trial=-1,
        rung=0,
        config=config,
        start_step=0,
        hold_step=PASSES + 1,
        end_step=PASSES + 1,
        warmup_steps=0,
        eval_split="selection",
        eval_dtype="train",
        start_folder=None,
        result_folder=None,
    )
