"""What a study will write to disk, beside what is free there."""

from collections.abc import Sequence
from pathlib import Path

from lora_tune.files import free_bytes, size_below
from lora_tune.records import StudyPlan, TargetSet, TrialConfig
from lora_tune.report.check import DiskNeed
from lora_tune.search.disk import study_bytes
from lora_tune.study.spec import StudySpec


def disk_need(
    spec: StudySpec,
    target_sets: Sequence[TargetSet],
    plan: StudyPlan,
    anchors: Sequence[TrialConfig],
    *,
    lanes: int,
) -> DiskNeed:
    """Return what the study will write at most, and about; see ``search.disk``."""
    found = study_bytes(spec, target_sets, plan, anchors, lanes=lanes)
    folder = Path(spec.study.output) / spec.study.name
    return DiskNeed(
        folder=folder,
        free_bytes=free_bytes(folder),
        used_bytes=size_below(folder),
        most_bytes=found.most,
        about_bytes=found.about,
    )
