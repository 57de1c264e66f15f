"""Parts of a pack beside each other: how lanes are cut, what a thread may use, whose numbers are whose."""

import gc
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_models import small_model

from lora_tune.engine import base as base_module
from lora_tune.engine import lane_threads
from lora_tune.engine.base import BaseModel, load_base_model
from lora_tune.engine.lane_threads import LaneThreads, cut, num_parts
from lora_tune.engine.lora import new_layout
from lora_tune.engine.memory_reading import HostMeter
from lora_tune.engine.pack import NO_PASS, PackSettings, PassSize, TrialPack
from lora_tune.executors.in_process import InProcessExecutor
from lora_tune.records import LaneJob, TokenizedRow, TrialConfig

SIZES = st.lists(st.floats(0, 1e9), min_size=1, max_size=12)
CPU = torch.device("cpu")
SETTINGS = PackSettings(
    effective_batch_size=4,
    micro_batch_size=2,
    max_grad_norm=1.0,
    weight_decay=0.0,
    group_rank=64,
)


@pytest.fixture
def two_cores(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Two threads for an operation, and no pack too small to be cut."""
    monkeypatch.setattr(lane_threads, "LEAST_WORK", 0)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


@given(SIZES, st.integers(1, 8))
def test_every_item_is_in_one_part_and_no_part_could_give_its_smallest_away(sizes, count):
    parts = cut(sizes, count)
    assert sorted(item for part in parts for item in part) == list(range(len(sizes)))
    assert all(part == sorted(part) for part in parts)
    totals = [sum(sizes[item] for item in part) for part in parts]
    for part, total in zip(parts, totals, strict=True):
        if part:
            smallest = min(sizes[item] for item in part)
            assert total - smallest <= min(totals) * (1 + 1e-9)


@given(SIZES, st.integers(1, 64))
def test_there_are_no_more_parts_than_lanes_cores_and_work(sizes, cores):
    count = num_parts(sizes, cores=cores)
    assert 1 <= count <= min(len(sizes), cores)
    if count > 1:
        parts = cut(sizes, count)
        assert min(sum(sizes[k] for k in part) for part in parts) >= lane_threads.LEAST_WORK


def test_works_run_beside_each_other_on_their_share_of_the_cores_and_answer_in_order(two_cores):
    threads = LaneThreads(CPU)
    both_there = threading.Barrier(2, timeout=20)

    def work(name: str) -> tuple[str, int, int]:
        both_there.wait()  # would break if one came after the other
        return name, torch.get_num_threads(), threading.get_ident()

    for _ in range(2):
        found = threads.run([lambda: work("a"), lambda: work("b")])
        assert [(name, share) for name, share, _ in found] == [("a", 1), ("b", 1)]
        assert threading.get_ident() not in {ident for *_, ident in found}
        assert torch.get_num_threads() == 2
    fresh: list[int] = []
    later = threading.Thread(target=lambda: fresh.append(torch.get_num_threads()))
    later.start()
    later.join()
    assert fresh == [2]


def test_a_single_work_is_done_where_it_is_asked_for(two_cores):
    [(ident, share)] = LaneThreads(CPU).run(
        [lambda: (threading.get_ident(), torch.get_num_threads())]
    )
    assert ident == threading.get_ident()
    assert share == 2


def test_a_work_that_raises_is_heard_when_the_others_have_ended(two_cores):
    ended = []

    def slow() -> None:
        time.sleep(0.2)
        ended.append("slow")

    def bad() -> None:
        raise MemoryError("no room")

    with pytest.raises(MemoryError, match="no room"):
        LaneThreads(CPU).run([bad, slow])
    assert ended == ["slow"]
    assert torch.get_num_threads() == 2


def test_a_pool_grows_with_the_parts(two_cores):
    threads = LaneThreads(CPU)
    for count in (2, 3, 2):
        there = threading.Barrier(count, timeout=20)
        assert len(threads.run([there.wait] * count)) == count


def test_an_interrupt_waits_for_the_parts(two_cores, monkeypatch):
    ended = []
    waits = iter([KeyboardInterrupt()])

    def interrupted(futures):
        if (error := next(waits, None)) is not None:
            raise error
        return wait(futures)

    monkeypatch.setattr(lane_threads, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        LaneThreads(CPU).run([lambda: time.sleep(0.2) or ended.append("slow"), lambda: None])
    assert ended == ["slow"]
    assert torch.get_num_threads() == 2


def test_other_devices_have_one_part():
    assert LaneThreads(torch.device("meta")).cores == 1


def test_on_a_cpu_each_thread_has_a_layout_of_its_own():
    layout = new_layout(CPU)
    layout.group_rank = 64
    seen: list[tuple[object, ...]] = []
    other = threading.Thread(target=lambda: seen.append((layout.group_rank, layout.adapters)))
    other.start()
    other.join()
    assert seen == [(0, ())]
    assert layout.group_rank == 64


def make_job(base: BaseModel, lane: int, *, dropout: float = 0.1) -> LaneJob:
    config = TrialConfig(
        rank=(4, 16, 8)[lane % 3],
        lora_alpha=16.0,
        lora_dropout=dropout,
        target_set="test",
        target_modules=tuple(shape.name for shape in base.linears[lane % 2 :: 2]),
        learning_rate=1e-2,
        init_seed=lane,
        dropout_seed=lane,
        data_seed=lane,
    )
    return LaneJob(
        trial=lane,
        rung=0,
        config=config,
        start_step=0,
        hold_step=50,
        end_step=50,
        warmup_steps=0,
        eval_split="selection",
        eval_dtype="train",
        start_folder=None,
        result_folder=None,
    )


class Counted(LaneThreads):
    """Notes how many parts there were each time."""

    def __init__(self) -> None:
        super().__init__(CPU)
        self.counts: list[int] = []

    def run(self, works):
        self.counts.append(len(works))
        return super().run(works)


def train(base: BaseModel, rows, *, lanes: int, steps: int):
    pack = TrialPack(base, rows, SETTINGS)
    pack._threads = threads = Counted()
    members = [pack.new_lane(make_job(base, lane)) for lane in range(lanes)]
    for _ in range(steps):
        pack.train_step(members)
    results = pack.evaluate(
        [None, *(lane.adapter for lane in members)], rows[:9], split="selection"
    )
    return pack, members, results, threads.counts


def assert_alike(found, wanted, *, rel: float) -> None:
    _, lanes, results, _ = found
    _, wanted_lanes, wanted_results, _ = wanted
    for lane, other in zip(lanes, wanted_lanes, strict=True):
        losses = [point.train_loss for point in lane.points]
        assert losses == pytest.approx([point.train_loss for point in other.points], rel=rel)
        assert [p.num_tokens for p in lane.points] == [p.num_tokens for p in other.points]
    for result, other in zip(results, wanted_results, strict=True):
        assert result.loss_sums == pytest.approx(other.loss_sums, rel=rel)


def test_parts_train_and_evaluate_as_the_whole_does(tiny_llama, make_rows, two_cores):
    rows = make_rows(20, seed=1, longest=40)
    base = load_base_model(tiny_llama, quantization="nf4", compute_dtype="float32", device="cpu")
    found = train(base, rows, lanes=5, steps=4)
    assert found[-1] == [2] * 5
    torch.set_num_threads(1)
    wanted = train(base, rows, lanes=5, steps=4)
    assert wanted[-1] == [1] * 5
    assert_alike(found, wanted, rel=1e-5)


def test_parts_give_the_same_bits_every_time(tiny_llama, make_rows, two_cores):
    rows = make_rows(20, seed=1, longest=40)
    base = load_base_model(tiny_llama, quantization="nf4", compute_dtype="float32", device="cpu")
    once, again = (train(base, rows, lanes=4, steps=4) for _ in range(2))
    for lane, other in zip(once[1], again[1], strict=True):
        assert lane.points == other.points
        assert torch.equal(lane.adapter.flat, other.adapter.flat)
    assert once[2] == again[2]


def test_the_largest_pass_is_that_of_all_parts_together(tiny_llama, two_cores):
    rows = tuple(
        TokenizedRow(input_ids=(5,) * 12, labels=(-100,) * 8 + (5,) * 4) for _ in range(20)
    )
    base = load_base_model(tiny_llama, quantization="none", compute_dtype="float32", device="cpu")
    pack, members, _, _ = train(base, rows, lanes=4, steps=1)
    for threads in (2, 1):
        torch.set_num_threads(threads)
        pack.largest_pass = NO_PASS
        pack.accumulate(members)
        num_rows = 4 * SETTINGS.micro_batch_size
        assert pack.largest_pass == PassSize(rows=num_rows, max_length=12, num_labels=num_rows * 4)


@pytest.mark.parametrize("threads", [1, 2])
def test_a_pass_that_does_not_end_counts_as_well(tiny_llama, make_rows, two_cores, threads):
    torch.set_num_threads(threads)
    base = load_base_model(tiny_llama, quantization="none", compute_dtype="float32", device="cpu")
    pack = TrialPack(base, make_rows(20), SETTINGS)
    members = [pack.new_lane(make_job(base, lane)) for lane in range(4)]

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    for work in (
        lambda: pack.train_step(members),
        lambda: pack.evaluate([lane.adapter for lane in members], make_rows(4), split="selection"),
    ):
        handle = base.model.get_submodule("model.layers.1").register_forward_pre_hook(full)
        pack.largest_pass = NO_PASS
        with pytest.raises(torch.OutOfMemoryError):
            work()
        handle.remove()
        assert pack.largest_pass.rows >= 4 * SETTINGS.micro_batch_size
        assert pack.largest_pass.num_labels > 0


def test_a_checkpointed_backward_in_another_thread_finds_the_lanes(
    tiny_llama, make_rows, monkeypatch
):
    """So it runs on a GPU: backward, and what it computes again, in a thread of autograd's."""
    monkeypatch.setattr(base_module, "new_layout", lambda device: new_layout(torch.device("cuda")))
    gradients = []
    for elsewhere in (False, True):
        with monkeypatch.context() as patch:
            if elsewhere:
                patch.setattr(torch.Tensor, "backward", _backward_elsewhere)
            base = load_base_model(
                tiny_llama, quantization="nf4", compute_dtype="float32", device="cpu"
            )
            base.set_gradient_checkpointing(True)
            pack = TrialPack(base, make_rows(20, seed=1), SETTINGS)
            lanes = [pack.new_lane(make_job(base, lane)) for lane in range(3)]
            pack.accumulate(lanes)
            gradients.append([lane.adapter.flat.grad for lane in lanes])
    for here, there in zip(*gradients, strict=True):
        assert torch.equal(here, there)
        assert here.count_nonzero() > 0


def _backward_elsewhere(loss: torch.Tensor) -> None:
    with ThreadPoolExecutor(1) as pool:
        pool.submit(torch.autograd.backward, loss).result()


FAMILIES = (
    "llama",
    "qwen2",
    "qwen3",
    "mistral",
    "gemma",
    "phi3",
    "gpt_neox",
    "stablelm",
    "granite",
)


def small_base(model_type: str, **more: object) -> BaseModel:
    return BaseModel(small_model(model_type, **more), compute_dtype=torch.float32)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_threads_leave_each_other_alone_in_every_family(
    family, checkpointing, make_rows, two_cores
):
    base = small_base(family)
    base.set_gradient_checkpointing(checkpointing)
    assert base.is_thread_safe
    rows = make_rows(20, seed=2, longest=60)
    found = train(base, rows, lanes=4, steps=3)
    assert set(found[-1]) == {2}
    torch.set_num_threads(1)
    assert_alike(found, train(base, rows, lanes=4, steps=3), rel=1e-5)


def test_a_model_that_keeps_a_state_between_passes_is_not_cut():
    model = small_model("llama")
    model._is_stateful = True  # as transformers marks recurrent ones
    assert not BaseModel(model, compute_dtype=torch.float32).is_thread_safe


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "dynamic", "factor": 2.0},
        {
            "rope_type": "longrope",
            "factor": 2.0,
            "short_factor": [1.0] * 8,
            "long_factor": [2.0] * 8,
            "original_max_position_embeddings": 64,
        },
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_a_model_whose_frequencies_follow_the_rows_is_not_cut(rope, make_rows, two_cores):
    base = small_base("llama", rope_parameters={"rope_theta": 10000.0, **rope})
    assert not base.is_thread_safe
    *_, counts = train(base, make_rows(20, seed=2, longest=60), lanes=3, steps=1)
    assert set(counts) == {1}


def test_memory_is_back_when_the_lanes_have_left(tiny_llama, make_rows, two_cores):
    rows = make_rows(20, seed=1, longest=40)
    base = load_base_model(tiny_llama, quantization="nf4", compute_dtype="float32", device="cpu")
    meter = HostMeter()
    held = []
    for _ in range(3):
        pack, members, results, counts = train(base, rows, lanes=4, steps=2)
        assert set(counts) == {2}
        del members, results
        gc.collect()
        held.append(meter.allocated_beside([]))  # the pack, with its threads, is still there
        del pack
    assert held[1] == held[2] <= held[0]


def test_a_pack_in_parts_that_does_not_fit_is_halved(tiny_llama, make_rows, two_cores):
    splits = {"train": make_rows(16, seed=1), "selection": make_rows(5, seed=2)}
    base = load_base_model(tiny_llama, quantization="none", compute_dtype="float32", device="cpu")

    def outcomes(fails):
        def full(*_: object) -> None:
            if fails():
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

        pack = TrialPack(base, splits["train"], SETTINGS)
        executor = InProcessExecutor(pack, splits, lanes=4, base_model=None, meter=HostMeter())
        handle = base.model.get_submodule("model.layers.1").register_forward_pre_hook(full)
        for lane in range(4):
            executor.submit(replace(make_job(base, lane), hold_step=3, end_step=3))
        found = {}
        while executor.busy:
            found |= {outcome.trial: outcome for outcome in executor.wait()}
        handle.remove()
        return executor.max_lanes, found

    layout = base.layout
    # two lanes a part: four lanes together
    lanes, found = outcomes(lambda: layout.training and len(layout.adapters) > 1)
    assert lanes == 2
    whole, wanted = outcomes(lambda: False)
    assert whole == 4
    for number, outcome in wanted.items():
        losses = [point.train_loss for point in found[number].points]
        assert losses == pytest.approx([point.train_loss for point in outcome.points], rel=1e-5)
        assert len(losses) == 3
        sums = found[number].evaluation.loss_sums
        assert sums == pytest.approx(outcome.evaluation.loss_sums, rel=1e-5)
