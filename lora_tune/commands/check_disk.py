"""What a study will write to disk, beside what is free there."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from lora_tune.records import StudyPlan, TargetSet, TrialConfig
from lora_tune.report.check import DiskNeed
from lora_tune.search.plan import confirmation_runs, entered_trials
from lora_tune.study.spec import StudySpec

# Files are float32, whatever the lane trains in.
ADAPTER_BYTES = 4  # of a parameter
LANE_STATE_BYTES = 12  # the same with AdamW's two moments


def disk_need(
    spec: StudySpec,
    target_sets: Sequence[TargetSet],
    plan: StudyPlan,
    anchors: Sequence[TrialConfig],
) -> DiskNeed:
    """Return what the study will write at most, and about.

    Every rung of every trial leaves an adapter and a lane state, every run of the confirmation an adapter,
    and the winner's is copied. At most: all of them of the largest adapter that fits. About: of the mean
    of the anchors and, for the other trials, of the space's ranks and target sets.
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
    segments = sum(entered_trials(plan.num_trials, len(plan.rungs), tie_seats=True))
    planned = sum(entered_trials(plan.num_trials, len(plan.rungs)))
    adapters = confirmation_runs(plan) + (2 if spec.select.refit == "all-rows" else 1)
    folder = Path(spec.study.output) / spec.study.name
    return DiskNeed(
        folder=folder,
        free_bytes=shutil.disk_usage(_existing(folder)).free,
        used_bytes=_size(folder),
        most_bytes=_bytes(segments, adapters) * largest,
        about_bytes=round(_bytes(planned, adapters) * mean(sizes)),
    )


def _bytes(segments: int, adapters: int) -> int:
    """Return the bytes for each parameter of an adapter."""
    return segments * (ADAPTER_BYTES + LANE_STATE_BYTES) + adapters * ADAPTER_BYTES


def _existing(folder: Path) -> Path:
    """Return the folder, or the nearest one above it that is there."""
    absolute = folder.absolute()
    return next(path for path in (absolute, *absolute.parents) if path.is_dir())


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
