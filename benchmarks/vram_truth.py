"""Measured against predicted GPU memory: real optimizer steps of random-weight models on a grid.

    python benchmarks/vram_truth.py [--minutes 8] [--points 72] [--output FILE]
    python benchmarks/vram_truth.py --dry             # the grid with its predictions, no GPU
    python benchmarks/vram_truth.py --compare FILE    # predict again what was measured, no GPU
    python benchmarks/vram_truth.py --device cpu --points 4    # the same code on tiny models

Each point of ``vram_grid.py`` trains one optimizer step to warm up and two that are measured: peak
allocated and reserved of torch's allocator, the process as the driver sees it, and tokens per second.
They are compared with the closed form and, where it is there, the trace. After every point the
memory must be back where it was. Results are written after every point: ``vram-<gpu>.json`` with hardware and
versions, and ``throughput-<gpu>.toml`` with rows for ``lora_tune/catalog/throughput.toml``.

Without a CUDA GPU the script says so and stops. On a CPU nothing is measured but that the steps run: resident
memory there is not GPU memory.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "")  # the allocator's defaults, as estimated

import torch
from vram_grid import NUM_POINTS, GridPoint, grid, shrunk
from vram_machine import Machine, Probe, clear_away
from vram_stacks import StackMissingError, run_point

from lora_tune.engine.base import quiet_transformers
from lora_tune.memory.estimate import estimate_memory
from lora_tune.memory.shape import ModelShape
from lora_tune.memory.verdict import Device, process_memory
from lora_tune.records import MemoryEstimate
from lora_tune.units import GIB, MIB

try:
    from lora_tune.trace.estimate import trace_memory
except ImportError:
    trace_memory = None

Row = dict[str, object]
TIERS = {
    "base weights": ("base_weights", "base_weights"),
    "adapters": ("adapters", "adapters"),
    "closed form, allocated": ("closed_form_allocated", "allocated"),
    "trace, allocated": ("trace_allocated", "allocated"),
    "closed form, reserved": ("closed_form_reserved", "reserved"),
    "trace, reserved": ("trace_reserved", "reserved"),
    "closed form, process": ("closed_form_process", "process"),
    "trace, process": ("trace_process", "process"),
}
_PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "trl")
_LEFT_BEHIND = 1 * MIB  # more than this after a point is a leak, and its row says so


def main() -> None:
    """Run the points that there is time for, and print how far off the predictions are."""
    options = _options()
    if options.dry:
        _print_grid(options)
        return
    if options.compare is not None:
        _compare(options)
        return
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit(
            "vram_truth: no CUDA GPU here, so there is no truth to measure. --dry lists the grid with its "
            "predictions; --device cpu runs the same code on tiny models."
        )
    quiet_transformers()
    machine = Machine.open(options.device)
    machine.trace = not options.no_trace
    output = options.output or Path(f"benchmarks/results/vram-{machine.slug}.json")
    deadline = time.monotonic() + 60 * options.minutes
    rows: list[Row] = []
    for point in _points(options, machine.compute_capability):
        if time.monotonic() > deadline:
            print(f"stopped after {options.minutes:g} minutes, {len(rows)} points")
            break
        rows.append(measure(point, machine))
        print(_line(rows[-1]), flush=True)
        _write(output, machine, rows)
    _print_errors(rows)
    if options.device == "cpu":
        print("CPU: the steps ran; resident memory is not GPU memory, so nothing is compared.")
    print(f"wrote {output}")
    if failed := [row["number"] for row in rows if "failed" in row]:
        sys.exit(f"vram_truth: points {failed} failed")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--points", type=int, default=NUM_POINTS)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--dry", action="store_true", help="list the grid with its predictions")
    parser.add_argument("--compare", type=Path, metavar="FILE", help="predict a file's rows again")
    parser.add_argument("--no-trace", action="store_true", help="leave the trace out")
    parser.add_argument("--output", type=Path)
    return parser.parse_args()


def _points(options: argparse.Namespace, capability: str | None) -> Iterator[GridPoint]:
    for point in grid(capability):
        if point.number >= options.points:
            return
        yield shrunk(point) if options.device == "cpu" else point


def measure(point: GridPoint, machine: Machine) -> Row:
    """Train, read, clear away and predict one point."""
    row = describe(point)
    probe = Probe(machine)
    try:
        run_point(point, machine.device, probe)
    except StackMissingError as missing:
        row["skipped"] = str(missing)
    except torch.OutOfMemoryError as error:
        row["out_of_memory"] = str(error).splitlines()[0]
    except Exception as error:
        # The other points are still worth their time; the exit code says it at the end.
        row["failed"] = f"{type(error).__name__}: {error}"
        traceback.print_exc()
    row["left_bytes"] = clear_away(machine)
    row["measured"] = probe.readings
    row["step_s"] = probe.step_s
    if probe.step_s:
        tokens = point.request.micro_batch_size * point.request.max_length
        tokens *= len(point.request.lanes) * point.accumulation_steps
        row["tokens_per_s"] = tokens / probe.step_s
    return _with_prediction(row, point, machine)


def _with_prediction(row: Row, point: GridPoint, machine: Machine) -> Row:
    try:
        row["predicted"] = predict(point, machine)
    except Exception as error:
        # What was measured must not be lost to a fault of the prediction: --compare makes it up.
        row["predicted"] = {}
        row["failed"] = f"prediction: {type(error).__name__}: {error}"
        traceback.print_exc()
    row["errors"] = errors(row)
    return row


def _compare(options: argparse.Namespace) -> None:
    """Predict the rows of a results file with the code as it is now, and write them back."""
    result = json.loads(options.compare.read_text(encoding="utf-8"))
    machine = Machine(
        device=torch.device("cpu"),
        name=result["device"],
        compute_capability=result["compute_capability"],
        idle_bytes=result["idle_bytes"],
        free_bytes=result["free_bytes"],
        total_bytes=result["total_bytes"],
        trace=not options.no_trace,
    )
    points = {point.number: point for point in grid(machine.compute_capability)}
    for row in result["results"]:
        point = points[row["number"]]
        if json.loads(json.dumps(describe(point))) != {key: row[key] for key in describe(point)}:
            sys.exit(f"vram_truth: point {point.number} of {options.compare} is not of this grid")
        if str(row.get("failed", "")).startswith("prediction:"):
            del row["failed"]
        _with_prediction(row, point, machine)
        print(_line(row), flush=True)
    result["summary"] = summary(result["results"])
    result["predicted_with"] = _versions()
    options.compare.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    _print_errors(result["results"])


def describe(point: GridPoint) -> Row:
    """Return the point as plain values."""
    request = asdict(point.request)
    return {
        "number": point.number,
        "model": point.model,
        "request": request,
        "accumulation_steps": point.accumulation_steps,
    }


def predict(point: GridPoint, machine: Machine) -> dict[str, int]:
    """Return what closed form and trace say about allocated, reserved and process bytes."""
    shape = ModelShape.from_config(point.config)
    estimate = estimate_memory(shape, point.request)
    found = {name: estimate.terms[name] for name in ("base_weights", "adapters")}
    found |= _bytes("closed_form", estimate, machine)
    if machine.trace and trace_memory is not None:
        found |= _bytes("trace", trace_memory(point.config, point.request), machine)
    return found


def _bytes(tier: str, estimate: MemoryEstimate, machine: Machine) -> dict[str, int]:
    device = None
    if machine.compute_capability is not None:
        device = Device(
            name=machine.catalogue_name,
            usable_bytes=machine.free_bytes,
            compute_capability=machine.compute_capability,
        )
    process = process_memory(estimate, device)
    return {
        f"{tier}_allocated": estimate.peak_allocated_bytes,
        f"{tier}_reserved": estimate.peak_reserved_bytes,
        f"{tier}_process": process.process_bytes,
        f"{tier}_process_low": process.low_bytes,
        f"{tier}_process_high": process.high_bytes,
    }


def errors(row: Mapping[str, object]) -> dict[str, float]:
    """Return the signed relative error of every tier that was predicted and measured.

    Above 0 the prediction is too high.
    """
    predicted, measured = row["predicted"], row["measured"]
    assert isinstance(predicted, dict)
    assert isinstance(measured, dict)
    return {
        tier: predicted[said] / measured[seen] - 1
        for tier, (said, seen) in TIERS.items()
        if said in predicted and seen in measured
    }


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def _write(output: Path, machine: Machine, rows: list[Row]) -> None:
    result = {
        "device": machine.name,
        "compute_capability": machine.compute_capability,
        "total_bytes": machine.total_bytes,
        "free_bytes": machine.free_bytes,
        "idle_bytes": machine.idle_bytes,
        "cuda": torch.version.cuda,
        "versions": _versions(),
        "notes": machine.notes,
        "traced": trace_memory is not None and machine.trace,
        "summary": summary(rows),
        "results": rows,
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if machine.device.type == "cuda":
        text = "\n".join(_throughput_row(row, machine, output.name) for row in rows if _timed(row))
        output.with_name(f"throughput-{machine.slug}.toml").write_text(text, encoding="utf-8")


def summary(rows: list[Row]) -> dict[str, dict[str, float]]:
    """Return, per tier, how many rows, the mean signed and absolute error, and the worst both ways."""
    found = {}
    for tier in TIERS:
        values = [e[tier] for row in rows if isinstance(e := row["errors"], dict) and tier in e]
        if values:
            found[tier] = {
                "rows": len(values),
                "mean": statistics.fmean(values),
                "mean_absolute": statistics.fmean(abs(value) for value in values),
                "lowest": min(values),
                "highest": max(values),
            }
    return found


def _print_errors(rows: list[Row]) -> None:
    for tier, values in summary(rows).items():
        print(
            f"{tier:24} {values['rows']:3.0f} rows  mean {values['mean']:+.2%}  mean absolute "
            f"{values['mean_absolute']:.2%}  worst {values['lowest']:+.2%} {values['highest']:+.2%}"
        )
    for tier in ("closed_form", "trace"):
        inside = [held for row in rows if (held := _inside(row, tier)) is not None]
        if inside:
            print(f"{tier}: process inside the interval in {sum(inside)} of {len(inside)} rows")
    for row in rows:
        left = row["left_bytes"]
        assert isinstance(left, int)
        if left > _LEFT_BEHIND:
            print(f"point {row['number']} left {left / MIB:.1f} MiB behind")


def _inside(row: Row, tier: str) -> bool | None:
    """Say whether the measured process is in the predicted interval; None where one is missing."""
    predicted, measured = row["predicted"], row["measured"]
    assert isinstance(predicted, dict)
    assert isinstance(measured, dict)
    if "process" not in measured or f"{tier}_process_low" not in predicted:
        return None
    low, high = predicted[f"{tier}_process_low"], predicted[f"{tier}_process_high"]
    return bool(low <= measured["process"] <= high)


def _timed(row: Row) -> bool:
    return bool(row.get("tokens_per_s")) and row["accumulation_steps"] == 1


def _throughput_row(row: Row, machine: Machine, source: str) -> str:
    """Return the row as TOML for ``lora_tune.memory.throughput.read_points``."""
    point = next(p for p in grid(machine.compute_capability) if p.number == row["number"])
    request = point.request
    lanes = request.lanes
    values: dict[str, object] = {
        "gpu": machine.catalogue_name,
        "source": f"benchmarks/results/{source} point {point.number}",
        "tokens_per_s": row["tokens_per_s"],
        "stack": request.stack,
        "quantization": request.quantization,
        "compute_dtype": request.compute_dtype,
        "ranks": [lane.rank for lane in lanes],
        "targets": [list(lane.targets) for lane in lanes],
        "lora_dropout": lanes[0].lora_dropout,
        "micro_batch_size": request.micro_batch_size,
        "max_length": request.max_length,
        "gradient_checkpointing": request.gradient_checkpointing,
        "label_fraction": request.label_fraction,
        "attention": request.attention,
        "optimizer": request.optimizer,
        "padded": request.padded,
        "autocast": request.autocast,
    }
    config = ", ".join(f"{key} = {json.dumps(value)}" for key, value in point.config.items())
    lines = [f"{key} = {json.dumps(value)}" for key, value in values.items()]
    return "\n".join(["[[measured]]", *lines, f"config = {{ {config} }}", ""])


def _line(row: Row) -> str:
    request, measured = row["request"], row["measured"]
    assert isinstance(request, dict)
    assert isinstance(measured, dict)
    what = _what(row)
    if "skipped" in row:
        return f"{what}  skipped: {row['skipped']}"
    if "out_of_memory" in row or "failed" in row:
        return f"{what}  {row.get('failed', 'out of memory')}"
    if "allocated" not in measured:
        return f"{what}  ran"
    shown = "  ".join(
        f"{name} {measured[name] / GIB:.3f}" for name in ("allocated", "reserved", "process")
    )
    off = row["errors"]
    assert isinstance(off, dict)
    wrong = "  ".join(f"{value:+.2%}" for tier, value in off.items() if "allocated" in tier)
    return f"{what}  {shown} GiB  {wrong}  {row['tokens_per_s']:.0f} tokens/s"


def _what(row: Row) -> str:
    request = row["request"]
    assert isinstance(request, dict)
    lanes = request["lanes"]
    ranks = ",".join(str(lane["rank"]) for lane in lanes)
    kept = "checkpointed" if request["gradient_checkpointing"] else "kept"
    return (
        f"{row['number']:3} {row['model']:13} {request['stack']:12} {request['quantization']:10} "
        f"r {ranks:11} {len(lanes[0]['targets'])} targets  {request['micro_batch_size']} x "
        f"{request['max_length']:4}  {kept:12}"
    )


def _print_grid(options: argparse.Namespace) -> None:
    capability = "9.0"
    machine = Machine(
        device=torch.device("cpu"),
        name="H200",
        compute_capability=capability,
        idle_bytes=0,
        free_bytes=0,
        total_bytes=0,
        trace=not options.no_trace,
    )
    options.device = "cuda"
    for point in _points(options, capability):
        row = describe(point)
        said = "  ".join(
            f"{name.replace('_', ' ')} {size / GIB:.3f}"
            for name, size in predict(point, machine).items()
            if name.endswith(("_allocated", "_reserved", "_process"))
        )
        print(f"{_what(row)}  {said} GiB", flush=True)
    print(
        f"{min(options.points, NUM_POINTS)} points, predictions for compute capability {capability}"
    )


if __name__ == "__main__":
    main()
