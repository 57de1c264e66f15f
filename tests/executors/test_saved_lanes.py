"""Lanes that are saved, thrown away and gone on with by another executor, as if they had never stopped.

The witness is the same jobs in an executor that nobody stops: readings, losses by row and published files
have to be equal bit by bit.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from test_in_process import SETTINGS, make_job, small_memory
from test_in_process import splits as splits  # the fixture

from lora_tune.engine.base import BaseModel, load_base_model
from lora_tune.engine.lane import STATE_FILE, Lane
from lora_tune.engine.lane_files import HELD_FILE, PROGRESS_FILE
from lora_tune.engine.memory_reading import HostMeter
from lora_tune.engine.pack import TrialPack
from lora_tune.executors.in_process import LEAST_WORK_PER_SAVING, InProcessExecutor
from lora_tune.files import MANIFEST, is_complete, publish_folder
from lora_tune.records import LaneJob, LaneOutcome, TrialState

STEPS = 5


class StopHere(Exception):  # noqa: N818
    """Leaves the executor between two steps."""


@pytest.fixture(scope="module", params=["float32", "float16"])
def any_base(tiny_llama: Path, request: pytest.FixtureRequest) -> BaseModel:
    return load_base_model(
        tiny_llama, quantization="none", compute_dtype=request.param, device="cpu"
    )


@pytest.fixture(scope="module")
def base(tiny_llama: Path) -> BaseModel:
    return load_base_model(tiny_llama, quantization="none", compute_dtype="float32", device="cpu")


class SmallScale(TrialPack):
    """In float16 begins with a loss scale that doubles on the way instead of one that overflows."""

    def _equip(self, lane: Lane, adapter: Any) -> None:
        super()._equip(lane, adapter)
        if lane.scaler is not None:
            lane.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)


def new_executor(
    base: BaseModel,
    splits: dict[str, Any],
    *,
    lanes: int = 2,
    pack: type[TrialPack] = SmallScale,
    read_every: int = 1,
    **keys: Any,
) -> InProcessExecutor:
    trial_pack = pack(base, splits["train"], SETTINGS)
    trial_pack.read_every = read_every
    return InProcessExecutor(
        trial_pack, splits, lanes=lanes, base_model=None, meter=HostMeter(), **keys
    )


def new_jobs(folder: Path) -> list[LaneJob]:
    """Return three jobs for two lanes, one without dropout; the shortest makes room for the third."""
    jobs = [
        make_job(1, steps=STEPS, hold_step=3),
        make_job(2, steps=3),
        make_job(3, steps=3, hold_step=1),
    ]
    return [
        replace(
            job,
            result_folder=folder / str(job.trial),
            state_folder=folder / f"{job.trial}.state",
        )
        for job in jobs
    ]


def stop_after(executor: InProcessExecutor, steps: int) -> None:
    """Let ``wait`` raise after so many steps from now on."""
    left = iter(range(steps - 1))

    def on_step() -> None:
        if next(left, None) is None:
            raise StopHere

    executor.on_step = on_step


def finish(
    executor: InProcessExecutor, jobs: Sequence[LaneJob], outcomes: dict[int, LaneOutcome]
) -> None:
    """Run the jobs that have no outcome yet."""
    waiting = [job for job in jobs if job.trial not in outcomes]
    while waiting or executor.busy:
        while waiting and executor.free_slots:
            executor.submit(waiting.pop(0))
        outcomes |= {outcome.trial: outcome for outcome in executor.wait()}


def run_stopped(
    make: Callable[[], InProcessExecutor], jobs: Sequence[LaneJob], steps: Sequence[int]
) -> dict[int, LaneOutcome]:
    """Run jobs in one executor after the other, each stopped after its number of steps but the last."""
    outcomes: dict[int, LaneOutcome] = {}
    for number in steps:
        executor = make()
        stop_after(executor, number)
        with pytest.raises(StopHere):
            finish(executor, jobs, outcomes)
        executor.save_states()
    finish(make(), jobs, outcomes)
    return outcomes


def assert_same(
    found: dict[int, LaneOutcome],
    wanted: dict[int, LaneOutcome],
    jobs: Sequence[LaneJob],
    others: Sequence[LaneJob],
) -> None:
    assert found.keys() == wanted.keys()
    for number, outcome in wanted.items():
        assert outcome.state is found[number].state is TrialState.COMPLETE
        for name in ("points", "evaluation", "num_tokens", "pack_lanes"):
            assert getattr(found[number], name) == getattr(outcome, name), (number, name)
        assert found[number].span is not None
    for job, other in zip(jobs, others, strict=True):
        assert job.result_folder is not None
        assert other.result_folder is not None
        names = sorted(path.name for path in other.result_folder.iterdir())
        assert names == sorted(path.name for path in job.result_folder.iterdir())
        for name in names:
            assert (job.result_folder / name).read_bytes() == (
                other.result_folder / name
            ).read_bytes(), name


@pytest.fixture(scope="module")
def undisturbed(
    any_base, splits, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[int, LaneOutcome], list[LaneJob]]:
    """What the jobs come to when nobody stops them, and the jobs."""
    folder, outcomes = tmp_path_factory.mktemp("whole"), {}
    jobs = new_jobs(folder)
    finish(new_executor(any_base, splits), jobs, outcomes)
    assert not list(folder.glob("*.state"))  # nobody asked for them
    return outcomes, jobs


@pytest.mark.parametrize("stops", [[1], [2], [3], [4], [5], [2, 2], [1, 1, 1, 1]], ids=str)
def test_lanes_that_were_stopped_anywhere_end_as_if_they_had_not(
    any_base, splits, tmp_path: Path, undisturbed, stops: list[int]
) -> None:
    jobs = new_jobs(tmp_path)
    found = run_stopped(lambda: new_executor(any_base, splits), jobs, stops)
    assert_same(found, undisturbed[0], jobs, undisturbed[1])


def test_a_later_rung_that_was_stopped_ends_as_if_it_had_not(
    any_base, splits, tmp_path: Path
) -> None:
    first = make_job(1, steps=4, hold_step=3, result_folder=tmp_path / "rung-0")
    finish(new_executor(any_base, splits), [first], {})
    second = make_job(
        1,
        steps=9,
        rung=1,
        start_step=3,
        hold_step=7,
        start_folder=tmp_path / "rung-0",
        first_loss=5.0,
    )
    jobs, others = (
        [replace(second, result_folder=folder / "r", state_folder=folder / "s")]
        for folder in (tmp_path / "stopped", tmp_path / "whole")
    )
    wanted: dict[int, LaneOutcome] = {}
    finish(new_executor(any_base, splits), others, wanted)
    for stops in ([5], [2, 3]):
        found = run_stopped(lambda: new_executor(any_base, splits), jobs, stops)
        assert [point.step for point in found[1].points] == [4, 5, 6, 7, 8, 9]
        assert_same(found, wanted, jobs, others)
        assert jobs[0].state_folder is not None
        with publish_folder(jobs[0].state_folder):
            pass  # as whoever records the outcome: nothing of the lane is left


def test_a_lane_that_is_gone_on_with_repeats_no_step(base, splits, tmp_path: Path) -> None:
    jobs = new_jobs(tmp_path)[:1]
    executor = new_executor(base, splits)
    stop_after(executor, 2)
    with pytest.raises(StopHere):
        finish(executor, jobs, {})
    executor.save_states()
    seen, again = [], new_executor(base, splits)
    again.on_step = lambda: seen.append(again.readings()[0].step)
    outcomes: dict[int, LaneOutcome] = {}
    finish(again, jobs, outcomes)
    assert seen == [3, 4, 5]
    assert [point.step for point in outcomes[1].points] == [1, 2, 3, 4, 5]
    assert outcomes[1].wall_s > again.train_s  # of both executors


def test_a_lane_that_was_stopped_after_its_last_step_is_only_evaluated(
    base, splits, tmp_path: Path
) -> None:
    [job] = new_jobs(tmp_path)[:1]
    found = run_stopped(lambda: new_executor(base, splits), [job], [STEPS])
    executor = new_executor(base, splits)
    outcomes: dict[int, LaneOutcome] = {}
    finish(executor, [job], outcomes)  # its outcome was lost before it was recorded
    assert executor.train_s == 0.0
    assert outcomes[1].evaluation == found[1].evaluation
    assert outcomes[1].span is not None


@pytest.mark.parametrize("read_every", [1, 3, 50])
def test_losses_that_are_still_on_the_device_are_saved_too(
    base, splits, tmp_path: Path, read_every: int
) -> None:
    jobs, others = new_jobs(tmp_path / "stopped"), new_jobs(tmp_path / "whole")
    wanted: dict[int, LaneOutcome] = {}
    finish(new_executor(base, splits), others, wanted)
    found = run_stopped(lambda: new_executor(base, splits, read_every=read_every), jobs, [2, 2])
    assert_same(found, wanted, jobs, others)


class Failing(TrialPack):
    """Plants an infinity into lane 2 before its second step."""

    def _accumulate(self, lanes: Sequence[Lane], group_rank: int) -> Any:
        for lane in lanes:
            if lane.job.trial == 2 and lane.step == 1:
                assert lane.adapter is not None
                lane.adapter.flat[0] = torch.inf
        return super()._accumulate(lanes, group_rank)


def test_lanes_that_were_put_back_are_saved_at_the_step_they_really_reached(
    base, splits, tmp_path: Path
) -> None:
    jobs, others = new_jobs(tmp_path / "stopped")[:2], new_jobs(tmp_path / "whole")[:2]
    jobs, others = ([replace(job, hold_step=3) for job in some] for some in (jobs, others))

    def make() -> InProcessExecutor:
        return new_executor(base, splits, pack=Failing, read_every=50)

    wanted: dict[int, LaneOutcome] = {}
    finish(make(), others, wanted)
    assert (wanted[1].state, wanted[2].state) == (TrialState.COMPLETE, TrialState.DIVERGED)
    executor = make()
    stop_after(executor, 2)
    with pytest.raises(StopHere):
        finish(executor, jobs, {})
    assert [lane.step for lane in executor.readings()] == [2, 2]  # the second took no effect
    executor.save_states()
    assert [lane.step for lane in executor.readings()] == [1, 1]
    found: dict[int, LaneOutcome] = {}
    finish(make(), jobs, found)
    assert found[2].state is TrialState.DIVERGED
    assert [point.step for point in found[2].points] == [1, 2]
    assert_same({1: found[1]}, {1: wanted[1]}, jobs[:1], others[:1])


def test_parked_lanes_are_saved_as_well(base, splits, tmp_path: Path) -> None:
    jobs, others = new_jobs(tmp_path / "stopped"), new_jobs(tmp_path / "whole")
    pack = small_memory(1, "training")
    wanted: dict[int, LaneOutcome] = {}
    finish(new_executor(base, splits, pack=pack), others, wanted)
    executor = new_executor(base, splits, pack=pack)
    stop_after(executor, 2)  # the step in which memory ran out is not told
    with pytest.raises(StopHere):
        finish(executor, jobs, {})
    assert (executor.max_lanes, len(executor.readings())) == (1, 1)
    executor.save_states()
    saved = [job.trial for job in jobs if is_complete(job.state_folder)]  # type: ignore[arg-type]
    assert saved == [1, 2]
    found: dict[int, LaneOutcome] = {}
    again = new_executor(base, splits, pack=pack, lanes=1)
    finish(again, jobs, found)
    for number, outcome in wanted.items():
        losses = [point.train_loss for point in outcome.points]
        # lanes share other steps, so sums are rounded otherwise
        assert [p.train_loss for p in found[number].points] == pytest.approx(losses, rel=1e-5)


# What is not the lane's own, whole state is ignored.


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def replace_whole(name: str, content: bytes) -> Callable[[Path], None]:
    """Return a fault that publishes other content under a manifest that fits it."""

    def spoil(folder: Path) -> None:
        files = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != MANIFEST}
        with publish_folder(folder) as staging:
            for other, kept in (files | {name: content}).items():
                (staging / other).write_bytes(kept)

    return spoil


def with_progress(**changes: Any) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        progress = json.loads((folder / PROGRESS_FILE).read_text()) | changes
        replace_whole(PROGRESS_FILE, json.dumps(progress).encode())(folder)

    return spoil


FAULTS: dict[str, Callable[[Path], None]] = {
    "state flipped": lambda folder: flip(folder / STATE_FILE),
    "state cut": lambda folder: cut(folder / STATE_FILE),
    "state gone": lambda folder: (folder / STATE_FILE).unlink(),
    "held state flipped": lambda folder: flip(folder / HELD_FILE),
    "readings flipped": lambda folder: flip(folder / PROGRESS_FILE),
    "readings gone": lambda folder: (folder / PROGRESS_FILE).unlink(),
    "manifest flipped": lambda folder: flip(folder / MANIFEST),
    "manifest gone": lambda folder: (folder / MANIFEST).unlink(),
    "no safetensors": replace_whole(STATE_FILE, b"nothing of the kind"),
    "readings no JSON": replace_whole(PROGRESS_FILE, b"\xff{"),
    "readings of another form": replace_whole(PROGRESS_FILE, b"[1, 2]"),
    "points of another form": with_progress(points=[[1, 2.0]]),
    "points that do not come to its step": with_progress(points=[[1, 2.0, 1e-4, 1.0, 5]]),
    "a doubt without its answer": with_progress(
        points=[[step, 2.0 * step, 1e-4, 1.0, 5] for step in (1, 2, 3, 4)], base_losses=[]
    ),
    "another key": with_progress(key="0" * 64),
}


@pytest.fixture(scope="module")
def saved(base, splits, tmp_path_factory: pytest.TempPathFactory) -> LaneJob:
    """A job whose lane was saved at step 4, past its hold step."""
    [job] = new_jobs(tmp_path_factory.mktemp("saved"))[:1]
    executor = new_executor(base, splits)
    stop_after(executor, 4)
    with pytest.raises(StopHere):
        finish(executor, [job], {})
    executor.save_states()
    return job


def first_step_of(base: BaseModel, splits: dict[str, Any], job: LaneJob) -> int:
    """Return the first step that an executor trains of the job."""
    executor = new_executor(base, splits)
    stop_after(executor, 1)
    with pytest.raises(StopHere):
        finish(executor, [job], {})
    return executor.readings()[0].step


def copied(saved: LaneJob, folder: Path) -> LaneJob:
    assert saved.state_folder is not None
    (folder / "state").mkdir()
    for path in saved.state_folder.iterdir():
        (folder / "state" / path.name).write_bytes(path.read_bytes())
    return replace(saved, state_folder=folder / "state", result_folder=folder / "result")


@pytest.mark.parametrize("fault", FAULTS.values(), ids=list(FAULTS))
def test_a_damaged_state_is_ignored(base, splits, tmp_path: Path, saved, fault) -> None:
    job = copied(saved, tmp_path)
    fault(job.state_folder)
    assert first_step_of(base, splits, job) == 1


def test_a_state_that_is_whole_is_used_and_holds_nothing_but_safetensors_and_json(
    base, splits, tmp_path: Path, saved
) -> None:
    job = copied(saved, tmp_path)
    names = {path.name for path in job.state_folder.iterdir()}
    assert names == {STATE_FILE, HELD_FILE, PROGRESS_FILE, MANIFEST}
    assert first_step_of(base, splits, job) == STEPS


def test_a_state_of_another_job_is_ignored(base, splits, tmp_path: Path, saved) -> None:
    job = copied(saved, tmp_path)
    assert job.config is not None
    others = [
        replace(job, trial=7),
        replace(job, rung=1),
        replace(job, hold_step=4),
        replace(job, end_step=6),
        replace(job, warmup_steps=2),
        replace(job, first_loss=3.0),
        replace(job, train_split="all"),
        replace(job, config=replace(job.config, learning_rate=1e-5)),
        replace(job, config=replace(job.config, rank=8)),
        replace(job, config=replace(job.config, data_seed=8)),
    ]
    assert [first_step_of(base, splits, other) for other in others] == [1] * len(others)
    limited = replace(job, loss_limits=((2, 50.0),))  # held against the points that are read back
    assert first_step_of(base, splits, limited) == 5
    # what comes after the last step is no matter of training
    assert first_step_of(base, splits, replace(job, eval_rows=3)) == STEPS


# Saving on the way.


def test_lanes_are_saved_after_every_stretch_of_work_and_a_crash_costs_no_more(
    base, splits, tmp_path: Path
) -> None:
    job = replace(new_jobs(tmp_path)[0], end_step=100_000)
    executor = new_executor(base, splits, checkpoint_every=0.01)
    saved: list[tuple[float, float]] = []  # seconds of work before, seconds of all savings

    def on_step() -> None:
        if executor.saving_s > (saved[-1][1] if saved else 0.0):
            saved.append((executor.train_s, executor.saving_s))
        if len(saved) == 3:
            raise StopHere

    executor.on_step = on_step
    with pytest.raises(StopHere):
        finish(executor, [job], {})
    spent = 0.0
    for (before, total), (after, _) in pairwise(saved):
        # rounding of sums of seconds
        assert after - before >= max(0.01, LEAST_WORK_PER_SAVING * (total - spent)) - 1e-6
        spent = total
    assert first_step_of(base, splits, job) == executor.readings()[0].step + 1


def test_without_a_folder_or_a_step_done_nothing_is_saved(base, splits, tmp_path: Path) -> None:
    [job] = new_jobs(tmp_path)[:1]
    executor = new_executor(base, splits)
    executor.submit(job)
    executor.save_states()
    assert not job.state_folder.exists()
    executor.submit(replace(job, trial=2, state_folder=None))
    stop_after(executor, 1)
    with pytest.raises(StopHere):
        executor.wait()
    executor.save_states()
    assert [path.name for path in tmp_path.iterdir()] == ["1.state"]
    before = (tmp_path / "1.state" / MANIFEST).stat()
    executor.save_states()  # nothing was trained since
    assert (tmp_path / "1.state" / MANIFEST).stat().st_ino == before.st_ino


def test_a_job_that_keeps_no_state_holds_none(base, splits, tmp_path: Path) -> None:
    job = replace(new_jobs(tmp_path)[0], keep_state=False)
    run_stopped(lambda: new_executor(base, splits), [job], [4])
    assert not (job.state_folder / HELD_FILE).exists()
    assert (job.state_folder / STATE_FILE).exists()


# From within ``on_step``.


def test_an_executor_that_was_left_between_two_steps_goes_on(base, splits, tmp_path: Path) -> None:
    jobs, others = new_jobs(tmp_path / "left"), new_jobs(tmp_path / "whole")
    wanted: dict[int, LaneOutcome] = {}
    finish(new_executor(base, splits), others, wanted)
    executor = new_executor(base, splits)

    def leave() -> None:
        raise StopHere

    executor.on_step = leave
    found: dict[int, LaneOutcome] = {}
    waiting, left = list(jobs), 0
    while waiting or executor.busy:
        while waiting and executor.free_slots:
            executor.submit(waiting.pop(0))
        try:
            found |= {outcome.trial: outcome for outcome in executor.wait()}
        except StopHere:
            left += 1
    assert left == 6
    assert_same(found, wanted, jobs, others)


def test_a_lane_that_diverged_in_the_step_before_is_told_and_not_trained_again(
    base, splits, tmp_path: Path
) -> None:
    jobs = new_jobs(tmp_path)[:2]
    executor = new_executor(base, splits, pack=Failing)
    stop_after(executor, 3)  # its first step, the one that does not count, and the one apart
    with pytest.raises(StopHere):
        finish(executor, jobs, {})
    executor.save_states()
    assert [job.trial for job in jobs if job.state_folder.exists()] == [1]
    executor.on_step = lambda: None
    [outcome] = executor.wait()
    assert (outcome.trial, outcome.state) == (2, TrialState.DIVERGED)
    assert [point.step for point in outcome.points] == [1, 2]


def test_jobs_and_a_new_limit_may_come_between_two_steps(base, splits, tmp_path: Path) -> None:
    jobs, seen = new_jobs(tmp_path), []
    executor = new_executor(base, splits, lanes=1)

    def on_step() -> None:
        seen.append([lane.trial for lane in executor.readings()])
        if len(seen) == 1:
            executor.max_lanes = 2
            executor.submit(jobs[1])
        if len(seen) == 3:
            executor.max_lanes = 1
            executor.submit(jobs[2])

    executor.on_step = on_step
    found: dict[int, LaneOutcome] = {}
    finish(executor, jobs[:1], found)
    assert sorted(found) == [1, 2, 3]
    # lanes that train go on when fewer are allowed; the next waits for all of them
    assert seen == [[1], [1, 2], [1, 2], [1, 2], [1], [3], [3], [3]]


def test_in_the_middle_of_a_step_nothing_is_saved(base, splits, tmp_path: Path) -> None:
    class Broken(TrialPack):
        def train_step(self, lanes: Sequence[Lane]) -> None:
            super().train_step(lanes[:1])
            if lanes[0].step == 3:
                raise StopHere
            super().train_step(lanes[1:])

    jobs = new_jobs(tmp_path)[:2]
    executor = new_executor(base, splits, pack=Broken)
    stop_after(executor, 2)
    with pytest.raises(StopHere):
        finish(executor, jobs, {})
    executor.save_states()
    executor.on_step = lambda: None
    with pytest.raises(StopHere):
        executor.wait()
    executor.save_states()
    found: dict[int, LaneOutcome] = {}
    seen, again = [], new_executor(base, splits)
    again.on_step = lambda: seen.append([lane.step for lane in again.readings()])
    finish(again, jobs, found)
    assert seen[0] == [3, 3]  # both from step 2, where they were saved
