"""How fine a difference the evaluation rows of a rung can tell, measured on the study's own trials."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite, sqrt
from statistics import median

from lora_tune.records import EvalResult
from lora_tune.stats.paired import paired_difference
from lora_tune.stats.power import rows_needed, smallest_visible_difference

LEAST_PAIRS = 2  # comparisons with the best, below which nothing is said


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationPower:
    """What the rows of one rung see, of trials that each trained once; nats per target token."""

    num_rows: int
    sigma_d: float  # of the per-row difference of two trials, in the middle of those compared
    smallest_visible: float  # with 80 % power at 5 %
    wanted: float
    rows_needed: int | None  # to see ``wanted``; None when that is 0


def evaluation_power(
    evaluations: Sequence[EvalResult], *, wanted: float, clusters: Sequence[int] = ()
) -> EvaluationPower | None:
    """Return what the rows can tell, from the better half of the trials against the best of them.

    Bad trials differ from the best by other amounts in every row, and nobody asks about them. None with
    fewer than two comparisons, or rows that show no spread.

    Args:
        evaluations: Of one rung, one a trial, over the same rows.
        wanted: Difference that one would like to see, nats per target token.
        clusters: Cluster number of every row; empty: every row is its own.
    """
    ordered = sorted(evaluations, key=lambda found: found.mean_loss)
    if len(ordered) <= LEAST_PAIRS:
        return None
    better = ordered[1 : max(1 + LEAST_PAIRS, (len(ordered) + 1) // 2)]
    pairs = [paired_difference(other, ordered[0], clusters=clusters) for other in better]
    errors = [pair.standard_error for pair in pairs if isfinite(pair.standard_error)]
    if len(errors) < LEAST_PAIRS or not median(errors) > 0:
        return None
    rows = pairs[0].num_rows
    sigma_d = median(errors) * sqrt(rows)
    return EvaluationPower(
        num_rows=rows,
        sigma_d=sigma_d,
        smallest_visible=smallest_visible_difference(
            sigma_d=sigma_d, num_rows=rows, row_degrees=max(1, pairs[0].num_clusters - 1)
        ),
        wanted=wanted,
        rows_needed=rows_needed(wanted, sigma_d=sigma_d),
    )
