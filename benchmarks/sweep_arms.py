"""The arms of ``sweep.py``: one sweep, trained in five ways, each timed in a process of its own.

    python benchmarks/sweep_arms.py ARM PLAN.json RESULT.json      (``sweep.py`` calls this)

Every arm trains the same configurations on the same rows for the same steps at a constant rate, and evaluates
each once. Imports, and the short measurement by which an arm chooses how it computes, are not in its
makespan; loading the base is.
"""

import gc
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TypeVar

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as `lora-tune run` sets it; before torch

import torch
import transformers
from machine import describe_run, forget_peak, memory_bytes, seconds_of, synchronize, write_result
from packs import CPU_DTYPES, divisors
from torch import nn
from trainer_loop import (
    StepClock,
    TrainerSettings,
    attach_adapter,
    count_parameters,
    detach_adapter,
    keep_cpu_weights,
    new_trainer,
    rows_in_order,
    set_adapter,
    train_and_evaluate,
    trainer_choices,
)

from lora_tune.engine.base import (
    DTYPES,
    BaseModel,
    linear_shapes,
    load_base_model,
    quantization_config,
    quiet_transformers,
)
from lora_tune.engine.host_allocator import keep_freed_memory
from lora_tune.engine.lora import LaneAdapter, default_group_rank
from lora_tune.engine.loss import label_losses
from lora_tune.engine.memory_errors import is_out_of_memory
from lora_tune.engine.memory_reading import open_meter
from lora_tune.engine.pack import PackSettings, TrialPack
from lora_tune.engine.probe import Probe, ProbeOptions, by_product_speed, measure_tokens_per_s
from lora_tune.executors.in_process import InProcessExecutor
from lora_tune.executors.interface import Executor
from lora_tune.records import EvalResult, LaneJob, LaneOutcome, TokenizedRow, TrialConfig

ARMS = {
    "a": "lora-tune, packed",
    "b": "lora-tune, one lane",
    "c": "Trainer loop, base kept",
    "d": "Trainer loop, base reloaded",
    "e": "lora-tune, packed, rungs",
}
_MAX_GRAD_NORM = 1.0
_CHOICE_STEPS = 3  # of a measurement: one to warm up, two measured
Result = dict[str, object]
T = TypeVar("T")


def row_fields(rows: Sequence[TokenizedRow]) -> list[Result]:
    """Return rows as JSON holds them."""
    return [{"input_ids": row.input_ids, "labels": row.labels, "group": row.group} for row in rows]


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """What all arms train. Rows of ``held_out`` are sorted by length, which spares padding."""

    folder: Path  # config and safetensors of the base
    quantization: str
    device: str
    steps: int
    batch: int
    configs: tuple[TrialConfig, ...]
    train: tuple[TokenizedRow, ...]
    held_out: tuple[TokenizedRow, ...]
    compute_dtype: str = "auto"
    lanes: int | None = None  # of arm a; None: as the product's probe chooses
    workers: int = 1  # processes of arms a and e
    rungs: tuple[float, ...] = (0.25, 1.0)

    @property
    def dtypes(self) -> tuple[str, ...]:
        """Compute types that are tried."""
        if self.compute_dtype != "auto":
            return (self.compute_dtype,)
        return CPU_DTYPES if self.device == "cpu" else ("bfloat16",)

    @property
    def largest(self) -> TrialConfig:
        """The configuration with the most trainable parameters, on which arms measure."""
        return max(self.configs, key=lambda config: config.rank * len(config.target_modules))

    def write(self, path: Path) -> None:
        """Write the plan for a child process."""
        fields = {key: getattr(self, key) for key in self.__dataclass_fields__}
        fields["configs"] = [asdict(config) for config in self.configs]
        fields |= {split: row_fields(fields[split]) for split in ("train", "held_out")}
        fields["folder"] = str(self.folder)
        path.write_text(json.dumps(fields), encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> "Sweep":
        """Read what ``write`` wrote."""
        fields = json.loads(path.read_text(encoding="utf-8"))
        for split in ("train", "held_out"):
            fields[split] = tuple(
                TokenizedRow(input_ids=tuple(row["input_ids"]), labels=tuple(row["labels"]))
                for row in fields[split]
            )
        fields["configs"] = tuple(
            TrialConfig(**{**config, "target_modules": tuple(config["target_modules"])})
            for config in fields["configs"]
        )
        fields["folder"] = Path(fields["folder"])
        fields["rungs"] = tuple(fields["rungs"])
        return cls(**fields)


@dataclass
class Clock:
    """Seconds of the parts of a makespan. ``excluded`` are those that only the comparison needs."""

    device: str
    loading_s: float = 0.0
    training_s: float = 0.0
    evaluation_s: float = 0.0
    excluded_s: float = 0.0

    def begin(self) -> None:
        """Start the makespan, and the memory peak."""
        gc.collect()
        forget_peak(self.device)
        self._began = time.perf_counter()

    def time(self, part: str, work: Callable[[], T]) -> T:
        """Return what ``work`` returns and add its seconds to a part."""
        synchronize(self.device)
        begin = time.perf_counter()
        found = work()
        synchronize(self.device)
        setattr(self, part, getattr(self, part) + time.perf_counter() - begin)
        return found

    def end(self) -> Result:
        """Return the makespan and its parts; what is in none of them is ``other_s``."""
        synchronize(self.device)
        makespan = time.perf_counter() - self._began - self.excluded_s
        parts = self.loading_s + self.training_s + self.evaluation_s
        return {
            "makespan_s": makespan,
            "loading_s": self.loading_s,
            "training_s": self.training_s,
            "evaluation_s": self.evaluation_s,
            "other_s": makespan - parts,
            "excluded_s": self.excluded_s,
            "memory_bytes": memory_bytes(self.device),
        }


class TimedPack(TrialPack):
    """A trial pack that tells its evaluations to the clock: they begin when all steps are done."""

    clock: Clock

    def evaluate(self, *arguments: object, **names: object) -> list[EvalResult]:
        """Evaluate, timed."""
        whole = super().evaluate
        return self.clock.time("evaluation_s", lambda: whole(*arguments, **names))  # type: ignore[arg-type]


def run_packed(sweep: Sweep) -> Result:
    """Arm a: the product's executor, lanes and micro-batch as the product's probe chooses them."""
    choice, chosen_s = _timed(lambda: choose_plan(sweep))
    return {"settings": choice, "choice_s": chosen_s, **_run_engine(sweep, choice)}


def run_one_lane(sweep: Sweep) -> Result:
    """Arm b: one lane at its own best micro-batch; and what the head costs with and without labels only."""
    choice, chosen_s = _timed(lambda: choose_one_lane(sweep))
    found = _run_engine(sweep, choice)
    head = measure_head(sweep, choice)
    return {"settings": choice, "choice_s": chosen_s, "head": head, **found}


def run_trainer(sweep: Sweep, choice: Result | None = None, *, reload: bool) -> Result:
    """Arms c and d: an Optuna loop over PEFT and the Trainer, the base kept or loaded for each trial."""
    settings, chosen_s = _timed(
        lambda: choose_trainer(sweep) if choice is None else TrainerSettings.of(choice)
    )
    loop = TrainerLoop(sweep, settings, reload=reload)
    loop.clock.begin()
    searched = loop.search()
    return {
        "settings": asdict(settings)
        | {"label": settings.label, "eval_batch_size": settings.eval_batch_size},
        "choice_s": chosen_s,
        "search": searched,
        **loop.clock.end(),
        "trials": loop.trials,
        "num_tokens": sum(_tokens(sweep, config) for config in sweep.configs),
        "num_rows": len(sweep.configs) * sweep.steps * sweep.batch,
    }


def run_rungs(sweep: Sweep, choice: Result | None = None) -> Result:
    """Arm e: the same configurations on the product's ladder, whose later rungs only the best reach."""
    try:
        from lora_tune.search.ladder import Ladder, LadderPlan
        from lora_tune.search.plan import rung_steps
    except ImportError as error:
        return {"skipped": f"the ladder needs a package that is not installed ({error.name})"}
    settled, chosen_s = _timed(lambda: choose_plan(sweep) if choice is None else choice)
    rungs = rung_steps(sweep.rungs, total_steps=sweep.steps, min_steps=1)
    with tempfile.TemporaryDirectory() as work:
        plan = LadderPlan(
            num_trials=len(sweep.configs),
            rungs=rungs,
            warmup_steps=0,
            cooldown_ratio=0.0,
            window=len(sweep.configs),
            budget_bytes=0,
        )
        given = _Given(sweep.configs)
        ladder = Ladder(
            plan,
            given,  # type: ignore[arg-type]
            given,  # type: ignore[arg-type]
            records=(),
            save=lambda record: None,
            predict=lambda config: (0, 0),
            trial_folder=lambda number: Path(work) / f"{number:04}",
        )
        with _executor(sweep, settled) as (executor, clock):
            while True:
                for job in ladder.next_jobs(executor.free_slots):
                    executor.submit(job)
                if not executor.busy:
                    break
                for outcome in executor.wait():
                    ladder.take(outcome)
            winner = ladder.finalists(1)[0]
            found = clock.end()
    results = [result for record in ladder.records.values() for result in record.rungs]
    _split_training(found)
    return {
        "settings": settled,
        "choice_s": chosen_s,
        **found,
        "rungs": list(rungs),
        "trials_at_rung": [sum(r.rung == rung for r in results) for rung in range(len(rungs))],
        "num_tokens": sum(result.num_tokens for result in results),
        "num_rows": ladder.finished_steps() * sweep.batch,
        "winner": winner.number,
        "winner_loss": winner.rungs[-1].eval_loss,
    }


class _Given:
    """Stands for sampler and space: proposes the sweep's configurations in their order."""

    anchors: tuple[object, ...] = ()

    def __init__(self, configs: Sequence[TrialConfig]) -> None:
        self.configs = configs
        self.told: set[int] = set()

    def propose(self, number: int) -> TrialConfig:
        return self.configs[number]

    def effective(self, proposed: TrialConfig) -> TrialConfig:
        return proposed

    def origin(self, number: int) -> str:
        return "given"

    def is_told(self, number: int) -> bool:
        return number in self.told

    def tell(self, number: int, **outcome: object) -> None:
        self.told.add(number)


def choose_plan(sweep: Sweep) -> Result:
    """Return lanes, micro-batch and compute type as a study's own probe would settle them."""
    base = _load_base(sweep)
    sizes, trials = tuple(divisors(sweep.batch)), len(sweep.configs)
    fixed = sweep.lanes is not None
    options = ProbeOptions(
        micro_batch_sizes=(sweep.batch,) if fixed else sizes,
        most_lanes=lambda size: 1 if fixed else trials,
        compute_dtypes=by_product_speed(sweep.dtypes) if sweep.device == "cpu" else sweep.dtypes,
        study_tokens=float(sum(_tokens(sweep, config) for config in sweep.configs)),
        most_study_s=float("inf"),
    )
    settings = pack_settings(sweep, sweep.batch)
    found = Probe(base, sweep.train, settings, sweep.largest, options).run()
    return {
        "workers": sweep.workers,
        "lanes": sweep.lanes or found.lanes,
        "micro_batch": found.micro_batch_size,
        "compute_dtype": found.compute_dtype,
        "cut": found.cut,
        "readings": [asdict(reading) for reading in found.readings],
    }


def choose_one_lane(sweep: Sweep) -> Result:
    """Return the fastest compute type and micro-batch of one lane, every divisor of the batch tried."""
    base = _load_base(sweep)
    readings: list[Result] = []

    def rate(name: str, size: int) -> float:
        if base.compute_dtype != DTYPES[name]:
            base.set_compute_dtype(DTYPES[name])
        found = _unless_out_of_memory(
            lambda: measure_tokens_per_s(
                base, sweep.train, pack_settings(sweep, size), sweep.largest, lanes=1
            )
        )
        readings.append({"compute_dtype": name, "micro_batch": size, "tokens_per_s": found})
        return found

    name, size = fastest(sweep.dtypes, divisors(sweep.batch), rate)
    return {"lanes": 1, "micro_batch": size, "compute_dtype": name, "readings": readings}


def choose_trainer(sweep: Sweep) -> TrainerSettings:
    """Return the fastest way of the Trainer: type and autocast at the whole batch, then micro-batches."""
    whole = trainer_choices(sweep.dtypes, [sweep.batch], effective_batch_size=sweep.batch)
    model: list[nn.Module] = []
    loaded: list[str] = []

    def rate(how: TrainerSettings, size: int) -> float:
        if loaded != [how.compute_dtype]:
            model.clear()
            gc.collect()
            model.append(load_plain(sweep, how.compute_dtype))
            loaded[:] = [how.compute_dtype]
        settings = replace(how, micro_batch_size=size)
        return _unless_out_of_memory(lambda: _trainer_rate(sweep, model[0], settings))

    how, size = fastest(whole, divisors(sweep.batch), rate)
    return replace(how, micro_batch_size=size)


def fastest(
    ways: Sequence[T], sizes: Sequence[int], rate: Callable[[T, int], float]
) -> tuple[T, int]:
    """Return the fastest way at the largest size that fits one, then that way's fastest size."""
    falling = sorted(sizes, reverse=True)
    rates: list[float] = [0.0]
    while not max(rates):
        if not falling:
            raise SystemExit("no micro-batch fits the memory, not even one row")
        size = falling.pop(0)
        rates = [rate(way, size) for way in ways]
    way = ways[rates.index(max(rates))]
    found = {size: max(rates), **{smaller: rate(way, smaller) for smaller in falling}}
    return way, max(found, key=lambda size: found[size])


def _unless_out_of_memory(work: Callable[[], float]) -> float:
    """Return a rate; zero when memory ran out."""
    try:
        return work()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return 0.0


def _trainer_rate(sweep: Sweep, model: nn.Module, settings: TrainerSettings) -> float:
    size, clock = count_parameters(model), StepClock(sweep.device)
    adapted = attach_adapter(model, sweep.largest, None)
    try:
        with tempfile.TemporaryDirectory() as folder:
            rows = rows_in_order(
                sweep.train, steps=_CHOICE_STEPS, batch_size=sweep.batch, data_seed=0
            )
            new_trainer(
                adapted,
                rows,
                sweep.held_out,
                settings,
                steps=_CHOICE_STEPS,
                learning_rate=1e-6,
                folder=Path(folder),
                clock=clock,
            ).train()
    finally:
        detach_adapter(adapted, num_parameters=size)
    tokens = sum(len(row.input_ids) for row in rows[sweep.batch :])
    return tokens / sum(clock.step_s[1:])


def _run_engine(sweep: Sweep, choice: Result) -> Result:
    with _executor(sweep, choice) as (executor, clock):
        for number, config in enumerate(sweep.configs):
            executor.submit(_job(sweep, number, config))
        outcomes: list[LaneOutcome] = []
        while executor.busy:
            outcomes += executor.wait()
        found = clock.end()
    _split_training(found)
    trials = [_trial(outcome) for outcome in sorted(outcomes, key=lambda one: one.trial)]
    return found | {
        "trials": trials,
        "most_lanes": max(one.pack_lanes for one in outcomes),
        "num_tokens": sum(one.num_tokens for one in outcomes),
        "num_steps": len(sweep.configs) * sweep.steps,
        "num_rows": len(sweep.configs) * sweep.steps * sweep.batch,
    }


def _split_training(found: Result) -> None:
    """Count what is neither loading nor evaluation as training: steps do not wait for the device."""
    found["training_s"], found["other_s"] = found["other_s"], 0.0


@contextmanager
def _executor(sweep: Sweep, choice: Result) -> Iterator[tuple[Executor, Clock]]:
    """Give the product's executor, its base loaded, and the clock, which runs."""
    if int(str(choice.get("workers", 1))) > 1:
        from sweep_workers import pool_of

        with pool_of(sweep, choice) as pooled:
            yield pooled
        return
    if sweep.device == "cpu":
        keep_freed_memory()
    clock = Clock(sweep.device)
    clock.begin()
    meter = open_meter(sweep.device)
    pack = load_pack(sweep, choice, clock)
    rows = {"selection": sweep.held_out}
    lanes = int(str(choice["lanes"]))
    yield InProcessExecutor(pack, rows, lanes=lanes, base_model=None, meter=meter), clock


def load_pack(sweep: Sweep, choice: Result, clock: Clock) -> TimedPack:
    """Return a pack on a freshly loaded base that computes as chosen."""
    base = clock.time("loading_s", lambda: _load_base(sweep))
    base.set_compute_dtype(DTYPES[str(choice["compute_dtype"])])
    pack = TimedPack(base, sweep.train, pack_settings(sweep, int(str(choice["micro_batch"]))))
    pack.clock = clock
    return pack


def _job(sweep: Sweep, number: int, config: TrialConfig) -> LaneJob:
    return LaneJob(
        trial=number,
        rung=0,
        config=config,
        start_step=0,
        hold_step=sweep.steps,
        end_step=sweep.steps,
        warmup_steps=0,
        eval_split="selection",
        eval_dtype="train",
        start_folder=None,
        result_folder=None,
    )


def _trial(outcome: LaneOutcome) -> Result:
    found: Result = {"number": outcome.trial, "state": str(outcome.state), "reason": outcome.reason}
    if outcome.evaluation is not None:
        found |= {
            "loss_sums": list(outcome.evaluation.loss_sums),
            "label_counts": list(outcome.evaluation.label_counts),
            "eval_loss": outcome.evaluation.mean_loss,
        }
    return found


def _load_base(sweep: Sweep) -> BaseModel:
    dtype = sweep.dtypes[0]  # as a study loads it: then 4-bit weights do not depend on the choice
    return load_base_model(
        sweep.folder, quantization=sweep.quantization, compute_dtype=dtype, device=sweep.device
    )


def pack_settings(sweep: Sweep, micro_batch: int) -> PackSettings:
    """Return what all lanes of the sweep have in common."""
    return PackSettings(
        effective_batch_size=sweep.batch,
        micro_batch_size=micro_batch,
        max_grad_norm=_MAX_GRAD_NORM,
        weight_decay=0.0,
        group_rank=default_group_rank(sweep.device),
    )


def _tokens(sweep: Sweep, config: TrialConfig) -> int:
    rows = rows_in_order(
        sweep.train, steps=sweep.steps, batch_size=sweep.batch, data_seed=config.data_seed
    )
    return sum(len(row.input_ids) for row in rows)


class TrainerLoop:
    """What a user's script does: for each trial a model with an adapter, a Trainer, an evaluation."""

    def __init__(self, sweep: Sweep, settings: TrainerSettings, *, reload: bool) -> None:
        self.sweep, self.settings, self.reload = sweep, settings, reload
        self.clock = Clock(sweep.device)
        self.trials: list[Result] = []
        self._model: nn.Module | None = None
        self._size = 0

    def search(self) -> str:
        """Train all configurations, asked for by Optuna if it is installed; return who asked."""
        try:
            import optuna
        except ImportError:
            for number in range(len(self.sweep.configs)):
                self.train(number)
            return "optuna is not installed: the same configurations in a plain loop"
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        study = optuna.create_study(direction="minimize")
        for config in self.sweep.configs:
            study.enqueue_trial(_searched(config))

        def objective(trial: "optuna.Trial") -> float:
            rates = [config.learning_rate for config in self.sweep.configs]
            trial.suggest_int("rank", 1, 256)
            trial.suggest_float("lora_alpha", 1, 1024)
            trial.suggest_categorical(
                "target_set", sorted({config.target_set for config in self.sweep.configs})
            )
            trial.suggest_float("learning_rate", min(rates) / 2, 2 * max(rates), log=True)
            assert trial.params == _searched(self.sweep.configs[trial.number])
            return self.train(trial.number)

        study.optimize(objective, n_trials=len(self.sweep.configs))
        return f"optuna {optuna.__version__}, {type(study.sampler).__name__}"

    def train(self, number: int) -> float:
        """Train and evaluate one configuration; return its evaluation loss."""
        sweep, clock, config = self.sweep, self.clock, self.sweep.configs[number]
        if self._model is None or self.reload:
            self._model = None
            gc.collect()
            self._model = clock.time(
                "loading_s", lambda: load_plain(sweep, self.settings.compute_dtype)
            )
            self._size = count_parameters(self._model)
        linears = linear_shapes(self._model)
        adapted = attach_adapter(self._model, config, None)
        # Which matrices a trial begins with is for the comparison alone: PEFT has drawn its own.
        clock.time(
            "excluded_s",
            lambda: set_adapter(
                adapted, LaneAdapter.initialize(config, linears, torch.device(sweep.device)).weights
            ),
        )
        steps = StepClock(sweep.device)
        with tempfile.TemporaryDirectory() as folder:
            trainer = new_trainer(
                adapted,
                rows_in_order(
                    sweep.train,
                    steps=sweep.steps,
                    batch_size=sweep.batch,
                    data_seed=config.data_seed,
                ),
                sweep.held_out,
                self.settings,
                steps=sweep.steps,
                learning_rate=config.learning_rate,
                folder=Path(folder),
                clock=steps,
            )
            begin = time.perf_counter()
            loss = train_and_evaluate(trainer)
            synchronize(sweep.device)
            whole = time.perf_counter() - begin
        clock.training_s += steps.ends[-1] - begin
        clock.evaluation_s += whole - (steps.ends[-1] - begin)
        del trainer
        if self.reload:
            self._model = None
        else:
            self._model = detach_adapter(adapted, num_parameters=self._size)
        self.trials.append({"number": number, "eval_loss": loss, "step_s": steps.step_s})
        return loss


def _searched(config: TrialConfig) -> dict[str, object]:
    return {
        "rank": config.rank,
        "lora_alpha": config.lora_alpha,
        "target_set": config.target_set,
        "learning_rate": config.learning_rate,
    }


def load_plain(sweep: Sweep, compute_dtype: str) -> nn.Module:
    """Return the base as a user's script loads it."""
    dtype = DTYPES[compute_dtype]
    model: nn.Module = transformers.AutoModelForCausalLM.from_pretrained(
        sweep.folder,
        dtype=dtype,
        quantization_config=quantization_config(sweep.quantization, dtype),
        device_map={"": sweep.device},
        local_files_only=True,
    )
    keep_cpu_weights(model)
    return model.requires_grad_(False)


def measure_head(sweep: Sweep, choice: Result) -> Result:
    """Return seconds per optimizer step of one lane in head and loss: on labels only, and on all tokens.

    Everything below the head is the same for both, so head and loss are timed alone, forward and backward,
    on the hidden states of the first step's micro-batches. All tokens: the Trainer's loss, float32
    logits of every position, those without a label ignored.
    """
    base = _load_base(sweep)
    base.set_compute_dtype(DTYPES[str(choice["compute_dtype"])])
    size = int(str(choice["micro_batch"]))
    rows = rows_in_order(sweep.train, steps=1, batch_size=sweep.batch, data_seed=0)
    parts = [rows[start : start + size] for start in range(0, len(rows), size)]
    micro_batches = list(_hidden_micro_batches(base, parts))
    count = sum(row.num_labels for row in rows)

    def labels_only() -> None:
        for hidden, targets in micro_batches:
            hidden.grad = None
            kept = targets != -100
            weights = torch.full((int(kept.sum()),), 1.0 / count, device=hidden.device)
            found = label_losses(hidden[kept], base.head, targets[kept], weights)
            found.total.backward()  # type: ignore[no-untyped-call]

    def all_tokens() -> None:
        for hidden, targets in micro_batches:
            hidden.grad = None
            logits = base.head(hidden).float()
            loss = nn.functional.cross_entropy(logits, targets, ignore_index=-100, reduction="sum")
            (loss / count).backward()  # type: ignore[no-untyped-call]

    def best(work: Callable[[], None]) -> float:
        work()
        return min(seconds_of(work, sweep.device) for _ in range(3))

    return {"labels_only_s": best(labels_only), "all_tokens_s": best(all_tokens)}


def _hidden_micro_batches(
    base: BaseModel, parts: Sequence[Sequence[TokenizedRow]]
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield (hidden states, shifted labels) of each micro-batch; the values are random."""
    width = base.head.weight.shape[-1]  # type: ignore[index]
    for rows in parts:
        labels = [label for row in rows for label in (*row.labels[1:], -100)]
        hidden = torch.randn(
            len(labels),
            int(width),
            dtype=base.compute_dtype,
            device=base.device,
        )
        yield hidden.requires_grad_(), torch.tensor(labels, device=base.device)


def _timed(work: Callable[[], T]) -> tuple[T, float]:
    begin = time.perf_counter()
    found = work()
    gc.collect()
    return found, time.perf_counter() - begin


def run_arm(arm: str, sweep: Sweep, choice: Result | None = None) -> Result:
    """Return the result of an arm; ``choice`` is what arm a settled, for arm e, and arm c, for arm d."""
    runs: Mapping[str, Callable[[], Result]] = {
        "a": lambda: run_packed(sweep),
        "b": lambda: run_one_lane(sweep),
        "c": lambda: run_trainer(sweep, reload=False),
        "d": lambda: run_trainer(sweep, choice, reload=True),
        "e": lambda: run_rungs(sweep, choice),
    }
    return {"name": ARMS[arm], "run": describe_run(sweep.device), **runs[arm]()}


def main() -> None:
    """Run one arm of a plan in this process and write its result."""
    arm, plan, output = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    quiet_transformers()
    choice = json.loads(sys.argv[4]) if len(sys.argv) > 4 else None
    write_result(output, run_arm(arm, Sweep.read(plan), choice))


if __name__ == "__main__":
    main()
