"""Small evaluations and candidates for the tests of statistics."""

from collections.abc import Sequence

import numpy as np

from lora_tune.records import EvalResult
from lora_tune.stats.selection import CandidateRuns
from lora_tune.units import GIB


def evaluation(
    losses: Sequence[float], counts: Sequence[int] | None = None, *, split: str = "confirmation"
) -> EvalResult:
    """Return an evaluation from each row's loss per token; one token a row unless told."""
    tokens = tuple(counts or (1,) * len(losses))
    return EvalResult(
        split=split,
        loss_sums=tuple(float(loss) * n for loss, n in zip(losses, tokens, strict=True)),
        label_counts=tokens,
        compute_dtype="float32",
    )


def noisy_runs(
    name: str,
    loss: float,
    *,
    rows: int = 200,
    seeds: int = 3,
    row_sd: float = 0.02,
    seed_sd: float = 0.0005,
    memory: float = 10.0,
    step_s: float = 1.0,
    rank: int = 16,
    dropout: float = 0.0,
    salt: int = 0,
    shifts: Sequence[float] | None = None,
) -> CandidateRuns:
    """Return a candidate whose losses scatter around ``loss`` over rows and seeds.

    Rows are as hard for one candidate as for the next; noise is drawn by name and ``salt``. With
    ``shifts`` the seeds differ by these instead of at random.
    """
    hard = np.random.default_rng(7).normal(0.0, 0.5, rows)
    counts = np.random.default_rng(8).integers(8, 60, rows).tolist()
    own = np.random.default_rng([salt, *name.encode()])
    taste = own.normal(0.0, row_sd, rows)
    moved = own.normal(0.0, seed_sd, seeds) if shifts is None else shifts
    taste -= np.average(taste, weights=counts)
    hard -= np.average(hard, weights=counts)
    return CandidateRuns(
        name=name,
        evaluations=tuple(evaluation(loss + hard + taste + shift, counts) for shift in moved),
        peak_bytes=int(memory * GIB),
        step_s=step_s,
        rank=rank,
        lora_dropout=dropout,
    )
