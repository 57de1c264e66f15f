"""The timeline of the lanes: which segment was trained when, and in which slot of the pack."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from lora_tune.records import ConfirmationRun, LaneSpan, StudySnapshot, TrialRecord
from lora_tune.report.ranking import FAILED_STATES

PROMOTED = "promoted"  # the state of a segment after which its trial entered another rung


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """A lane's training: a trial at a rung, or a candidate with a seed in the confirmation.

    Seconds count from the beginning of the study, the time between its runs left out. No two segments
    share a slot at the same time. One whose state is diverged, infeasible or failed ended early.
    """

    phase: Literal["search", "confirmation"]
    trial: int | None
    rung: int | None
    candidate: str | None
    seed: int | None
    state: str
    slot: int
    began_s: float
    ended_s: float

    @property
    def ended_early(self) -> bool:
        """Whether it did not come to its end."""
        return self.state in FAILED_STATES


def timeline(snapshot: StudySnapshot) -> tuple[Segment, ...]:
    """Return all segments by their beginning; none in a study of an older version."""
    runs = snapshot.confirmation.runs if snapshot.confirmation else ()
    found = [segment for trial in snapshot.trials for segment in _of_trial(trial)]
    found += [_of_run(run, run.span) for run in runs if run.span is not None]
    return tuple(sorted(found, key=lambda segment: (segment.began_s, segment.slot)))


def _of_trial(trial: TrialRecord) -> Iterator[Segment]:
    if trial.repeats is not None:
        return  # its rungs are those of the trial that it repeats
    for result in trial.rungs:
        last = result is trial.rungs[-1] and trial.state not in FAILED_STATES
        if result.span is not None:
            state = trial.state.value if last else PROMOTED
            yield _of_rung(trial.number, result.rung, state, result.span)
    if trial.span is not None:
        yield _of_rung(trial.number, len(trial.rungs), trial.state.value, trial.span)


def _of_rung(trial: int, rung: int, state: str, span: LaneSpan) -> Segment:
    return Segment(
        phase="search",
        trial=trial,
        rung=rung,
        candidate=None,
        seed=None,
        state=state,
        slot=span.slot,
        began_s=span.began_s,
        ended_s=span.ended_s,
    )


def _of_run(run: ConfirmationRun, span: LaneSpan) -> Segment:
    return Segment(
        phase="confirmation",
        trial=None,
        rung=None,
        candidate=run.candidate,
        seed=run.seed,
        state=run.state.value,
        slot=span.slot,
        began_s=span.began_s,
        ended_s=span.ended_s,
    )
