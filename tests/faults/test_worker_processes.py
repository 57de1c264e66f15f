"""Children that train: they die, hang and are replaced, and no job is lost.

The worker is a stand-in that sleeps; steps are counted in a file that every one of its processes writes.
"""

import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from sleeping_worker import (
    SleepingTask,
    ask_for_pid,
    die_when_asked,
    refuse_when_asked,
    sleep_when_asked,
)

from lora_tune.errors import LoraTuneError, MachineError, ModelError
from lora_tune.executors.death import HOST_OUT_OF_MEMORY, count_memory_kills
from lora_tune.executors.process import PoolSettings, ProcessExecutor, environments_of
from lora_tune.records import LaneJob, LaneOutcome, TrialState

STEPS = 20
SAVE_EVERY = 5


def job_of(trial: int, *, steps: int = STEPS, metrics: tuple[str, ...] = ()) -> LaneJob:
    return LaneJob(
        trial=trial,
        rung=0,
        config=None,
        start_step=0,
        hold_step=steps,
        end_step=steps,
        warmup_steps=0,
        eval_split="selection",
        eval_dtype="train",
        start_folder=None,
        result_folder=None,
        metrics=metrics,
    )


class Pool:
    """A pool of sleeping workers, with what it said."""

    def __init__(self, **settings: Any) -> None:
        self.notes: list[str] = []
        self.on_step: Callable[[], None] = lambda: None
        settings = {"first_pause_s": 0.01, **settings}
        self.executor = ProcessExecutor(
            PoolSettings(**settings), note=self.notes.append, on_step=lambda: self.on_step()
        )

    def open(self, task: SleepingTask) -> object:
        opened = self.executor.open(task)
        self.executor.hire(task)
        return opened

    def finish(self, jobs: list[LaneJob]) -> dict[int, LaneOutcome]:
        """Train all jobs; every one has to come back once."""
        todo, outcomes = list(jobs), []
        while todo or self.executor.busy:
            while todo and self.executor.free_slots:
                self.executor.submit(todo.pop(0))
            outcomes += self.executor.wait()
        assert Counter(o.trial for o in outcomes) == Counter(job.trial for job in jobs)
        return {outcome.trial: outcome for outcome in outcomes}

    def pids(self) -> list[int]:
        return [child.pid for child in psutil.Process().children() if is_worker(child)]

    def deaths(self) -> list[str]:
        return [note for note in self.notes if " died: " in note]


def is_worker(process: psutil.Process) -> bool:
    try:
        return "lora_tune.executors.child" in process.cmdline()
    except psutil.NoSuchProcess:
        return False


@pytest.fixture
def pool_of(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Pool]]:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    pools: list[Pool] = []

    def make(**settings: Any) -> Pool:
        pools.append(Pool(**settings))
        return pools[-1]

    yield make
    for pool in pools:
        pool.executor.close()
    assert not [p for p in psutil.Process().children() if is_worker(p)]


def steps_taken(folder: Path) -> Counter[tuple[int, int]]:
    """How often each step of each trial was taken."""
    lines = (folder / "steps").read_text().splitlines()
    return Counter((int(line.split()[0]), int(line.split()[2])) for line in lines)


def test_jobs_of_two_children_come_back_once_with_slots_of_their_own(
    pool_of: Callable[..., Pool], tmp_path: Path
) -> None:
    pool = pool_of(workers=2, lanes=2)
    assert pool.open(SleepingTask(folder=tmp_path, step_s=0.002)) == "open"
    outcomes = pool.finish([job_of(n) for n in range(9)])
    assert all(outcome.state is TrialState.COMPLETE for outcome in outcomes.values())
    assert set(steps_taken(tmp_path).values()) == {1}
    assert len({line.split()[3] for line in (tmp_path / "steps").read_text().splitlines()}) == 2
    assert {outcome.span.slot // 2 for outcome in outcomes.values() if outcome.span} == {0, 1}
    assert pool.executor.num_tokens == 9 * STEPS * 10
    assert pool.executor.memory_bytes() == 1000


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_killed_child_is_replaced_and_repeats_at_most_what_was_not_saved(
    pool_of: Callable[..., Pool], tmp_path: Path, number: int
) -> None:
    pool = pool_of(lanes=2, log_folder=tmp_path / "log")
    pool.open(SleepingTask(folder=tmp_path, step_s=0.005))
    killed: list[int] = []

    def kill_once() -> None:
        if not killed and any(r.step > SAVE_EVERY for r in pool.executor.readings()):
            killed.extend(pool.pids())
            os.kill(killed[0], number)

    pool.on_step = kill_once
    outcomes = pool.finish([job_of(n, steps=120) for n in range(2)])
    assert all(outcome.state is TrialState.COMPLETE for outcome in outcomes.values())
    taken = steps_taken(tmp_path)
    assert len(killed) == 1
    assert set(taken) == {(n, step) for n in range(2) for step in range(1, 121)}
    assert sum(taken.values()) - len(taken) <= 2 * SAVE_EVERY
    [death] = pool.deaths()
    assert f"killed by signal {number} ({signal.Signals(number).name})" in death
    assert f"killed by signal {number}" in (tmp_path / "log" / "worker-0.log").read_text()


def test_lane_that_kills_its_worker_is_found_alone_and_the_others_finish(
    pool_of: Callable[..., Pool], tmp_path: Path
) -> None:
    pool = pool_of(lanes=3)
    pool.open(SleepingTask(folder=tmp_path, step_s=0.002, deadly=(1,)))
    outcomes = pool.finish([job_of(n) for n in range(5)])
    states = {trial: outcome.state for trial, outcome in outcomes.items()}
    assert states == {n: TrialState.FAILED if n == 1 else TrialState.COMPLETE for n in range(5)}
    assert "4 times" in outcomes[1].reason
    assert "signal 11 (SIGSEGV)" in outcomes[1].reason
    assert (
        4 <= len(pool.deaths()) <= 6
    )  # a death that was seen further than the last is not counted


def test_failed_lane_answers_for_the_metrics_that_it_was_asked_for(
    pool_of: Callable[..., Pool], tmp_path: Path
) -> None:
    pool = pool_of(lanes=1)
    pool.open(SleepingTask(folder=tmp_path, step_s=0.002, deadly=(0,)))
    [metric] = pool.finish([job_of(0, metrics=("exact-match",))])[0].metrics
    assert metric.metric == "exact-match"
    assert "died" in metric.reason


def test_child_that_dies_again_and_again_is_left_out_and_no_job_is_blamed(
    pool_of: Callable[..., Pool], tmp_path: Path
) -> None:
    sick = {"SICK": "1"}
    pool = pool_of(workers=2, lanes=2, environments=(sick, {}))
    pool.open(SickTask(folder=tmp_path, step_s=0.02))
    outcomes = pool.finish([job_of(n) for n in range(16)])
    assert all(outcome.state is TrialState.COMPLETE for outcome in outcomes.values())
    assert [note for note in pool.notes if "worker 0 is left out" in note]


class SickTask(SleepingTask):
    """Its worker dies at the third step of anything where the environment says so."""

    def open(self, note: Callable[[str], None]) -> Any:
        worker = super().open(note)
        if os.environ.get("SICK"):
            object.__setattr__(self, "deadly", tuple(range(100)))
            object.__setattr__(self, "deadly_step", 3)
        return worker


def test_hanging_child_is_killed_after_a_silence_and_its_lanes_go_on(
    pool_of: Callable[..., Pool], tmp_path: Path
) -> None:
    pool = pool_of(lanes=2, longest_silence_s=1.0)
    pool.open(SleepingTask(folder=tmp_path, step_s=0.005))
    stopped: list[int] = []

    def stop_once() -> None:
        if not stopped and any(reading.step > SAVE_EVERY for reading in pool.executor.readings()):
            stopped.extend(pool.pids())
            os.kill(stopped[0], signal.SIGSTOP)

    pool.on_step = stop_once
    outcomes = pool.finish([job_of(n, steps=150) for n in range(2)])
    assert all(outcome.state is TrialState.COMPLETE for outcome in outcomes.values())
    assert stopped
    assert "without a sign of life" in pool.deaths()[0]
    assert not psutil.pid_exists(stopped[0])


def test_kernel_that_kills_for_memory_is_named_and_the_pack_gets_smaller(
    pool_of: Callable[..., Pool], tmp_path: Path
) -> None:
    """The kernel's count is that of a file; a pack of four is too much, one of two is not."""
    counter = tmp_path / "vmstat"
    counter.write_text("oom_kill 0")

    def count() -> int | None:
        return count_memory_kills(proc=tmp_path, cgroups=tmp_path / "none")

    pool = pool_of(lanes=4, memory_kills=count)
    pool.open(SleepingTask(folder=tmp_path, step_s=0.005))
    largest: list[int] = []

    def kill_large_packs() -> None:
        size = len(pool.executor.readings())
        if size > 2:
            counter.write_text(f"oom_kill {len(largest) + 1}")
            largest.append(size)
            os.kill(pool.pids()[0], signal.SIGKILL)

    pool.on_step = kill_large_packs
    outcomes = pool.finish([job_of(n, steps=60) for n in range(4)])
    assert all(outcome.state is TrialState.COMPLETE for outcome in outcomes.values())
    assert len(largest) == 2  # at the same size once more, then at half of it
    assert all(HOST_OUT_OF_MEMORY in death for death in pool.deaths())


def test_lane_for_which_the_host_has_no_memory_is_infeasible(
    pool_of: Callable[..., Pool], tmp_path: Path
) -> None:
    counts = iter(range(1000))
    pool = pool_of(lanes=1, memory_kills=lambda: next(counts))
    task = SleepingTask(
        folder=tmp_path, step_s=0.002, deadly=(0,), deadly_signal=int(signal.SIGKILL)
    )
    pool.open(task)
    outcome = pool.finish([job_of(0)])[0]
    assert outcome.state is TrialState.INFEASIBLE
    assert HOST_OUT_OF_MEMORY in outcome.reason


def test_worker_that_cannot_be_opened_ends_the_study_with_its_reason(
    pool_of: Callable[..., Pool], tmp_path: Path
) -> None:
    pool = pool_of(log_folder=tmp_path / "log")
    with pytest.raises(
        MachineError, match=r"3 times in a row: RuntimeError: no base today.*worker-0"
    ):
        pool.open(SleepingTask(folder=tmp_path, fails_to_open="crash"))
    assert "Traceback" in (tmp_path / "log" / "worker-0.log").read_text()


def test_what_a_worker_refuses_is_raised_as_it_is(
    pool_of: Callable[..., Pool], tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match="this base is refused"):
        pool_of().open(SleepingTask(folder=tmp_path, fails_to_open="refuse"))


def test_question_is_answered_by_a_child_and_asked_again_when_it_dies(
    pool_of: Callable[..., Pool], tmp_path: Path
) -> None:
    pool = pool_of()
    pool.open(SleepingTask(folder=tmp_path))
    assert pool.executor.answer(ask_for_pid) == pool.pids()[0] != os.getpid()
    with pytest.raises(LoraTuneError, match="no answer to that"):
        pool.executor.answer(refuse_when_asked)
    again = pool_of()
    again.open(SleepingTask(folder=tmp_path))
    with pytest.raises(MachineError, match=r"died 3 times: killed by signal 9 \(SIGKILL\)"):
        again.executor.answer(die_when_asked)


def test_lanes_are_saved_where_they_are_when_the_study_is_stopped(
    pool_of: Callable[..., Pool], tmp_path: Path
) -> None:
    pool = pool_of(workers=2, lanes=2)
    pool.open(SleepingTask(folder=tmp_path, step_s=0.01, save_every=10_000))
    for n in range(4):
        pool.executor.submit(job_of(n, steps=400))

    def stop() -> None:
        if sum(reading.step > 3 for reading in pool.executor.readings()) == 4:
            raise KeyboardInterrupt

    pool.on_step = stop
    with pytest.raises(KeyboardInterrupt):
        pool.executor.wait()
    pool.executor.save_states()
    pool.executor.close()
    taken = steps_taken(tmp_path)
    for n in range(4):
        saved = int((tmp_path / f"{n}-0").read_text())
        assert saved == max(step for trial, step in taken if trial == n) > 3


def test_child_that_waits_long_for_its_jobs_is_not_taken_for_one_that_hangs(
    pool_of: Callable[..., Pool], tmp_path: Path
) -> None:
    pool = pool_of(lanes=2, longest_silence_s=1.0, least_silence_s=1.0)
    pool.open(SleepingTask(folder=tmp_path, step_s=0.005))
    for n in range(2):
        pool.executor.submit(job_of(n, steps=20 * (n + 1)))
    ended = pool.executor.wait()
    time.sleep(1.5)  # the coordinator records, or waits for a database
    while pool.executor.busy:
        ended += pool.executor.wait()
    assert [outcome.state for outcome in ended] == [TrialState.COMPLETE] * 2
    assert not pool.deaths()


def test_child_that_hangs_over_a_question_is_replaced(
    pool_of: Callable[..., Pool], tmp_path: Path
) -> None:
    pool = pool_of(longest_silence_s=2.0)
    pool.open(SleepingTask(folder=tmp_path))
    with pytest.raises(MachineError, match="without a sign of life"):
        pool.executor.answer(sleep_when_asked)


def test_children_end_with_the_process_that_started_them(tmp_path: Path) -> None:
    program = (
        "import os, sys, pathlib; from sleeping_worker import SleepingTask\n"
        "from lora_tune.executors.process import PoolSettings, ProcessExecutor\n"
        "pool = ProcessExecutor(PoolSettings(workers=2), note=print)\n"
        "task = SleepingTask(folder=pathlib.Path(sys.argv[1]))\n"
        "pool.open(task); pool.hire(task); pool._any_ready()\n"
        "print('ready', flush=True); sys.stdin.read()\n"
    )
    environ = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    with psutil.Popen(
        [sys.executable, "-c", program, str(tmp_path)],
        stdin=-1,
        stdout=-1,
        env=environ,
    ) as coordinator:
        while b"ready" not in coordinator.stdout.readline():
            assert coordinator.poll() is None
        children = coordinator.children()
        assert len(children) == 2
        coordinator.kill()
        gone, alive = psutil.wait_procs(children, timeout=10)
    assert len(gone) == 2
    assert not alive


def test_cores_are_shared_out_and_gpus_are_handed_out_one_by_one() -> None:
    [first, second] = environments_of("cpu", workers=2, num_gpus=0, environ={})
    assert first == second
    assert int(first["OMP_NUM_THREADS"]) >= 1
    assert environments_of("cpu", workers=1, num_gpus=0, environ={}) == ({},)
    chosen = environments_of("cuda", workers=2, num_gpus=3, environ={})
    assert [own["CUDA_VISIBLE_DEVICES"] for own in chosen] == ["0", "1"]


def test_eight_sleeping_workers_reach_95_percent_of_ideal(
    pool_of: Callable[..., Pool], tmp_path: Path
) -> None:
    """Ideal is the slept time shared by eight; a ratio, so a slow machine does not matter much."""
    pool = pool_of(workers=8, lanes=1)
    pool.open(SleepingTask(folder=tmp_path, step_s=0.1, save_every=10_000))
    while sum(child.ready for child in pool.executor._children) < 8:
        pool.executor._look()
    began = time.monotonic()
    pool.finish([job_of(n) for n in range(16)])
    ideal = 16 * STEPS * 0.1 / 8
    assert ideal / (time.monotonic() - began) > 0.95
