"""How long an estimate takes: one closed form, the cold command, and the trace, on one core.

    python benchmarks/estimate_speed.py [--output FILE]

The closed form is the best and the median of many evaluations in one process; the command is a new
process each time; the trace is timed without its imports, and its peak of host memory is read.
"""

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

from lora_tune.hub import find_config
from lora_tune.memory.estimate import estimate_memory
from lora_tune.memory.request import LaneShape, MemoryRequest, resolve_request
from lora_tune.memory.reserved import reserved_bytes
from lora_tune.memory.shape import ModelShape, target_suffixes

RESULTS = Path(__file__).parent / "results" / "estimate-speed-cpu.json"
CASES = {
    "lora-tune, 1 lane": {"stack": "lora-tune"},
    "lora-tune, 8 lanes": {"stack": "lora-tune", "lanes": 8},
    "trainer": {"stack": "trainer"},
    "trainer-kbit, kept": {"stack": "trainer-kbit", "gradient_checkpointing": False},
    "trl": {"stack": "trl"},
}
MODELS = ("llama-3.1-8b", "llama-3.1-70b")
EVALUATIONS, STARTS = 200, 5


def request_of(shape: ModelShape, *, stack: str, lanes: int = 1, **changes: bool) -> MemoryRequest:
    """Return rank 16 on all linear layers, 2,048 tokens a row."""
    lane = LaneShape(rank=16, targets=target_suffixes(shape, "all-linear"), lora_dropout=0.05)
    settings: dict[str, object] = {"gradient_checkpointing": True, **changes}
    return resolve_request(
        stack=stack,
        quantization="nf4",
        compute_dtype="bfloat16",
        lanes=(lane,) * lanes,
        micro_batch_size=1,
        max_length=2048,
        gradient_accumulation=True,
        **settings,
    )


def seconds(call: object, times: int) -> list[float]:
    """Return the wall seconds of each of some calls, after one that does not count."""
    assert callable(call)
    call()
    found = []
    for _ in range(times):
        start = time.perf_counter()
        call()
        found.append(time.perf_counter() - start)
    return found


def closed_forms() -> dict[str, dict[str, float]]:
    """Return microseconds of the closed form, and milliseconds with the allocator's replay."""
    shape = ModelShape.from_config(find_config(MODELS[0], base_dir=Path()).config)
    rows = {}
    for name, settings in CASES.items():
        request = request_of(shape, **settings)
        taken = seconds(lambda request=request: estimate_memory(shape, request), EVALUATIONS)
        replays = seconds(lambda request=request: reserved_bytes(shape, request), 5)
        rows[name] = {
            "best_us": round(1e6 * min(taken)),
            "median_us": round(1e6 * statistics.median(taken)),
            "replay_ms": round(1e3 * min(replays)),
        }
    return rows


def commands() -> dict[str, list[float]]:
    """Return the wall seconds of whole commands, each in a process of its own."""
    asked = {
        "estimate llama-3.1-8b --json": ["llama-3.1-8b", "--json"],
        "estimate llama-3.1-8b --gpu rtx-4090": ["llama-3.1-8b", "--gpu", "rtx-4090"],
        "estimate llama-3.1-70b --gpu 24GiB": ["llama-3.1-70b", "--gpu", "24GiB"],
    }
    rows = {}
    for name, options in asked.items():
        command = [sys.executable, "-m", "lora_tune.cli", "estimate", *options]

        def run(command: list[str] = command) -> None:
            subprocess.run(command, check=True, capture_output=True)

        rows[name] = [round(value, 3) for value in sorted(seconds(run, STARTS))]
    return rows


def traces() -> dict[str, dict[str, float]]:
    """Return the seconds of a trace beside its imports, which are told apart."""
    start = time.perf_counter()
    import torch

    from lora_tune.trace.estimate import trace_memory

    torch.set_num_threads(1)
    rows = {"imports": {"seconds": round(time.perf_counter() - start, 2)}}
    for model in MODELS:
        config = find_config(model, base_dir=Path()).config
        shape = ModelShape.from_config(config)
        for stack in ("trainer", "lora-tune"):
            request = request_of(shape, stack=stack)
            start = time.perf_counter()
            estimate = trace_memory(config, request)
            taken = time.perf_counter() - start
            closed = estimate_memory(shape, request).peak_allocated_bytes
            rows[f"{model}, {stack}"] = {
                "seconds": round(taken, 2),
                "closed_form_over_trace": round(closed / estimate.peak_allocated_bytes, 6),
            }
    peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    rows["host memory"] = {"peak_mib": round(peak_kib / 1024)}
    return rows


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, default=RESULTS)
    output: Path = parser.parse_args().output
    result = {
        "closed_form": closed_forms(),
        "command_wall_s": commands(),
        "trace": traces(),
        "machine": {"platform": platform.platform(), "python": platform.python_version()},
        "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
    }
    text = json.dumps(result, indent=2)
    print(text)
    output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
