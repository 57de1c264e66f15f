"""What a study writes to disk: adapters and lane states, in bytes.

Records and reports are small beside them and have ``files.RESERVE_BYTES``.
"""

from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import NamedTuple

from lora_tune.files import check_room, size_below
from lora_tune.records import StudyLock, StudyPlan, TargetSet, TrialConfig
from lora_tune.search.plan import confirmation_runs, entered_trials
from lora_tune.study.spec import StudySpec

# Files are float32, whatever the lane trains in.
ADAPTER_BYTES = 4  # of a parameter
LANE_STATE_BYTES = 12  # the same with AdamW's two moments
# Of a lane that trains: its last state on the way, the one that replaces it, each with the state that is held
# for the next rung, and the result that is being published.
STATES_ON_THE_WAY = 5


class StudyBytes(NamedTuple):
    """What a study's folder takes at its largest."""

    most: int  # every trial with the largest adapter that fits, every tie with a seat
    about: int  # the anchors, other trials with the mean adapter of the space, no ties
    least: int  # every trial with the smallest adapter, no ties


def study_bytes(
    spec: StudySpec,
    target_sets: Sequence[TargetSet],
    plan: StudyPlan,
    anchors: Sequence[TrialConfig],
    *,
    lanes: int,
) -> StudyBytes:
    """Return what the study will write at most, about, and at least.

    Every rung of every trial leaves an adapter, every trial the lane state that it could go on from, every
    run of the confirmation an adapter, and the winner's is copied. Lanes that train have states on the way.

    Args:
        spec: The study.
        target_sets: The sets of the space, with the largest rank that fits each.
        plan: Trials, rungs and runs.
        anchors: Configurations that the search begins with.
        lanes: Most lanes at once.
    """
    of_a_rank = {found.name: found.trainable_parameters_per_rank for found in target_sets}
    fitting = [found for found in target_sets if found.max_rank]
    largest = max(found.max_rank * of_a_rank[found.name] for found in fitting)
    drawn = [
        min(rank, found.max_rank) * of_a_rank[found.name]
        for found in fitting
        for rank in spec.space.rank
    ]
    sizes: list[float] = [
        config.rank * of_a_rank[config.target_set] for config in anchors[: plan.num_trials]
    ]
    sizes += [mean(drawn)] * (plan.num_trials - len(sizes))
    refit = 1 if spec.select.refit == "all-rows" else 0
    others = confirmation_runs(plan) + 1 + refit
    states = plan.num_trials * LANE_STATE_BYTES
    on_the_way = lanes * STATES_ON_THE_WAY * LANE_STATE_BYTES

    def adapters(*, tie_seats: bool) -> int:
        entered = entered_trials(plan.num_trials, len(plan.rungs), tie_seats=tie_seats)
        return (sum(entered) + others) * ADAPTER_BYTES

    nominal = adapters(tie_seats=False) + states
    return StudyBytes(
        most=(adapters(tie_seats=True) + states + on_the_way) * largest,
        about=round((nominal + on_the_way) * mean(sizes)),
        least=nominal * min(drawn),
    )


def check_study_room(folder: Path, spec: StudySpec, lock: StudyLock) -> None:
    """Refuse to begin or go on with a study whose disk cannot hold even the smallest adapters of its space.

    Raises:
        DiskFullError: There is less room than the rest of the study takes at least.
    """
    plan = lock.study_plan
    if plan is None:  # a study of an older version
        return
    least = study_bytes(spec, lock.target_sets, plan, (), lanes=lock.plan.lanes).least
    check_room(folder, max(0, least - size_below(folder)))
