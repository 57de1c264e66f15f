"""Are learning rate and alpha ratio two settings or one? Least squares on a study's own trials.

LoRA multiplies what the learning rate moves by lora_alpha / rank, so the two act mostly through their
product. Models of the first rung's loss, each with the terms of the one before:

    rank:   1, log r
    step:   ... and log u, (log u)**2    with u = learning_rate * lora_alpha / 32, the effective step
    ratio:  ... and log q, (log q)**2    with q = lora_alpha / rank; of two ratios log q alone

If the last adds nothing, the ratio is redundant with the learning rate on these data.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import log

import numpy as np
from scipy.special import fdtrc

from lora_tune.records import TrialRecord, TrialState
from lora_tune.stats.paired import Floats

MIN_TRIALS = 12  # six terms and as many left to tell the error from
REFERENCE_ALPHA = 32.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Redundancy:
    """Shares of the variance of the first rung's losses, adjusted for the number of terms.

    A share can be slightly below zero: then the terms explain less than chance would.
    """

    num_trials: int
    rank: float  # explained by rank alone
    step: float  # added by the effective step
    ratio: float  # added by the alpha ratio beyond both
    p_value: float  # of the ratio adding nothing


def ratio_redundancy(trials: Sequence[TrialRecord]) -> Redundancy | None:
    """Return how much the alpha ratio explains beyond the effective step.

    Trials that reached the end of the first rung count once each, by what was really trained. None
    with fewer than 12 of them, or if loss, step or ratio is not varied enough to fit the models: with
    one lora_alpha for all, the ratio is the rank.

    Source: the F test of nested linear models, e.g. Draper and Smith, Applied Regression Analysis, chapter 6.
    """
    used = [t for t in trials if t.rungs and t.state is not TrialState.CACHED]
    if len(used) < MIN_TRIALS:
        return None
    losses = np.asarray([trial.rungs[0].eval_loss for trial in used])
    terms = np.asarray([_terms(trial) for trial in used])
    models = [terms[:, :1], terms[:, :2], terms[:, :4], terms]
    if np.ptp(losses) == 0 or not _is_varied(terms):
        return None
    errors = [_squares(model, losses) for model in models]
    free = [len(used) - int(np.linalg.matrix_rank(_scaled(model[:, 1:]))) - 1 for model in models]
    shares = [1 - (e / f) / (errors[0] / free[0]) for e, f in zip(errors, free, strict=True)]
    return Redundancy(
        num_trials=len(used),
        rank=float(shares[1]),
        step=float(shares[2] - shares[1]),
        ratio=float(shares[3] - shares[2]),
        p_value=_f_test(errors[2], errors[3], terms=free[2] - free[3], free=free[3]),
    )


def _terms(trial: TrialRecord) -> tuple[float, ...]:
    config = trial.config
    step = log(config.learning_rate * config.lora_alpha / REFERENCE_ALPHA)
    ratio = log(config.lora_alpha / config.rank)
    return (1.0, log(config.rank), step, step**2, ratio, ratio**2)


def _is_varied(terms: Floats) -> bool:
    """Return whether the step varies beyond the rank, and the ratio beyond both; the rank may be one."""
    columns = _scaled(terms[:, 1:])
    has_rank = int(columns[:, 0].any())
    ranks = [int(np.linalg.matrix_rank(columns[:, :count])) for count in (3, 4)]
    return ranks == [has_rank + 2, has_rank + 3]


def _scaled(columns: Floats) -> Floats:
    """Return the columns with mean 0 and deviation 1; a constant one stays 0 and lowers the rank."""
    centred = columns - columns.mean(axis=0)
    spread = centred.std(axis=0)
    scaled: Floats = centred / np.where(spread > 1e-12, spread, np.inf)
    return scaled


def _squares(terms: Floats, losses: Floats) -> float:
    """Return the squared residuals of least squares."""
    fitted = terms @ np.linalg.lstsq(terms, losses, rcond=None)[0]
    return float(((losses - fitted) ** 2).sum())


def _f_test(without: float, with_ratio: float, *, terms: int, free: int) -> float:
    if with_ratio <= 0:
        return 1.0 if without <= 0 else 0.0
    statistic = max(0.0, without - with_ratio) / terms / (with_ratio / free)
    return float(fdtrc(terms, free, statistic))
