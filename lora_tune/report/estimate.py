"""An estimate as a value, and as one object for machines. ``estimate_table`` is the same for people."""

from collections.abc import Mapping
from dataclasses import dataclass

from lora_tune.memory.changes import Change
from lora_tune.memory.request import MemoryRequest
from lora_tune.memory.solve import Fit
from lora_tune.memory.throughput import TimePlan
from lora_tune.memory.verdict import ProcessMemory
from lora_tune.records import MemoryEstimate

TERMS = (
    "base_weights",
    "adapters",
    "gradients",
    "optimizer",
    "activations",
    "logits_and_loss",
    "workspace",
)
"""The terms of an estimate in the order in which they are shown."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuRow:
    """The verdict on one GPU; for ``no`` also why, and what would help."""

    fit: Fit
    blame: str | None = None  # term of the estimate
    changes: tuple[Change, ...] | None = None  # smallest first; None: not sought
    larger_gpu: str | None = None  # smallest of the catalogue that fits as asked
    time: TimePlan | None = None  # for the tokens asked


@dataclass(frozen=True, slots=True, kw_only=True)
class Solved:
    """What was solved for; ``value`` None: nothing fits."""

    variable: str
    value: int | str | None
    device: str | None  # what it must fit; None for min-gpu
    at_limit: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class EstimateReport:
    """Everything that ``lora-tune estimate`` shows of one configuration."""

    model: str
    hub_id: str | None
    source: str  # where the model's sizes come from
    target_set: str  # as the user wrote it
    accumulation_steps: int
    request: MemoryRequest
    estimate: MemoryEstimate
    process: ProcessMemory
    process_device: str | None  # whose context and workspaces; None: of no one device
    versions: Mapping[str, str]
    gpus: tuple[GpuRow, ...]
    smallest_gpu: Fit | None  # of the catalogue, sought when no GPU was asked
    solved: Solved | None
    tokens: int | None
    notes: tuple[str, ...]


def estimate_json(report: EstimateReport) -> dict[str, object]:
    """Return the report as one JSON object; bytes are whole numbers, hours and cost not rounded.

    ``hours`` and ``cost`` are there when tokens were given: those of the first GPU of ``gpus``, which
    are then ordered by cost; null when nothing fits or no price was given.
    """
    estimate, process = report.estimate, report.process
    found: dict[str, object] = {
        "model": report.model,
        "hub_id": report.hub_id,
        "model_source": report.source,
        "settings": _settings(report),
        "trainable_parameters": estimate.trainable_parameters,
        "base_parameters": estimate.base_parameters,
        "peak_allocated_bytes": estimate.peak_allocated_bytes,
        "peak_phase": estimate.peak_phase,
        "terms": {name: estimate.terms[name] for name in TERMS},
        "peak_reserved_bytes": estimate.peak_reserved_bytes,
        "process_bytes": process.process_bytes,
        "interval_bytes": [process.low_bytes, process.high_bytes],
        "method": estimate.method,
        "stack": report.request.stack,
        "versions": dict(report.versions),
    }
    if report.tokens is not None:
        first = report.gpus[0].time if report.gpus else None
        found["tokens"] = report.tokens
        found["hours"] = first.hours if first else None
        found["cost"] = first.cost if first else None
    if report.solved is not None:
        found["solve"] = {
            "variable": report.solved.variable,
            "value": report.solved.value,
            "gpu": report.solved.device,
            "at_limit": report.solved.at_limit,
        }
    found["gpus"] = [_gpu_json(row) for row in report.gpus]
    found["notes"] = list(report.notes)
    return found


def _gpu_json(row: GpuRow) -> dict[str, object]:
    fit = row.fit
    found: dict[str, object] = {
        "name": fit.device.name,
        "usable_bytes": fit.device.usable_bytes,
        "verdict": str(fit.verdict),
        "headroom_bytes": fit.headroom_bytes,
        "process_bytes": fit.process.process_bytes,
        "interval_bytes": [fit.process.low_bytes, fit.process.high_bytes],
    }
    if row.time is not None:
        found |= time_json(row.time)
    if row.blame is not None:
        found["blame"] = row.blame
        found["changes"] = [
            {"options": change.options, "process_bytes": change.process_bytes}
            for change in row.changes or ()
        ]
        found["larger_gpu"] = row.larger_gpu
    return found


def time_json(plan: TimePlan) -> dict[str, object]:
    """Return hours and cost with their intervals."""
    priced = plan.cost is not None
    return {
        "hours": plan.hours,
        "hours_interval": [plan.hours_low, plan.hours_high],
        "cost": plan.cost,
        "cost_interval": [plan.cost_low, plan.cost_high] if priced else None,
        "tokens_per_s": plan.estimate.tokens_per_s,
        "speed_source": plan.estimate.source,
    }


def _settings(report: EstimateReport) -> dict[str, object]:
    """Return the request as resolved, under the names of the options."""
    request = report.request
    lane = request.lanes[0]
    return {
        "rank": lane.rank,
        "targets": report.target_set,
        "target_modules": list(lane.targets),
        "dropout": lane.lora_dropout,
        "quantization": request.quantization,
        "dtype": request.compute_dtype,
        "batch_size": request.micro_batch_size,
        "max_length": request.max_length,
        "gradient_accumulation_steps": report.accumulation_steps,
        "label_fraction": request.label_fraction,
        "lanes": len(request.lanes),
        "gradient_checkpointing": request.gradient_checkpointing,
        "optimizer": request.optimizer,
        "adapter_dtype": request.adapter_dtype,
        "autocast": request.autocast,
        "attention": request.attention,
        "padded": request.padded,
        "outputs": "held" if request.outputs_held else "dropped",
    }
