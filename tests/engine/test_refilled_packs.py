"""Lanes that come and go at different steps, against plain PEFT + torch (engine/reference.py).

Rows differ much in length, lanes are at different steps of different segments, so a pass mixes rows of every
length; the pack trains with accumulation and checkpointing on and off, in one part and in two beside each
other, losses are read late, and one lane may fail in the middle.
"""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from lora_tune.engine import lane_threads
from lora_tune.engine.base import BaseModel, load_base_model
from lora_tune.engine.lane import Lane
from lora_tune.engine.lane_threads import LaneThreads
from lora_tune.engine.lora import LaneAdapter
from lora_tune.engine.pack import PackSettings, TrialPack
from lora_tune.engine.reference import ReferenceTrial
from lora_tune.records import LaneJob, TokenizedRow, TrialConfig

LOSS_RTOL = 1e-5  # rounding of float32 sums in another order, over a few optimizer steps
MODULES = ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj", "mlp.down_proj")
# rank, dropout, number of modules, first step at which it joins, steps
LANES = [
    (8, 0.1, 4, 0, 3),
    (2, 0.0, 2, 0, 6),
    (4, 0.2, 3, 1, 4),
    (16, 0.0, 4, 3, 4),
    (2, 0.1, 1, 4, 3),
]


@pytest.fixture(autouse=True, params=[1, 2], ids=["one part", "two parts"])
def parts(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Cut packs into so many parts beside each other; yield how many there were each time."""
    counts: list[int] = []
    run = LaneThreads.run

    def counted(threads: LaneThreads, works):
        counts.append(len(works))
        return run(threads, works)

    monkeypatch.setattr(LaneThreads, "run", counted)
    monkeypatch.setattr(lane_threads, "LEAST_WORK", 0)
    threads = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield counts
    torch.set_num_threads(threads)


def make_job(lane: int) -> LaneJob:
    rank, dropout, count, _, steps = LANES[lane]
    config = TrialConfig(
        rank=rank,
        lora_alpha=16.0,
        lora_dropout=dropout,
        target_set="test",
        target_modules=tuple(
            f"model.layers.{layer}.{module}" for layer in range(2) for module in MODULES[:count]
        ),
        learning_rate=3e-3 / (1 + lane),
        init_seed=10 + lane,
        dropout_seed=20 + lane,
        data_seed=7,
    )
    return LaneJob(
        trial=lane,
        rung=0,
        config=config,
        start_step=0,
        hold_step=max(1, steps - 2),
        end_step=steps,
        warmup_steps=1,
        eval_split="selection",
        eval_dtype="train",
        start_folder=None,
        result_folder=None,
    )


@pytest.fixture(scope="module")
def rows(make_rows: Callable[..., tuple[TokenizedRow, ...]]) -> tuple[TokenizedRow, ...]:
    """Short rows with a long one here and there."""
    short = make_rows(24, seed=4, longest=12)
    return (*short[:12], *make_rows(3, seed=5, longest=90), *short[12:])


def settings(micro_batch_size: int, group_rank: int) -> PackSettings:
    return PackSettings(
        effective_batch_size=4,
        micro_batch_size=micro_batch_size,
        max_grad_norm=1.0,
        weight_decay=0.01,
        group_rank=group_rank,
    )


def train_together(pack: TrialPack, *, until: int = 20) -> dict[int, Lane]:
    """Train all lanes, each joining at its own step of the pack and leaving at its end."""
    done: dict[int, Lane] = {}
    running: list[Lane] = []
    for step in range(until):
        running += [pack.new_lane(make_job(k)) for k, lane in enumerate(LANES) if lane[3] == step]
        if running:
            pack.train_step(running)
        ended = [lane for lane in running if lane.finished or lane.divergence]
        done |= {lane.job.trial: lane for lane in ended}
        running = [lane for lane in running if lane not in ended]
    assert len(done) == len(LANES)
    return done


def reference(
    folder: Path,
    rows: tuple[TokenizedRow, ...],
    base: BaseModel,
    lane: int,
    *,
    micro_batch_size: int,
    quantization: str,
    dtype: str = "float32",
) -> ReferenceTrial:
    job = make_job(lane)
    assert job.config is not None
    return ReferenceTrial(
        folder,
        job,
        rows,
        initial=LaneAdapter.initialize(job.config, base.linears, "cpu", trained=False).weights,
        quantization=quantization,
        compute_dtype=dtype,
        effective_batch_size=4,
        micro_batch_size=micro_batch_size,
        max_grad_norm=1.0,
        weight_decay=0.01,
    )


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("micro_batch_size", [4, 1])
@pytest.mark.parametrize(("quantization", "group_rank"), [("nf4", 64), ("none", 10), ("none", 0)])
def test_lanes_that_join_and_leave_train_as_plain_peft_does(
    tiny_llama, rows, parts, quantization, group_rank, micro_batch_size, checkpointing
):
    base = load_base_model(
        tiny_llama, quantization=quantization, compute_dtype="float32", device="cpu"
    )
    base.set_gradient_checkpointing(checkpointing)
    pack = TrialPack(base, rows, settings(micro_batch_size, group_rank))
    lanes = train_together(pack)
    assert max(parts) == torch.get_num_threads()
    for number, lane in lanes.items():
        trial = reference(
            tiny_llama,
            rows,
            base,
            number,
            micro_batch_size=micro_batch_size,
            quantization=quantization,
        )
        losses = [trial.train_step(step) for step in range(1, lane.job.end_step + 1)]
        assert [point.train_loss for point in lane.points] == pytest.approx(losses, rel=LOSS_RTOL)
        [result] = pack.evaluate([lane.adapter], rows[:15], split="selection")
        assert result.loss_sums == pytest.approx(trial.evaluate(rows[:15]), rel=LOSS_RTOL)


@pytest.mark.parametrize("read_every", [1, 3, 50])
def test_reading_losses_late_changes_nothing(tiny_llama, rows, read_every):
    base = load_base_model(tiny_llama, quantization="none", compute_dtype="float32", device="cpu")
    at_once = train_together(TrialPack(base, rows, settings(2, 64)))
    late = TrialPack(base, rows, settings(2, 64))
    late.read_every = read_every
    found = train_together(late)
    for number, lane in at_once.items():
        assert found[number].points == lane.points
        assert torch.equal(found[number].adapter.flat, lane.adapter.flat)
        assert torch.equal(found[number].held["adapter"], lane.held["adapter"])


class Failing(TrialPack):
    """Plants infinities into lane 2 before its third step, as a learning rate far too large would."""

    def _accumulate(self, lanes, group_rank):
        for lane in lanes:
            if lane.job.trial == 2 and lane.step == 2:
                lane.adapter.flat[:50] = torch.inf
        return super()._accumulate(lanes, group_rank)


@pytest.mark.parametrize("read_every", [1, 4])
@pytest.mark.parametrize("group_rank", [0, 64])
def test_a_lane_that_fails_costs_its_neighbours_nothing(tiny_llama, rows, group_rank, read_every):
    base = load_base_model(tiny_llama, quantization="none", compute_dtype="float32", device="cpu")
    honest = train_together(TrialPack(base, rows, settings(2, group_rank)))
    pack = Failing(base, rows, settings(2, group_rank))
    pack.read_every = read_every
    found = train_together(pack)
    assert found[2].divergence.startswith("loss nan at step 3")
    assert [point.step for point in found[2].points] == [1, 2, 3]
    for number in (0, 1, 3, 4):
        assert not found[number].divergence
        losses = [point.train_loss for point in found[number].points]
        assert losses == pytest.approx([p.train_loss for p in honest[number].points], rel=1e-5)
        assert [p.step for p in found[number].points] == [p.step for p in honest[number].points]
        assert found[number].points[0].learning_rate == honest[number].points[0].learning_rate


def poisoning(place: str, value: float) -> type[TrialPack]:
    """Return a pack in which lane 2 meets ``value`` in its third step: in weight, gradient or loss."""

    class Poisoned(TrialPack):
        def _accumulate(self, lanes, group_rank):
            at = [(lane.job.trial, lane.step) for lane in lanes]
            bad = at.index((2, 2)) if (2, 2) in at else None
            if bad is not None and place == "weight":
                lanes[bad].adapter.flat[0] = value
            found = super()._accumulate(lanes, group_rank)
            if bad is not None and place == "gradient":
                lanes[bad].adapter.flat.grad[0] = value
            if bad is not None and place == "loss":
                found.losses_K[bad] = value
            return found

    return Poisoned


class Shortened(TrialPack):
    """Lane 2 ends after its third step."""

    def new_lane(self, job):
        return super().new_lane(dataclasses.replace(job, end_step=3) if job.trial == 2 else job)


# In float16 a gradient that overflows is an ordinary event, so it is not among these.
PLANTED = [
    *(("float32", p, v) for p in ("weight", "gradient", "loss") for v in ("nan", "inf", "-inf")),
    *(("float16", p, "nan") for p in ("weight", "loss")),
]


@pytest.mark.parametrize(("dtype", "place", "value"), PLANTED)
def test_whatever_is_not_finite_in_one_lane_its_neighbours_do_not_change_by_a_bit(
    tiny_llama, rows, dtype, place, value
):
    base = load_base_model(tiny_llama, quantization="none", compute_dtype=dtype, device="cpu")
    # products apart: with joined ones the step is taken again, and sums are rounded otherwise
    pack = poisoning(place, float(value))(base, rows, settings(2, 0))
    found, honest = train_together(pack), train_together(Shortened(base, rows, settings(2, 0)))
    assert found[2].divergence.startswith("loss ")
    assert "at step 3" in found[2].divergence
    assert [point.step for point in found[2].points] == [1, 2, 3]
    for number in (0, 1, 3, 4):
        assert found[number].points == honest[number].points
        assert torch.equal(found[number].adapter.flat, honest[number].adapter.flat)


@pytest.mark.parametrize("group_rank", [0, 64])
@pytest.mark.parametrize("place", ["weight", "gradient", "loss"])
def test_a_lane_that_fails_leaves_within_five_steps_though_losses_are_read_late(
    tiny_llama, rows, place, group_rank
):
    base = load_base_model(tiny_llama, quantization="none", compute_dtype="float32", device="cpu")
    pack = poisoning(place, float("-inf"))(base, rows, settings(2, group_rank))
    pack.read_every = 5
    honest = train_together(TrialPack(base, rows, settings(2, group_rank)))
    found = train_together(pack)
    assert [point.step for point in found[2].points] == [1, 2, 3]
    assert found[2].step <= 3 + 5
    for number in (0, 1, 3, 4):
        losses = [point.train_loss for point in found[number].points]
        assert losses == pytest.approx([p.train_loss for p in honest[number].points], rel=1e-5)


# A lane in doubt is compared with the base on the rows of its own steps.


def test_the_base_loses_on_a_lane_s_first_rows_what_the_untrained_lane_does(tiny_llama, rows):
    base = load_base_model(tiny_llama, quantization="nf4", compute_dtype="float32", device="cpu")
    pack = TrialPack(base, rows, settings(2, 64))
    lane = pack.new_lane(make_job(1))
    pack.train_step([lane])
    size = pack.largest_pass
    assert pack.base_loss(lane, 1) == pytest.approx(lane.points[0].train_loss, rel=LOSS_RTOL)
    assert pack.base_loss(lane, 2) != pytest.approx(lane.points[0].train_loss, rel=1e-2)
    assert pack.largest_pass == size  # that of training


@pytest.mark.parametrize("read_every", [1, 4])
def test_a_healthy_lane_in_doubt_goes_on_as_if_nobody_had_asked(tiny_llama, rows, read_every):
    base = load_base_model(tiny_llama, quantization="none", compute_dtype="float32", device="cpu")

    class Doubted(TrialPack):
        """The lanes' first batches were so easy that every later one looks like a divergence."""

        def new_lane(self, job):
            return super().new_lane(dataclasses.replace(job, first_loss=-40.0))

    pack = Doubted(base, rows, settings(2, 64))
    pack.read_every = read_every
    found, honest = train_together(pack), train_together(TrialPack(base, rows, settings(2, 64)))
    for number, lane in honest.items():
        assert found[number].divergence == ""
        assert set(found[number].base_losses) >= {1, 2, 3}
        assert found[number].points == lane.points
        assert torch.equal(found[number].adapter.flat, lane.adapter.flat)


class Ascending(TrialPack):
    """Goes up the gradient."""

    def _accumulate(self, lanes, group_rank):
        found = super()._accumulate(lanes, group_rank)
        for lane in lanes:
            lane.adapter.flat.grad.neg_()
        return found


def test_a_lane_that_learns_to_lose_more_than_the_base_has_diverged(tiny_llama, rows):
    base = load_base_model(tiny_llama, quantization="none", compute_dtype="float32", device="cpu")
    pack = Ascending(base, rows, settings(2, 64))
    job = dataclasses.replace(make_job(1), hold_step=40, end_step=40)
    job = dataclasses.replace(job, config=dataclasses.replace(job.config, learning_rate=0.03))
    lane = pack.new_lane(job)
    while not (lane.finished or lane.divergence):
        pack.train_step([lane])
    assert "on the same rows" in lane.divergence
    last = lane.points[-3:]
    asked = [lane.base_losses[point.step] for point in last]
    assert all(point.train_loss > loss + 0.5 for point, loss in zip(last, asked, strict=True))
    [own] = pack.evaluate([lane.adapter], rows, split="train")
    [untuned] = pack.evaluate([None], rows, split="train")
    assert own.mean_loss > untuned.mean_loss + 0.5


def test_a_parked_lane_goes_on_as_if_it_had_stayed(tiny_llama, rows):
    base = load_base_model(tiny_llama, quantization="nf4", compute_dtype="float32", device="cpu")
    pack = TrialPack(base, rows, settings(2, 64))
    stayed, parked = pack.new_lane(make_job(0)), pack.new_lane(make_job(0))
    for lane in (stayed, parked):
        pack.train_step([lane])
    parked.park()
    assert parked.adapter is None
    assert parked.optimizer is None
    pack.unpark(parked)
    for lane in (stayed, parked):
        pack.train_step([lane])
    assert parked.points == stayed.points
    assert torch.equal(parked.adapter.flat, stayed.adapter.flat)


# float16: every lane has a loss scale of its own, and steps whose gradient overflows are left out.


class SmallScale(TrialPack):
    """Begins with a loss scale at which neither engine overflows: they round otherwise, so not together."""

    def _equip(self, lane, adapter):
        super()._equip(lane, adapter)
        lane.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_in_float16_a_packed_lane_follows_plain_peft_with_a_gradient_scaler(
    tiny_llama, rows, quantization
):
    base = load_base_model(
        tiny_llama, quantization=quantization, compute_dtype="float16", device="cpu"
    )
    lanes = train_together(SmallScale(base, rows, settings(2, 64)))
    for number in (1, 3):
        trial = reference(
            tiny_llama,
            rows,
            base,
            number,
            micro_batch_size=2,
            quantization=quantization,
            dtype="float16",
        )
        trial.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
        lane = lanes[number]
        losses = [trial.train_step(step) for step in range(1, lane.job.end_step + 1)]
        assert lane.scaler.get_scale() == trial.scaler.get_scale() > 2.0**10
        # 11 bits of mantissa; PEFT multiplies the adapter's matrices in float32, the pack in float16
        assert [point.train_loss for point in lane.points] == pytest.approx(losses, rel=2e-3)


def test_in_float16_an_overflow_leaves_out_one_lane_s_step_and_halves_its_scale(tiny_llama, rows):
    base = load_base_model(tiny_llama, quantization="none", compute_dtype="float16", device="cpu")
    pack = TrialPack(base, rows, settings(2, 64))
    lanes = [pack.new_lane(make_job(k)) for k in (0, 1)]
    for lane, scale in zip(lanes, (2.0**10, 2.0**24), strict=True):  # 2^24 overflows float16
        lane.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    before = [lane.adapter.flat.clone() for lane in lanes]
    pack.train_step(lanes)
    assert [lane.scaler.get_scale() for lane in lanes] == [2.0**10, 2.0**23]
    assert not torch.equal(lanes[0].adapter.flat, before[0])
    assert torch.equal(lanes[1].adapter.flat, before[1])
    assert torch.isfinite(torch.tensor(lanes[0].points[0].grad_norm))
    assert not torch.isfinite(torch.tensor(lanes[1].points[0].grad_norm))
    assert not lanes[1].divergence
    state = lanes[1].state()
    lanes[1].park()
    pack.unpark(lanes[1])
    assert lanes[1].scaler.get_scale() == float(state["scale"]) == 2.0**23


def test_in_float16_a_lane_whose_every_step_overflows_has_diverged(tiny_llama, rows):
    base = load_base_model(tiny_llama, quantization="none", compute_dtype="float16", device="cpu")
    pack = TrialPack(base, rows, settings(4, 64))
    job = dataclasses.replace(make_job(1), hold_step=40, end_step=40)
    lane = pack.new_lane(job)
    lane.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60)
    while not (lane.finished or lane.divergence):
        pack.train_step([lane])
    assert lane.step == 21
    assert "gradient norm" in lane.divergence
