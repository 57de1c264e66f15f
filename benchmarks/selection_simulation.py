"""Synthetic confirmations with known truth through the real decision: how often is it wrong?

    python benchmarks/selection_simulation.py                # all regimes, about ten minutes
    python benchmarks/selection_simulation.py --small        # a few studies a regime, for a look

A study here is a set of configurations of which the search sees one noisy score each (so the
finalists are lucky: the winner's curse), and a confirmation of finalists and default with fresh
seeds on fresh rows, which ``lora_tune.stats.selection.decide`` judges. Nothing is trained.

Loss of candidate c, seed s, row i in nats a token, with n_i tokens drawn from 8 to 60:

    2 + delta_c + hardness_i + own_ci + run_csi + shift_cs

hardness (SD 0.5) is common to all; own (a candidate's taste in rows) and run (a run's taste in rows) have
half the variance each of what two runs differ by in a row, 0.05, usual for adapters of one base; shift is
the seed. Seed noise is a multiple of the *example error*, the error that rows alone give the
difference of two runs. Costs are drawn at random and tell nothing of the loss; in half of the studies
the default is what it is in practice, nearly the cheapest.

With a single seed an interval speaks of the adapters that were trained, so their losses are the truth.

What is counted, always against the truth and never against the estimate:

worse at all          the configuration chosen has a higher true loss than the default
worse beyond noise    ... by more than 1.96 times the true standard error of the confirmed difference
worse beyond margin   ... by more than the practical margin (0.5 %)
harm                  ... by more than both
coverage              95 % intervals that hold the truth: of a pair named before the confirmation (first
                      finalist, default), of the best against the default, of the chosen one's score
optimism              true loss less reported score of the chosen one, in its standard errors
claimed gain          the same of the best's difference with the default, in all studies and in those
                      with the verdict "better": the best of several is flattered, and this says by how much
said better | clear   verdict "better" where the best finalist truly leads the default by over twice the
                      margin and over four true standard errors
"""

import argparse
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from machine import describe_run, machine_line, markdown_table, write_result
from numpy.typing import NDArray

from lora_tune.records import EvalResult, Verdict
from lora_tune.stats.run_losses import RunLosses
from lora_tune.stats.selection import CandidateRuns, decide
from lora_tune.units import GIB

Floats = NDArray[np.float64]

RESULT = Path(__file__).parent / "results" / "selection-simulation.json"
STUDIES = 300  # of each surface in each regime
BASE_LOSS = 2.0
HARDNESS_SD = 0.5
SIGMA_D = 0.05  # nats a token, of a row in the difference of two runs
RUN_SHARE = 0.5  # of SIGMA_D's variance, what another seed of the same configuration would change
PRACTICAL_MARGIN = 0.005
CONFIGURATIONS = 24
CLUSTER_CORRELATION = 0.5
RANKS = (4, 8, 16, 32, 64, 128)
BOOTSTRAP_SEEDS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Noise:
    """How a confirmation errs."""

    rows: int = 300
    seed_ratio: float = (
        1.0  # SD of a run's loss by seed / error that rows give a difference of runs
    )
    seeds: int = 3
    finalists: int = 2
    cluster_size: int = 1
    heavy_tails: bool = False  # Student's t with 3 degrees of freedom, of the same variance
    seed_correlation: float = 0.0  # of what a seed does to two candidates
    first_finalist_seed: float = (
        1.0  # its seed noise as a multiple of the others', as near divergence
    )

    @property
    def name(self) -> str:
        """The regime as a line of the table."""
        parts = [f"{self.rows} rows", f"seed {self.seed_ratio:g}x"]
        parts += [f"{self.seeds} seeds", f"{self.finalists} finalists"]
        parts += [f"clusters of {self.cluster_size}"] if self.cluster_size > 1 else []
        parts += ["heavy tails"] if self.heavy_tails else []
        parts += [f"seeds correlated {self.seed_correlation:g}"] if self.seed_correlation else []
        noisy = self.first_finalist_seed
        parts += [f"first finalist's seeds {noisy:g}x"] if noisy != 1 else []
        return ", ".join(parts)

    @property
    def example_error(self) -> float:
        """Expected error that rows alone give the difference of two runs."""
        tokens = np.arange(8, 61)
        unequal = np.mean(tokens**2) / np.mean(tokens) ** 2
        alike = 1 + (self.cluster_size - 1) * CLUSTER_CORRELATION * _cluster_share(tokens)
        return SIGMA_D * math.sqrt(unequal * alike / self.rows)

    @property
    def seed_sds(self) -> Floats:
        """Standard deviation of a run's loss by its seed, finalists first, then the default."""
        found: Floats = np.full(self.finalists + 1, self.seed_ratio * self.example_error)
        found[0] *= self.first_finalist_seed
        return found

    def true_error(self, candidate: int) -> float:
        """Return the true standard error of a candidate's confirmed difference from the default."""
        rows = self.example_error**2 * (1 - RUN_SHARE + RUN_SHARE / self.seeds)
        if self.seeds == 1:
            return math.sqrt(rows)
        first, second = float(self.seed_sds[candidate]), float(self.seed_sds[-1])
        seeds = first**2 + second**2 - 2 * self.seed_correlation * first * second
        return math.sqrt(rows + seeds / self.seeds)


@dataclass(frozen=True, slots=True, kw_only=True)
class Surface:
    """True losses of the configurations that the search tries, relative to the default."""

    name: str
    gain: float  # of the best possible over the default, relative
    spread: float  # configurations are worse than that by an exponential of this mean, relative

    @property
    def nothing_better(self) -> bool:
        """Whether no configuration is better than the default."""
        return self.gain == 0


SURFACES = (
    Surface(name="flat", gain=0.0, spread=0.0),
    Surface(name="default best", gain=0.0, spread=0.01),
    Surface(name="gain 0.3 %", gain=0.003, spread=0.01),
    Surface(name="gain 1 %", gain=0.01, spread=0.01),
    Surface(name="gain 5 %", gain=0.05, spread=0.02),
)


def noise_regimes() -> tuple[Noise, ...]:
    """Return the regimes: rows and seed noise, seeds and finalists, clusters, tails, correlated seeds."""
    ratios = (0.25, 1.0, 4.0)
    rows = [Noise(rows=n, seed_ratio=ratio) for n in (100, 300, 1000) for ratio in ratios]
    shapes = [(2, 1), (2, 2), (2, 3), (3, 1), (3, 3)]
    sizes = [
        Noise(seeds=seeds, finalists=finalists, seed_ratio=ratio)
        for seeds, finalists in shapes
        for ratio in ratios
    ]
    few = [Noise(rows=100, seeds=2, finalists=1, seed_ratio=ratio) for ratio in ratios]
    clustered = [
        Noise(rows=n, cluster_size=5, seed_ratio=ratio)
        for n, ratio in ((100, 0.25), (300, 1.0), (1000, 1.0), (1000, 4.0))
    ]
    heavy = [
        Noise(rows=n, heavy_tails=True, seed_ratio=ratio)
        for n, ratio in ((100, 0.25), (100, 1.0), (300, 1.0), (1000, 4.0))
    ]
    alike = [Noise(seed_ratio=4.0, seed_correlation=0.5)]
    alike += [replace(alike[0], seeds=s, finalists=f) for s, f in ((2, 1), (2, 2), (3, 3))]
    noisy = [
        Noise(first_finalist_seed=4.0, seeds=seeds, finalists=finalists)
        for seeds, finalists in ((3, 1), (3, 2), (2, 2))
    ]
    single = [Noise(rows=n, seeds=1, seed_ratio=1.0) for n in (100, 1000)]
    return (*rows, *sizes, *few, *clustered, *heavy, *alike, *noisy, *single)


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyOutcome:
    """What the decision said in one study, beside the truth."""

    deficit: float  # true loss of the chosen less the default's, nats per token
    error: float  # true standard error of that difference as confirmed
    gain: float  # of the truly best finalist over the default, nats per token
    gain_error: float  # true standard error of it
    nothing_better: bool  # no configuration of the surface is better than the default
    verdict: Verdict
    covers_pair: bool
    covers_best: bool
    covers_score: bool
    optimism: float  # standard errors
    claimed_optimism: float  # standard errors


def run_study(
    noise: Noise, surface: Surface, *, bootstrap_seed: int, rng: np.random.Generator
) -> StudyOutcome:
    """Search, confirm and decide once."""
    deltas = np.append(_finalists(noise, surface, rng), 0.0)  # the default is the last
    shifts_KS = _seed_shifts(noise, rng)
    evaluations = _confirm(noise, deltas[:, None] + shifts_KS, rng)
    if noise.seeds == 1:
        deltas = deltas + shifts_KS[:, 0]
    names = [f"trial {number}" for number in range(noise.finalists)] + ["default"]
    places = {name: place for place, name in enumerate(names)}
    clusters = _clusters(noise) if noise.cluster_size > 1 else ()
    decision = decide(
        _with_costs(names, evaluations, rng),
        default="default",
        practical_margin=PRACTICAL_MARGIN,
        clusters=clusters,
        seed=bootstrap_seed,
    )
    losses = RunLosses(evaluations, clusters=clusters, seed=bootstrap_seed)
    means = losses.losses.mean(axis=1)
    half = losses.difference_error(0, noise.finalists).half_width()
    chosen = places[decision.chosen]
    score = next(s for s in decision.scores if s.candidate == decision.chosen)
    truth = BASE_LOSS + deltas[chosen]
    against = decision.against_default
    assert against is not None
    lead = deltas[places[against.candidate]] - deltas[-1]
    winner = int(deltas[:-1].argmin())
    return StudyOutcome(
        deficit=float(deltas[chosen] - deltas[-1]),
        error=noise.true_error(chosen),
        gain=float(deltas[-1] - deltas[winner]),
        gain_error=noise.true_error(winner),
        nothing_better=surface.nothing_better and noise.seeds > 1,
        verdict=decision.verdict,
        covers_pair=bool(abs(means[0] - means[-1] - (deltas[0] - deltas[-1])) <= half),
        covers_best=bool(against.low <= lead <= against.high),
        covers_score=bool(score.low <= truth <= score.high),
        optimism=float((truth - score.loss) / score.standard_error),
        claimed_optimism=float((lead - against.difference) / against.standard_error),
    )


def _finalists(noise: Noise, surface: Surface, rng: np.random.Generator) -> Floats:
    """Return the true differences from the default of those that one noisy score each puts first."""
    worse = rng.exponential(surface.spread, CONFIGURATIONS) if surface.spread else 0.0
    deltas: Floats = BASE_LOSS * (worse - surface.gain) + np.zeros(CONFIGURATIONS)
    luck = noise.example_error * math.hypot(math.sqrt(0.5), noise.seed_ratio)
    seen = deltas + rng.normal(0.0, luck, CONFIGURATIONS)
    return deltas[np.argsort(seen)[: noise.finalists]]


def _seed_shifts(noise: Noise, rng: np.random.Generator) -> Floats:
    """Return what each seed adds to each candidate's loss, of shape (candidates, seeds)."""
    common = noise.seed_correlation
    drawn = math.sqrt(common) * rng.normal(size=(1, noise.seeds))
    drawn = drawn + math.sqrt(1 - common) * rng.normal(size=(noise.finalists + 1, noise.seeds))
    shifts: Floats = noise.seed_sds[:, None] * drawn
    return shifts


def _confirm(
    noise: Noise, truth_KS: Floats, rng: np.random.Generator
) -> tuple[tuple[EvalResult, ...], ...]:
    """Return the evaluations of every candidate and seed on one draw of rows.

    ``truth_KS`` is what each run's loss differs from ``BASE_LOSS`` by on rows without number.
    """
    (candidates, seeds), rows = truth_KS.shape, noise.rows
    tokens = rng.integers(8, 61, rows)
    taste = SIGMA_D / math.sqrt(2)
    own = taste * math.sqrt(1 - RUN_SHARE) * _row_noise(noise, (candidates, 1, rows), rng)
    run = taste * math.sqrt(RUN_SHARE) * _row_noise(noise, (candidates, seeds, rows), rng)
    hardness = HARDNESS_SD * _row_noise(noise, (1, 1, rows), rng)
    losses = (BASE_LOSS + truth_KS[:, :, None] + hardness + own + run) * tokens
    counts = tuple(tokens.tolist())
    return tuple(tuple(_evaluation(row, counts) for row in candidate) for candidate in losses)


def _row_noise(noise: Noise, shape: tuple[int, ...], rng: np.random.Generator) -> Floats:
    """Return draws of unit variance, correlated within clusters where there are any."""

    def draw(size: tuple[int, ...]) -> Floats:
        if noise.heavy_tails:
            return rng.standard_t(3, size) / math.sqrt(3)
        return rng.normal(size=size)

    if noise.cluster_size == 1:
        return draw(shape)
    clusters = math.ceil(shape[-1] / noise.cluster_size)
    shared = draw((*shape[:-1], clusters))[..., list(_clusters(noise))]
    mixed: Floats = math.sqrt(CLUSTER_CORRELATION) * shared
    return mixed + math.sqrt(1 - CLUSTER_CORRELATION) * draw(shape)


def _clusters(noise: Noise) -> tuple[int, ...]:
    return tuple(row // noise.cluster_size for row in range(noise.rows))


def _cluster_share(tokens: NDArray[np.int64]) -> float:
    """Return E(n)**2 / E(n**2): pairs within a cluster weigh by the product of their tokens."""
    return float(np.mean(tokens) ** 2 / np.mean(tokens**2))


def _evaluation(loss_sums: Floats, counts: tuple[int, ...]) -> EvalResult:
    return EvalResult(
        split="confirmation",
        loss_sums=tuple(loss_sums.tolist()),
        label_counts=counts,
        compute_dtype="float32",
    )


def _with_costs(
    names: Sequence[str],
    evaluations: Sequence[tuple[EvalResult, ...]],
    rng: np.random.Generator,
) -> list[CandidateRuns]:
    """Give candidates costs that say nothing of their loss; half of the defaults adapt least."""
    found = []
    for name, runs in zip(names, evaluations, strict=True):
        targets, rank = int(rng.integers(4)), int(rng.choice(RANKS))
        if name == "default" and rng.random() < 0.5:
            targets, rank = 0, 16
        found.append(
            CandidateRuns(
                name=name,
                evaluations=runs,
                peak_bytes=int((10 + 0.7 * targets + 0.01 * rank) * GIB),
                step_s=1.0 + 0.08 * targets,
                rank=rank,
                lora_dropout=0.0,
            )
        )
    return found


def summarize(outcomes: Sequence[StudyOutcome]) -> dict[str, float | int | None]:
    """Return rates over studies; a rate without a study to count is None."""
    margin = PRACTICAL_MARGIN * BASE_LOSS
    clear = [o for o in outcomes if o.gain > max(2 * margin, 4 * o.gain_error)]
    nothing = [o for o in outcomes if o.nothing_better]
    return {
        "studies": len(outcomes),
        "worse_at_all": _rate([o.deficit > 0 for o in outcomes]),
        "worse_beyond_noise": _rate([o.deficit > 1.96 * o.error for o in outcomes]),
        "worse_beyond_margin": _rate([o.deficit > margin for o in outcomes]),
        "harm": _rate([o.deficit > max(margin, 1.96 * o.error) for o in outcomes]),
        "coverage_pair": _rate([o.covers_pair for o in outcomes]),
        "coverage_best": _rate([o.covers_best for o in outcomes]),
        "coverage_score": _rate([o.covers_score for o in outcomes]),
        "optimism": _rate([o.optimism for o in outcomes]),
        "claimed_optimism": _rate([o.claimed_optimism for o in outcomes]),
        "claimed_optimism_of_better": _rate(
            [o.claimed_optimism for o in outcomes if o.verdict is Verdict.BETTER]
        ),
        "nothing_better_studies": len(nothing),
        "not_better_said": _rate([o.verdict is not Verdict.BETTER for o in nothing]),
        "clear_studies": len(clear),
        "better_said_of_clear": _rate([o.verdict is Verdict.BETTER for o in clear]),
        "better_said": _rate([o.verdict is Verdict.BETTER for o in outcomes]),
        "worse_said": _rate([o.verdict is Verdict.WORSE for o in outcomes]),
    }


def _rate(values: Sequence[bool] | Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None


def simulate(
    regimes: Sequence[Noise], *, studies: int, seed: int = 0
) -> Iterator[tuple[Noise, Surface, list[StudyOutcome]]]:
    """Yield the outcomes of every regime and surface."""
    for place, noise in enumerate(regimes):
        for other, surface in enumerate(SURFACES):
            rng = np.random.default_rng((seed, place, other))
            yield (
                noise,
                surface,
                [
                    run_study(noise, surface, bootstrap_seed=number % BOOTSTRAP_SEEDS, rng=rng)
                    for number in range(studies)
                ],
            )


Cell = tuple[Noise, Surface, list[StudyOutcome]]


def summary_of(cells: Sequence[Cell]) -> dict[str, float | int | None]:
    """Return the rates over several regimes and surfaces."""
    return summarize([outcome for _, _, outcomes in cells for outcome in outcomes])


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A rate and where it has to be."""

    key: str
    low: float
    high: float
    count: str = "studies"  # what it is a rate of

    @property
    def text(self) -> str:
        """The range."""
        return f"{self.low:g} to {self.high:g}"

    def missed_by(self, value: float) -> float:
        """Return how far a value is outside, 0 inside."""
        return max(self.low - value, value - self.high, 0.0)


TARGETS = (
    Target(key="worse_beyond_noise", low=0.0, high=0.01),
    Target(key="coverage_pair", low=0.93, high=0.97),
    Target(key="coverage_best", low=0.93, high=0.97),
    Target(key="coverage_score", low=0.93, high=0.97),
    Target(key="optimism", low=-math.inf, high=0.2),
    Target(key="not_better_said", low=0.95, high=1.0, count="nothing_better_studies"),
)

COLUMNS = {
    "studies": "studies",
    "worse_at_all": "worse at all %",
    "worse_beyond_noise": "beyond noise %",
    "worse_beyond_margin": "beyond margin %",
    "harm": "harm %",
    "coverage_pair": "coverage pair %",
    "coverage_best": "best %",
    "coverage_score": "score %",
    "optimism": "optimism SE",
    "claimed_optimism": "claimed gain SE",
    "claimed_optimism_of_better": "if better said SE",
    "not_better_said": "not better said, nothing better %",
    "better_said_of_clear": "better said, clear %",
}


def table(rows: dict[str, dict[str, float | int | None]], head: str) -> str:
    """Return the Markdown table of summaries by name."""
    return markdown_table(
        [head, *COLUMNS.values()],
        [[name, *(_cell(key, summary[key]) for key in COLUMNS)] for name, summary in rows.items()],
    )


def _cell(key: str, value: float | int | None) -> str:
    if value is None:
        return "-"
    if key == "studies":
        return str(value)
    return f"{value:+.2f}" if "optimism" in key else f"{100 * value:.1f}"


def report(cells: Sequence[Cell]) -> dict[str, dict[str, dict[str, float | int | None]]]:
    """Return the summaries of everything: all studies, by surface, by noise, and by both."""
    surfaces = {surface.name: surface for _, surface, _ in cells}
    noises = {noise.name: noise for noise, _, _ in cells}
    return {
        "all": {"all": summary_of(cells)},
        "by_surface": {n: summary_of([c for c in cells if c[1] is s]) for n, s in surfaces.items()},
        "by_noise": {n: summary_of([c for c in cells if c[0] is s]) for n, s in noises.items()},
        "by_both": {f"{c[0].name}; {c[1].name}": summary_of([c]) for c in cells},
    }


def shortfalls(found: dict[str, dict[str, dict[str, float | int | None]]]) -> list[str]:
    """Return what misses a target, over everything and in each regime of noise, as sentences.

    What depends on the true losses, worse beyond noise, is held to its target for each of these too.
    A miss by less than two standard errors of the simulation itself is marked.
    """
    lines = []
    for key in ("all", "by_noise", "by_both"):
        for regime, summary in found[key].items():
            for target in TARGETS[:1] if key == "by_both" else TARGETS:
                value = summary[target.key]
                if value is None or not target.missed_by(value):
                    continue
                spread = value * (1 - value) if 0 <= value <= 1 else 1.0
                error = math.sqrt(spread / (summary[target.count] or 1))
                doubt = (
                    " (within the simulation's error)"
                    if target.missed_by(value) < 2 * error
                    else ""
                )
                lines.append(f"{regime}: {target.key} {value:.4f}, not in {target.text}{doubt}")
    return lines


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--small", action="store_true", help="ten studies of each surface and regime"
    )
    parser.add_argument(
        "--studies", type=int, help=f"of each surface and regime; default {STUDIES}"
    )
    parser.add_argument("--seed", type=int, default=0, help="of all draws")
    parser.add_argument("--output", type=Path, default=RESULT, help="result file")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Simulate, print and write the result."""
    options = parse(arguments)
    studies = options.studies or (10 if options.small else STUDIES)
    begin = time.perf_counter()
    cells = list(simulate(noise_regimes(), studies=studies, seed=options.seed))
    found = report(cells)
    result = describe_run("cpu") | {
        "studies_of_each": studies,
        "seed": options.seed,
        "practical_margin": PRACTICAL_MARGIN,
        "surfaces": [asdict(surface) for surface in SURFACES],
        "regimes": [asdict(noise) for noise in noise_regimes()],
        "seconds": round(time.perf_counter() - begin, 1),
        **found,
    }
    result["shortfalls"] = missed = shortfalls(found)
    print(machine_line(result))
    for key, head in (("all", ""), ("by_surface", "true losses"), ("by_noise", "noise")):
        print(f"\n{table(found[key], head)}")
    print(f"\nOutside its target, by the estimate from {studies} studies a surface:")
    print("\n".join(f"- {line}" for line in missed) or "nothing")
    write_result(options.output, result)


if __name__ == "__main__":
    main()
