"""Kills of training children and of the coordinator, at moments drawn with a seed.

Most of it runs workers that sleep instead of training, so that the ladder, the store, the database and the
pool of children are the real ones and a study takes seconds. The witness is a study of the same seed
that ran in one process and was left alone, and a log in which every step of every worker is a line.
"""

import functools
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from campaign_results import record
from fault_studies import (
    FAULTS,
    LONG,
    TOLERANCE,
    RealStudies,
    check_equal,
    check_whole,
    family,
    finish,
    is_alive,
    kill,
    lane_states,
    lora_tune_run,
    results_of,
    start,
    trains,
    trial_table,
    wait_until,
    wait_while_it_trains,
    workers_of,
)
from table_worker import Step, read_log, repeated_steps

from lora_tune.errors import MachineError

SAVE_EVERY = 4  # steps of a lane
WITHIN_S = 5.0  # in which orphans have to be gone


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """How a study is spread; the decisions depend on ``slots`` alone."""

    workers: int
    lanes: int
    trials: int = 8
    step_s: float = 0.004

    @property
    def slots(self) -> int:
        return self.workers * self.lanes


def program(shape: Shape, folder: Path, *more: str) -> list[str | Path]:
    return [
        FAULTS / "sleeping_study.py",
        folder,
        *("--workers", str(shape.workers), "--lanes", str(shape.lanes)),
        *("--trials", str(shape.trials), "--step-s", str(shape.step_s)),
        *("--save-every", str(SAVE_EVERY)),
        *more,
    ]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a maker of the same study without children and without faults, made once a size."""
    folder = tmp_path_factory.mktemp("undisturbed")

    @functools.cache
    def make(*, slots: int, trials: int) -> Path:
        study = folder / f"{slots}-{trials}"
        shape = Shape(workers=0, lanes=1, trials=trials, step_s=0.0)
        code, said = finish(start(*program(shape, study, "--slots", str(slots)), cwd=folder))
        assert code == 0, said
        return study

    return make


def check_study(study: Path, reference: Path, *, kills: int, slots: int) -> Counter[str]:
    """Check all that a study promises after kills; return what was counted."""
    found = check_whole(study, reference=reference)
    steps, expected = read_log(study), read_log(reference)
    assert {step[:3] for step in steps} == {step[:3] for step in expected}  # the budget, exactly
    repeated = repeated_steps(steps)
    assert sum(repeated.values()) <= kills * slots * SAVE_EVERY
    assert not [step for step, times in repeated.items() if times > kills]
    found["steps_repeated"] = sum(repeated.values())
    return found


def kill_children(study: Path, shape: Shape, moments: list[int], draw: random.Random) -> str:
    """Run a study, kill one of its children whenever the log has so many lines; return what was said."""
    coordinator = start(*program(shape, study), cwd=study.parent)
    for moment in moments:
        wait_until(lambda: _has(study, moment) or coordinator.poll() is not None, within_s=60)  # noqa: B023
        time.sleep(draw.random() * 2 * shape.step_s)
        if workers := workers_of(coordinator.pid):
            kill(draw.choice(workers))
    code, said = finish(coordinator)
    assert code == 0, said
    return said


def _has(study: Path, lines: int) -> bool:
    return len(read_log(study)) >= lines


def kill_coordinator(study: Path, shape: Shape, moment: int, draw: random.Random) -> None:
    """Run a study until the log has so many lines, kill its coordinator, and see its children go."""
    coordinator = start(*program(shape, study), cwd=study.parent)
    wait_until(lambda: _has(study, moment) or coordinator.poll() is not None, within_s=60)
    time.sleep(draw.random() * 2 * shape.step_s)
    children = family(coordinator.pid)
    kill(coordinator.pid)
    coordinator.communicate()
    assert coordinator.returncode == -signal.SIGKILL, "it had ended by itself"
    assert wait_until(lambda: not any(map(is_alive, children)), within_s=WITHIN_S), "orphans"


def test_a_study_ends_as_if_no_child_had_been_killed(tmp_path, undisturbed):
    draw, shape = random.Random(1), Shape(workers=2, lanes=2)
    reference = undisturbed(slots=shape.slots, trials=shape.trials)
    total = len(read_log(reference))
    moments = sorted(draw.randrange(1, total) for _ in range(3))
    said = kill_children(tmp_path / "study", shape, moments, draw)
    assert said.count("killed by signal 9 (SIGKILL)") == 3
    check_study(tmp_path / "study", reference, kills=3, slots=shape.slots)


def test_a_study_ends_as_if_its_coordinator_had_not_been_killed(tmp_path, undisturbed):
    draw, shape, study = random.Random(2), Shape(workers=2, lanes=2), tmp_path / "study"
    reference = undisturbed(slots=shape.slots, trials=shape.trials)
    total = len(read_log(reference))
    for moment in (total // 4, total * 3 // 4):
        kill_coordinator(study, shape, moment, draw)
    code, said = finish(start(*program(shape, study), cwd=tmp_path))
    assert code == 0, said
    check_study(study, reference, kills=2, slots=shape.slots)


def test_results_in_any_order_lead_to_the_same_decisions(tmp_path, undisturbed):
    shape, study = Shape(workers=4, lanes=1, trials=12, step_s=0.0), tmp_path / "study"
    reference = undisturbed(slots=4, trials=12)
    code, said = finish(start(*program(shape, study, "--jitter-s", "0.02"), cwd=tmp_path))
    assert code == 0, said
    steps = read_log(study)
    assert len({step.pid for step in steps}) == 4
    assert _ends(steps) != _ends(read_log(reference))  # they did come in another order
    assert check_study(study, reference, kills=0, slots=4).total() == 0


def _ends(steps: list[Step]) -> list[tuple[int, int]]:
    last = {(step.trial, step.rung): place for place, step in enumerate(steps)}
    return sorted(last, key=lambda lane: last[lane])


def test_a_trial_that_kills_its_workers_is_found_and_the_others_finish(tmp_path, undisturbed):
    shape, study, guilty = Shape(workers=1, lanes=3), tmp_path / "study", 1
    code, said = finish(start(*program(shape, study, "--deadly", str(guilty)), cwd=tmp_path))
    assert code == 0, said
    reference = trial_table(undisturbed(slots=3, trials=shape.trials))
    found = trial_table(study)
    assert found[guilty]["state"] == "failed"
    assert "killed by signal 11 (SIGSEGV)" in found[guilty]["reason"]
    assert "alone" in found[guilty]["reason"]
    # Three in company, one alone; a reading at the right moment counts as getting further, once or twice.
    assert 4 <= said.count("killed by signal 11") + 1 <= 7
    innocent = [n for n in range(shape.trials) if n != guilty]
    same = [n for n in innocent if found[n]["config"] == reference[n]["config"]]
    assert {0, 2} <= set(same)  # those that were in the pack with it
    for n in same:  # what they lost to it is made good
        check_equal(found[n]["rungs"][:1], reference[n]["rungs"][:1], 0.0)


def test_workers_that_die_when_they_start_end_the_study_with_the_reason(tmp_path):
    shape = Shape(workers=2, lanes=1)
    began = time.monotonic()
    code, said = finish(
        start(*program(shape, tmp_path / "study", "--does-not-open"), cwd=tmp_path), within_s=30
    )
    assert code == MachineError.exit_code == 7
    assert "no base today" in said.splitlines()[-1]
    assert "3 times" in said.splitlines()[-1]
    assert time.monotonic() - began < 20


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> RealStudies:
    """The maker of real studies."""
    return RealStudies(tmp_path_factory.getbasetemp() / "real-studies")


def oldest_state_s(folder: Path) -> float:
    """Return how long ago the lanes that train were saved, the one that is longest ago."""
    times = []
    for state in lane_states(folder):
        with suppress(FileNotFoundError):  # it ended meanwhile
            times.append(time.time() - (state / "manifest.json").stat().st_mtime)
    return max(times, default=0.0)


def kill_real_child(folder: Path, draw: random.Random) -> float:
    """Run a real study to its end, one child killed while it trains; return the age of its lanes' states."""
    coordinator = lora_tune_run(folder)
    assert wait_until(lambda: trains(folder) or coordinator.poll() is not None, within_s=120)
    wait_while_it_trains(folder, at_most_s=draw.random() * 2)
    age_s = oldest_state_s(folder)
    [worker] = workers_of(coordinator.pid)
    kill(worker)
    code, said = finish(coordinator, within_s=300)
    assert code == 0, said
    return age_s


def test_a_real_study_ends_as_if_its_child_had_not_been_killed(real, tmp_path):
    folder = real.make(tmp_path / "study", **LONG)
    kill_real_child(folder, random.Random(3))
    reference = real.reference(**LONG)
    check_whole(results_of(folder), reference=reference, tolerance=TOLERANCE)


@pytest.mark.campaign
def test_ten_kills_of_real_children(real, tmp_path):
    found, oldest = Counter[str](), 0.0
    for number in range(10):
        folder = real.make(tmp_path / f"study-{number}", **LONG)
        oldest = max(oldest, kill_real_child(folder, random.Random(3000 + number)))
        reference = real.reference(**LONG)
        found.update(check_whole(results_of(folder), reference=reference, tolerance=TOLERANCE))
    record(
        "real-child-kills",
        kills=10,
        **found,
        seconds_between_saves=0.2,
        seconds_of_work_lost_at_most=round(oldest, 2),
    )


@pytest.mark.campaign
def test_five_kills_of_a_real_coordinator(real, tmp_path):
    found, oldest = Counter[str](), 0.0
    for number in range(5):
        draw, folder = random.Random(4000 + number), real.make(tmp_path / f"study-{number}", **LONG)
        coordinator = lora_tune_run(folder)
        wait_until(lambda: trains(folder) or coordinator.poll() is not None, within_s=120)  # noqa: B023
        wait_while_it_trains(folder, at_most_s=draw.random() * 2)
        oldest, children = max(oldest, oldest_state_s(folder)), family(coordinator.pid)
        kill(coordinator.pid)
        coordinator.communicate()
        assert wait_until(lambda: not any(map(is_alive, children)), within_s=WITHIN_S), "orphans"  # noqa: B023
        assert coordinator.returncode == -signal.SIGKILL
        found.update(real.go_on(folder, **LONG))
    record(
        "real-coordinator-kills",
        kills=5,
        **found,
        seconds_between_saves=0.2,
        seconds_of_work_lost_at_most=round(oldest, 2),
    )


@pytest.mark.campaign
def test_fifty_kills_of_children(tmp_path, undisturbed):
    shapes = [
        Shape(workers=1, lanes=2),
        Shape(workers=2, lanes=2),
        Shape(workers=4, lanes=1),
        Shape(workers=1, lanes=4, trials=12),
    ]
    killed = studies = 0
    found = Counter[str]()
    began = time.monotonic()
    while killed < 50:
        draw, shape = random.Random(1000 + studies), shapes[studies % len(shapes)]
        reference = undisturbed(slots=shape.slots, trials=shape.trials)
        total = len(read_log(reference))
        moments = sorted(draw.randrange(1, total) for _ in range(min(4, 50 - killed)))
        study = tmp_path / f"{studies}"
        kills = kill_children(study, shape, moments, draw).count("killed by signal 9")
        found.update(check_study(study, reference, kills=kills, slots=shape.slots))
        killed, studies = killed + kills, studies + 1
        assert studies < 40, "too many kills hit nothing"
    record(
        "child-kills",
        kills=killed,
        studies=studies,
        **found,
        steps_between_saves=SAVE_EVERY,
        seconds=round(time.monotonic() - began),
    )


@pytest.mark.campaign
def test_twenty_kills_of_the_coordinator(tmp_path, undisturbed):
    shape, found = Shape(workers=2, lanes=2), Counter[str]()
    reference = undisturbed(slots=shape.slots, trials=shape.trials)
    total = len(read_log(reference))
    began = time.monotonic()
    for number in range(20):
        draw, study = random.Random(2000 + number), tmp_path / f"{number}"
        kill_coordinator(study, shape, 1 + number * (total - 1) // 20, draw)
        code, said = finish(start(*program(shape, study), cwd=tmp_path))
        assert code == 0, said
        found.update(check_study(study, reference, kills=1, slots=shape.slots))
    record(
        "coordinator-kills",
        kills=20,
        studies=20,
        **found,
        steps_between_saves=SAVE_EVERY,
        seconds=round(time.monotonic() - began),
    )
