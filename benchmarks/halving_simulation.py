"""Learning curves that cross, through the real ladder: what does halving lose, and what does it cost?

    python benchmarks/halving_simulation.py                 # 1,000 studies a regime, some minutes
    python benchmarks/halving_simulation.py --studies 20    # for a look
    python benchmarks/halving_simulation.py --half-step     # with search.half_step = true

A study is 24 trials; nothing is trained. At a share t of a full run a trial's true loss is
a + b t**-c, nats a token. Its final loss a + b lies above that of the study's best configuration by an
exponential draw of mean 3 % (the cells of published sweeps of learning rate and rank, see
``benchmarks/data``: 2 to 6 %); what it still loses after rung 0 is drawn independently of that, so that
curves cross: the spread of this draw is set so that the rank correlation of rung 0 and the end, without any
noise, is about 0.85. Exponents are drawn from 0.3 to 0.8.

With ``--half-step`` every study has one, the dearest case: steps are so far apart that none is near half
the leader's. Its final loss is the leader's and 0.6 % more, SD 0.5 %: what half the learning rate costs
at the cells within the best sixth of the published sweeps, in proportion to the logarithm of the step; the
rest of its curve is drawn like any trial's.

What the ladder sees of a trial at rung r, on selection row i with n_i target tokens:

    curve(r) + seed + hardness_i + taste_i(r)

seed is the trial's own, the same at all rungs (SD 0.0003 nats, what reruns at a high learning rate differ
by); hardness (SD 0.5) is common to all trials; taste scatters so that two trials differ on a row by 0.05
nats, half of the variance being the same at all rungs. Regimes multiply seed and taste.

``Ladder``, promotion, ties and finalists are the product's, with the rungs and cool-downs of a study file
that does not give them, evaluated on as many of 1,000 rows as the product takes. Trials are given:
Optuna has no part.

What is counted:

regret      true final loss above that of the best of all, the half step among them, relative: of the best
            finalist (what a confirmation can find) and of the search's first finalist
cost        optimizer steps of all segments, cool-downs, tie seats and half step included, as a share of 24
            full runs; and as a share of full runs of all that is trained, which a half step makes 25
kept        studies in which the best of the 24 goes on from rung 0; in which the best of all is a finalist

Rung 0 keeps the best less often than hoped for (90 %) because order, not noise, is in the way: at a rank
correlation of 0.85 the best six at rung 0 hold the best at the end in 75 % of studies without any noise,
and only more seats or a longer rung 0 could raise that.
"""

import argparse
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from machine import describe_run, machine_line, markdown_table, write_result
from numpy.typing import NDArray

from lora_tune.records import (
    EvalResult,
    LaneJob,
    LaneOutcome,
    SuggestedParams,
    TrialConfig,
    TrialState,
)
from lora_tune.search.evaluation import RungCosts
from lora_tune.search.ladder import Ladder, LadderPlan
from lora_tune.search.plan import planned_steps, rung_steps
from lora_tune.search.promotion import HALF_STEP
from lora_tune.stats.rank_correlation import spearman
from lora_tune.study.spec import SearchSection, SelectSection, TrainSection
from lora_tune.units import GIB

Floats = NDArray[np.float64]

RESULT = Path(__file__).parent / "results" / "halving-simulation.json"
STUDIES = 1000
TRIALS = 24
COOLDOWN_RATIO = TrainSection().cooldown_ratio
RUNGS = rung_steps(SearchSection().rungs, total_steps=800, min_steps=1)
ROWS = 1000
FINALISTS = SelectSection().finalists
REGIMES = (0.0, 1.0, 4.0)  # noise, as a multiple of the notes'

BEST_LOSS = 0.6
MEAN_EXCESS = 0.03 * BEST_LOSS
MEAN_DROP = 0.05  # nats between rung 0 and the end
DROP_SPREAD = 0.13  # SD of its logarithm: for a rank correlation of 0.85
EXPONENTS = (0.3, 0.8)
HALF_STEP_LOSS = (0.006, 0.005)  # mean and SD of its final loss above the leader's, relative
STEP_RATIO = 3.0  # of one trial's effective step to the next one's
SEED_SD = 0.0003
ROW_SD = 0.05 / 2**0.5  # of one trial; two differ by 0.05
HARDNESS_SD = 0.5
TOKENS = (8, 60)

MOST_REGRET = 0.001
MOST_COST = 0.33
CORRELATIONS = (0.8, 0.9)
TARGETS = {"mean_regret": MOST_REGRET, "cost": MOST_COST, "rank_correlation": CORRELATIONS}


def draw_curves(rng: np.random.Generator) -> Floats:
    """Return true losses at the ends of the rungs, shape (trials, rungs)."""
    return _curves_to(BEST_LOSS + rng.exponential(MEAN_EXCESS, TRIALS), rng)


def draw_half_step(leader: Floats, rng: np.random.Generator) -> Floats:
    """Return the curve of a trial with half the step of one with this curve, shape (rungs,)."""
    excess, spread = HALF_STEP_LOSS
    final = leader[-1:] * (1 + excess + spread * rng.standard_normal(1))
    return np.asarray(_curves_to(final, rng)[0])


def _curves_to(final: Floats, rng: np.random.Generator) -> Floats:
    num = len(final)
    drop = MEAN_DROP * np.exp(DROP_SPREAD * rng.standard_normal(num) - DROP_SPREAD**2 / 2)
    exponent = rng.uniform(*EXPONENTS, num)[:, None]
    share = np.array(RUNGS) / RUNGS[-1]
    scale = drop[:, None] / (share[0] ** -exponent - 1)  # b
    return np.asarray(final[:, None] + scale * (share**-exponent - 1))


class TableExecutor:
    """Ends every job at once with the losses of its trial's curve, seen through noise."""

    def __init__(self, curves: Floats, *, noise: float, rng: np.random.Generator) -> None:
        self.curves = curves  # (trials, rungs)
        self.tokens = rng.integers(*TOKENS, ROWS)
        hardness = HARDNESS_SD * rng.standard_normal(ROWS)
        lasting, fresh = rng.standard_normal((2, TRIALS + 1, len(RUNGS), ROWS)) / 2**0.5
        taste = ROW_SD * (lasting[:, :1] + fresh)
        seed = SEED_SD * rng.standard_normal((TRIALS + 1, 1, 1))
        self.deviations = hardness + noise * (seed + taste)  # (trials, rungs, rows)

    def outcome(self, job: LaneJob) -> LaneOutcome:
        """Return how a job ends."""
        losses = self.curves[job.trial, job.rung] + self.deviations[job.trial, job.rung]
        sums = (losses * self.tokens)[: job.eval_rows]
        return LaneOutcome(
            trial=job.trial,
            rung=job.rung,
            state=TrialState.COMPLETE,
            evaluation=EvalResult(
                split="selection",
                loss_sums=tuple(sums.tolist()),
                label_counts=tuple(self.tokens[: job.eval_rows].tolist()),
                compute_dtype="float32",
            ),
        )


class Given:
    """Stands for sampler and space: proposes the study's configurations in their order.

    The half step gets its curve when the ladder asks for it: it depends on who leads.
    """

    anchors: tuple[object, ...] = ()
    step_bounds = (0.0, math.inf)

    def __init__(self, rng: np.random.Generator, *, curves: Floats) -> None:
        self.params = [
            SuggestedParams(
                rank=int(rank),
                alpha_ratio=1.0,
                lora_dropout=0.0,
                target_set="all-linear",
                effective_step=STEP_RATIO**number,
            )
            for number, rank in enumerate(rng.choice([8, 16, 32, 64], TRIALS))
        ]
        self.curves = curves  # of all that has been asked for
        self.told: dict[int, float] = {}
        self._rng = np.random.default_rng(rng.integers(2**32))

    @property
    def study(self) -> "Given":
        """The study that the half step is put into."""
        return self

    def get_trials(self, *, deepcopy: bool) -> list[SuggestedParams]:
        """Return what was proposed, and the half step when there is one."""
        return self.params

    def as_optuna(self, params: SuggestedParams) -> SuggestedParams:
        """Return a configuration as the study takes it."""
        return params

    def enqueue_trial(self, params: SuggestedParams, *, user_attrs: object) -> None:
        """Take in the half step, with a curve like its leader's."""
        steps = [other.effective_step for other in self.params]
        leader = self.curves[steps.index(2 * params.effective_step)]
        self.params.append(params)
        self.curves = np.vstack([self.curves, draw_half_step(leader, self._rng)])

    def propose(self, number: int) -> SuggestedParams:
        """Return the next of the configurations."""
        return self.params[number]

    def effective(self, params: SuggestedParams) -> TrialConfig:
        """Return what is trained for a proposal."""
        return TrialConfig(
            rank=params.rank,
            lora_alpha=32.0,
            lora_dropout=0.0,
            target_set=params.target_set,
            target_modules=("q_proj",),
            learning_rate=params.effective_step,
        )

    def origin(self, number: int) -> str:
        """Return who proposed it."""
        return "given" if number < TRIALS else HALF_STEP

    def is_told(self, number: int) -> bool:
        """Return whether the outcome is known here."""
        return number in self.told

    def tell(self, number: int, *, value: float, **outcome: object) -> None:
        """Take note of an outcome."""
        self.told[number] = value


def predict(config: TrialConfig) -> tuple[int, int]:
    """Return predicted bytes, which rise with the rank, and parameters."""
    return 16 * GIB + config.rank * GIB // 32, config.rank


def make_ladder(given: Given, *, half_step: bool) -> Ladder:
    """Return the product's ladder over the given configurations."""
    costs = RungCosts(
        rungs=RUNGS,
        cooldown_ratio=COOLDOWN_RATIO,
        effective_batch_size=16,
        gradient_checkpointing=False,
    )
    plan = LadderPlan(
        num_trials=TRIALS,
        rungs=RUNGS,
        warmup_steps=0,
        cooldown_ratio=COOLDOWN_RATIO,
        window=12,
        budget_bytes=24 * GIB,
        eval_rows=costs.eval_rows(ROWS, whole_at_last=True),
        half_step=half_step,
    )
    return Ladder(
        plan,
        given,  # type: ignore[arg-type]
        given,  # type: ignore[arg-type]
        records=(),
        save=lambda record: None,
        predict=predict,
        trial_folder=lambda number: Path(f"{number:04}"),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Study:
    """What a simulated study showed; regrets are relative."""

    regret_of_best_finalist: float
    regret_of_first_finalist: float
    cost: float
    cost_of_all_trained: float
    best_kept_at_rung_0: bool
    best_is_finalist: bool
    rank_correlation: float  # of the true losses at rung 0 and at the end
    seen_correlation: float  # of the loss seen at rung 0 with the true one at the end
    pairs_crossing: float  # share of pairs whose order at the end is not that of rung 0
    num_promoted: int  # from rung 0
    half_step_is_promoted: bool  # to the last rung
    half_step_is_best: bool  # of all


def run_study(seed: Sequence[int], *, noise: float, half_step: bool = False) -> Study:
    """Simulate one study; its curves are those of the seed, whatever the noise."""
    shapes, chance = (np.random.default_rng([*seed, part]) for part in range(2))
    given = Given(shapes, curves=draw_curves(shapes))
    executor = TableExecutor(given.curves, noise=noise, rng=chance)
    ladder = make_ladder(given, half_step=half_step)
    while jobs := ladder.next_jobs(8):
        executor.curves = given.curves
        for job in jobs:
            ladder.take(executor.outcome(job))
    finalists = [record.number for record in ladder.finalists(FINALISTS)]
    final = given.curves[:, -1]
    best, best_of_given = int(final.argmin()), int(final[:TRIALS].argmin())
    regrets = (final[finalists] - final[best]) / final[best]
    promoted = [number for number, record in ladder.records.items() if len(record.rungs) > 1]
    at_rung_0, at_end = given.curves[:TRIALS, 0], final[:TRIALS]
    return Study(
        regret_of_best_finalist=float(regrets.min()),
        regret_of_first_finalist=float(regrets[0]),
        cost=ladder.finished_steps() / (TRIALS * RUNGS[-1]),
        cost_of_all_trained=ladder.finished_steps() / (len(final) * RUNGS[-1]),
        best_kept_at_rung_0=best_of_given in promoted,
        best_is_finalist=best in finalists,
        rank_correlation=_spearman(at_rung_0, at_end),
        seen_correlation=_spearman([given.told[n] for n in range(TRIALS)], at_end),
        pairs_crossing=_crossing(at_rung_0, at_end),
        num_promoted=len(promoted),
        half_step_is_promoted=half_step and len(ladder.records[TRIALS].rungs) == len(RUNGS),
        half_step_is_best=best == TRIALS,
    )


def _spearman(first: Sequence[float] | Floats, second: Floats) -> float:
    found = spearman(list(first), list(second))
    assert found is not None
    return found


def _crossing(first: Floats, last: Floats) -> float:
    before, after = (np.sign(values[:, None] - values[None, :]) for values in (first, last))
    return float((before != after).sum() / (TRIALS * (TRIALS - 1)))


def summarize(noise: float, studies: Sequence[Study]) -> dict[str, Any]:
    """Return means, quantiles and shares of a regime."""

    def of(name: str) -> Floats:
        return np.array([getattr(study, name) for study in studies], dtype=np.float64)

    def spread(values: Floats) -> dict[str, float]:
        return {
            "mean": float(values.mean()),
            "standard_error": float(values.std(ddof=1) / len(values) ** 0.5),
            "p50": float(np.quantile(values, 0.5)),
            "p90": float(np.quantile(values, 0.9)),
            "max": float(values.max()),
        }

    low, high = CORRELATIONS
    in_range = (of("rank_correlation") >= low) & (of("rank_correlation") <= high)
    return {
        "noise": noise,
        "studies": len(studies),
        "regret_of_best_finalist": spread(of("regret_of_best_finalist")),
        "regret_of_first_finalist": spread(of("regret_of_first_finalist")),
        "cost": spread(of("cost")),
        "cost_of_all_trained": spread(of("cost_of_all_trained")),
        "best_kept_at_rung_0": float(of("best_kept_at_rung_0").mean()),
        "best_is_finalist": float(of("best_is_finalist").mean()),
        "rank_correlation": float(of("rank_correlation").mean()),
        "rank_correlation_sd": float(of("rank_correlation").std(ddof=1)),
        "seen_correlation": float(of("seen_correlation").mean()),
        "studies_in_range": int(in_range.sum()),
        "regret_of_best_finalist_in_range": float(of("regret_of_best_finalist")[in_range].mean())
        if in_range.any()
        else None,
        "pairs_crossing": float(of("pairs_crossing").mean()),
        "num_promoted": float(of("num_promoted").mean()),
        "half_step_is_promoted": float(of("half_step_is_promoted").mean()),
        "half_step_is_best": float(of("half_step_is_best").mean()),
    }


def cost_table() -> dict[str, float]:
    """Return planned costs as shares of training all trials fully."""

    def share(*, tie_seats: bool) -> float:
        steps = planned_steps(
            RUNGS, cooldown_ratio=COOLDOWN_RATIO, num_trials=TRIALS, tie_seats=tie_seats
        )
        return steps / (TRIALS * RUNGS[-1])

    with_ties, own_rung_0 = share(tie_seats=True), RUNGS[0] / (TRIALS * RUNGS[-1])
    return {
        "without_ties": share(tie_seats=False),
        "all_tie_seats": with_ties,
        "all_tie_seats_and_half_step": with_ties + own_rung_0,  # of its other rungs it takes a seat
    }


def table(regimes: Sequence[dict[str, Any]]) -> str:
    """Return the regimes as a Markdown table."""
    header = [
        "noise",
        "regret of the best finalist: mean, p90, max",
        "of the first",
        "cost: mean, max",
        "cost of all trained: mean, max",
    ]
    header += ["best kept at rung 0", "best is a finalist", "correlation true, seen", "crossing"]

    def percent(values: dict[str, float], *names: str) -> str:
        return ", ".join(f"{values[name]:.2%}" for name in names)

    rows = [
        [
            f"x{regime['noise']:g}",
            percent(regime["regret_of_best_finalist"], "mean", "p90", "max"),
            percent(regime["regret_of_first_finalist"], "mean", "p90", "max"),
            percent(regime["cost"], "mean", "max"),
            percent(regime["cost_of_all_trained"], "mean", "max"),
            f"{regime['best_kept_at_rung_0']:.1%}",
            f"{regime['best_is_finalist']:.1%}",
            f"{regime['rank_correlation']:.3f}, {regime['seen_correlation']:.3f}",
            f"{regime['pairs_crossing']:.1%}",
        ]
        for regime in regimes
    ]
    return markdown_table(header, rows)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description="Halving on learning curves that cross.")
    parser.add_argument("--studies", type=int, default=STUDIES, help="studies a regime")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--half-step", action="store_true", help="as search.half_step = true")
    parser.add_argument("--output", type=Path, default=RESULT)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Simulate, print and write the result."""
    options = parse(arguments)
    begin = time.perf_counter()
    half_step = options.half_step
    found = {
        noise: [
            run_study((options.seed, n), noise=noise, half_step=half_step)
            for n in range(options.studies)
        ]
        for noise in REGIMES
    }
    regimes = [summarize(noise, studies) for noise, studies in found.items()]
    result = describe_run("cpu") | {
        "seed": options.seed,
        "trials": TRIALS,
        "cooldown_ratio": COOLDOWN_RATIO,
        "half_step": half_step,
        "rungs": RUNGS,
        "rows": ROWS,
        "seconds": round(time.perf_counter() - begin, 1),
        "targets": TARGETS,
        "planned_cost": cost_table(),
        "regimes": regimes,
    }
    planned = cost_table()
    print(machine_line(result))
    print(f"\n{table(regimes)}\n")
    print(
        f"Planned cost {planned['without_ties']:.1%} without ties, {planned['all_tie_seats']:.1%} with all "
        f"tie seats, {planned['all_tie_seats_and_half_step']:.1%} with the half step as one of them."
    )
    write_result(options.output, result)


if __name__ == "__main__":
    main()
