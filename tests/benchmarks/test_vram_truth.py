"""The script that measures GPU memory: its grid, its arithmetic, and that it never invents a measurement.

Without a GPU it has to say so and stop. Its training code runs here on tiny models: that shows that every
stack's steps run and that the model which is trained has the bytes which the estimate counts, to the byte;
it shows nothing about GPU memory.
"""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from vram_grid import MODELS, NUM_POINTS, grid
from vram_machine import Machine
from vram_truth import _throughput_row, describe, errors, main, summary

from lora_tune.catalog.gpus import find_gpu
from lora_tune.memory.estimate import estimate_memory
from lora_tune.memory.shape import ModelShape
from lora_tune.memory.throughput import estimate_throughput, read_points

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "vram_truth.py"
POINTS = list(grid("9.0"))


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["vram_truth.py", *arguments])
    main()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to measure")
def test_without_a_gpu_it_says_so_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "vram.json"
    with pytest.raises(SystemExit, match="no CUDA GPU here, so there is no truth to measure"):
        call(monkeypatch, "--output", str(output))
    assert not output.exists()


def test_on_a_cpu_every_stack_trains_the_model_that_the_estimate_counts(tmp_path: Path) -> None:
    output = tmp_path / "vram.json"
    arguments = ["--device", "cpu", "--points", "4", "--no-trace", "--output", str(output)]
    done = subprocess.run(  # as a user runs it, outside pytest's settings
        [sys.executable, SCRIPT, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "resident memory is not GPU memory, so nothing is compared" in done.stdout
    result = json.loads(output.read_text(encoding="utf-8"))
    rows = result["results"]
    stacks = {row["request"]["stack"] for row in rows}
    assert stacks == {"lora-tune", "trainer", "trl", "trainer-kbit"}
    for row in rows:
        assert row["errors"] == {"base weights": 0.0, "adapters": 0.0}
        assert row["measured"].keys() == {"base_weights", "adapters"}  # no peak is made up
        assert row["step_s"] > 0
    assert result["versions"]["torch"] == torch.__version__
    assert not list(tmp_path.glob("throughput-*"))


def test_the_grid_is_large_and_a_part_of_it_is_balanced() -> None:
    assert NUM_POINTS == len(POINTS) >= 60
    for start in range(0, NUM_POINTS, 4):
        part = POINTS[start : start + 4]
        assert {point.model for point in part} == set(MODELS)
        assert len({point.request.stack for point in part}) == 4
    cells = Counter(
        (point.model, point.request.stack, point.request.gradient_checkpointing)
        for point in POINTS[:64]
    )
    assert set(cells.values()) == {2}
    assert len(cells) == 32


def test_the_grid_has_every_kind_of_run() -> None:
    requests = [point.request for point in POINTS]
    assert {r.quantization for r in requests} == {"nf4", "nf4-single", "none"}
    assert {r.optimizer for r in requests} == {"adamw", "adamw-8bit", "paged-adamw-8bit"}
    assert {r.attention for r in requests} == {"sdpa", "eager"}
    assert {len(r.lanes) for r in requests} >= {1, 2, 4}
    assert {lane.rank for r in requests for lane in r.lanes} == {4, 8, 16, 32, 64, 128}
    assert {lane.lora_dropout for r in requests for lane in r.lanes} == {0.0, 0.05}
    assert {len(r.lanes[0].targets) for r in requests} == {2, 3, 4, 7}
    assert {r.max_length for r in requests} >= {256, 512, 1024, 2048}
    for flag in ("padded", "autocast", "gradient_accumulation"):
        assert {getattr(r, flag) for r in requests} == {True, False}, flag


def test_the_grid_is_the_same_on_every_machine() -> None:
    def drawn(capability: str | None) -> list[object]:
        return [(p.model, p.request.lanes, p.request.max_length) for p in grid(capability)]

    assert drawn("9.0") == drawn("7.5")


def test_every_point_has_a_prediction_that_a_large_card_holds() -> None:
    for point in POINTS:
        peak = estimate_memory(ModelShape.from_config(point.config), point.request)
        assert peak.peak_allocated_bytes < 0.6 * find_gpu("H200").usable_bytes


def test_an_error_is_above_zero_where_the_prediction_is_too_high() -> None:
    row = {
        "predicted": {"closed_form_allocated": 110, "closed_form_process": 90},
        "measured": {"allocated": 100, "process": 100, "reserved": 100},
    }
    assert errors(row) == pytest.approx(
        {"closed form, allocated": 0.1, "closed form, process": -0.1}
    )
    assert errors({"predicted": {"closed_form_allocated": 1}, "measured": {}}) == {}


def test_the_summary_is_the_mean_and_the_worst_of_each_tier() -> None:
    rows = [{"errors": {"trace, allocated": value}} for value in (-0.02, 0.01, 0.04)]
    assert summary([*rows, {"errors": {}}]) == {
        "trace, allocated": {
            "rows": 3,
            "mean": pytest.approx(0.01),
            "mean_absolute": pytest.approx(0.07 / 3),
            "lowest": -0.02,
            "highest": 0.04,
        }
    }


def test_timed_rows_are_written_as_the_throughput_table_reads_them() -> None:
    machine = Machine(
        device=torch.device("cpu"),
        name="NVIDIA H200",
        compute_capability="9.0",
        idle_bytes=0,
        free_bytes=0,
        total_bytes=0,
    )
    timed = [point for point in POINTS if point.accumulation_steps == 1]
    assert len(timed) > NUM_POINTS / 2
    for point in timed:
        row = describe(point) | {"tokens_per_s": 1234.5}
        (read,) = read_points(_throughput_row(row, machine, "vram-h200.json"))
        assert read.request == point.request
        assert read.shape == ModelShape.from_config(point.config)
        assert (read.gpu, read.tokens_per_s) == ("H200", 1234.5)
        assert read.source == f"benchmarks/results/vram-h200.json point {point.number}"
    found = estimate_throughput(read.shape, read.request, find_gpu("H200"), measured=[read])
    assert found.tokens_per_s == pytest.approx(1234.5)


def test_a_results_file_is_predicted_again_without_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # One row as a GPU would leave it, with made-up readings: only the arithmetic is looked at.
    point = next(point for point in POINTS if point.model == "smollm2-135m")
    estimate = estimate_memory(ModelShape.from_config(point.config), point.request)
    measured = {
        "base_weights": estimate.terms["base_weights"],
        "adapters": estimate.terms["adapters"],
        "allocated": 2 * estimate.peak_allocated_bytes,
        "reserved": 2 * estimate.peak_reserved_bytes,
        "process": 1,
    }
    row = describe(point) | {"measured": measured, "left_bytes": 0, "tokens_per_s": 1.0}
    machine = {"device": "NVIDIA H200", "compute_capability": "9.0"}
    sizes = {"idle_bytes": 0, "free_bytes": 1, "total_bytes": 1}
    output = tmp_path / "vram-h200.json"
    output.write_text(json.dumps({**machine, **sizes, "results": [row]}), encoding="utf-8")
    call(monkeypatch, "--compare", str(output), "--no-trace")
    result = json.loads(output.read_text(encoding="utf-8"))
    assert result["results"][0]["measured"] == measured
    assert result["results"][0]["errors"]["closed form, allocated"] == pytest.approx(-0.5)
    assert result["summary"]["adapters"]["mean"] == 0
    assert "closed_form: process inside the interval in 0 of 1 rows" in capsys.readouterr().out

    row["request"]["max_length"] += 1
    output.write_text(json.dumps({**machine, **sizes, "results": [row]}), encoding="utf-8")
    with pytest.raises(SystemExit, match="is not of this grid"):
        call(monkeypatch, "--compare", str(output), "--no-trace")
