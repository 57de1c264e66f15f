"""What it gains on a CPU to compute the lanes of a pack in parts beside each other, a thread each.

    python benchmarks/lane_threads.py [--output FILE]      some minutes
    python benchmarks/lane_threads.py --table FILE.json    its table in Markdown

Packs of equal lanes on Llama shapes with random weights in NF4, one row a lane. The same lanes take steps as
one part, each operation on all cores, and in as many parts as there are cores, in turn and as often; a
reading is the median over the steps. ``parts chosen`` is how many the engine itself would make.
"""

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path

import torch
from machine import (
    describe_run,
    machine_line,
    markdown_table,
    read_result,
    seconds_of,
    write_result,
)
from packs import Cell, Reading, new_pack
from random_models import random_model, shape_config

from lora_tune.engine.base import DTYPES, BaseModel, quiet_transformers
from lora_tune.engine.host_allocator import keep_freed_memory
from lora_tune.engine.lane_threads import cut, num_parts

RESULTS = Path(__file__).parent / "results" / "lane-threads-cpu.json"
LANES, LENGTHS = (2, 4), (4, 16, 64, 256)
WIDTHS = (64, 256, 576)  # of SmolLM2-135M's shape, which has the last; the MLP is as much narrower
LAYERS = 10
DTYPE_NAMES = ("float32", "bfloat16")


def narrow(width: int) -> dict[str, object]:
    """Return the config of SmolLM2-135M with fewer layers, and so much narrower."""
    config = dict(shape_config("smollm2-135m"))
    config |= {
        "hidden_size": width,
        "intermediate_size": width * int(str(config["intermediate_size"])) // 576,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": max(1, width // 64),
        "num_key_value_heads": 3 if width == 576 else 1,
        "head_dim": 64,
        "vocab_size": 8192,
    }
    return config


def measure(base: BaseModel, cell: Cell, *, lanes: int, rounds: int) -> Reading:
    """Return seconds of steps in one part and in several, which alternate."""
    pack, members = new_pack(base, cell, lanes=lanes, micro_batch=1)
    sizes = [cell.length * base.mean_linear_size] * lanes
    cores = torch.get_num_threads()
    ways = {"whole_s": cut(sizes, 1), "parts_s": cut(sizes, min(lanes, cores))}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, parts in ways.items():
            pack._cut = lambda _, parts=parts: parts  # type: ignore[method-assign,misc]
            # the first step after a change of ways finds other blocks free than it needs
            taken = [seconds_of(lambda: pack.train_step(members), "cpu") for _ in range(3)][1:]
            if number:
                seconds[name] += taken
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    bests = {name: min(values) for name, values in seconds.items()}
    return {
        "shape": cell.shape,
        "compute_dtype": cell.compute_dtype,
        "lanes": lanes,
        "length": cell.length,
        "parts": num_parts(sizes, cores=cores),
        **medians,
        "gain_of_medians": medians["whole_s"] / medians["parts_s"],
        "gain_of_bests": bests["whole_s"] / bests["parts_s"],
    }


def measure_all(rounds: int, widths: Sequence[int]) -> list[Reading]:
    """Return the readings of all shapes, types, lanes and lengths."""
    found = []
    for width in widths:
        config = narrow(width)
        model = random_model(config, quantization="nf4", device="cpu")
        base = BaseModel(model, compute_dtype=torch.bfloat16)
        for dtype in DTYPE_NAMES:
            base.set_compute_dtype(DTYPES[dtype])
            for lanes in LANES:
                for length in LENGTHS:
                    cell = Cell(
                        shape=f"width {width}, {LAYERS} layers",
                        config=config,
                        quantization="nf4",
                        length=length,
                        batch=1,
                        rank=16,
                        compute_dtype=dtype,
                        repeat=rounds,
                        device="cpu",
                    )
                    found.append(measure(base, cell, lanes=lanes, rounds=rounds))
                    print(row_cells(found[-1]), flush=True)
    return found


def row_cells(reading: Reading) -> list[str]:
    """Return a reading's row of the table."""
    return [
        str(reading["shape"]),
        str(reading["compute_dtype"]),
        str(reading["lanes"]),
        str(reading["length"]),
        str(reading["parts"]),
        *(f"{1e3 * float(str(reading[name])):.0f}" for name in ("whole_s", "parts_s")),
        *(f"{float(str(reading[name])):.2f}x" for name in ("gain_of_medians", "gain_of_bests")),
    ]


def table(readings: Sequence[Reading]) -> str:
    """Return the readings in Markdown."""
    header = [
        "shape",
        "type",
        "lanes",
        "tokens a lane",
        "parts chosen",
        "one part, ms",
        "parts, ms",
    ]
    return markdown_table([*header, "gain", "gain of bests"], [row_cells(row) for row in readings])


def main() -> None:
    """Measure, print and write; or print the table of a result file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--rounds", type=int, default=4, help="of two steps each way; default 4")
    parser.add_argument("--widths", type=int, nargs="+", choices=WIDTHS, default=WIDTHS)
    parser.add_argument("--table", type=Path, metavar="FILE.json")
    options = parser.parse_args()
    if options.table is not None:
        result = read_result(options.table)
        print(machine_line(result), table(result["readings"]), sep="\n\n")  # type: ignore[arg-type]
        return
    quiet_transformers()
    keep_freed_memory()
    result = {**describe_run("cpu"), "readings": measure_all(options.rounds, options.widths)}
    write_result(options.output, result)
    print(table(result["readings"]))  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
