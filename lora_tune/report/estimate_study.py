"""What of a study's space fits, as values and as one object for machines."""

from dataclasses import dataclass

from lora_tune.memory.throughput import TimePlan
from lora_tune.memory.verdict import Device
from lora_tune.report.estimate import time_json
from lora_tune.search.gate import PackPlan


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontierRow:
    """One target set on one GPU."""

    target_set: str
    modules: tuple[str, ...]
    max_rank: int  # largest rank of the space that fits; 0: none does
    trainable_parameters: int  # at that rank
    plan: PackPlan | None  # how lanes of that rank train; None: none fits


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuFrontier:
    """The target sets on one GPU, and how the largest configuration of them all trains."""

    device: Device
    rows: tuple[FrontierRow, ...]
    plan: PackPlan | None
    problem: str  # why nothing fits; empty otherwise
    time: TimePlan | None  # of the whole study


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyFrontier:
    """A study's space on each GPU."""

    study: str
    model: str
    max_length: int
    safety: float
    tokens: int | None  # of the whole study; None: not known
    gpus: tuple[GpuFrontier, ...]
    notes: tuple[str, ...]


def frontier_json(frontier: StudyFrontier) -> dict[str, object]:
    """Return the frontier as one JSON object."""
    return {
        "study": frontier.study,
        "model": frontier.model,
        "max_length": frontier.max_length,
        "safety": frontier.safety,
        "tokens": frontier.tokens,
        "gpus": [_gpu_json(gpu, frontier.safety) for gpu in frontier.gpus],
        "notes": list(frontier.notes),
    }


def _gpu_json(gpu: GpuFrontier, safety: float) -> dict[str, object]:
    found: dict[str, object] = {
        "name": gpu.device.name,
        "usable_bytes": gpu.device.usable_bytes,
        "budget_bytes": int(gpu.device.usable_bytes * safety),
        "target_sets": [
            {
                "name": row.target_set,
                "max_rank": row.max_rank,
                "trainable_parameters": row.trainable_parameters,
                **_plan_json(row.plan),
            }
            for row in gpu.rows
        ],
        **_plan_json(gpu.plan),
        "problem": gpu.problem or None,
    }
    if gpu.time is not None:
        found |= time_json(gpu.time)
    return found


def _plan_json(plan: PackPlan | None) -> dict[str, object]:
    if plan is None:
        return {"lanes": 0, "batch_size": None, "gradient_checkpointing": None}
    return {
        "lanes": plan.most_lanes,
        "batch_size": plan.micro_batch_size,
        "gradient_checkpointing": plan.gradient_checkpointing,
    }
