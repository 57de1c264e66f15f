"""How many workers a study has, and what its coordinator keeps."""

import pickle
import time
from dataclasses import replace
from pathlib import Path

import pytest

from lora_tune.errors import StudyFileError
from lora_tune.records import LanePlan, ProbeReading
from lora_tune.search.forecast import measured_speed
from lora_tune.study.loader import validate_study
from lora_tune.study.spec import StudySpec
from lora_tune.worker import StudyClock, num_workers


def spec_with(workers: object) -> StudySpec:
    values = {
        "model": {"base": "m"},
        "data": {"train": "rows.jsonl"},
        "run": {"workers": workers},
    }
    return validate_study(values, source=Path("study.toml"))


def plan_of(*, device: str, workers: int) -> LanePlan:
    reading = ProbeReading(
        lanes=2,
        micro_batch_size=4,
        compute_dtype="bfloat16",
        tokens_per_s=1000.0,
        peak_bytes=None,
    )
    return LanePlan(
        compute_dtype="bfloat16",
        device=device,
        lanes=2,
        micro_batch_size=4,
        gradient_checkpointing=False,
        budget_bytes=0,
        probe_readings=(reading, replace(reading, lanes=1, tokens_per_s=600.0)),
        workers=workers,
    )


def test_auto_is_a_worker_for_every_gpu_and_one_on_a_cpu() -> None:
    assert num_workers(spec_with("auto"), 8) == 8
    assert num_workers(spec_with("auto"), 0) == 1
    assert num_workers(spec_with(3), 0) == 3  # they share the cores
    assert num_workers(spec_with(3), 4) == 3


def test_more_workers_than_gpus_are_refused() -> None:
    with pytest.raises(StudyFileError, match=r"run\.workers is 3, but this machine shows 1 GPU:"):
        num_workers(spec_with(3), 1)


def test_forecast_counts_every_gpu_and_the_cores_of_a_cpu_once() -> None:
    """Four GPUs train eight lanes four times as fast; a run alone has one of them."""
    gpus, cpu = (
        measured_speed(
            plan_of(device=device, workers=4),
            row_tokens=50,
            confirmed_in_float32=False,
            load_s=0.0,
        )
        for device in ("cuda", "cpu")
    )
    assert gpus is not None
    assert cpu is not None
    assert (gpus.lanes, gpus.tokens_per_s(8), gpus.tokens_per_s(1)) == (8, 4000.0, 600.0)
    assert (cpu.lanes, cpu.tokens_per_s(8), cpu.tokens_per_s(1)) == (2, 1000.0, 600.0)


def test_clock_reads_the_same_in_a_child() -> None:
    clock = StudyClock(100.0, time.monotonic() - 5.0)
    assert clock() == pytest.approx(pickle.loads(pickle.dumps(clock))(), abs=1.0)
    assert 105.0 <= clock() < 110.0
