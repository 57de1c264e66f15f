"""``docs/slurm.sh`` with stand-ins for ``lora-tune``, ``squeue`` and ``scontrol`` on PATH, and real signals.

With a real study it is run in ``test_signals.py``.
"""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "docs" / "slurm.sh"

# Ends with CODE: at once, or, with WAIT, when it is sent SIGTERM; says how often it was.
STUDY = """#!/bin/bash
echo "run with $*" >> "$LOG"
trap 'echo terminated >> "$LOG"; [ -z "$SLOW" ] || sleep 0.3; exit "$CODE"' TERM
[ -n "$WAIT" ] || exit "$CODE"
while :; do sleep 0.02; done
"""
SQUEUE = '#!/bin/bash\necho "$STATE"\n'
SCONTROL = '#!/bin/bash\necho "scontrol $*" >> "$LOG"\n'


@pytest.fixture
def cluster(tmp_path: Path) -> dict[str, str]:
    """The environment of a job, with stand-ins for the programs that the script runs."""
    for name, text in (("lora-tune", STUDY), ("squeue", SQUEUE), ("scontrol", SCONTROL)):
        program = tmp_path / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(text)
        program.chmod(0o755)
    return {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "LOG": str(tmp_path / "log"),
        "SLURM_JOB_ID": "1234",
        "STATE": "RUNNING",
        "CODE": "0",
        "WAIT": "",
        "SLOW": "",
    }


def log_of(cluster: dict[str, str]) -> list[str]:
    path = Path(cluster["LOG"])
    return path.read_text().splitlines() if path.exists() else []


def run(cluster: dict[str, str], *, terms: int = 0, **changed: str) -> tuple[int, list[str], str]:
    """Run the script, send it SIGTERM so many times; return exit code, what was done, what was said."""
    script = subprocess.Popen(
        [SCRIPT, "study.toml"],
        env={**cluster, **changed},
        stdout=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 20
    while terms and not log_of(cluster) and time.monotonic() < deadline:
        time.sleep(0.01)
    for _ in range(terms):
        time.sleep(0.05)
        script.send_signal(signal.SIGTERM)
    said, _ = script.communicate(timeout=20)
    return script.returncode, log_of(cluster), said


def test_a_study_that_the_limit_stopped_is_put_back_into_the_queue(cluster):
    code, log, _ = run(cluster, terms=1, CODE="75", WAIT="yes")
    assert code == 75
    assert log == ["run with run study.toml", "terminated", "scontrol requeue 1234"]


def test_the_script_waits_for_the_study_though_more_signals_come(cluster):
    code, log, _ = run(cluster, terms=3, CODE="75", WAIT="yes", SLOW="yes")
    assert code == 75
    assert log.count("scontrol requeue 1234") == 1
    assert log[-1] == "scontrol requeue 1234"


@pytest.mark.parametrize("code", [0, 1, 3, 4, 5, 6, 7, 8, 130])
def test_what_ended_of_itself_stays_ended(cluster, code):
    found, log, said = run(cluster, CODE=str(code))
    assert found == code
    assert log == ["run with run study.toml"]
    assert f"exit code {code}" in said


def test_a_second_signal_ended_the_study_at_once_and_it_goes_on_later(cluster):
    code, log, _ = run(cluster, CODE="143")
    assert code == 143
    assert log[-1] == "scontrol requeue 1234"


@pytest.mark.parametrize("state", ["COMPLETING", "CANCELLED", ""])
def test_a_cancelled_job_is_not_put_back(cluster, state):
    code, log, said = run(cluster, terms=1, CODE="75", WAIT="yes", STATE=state)
    assert code == 75
    assert not [line for line in log if line.startswith("scontrol")]
    assert "not put back" in said


def test_a_job_does_not_go_round_for_ever(cluster):
    _, log, said = run(cluster, CODE="75", SLURM_RESTART_COUNT="100")
    assert not [line for line in log if line.startswith("scontrol")]
    assert "restarted 100 times" in said
    _, log, _ = run(cluster, CODE="75", SLURM_RESTART_COUNT="100", MOST_RESTARTS="101")
    assert log[-1] == "scontrol requeue 1234"


def test_without_a_study_it_says_how_it_is_used(cluster):
    done = subprocess.run([SCRIPT], env=cluster, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "usage: sbatch" in done.stderr
    assert not log_of(cluster)


def test_the_script_asks_slurm_for_the_signal_and_the_queue():
    lines = SCRIPT.read_text().splitlines()
    assert "#SBATCH --signal=B:TERM@120" in lines
    assert "#SBATCH --requeue" in lines
    assert "#SBATCH --open-mode=append" in lines  # else the log of the run before is lost
