"""Studies for the charts: many trials with a planted effect, and one that ran on a GPU."""

import math
import random
from dataclasses import replace

from report_studies import evaluation, finished_study, trial

from lora_tune.records import (
    LaneSpan,
    MemoryLog,
    MemoryReading,
    PackPeak,
    Point,
    RungResult,
    StudySnapshot,
    TrialRecord,
    TrialState,
)
from lora_tune.units import GIB

RANKS = (4, 8, 16, 32, 64, 128)
RATIOS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
DROPOUTS = (0.0, 0.05, 0.1)
SETS = ("attention-qv", "attention", "mlp", "all-linear")
BEST_STEP = 4e-4


def searched_study(num_trials: int, *, effect: float = 0.25, seed: int = 0) -> StudySnapshot:
    """Return a finished study of random trials, all at the first rung alone.

    The loss is ``effect`` times the squared distance of the effective step from ``BEST_STEP`` in decades,
    and noise: no other setting does anything. Every tenth trial diverged.
    """
    rng = random.Random(seed)
    trials = tuple(_searched_trial(number, rng, effect) for number in range(num_trials))
    return replace(finished_study(), trials=trials, confirmation=None)


def _searched_trial(number: int, rng: random.Random, effect: float) -> TrialRecord:
    rank, ratio = rng.choice(RANKS), rng.choice(RATIOS)
    step = math.exp(rng.uniform(math.log(3e-5), math.log(2e-3)))
    loss = 2.5 + effect * math.log10(step / BEST_STEP) ** 2 + rng.gauss(0, 0.01)
    diverged = number % 10 == 9
    state = "diverged" if diverged else "pruned"
    rate = 32 * step / (rank * ratio)
    row = (number, "tpe", state, 0 if diverged else 1, rank, ratio, rng.choice(DROPOUTS))
    record = trial((*row, rng.choice(SETS), rate, loss, ""))
    return replace(record, rungs=tuple(_searched_rung(number, loss) for _ in record.rungs))


def _searched_rung(number: int, loss: float) -> RungResult:
    result = evaluation(loss, seed=number)
    return RungResult(
        rung=0,
        steps=25,
        eval_loss=result.mean_loss,
        evaluation=result,
        points=tuple(
            Point(
                step=step,
                train_loss=loss + math.exp(-step / 10),
                learning_rate=1e-4,
                grad_norm=1.0,
                num_tokens=40 * step,
            )
            for step in range(1, 121)
        ),
        wall_s=10.0,
        num_tokens=4800,
        peak_bytes=int(2.9 * GIB),
        pack_lanes=4,
        span=LaneSpan(
            slot=number % 4, began_s=10.0 * (number // 4), ended_s=10.0 * (number // 4) + 9
        ),
    )


def gpu_study() -> StudySnapshot:
    """Return the finished study with the readings of five packs; the last one ran out of memory."""
    study = finished_study()
    plan = replace(study.lock.plan, device="cuda:0")
    readings = tuple(reading(number, share) for number, share in enumerate((0.99, 1.0, 1.02, 0.97)))
    last = reading(4, 1.1)
    readings = (*readings, replace(last, measured=replace(last.measured, out_of_memory=True)))
    return replace(
        study,
        lock=replace(study.lock, plan=plan),
        memory=MemoryLog(readings=readings, limits=()),
    )


def reading(number: int, share: float) -> MemoryReading:
    """Return a pack that took ``share`` times its estimate."""
    predicted = int((2.5 + 0.2 * number) * GIB)
    return MemoryReading(
        measured=PackPeak(
            device="RTX 4090",
            trials=tuple(range(number, number + 4)),
            steps=25,
            rows=32,
            max_length=256,
            num_labels=900,
            allocated_bytes=int(predicted * share),
            reserved_bytes=int(predicted * share * 1.06),
            process_bytes=int(predicted * share * 1.2),
            free_bytes=int(predicted * share),
        ),
        predicted_allocated_bytes=predicted,
        predicted_reserved_bytes=int(predicted * 1.05),
    )


def all_diverged_study() -> StudySnapshot:
    """Return a study of which every trial diverged before the first rung."""
    study = finished_study()
    trials = tuple(
        replace(t, state=TrialState.DIVERGED, rungs=(), repeats=None) for t in study.trials[:12]
    )
    return replace(study, trials=trials, confirmation=None)
