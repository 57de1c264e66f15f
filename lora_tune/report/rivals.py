"""The best trial so far beside the next and the best anchor: what is known before the confirmation."""

from collections.abc import Sequence
from dataclasses import dataclass

from lora_tune.records import EvalResult, RungResult, StudySnapshot, TrialRecord
from lora_tune.report.ranking import is_candidate, result_at
from lora_tune.report.resolved import spec_value
from lora_tune.stats.ratio import ratio_estimate
from lora_tune.stats.student import t_quantile_975


@dataclass(frozen=True, slots=True, kw_only=True)
class PairedComparison:
    """The leader against another trial at one rung, on the same selection rows.

    ``z`` is lead / standard error. It is not corrected for the number of trials tried.
    """

    trial: int
    origin: str
    rung: int
    steps: int
    leader_loss: float
    trial_loss: float
    lead: float  # trial_loss - leader_loss: above 0, the leader is better
    standard_error: float | None
    z: float | None
    within_noise: bool  # the 95 % interval of the lead includes 0, or there is no interval
    within_margin: bool  # |lead| is below the study's practical margin


def best_rival(
    snapshot: StudySnapshot, leader: TrialRecord, others: Sequence[TrialRecord]
) -> PairedComparison | None:
    """Compare with the best of the others at the highest rung that the leader shares with any."""
    for own in reversed(leader.rungs):
        rivals = [
            (result, trial)
            for trial in others
            if trial.number != leader.number and is_candidate(trial)
            if (result := result_at(trial, own.rung)) is not None
            and result.evaluation.label_counts == own.evaluation.label_counts
        ]
        if rivals:
            result, trial = min(rivals, key=lambda pair: (pair[0].eval_loss, pair[1].number))
            return _paired(snapshot, own=own, result=result, trial=trial)
    return None


def _paired(
    snapshot: StudySnapshot, *, own: RungResult, result: RungResult, trial: TrialRecord
) -> PairedComparison:
    counts = own.evaluation.label_counts
    lead = ratio_estimate(_differences(result.evaluation, own.evaluation), counts)
    margin = spec_value(snapshot.lock.spec, "select", "practical_margin")
    error = lead.standard_error
    return PairedComparison(
        trial=trial.number,
        origin=trial.origin,
        rung=own.rung,
        steps=own.steps,
        leader_loss=own.eval_loss,
        trial_loss=result.eval_loss,
        lead=lead.value,
        standard_error=error,
        z=lead.value / error if error else None,
        within_noise=error is None or abs(lead.value) <= t_quantile_975(len(counts) - 1) * error,
        within_margin=isinstance(margin, float)
        and abs(lead.value) < margin * min(own.eval_loss, result.eval_loss),
    )


def _differences(first: EvalResult, second: EvalResult) -> list[float]:
    return [a - b for a, b in zip(first.loss_sums, second.loss_sums, strict=True)]
