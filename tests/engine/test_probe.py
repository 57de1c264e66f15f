"""The probe: the decision on curves made by hand, and real steps on a clock that counts what they compute.

The clock of the measured tests is the tiny model's own embedding: every pass moves it on by the seconds
that a device of known speed would take. So the best plan, and what each reading costs, are known by
arithmetic, while losses, gradients and optimizer steps are real.
"""

import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_tune.engine import probe as probe_module
from lora_tune.engine.base import DTYPES, BaseModel, load_base_model
from lora_tune.engine.lora import LaneAdapter
from lora_tune.engine.pack import READ_EVERY_ON_GPUS, PackSettings, TrialPack
from lora_tune.engine.probe import (
    LEAST_PASS_TOKENS,
    MOST_COST,
    Probe,
    ProbeOptions,
    ProbeResult,
    average_rows,
    by_product_speed,
    choose_reading,
    mean_length,
    measure_tokens_per_s,
    rising_sizes,
)
from lora_tune.records import ProbeReading, TokenizedRow, TrialConfig

SETTINGS = PackSettings(
    effective_batch_size=16, micro_batch_size=16, max_grad_norm=1.0, weight_decay=0.0, group_rank=64
)
CONFIG = TrialConfig(
    rank=4,
    lora_alpha=4.0,
    lora_dropout=0.0,
    target_set="attention",
    target_modules=("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj"),
    learning_rate=1e-6,
)
LONG_STUDY = 1e12  # tokens: no reading is too dear


# The decision.


def reading(
    lanes: int, size: int, tokens_per_s: float, *, dtype: str = "float32", lost: bool = False
) -> ProbeReading:
    return ProbeReading(
        lanes=lanes,
        micro_batch_size=size,
        compute_dtype=dtype,
        tokens_per_s=tokens_per_s,
        peak_bytes=None,
        out_of_memory=lost,
    )


CURVES = {
    "one reading": ([(1, 1, 100)], (1, 1)),
    "flat": ([(1, 4, 100), (1, 8, 101)], (1, 4)),
    "rising all the way": ([(1, 4, 100), (1, 8, 150), (2, 8, 200), (4, 8, 260)], (4, 8)),
    "falling": ([(1, 4, 100), (1, 8, 80)], (1, 4)),
    "rows pay, lanes do not": ([(1, 4, 100), (1, 8, 150), (2, 8, 155)], (1, 8)),
    "lanes pay, rows do not": ([(1, 4, 100), (1, 8, 105), (2, 4, 150), (4, 4, 160)], (2, 4)),
    "just below a tenth": ([(1, 1, 100), (2, 1, 109.9)], (1, 1)),
    "just above a tenth": ([(1, 1, 100), (2, 1, 110.1)], (2, 1)),
    "more lanes of fewer rows": ([(1, 8, 100), (2, 8, 150), (4, 4, 170)], (4, 4)),
}


@pytest.mark.parametrize("name", CURVES)
def test_more_is_kept_as_long_as_it_gives_a_tenth_more(name: str) -> None:
    curve, wanted = CURVES[name]
    kept = choose_reading([reading(*values) for values in curve])
    assert (kept.lanes, kept.micro_batch_size) == wanted


def test_a_plan_that_ran_out_of_memory_is_never_kept_beside_one_that_did_not() -> None:
    fits, lost = reading(1, 4, 100), reading(2, 4, 0, lost=True)
    assert choose_reading([fits, lost]) == fits
    assert choose_reading([replace(lost, lanes=1), fits]) == fits


def test_when_nothing_fits_the_plan_is_the_first_which_needs_least() -> None:
    first = reading(1, 4, 0, lost=True)
    assert choose_reading([first, reading(1, 4, 0, lost=True, dtype="bfloat16")]) is first


def test_another_compute_type_has_to_be_a_tenth_faster() -> None:
    readings = [reading(1, 4, 100), reading(1, 4, 111, dtype="bfloat16")]
    assert choose_reading(readings).compute_dtype == "bfloat16"
    readings = [reading(1, 4, 100), reading(1, 4, 109, dtype="bfloat16")]
    assert choose_reading(readings).compute_dtype == "float32"


@pytest.mark.parametrize(
    ("sizes", "mean_tokens", "wanted"),
    [
        ((16, 8, 4, 2, 1), 1024, (1, 2, 4, 8, 16)),
        ((16, 8, 4, 2, 1), 45, (4, 8, 16)),  # 180 tokens: the first that says something
        ((1, 2, 3, 4, 6, 8, 12, 24), 300, (1, 3, 6, 12, 24)),
        ((7, 1), 1000, (1, 7)),
        ((5,), 1000, (5,)),
        ((4, 2, 1), 10, (4,)),  # none has enough tokens: the largest alone
    ],
)
def test_micro_batches_double_from_the_first_that_has_enough_tokens(
    sizes: tuple[int, ...], mean_tokens: float, wanted: tuple[int, ...]
) -> None:
    assert rising_sizes(sizes, mean_tokens=mean_tokens) == wanted


def test_the_rows_are_those_of_average_length_and_few_rows_serve_twice() -> None:
    rows = [TokenizedRow(input_ids=(3,) * n, labels=(3,) * n) for n in (2, 4, 9, 10, 11, 12, 40, 8)]
    assert mean_length(rows) == 12
    assert [len(row.input_ids) for row in average_rows(rows, 4)] == [12, 11, 10, 9]
    assert len(average_rows(rows[:3], 7)) == 7


# Real steps on a clock of known speed.


@dataclass
class Device:
    """A clock that each pass moves on: ``overhead_s``, and ``tokens / rate`` seconds."""

    overhead_s: float = 0.0
    rate: float = 1000.0
    most_tokens: float = float("inf")  # of a pass; memory runs out above
    now: float = 0.0
    passes: int = 0

    def __call__(self) -> float:
        return self.now

    def compute(self, dtype: torch.dtype, num_tokens: int) -> None:
        self.passes += 1
        if num_tokens > self.most_tokens:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        speed = {torch.bfloat16: 2.0}.get(dtype, 1.0)
        self.now += self.overhead_s + num_tokens / self.rate / speed

    def tokens_per_s(self, num_tokens: float) -> float:
        """Return the speed, in float32, of passes of so many tokens."""
        return num_tokens / (self.overhead_s + num_tokens / self.rate)


@pytest.fixture(scope="module")
def base(tiny_llama: Path) -> BaseModel:
    return load_base_model(tiny_llama, quantization="none", compute_dtype="float32", device="cpu")


@pytest.fixture
def rows(make_rows: Callable[..., tuple[TokenizedRow, ...]]) -> tuple[TokenizedRow, ...]:
    """Rows of 128 tokens, so that one makes a pass that says something."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 131, (20, LEAST_PASS_TOKENS), generator=generator).tolist()
    return tuple(TokenizedRow(input_ids=tuple(row), labels=tuple(row)) for row in ids)


@pytest.fixture
def probe(base: BaseModel, rows: tuple[TokenizedRow, ...]) -> Iterator[Callable[..., ProbeResult]]:
    """Return a maker of finished probes on a device; it sets the base back afterwards."""
    hooks = []

    def run(
        device: Device,
        *,
        sizes: tuple[int, ...] = (4, 2, 1),
        most_lanes: Callable[[int], int] = lambda size: 4,
        dtypes: tuple[str, ...] = ("float32",),
        study_tokens: float = LONG_STUDY,
        **options: float,
    ) -> ProbeResult:
        def embedded(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            device.compute(base.compute_dtype, inputs[0].numel())

        hooks.append(base.model.get_input_embeddings().register_forward_pre_hook(embedded))
        asked = ProbeOptions(
            micro_batch_sizes=sizes,
            most_lanes=most_lanes,
            compute_dtypes=dtypes,
            study_tokens=study_tokens,
            **options,
        )
        return Probe(base, rows, SETTINGS, CONFIG, asked, clock=device).run()

    yield run
    for hook in hooks:
        hook.remove()
    base.set_compute_dtype(DTYPES["float32"])


def plans(result: ProbeResult) -> list[tuple[int, int]]:
    return [(found.lanes, found.micro_batch_size) for found in result.readings]


def test_a_reading_is_two_passes_of_the_first_plan_and_one_of_any_other(probe, rows) -> None:
    device = Device(overhead_s=1.0)
    found = probe(device, sizes=(2,), most_lanes=lambda size: 2)
    assert plans(found) == [(1, 2), (2, 2)]
    assert device.passes == 2 + 1
    first, second = found.readings
    assert first.tokens_per_s == pytest.approx(device.tokens_per_s(2 * LEAST_PASS_TOKENS))
    assert second.tokens_per_s == pytest.approx(device.tokens_per_s(4 * LEAST_PASS_TOKENS))
    assert (first.peak_bytes, first.out_of_memory) == (None, False)
    assert found.probe_s == pytest.approx(device.now)


@dataclass
class Disturbed(Device):
    """Other work makes some passes five times slower."""

    slow: tuple[int, ...] = ()

    def compute(self, dtype: torch.dtype, num_tokens: int) -> None:
        before = self.now
        super().compute(dtype, num_tokens)
        if self.passes in self.slow:
            self.now = before + 5 * (self.now - before)


@pytest.mark.parametrize("slow", [(1,), (2,), (3,)])
def test_a_plan_whose_only_pass_was_disturbed_is_not_given_up(probe, slow: tuple[int, ...]) -> None:
    device = Disturbed(overhead_s=100.0, slow=slow)
    found = probe(device, sizes=(2,), most_lanes=lambda size: 2)
    assert plans(found) == [(1, 2), (2, 2)]
    assert found.lanes == 2
    assert found.readings[1].tokens_per_s == pytest.approx(
        device.tokens_per_s(4 * LEAST_PASS_TOKENS)
    )
    assert device.passes == 3 + (slow == (3,))


@pytest.mark.parametrize("slow", [(3,), (4,), (5,)])
def test_a_disturbed_pass_that_cannot_be_read_again_is_no_knowledge(
    probe, slow: tuple[int, ...]
) -> None:
    undisturbed = probe(Device(overhead_s=1.0))
    assert not undisturbed.cut
    for study_tokens in (2e4, 3e4, 5e4, 1e5, 2e5, 4e5, 8e5):
        found = probe(Disturbed(overhead_s=1.0, slow=slow), study_tokens=study_tokens)
        as_undisturbed = (found.lanes, found.micro_batch_size) == (4, 4)
        assert as_undisturbed or found.cut
        if found.cut and found.lanes == 1:
            assert found.micro_batch_size == 4


def test_an_idle_device_gets_all_rows_and_all_lanes(probe) -> None:
    found = probe(Device(overhead_s=100.0))
    assert plans(found) == [(1, 1), (1, 2), (1, 4), (2, 4), (4, 4)]
    assert (found.lanes, found.micro_batch_size, found.cut) == (4, 4, False)


def test_where_more_does_not_pay_lanes_train_in_turn(probe) -> None:
    found = probe(Device(overhead_s=0.0))
    assert plans(found) == [(1, 1), (1, 2), (2, 1)]
    assert (found.lanes, found.micro_batch_size, found.cut) == (1, 1, False)


def test_rows_pay_until_the_device_is_busy(probe) -> None:
    # tokens/s at 128, 256, 512, 1024, 2048, 4096 tokens a pass: 561, 719, 837, 911, 953, 976
    device = Device(overhead_s=0.1)
    found = probe(device, sizes=(16, 8, 4, 2, 1))
    # a gain of 9 % is not enough, and one of 14 % for four times the rows is; then 2 %
    assert plans(found) == [(1, 1), (1, 2), (1, 4), (1, 8), (1, 16), (2, 16)]
    assert (found.lanes, found.micro_batch_size) == (1, 16)


def test_a_plan_of_four_times_the_rows_has_to_give_a_tenth_more_as_well(probe) -> None:
    # 893, 943 (6 % more), 971 (9 % more)
    found = probe(Device(overhead_s=0.01536))
    assert plans(found) == [(1, 1), (1, 2), (1, 4), (2, 1), (4, 1)]
    assert (found.lanes, found.micro_batch_size, found.cut) == (1, 1, False)


def test_more_lanes_than_fit_are_tried_with_fewer_rows(probe) -> None:
    found = probe(Device(overhead_s=100.0), most_lanes={4: 1, 2: 2, 1: 8}.__getitem__)
    # two lanes of two rows are no more tokens than one of four: nothing gained, nothing further tried
    assert plans(found) == [(1, 1), (1, 2), (1, 4), (2, 2)]
    assert (found.lanes, found.micro_batch_size) == (1, 4)


def test_a_plan_that_runs_out_of_memory_ends_its_branch_and_is_recorded(base, probe) -> None:
    device = Device(overhead_s=100.0, most_tokens=2 * LEAST_PASS_TOKENS)
    found = probe(device)
    assert plans(found) == [(1, 1), (1, 2), (1, 4), (2, 2)]
    assert [r.out_of_memory for r in found.readings] == [False, False, True, True]
    assert [r.tokens_per_s > 0 for r in found.readings] == [True, True, False, False]
    assert (found.lanes, found.micro_batch_size, found.cut) == (1, 2, False)
    assert base.layout.adapters == ()


def test_when_nothing_fits_the_smallest_plan_is_left_to_the_executor(probe) -> None:
    found = probe(Device(most_tokens=1), sizes=(4, 2))
    assert plans(found) == [(1, 2)]
    assert (found.lanes, found.micro_batch_size) == (1, 2)


def test_another_error_is_not_taken_for_a_lack_of_memory(probe) -> None:
    class Broken(Device):
        def compute(self, dtype: torch.dtype, num_tokens: int) -> None:
            raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        probe(Broken())


def test_the_faster_compute_type_is_used_for_all_that_follows(base, probe) -> None:
    found = probe(Device(), dtypes=("float32", "bfloat16"), most_lanes=lambda size: 1)
    assert [r.compute_dtype for r in found.readings] == ["float32", "bfloat16", "bfloat16"]
    assert found.compute_dtype == "bfloat16"
    assert base.compute_dtype is torch.bfloat16
    first, second = (r.tokens_per_s for r in found.readings[:2])
    assert second == pytest.approx(2 * first)


def test_a_slower_compute_type_is_left_again(base, probe) -> None:
    found = probe(Device(), sizes=(1,), dtypes=("bfloat16", "float32"), most_lanes=lambda size: 1)
    assert found.compute_dtype == "bfloat16"
    assert base.compute_dtype is torch.bfloat16


def test_nothing_of_a_reading_is_held_when_the_probe_has_ended(base, probe) -> None:
    """Without the garbage collector, which need not come by before the study's own lanes do."""

    def adapters() -> int:
        return sum(type(thing) is LaneAdapter for thing in gc.get_objects())

    class Watched(Device):
        most = 0

        def compute(self, dtype: torch.dtype, num_tokens: int) -> None:
            super().compute(dtype, num_tokens)
            self.most = max(self.most, adapters())

    gc.collect()
    gc.disable()
    try:
        device = Watched()
        probe(device, sizes=(1,), most_lanes=lambda size: 2)
        assert (device.most, adapters()) == (2, 0)
    finally:
        gc.enable()
    assert base.layout.adapters == ()


class LatePack(TrialPack):
    """Reads its losses as on a GPU: not after every step."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.read_every = READ_EVERY_ON_GPUS


def test_losses_that_are_not_finite_and_found_late_do_not_end_a_reading(
    base, rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    norm = base.decoder.norm.weight
    monkeypatch.setattr(norm, "data", torch.full_like(norm, float("nan")))
    monkeypatch.setattr(probe_module, "TrialPack", LatePack)
    settings = replace(SETTINGS, effective_batch_size=2, micro_batch_size=2)
    assert measure_tokens_per_s(base, rows[:2], settings, CONFIG, lanes=2) > 0


def test_where_nothing_is_open_nothing_is_measured(probe) -> None:
    device = Device()
    found = probe(device, sizes=(4,), most_lanes=lambda size: 1)
    assert (found.lanes, found.micro_batch_size, found.readings) == (1, 4, ())
    assert (device.passes, found.probe_s, found.cut) == (0, 0.0, False)


def test_a_given_plan_is_read_last_by_one_pass(probe) -> None:
    device = Device(overhead_s=1.0)
    found = probe(device, sizes=(1,), most_lanes=lambda size: 1, given=(2, 4))
    assert plans(found) == [(1, 1), (2, 4)]
    assert device.passes == 2 + 1
    assert found.readings[1].tokens_per_s == pytest.approx(
        device.tokens_per_s(8 * LEAST_PASS_TOKENS)
    )
    alone = probe(Device(), sizes=(4,), most_lanes=lambda size: 1, given=(1, 4))
    assert (plans(alone), alone.cut) == ([(1, 4)], False)


def test_a_given_plan_that_would_take_too_long_is_not_read(probe) -> None:
    device = Device(overhead_s=0.0)  # 2 * 128 tokens of the first reading, 1,024 of the given plan
    for study_tokens, read in ((20 * 1270, False), (20 * 1290, True)):
        found = probe(
            device,
            sizes=(1,),
            most_lanes=lambda size: 1,
            given=(2, 4),
            study_tokens=float(study_tokens),
        )
        assert plans(found)[1:] == [(2, 4)] * read
        assert not found.cut  # nothing that was left out decides anything


class Products:
    """A clock that a matrix product moves on, by the seconds of its type."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seconds: dict[torch.dtype, float]) -> None:
        self.now = 0.0
        linear = torch.nn.functional.linear

        def timed(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            self.now += seconds[x.dtype]
            return linear(x, weight)

        monkeypatch.setattr(torch.nn.functional, "linear", timed)

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize(
    ("float32_s", "bfloat16_s", "types"),
    [
        (2.0, 1.0, ("bfloat16",)),
        (1.4, 1.0, ("bfloat16", "float32")),
        (1.0, 1.4, ("float32", "bfloat16")),
        (1.0, 2.0, ("float32",)),
        (1.0, 1.0, ("float32", "bfloat16")),
    ],
)
def test_the_type_with_the_faster_products_comes_first_and_one_without_hope_not_at_all(
    monkeypatch: pytest.MonkeyPatch, float32_s: float, bfloat16_s: float, types: tuple[str, ...]
) -> None:
    seconds = {torch.float32: float32_s, torch.bfloat16: bfloat16_s}
    clock = Products(monkeypatch, seconds)
    assert by_product_speed(("float32", "bfloat16"), clock=clock) == types


def test_a_probe_that_is_cut_keeps_the_type_that_was_read_first(probe) -> None:
    found = probe(Device(), dtypes=("bfloat16", "float32"), study_tokens=10.0)
    assert [r.compute_dtype for r in found.readings] == ["bfloat16"]
    assert (found.compute_dtype, found.cut) == ("bfloat16", True)


# What it may cost.


@pytest.mark.parametrize("overhead_s", [0.0, 0.05, 0.5, 20.0])
def test_the_probe_keeps_to_its_share_of_the_study_after_the_first_reading(
    probe, overhead_s: float
) -> None:
    complete = probe(Device(overhead_s=overhead_s))
    lengths = []
    for study_tokens in (1e2, 1e4, 3e4, 1e5, 3e5, 1e6):
        device = Device(overhead_s=overhead_s)
        found = probe(device, study_tokens=study_tokens)
        plan_tokens = found.lanes * found.micro_batch_size * LEAST_PASS_TOKENS
        study_s = study_tokens / device.tokens_per_s(plan_tokens)
        if len(found.readings) > 1:
            assert found.probe_s <= MOST_COST * study_s
        assert found.cut == (len(found.readings) < len(complete.readings))
        assert plans(found) == plans(complete)[: len(found.readings)]
        lengths.append(len(found.readings))
    assert lengths == sorted(lengths)
    assert (lengths[0], lengths[-1]) == (1, len(complete.readings))


@dataclass
class Cores(Device):
    """Lanes of four rows are computed beside each other, 1.75 times as fast as a lane alone."""

    def compute(self, dtype: torch.dtype, num_tokens: int) -> None:
        before = self.now
        super().compute(dtype, num_tokens)
        self.now = before + (self.now - before) / self._gain(num_tokens)

    def tokens_per_s(self, num_tokens: float) -> float:
        return super().tokens_per_s(num_tokens) * self._gain(num_tokens)

    def _gain(self, num_tokens: float) -> float:
        return 1.75 if num_tokens > 4 * LEAST_PASS_TOKENS else 1.0


def test_that_the_second_lane_may_bring_parts_is_reckoned_with(
    probe, monkeypatch: pytest.MonkeyPatch
) -> None:
    def shares() -> list[float]:
        """Return what probes of several readings took of their studies, as a multiple of what they may."""
        found = []
        for study_tokens in range(10_000, 200_000, 5_000):
            device = Cores(overhead_s=0.1)
            result = probe(device, most_lanes=lambda size: 2, study_tokens=study_tokens)
            num_tokens = result.lanes * result.micro_batch_size * LEAST_PASS_TOKENS
            study_s = study_tokens / device.tokens_per_s(num_tokens)
            if len(result.readings) > 1:
                found.append(result.probe_s / (MOST_COST * study_s))
        return found

    monkeypatch.setattr(probe_module, "most_gain", lambda device: 1.75)
    assert 0.5 < max(shares()) <= 1.0
    monkeypatch.setattr(probe_module, "most_gain", lambda device: 1.0)
    assert max(shares()) > 1.0


def test_a_study_too_short_to_find_out_trains_as_many_rows_a_pass_as_fit(probe) -> None:
    found = probe(Device(overhead_s=100.0), study_tokens=10.0)
    assert plans(found) == [(1, 1)]
    assert (found.lanes, found.micro_batch_size, found.cut) == (1, 4, True)


def test_a_limit_of_hours_limits_the_probe_too(probe) -> None:
    device = Device(overhead_s=0.1)
    found = probe(device, most_study_s=60.0)
    assert found.cut
    assert found.probe_s <= MOST_COST * 60.0
    assert not probe(Device(overhead_s=0.1), most_study_s=6000.0).cut
