"""The in-process executor: lanes come, go, diverge and run out of memory without touching their neighbours.

The witness of most tests is the same job alone in an executor of one lane; of the published files, PEFT.
"""

import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
import transformers
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from lora_tune.engine.adapter_files import WEIGHTS_FILE
from lora_tune.engine.base import BaseModel, load_base_model
from lora_tune.engine.batches import rows_of_step
from lora_tune.engine.generation import AnswerWriter
from lora_tune.engine.lane import STATE_FILE, Lane
from lora_tune.engine.lora import LaneAdapter
from lora_tune.engine.memory_reading import HostMeter
from lora_tune.engine.pack import PackSettings, TrialPack
from lora_tune.errors import DataError, MachineError
from lora_tune.executors.in_process import MAX_POINTS, InProcessExecutor, is_out_of_memory
from lora_tune.executors.scorer import MetricScorer, check_prompts
from lora_tune.files import is_complete
from lora_tune.metrics import METRICS
from lora_tune.records import (
    EvalResult,
    LaneJob,
    LaneOutcome,
    MetricResult,
    Point,
    TokenizedRow,
    TrialConfig,
    TrialState,
)

RTOL = 1e-5  # rounding of float32 sums in another order, over a few optimizer steps
SETTINGS = PackSettings(
    effective_batch_size=4, micro_batch_size=2, max_grad_norm=1.0, weight_decay=0.0, group_rank=64
)
MODULES = ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj")
RANKS = (4, 16, 2, 8)


def make_job(trial: int, *, steps: int = 4, **changes: Any) -> LaneJob:
    """Return a job from the start; trials differ in rank, dropout, targets and learning rate."""
    modules = MODULES[: 1 + trial % 3]
    config = TrialConfig(
        rank=RANKS[trial % 4],
        lora_alpha=16.0,
        lora_dropout=0.1 * (trial % 2),
        target_set="test",
        target_modules=tuple(f"model.layers.{n}.{module}" for n in range(2) for module in modules),
        learning_rate=1e-2 / (1 + trial),
        init_seed=trial,
        dropout_seed=trial,
        data_seed=7,
    )
    job = LaneJob(
        trial=trial,
        rung=0,
        config=config,
        start_step=0,
        hold_step=max(1, steps - 1),
        end_step=steps,
        warmup_steps=1,
        eval_split="selection",
        eval_dtype="train",
        start_folder=None,
        result_folder=None,
    )
    return replace(job, **changes)


@pytest.fixture(scope="module")
def base(tiny_llama: Path) -> BaseModel:
    return load_base_model(tiny_llama, quantization="none", compute_dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def splits(make_rows: Callable[..., tuple[TokenizedRow, ...]]) -> dict[str, Any]:
    return {
        "train": make_rows(32, seed=1),
        "selection": make_rows(9, seed=2),
        "confirmation": make_rows(7, seed=3),
    }


@pytest.fixture
def executor_of(base: BaseModel, splits: dict[str, Any]) -> Callable[..., InProcessExecutor]:
    """Return a maker of executors; ``pack`` is the class of their pack."""

    def make(
        *,
        lanes: int = 2,
        pack: type[TrialPack] = TrialPack,
        on: BaseModel | None = None,
        meter: Any = None,
        **keys: Any,
    ) -> InProcessExecutor:
        trial_pack = pack(on or base, splits["train"], SETTINGS)
        return InProcessExecutor(
            trial_pack, splits, lanes=lanes, base_model=None, meter=meter or HostMeter(), **keys
        )

    return make


@pytest.fixture
def alone(executor_of: Callable[..., InProcessExecutor]) -> Callable[[LaneJob], LaneOutcome]:
    """Run a job as the only one there is."""

    def run(job: LaneJob) -> LaneOutcome:
        [outcome] = finish(executor_of(lanes=1), [job]).values()
        return outcome

    return run


def finish(executor: InProcessExecutor, jobs: Sequence[LaneJob]) -> dict[int, LaneOutcome]:
    """Run all jobs, submitting the next whenever there is room; return outcomes by trial."""
    waiting, outcomes = list(jobs), {}
    while waiting or executor.busy:
        while waiting and executor.free_slots:
            executor.submit(waiting.pop(0))
        for outcome in executor.wait():
            assert outcome.trial not in outcomes
            outcomes[outcome.trial] = outcome
    return outcomes


def assert_equal_losses(found: LaneOutcome, wanted: LaneOutcome, *, rtol: float = RTOL) -> None:
    assert found.state is TrialState.COMPLETE
    assert wanted.state is TrialState.COMPLETE
    assert [p.step for p in found.points] == [p.step for p in wanted.points]
    assert [p.num_tokens for p in found.points] == [p.num_tokens for p in wanted.points]
    losses, expected = ([p.train_loss for p in o.points] for o in (found, wanted))
    np.testing.assert_allclose(losses, expected, rtol=rtol)
    assert found.evaluation is not None
    assert wanted.evaluation is not None
    assert found.evaluation.label_counts == wanted.evaluation.label_counts
    np.testing.assert_allclose(found.evaluation.loss_sums, wanted.evaluation.loss_sums, rtol=rtol)


def assert_equal_tensors(found: Path, wanted: Path, *, rtol: float) -> None:
    tensors, expected = load_file(found), load_file(wanted)
    assert tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(tensors[name], tensor, rtol=rtol, atol=1e-8)


def test_every_job_comes_back_once_with_the_numbers_it_has_alone(executor_of, alone) -> None:
    jobs = [make_job(0, steps=2), make_job(1, steps=5), make_job(2, steps=4), make_job(3, steps=1)]
    outcomes = finish(executor_of(lanes=4), jobs)
    assert list(outcomes) == [3, 0, 2, 1]  # a lane is done when it is done
    for job in jobs:
        outcome = outcomes[job.trial]
        assert_equal_losses(outcome, alone(job))
        assert [point.step for point in outcome.points] == list(range(1, job.end_step + 1))
        assert outcome.num_tokens == sum(point.num_tokens for point in outcome.points)
        assert (outcome.rung, outcome.reason, outcome.pack_lanes) == (0, "", 4)
        assert outcome.peak_bytes > 0
        assert outcome.wall_s > 0


def test_training_lowers_the_loss(alone) -> None:
    points = alone(make_job(0, steps=12)).points
    assert points[-1].train_loss < points[0].train_loss - 0.05


def test_a_freed_lane_is_refilled_without_changing_its_neighbours(executor_of, alone) -> None:
    jobs = [make_job(0, steps=6), make_job(1, steps=2), make_job(2, steps=3), make_job(3, steps=2)]
    outcomes = finish(executor_of(lanes=2), jobs)
    assert list(outcomes) == [1, 2, 0, 3]
    for job in jobs:
        assert_equal_losses(outcomes[job.trial], alone(job))
        assert outcomes[job.trial].pack_lanes == 2


def test_slots_and_readings_follow_the_lanes(executor_of) -> None:
    seen: list[tuple[tuple[int, int, int], ...]] = []
    executor = executor_of(lanes=3)
    executor.on_step = lambda: seen.append(
        tuple((lane.trial, lane.step, lane.end_step) for lane in executor.readings())
    )
    assert (executor.free_slots, executor.busy, executor.wait()) == (3, False, [])
    executor.submit(make_job(0, steps=1))
    executor.submit(make_job(1, steps=2))
    assert (executor.free_slots, executor.busy, executor.readings()) == (1, True, ())
    [first] = executor.wait()
    assert first.trial == 0
    assert (executor.free_slots, executor.busy) == (2, True)
    assert [lane.trial for lane in executor.readings()] == [1]
    assert executor.readings()[0].train_loss is not None
    executor.wait()
    assert (executor.free_slots, executor.busy, executor.readings()) == (3, False, ())
    assert seen == [((0, 1, 1), (1, 1, 2)), ((1, 2, 2),)]
    assert executor.num_tokens > first.num_tokens


def test_lanes_that_end_together_are_each_evaluated_on_their_own_number_of_rows(
    executor_of, alone
) -> None:
    jobs = [make_job(0, eval_rows=4), make_job(1, eval_rows=4), make_job(2, eval_rows=7)]
    jobs.append(make_job(3))
    outcomes = finish(executor_of(lanes=4), jobs)
    for job, rows in zip(jobs, (4, 4, 7, 9), strict=True):
        found = outcomes[job.trial].evaluation
        whole = alone(replace(job, eval_rows=None)).evaluation
        assert found is not None
        assert whole is not None
        assert found.label_counts == whole.label_counts[:rows]
        np.testing.assert_allclose(found.loss_sums, whole.loss_sums[:rows], rtol=RTOL)


# Diverging lanes.


class PoisonedPack(TrialPack):
    """Plants a NaN in the adapter of trial 0 when it joins."""

    def new_lane(self, job: LaneJob) -> Lane:
        lane = super().new_lane(job)
        if job.trial == 0:
            assert lane.adapter is not None
            with torch.no_grad():
                lane.adapter.flat[-1] = torch.nan
        return lane


def too_fast(job: LaneJob) -> LaneJob:
    assert job.config is not None
    # the final norm of a random model keeps its loss in bounds until the gradient itself overflows
    return replace(job, config=replace(job.config, learning_rate=1e30))


class ScriptedPack(TrialPack):
    """Notes given training losses without computing any; the last one repeats, the base loses the first."""

    losses: Sequence[float] = (1.0,)

    def base_loss(self, lane: Lane, step: int) -> float:
        return self.losses[0]

    def train_step(self, lanes: Sequence[Lane]) -> None:
        for lane in lanes:
            loss = self.losses[min(lane.step, len(self.losses) - 1)]
            step = lane.step + 1
            lane.note_point(
                Point(step=step, train_loss=loss, learning_rate=1e-4, grad_norm=1.0, num_tokens=5)
            )
            self.settle_doubt(lane)


@pytest.mark.parametrize("cause", ["learning rate", "planted NaN"])
def test_a_diverging_lane_leaves_alone(executor_of, tmp_path: Path, cause: str) -> None:
    jobs = [make_job(number, steps=8) for number in range(3)]
    bad = replace(jobs[0], result_folder=tmp_path / "rung-0")
    pack = TrialPack
    if cause == "learning rate":
        bad = too_fast(bad)
    else:
        pack = PoisonedPack
    outcomes = finish(executor_of(lanes=3, pack=pack), [jobs[1], bad, jobs[2]])
    assert next(iter(outcomes)) == 0  # it does not train to the end
    lost = outcomes[0]
    assert lost.state is TrialState.DIVERGED
    assert lost.evaluation is None
    assert lost.reason.startswith("loss ")
    assert 1 <= len(lost.points) < 8
    assert not bad.result_folder.exists()
    without = finish(executor_of(lanes=3), [jobs[1], jobs[2]])
    for trial in (1, 2):
        # not bit by bit: a matrix product of other height may add in another order
        assert_equal_losses(outcomes[trial], without[trial], rtol=1e-6)


@pytest.mark.parametrize(
    ("losses", "last_step"),
    [
        ((2.0, 2.7, 2.7, 2.4, 2.7, 2.7, 2.7, 2.0), 7),  # the third in a row above 2.0 + 0.5
        ((2.0, 9.0, 9.0, 2.5, 9.0, 9.0, 2.5, 1.9), 8),  # never three in a row
    ],
)
def test_three_losses_in_a_row_far_above_the_base_end_a_lane(
    executor_of, losses: tuple[float, ...], last_step: int
) -> None:
    class Scripted(ScriptedPack):
        pass

    Scripted.losses = losses
    [outcome] = finish(executor_of(pack=Scripted), [make_job(0, steps=8)]).values()
    assert len(outcome.points) == last_step
    if last_step < 8:
        assert outcome.state is TrialState.DIVERGED
        assert outcome.reason == (
            "loss 2.70 at step 7, for 3 steps more than 0.5 above the untuned model on the same rows (2.00)"
        )
    else:
        assert outcome.state is TrialState.COMPLETE


def test_a_lane_whose_evaluation_is_not_finite_has_diverged(executor_of, tmp_path: Path) -> None:
    class SpoiledAtTheEnd(TrialPack):
        def train_step(self, lanes: Sequence[Lane]) -> None:
            super().train_step(lanes)
            for lane in lanes:
                if lane.finished:
                    with torch.no_grad():
                        lane.adapter.flat.fill_(torch.nan)

    job = make_job(0, result_folder=tmp_path / "rung-0")
    [outcome] = finish(executor_of(pack=SpoiledAtTheEnd), [job]).values()
    assert outcome.state is TrialState.DIVERGED
    assert outcome.reason == "evaluation loss nan at step 4"
    assert not (tmp_path / "rung-0").exists()


# Resuming.


def test_resuming_from_a_published_lane_equals_not_stopping(alone, tmp_path: Path) -> None:
    first = make_job(1, steps=6, hold_step=4, result_folder=tmp_path / "rung-0")
    alone(first)
    assert is_complete(tmp_path / "rung-0")
    second = replace(
        first,
        rung=1,
        start_step=4,
        hold_step=8,
        end_step=10,
        start_folder=tmp_path / "rung-0",
        result_folder=tmp_path / "rung-1",
    )
    resumed = alone(second)
    whole = alone(
        replace(second, start_step=0, start_folder=None, result_folder=tmp_path / "whole")
    )
    assert [point.step for point in resumed.points] == [5, 6, 7, 8, 9, 10]
    wanted = replace(whole, points=whole.points[4:])
    assert_equal_losses(resumed, wanted, rtol=1e-6)
    assert [p.learning_rate for p in resumed.points] == [p.learning_rate for p in wanted.points]
    for file in (WEIGHTS_FILE, STATE_FILE):
        assert_equal_tensors(tmp_path / "rung-1" / file, tmp_path / "whole" / file, rtol=1e-6)


def test_a_rung_that_begins_where_it_holds_leaves_its_state_too(alone, tmp_path: Path) -> None:
    # rungs of 2, 3 and 4 steps with a cool-down of a fifth: the second holds where the first did
    folders = [tmp_path / f"rung-{rung}" for rung in range(3)]
    rungs = [(0, 2, 2, None), (2, 2, 3, folders[0]), (2, 3, 4, folders[1])]
    for folder, (start, hold, end, begin) in zip(folders, rungs, strict=True):
        job = make_job(1, start_step=start, hold_step=hold, end_step=end, start_folder=begin)
        outcome = alone(replace(job, result_folder=folder))
        assert [point.step for point in outcome.points] == list(range(start + 1, end + 1))
    alone(make_job(1, hold_step=3, end_step=4, result_folder=tmp_path / "whole"))
    assert_equal_tensors(folders[2] / WEIGHTS_FILE, tmp_path / "whole" / WEIGHTS_FILE, rtol=1e-6)


# Out of memory.


def small_memory(most: int, where: str) -> type[TrialPack]:
    """Return a pack that runs out of memory, half-way, with more than ``most`` lanes at once."""

    class SmallMemory(TrialPack):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self.alive: weakref.WeakSet[Lane] = weakref.WeakSet()

        def new_lane(self, job: LaneJob) -> Lane:
            lane = super().new_lane(job)
            training = [other for other in self.alive if other.adapter and not other.finished]
            if where == "joining" and len(training) >= most:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            self.alive.add(lane)
            return lane

        def train_step(self, lanes: Sequence[Lane]) -> None:
            super().train_step(lanes)
            if where == "training" and len(lanes) > most and lanes[0].step > 1:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

        def evaluate(
            self, adapters: Sequence[LaneAdapter | None], rows: Any, *, split: str
        ) -> list[EvalResult]:
            if where == "evaluation" and len(adapters) > most:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            return super().evaluate(adapters, rows, split=split)

    return SmallMemory


@pytest.mark.parametrize("most", [1, 2, 3])
@pytest.mark.parametrize("where", ["joining", "training", "evaluation"])
def test_a_pack_too_large_for_the_memory_is_halved_and_all_lanes_finish(
    executor_of, alone, where: str, most: int
) -> None:
    jobs = [make_job(number, steps=3) for number in range(4)]
    executor = executor_of(lanes=4, pack=small_memory(most, where))
    outcomes = finish(executor, jobs)
    assert sorted(outcomes) == [0, 1, 2, 3]
    lanes = most + 1 if where == "joining" else 4
    while lanes > most:
        lanes //= 2
    assert executor.max_lanes == lanes
    for job in jobs:
        assert_equal_losses(outcomes[job.trial], alone(job))
        # lanes go on from where they were, so steps before memory ran out were shared by all four
        assert outcomes[job.trial].pack_lanes == (lanes if where == "joining" else 4)


def test_a_neighbour_that_cannot_join_does_not_cost_a_lone_lane_its_trial(
    executor_of, alone
) -> None:
    jobs = [make_job(0, steps=3), make_job(1, steps=3)]
    outcomes = finish(executor_of(lanes=2, pack=small_memory(1, "joining")), jobs)
    for job in jobs:
        assert_equal_losses(outcomes[job.trial], alone(job))


@pytest.mark.parametrize("where", ["joining", "training"])
def test_a_lane_that_does_not_fit_alone_is_infeasible(executor_of, where: str) -> None:
    executor = executor_of(lanes=1, pack=small_memory(0, where))
    [outcome] = finish(executor, [make_job(0)]).values()
    assert outcome.state is TrialState.INFEASIBLE
    assert outcome.reason.startswith("out of memory as the only lane, at step")
    assert outcome.peak_bytes > 0
    assert outcome.evaluation is None
    assert not executor.busy


def test_one_lane_too_large_does_not_stop_the_others(executor_of, alone) -> None:
    class TooSmallForRank16(TrialPack):
        def train_step(self, lanes: Sequence[Lane]) -> None:
            if any(lane.job.config.rank == 16 for lane in lanes):
                raise torch.OutOfMemoryError("CUDA out of memory.")
            super().train_step(lanes)

    jobs = [make_job(number, steps=3) for number in range(4)]
    outcomes = finish(executor_of(lanes=4, pack=TooSmallForRank16), jobs)
    assert outcomes[1].state is TrialState.INFEASIBLE
    for job in (jobs[0], jobs[2], jobs[3]):
        assert_equal_losses(outcomes[job.trial], alone(job))


@pytest.mark.parametrize("read_every", [1, 5])
def test_lanes_go_on_from_the_step_at_which_memory_ran_out(executor_of, alone, read_every) -> None:
    steps: list[tuple[int, int]] = []

    class SmallStep3(TrialPack):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self.read_every = read_every

        def _backward(self, lanes: Sequence[Lane], *args: Any) -> torch.Tensor:
            if len(lanes) > 1 and lanes[0].step == 2:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            return super()._backward(lanes, *args)

        def _step(self, lanes: Sequence[Lane], **named: Any) -> None:
            super()._step(lanes, **named)
            steps.extend((lane.job.trial, lane.step) for lane in lanes)

    jobs = [make_job(number, steps=4) for number in range(4)]
    outcomes = finish(executor_of(lanes=4, pack=SmallStep3), jobs)
    assert sorted(steps) == [(trial, step) for trial in range(4) for step in (1, 2, 3, 4)]
    for job in jobs:
        assert_equal_losses(outcomes[job.trial], alone(job))
        assert [point.step for point in outcomes[job.trial].points] == [1, 2, 3, 4]


def test_parked_lanes_leave_the_device(executor_of, base: BaseModel) -> None:
    adapters: list[weakref.ref[LaneAdapter]] = []
    alive_at_unpark: list[int] = []

    class Watched(small_memory(1, "training")):  # type: ignore[misc]
        def new_lane(self, job: LaneJob) -> Lane:
            lane = super().new_lane(job)
            adapters.append(weakref.ref(lane.adapter))
            return lane

        def unpark(self, lane: Lane) -> None:
            alive_at_unpark.append(sum(adapter() is not None for adapter in adapters))
            super().unpark(lane)

    finish(executor_of(lanes=2, pack=Watched), [make_job(0, steps=3), make_job(1, steps=3)])
    assert alive_at_unpark == [0, 0]


def test_fifty_trials_leave_nothing_behind(executor_of) -> None:
    """The guard inside the executor compares tensors after every trial; here also resident memory."""
    executor = executor_of(lanes=2)
    jobs = [make_job(number % 4, steps=2) for number in range(50)]
    resident = []
    for number, job in enumerate(jobs):
        executor.submit(replace(job, trial=number))
        if executor.free_slots == 0 or number == len(jobs) - 1:
            while executor.busy:
                resident += [psutil.Process().memory_info().rss] * len(executor.wait())
    assert len(resident) == 50
    assert resident[-1] <= 1.01 * resident[9]


def test_a_trial_that_leaves_tensors_behind_is_an_error(executor_of) -> None:
    left: list[torch.Tensor] = []

    class Leaking(TrialPack):
        def evaluate(self, *args: Any, **named: Any) -> list[EvalResult]:
            left.append(torch.ones(10_000))
            return super().evaluate(*args, **named)

    with pytest.raises(MachineError, match="have not been given back since the first trial"):
        finish(executor_of(lanes=1, pack=Leaking), [make_job(0), make_job(1), make_job(2)])


def test_an_error_that_is_not_about_memory_is_not_swallowed(executor_of) -> None:
    class Broken(TrialPack):
        def train_step(self, lanes: Sequence[Lane]) -> None:
            raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        finish(executor_of(pack=Broken), [make_job(0)])


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB (GPU 0; 7.79 GiB total)"),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported later"),
        RuntimeError("CUDA driver error: out of memory"),
        torch.AcceleratorError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. This error may appear if you passed"),
        RuntimeError("HIP out of memory. Tried to allocate 1.00 GiB"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to 8e12"),
        MemoryError(),
        RuntimeError("DataLoader worker (pid 4711) is killed by signal: Killed. "),
    ],
    ids=lambda error: f"{type(error).__name__}: {str(error)[:40]}",
)  # fmt: skip
def test_every_form_of_running_out_of_memory_is_recognised(error: Exception) -> None:
    assert is_out_of_memory(error)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("shape mismatch"),
        RuntimeError("CUDA error: device-side assert triggered"),
        ValueError("the story of a man who ran out of memory"),
        KeyboardInterrupt(),
        OSError(28, "No space left on device"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_other_errors_are_not_about_memory(error: BaseException) -> None:
    assert not is_out_of_memory(error)


# Evaluation only, and what is published.


def test_the_untuned_base_is_only_evaluated(executor_of, base: BaseModel, splits) -> None:
    job = make_job(0, config=None, end_step=0, hold_step=0)
    [outcome] = finish(executor_of(), [job]).values()
    assert (outcome.state, outcome.points) == (TrialState.COMPLETE, ())
    expected = model_losses(base.model, splits["selection"])
    base_losses = outcome.evaluation.loss_sums
    np.testing.assert_allclose(base_losses, expected, rtol=RTOL)


def test_a_published_adapter_scores_again_what_it_scored(executor_of, alone, tmp_path) -> None:
    trained = alone(make_job(2, result_folder=tmp_path / "rung-0"))
    again = make_job(2, start_step=4, start_folder=tmp_path / "rung-0")
    other = replace(again, trial=3, config=None, start_folder=None, eval_split="confirmation")
    outcomes = finish(executor_of(), [again, other])
    assert outcomes[2].evaluation == trained.evaluation
    assert outcomes[3].evaluation.split == "confirmation"
    assert len(outcomes[3].evaluation.loss_sums) == 7


def test_float32_evaluation_of_a_bfloat16_study_leaves_the_training_type(
    executor_of, alone, tiny_llama: Path, tmp_path: Path
) -> None:
    rough = load_base_model(tiny_llama, quantization="none", compute_dtype="bfloat16", device="cpu")
    before = {name: weight.clone() for name, weight in rough.model.named_parameters()}
    job = make_job(0, config=None, end_step=0, hold_step=0)
    executor = executor_of(lanes=1, on=rough)
    fine = finish(executor, [replace(job, eval_dtype="float32")])[0].evaluation
    coarse = finish(executor, [job])[0].evaluation
    assert (fine.compute_dtype, coarse.compute_dtype) == ("float32", "bfloat16")
    assert rough.compute_dtype is torch.bfloat16
    for name, weight in rough.model.named_parameters():
        assert torch.equal(weight, before[name])
    assert fine.loss_sums != coarse.loss_sums
    np.testing.assert_allclose(fine.mean_loss, coarse.mean_loss, rtol=2e-2)


def model_losses(model: torch.nn.Module, rows: Sequence[TokenizedRow]) -> list[float]:
    """Return each row's summed loss from the model's own logits, one row at a time."""
    sums = []
    with torch.no_grad():
        for row in rows:
            logits = model(input_ids=torch.tensor([row.input_ids]), use_cache=False).logits[0]
            targets = torch.tensor(row.labels[1:])
            losses = torch.nn.functional.cross_entropy(
                logits[:-1].float(), targets, ignore_index=-100, reduction="sum"
            )
            sums.append(float(losses))
    return sums


@pytest.mark.parametrize("trial", [0, 1, 2])
def test_peft_loads_what_a_rung_published_and_finds_the_same_losses(
    executor_of, base: BaseModel, splits, tiny_llama: Path, tmp_path: Path, trial: int
) -> None:
    import peft
    import transformers

    folder = tmp_path / "rung-0"
    jobs = [make_job(number, steps=5) for number in range(3)]
    jobs[trial] = replace(jobs[trial], result_folder=folder)
    outcome = finish(executor_of(lanes=3), jobs)[trial]
    assert is_complete(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    tuned = peft.PeftModel.from_pretrained(model, folder).eval()
    found = model_losses(tuned, splits["selection"])
    np.testing.assert_allclose(outcome.evaluation.loss_sums, found, rtol=RTOL)
    base.layout.adapters = ()
    untuned = model_losses(base.model, splits["selection"])
    assert np.abs(np.subtract(found, untuned)).max() > 0.05  # the adapter does something


def test_long_segments_keep_evenly_spaced_readings_and_the_last(executor_of) -> None:
    job = make_job(0, steps=2 * MAX_POINTS + 50)
    [outcome] = finish(executor_of(pack=ScriptedPack), [job]).values()
    steps = [point.step for point in outcome.points]
    assert len(steps) <= MAX_POINTS
    assert steps[-1] == job.end_step
    assert len(set(np.diff(steps))) == 1
    assert outcome.num_tokens == 5 * job.end_step  # thinned readings lose no token


# Confirmation: the same configuration with fresh seeds.


def confirmation_job(seed: int, **changes: Any) -> LaneJob:
    """Return a run as the confirmation asks for it: a number below -1, seeds of its own, another split."""
    job = make_job(1, steps=5, eval_split="confirmation", eval_dtype="float32")
    assert job.config is not None
    config = replace(job.config, init_seed=50 + seed, dropout_seed=60 + seed, data_seed=70 + seed)
    return replace(job, trial=-2 - seed, config=config, **changes)


def relative_distance(found: Path, wanted: Path) -> float:
    """Return the norm of the difference of all tensors over that of the wanted ones."""
    tensors, expected = load_file(found), load_file(wanted)
    assert tensors.keys() == expected.keys()
    flat = [torch.cat([t.double().flatten() for t in ts.values()]) for ts in (tensors, expected)]
    return float((flat[0] - flat[1]).norm() / flat[1].norm())


def test_runs_with_different_seeds_are_in_one_pack_what_they_are_alone(
    executor_of, alone, tmp_path: Path
) -> None:
    jobs = [confirmation_job(seed, result_folder=tmp_path / f"seed-{seed}") for seed in range(3)]
    outcomes = finish(executor_of(lanes=3), jobs)
    assert sorted(outcomes) == [-4, -3, -2]
    for job in jobs:
        other = tmp_path / f"alone{job.trial}"
        assert_equal_losses(outcomes[job.trial], alone(replace(job, result_folder=other)))
        assert outcomes[job.trial].pack_lanes == 3
        assert outcomes[job.trial].evaluation.split == "confirmation"
        assert is_complete(job.result_folder)
        for file in (WEIGHTS_FILE, STATE_FILE):
            assert relative_distance(job.result_folder / file, other / file) < 1e-4
    first_losses = {outcome.points[0].train_loss for outcome in outcomes.values()}
    assert len(first_losses) == 3  # other rows
    assert len({outcome.evaluation.mean_loss for outcome in outcomes.values()}) == 3


def test_a_job_that_keeps_no_state_publishes_its_adapter_alone(executor_of, tmp_path: Path) -> None:
    kept, bare = tmp_path / "kept", tmp_path / "bare"
    jobs = [
        confirmation_job(0, result_folder=kept),
        replace(confirmation_job(0, result_folder=bare), trial=-9, keep_state=False),
    ]
    finish(executor_of(lanes=1), jobs)
    assert is_complete(bare)
    names = {path.name for path in kept.iterdir()} - {path.name for path in bare.iterdir()}
    assert names == {STATE_FILE}
    assert_equal_tensors(bare / WEIGHTS_FILE, kept / WEIGHTS_FILE, rtol=0)
    [again] = finish(
        executor_of(lanes=1), [confirmation_job(0, start_step=5, start_folder=bare)]
    ).values()
    assert again.state is TrialState.COMPLETE


def test_the_seed_of_the_data_alone_changes_which_rows_a_lane_trains_on(executor_of) -> None:
    one, other = confirmation_job(0), confirmation_job(1)
    other = replace(other, config=replace(one.config, data_seed=other.config.data_seed))
    outcomes = finish(executor_of(lanes=2), [one, other])
    tokens = [[point.num_tokens for point in outcomes[n].points] for n in (-2, -3)]
    assert tokens[0] != tokens[1]


def test_confirmation_runs_share_packs_with_jobs_of_other_splits_and_types(
    executor_of, tiny_llama: Path, tmp_path: Path
) -> None:
    rough = load_base_model(tiny_llama, quantization="none", compute_dtype="bfloat16", device="cpu")
    untuned = make_job(9, config=None, end_step=0, hold_step=0, eval_split="confirmation")
    jobs = [
        confirmation_job(0, result_folder=tmp_path / "seed-0"),
        make_job(0, steps=5),
        confirmation_job(1, eval_rows=3),
        replace(untuned, trial=-1),
    ]
    outcomes = finish(executor_of(lanes=4, on=rough), jobs)
    found = {n: outcome.evaluation for n, outcome in outcomes.items()}
    assert {n: (e.split, len(e.loss_sums), e.compute_dtype) for n, e in found.items()} == {
        -2: ("confirmation", 7, "float32"),
        0: ("selection", 9, "bfloat16"),
        -3: ("confirmation", 3, "float32"),
        -1: ("confirmation", 7, "bfloat16"),
    }
    # the published adapter, scored again alone in the same type
    again = confirmation_job(0, start_step=5, start_folder=tmp_path / "seed-0")
    assert finish(executor_of(lanes=1, on=rough), [again])[-2].evaluation == found[-2]


def test_confirmation_runs_that_do_not_fit_together_are_parked_and_finish(
    executor_of, alone, replay_meter
) -> None:
    jobs = [confirmation_job(seed) for seed in range(3)]
    meter = replay_meter(10_000, [(90, 95, 99), (10, 20, 30)])
    executor = executor_of(lanes=3, pack=small_memory(1, "training"), meter=meter)
    outcomes = finish(executor, jobs)
    for job in jobs:
        assert_equal_losses(outcomes[job.trial], alone(job))
    peaks = executor.take_pack_peaks()
    assert [(peak.trials, peak.out_of_memory) for peak in peaks] == [
        ((-2, -3, -4), True), ((-2,), False), ((-3,), False), ((-4,), False),
    ]  # fmt: skip


def test_a_lane_above_the_limit_of_its_loss_ends_there_and_says_so(
    executor_of, alone, tmp_path: Path
) -> None:
    job, neighbour = make_job(0, steps=8), make_job(2, steps=8)
    free = alone(replace(job, loss_limits=((3, 1e3), (5, 1e3))))
    assert free.state is TrialState.COMPLETE
    limited = replace(job, loss_limits=((3, 1e3), (5, 0.5)), result_folder=tmp_path / "rung-0")
    outcomes = finish(executor_of(lanes=2), [limited, neighbour])
    ended = outcomes[0]
    assert ended.state is TrialState.DIVERGED
    assert [point.step for point in ended.points] == [1, 2, 3, 4, 5]
    assert ended.reason.startswith("smoothed loss ")
    assert "at step 5, above 0.50" in ended.reason
    assert ended.evaluation is None
    assert not (tmp_path / "rung-0").exists()
    assert_equal_losses(outcomes[2], alone(neighbour))


# Metrics by generation.


@pytest.fixture(scope="module")
def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """One word a token id."""
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(131)}, unk_token="w0"))
    words.pre_tokenizer = WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w2")


@pytest.fixture
def scorer(base: BaseModel, tokenizer: Any) -> MetricScorer:
    def broken(prompt: str, reference: str, prediction: str) -> float:
        raise KeyError(prompt[:2])

    def same_ends(prompt: str, reference: str, prediction: str) -> float:
        assert prompt.split()
        return float(reference.split()[-1] == prediction.split()[-1])

    metrics = {**METRICS, "own:broken": broken, "own:same_ends": same_ends}
    return MetricScorer(base, tokenizer, metrics, max_new_tokens=8)


NAMES = ("rouge-l", "exact-match", "own:broken")


def memorized(splits: dict[str, Any]) -> dict[str, Any]:
    """Return splits of one and the same row, with its end token, which is soon known by heart."""
    row = splits["train"][0]
    row = TokenizedRow(input_ids=(*row.input_ids, 2), labels=(*row.labels, 2))
    return dict.fromkeys(splits, (row,) * 9)


def test_metrics_show_what_an_adapter_has_learned(
    executor_of, scorer: MetricScorer, splits, base: BaseModel
) -> None:
    pack = TrialPack(base, memorized(splits)["train"], SETTINGS)
    executor = InProcessExecutor(
        pack, memorized(splits), lanes=2, base_model=None, meter=HostMeter(), scorer=scorer
    )
    learned = make_job(2, steps=40, metrics=NAMES, eval_rows=4)
    config = replace(learned.config, rank=16, learning_rate=2e-2)
    untuned = make_job(0, config=None, end_step=0, hold_step=0, metrics=("exact-match",))
    outcomes = finish(executor, [replace(learned, config=config), untuned])
    rouge, exact, broken = outcomes[2].metrics
    assert [result.metric for result in outcomes[2].metrics] == list(NAMES)
    assert splits["train"][0].num_labels < 8  # tokens that may be written
    assert (exact.values, rouge.values) == ((1.0,) * 4, (1.0,) * 4)
    assert broken.values == ()
    assert broken.reason.startswith("row 1: KeyError: 'w")
    assert outcomes[2].state is TrialState.COMPLETE
    [before] = outcomes[0].metrics
    assert before.values == (0.0,) * 9


def test_metrics_leave_every_loss_and_the_neighbours_as_they_were(
    executor_of, scorer: MetricScorer
) -> None:
    jobs = [make_job(0, steps=2), make_job(1, steps=6), make_job(2, steps=4)]
    wanted = finish(executor_of(lanes=2), jobs)
    asking = [replace(job, metrics=NAMES) for job in jobs]
    found = finish(executor_of(lanes=2, scorer=scorer), asking)
    for trial, outcome in found.items():
        assert outcome.evaluation == wanted[trial].evaluation
        assert outcome.points == wanted[trial].points
        assert [len(result.values) for result in outcome.metrics] == [9, 9, 0]
        assert wanted[trial].metrics == ()


def test_metrics_are_computed_in_the_type_of_the_evaluation(
    executor_of, tokenizer, tiny_llama: Path
) -> None:
    rough = load_base_model(tiny_llama, quantization="none", compute_dtype="bfloat16", device="cpu")
    types: list[torch.dtype] = []

    class Watching(MetricScorer):
        def score(self, *args: Any) -> tuple[MetricResult, ...]:
            types.append(self.base.compute_dtype)
            return super().score(*args)

    scorer = Watching(rough, tokenizer, METRICS, max_new_tokens=4)
    jobs = [make_job(0, metrics=("rouge-l",)), confirmation_job(0, metrics=("rouge-l",))]
    finish(executor_of(lanes=1, on=rough, scorer=scorer), jobs)
    assert types == [torch.bfloat16, torch.float32]
    assert rough.compute_dtype is torch.bfloat16


@pytest.mark.parametrize(("most", "written"), [(2, True), (0, False)])
def test_running_out_of_memory_while_writing_never_costs_a_trial(
    executor_of, base: BaseModel, tokenizer, alone, most: int, written: bool
) -> None:
    class SmallMemory(AnswerWriter):
        def _generate(self, prompts: Sequence[tuple[int, ...]], ends: Any) -> Any:
            if len(prompts) > most:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            return super()._generate(prompts, ends)

    whole = MetricScorer(base, tokenizer, METRICS, max_new_tokens=4)
    small = MetricScorer(base, tokenizer, METRICS, max_new_tokens=4)
    small.writer = SmallMemory(base, max_new_tokens=4)
    jobs = [make_job(number, metrics=("rouge-l",)) for number in range(2)]
    executor = executor_of(lanes=2, scorer=small)
    outcomes = finish(executor, jobs)
    wanted = finish(executor_of(lanes=2, scorer=whole), jobs)
    assert executor.max_lanes == 2
    for job in jobs:
        assert_equal_losses(outcomes[job.trial], alone(replace(job, metrics=())))
        if written:
            assert outcomes[job.trial].metrics == wanted[job.trial].metrics
        else:
            [result] = outcomes[job.trial].metrics
            assert result.reason == "out of memory while writing the answer to a single row"
            assert result.values == ()


def test_a_model_that_cannot_write_gives_a_reason(executor_of, tiny_llama: Path, tokenizer) -> None:
    mute = load_base_model(tiny_llama, quantization="none", compute_dtype="float32", device="cpu")
    mute.model.generate = None
    scorer = MetricScorer(mute, tokenizer, METRICS, max_new_tokens=4)
    job = make_job(0, config=None, end_step=0, hold_step=0, metrics=("rouge-l",))
    [outcome] = finish(executor_of(on=mute, scorer=scorer), [job]).values()
    assert outcome.state is TrialState.COMPLETE
    [result] = outcome.metrics
    assert result.reason == "no answers were written: TypeError: 'NoneType' object is not callable"


@pytest.mark.parametrize("how", ["diverges", "does not fit"])
def test_a_lane_that_ends_early_answers_for_its_metrics_with_the_reason(
    executor_of, scorer: MetricScorer, how: str
) -> None:
    # who asks for what is missing would ask for ever
    job = make_job(0, metrics=NAMES)
    pack = TrialPack if how == "diverges" else small_memory(0, "evaluation")
    job = too_fast(job) if how == "diverges" else job
    [outcome] = finish(executor_of(lanes=1, pack=pack, scorer=scorer), [job]).values()
    assert outcome.evaluation is None
    assert [result.metric for result in outcome.metrics] == list(NAMES)
    for result in outcome.metrics:
        assert result.values == ()
        assert result.reason.startswith("loss " if how == "diverges" else "out of memory as the")


def test_rows_without_a_prompt_are_refused(splits) -> None:
    check_prompts(splits["selection"])
    plain = tuple(
        TokenizedRow(input_ids=row.input_ids, labels=row.input_ids)
        for row in splits["selection"][:2]
    )
    with pytest.raises(DataError, match="2 of 11 held-out rows have no prompt to answer"):
        check_prompts((*splits["selection"], *plain))


def test_trials_with_metrics_leave_nothing_behind(executor_of, scorer: MetricScorer) -> None:
    """The guard inside the executor compares tensors after every trial."""
    executor = executor_of(lanes=2, scorer=scorer)
    jobs = [replace(make_job(n % 4, steps=2, metrics=("rouge-l",)), trial=n) for n in range(20)]
    assert len(finish(executor, jobs)) == 20


def test_the_time_of_writing_counts_to_the_lane_that_asked(executor_of, base, tokenizer) -> None:
    class Slow(AnswerWriter):
        def _generate(self, prompts: Any, ends: Any) -> list[tuple[int, ...]]:
            time.sleep(0.5)
            return super()._generate(prompts, ends)

    scorer = MetricScorer(base, tokenizer, METRICS, max_new_tokens=1)
    scorer.writer = Slow(base, max_new_tokens=1)
    executor = executor_of(lanes=2, scorer=scorer)
    outcomes = finish(executor, [make_job(0, metrics=("rouge-l",)), make_job(1)])
    assert executor.evaluation_s > 0.5
    assert outcomes[0].wall_s > 0.5 + 0.5 * outcomes[1].wall_s


# What packs take, with a meter that replays numbers.


def test_peaks_are_read_once_for_all_steps_of_the_same_lanes(executor_of, replay_meter) -> None:
    meter = replay_meter(10_000, [(10, 20, 30), (11, 21, 31), (12, 22, 32)])
    executor = executor_of(lanes=2, meter=meter)
    finish(executor, [make_job(0, steps=6), make_job(1, steps=2), make_job(2, steps=3)])
    peaks = executor.take_pack_peaks()
    assert [(peak.trials, peak.steps) for peak in peaks] == [((0, 1), 2), ((0, 2), 3), ((0,), 1)]
    assert [(p.allocated_bytes, p.reserved_bytes, p.process_bytes) for p in peaks] == meter.replayed
    assert {(peak.device, peak.free_bytes) for peak in peaks} == {("Replay 9000", 10_000)}
    assert [peak.outside_bytes for peak in peaks] == [10, 10, 10]
    assert not any(peak.out_of_memory for peak in peaks)
    assert executor.take_pack_peaks() == []


def test_a_pack_s_sizes_are_those_of_the_largest_pass_that_it_saw(
    executor_of, replay_meter, splits
) -> None:
    executor = executor_of(lanes=2, meter=replay_meter(10_000, [(10, 20, 30)]))
    jobs = [make_job(0, steps=3), make_job(1, steps=3)]
    finish(executor, jobs)
    [peak] = executor.take_pack_peaks()
    passes = []  # by hand: the rows of three steps, sorted by length, two rows a lane and pass
    for step in (1, 2, 3):
        numbers = rows_of_step(32, step=step, batch_size=4, data_seed=7)
        rows = sorted((splits["train"][n] for n in numbers), key=lambda r: -len(r.input_ids))
        passes += [rows[:2], rows[2:]]
    assert peak.rows == 4
    assert peak.max_length == max(len(row.input_ids) for rows in passes for row in rows)
    assert peak.num_labels == 2 * max(sum(row.num_labels for row in rows) for rows in passes)


def test_a_lane_s_peak_is_that_of_its_own_packs(executor_of, replay_meter) -> None:
    # the meter shows 1 in the first stretch, 2 in the second, 3 in the third
    executor = executor_of(lanes=2, meter=replay_meter(10_000, [(10, 20, 30)]))
    outcomes = finish(executor, [make_job(0, steps=3), make_job(1, steps=1), make_job(2, steps=4)])
    assert {trial: outcome.peak_bytes for trial, outcome in outcomes.items()} == {0: 2, 1: 1, 2: 3}


def test_a_job_that_is_only_evaluated_has_no_part_in_earlier_peaks(
    executor_of, replay_meter
) -> None:
    executor = executor_of(lanes=1, meter=replay_meter(10_000, [(10, 20, 30)]))
    untuned = make_job(7, config=None, end_step=0, hold_step=0)
    outcomes = finish(executor, [make_job(0), untuned])
    assert outcomes[7].peak_bytes == 2  # a restart of its own
    assert [peak.trials for peak in executor.take_pack_peaks()] == [(0,)]


def test_a_pack_that_runs_out_of_memory_while_training_is_recorded(
    executor_of, replay_meter
) -> None:
    meter = replay_meter(10_000, [(90, 95, 99), (10, 20, 30)])
    executor = executor_of(lanes=2, meter=meter, pack=small_memory(1, "training"))
    finish(executor, [make_job(0, steps=3), make_job(1, steps=3)])
    first, *rest = executor.take_pack_peaks()
    # lanes[0].step > 1 after the second step, which therefore never ends
    assert (first.trials, first.steps, first.out_of_memory) == ((0, 1), 1, True)
    assert first.max_length > 0
    assert [(peak.trials, peak.out_of_memory) for peak in rest] == [((0,), False), ((1,), False)]


@pytest.mark.parametrize("where", ["joining", "evaluation"])
def test_running_out_of_memory_outside_a_step_says_nothing_of_the_estimate(
    executor_of, replay_meter, where: str
) -> None:
    meter = replay_meter(10_000, [(10, 20, 30)])
    executor = executor_of(lanes=2, meter=meter, pack=small_memory(1, where))
    finish(executor, [make_job(0, steps=2), make_job(1, steps=2)])
    peaks = executor.take_pack_peaks()
    assert {trial for peak in peaks for trial in peak.trials} == {0, 1}
    assert not any(peak.out_of_memory for peak in peaks)


def test_lowered_lanes_let_running_ones_finish_and_no_more_join(executor_of) -> None:
    executor = executor_of(lanes=3)
    sizes: list[int] = []
    executor.on_step = lambda: sizes.append(len(executor.readings()))
    for trial in range(3):
        executor.submit(make_job(trial, steps=2 + trial))
    executor.wait()
    executor.max_lanes = 1
    assert executor.free_slots == 0
    executor.submit(make_job(3, steps=2))
    while executor.busy:
        executor.wait()
    assert sizes == [3, 3, 2, 1, 1, 1]


def test_halving_never_raises_lanes_that_were_lowered(executor_of) -> None:
    executor = executor_of(lanes=4, pack=small_memory(3, "training"))
    for trial in range(4):
        executor.submit(make_job(trial, steps=3))
    executor.on_step = lambda: setattr(executor, "max_lanes", 1)
    while executor.busy:
        executor.wait()
    assert executor.max_lanes == 1


def test_a_cpu_has_no_peaks_of_packs(executor_of) -> None:
    executor = executor_of(lanes=2)
    outcomes = finish(executor, [make_job(0), make_job(1)])
    assert executor.take_pack_peaks() == []
    resident = psutil.Process().memory_info().rss
    assert all(resident / 4 < outcome.peak_bytes < resident * 4 for outcome in outcomes.values())
