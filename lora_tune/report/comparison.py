"""Several studies side by side: which of them compare, and by how much their choices differ.

Losses compare only on the same rows cut into the same tokens. That is so when the fingerprints of the
data are equal, which are made of token ids; or, where the training rows differ, when every confirmation
row has as many target tokens and the untuned base the same loss on it. Studies whose losses compare
form a group; losses of different groups are never ranked.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from lora_tune.errors import StudyFileError
from lora_tune.records import Confirmation, EvalResult, StudyLock, StudySnapshot
from lora_tune.report.confirmation import CandidateSummary
from lora_tune.report.summary import ReportSummary, summarize
from lora_tune.stats.holm import holm
from lora_tune.stats.run_losses import RunLosses, TwoPartError

SAME_ROW = (
    0.02  # nats per token: what rounding and kernels may move an untuned base's loss on a row
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparedStudy:
    """A study in a comparison. ``group`` is the same for studies whose losses compare.

    It is None before the study's confirmation has decided: nothing of it compares yet.
    """

    label: str  # its name; its folder where names are not unique
    folder: Path
    lock: StudyLock
    summary: ReportSummary
    group: int | None

    @property
    def chosen(self) -> CandidateSummary | None:
        """The recommended candidate, None before the decision."""
        c = self.summary.confirmation
        return c.chosen if c is not None else None

    @property
    def loss(self) -> float | None:
        """Its confirmed loss, None before the decision."""
        score = self.chosen.score if self.chosen is not None else None
        return score.loss if score is not None else None


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyDifference:
    """A study's choice less that of the best study of its group, paired by row; above 0 it is worse.

    The interval (95 %) covers rows and seeds, with a single seed rows alone.
    """

    study: str
    reference: str
    difference: float  # nats per target token
    standard_error: float
    low: float
    high: float
    p_adjusted: float  # Holm over the differences of the group
    num_rows: int
    num_clusters: int
    seeds: int  # of each study: the smaller number, when they differ


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyGroup:
    """Studies whose losses compare, by loss, and each but the first against the first."""

    number: int
    studies: tuple[str, ...]
    differences: tuple[StudyDifference, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyComparison:
    """Several studies, in the order in which they were named."""

    studies: tuple[ComparedStudy, ...]
    groups: tuple[StudyGroup, ...]

    def group_of(self, study: ComparedStudy) -> StudyGroup | None:
        """Return the group of a study, None before its decision."""
        return next((group for group in self.groups if group.number == study.group), None)

    def study(self, label: str) -> ComparedStudy:
        """Return the study of this label."""
        return next(study for study in self.studies if study.label == label)


def compare_studies(snapshots: Sequence[StudySnapshot]) -> StudyComparison:
    """Compare studies, finished or not.

    Raises:
        StudyFileError: Fewer than two, or a study twice.
        StoreError: The records of a study contradict each other.
    """
    folders = [snapshot.folder.resolve() for snapshot in snapshots]
    twice = [
        str(s.folder) for s, path in zip(snapshots, folders, strict=True) if folders.count(path) > 1
    ]
    if len(snapshots) < 2 or twice:
        named = f"{twice[0]} is named twice" if twice else f"{len(snapshots)} named"
        raise StudyFileError(f"a comparison is of two or more different studies; {named}.")
    groups = _groups(snapshots)
    labels = _labels(snapshots)
    studies = tuple(
        ComparedStudy(
            label=label,
            folder=snapshot.folder,
            lock=snapshot.lock,
            summary=summarize(snapshot),
            group=group,
        )
        for snapshot, label, group in zip(snapshots, labels, groups, strict=True)
    )
    members: dict[int, list[tuple[str, StudySnapshot]]] = {}
    for study, snapshot in zip(studies, snapshots, strict=True):
        if study.group is not None:
            members.setdefault(study.group, []).append((study.label, snapshot))
    return StudyComparison(
        studies=studies,
        groups=tuple(_group(number, found) for number, found in sorted(members.items())),
    )


def _labels(snapshots: Sequence[StudySnapshot]) -> list[str]:
    names = [snapshot.lock.name for snapshot in snapshots]
    return [
        name if names.count(name) == 1 else str(snapshot.folder)
        for name, snapshot in zip(names, snapshots, strict=True)
    ]


def _groups(snapshots: Sequence[StudySnapshot]) -> list[int | None]:
    """Return each study's group: that of the first study before it on whose rows it was confirmed."""
    groups: list[int | None] = []
    for place, snapshot in enumerate(snapshots):
        if not chosen_evaluations(snapshot):
            groups.append(None)
            continue
        same = (
            group
            for group, other in zip(groups, snapshots[:place], strict=True)
            if group is not None and same_rows(other, snapshot)
        )
        new = 1 + max((group for group in groups if group is not None), default=0)
        groups.append(next(same, new))
    return groups


def chosen_evaluations(snapshot: StudySnapshot) -> tuple[EvalResult, ...]:
    """Return the confirmation of the chosen candidate, seed by seed; nothing before the decision."""
    confirmation = snapshot.confirmation
    if confirmation is None or confirmation.decision is None:
        return ()
    runs = confirmation.runs_of(confirmation.decision.chosen)
    return tuple(run.evaluation for run in runs if run.evaluation is not None)


def same_rows(first: StudySnapshot, second: StudySnapshot) -> bool:
    """Say whether two studies confirmed on the same rows in the same tokens."""
    ours, theirs = chosen_evaluations(first), chosen_evaluations(second)
    if not ours or not theirs or ours[0].label_counts != theirs[0].label_counts:
        return False
    if first.lock.data.sha256 == second.lock.data.sha256:
        return True
    return _same_base_losses(first.confirmation, second.confirmation)


def _same_base_losses(first: Confirmation | None, second: Confirmation | None) -> bool:
    ours, theirs = (c.base_evaluation if c else None for c in (first, second))
    if ours is None or theirs is None or ours.label_counts != theirs.label_counts:
        return False
    rows = zip(ours.loss_sums, theirs.loss_sums, ours.label_counts, strict=True)
    return all(abs(a - b) <= SAME_ROW * max(1, count) for a, b, count in rows)


def _group(number: int, members: list[tuple[str, StudySnapshot]]) -> StudyGroup:
    ordered = sorted(members, key=lambda member: _loss(member[1]))
    labels = tuple(label for label, _ in ordered)
    best = ordered[0][1]
    found = [_difference(best, snapshot) for _, snapshot in ordered[1:]]
    adjusted = holm([error.p_value(value) for _, value, error in found])
    return StudyGroup(
        number=number,
        studies=labels,
        differences=tuple(
            StudyDifference(
                study=label,
                reference=labels[0],
                difference=value,
                standard_error=error.total,
                low=value - error.half_width(),
                high=value + error.half_width(),
                p_adjusted=p_adjusted,
                num_rows=losses.num_rows,
                num_clusters=losses.num_clusters,
                seeds=losses.num_seeds,
            )
            for label, (losses, value, error), p_adjusted in zip(
                labels[1:], found, adjusted, strict=True
            )
        ),
    )


def _loss(snapshot: StudySnapshot) -> float:
    found = chosen_evaluations(snapshot)
    return sum(evaluation.mean_loss for evaluation in found) / len(found)


class _Paired(NamedTuple):
    losses: RunLosses
    difference: float
    error: TwoPartError


def _difference(best: StudySnapshot, other: StudySnapshot) -> _Paired:
    ours, theirs = chosen_evaluations(best), chosen_evaluations(other)
    seeds = min(len(ours), len(theirs))
    clusters = best.confirmation.clusters if best.confirmation else ()
    losses = RunLosses([ours[:seeds], theirs[:seeds]], clusters=clusters)
    means = losses.losses.mean(axis=1)
    return _Paired(losses, float(means[1] - means[0]), losses.difference_error(1, 0))
