"""Records as the runs, lines and values that trackers show; texts are redacted."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass

from lora_tune.records import (
    Candidate,
    ConfirmationRun,
    Decision,
    EvalResult,
    LaneOutcome,
    Point,
    RungResult,
    StudyLock,
    TrialConfig,
    TrialRecord,
)
from lora_tune.redaction import redact
from lora_tune.search.plan import hold_step_of

Scalar = str | int | float | bool

# Of a configuration: the target set stands for the modules, and all trials of a search have the same seeds.
_LEFT_OUT = ("target_modules", "init_seed", "dropout_seed", "data_seed")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrackedRun:
    """A run as the trackers show it."""

    name: str  # "trial-0007", "confirm-trial-7-seed-0" or "study"
    kind: str  # "search", "confirmation" or "study"
    config: Mapping[str, Scalar]


@dataclass(frozen=True, slots=True)
class Line:
    """Values at an optimizer step of a run."""

    step: int
    values: Mapping[str, float]


def point_lines(points: Iterable[Point], *, steps: int, cooldown_ratio: float) -> Iterator[Line]:
    """Yield the points of a segment; those of the cool-down, which no later rung goes on from, apart."""
    hold_step = hold_step_of(steps, cooldown_ratio)
    for point in points:
        branch = "train" if point.step <= hold_step else "cooldown"
        values = {
            "loss": point.train_loss,
            "learning_rate": point.learning_rate,
            "grad_norm": point.grad_norm,
            "tokens": point.num_tokens,
        }
        yield Line(point.step, {f"{branch}/{name}": value for name, value in values.items()})


def trial_run(record: TrialRecord, lock: StudyLock) -> TrackedRun:
    """Return the run of a trial of the search."""
    config = {
        **_config_of(record.config, lock),
        "trial": record.number,
        "origin": record.origin,
        "predicted_bytes": record.predicted_bytes,
        "trainable_parameters": record.trainable_parameters,
    }
    return TrackedRun(name=f"trial-{record.number:04d}", kind="search", config=config)


def confirmation_run(candidate: Candidate, run: ConfirmationRun, lock: StudyLock) -> TrackedRun:
    """Return the run of one training of a candidate with a fresh seed."""
    config = {
        **_config_of(candidate.config, lock),
        "candidate": candidate.name,
        "seed": run.seed,
        "predicted_bytes": candidate.predicted_bytes,
        "trainable_parameters": candidate.trainable_parameters,
    }
    name = f"confirm-{candidate.name.replace(' ', '-')}-seed-{run.seed}"
    return TrackedRun(name=name, kind="confirmation", config=config)


def study_run(lock: StudyLock) -> TrackedRun:
    """Return the run that holds the decision."""
    config = {
        **_of_study(lock),
        "data_sha256": lock.data.sha256,
        "created": lock.created,
        "lanes": lock.plan.lanes,
        "compute_dtype": lock.plan.compute_dtype,
    }
    return TrackedRun(name="study", kind="study", config=config)


def _config_of(config: TrialConfig, lock: StudyLock) -> dict[str, Scalar]:
    """Return what is trained."""
    values = {name: value for name, value in asdict(config).items() if name not in _LEFT_OUT}
    return {**_of_study(lock), **values, "scaling": config.scaling}


def _of_study(lock: StudyLock) -> dict[str, Scalar]:
    base = lock.model.hub_id or redact(lock.model.base)
    return {"study": lock.name, "base_model": base, "quantization": lock.model.quantization}


def rung_line(result: RungResult) -> Line:
    """Return what a trial showed at the end of a rung."""
    values = result_values(result.evaluation, result.peak_bytes, result.wall_s)
    return Line(result.steps, {**values, "eval/rung": result.rung})


def early_end(outcome: LaneOutcome) -> list[Line]:
    """Return the last reading of a segment that was never evaluated; nothing when it never began."""
    if not outcome.points:
        return []
    return [Line(outcome.points[-1].step, _cost(outcome.peak_bytes, outcome.wall_s))]


def result_values(evaluation: EvalResult, peak_bytes: int, wall_s: float) -> dict[str, float]:
    """Return the loss of an evaluation with what the segment before it cost."""
    return {"eval/loss": evaluation.mean_loss, **_cost(peak_bytes, wall_s)}


def _cost(peak_bytes: int, wall_s: float) -> dict[str, float]:
    return {"cost/peak_gib": peak_bytes / 1024**3, "cost/wall_s": wall_s}


def decision_values(decision: Decision) -> dict[str, float]:
    """Return the confirmed loss of the chosen candidate, nats per target token, with its 95 % interval."""
    chosen = next(score for score in decision.scores if score.candidate == decision.chosen)
    return {
        "confirmed/loss": chosen.loss,
        "confirmed/low": chosen.low,
        "confirmed/high": chosen.high,
    }
