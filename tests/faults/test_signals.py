"""SIGINT, SIGTERM and SIGHUP to a real study, in every phase of it; what is left goes on to the same end.

The normal tests stop a study while it loads; ``test_end_to_end.py`` stops one that trains. The campaign goes
through all phases and signals, and compares every study that went on with one that was left alone.
"""

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from campaign_results import record
from fault_studies import (
    LONG,
    TOLERANCE,
    RealStudies,
    check_whole,
    environment,
    family,
    finish,
    is_alive,
    kill,
    lora_tune_run,
    results_of,
    trains,
    trial_table,
    wait_until,
    workers_of,
)

SLURM = Path(__file__).parents[2] / "docs" / "slurm.sh"
CODES = {signal.SIGINT: 130, signal.SIGTERM: 75, signal.SIGHUP: 75}
STOPS_WITHIN_S = 10.0
ENDS_WITHIN_S = 2.0  # after a second signal
GONE_WITHIN_S = 5.0
_STOPS: list[float] = []  # seconds, of the campaign


def loads(folder: Path) -> bool:
    return True  # what it does from its start on


def settles(folder: Path) -> bool:
    """Whether the coordinator has begun: what follows is the load of the base and its measurement."""
    return (results_of(folder) / "owner.lock").exists()


def evaluates(folder: Path) -> bool:
    return (folder / "scoring").exists()


# Phase: how it is known, and what makes it long.
PHASES: dict[str, tuple[Callable[[Path], bool], dict[str, object]]] = {
    "load": (loads, {}),
    "settle": (settles, {}),
    "train": (trains, LONG),
    "evaluate": (evaluates, {"slow_metric": True}),
    "save": (trains, {**LONG, "checkpoint_every": 0.001}),
}


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> RealStudies:
    """The maker of real studies."""
    return RealStudies(tmp_path_factory.getbasetemp() / "real-studies")


def stop_in(
    real: RealStudies, phase: str, folder: Path, number: signal.Signals, *, after_s: float = 0.0
) -> tuple[int, float, str]:
    """Stop a study in a phase; return its exit code, how long it took, and what it said."""
    reached, keys = PHASES[phase]
    coordinator = lora_tune_run(real.make(folder, **keys))
    assert wait_until(lambda: reached(folder) or coordinator.poll() is not None, within_s=120)
    time.sleep(after_s)
    children = family(coordinator.pid)
    began = time.monotonic()
    kill(coordinator.pid, number)
    code, said = finish(coordinator)
    took = time.monotonic() - began
    assert wait_until(lambda: not any(map(is_alive, children)), within_s=GONE_WITHIN_S), "orphans"
    return code, took, said


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_study_that_is_stopped_while_it_loads_says_so_and_leaves_nothing_half_done(
    real, tmp_path, number
):
    code, took, said = stop_in(real, "load", tmp_path / "study", number, after_s=1.0)
    assert code == CODES[number], said
    assert took < STOPS_WITHIN_S
    assert "Traceback" not in said
    assert "the same command goes on" in said
    assert not (results_of(tmp_path / "study") / "trials").exists()


@pytest.mark.campaign
@pytest.mark.parametrize("number", list(CODES), ids=lambda number: number.name)
@pytest.mark.parametrize("phase", PHASES)
def test_a_study_that_is_stopped_in_any_phase_goes_on_to_the_same_end(
    real, tmp_path, phase, number
):
    after_s = {"load": 2.0, "settle": 0.5}.get(phase, 0.0)
    code, took, said = stop_in(real, phase, tmp_path / "study", number, after_s=after_s)
    assert code == CODES[number], said
    assert took < STOPS_WITHIN_S, took
    assert "Traceback" not in said
    real.go_on(tmp_path / "study", **PHASES[phase][1])
    _STOPS.append(took)
    record("stops", stops=len(_STOPS), studies_lost=0, slowest_s=round(max(_STOPS), 1))


@pytest.mark.campaign
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_second_signal_ends_it_at_once(real, tmp_path, number, code):
    folder = real.make(tmp_path / "study", **LONG)
    coordinator = lora_tune_run(folder)
    assert wait_until(lambda: trains(folder), within_s=120)
    children = workers_of(coordinator.pid)
    assert children
    for child in children:  # one that does not answer keeps the first signal waiting
        kill(child, signal.SIGSTOP)
    kill(coordinator.pid, number)
    time.sleep(1.0)
    assert coordinator.poll() is None
    began = time.monotonic()
    kill(coordinator.pid, number)
    found, said = finish(coordinator)
    assert time.monotonic() - began < ENDS_WITHIN_S
    assert found == code, said
    for child in children:
        kill(child, signal.SIGCONT)
    assert wait_until(lambda: not any(map(is_alive, children)), within_s=GONE_WITHIN_S), "orphans"
    real.go_on(folder, **LONG)


@pytest.mark.campaign
def test_all_processes_killed_together(real, tmp_path):
    folder = real.make(tmp_path / "study", **LONG)
    coordinator = lora_tune_run(folder)
    assert wait_until(lambda: trains(folder), within_s=120)
    for pid in [*family(coordinator.pid), coordinator.pid]:
        kill(pid)
    coordinator.communicate()
    assert [t["state"] for t in trial_table(results_of(folder))].count("running") >= 1
    real.go_on(folder, **LONG)


@pytest.mark.campaign
def test_a_slurm_job_is_put_back_and_goes_on(real, tmp_path):
    folder, programs = real.make(tmp_path / "study", **LONG), tmp_path / "bin"
    programs.mkdir()
    log = tmp_path / "log"
    for name, text in (
        ("lora-tune", 'exec "$PYTHON" -m lora_tune.cli "$@" --allow-code --quiet'),
        ("squeue", "echo RUNNING"),
        ("scontrol", f'echo "scontrol $*" >> "{log}"'),
    ):
        (programs / name).write_text(f"#!/bin/bash\n{text}\n")
        (programs / name).chmod(0o755)
    environ = environment(PATH=f"{programs}:{os.environ['PATH']}", SLURM_JOB_ID="77")
    job = subprocess.Popen([SLURM, "study.toml"], cwd=folder, env=environ, start_new_session=True)
    assert wait_until(lambda: trains(folder), within_s=120)
    job.send_signal(signal.SIGTERM)
    assert job.wait(timeout=60) == 75
    assert log.read_text() == "scontrol requeue 77\n"
    again = subprocess.run([SLURM, "study.toml"], cwd=folder, env=environ, check=False, timeout=300)
    assert again.returncode == 0
    assert log.read_text() == "scontrol requeue 77\n"
    check_whole(results_of(folder), reference=real.reference(**LONG), tolerance=TOLERANCE)
    record("slurm", jobs=1, put_back=1, exit_code=75)
