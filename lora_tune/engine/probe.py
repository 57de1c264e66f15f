"""What only a measurement can decide: compute type on a CPU, rows a pass, and how many lanes pay.

A reading is as few passes as give an honest number, each forward, backward and an optimizer step. On a GPU
one to warm up and two measured together. On a CPU, where passes of one plan differ by some per cent and only
other work makes one slower: two of the first plan of a compute type, one of any other, and a second one of a
plan that would otherwise be given up; the fastest counts. Gradients of earlier passes (accumulation) are in
neither its time nor its peak. All readings use the same rows, those whose length is nearest to the mean of
the training split: tokens/s compare, and a longest row decides nothing.

On a CPU the compute type whose bare matrix products are faster is read first: a probe of a short study is
cut after one reading, and stays in the type of that one. A type whose products are far slower is not read.

Where the study file leaves no choice its own plan is read if that can be afforded, by a single pass: the
forecast needs its speed. The decision is a function of the readings, ``choose_reading``. Both are written to
``study.lock.json`` once, so that a resumed study does not measure again.
"""

import gc
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import NamedTuple

import torch

from lora_tune.engine.base import DTYPES, BaseModel
from lora_tune.engine.lane_threads import most_gain
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
MOST_PASSES = 3  # of a reading
# Rows, in and out features of the bare product: of a small layer and pass.
_PRODUCT = (256, 1024, 1024)
_PRODUCTS = 8
# A type whose products take so many times the fastest's is not read: products are over half of a step, so
# what else a step does cannot make up for them.
HOPELESS_PRODUCTS = 1.5


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

    Those that take ``HOPELESS_PRODUCTS`` times the fastest's are left out. The best of some, after one to
    warm up; some milliseconds in all. Equal types keep their order.
    """
    rows, width, out = _PRODUCT
    taken: dict[str, list[float]] = {dtype: [] for dtype in dtypes}
    for _ in range(_PRODUCTS):  # in turn, so that a moment of other work meets all types
        for dtype in dtypes:
            x_NI = torch.ones(rows, width, dtype=DTYPES[dtype])
            w_OI = torch.ones(out, width, dtype=DTYPES[dtype])
            began = clock()
            torch.nn.functional.linear(x_NI, w_OI)
            taken[dtype].append(clock() - began)
    seconds = {dtype: min(times[1:]) for dtype, times in taken.items()}
    most_s = HOPELESS_PRODUCTS * min(seconds.values())
    return tuple(d for d in sorted(dtypes, key=seconds.__getitem__) if seconds[d] <= most_s)


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
    passes: int = MOST_PASSES,
) -> float:
    """Return tokens/s of equal lanes over optimizer steps of one pass each, at most ``MOST_PASSES`` of them.

    On a CPU, where other work only ever makes a step slower, it is the best of them. On a GPU the first is to
    warm up, since the allocator grows in the first pass of every new size, and the others are timed together:
    a step does not wait for the device, and is not made to; so there are two at least.
    """
    pack = TrialPack(base, rows, settings)
    members = [pack.new_lane(_job(config)) for _ in range(lanes)]
    seconds = []
    on_gpu = base.device.type == "cuda"
    for steps in (1, max(1, passes - 1)) if on_gpu else (1,) * passes:
        begin = clock()
        for _ in range(steps):
            pack.train_step(members)
        if base.device.type == "cuda":
            torch.cuda.synchronize(base.device)
        seconds.append((clock() - begin) / steps)
    pack.read()
    if not members[0].points:
        # a loss was not finite: the lanes were put back to that step, and take it apart
        pack.train_step(members)
    fastest_s = seconds[-1] if on_gpu else min(seconds)
    return sum(lane.points[-1].num_tokens for lane in members) / fastest_s


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
        self._warm_up(smallest)
        for dtype in self.options.compute_dtypes:
            if not self._affordable(1, first, dtype):
                self.cut = True
                break
            self._take(1, first, dtype)
        if self.kept.out_of_memory:  # the executor finds out which trials can train at all
            return self._result(lanes=1, micro_batch_size=smallest)
        is_rising = self._climb((1, size) for size in self._sizes[1:])
        if is_rising:  # the best is not known, so as without a probe: the largest that fits
            return self._result(lanes=1, micro_batch_size=self._sizes[-1])
        self._climb(self._packs(at_most=self.kept.micro_batch_size))
        self._read_given()
        return self._result(lanes=self.kept.lanes, micro_batch_size=self.kept.micro_batch_size)

    def _warm_up(self, micro_batch_size: int) -> None:
        """Let a GPU load its kernels and libraries: seconds that any plan costs, once."""
        if self.base.device.type != "cuda":
            return
        self._compute_in(self.options.compute_dtypes[0])
        try:
            self._measure(1, micro_batch_size, passes=1)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        self._free(failed=True)
        self._began = self._clock()

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

    def _climb(self, plans: Iterable[tuple[int, int]]) -> bool:
        """Read plans, each of about twice the rows of the one before, as long as more rows pay.

        Where one gives more, but not the tenth that it takes to be kept, the next one is read too: with twice
        its gain that one would be kept. Doubling never gains more than it did before.

        Returns:
            Whether it was cut while every plan was kept.
        """
        was_kept = True
        for lanes, micro_batch_size in plans:
            if not self._affordable(lanes, micro_batch_size, self.kept.compute_dtype):
                self.cut = True
                return was_kept
            reading = self._take(lanes, micro_batch_size, self.kept.compute_dtype)
            if self.cut:
                return was_kept
            needed = self.kept.tokens_per_s * math.sqrt(1.0 + WORTHWHILE_GAIN)
            if self.kept is not reading and not (was_kept and reading.tokens_per_s > needed):
                return False
            was_kept = self.kept is reading
        return False

    def _packs(self, *, at_most: int) -> Iterator[tuple[int, int]]:
        """Yield 2, 4, ... lanes, each with the rows that they may have."""
        lanes = 2
        while size := self._size_for(lanes, at_most=at_most):
            yield lanes, size
            lanes *= 2

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
        pass_s = lanes * size * self._row_s(self.kept) + lanes * self._setup_s
        if (lanes, size) not in known and self._within_share(pass_s, self.kept.tokens_per_s):
            self._take(lanes, size, self.kept.compute_dtype, passes=1)

    def _take(
        self, lanes: int, micro_batch_size: int, dtype: str, *, passes: int | None = None
    ) -> ProbeReading:
        """Take a reading and keep it; a plan that it would give up is read again if that can be afforded."""
        wanted = passes or self._passes_of(dtype)
        self._compute_in(dtype)
        reading = self._read(lanes, micro_batch_size, dtype, wanted)
        given_up = choose_reading([*self.readings, reading]) is not reading
        if given_up and not reading.out_of_memory and passes is None and wanted == 1:
            if self._affordable(lanes, micro_batch_size, dtype, as_slow_as=reading):
                again = self._read(lanes, micro_batch_size, dtype, wanted)
                reading = max(reading, again, key=lambda read: read.tokens_per_s)
            else:  # not known whether only other work made it slow
                self.cut = True
        self.readings.append(reading)
        return reading

    def _passes_of(self, dtype: str) -> int:
        """Return how many passes a reading takes."""
        if self.base.device.type == "cuda":
            return MOST_PASSES
        return 1 if any(reading.compute_dtype == dtype for reading in self.readings) else 2

    def _read(self, lanes: int, micro_batch_size: int, dtype: str, passes: int) -> ProbeReading:
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
            tokens_per_s, peak = self._measure(lanes, micro_batch_size, passes=passes)
            reading = replace(
                reading, tokens_per_s=tokens_per_s, peak_bytes=peak, out_of_memory=False
            )
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        # after the handler: the traceback holds the tensors
        self._free(failed=reading.out_of_memory)
        if not reading.out_of_memory:
            num_tokens = lanes * micro_batch_size * mean_length(self._rows)
            passes_s = passes * num_tokens / reading.tokens_per_s
            self._setup_s = max(0.0, self._clock() - began - passes_s) / lanes
        return reading

    def _affordable(
        self,
        lanes: int,
        micro_batch_size: int,
        dtype: str,
        *,
        as_slow_as: ProbeReading | None = None,
    ) -> bool:
        """Say whether the probe surely keeps to its share of the study with one more reading.

        The reading is taken to be as fast as the best one so far (of another type, as much slower as is read
        at all; or ``as_slow_as`` an earlier one of this plan), and the study, whose seconds the share is of,
        as fast as it could be with this plan, or with the one that is kept when the probe is cut here.
        """
        if not self.readings or self.kept.out_of_memory:
            return True
        num_rows = lanes * micro_batch_size
        row_s = self._row_s(as_slow_as or self.kept)
        if dtype != self.kept.compute_dtype and as_slow_as is None:
            row_s *= HOPELESS_PRODUCTS
        seconds = self._passes_of(dtype) * num_rows * row_s + lanes * self._setup_s
        most_rows = max(num_rows, self._sizes[-1]) if lanes == 1 else num_rows
        return self._within_share(seconds, self._most_tokens_per_s(most_rows, lanes=lanes))

    def _most_tokens_per_s(self, num_rows: int, *, lanes: int) -> float:
        """Return more than a pass of so many rows can reach.

        The tokens/s of n rows are n / (overhead + n * seconds a row): doubling the rows gains less each time,
        and less than it did between the two largest readings. The second lane brings parts with it.
        """
        known: dict[int, float] = {}
        for reading in self.readings:
            if reading.compute_dtype == self.kept.compute_dtype and not reading.out_of_memory:
                rows = reading.lanes * reading.micro_batch_size
                known[rows] = max(reading.tokens_per_s, known.get(rows, 0.0))
        largest, *smaller = sorted(known, reverse=True)
        power = 1.0  # in proportion to the rows
        if smaller:
            gain = known[largest] / known[smaller[0]]
            power = min(1.0, max(0.0, math.log(gain) / math.log(largest / smaller[0])))
        reached: float = known[largest] * max(1.0, num_rows / largest) ** power
        if lanes > 1 and all(reading.lanes == 1 for reading in self.readings):
            reached *= most_gain(self.base.device) if self.base.is_thread_safe else 1.0
        return max(reached, self.kept.tokens_per_s)

    def _within_share(self, reading_s: float, tokens_per_s: float) -> bool:
        spent_s = self._clock() - self._began + reading_s
        study_s = self.options.study_tokens / tokens_per_s
        return spent_s <= MOST_COST * min(study_s, self.options.most_study_s)

    def _row_s(self, reading: ProbeReading) -> float:
        return mean_length(self._rows) / reading.tokens_per_s

    def _measure(
        self, lanes: int, micro_batch_size: int, *, passes: int
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
            passes=passes,
        )
        peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
        return tokens_per_s, peak

    def _compute_in(self, dtype: str) -> None:
        if self.base.compute_dtype != DTYPES[dtype]:
            self.base.set_compute_dtype(DTYPES[dtype])

    def _free(self, *, failed: bool) -> None:
        self.base.layout.clear()
        if failed:  # whatever it left behind; half a second, where there is nothing
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
        hold_step=MOST_PASSES + 1,
        end_step=MOST_PASSES + 1,
        warmup_steps=0,
        eval_split="selection",
        eval_dtype="train",
        start_folder=None,
        result_folder=None,
    )
