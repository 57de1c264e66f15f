"""The benchmark of trial packs: its arithmetic, what it records, and that it runs on a bare machine.

Everything here trains a tiny model on a CPU; nothing here is a measurement.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from machine import default_device, describe_run, package_versions, read_result
from model_flops import linear_sizes, measure_ceiling, step_flops
from packs import Cell, Reading, Run, guarded, measure_in_turn, measure_trainer, parse, ratios
from packs import tables as packs_tables
from random_models import cast_model, random_model, random_rows, shape_config
from torch.utils.flop_counter import FlopCounterMode
from trainer_loop import (
    TrainerSettings,
    attach_adapter,
    count_parameters,
    detach_adapter,
    trainer_choices,
)
from vram_grid import TINY

from lora_tune.engine.base import BaseModel, linear_shapes

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

# Packages that a machine with a GPU may not have: the benchmarks must run without them.
WITHOUT = """
import sys
from importlib.machinery import BuiltinImporter, FrozenImporter, PathFinder

class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.partition(".")[0] in {"optuna", "datasets", "trl", "pydantic", "gguf"}:
            return None
        return PathFinder.find_spec(name, path, target)

sys.meta_path[:] = [BuiltinImporter, FrozenImporter, Without]
"""


def cell(**changes: object) -> Cell:
    fields = {
        "shape": "tiny",
        "config": TINY,
        "quantization": "none",
        "length": 8,
        "batch": 2,
        "rank": 4,
        "compute_dtype": "float32",
        "repeat": 1,
        "device": "cpu",
    }
    return Cell(**{**fields, **changes})  # type: ignore[arg-type]


def reading(loop: str, lanes: int, micro_batch: int, step_s: list[float]) -> Reading:
    tokens = lanes * 800
    middle = sorted(step_s)[len(step_s) // 2] if step_s else 0.0
    return {
        **cell().reading(loop, lanes=lanes, micro_batch=micro_batch, how=""),
        "error": None if step_s else "out of memory",
        "step_s": step_s,
        "tokens_per_step": tokens,
        "tokens_per_s": tokens / middle if step_s else None,
        "tokens_per_s_best": tokens / min(step_s) if step_s else None,
        "memory_bytes": 1,
        "memory_kind": "resident",
    }


def test_a_pack_is_compared_with_the_best_of_each_rival_and_with_its_own_micro_batch() -> None:
    found = ratios(
        [
            reading("engine", 1, 1, [8.0, 9.0, 10.0]),
            reading("engine", 1, 4, [4.0, 4.0, 4.0]),
            reading("engine", 4, 1, [12.0, 12.0, 12.0]),
            reading("engine", 8, 1, []),
            reading("trainer", 1, 4, [6.0, 6.0, 6.0]),
            reading("trainer", 1, 1, [20.0, 20.0, 20.0]),
        ]
    )
    assert [(row["lanes"], row["micro_batch"]) for row in found] == [(1, 1), (1, 4), (4, 1)]
    pack = found[-1]  # four lanes in 12 s: 3 s a lane
    assert pack["over_one_lane_micro_batch_1"] == pytest.approx(9 / 3)
    assert pack["over_one_lane_micro_batch_1_best"] == pytest.approx(8 / 3)
    assert pack["over_one_lane_best"] == pytest.approx(4 / 3)
    assert pack["over_lanes_in_turn"] == pytest.approx(9 / 3)
    assert pack["over_trainer_best"] == pytest.approx(6 / 3)


def test_a_ratio_whose_rival_did_not_run_is_missing() -> None:
    [row] = ratios([reading("engine", 4, 2, [1.0]), reading("trainer", 1, 1, [])])
    assert row["over_trainer_best"] is None
    assert row["over_one_lane_micro_batch_1"] is None


def test_running_out_of_memory_is_a_reading_and_any_other_error_is_not() -> None:
    found = guarded(lambda: [float(torch.empty(2**58)[0])], cell(), lanes=2)
    assert found["error"] == "out of memory"
    assert found["tokens_per_s"] is None
    with pytest.raises(ZeroDivisionError):
        guarded(lambda: [1 / 0], cell(), lanes=2)


def test_more_lanes_than_ran_out_of_memory_are_not_tried(tmp_path: Path) -> None:
    run = Run(parse(["--small", "--device", "cpu", "--output", str(tmp_path / "packs.json")]))
    run.readings.append(reading("engine", 4, 1, []))
    assert run._too_large(cell(), 8, 1) == "not tried: 4 lanes: out of memory"
    assert run._too_large(cell(), 8, 2) == ""
    run.readings.append(reading("engine", 2, 2, [40.0]))
    assert run._too_large(cell(), 4, 2) == "not tried: a step would take about 80 s"


def test_counted_operations_are_those_that_torch_counts() -> None:
    model = random_model(TINY, quantization="none", device="cpu")
    cast_model(model, torch.float32)
    adapted = attach_adapter(model, cell().trial(linear_shapes(model), 0), None)
    rows, length = 3, 20
    ids = torch.randint(3, 256, (rows, length))
    with FlopCounterMode(display=False) as counter:
        adapted(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    tokens, layers, width = rows * length, 2, 64
    attention = tokens * 6 * layers * width * length  # no matrix products to the counter
    # q, k and v of the first layer pass no gradient on, neither the frozen weights nor A
    first = sum(linear_sizes(TINY)[name][0] for name in ("q_proj", "k_proj", "v_proj"))
    first_layer = tokens * 2 * width * (first + 3 * 4)
    ours = step_flops(TINY, rank=4, length=length, tokens=tokens, labels=tokens)
    assert counter.get_total_flops() == ours - attention - first_layer


def test_the_ceiling_is_measured_at_every_size_of_a_layer() -> None:
    found = measure_ceiling(TINY, dtype=torch.float32, device="cpu", tokens=16)
    assert set(found) == {*linear_sizes(TINY), "layer", "square"}
    assert min(found.values()) > 0


def test_lanes_in_turn_alternate_with_packed_steps() -> None:
    model = random_model(TINY, quantization="nf4", device="cpu")
    base = BaseModel(model, compute_dtype=torch.float32)
    found = measure_in_turn(base, cell(repeat=2), lanes=3, micro_batch=1)
    assert len(found["step_s"]) == len(found["in_turn_s"]) == 2  # type: ignore[arg-type]
    gain = min(found["in_turn_s"]) / min(found["step_s"])  # type: ignore[call-overload]
    assert found["gain_of_bests"] == gain


def test_the_trainer_leaves_no_adapter_behind() -> None:
    model = random_model(TINY, quantization="nf4", device="cpu")
    size, names = count_parameters(model), [name for name, _ in model.named_parameters()]
    for settings in trainer_choices(["bfloat16"], [1, 2], effective_batch_size=2):
        found = measure_trainer(model, cell(quantization="nf4"), settings)
        assert found["error"] is None
        assert len(found["step_s"]) == 1  # type: ignore[arg-type]
    assert count_parameters(model) == size
    assert [name for name, _ in model.named_parameters()] == names


def test_an_adapter_that_stays_is_an_error() -> None:
    model = random_model(TINY, quantization="none", device="cpu")
    size = count_parameters(model)
    attach_adapter(model, cell().trial(linear_shapes(model), 0), None)
    model.unload = lambda: model  # type: ignore[assignment]
    with pytest.raises(RuntimeError, match=r"parameters after a trial"):
        detach_adapter(model, num_parameters=size)


def test_every_way_of_the_trainer_is_tried() -> None:
    labels = [
        settings.label
        for settings in trainer_choices(["float32", "bfloat16"], [1, 4], effective_batch_size=4)
    ]
    assert labels == [
        "float32, micro-batch 1",
        "float32, micro-batch 4",
        "bfloat16, micro-batch 1",
        "bfloat16, micro-batch 4",
        "bfloat16 autocast, micro-batch 1",
        "bfloat16 autocast, micro-batch 4",
    ]
    few = TrainerSettings(
        compute_dtype="float32", autocast=False, micro_batch_size=2, effective_batch_size=4
    )
    assert few.eval_batch_size == 8


def test_random_rows_have_the_sizes_asked_for() -> None:
    rows = random_rows(400, length=45, vocab_size=131, length_sd=7.0, labels=13)
    lengths = torch.tensor([float(len(row.input_ids)) for row in rows])
    assert abs(float(lengths.mean()) - 45) < 1.5  # four standard errors of 400 rows
    assert abs(float(lengths.std()) - 7) < 1.5
    assert {row.num_labels for row in rows} == {13}
    assert random_rows(3, length=9, vocab_size=131) == random_rows(3, length=9, vocab_size=131)


def test_an_unknown_shape_is_one_message() -> None:
    with pytest.raises(SystemExit, match=r'no shape "llama-9" in the catalogue'):
        shape_config("llama-9")


def test_the_head_of_a_result_names_the_machine_and_the_packages() -> None:
    head = describe_run(default_device())
    assert head["hardware"]["cores"] == os.cpu_count()  # type: ignore[index]
    assert head["versions"] == package_versions()
    assert head["versions"]["torch"] == torch.__version__  # type: ignore[index]


def test_without_time_nothing_is_begun_and_the_file_says_so(tmp_path: Path) -> None:
    output = tmp_path / "packs.json"
    arguments = ["--small", "--device", "cpu", "--minutes", "0", "--output", str(output)]
    Run(parse(arguments)).measure()
    result = read_result(output)
    assert result["readings"] == []
    assert result["notes"] == ["cut after 0.0 minutes: cells are missing"]
    assert "cells are missing" in packs_tables(result)


def test_the_command_runs_without_the_packages_of_a_search(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(WITHOUT, encoding="utf-8")
    config, output = tmp_path / "tiny.json", tmp_path / "packs.json"
    config.write_text(json.dumps(TINY), encoding="utf-8")
    arguments = ["--small", "--device", "cpu", "--shape", config, "--output", output]
    arguments += ["--lengths", "8", "--batches", "2", "--repeat", "1", "--lanes", "1", "2"]
    arguments += ["--micro-batches", "1", "--in-turn", "2"]
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "packs.py", *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{BENCHMARKS.parent}"},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(output.read_text(encoding="utf-8"))
    assert result["hardware"]["device"] == "cpu"
    assert result["versions"]["torch"] == torch.__version__
    readings = result["readings"]
    assert [r["lanes"] for r in readings if r["loop"] == "engine"] == [1, 1, 2]
    assert sum(r["loop"] == "trainer" for r in readings) == 6  # 3 types, 2 micro-batches
    assert all(r["error"] is None for r in readings)
    assert all(row["over_trainer_best"] is not None for row in result["ratios"])
    assert "| over lanes in turn |" in done.stdout
    assert "compute type" in result["notes"][0]
