"""Tokens per second, step time and memory of trial packs, beside one lane alone and beside the Trainer.

    python benchmarks/packs.py                     on a GPU: 135M, 1B and 8B shapes, NF4 and bfloat16
    python benchmarks/packs.py --small             on a CPU: the 135M shape, a few minutes
    python benchmarks/packs.py --table FILE.json   the tables of a result file in Markdown

Weights are random in the shapes of real models, lanes have adapters on all linear layers and no dropout, all
rows of a cell have the same length. A step is an optimizer step of ``batch`` rows a lane; each reading
is one step to warm up and ``--repeat`` measured ones. What a pack is compared with, per effective batch:

    one lane, micro-batch 1     what packing replaces where memory allows no more
    one lane, best micro-batch  every divisor of the batch is tried, the fastest counts
    lanes in turn               the same lanes one after the other at the pack's own micro-batch
    Trainer                     PEFT and transformers' Trainer, 16 bit as it is and by autocast, every
                                micro-batch; the fastest counts

The compute type is bfloat16 on a GPU; on a CPU the fastest for one lane alone at the whole batch. A reading
that runs out of memory is recorded as such. The result file is written after every reading.
"""

import argparse
import gc
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as `lora-tune run` sets it; before torch

import torch
from machine import (
    default_device,
    describe_run,
    forget_peak,
    machine_line,
    markdown_table,
    memory_bytes,
    read_result,
    seconds_of,
    write_result,
)
from model_flops import measure_ceiling, step_flops
from random_models import cast_model, random_model, random_rows, shape_config
from torch import nn
from trainer_loop import (
    StepClock,
    TrainerSettings,
    attach_adapter,
    count_parameters,
    detach_adapter,
    new_trainer,
    trainer_choices,
)

from lora_tune.engine.base import DTYPES, BaseModel, linear_shapes, quiet_transformers
from lora_tune.engine.lane import Lane
from lora_tune.engine.lora import default_group_rank
from lora_tune.engine.memory_errors import is_out_of_memory
from lora_tune.engine.pack import PackSettings, TrialPack
from lora_tune.records import LaneJob, LinearShape, TokenizedRow, TrialConfig
from lora_tune.units import GIB

RESULTS = Path(__file__).parent / "results"
Config = Mapping[str, object]
Reading = dict[str, object]

CPU_DTYPES = ("float32", "bfloat16")  # float16 is slow there
_MANY_STEPS = 1_000_000  # the rate stays constant: no lane ends here


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """What all readings that are compared with each other have in common."""

    shape: str
    config: Config
    quantization: str
    length: int
    batch: int
    rank: int
    compute_dtype: str
    repeat: int
    device: str

    @property
    def rows(self) -> tuple[TokenizedRow, ...]:
        """Two steps' worth of random rows."""
        vocabulary = int(str(self.config["vocab_size"]))
        return random_rows(2 * self.batch, length=self.length, vocab_size=vocabulary)

    def trial(self, linears: Sequence[LinearShape], number: int) -> TrialConfig:
        """Return the configuration of lane ``number``: all alike but for the initial matrices."""
        return TrialConfig(
            rank=self.rank,
            lora_alpha=self.rank,
            lora_dropout=0.0,
            target_set="all-linear",
            target_modules=tuple(shape.name for shape in linears),
            learning_rate=1e-6,
            init_seed=number,
        )

    def reading(self, loop: str, *, lanes: int, micro_batch: int, how: str) -> Reading:
        """Return the head of a reading."""
        return {
            "shape": self.shape,
            "quantization": self.quantization,
            "length": self.length,
            "batch": self.batch,
            "rank": self.rank,
            "loop": loop,
            "how": how,
            "lanes": lanes,
            "micro_batch": micro_batch,
        }


def measure_lanes(base: BaseModel, cell: Cell, *, lanes: int, micro_batch: int) -> Reading:
    """Return the reading of a pack of ``lanes`` lanes."""

    def work() -> list[float]:
        pack, members = new_pack(base, cell, lanes=lanes, micro_batch=micro_batch)
        pack.train_step(members)
        return [seconds_of(lambda: pack.train_step(members), cell.device) for _ in repeats]

    repeats = range(cell.repeat)
    reading = cell.reading("engine", lanes=lanes, micro_batch=micro_batch, how=cell.compute_dtype)
    found = guarded(work, cell, lanes=lanes)
    base.layout.clear()
    return reading | found


def measure_in_turn(base: BaseModel, cell: Cell, *, lanes: int, micro_batch: int) -> Reading:
    """Return packed steps and the same lanes one after the other, alternating in one loop.

    What else the machine does hits both alike.
    """
    packed: list[float] = []
    in_turn: list[float] = []

    def work() -> list[float]:
        pack, members = new_pack(base, cell, lanes=lanes, micro_batch=micro_batch)
        for number in range(cell.repeat + 1):
            together = seconds_of(lambda: pack.train_step(members), cell.device)
            alone = sum(
                seconds_of(lambda lane=lane: pack.train_step([lane]), cell.device)  # type: ignore[misc]
                for lane in members
            )
            if number:  # the first one is to warm up
                packed.append(together)
                in_turn.append(alone)
        return packed

    reading = cell.reading("in turn", lanes=lanes, micro_batch=micro_batch, how=cell.compute_dtype)
    reading |= guarded(work, cell, lanes=lanes)
    base.layout.clear()
    if reading["error"] is not None:
        return reading
    return reading | {
        "in_turn_s": in_turn,
        "gain_of_medians": median(in_turn) / median(packed),
        "gain_of_bests": min(in_turn) / min(packed),
    }


def measure_trainer(model: nn.Module, cell: Cell, settings: TrainerSettings) -> Reading:
    """Return the reading of PEFT and the Trainer; the model is left as it was."""
    cast_model(model, DTYPES[settings.compute_dtype])
    size = count_parameters(model)
    clock = StepClock(cell.device)
    steps = cell.repeat + 1
    adapted: list[nn.Module] = []

    def work() -> list[float]:
        config = cell.trial(linear_shapes(model), 0)
        adapted.append(attach_adapter(model, config, None))
        rows = (cell.rows * steps)[: steps * cell.batch]
        with tempfile.TemporaryDirectory() as folder:
            trainer = new_trainer(
                adapted[0],
                rows,
                rows[:1],
                settings,
                steps=steps,
                learning_rate=config.learning_rate,
                folder=Path(folder),
                clock=clock,
            )
            trainer.train()
        return clock.step_s[1:]

    reading = cell.reading(
        "trainer", lanes=1, micro_batch=settings.micro_batch_size, how=settings.label
    )
    reading |= guarded(work, cell, lanes=1)
    if adapted:
        detach_adapter(adapted.pop(), num_parameters=size)
    return reading


def new_pack(
    base: BaseModel, cell: Cell, *, lanes: int, micro_batch: int
) -> tuple[TrialPack, list[Lane]]:
    """Return a pack and equal lanes at their start, which train for longer than anybody measures."""
    settings = PackSettings(
        effective_batch_size=cell.batch,
        micro_batch_size=micro_batch,
        max_grad_norm=1.0,
        weight_decay=0.0,
        group_rank=default_group_rank(cell.device),
    )
    pack = TrialPack(base, cell.rows, settings)
    jobs = [
        LaneJob(
            trial=number,
            rung=0,
            config=cell.trial(base.linears, number),
            start_step=0,
            hold_step=_MANY_STEPS,
            end_step=_MANY_STEPS,
            warmup_steps=0,
            eval_split="selection",
            eval_dtype="train",
            start_folder=None,
            result_folder=None,
        )
        for number in range(lanes)
    ]
    return pack, [pack.new_lane(job) for job in jobs]


def guarded(work: Callable[[], list[float]], cell: Cell, *, lanes: int) -> Reading:
    """Return step times, rates and memory of ``work``, or that memory ran out."""
    steps: list[float] = []
    error = None
    gc.collect()
    forget_peak(cell.device)
    try:
        steps = work()
    except Exception as failure:
        if not is_out_of_memory(failure):
            raise
        error = "out of memory"  # cleared away below: the traceback holds the tensors
    memory = memory_bytes(cell.device)
    gc.collect()
    forget_peak(cell.device)
    tokens = lanes * cell.batch * cell.length
    found: Reading = {
        "error": error,
        "step_s": steps,
        "tokens_per_step": tokens,
        "tokens_per_s": tokens / median(steps) if steps else None,
        "tokens_per_s_best": tokens / min(steps) if steps else None,
        "memory_bytes": memory,
        "memory_kind": "peak allocated" if cell.device == "cuda" else "resident",
    }
    return found


def ratios(readings: Iterable[Reading]) -> list[Reading]:
    """Return every pack's tokens/s over what it is compared with; None where that is missing.

    Ratios are of medians; those of the best steps end in ``_best``.
    """
    groups: dict[tuple[object, ...], list[Reading]] = {}
    for reading in readings:
        if reading["error"] is None:
            key = tuple(reading[name] for name in ("shape", "quantization", "length", "batch"))
            groups.setdefault(key, []).append(reading)
    return [row for group in groups.values() for row in _group_ratios(group)]


def _group_ratios(group: Sequence[Reading]) -> Iterator[Reading]:
    packs = [reading for reading in group if reading["loop"] == "engine"]
    alone = [reading for reading in packs if reading["lanes"] == 1]
    trainers = [reading for reading in group if reading["loop"] == "trainer"]
    for pack in packs:
        same = [one for one in alone if one["micro_batch"] == pack["micro_batch"]]
        rivals = {
            "one_lane_micro_batch_1": [one for one in alone if one["micro_batch"] == 1],
            "one_lane_best": alone,
            "lanes_in_turn": same,
            "trainer_best": trainers,
        }
        row: Reading = {
            name: pack[name]
            for name in (
                *("shape", "quantization", "length", "batch", "lanes", "micro_batch"),
                *("tokens_per_s", "memory_bytes"),
            )
        }
        row["step_s"] = median(_floats(pack["step_s"]))
        row["utilisation"] = pack.get("utilisation")
        for name, rival in rivals.items():
            for end in ("", "_best"):
                rates = [_rate(one, end) for one in rival]
                row[f"over_{name}{end}"] = _rate(pack, end) / max(rates) if rates else None
        yield row


def _rate(reading: Reading, end: str) -> float:
    rate = reading[f"tokens_per_s{end}"]
    assert isinstance(rate, float)
    return rate


def _floats(values: object) -> list[float]:
    assert isinstance(values, list)
    return [float(value) for value in values]


class Run:
    """One run of the benchmark: its options, its clock and its result file."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.device: str = options.device
        self.began = time.monotonic()
        self.readings: list[Reading] = []
        self.in_turn: list[Reading] = []
        self.ceilings: dict[str, dict[str, float]] = {}
        self.notes: list[str] = []
        shown = {key: _plain(value) for key, value in vars(options).items()}
        self.head = describe_run(self.device) | {"options": shown}

    @property
    def out_of_time(self) -> bool:
        """Whether no reading may be begun any more."""
        minutes: float | None = self.options.minutes
        return minutes is not None and time.monotonic() - self.began > 60 * minutes

    def measure(self) -> None:
        """Measure all cells; what is known is written after each reading."""
        for shape in self.options.shape:
            config = shape_config(shape)
            if self.device == "cuda":
                self.ceilings[shape] = measure_ceiling(
                    config, dtype=torch.bfloat16, device=self.device
                )
            for quantization in self.options.quantization:
                self._measure_engine(shape, config, quantization)
                self._measure_trainer(shape, config, quantization)
        if self.out_of_time:
            self.notes.append(f"cut after {self.options.minutes} minutes: cells are missing")
        self.write()

    def write(self) -> None:
        """Write what is known."""
        write_result(
            self.options.output,
            self.head
            | {
                "elapsed_s": time.monotonic() - self.began,
                "notes": self.notes,
                "matrix_product_flops_per_s": self.ceilings,
                "readings": self.readings,
                "in_turn": self.in_turn,
                "ratios": ratios(self.readings),
            },
        )

    def _cells(self, shape: str, config: Config, quantization: str, dtype: str) -> Iterator[Cell]:
        for length in self.options.lengths:
            for batch in self.options.batches:
                yield Cell(
                    shape=shape,
                    config=config,
                    quantization=quantization,
                    length=length,
                    batch=batch,
                    rank=self.options.rank,
                    compute_dtype=dtype,
                    repeat=self.options.repeat,
                    device=self.device,
                )

    def _measure_engine(self, shape: str, config: Config, quantization: str) -> None:
        if self.out_of_time:
            return
        model = random_model(config, quantization=quantization, device=self.device)
        base = BaseModel(model, compute_dtype=torch.bfloat16)
        dtype = self._compute_dtype(base, shape, config, quantization)
        base.set_compute_dtype(DTYPES[dtype])
        for cell in self._cells(shape, config, quantization, dtype):
            for lanes, micro_batch in self._plans(cell.batch):
                if self.out_of_time:
                    return
                why = self._too_large(cell, lanes, micro_batch)
                head = cell.reading("engine", lanes=lanes, micro_batch=micro_batch, how=dtype)
                self._add(
                    head | {"error": why, "step_s": []}
                    if why
                    else measure_lanes(base, cell, lanes=lanes, micro_batch=micro_batch),
                    cell,
                )
            for lanes in self.options.in_turn:
                if self.out_of_time:
                    return
                self.in_turn.append(measure_in_turn(base, cell, lanes=lanes, micro_batch=1))
                self.write()
                print(_in_turn_line(self.in_turn[-1]), flush=True)

    def _measure_trainer(self, shape: str, config: Config, quantization: str) -> None:
        if self.out_of_time or self.options.no_trainer:
            return
        model = random_model(config, quantization=quantization, device=self.device)
        dtypes = ["bfloat16"] if self.device == "cuda" else CPU_DTYPES
        for cell in self._cells(shape, config, quantization, "bfloat16"):
            for settings in trainer_choices(
                dtypes, divisors(cell.batch), effective_batch_size=cell.batch
            ):
                if self.out_of_time:
                    return
                self._add(measure_trainer(model, cell, settings), cell)

    def _compute_dtype(self, base: BaseModel, shape: str, config: Config, quantization: str) -> str:
        """Return the type asked for, or on a CPU the fastest for one lane at the whole batch."""
        if self.options.compute_dtype != "auto":
            return str(self.options.compute_dtype)
        if self.device == "cuda":
            return "bfloat16"
        rates: dict[str, float] = {}
        for name in CPU_DTYPES:
            base.set_compute_dtype(DTYPES[name])
            cell = next(self._cells(shape, config, quantization, name))
            found = measure_lanes(base, cell, lanes=1, micro_batch=cell.batch)
            rates[name] = 0.0 if found["error"] else _rate(found, "_best")
        best = max(rates, key=lambda name: rates[name])
        shown = ", ".join(f"{name} {rate:.0f}" for name, rate in rates.items())
        self.notes.append(
            f"{shape} {quantization}: compute type {best}; tokens/s of one lane: {shown}"
        )
        return best

    def _plans(self, batch: int) -> Iterator[tuple[int, int]]:
        """Yield (lanes, micro-batch): one lane at every divisor of the batch, packs at those asked for."""
        for size in divisors(batch):
            yield 1, size
        for size in self.options.micro_batches:
            if batch % size == 0:
                yield from ((lanes, size) for lanes in self.options.lanes if lanes > 1)

    def _too_large(self, cell: Cell, lanes: int, micro_batch: int) -> str:
        """Return why a pack is not tried, from the pack before it; an empty string if it is."""
        head = cell.reading("engine", lanes=lanes, micro_batch=micro_batch, how=cell.compute_dtype)
        before = [
            reading
            for reading in self.readings
            if all(reading[key] == head[key] for key in head if key not in ("lanes", "how"))
            and int(str(reading["lanes"])) < lanes
        ]
        if not before:
            return ""
        last = before[-1]
        if last["error"] is not None:
            return f"not tried: {last['lanes']} lanes: {last['error']}"
        factor = lanes / int(str(last["lanes"]))
        predicted = factor * median(_floats(last["step_s"]))
        if predicted > self.options.longest_step:
            return f"not tried: a step would take about {predicted:.0f} s"
        return ""

    def _add(self, reading: Reading, cell: Cell) -> None:
        ceiling = self.ceilings.get(cell.shape)
        if reading["error"] is None and ceiling is not None:
            tokens = int(str(reading["tokens_per_step"]))
            rows = cell.rows
            share = sum(row.num_labels for row in rows) / sum(len(row.input_ids) for row in rows)
            flops = step_flops(
                cell.config,
                rank=cell.rank,
                length=cell.length,
                tokens=tokens,
                labels=round(share * tokens),
            )
            rate = flops / median(_floats(reading["step_s"]))
            reading["flops_per_s"] = rate
            reading["utilisation"] = rate / ceiling["layer"]
        self.readings.append(reading)
        self.write()
        print(_reading_line(reading), flush=True)


def divisors(batch: int) -> list[int]:
    """Return the micro-batches that divide a batch, smallest first.

    >>> divisors(12)
    [1, 2, 3, 4, 6, 12]
    """
    return [size for size in range(1, batch + 1) if batch % size == 0]


def tables(result: Mapping[str, object]) -> str:
    """Return a result file as Markdown: what each pack gains, lanes in turn, what did not run."""
    parts = [machine_line(result)]
    rows = result["ratios"]
    assert isinstance(rows, list)
    with_flops = any(row["utilisation"] is not None for row in rows)
    header = [
        *("shape", "base", "length", "batch", "lanes", "micro-batch", "tokens/s", "step, s"),
        *("memory, GiB", "over one lane, micro-batch 1", "over one lane, best"),
        *("over lanes in turn", "over Trainer, best"),
    ]
    parts.append(
        markdown_table(
            header + ["of matrix products"] * with_flops,
            [_ratio_cells(row, with_flops=with_flops) for row in rows],
        )
    )
    readings = result["readings"]
    assert isinstance(readings, list)
    parts += _trainer_table(readings)
    in_turn = result["in_turn"]
    assert isinstance(in_turn, list)
    if done := [row for row in in_turn if row["error"] is None]:
        header = ["lanes", "micro-batch", "length", "packed step, s", "in turn, s"]
        parts.append(
            "Packed steps and the same lanes in turn, alternating in one loop:\n\n"
            + markdown_table(
                [*header, "gain of medians", "gain of bests"], [_in_turn_cells(row) for row in done]
            )
        )
    failed = [reading for reading in readings if reading["error"] is not None]
    parts += [f"- {_name(reading)}: {reading['error']}" for reading in failed]
    notes = result["notes"]
    assert isinstance(notes, list)
    parts += [f"- {note}" for note in notes]
    return "\n\n".join(parts)


def _trainer_table(readings: Sequence[Reading]) -> list[str]:
    best: dict[tuple[object, ...], Reading] = {}
    for one in readings:
        key = tuple(one[name] for name in ("shape", "quantization", "length", "batch"))
        if one["loop"] != "trainer" or one["error"] is not None:
            continue
        if key not in best or _rate(one, "") > _rate(best[key], ""):
            best[key] = one
    if not best:
        return []
    rows = [
        [
            *(str(one[name]) for name in ("shape", "quantization", "length", "batch", "how")),
            f"{_rate(one, ''):,.0f}",
            _gib(one["memory_bytes"]),
        ]
        for one in best.values()
    ]
    header = [*("shape", "base", "length", "batch", "fastest Trainer"), "tokens/s", "memory, GiB"]
    return [markdown_table(header, rows)]


def _ratio_cells(row: Reading, *, with_flops: bool) -> list[str]:
    names = ("one_lane_micro_batch_1", "one_lane_best", "lanes_in_turn", "trainer_best")
    cells = [
        *(str(row[key]) for key in ("shape", "quantization", "length", "batch")),
        *(str(row[key]) for key in ("lanes", "micro_batch")),
        f"{_rate(row, ''):,.0f}",
        f"{row['step_s']:.3g}",
        _gib(row["memory_bytes"]),
        *(_times(row[f"over_{name}"]) for name in names),
    ]
    share = row["utilisation"]
    return cells + ([f"{share:.0%}" if isinstance(share, float) else "-"] if with_flops else [])


def _in_turn_cells(row: Reading) -> list[str]:
    return [
        *(str(row[key]) for key in ("lanes", "micro_batch", "length")),
        *(f"{median(_floats(row[key])):.2f}" for key in ("step_s", "in_turn_s")),
        *(_times(row[key]) for key in ("gain_of_medians", "gain_of_bests")),
    ]


def _times(ratio: object) -> str:
    return f"{ratio:.2f}x" if isinstance(ratio, float) else "-"


def _gib(size: object) -> str:
    return f"{int(str(size)) / GIB:.2f}"


def _name(reading: Reading) -> str:
    keys = ("shape", "quantization", "length", "batch", "loop", "lanes", "micro_batch")
    shape, quantization, length, batch, loop, lanes, size = (reading[key] for key in keys)
    return f"{shape} {quantization}, {batch} rows of {length}: {loop}, {lanes} lanes, micro-batch {size}"


def _reading_line(reading: Reading) -> str:
    if reading["error"] is not None:
        return f"{_name(reading)}: {reading['error']}"
    return (
        f"{_name(reading)}, {reading['how']}: {_rate(reading, ''):,.0f} tokens/s "
        f"(best {_rate(reading, '_best'):,.0f}), {_gib(reading['memory_bytes'])} GiB"
    )


def _in_turn_line(reading: Reading) -> str:
    if reading["error"] is not None:
        return f"{_name(reading)}: {reading['error']}"
    medians, bests = reading["gain_of_medians"], reading["gain_of_bests"]
    return f"{_name(reading)}: packed over in turn {_times(medians)} of medians, {_times(bests)} of bests"


def _plain(value: object) -> object:
    return str(value) if isinstance(value, Path) else value


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options; what is not given depends on the device and on ``--small``."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        epilog="see docs/benchmarks.md",
    )
    add = parser.add_argument
    add("--small", action="store_true", help="the CPU form: 135M shape, NF4, length 64, 4 lanes")
    add(
        "--shape",
        nargs="+",
        help="catalogue names or config.json files; default smollm2-135m llama-3.2-1b llama-3.1-8b",
    )
    add("--quantization", nargs="+", choices=("nf4", "none"), help="default nf4 none")
    add("--lengths", type=int, nargs="+", help="tokens a row; default 512 2048")
    add("--batches", type=int, nargs="+", help="rows a lane and step; default 4 16")
    add("--lanes", type=int, nargs="+", help="of packs; default 1 2 4 8 16 32")
    add(
        "--micro-batches", type=int, nargs="+", help="of packs; default 1 4. One lane: all divisors"
    )
    add(
        "--in-turn", type=int, nargs="*", help="lanes to alternate with lanes in turn; default none"
    )
    add("--compute-dtype", choices=("auto", *DTYPES), default="auto")
    add("--rank", type=int, default=16)
    add("--repeat", type=int, default=3, help="measured steps a reading")
    add("--longest-step", type=float, default=60.0, help="seconds; longer ones are not tried")
    add("--minutes", type=float, help="begin no reading after so many")
    add("--no-trainer", action="store_true", help="leave PEFT and the Trainer out")
    add("--device", choices=("cpu", "cuda"), default=default_device())
    add("--output", type=Path, help="default benchmarks/results/packs-<device>.json")
    add("--table", type=Path, metavar="FILE.json", help="print a result file's tables and stop")
    options = parser.parse_args(arguments)
    small = options.small
    defaults: dict[str, object] = {
        "shape": ["smollm2-135m"] if small else ["smollm2-135m", "llama-3.2-1b", "llama-3.1-8b"],
        "quantization": ["nf4"] if small else ["nf4", "none"],
        "lengths": [64] if small else [512, 2048],
        "batches": [4] if small else [4, 16],
        "lanes": [1, 2, 4] if small else [1, 2, 4, 8, 16, 32],
        "micro_batches": [1, 4],
        "in_turn": [2, 4] if small else [],
        "output": RESULTS / f"packs-{options.device}.json",
    }
    for name, value in defaults.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if small and options.device == "cuda":
        parser.error("--small is the CPU form; add --device cpu, or leave it out on a GPU")
    if min(*options.lengths, 8) < 8:
        parser.error("--lengths: a row has at least 8 tokens")
    return options


def main() -> None:
    """Measure, print and write; or print a table."""
    options = parse()
    if options.table is not None:
        print(tables(read_result(options.table)))
        return
    if options.device == "cpu" and not options.small and max(options.lengths) > 128:
        print("on a CPU this takes hours; --small is the form for it", file=sys.stderr)
    quiet_transformers()
    run = Run(options)
    run.measure()
    print()
    print(tables(read_result(options.output)))


if __name__ == "__main__":
    main()
