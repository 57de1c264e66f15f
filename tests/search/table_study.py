"""A study without a model: real ladder, real Optuna, and losses that a formula looks up.

``outcome_of`` is a pure function of a lane job. Some configurations diverge, some do not fit after all,
one kind fails, some learn nothing and are stopped when their job has a limit: whatever interrupts the
study, the same configuration has the same fate. Rows scatter, so that some trials cannot be told apart.
"""

import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import optuna

from lora_tune.records import (
    EvalResult,
    LaneJob,
    LaneOutcome,
    Point,
    SuggestedParams,
    TargetSet,
    TrialConfig,
    TrialRecord,
    TrialState,
)
from lora_tune.search.anchors import Anchor, make_anchors
from lora_tune.search.ladder import Ladder, LadderPlan
from lora_tune.search.proposals import Proposer
from lora_tune.search.space import SearchSpace
from lora_tune.stats.smoothing import smoothed_losses
from lora_tune.study.spec import SpaceSection
from lora_tune.units import MIB

SEED = 11
BUDGET_BYTES = 2560 * MIB
BYTES_PER_RANK_AND_MODULE = 10 * MIB
RANKS = (4, 8, 16, 32, 64, 128)
LABEL_COUNTS = (3, 5, 2, 7, 4)
FIRST_POINT = Point(step=1, train_loss=4.0, learning_rate=1e-4, grad_norm=1.0, num_tokens=64)

MODULES = {
    "attention-qv": ("q_proj", "v_proj"),
    "attention": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
    "all-linear": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
}


def needed_bytes(rank: int, num_modules: int) -> int:
    return rank * num_modules * BYTES_PER_RANK_AND_MODULE


def target_sets() -> tuple[TargetSet, ...]:
    """Return the sets from small to large; the larger ones do not fit at the largest ranks."""
    return tuple(
        TargetSet(
            name=name,
            modules=modules,
            max_rank=max(r for r in RANKS if needed_bytes(r, len(modules)) <= BUDGET_BYTES),
            trainable_parameters_per_rank=len(modules),
        )
        for name, modules in MODULES.items()
    )


def make_space(**keys: object) -> SearchSpace:
    section = SpaceSection.model_validate({"rank": RANKS, **keys})
    return SearchSpace(section, target_sets(), seed=SEED)


def predict(config: TrialConfig) -> tuple[int, int]:
    num_modules = len(config.target_modules)
    return needed_bytes(config.rank, num_modules), config.rank * num_modules


def step_of(config: TrialConfig) -> float:
    return config.learning_rate * config.lora_alpha / 32


def table_loss(config: TrialConfig, rung: int) -> float:
    """Return the evaluation loss: a valley around an effective step of 2e-4, wider is better."""
    distance = math.log10(step_of(config) / 2e-4)
    wiggle = 0.01 * math.sin(50 * distance + config.rank)
    return (
        2.0
        + distance**2
        + 0.3 / config.rank
        - 0.02 * len(config.target_modules)
        + wiggle
        - (0.1 * rung)
    )


def outcome_of(job: LaneJob) -> LaneOutcome:
    """Return how this segment ends, whoever asks and whenever."""
    config = job.config
    assert config is not None
    step = step_of(config)
    if step > 9e-4:
        at_once = replace(FIRST_POINT, train_loss=math.inf, grad_norm=math.nan)
        points = (at_once if step > 1.5e-3 else FIRST_POINT,)
        return early(job, TrialState.DIVERGED, "loss inf", points)
    if config.lora_dropout == 0.1 and config.rank >= 64:
        return early(job, TrialState.INFEASIBLE, "out of memory as the only lane")
    if config.lora_alpha == 8 * config.rank:
        return early(job, TrialState.FAILED, "machine fault")
    loss = table_loss(config, job.rung)
    if config.target_set == "attention" and config.rank >= 32:
        loss = 5.0  # nothing is learnt, nothing diverges
    points = learning_curve(loss, job.end_step)
    smoothed = smoothed_losses((point.step, point.train_loss) for point in points)
    if any(smoothed[step] > limit for step, limit in job.loss_limits):
        return early(job, TrialState.DIVERGED, "above the limit", points)
    noise = tuple(0.03 * math.sin(7 * row + 10 * config.rank + step * 1e5) for row in range(5))
    return trained(job, loss, row_noise=noise, points=points)


def learning_curve(loss: float, steps: int) -> tuple[Point, ...]:
    """Return readings that fall from 4 nats towards ``loss``."""
    return tuple(
        replace(FIRST_POINT, step=step, train_loss=loss + (4.0 - loss) / step**0.5)
        for step in range(1, steps + 1)
    )


def evaluation_of(loss: float, row_noise: Sequence[float] = ()) -> EvalResult:
    """Return an evaluation on five rows with this loss, rows off it by their noise, nats a token."""
    noise = row_noise or (0.0,) * len(LABEL_COUNTS)
    return EvalResult(
        split="selection",
        loss_sums=tuple(n * (loss + off) for n, off in zip(LABEL_COUNTS, noise, strict=True)),
        label_counts=LABEL_COUNTS,
        compute_dtype="float32",
    )


def trained(
    job: LaneJob,
    loss: float,
    *,
    row_noise: Sequence[float] = (),
    points: tuple[Point, ...] = (FIRST_POINT,),
) -> LaneOutcome:
    """Return the outcome of a segment that went well."""
    return LaneOutcome(
        trial=job.trial,
        rung=job.rung,
        state=TrialState.COMPLETE,
        points=points,
        evaluation=evaluation_of(loss, row_noise),
        wall_s=1.5,
        num_tokens=64,
        peak_bytes=100 * MIB,
        pack_lanes=3,
    )


def early(
    job: LaneJob, state: TrialState, reason: str, points: tuple[Point, ...] = ()
) -> LaneOutcome:
    return LaneOutcome(trial=job.trial, rung=job.rung, state=state, points=points, reason=reason)


class TableExecutor:
    """Ends its jobs by ``fate``, in an order that ``arrivals`` shuffles."""

    def __init__(
        self,
        slots: int = 3,
        *,
        arrivals: random.Random | None = None,
        fate: Callable[[LaneJob], LaneOutcome] = outcome_of,
    ) -> None:
        self.slots = slots
        self.arrivals = arrivals
        self.fate = fate
        self.jobs: list[LaneJob] = []
        self.trained: list[LaneJob] = []

    @property
    def free_slots(self) -> int:
        return self.slots - len(self.jobs)

    @property
    def busy(self) -> bool:
        return bool(self.jobs)

    def submit(self, job: LaneJob) -> None:
        self.jobs.append(job)
        self.trained.append(job)

    def wait(self) -> list[LaneOutcome]:
        together = 1
        if self.arrivals is not None:
            self.arrivals.shuffle(self.jobs)
            together = self.arrivals.randint(1, len(self.jobs))
        ended, self.jobs = self.jobs[:together], self.jobs[together:]
        return [self.fate(job) for job in ended]


class Killed(BaseException):
    """The process is gone at this point; only what was written is left."""


class Disk:
    """Trial records that outlive a killed process; the process can be killed at a given write."""

    def __init__(self) -> None:
        self.records: dict[int, TrialRecord] = {}
        self.writes = 0
        self.killed_at: int | None = None  # the write that does not happen any more

    def save(self, record: TrialRecord) -> None:
        if self.writes == self.killed_at:
            raise Killed
        self.writes += 1
        self.records[record.number] = record


def new_study(storage: optuna.storages.BaseStorage | None = None) -> optuna.Study:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna.create_study(
        storage=storage or optuna.storages.InMemoryStorage(),
        study_name="table",
        direction="minimize",
        load_if_exists=True,
    )


def make_ladder(
    study: optuna.Study,
    disk: Disk,
    *,
    num_trials: int = 12,
    window: int = 3,
    rungs: tuple[int, ...] = (10, 40, 80),
    num_anchors: int = 3,
    startup_trials: int = 4,
    sampler: str = "tpe",
    seed: int = SEED,
    space: SearchSpace | None = None,
    anchors: list[Anchor] | None = None,
    half_step: bool = True,
    proposer: Proposer | None = None,
    out_of_time: Callable[[], bool] = lambda: False,
) -> Ladder:
    """Return the ladder of a process that has just been started on ``disk`` and ``study``."""
    space = space or make_space()
    if anchors is None:
        anchors = make_anchors(space, effective_batch_size=16, num_train=5000)[:num_anchors]
    return Ladder(
        LadderPlan(
            num_trials=num_trials,
            rungs=rungs,
            warmup_steps=2,
            cooldown_ratio=0.2,
            window=window,
            budget_bytes=BUDGET_BYTES,
            half_step=half_step,
        ),
        space,
        proposer or make_proposer(study, space, anchors, sampler, startup_trials, seed),
        records=disk.records.values(),
        save=disk.save,
        predict=predict,
        trial_folder=lambda number: Path("trials") / f"{number:04d}",
        out_of_time=out_of_time,
    )


def make_proposer(
    study: optuna.Study,
    space: SearchSpace,
    anchors: list[Anchor],
    sampler: str = "tpe",
    startup_trials: int = 4,
    seed: int = SEED,
) -> Proposer:
    return Proposer(
        study, space, anchors, sampler=sampler, startup_trials=startup_trials, seed=seed
    )


def drive(ladder: Ladder, executor: TableExecutor, *, most_takes: int | None = None) -> bool:
    """Do what the tuner does; return whether the study ended before ``most_takes`` results."""
    takes = 0
    while True:
        for job in ladder.next_jobs(executor.free_slots):
            executor.submit(job)
        if not executor.busy:
            return True
        for outcome in executor.wait():
            if takes == most_takes:
                return False
            ladder.take(outcome)
            takes += 1


def run_study(study: optuna.Study, disk: Disk, **keys: object) -> list[TrialRecord]:
    """Run a study from where it is to its finalists."""
    ladder = make_ladder(study, disk, **keys)  # type: ignore[arg-type]
    drive(ladder, TableExecutor())
    return ladder.finalists(2)


def optuna_table(study: optuna.Study) -> list[tuple[object, ...]]:
    """Return everything that Optuna knows of the trials but the times."""
    return [
        (t.number, t.state.name, t.params, t.values, t.constraints, t.user_attrs)
        for t in study.get_trials()
    ]


def in_order(records: Iterable[TrialRecord]) -> list[TrialRecord]:
    return sorted(records, key=lambda record: record.number)


def suggestion(**changes: object) -> SuggestedParams:
    values: dict[str, object] = {
        "rank": 16,
        "alpha_ratio": 2.0,
        "lora_dropout": 0.05,
        "target_set": "mlp",
        "effective_step": 3e-4,
    }
    return SuggestedParams(**{**values, **changes})  # type: ignore[arg-type]
