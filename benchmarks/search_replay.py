"""Replay the search on a table of published fine-tunings: how many trials until a good cell is found?

    python benchmarks/search_replay.py [--table FILE.csv] [--seeds 20] [--output FILE.json]

The ladder is the product's own (``lora_tune.search``), with one rung and the table in place of the
engine. The space is the table's own ranks and learning rates at batch 128 and 100,000 rows, lora_alpha
32, dropout 0, all-linear; anchors that such a space cannot express are left out. A proposal is answered
by the nearest cell (rank first, then the logarithm of the learning rate); a cell that was seen before
costs nothing; a diverged cell is a failure with a regret of 100 %. Compared are random search, Optuna's
TPE with its defaults, a grid, and the ladder with anchors that were chosen on the tables of all other
vendors.

Columns of the table, as in ``benchmarks/data/README.md``: model, lr, lora_rank, test_nll, status. Runs
of one cell are averaged; a cell of which any run diverged has diverged. Models with fewer than 15 cells
are listed as skipped.
"""

import argparse
import csv
import hashlib
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import optuna
from machine import describe_run, markdown_table, write_result

from lora_tune.records import (
    EvalResult,
    LaneJob,
    LaneOutcome,
    Point,
    SuggestedParams,
    TargetSet,
    TrialState,
)
from lora_tune.search.anchors import Anchor, make_anchors
from lora_tune.search.ladder import Ladder, LadderPlan
from lora_tune.search.proposals import Proposer
from lora_tune.search.space import SearchSpace
from lora_tune.study.spec import SearchSection, SpaceSection

HERE = Path(__file__).parent
TABLE = HERE / "data" / "tinker_sft_sweep_public.csv"
OUTPUT = HERE / "results" / "search-replay.json"
COLUMNS = ("model", "lr", "lora_rank", "test_nll", "status")
FULL_GRID = 15  # cells
BATCH, ROWS, STEPS = 128, 100_000, 780
THRESHOLDS = (0.01, 0.005, 0.002)  # relative to the best cell
NOT_REACHED = 20  # trials that a search counts which has not come within a threshold
READ_AFTER = (2, 4, 8)  # trials after which the regret is read
MOST_PROPOSALS = 80  # repeats counted in; a search that keeps repeating itself ends here
PORTFOLIO = 4  # anchors learned from other vendors: as many as the space of a table can express


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """The published cells of one model: (rank, learning rate) to test loss, None if it diverged."""

    model: str
    cells: Mapping[tuple[int, float], float | None]

    @property
    def vendor(self) -> str:
        """What precedes the slash in the model's name."""
        return self.model.partition("/")[0]

    @property
    def ranks(self) -> tuple[int, ...]:
        """Ranks that were tried, rising."""
        return tuple(sorted({rank for rank, _ in self.cells}))

    @property
    def learning_rates(self) -> tuple[float, ...]:
        """Learning rates that were tried, rising."""
        return tuple(sorted({lr for _, lr in self.cells}))

    @property
    def best(self) -> float:
        """The lowest loss of a cell."""
        return min(loss for loss in self.cells.values() if loss is not None)

    def snap(self, rank: int, lr: float) -> tuple[int, float]:
        """Return the nearest cell: rank first, then learning rate, both by their logarithm."""
        nearest_rank = min(self.ranks, key=lambda other: abs(math.log(other / rank)))
        rates = (other for at, other in self.cells if at == nearest_rank)
        return nearest_rank, min(rates, key=lambda other: abs(math.log(other / lr)))

    def regret(self, cell: tuple[int, float]) -> float:
        """Return how much worse a cell is than the best one, relative; 1 if it diverged."""
        loss = self.cells[cell]
        return 1.0 if loss is None else loss / self.best - 1.0


def read_tables(path: Path) -> list[Table]:
    """Read all models of a file, in its order.

    Raises:
        SystemExit: The file cannot be read, lacks a column, or has a value that is no number.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError) as error:
        raise SystemExit(f"{path}: cannot be read as CSV ({error})") from error
    if missing := [column for column in COLUMNS if not rows or column not in rows[0]]:
        raise SystemExit(f"{path}: no column {', '.join(missing)}; needed: {', '.join(COLUMNS)}")
    runs: dict[str, dict[tuple[int, float], list[float | None]]] = defaultdict(
        lambda: defaultdict(list)
    )
    for line, row in enumerate(rows, start=2):
        try:
            cell = int(float(row["lora_rank"])), float(row["lr"])
            loss = float(row["test_nll"]) if row["status"] == "ok" else None
        except ValueError as error:
            raise SystemExit(f"{path}, line {line}: {error}") from error
        runs[row["model"]][cell].append(loss)
    return [
        Table(model=model, cells={cell: _mean(losses) for cell, losses in cells.items()})
        for model, cells in runs.items()
    ]


def _mean(losses: Sequence[float | None]) -> float | None:
    """Return the mean of a cell's runs; None if any of them diverged."""
    known = [loss for loss in losses if loss is not None and math.isfinite(loss)]
    return fmean(known) if len(known) == len(losses) else None


def is_full_grid(table: Table) -> bool:
    """Say whether a table is fit for a replay: 15 cells or more, and one that did not diverge."""
    return len(table.cells) >= FULL_GRID and any(x is not None for x in table.cells.values())


def can_teach(table: Table) -> bool:
    """Say whether anchors can be learned from a table: at least two learning rates that work."""
    return len({rate for (_, rate), loss in table.cells.items() if loss is not None}) > 1


def space_of(table: Table) -> SearchSpace:
    """Return the table's own ranks and learning rates as a search space, in which all ranks fit."""
    section = SpaceSection(
        rank=table.ranks,
        lora_alpha=32,
        lora_dropout=(0.0,),
        target_modules=("all-linear",),
        learning_rate=(table.learning_rates[0], table.learning_rates[-1]),
    )
    target = TargetSet(
        name="all-linear",
        modules=("all",),
        max_rank=table.ranks[-1],
        trainable_parameters_per_rank=1,
    )
    return SearchSpace(section, [target], seed=0)


# Strategies: each yields the cells that it tries, one proposal after the other.


def ladder_cells(
    table: Table, seed: int, *, anchors: Sequence[Anchor] | None = None, sampler: str = "tpe"
) -> Iterator[tuple[int, float]]:
    """Yield what the product's ladder trains, at its defaults unless told otherwise.

    Args:
        table: Answers the trials.
        seed: Of the study.
        anchors: Configurations to begin with; None: the product's own.
        sampler: Who proposes after them.
    """
    space = space_of(table)
    if anchors is None:
        anchors = make_anchors(space, effective_batch_size=BATCH, num_train=ROWS)
    proposer = Proposer(
        _new_study(),
        space,
        list(anchors),
        sampler=sampler,
        startup_trials=SearchSection().startup_trials,
        seed=seed,
    )
    plan = LadderPlan(
        num_trials=MOST_PROPOSALS,
        rungs=(STEPS,),
        warmup_steps=0,
        cooldown_ratio=0.2,
        window=1,
        budget_bytes=1,
    )
    ladder = Ladder(
        plan,
        space,
        proposer,
        records=(),
        save=lambda record: None,
        predict=lambda config: (0, config.rank),
        trial_folder=lambda number: Path(str(number)),
    )
    while jobs := ladder.next_jobs(1):
        config = jobs[0].config
        assert config is not None
        cell = table.snap(config.rank, config.learning_rate)
        ladder.take(_outcome(jobs[0], table.cells[cell]))
        yield cell


def _outcome(job: LaneJob, loss: float | None) -> LaneOutcome:
    if loss is None:
        return LaneOutcome(
            trial=job.trial, rung=0, state=TrialState.DIVERGED, reason="diverged in the table"
        )
    point = Point(
        step=STEPS, train_loss=loss, learning_rate=0.0, grad_norm=1.0, num_tokens=STEPS * BATCH
    )
    evaluation = EvalResult(
        split="selection", loss_sums=(loss,), label_counts=(1,), compute_dtype="float32"
    )
    return LaneOutcome(
        trial=job.trial,
        rung=0,
        state=TrialState.COMPLETE,
        points=(point,),
        evaluation=evaluation,
    )


def optuna_cells(
    table: Table, seed: int, *, sampler: Callable[[int], optuna.samplers.BaseSampler]
) -> Iterator[tuple[int, float]]:
    """Yield what Optuna alone tries, its sampler at its defaults, in the same space."""
    space, study = space_of(table), _new_study(sampler(seed))
    worst = 0.0
    for _ in range(MOST_PROPOSALS):
        trial = study.ask()
        params = space.suggest(trial)
        cell = table.snap(params.rank, params.effective_step)
        loss = table.cells[cell]
        if loss is None:
            trial.report(1.1 * worst if worst else 20.0, step=0)
            study.tell(trial, state=optuna.trial.TrialState.PRUNED)
        else:
            worst = max(worst, loss)
            study.tell(trial, loss)
        yield cell


def _new_study(sampler: optuna.samplers.BaseSampler | None = None) -> optuna.Study:
    return optuna.create_study(storage=optuna.storages.InMemoryStorage(), sampler=sampler)


# Anchors that know nothing of a vendor.


def portfolio(tables: Sequence[Table]) -> list[tuple[int, float]]:
    """Choose anchors greedily: each lowers the mean regret over the tables most, given those before it.

    Returns:
        Pairs of rank, counted in notches below the table's largest, and learning rate.
    """
    rates = sorted({rate for table in tables for rate in table.learning_rates})
    notches = range(max(len(table.ranks) for table in tables))
    candidates = [(notch, rate) for notch in notches for rate in rates]
    regrets = {
        candidate: [table.regret(_cell_of(table, candidate)) for table in tables]
        for candidate in candidates
    }
    chosen: list[tuple[int, float]] = []
    reached = [1.0] * len(tables)
    for _ in range(PORTFOLIO):
        best = min(
            (candidate for candidate in candidates if candidate not in chosen),
            key=lambda candidate: (
                fmean(map(min, reached, regrets[candidate])),
                fmean(regrets[candidate]),
            ),
        )
        chosen.append(best)
        reached = list(map(min, reached, regrets[best]))
    return chosen


def _cell_of(table: Table, candidate: tuple[int, float]) -> tuple[int, float]:
    notch, rate = candidate
    return table.snap(table.ranks[max(0, len(table.ranks) - 1 - notch)], rate)


def learned_anchors(table: Table, others: Sequence[Table]) -> list[Anchor]:
    """Return anchors for a table that were chosen on others, within this table's learning rates."""
    lowest, highest = table.learning_rates[0], table.learning_rates[-1]
    anchors: list[Anchor] = []
    for number, (notch, rate) in enumerate(portfolio(others), start=1):
        params = SuggestedParams(
            rank=table.ranks[max(0, len(table.ranks) - 1 - notch)],
            alpha_ratio=None,
            lora_dropout=0.0,
            target_set="all-linear",
            effective_step=min(max(rate, lowest), highest),
        )
        if params not in [anchor.params for anchor in anchors]:
            anchors.append(Anchor(f"L{number}", params))
    return anchors


# Counting.


def regrets_by_trial(table: Table, cells: Iterator[tuple[int, float]]) -> list[float]:
    """Return the regret of the best cell so far after each trial that was not a repeat.

    Ends when nothing more can change: after 20 trials, or when all thresholds and readings are known.
    """
    seen: set[tuple[int, float]] = set()
    reached: list[float] = []
    for cell in cells:
        if cell in seen:
            continue
        seen.add(cell)
        reached.append(min(table.regret(cell), reached[-1] if reached else 1.0))
        done = len(reached) >= max(READ_AFTER) and reached[-1] <= min(THRESHOLDS)
        if done or len(reached) >= min(NOT_REACHED, len(table.cells)):
            break
    return reached


def trials_to(reached: Sequence[float], threshold: float) -> int:
    """Return the number of the first trial within the threshold; 20 if there is none.

    >>> trials_to([0.03, 0.004, 0.0], 0.005), trials_to([0.03, 0.02], 0.005)
    (2, 20)
    """
    return next((n for n, regret in enumerate(reached, 1) if regret <= threshold), NOT_REACHED)


def summarize(runs: Sequence[Sequence[float]]) -> dict[str, float]:
    """Return the means over the runs of a strategy on one table: trials, and regrets in percent."""
    found = {
        f"trials to {threshold:.1%}": fmean(trials_to(run, threshold) for run in runs)
        for threshold in THRESHOLDS
    }
    for count in READ_AFTER:
        found[f"regret % after {count}"] = 100 * fmean(
            run[min(count, len(run)) - 1] for run in runs
        )
    return found


def replay(table: Table, others: Sequence[Table], *, seeds: int) -> dict[str, dict[str, float]]:
    """Return what every strategy shows on one table, the means over the seeds.

    ``others`` are the tables of other vendors; without any, nothing can be learned from them.
    """
    strategies: dict[str, Callable[[int], Iterator[tuple[int, float]]]] = {
        "ladder": lambda seed: ladder_cells(table, seed)
    }
    if others:
        learned = learned_anchors(table, others)
        strategies["ladder, vendor left out"] = lambda seed: ladder_cells(
            table, seed, anchors=learned
        )
    strategies |= {
        "random": lambda seed: optuna_cells(
            table, seed, sampler=lambda s: optuna.samplers.RandomSampler(seed=s)
        ),
        "plain TPE": lambda seed: optuna_cells(
            table, seed, sampler=lambda s: optuna.samplers.TPESampler(seed=s)
        ),
        "grid": lambda seed: ladder_cells(table, seed, anchors=(), sampler="grid"),
    }
    return {
        name: summarize([regrets_by_trial(table, cells_of(seed)) for seed in range(seeds)])
        for name, cells_of in strategies.items()
    }


def mean_of(
    results: Mapping[str, Mapping[str, Mapping[str, float]]],
) -> dict[str, dict[str, float]]:
    """Return every strategy's means over the models that it was run on."""
    by_strategy: dict[str, list[Mapping[str, float]]] = defaultdict(list)
    for strategies in results.values():
        for name, numbers in strategies.items():
            by_strategy[name].append(numbers)
    return {
        name: {key: fmean(numbers[key] for numbers in found) for key in found[0]}
        for name, found in by_strategy.items()
    }


def worst_of(results: Mapping[str, Mapping[str, Mapping[str, float]]], strategy: str) -> float:
    """Return the mean trials to within 0.5 % on the model on which the strategy needed most."""
    key = f"trials to {THRESHOLDS[1]:.1%}"
    return max(found[strategy][key] for found in results.values() if strategy in found)


def show(title: str, strategies: Mapping[str, Mapping[str, float]]) -> None:
    """Print one table: a row per strategy."""
    header = ["strategy", *next(iter(strategies.values()))]
    rows = [
        [name, *(f"{value:.2f}" for value in numbers.values())]
        for name, numbers in strategies.items()
    ]
    print(f"\n{title}\n\n{markdown_table(header, rows)}", flush=True)


def parse_arguments() -> argparse.Namespace:
    """Return the command's options."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--table", type=Path, default=TABLE, help="CSV of published runs")
    parser.add_argument("--seeds", type=int, default=20, help="runs of each strategy on each model")
    parser.add_argument(
        "--output", type=Path, help=f"result file; default for the table beside this: {OUTPUT.name}"
    )
    return parser.parse_args()


def main() -> None:
    """Replay all models of the table, print as they are done, write the result."""
    options = parse_arguments()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    tables = read_tables(options.table)
    full = [table for table in tables if is_full_grid(table)]
    skipped = {table.model: len(table.cells) for table in tables if not is_full_grid(table)}
    if not full:
        raise SystemExit(
            f"{options.table}: no model has {FULL_GRID} cells, so nothing can be replayed"
        )
    results = {}
    for table in full:
        others = [other for other in tables if other.vendor != table.vendor and can_teach(other)]
        results[table.model] = replay(table, others, seeds=options.seeds)
        show(f"{table.model}, {len(table.cells)} cells", results[table.model])
    means = mean_of(results)
    show(f"mean of {len(full)} models", means)
    for model, count in skipped.items():
        print(f"skipped: {model}, {count} cells of the {FULL_GRID} that a replay needs")
    targets = report_targets(results, means)
    output = options.output or (OUTPUT if options.table == TABLE else None)
    if output is not None:
        head = describe_run("cpu")
        source = {
            "file": options.table.name,
            "sha256": hashlib.sha256(options.table.read_bytes()).hexdigest(),
        }
        body = {"mean": means, "targets": targets, "models": results, "skipped": skipped}
        write_result(output, {**head, "table": source, "seeds": options.seeds, **body})


def report_targets(
    results: Mapping[str, Mapping[str, Mapping[str, float]]],
    means: Mapping[str, Mapping[str, float]],
) -> dict[str, dict[str, float]]:
    """Print and return how the ladder stands to what it has to reach."""
    found = {}
    print("\nto reach: within 0.5 % in 2 trials on every model, within 0.2 % in 1.5 on average")
    for name in (name for name in means if name.startswith("ladder")):
        worst, mean = worst_of(results, name), means[name][f"trials to {THRESHOLDS[2]:.1%}"]
        found[name] = {"most trials to 0.5%": worst, "mean trials to 0.2%": mean}
        reached = "reached" if worst <= 2 and mean <= 1.5 else "not reached"
        print(f"{name}: {worst:.2f} on the hardest model, {mean:.2f} on average: {reached}")
    return found


if __name__ == "__main__":
    main()
