"""The base model of an estimate: its sizes, its target modules, and what answers for its memory.

The closed form where it covers the family, unless ``--exact`` asks for the trace; the trace for all
other families. Only the trace imports torch.
"""

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from lora_tune.catalog.targets import SET_NAMES, resolve_target_set
from lora_tune.errors import TargetModulesError, UncoveredModelError
from lora_tune.hub import ModelConfig, find_config, unusable_model
from lora_tune.memory.request import MemoryRequest
from lora_tune.memory.shape import ModelShape, target_suffixes
from lora_tune.memory.solve import ClosedForm, Estimate
from lora_tune.records import MemoryEstimate


@dataclass(frozen=True, slots=True, kw_only=True)
class EstimatedModel:
    """A base model, the modules that are adapted, and how its memory is estimated."""

    found: ModelConfig
    shape: ModelShape | None  # None: a family without a closed form
    targets: tuple[str, ...]  # as the estimate takes them
    estimate: Estimate

    def target_sets(self) -> dict[str, tuple[str, ...]]:
        """Return the named sets that the model has, smallest first; none without a closed form."""
        sets: dict[str, tuple[str, ...]] = {}
        if self.shape is None:
            return sets
        for name in SET_NAMES:
            try:
                sets[name] = target_suffixes(self.shape, name)
            except TargetModulesError:
                continue
        return sets


def find_estimated_model(
    model: str, *, targets: str, attention: str, exact: bool, full_depth: bool
) -> EstimatedModel:
    """Return the model, its targets resolved.

    Args:
        model: As ``hub.find_config`` takes it.
        targets: A named set, or module names separated by commas.
        attention: What the request asks for; Falcon's own eager form is for the trace.
        exact: Trace although there is a closed form.
        full_depth: Trace every layer.

    Raises:
        ModelError: The model is not found, or its config lacks a size.
        TargetModulesError: The targets are not on the model.
    """
    found = find_config(model, base_dir=Path.cwd())
    try:
        shape = ModelShape.from_config(found.config)
    except UncoveredModelError:
        return EstimatedModel(
            found=found,
            shape=None,
            targets=_counted_targets(found, targets),
            estimate=_tracer(found, full_depth=full_depth),
        )
    exact = exact or (shape.model_type == "falcon" and attention == "eager")
    return EstimatedModel(
        found=found,
        shape=shape,
        targets=target_suffixes(shape, targets),
        estimate=_tracer(found, full_depth=full_depth) if exact else ClosedForm(shape),
    )


def _tracer(found: ModelConfig, *, full_depth: bool) -> Estimate:
    """Return the trace; GPUs of one compute capability share it."""
    from lora_tune.trace.estimate import trace_memory

    @cache
    def trace(request: MemoryRequest) -> MemoryEstimate:
        return trace_memory(found.config, request, full_depth=full_depth)

    return trace


def _counted_targets(found: ModelConfig, targets: str) -> tuple[str, ...]:
    """Return the full names of the targets on the model that transformers builds without weights."""
    from lora_tune.engine.base import read_meta_model

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(dict(found.config)), "utf-8")
        try:
            linears = read_meta_model(Path(folder)).linears
        except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
            raise unusable_model(f'model "{found.label}"', error) from error
    parts = tuple(part.strip() for part in targets.split(",") if part.strip())
    return resolve_target_set(
        parts[0] if len(parts) == 1 else parts,
        model_type=str(found.config.get("model_type")),
        linears=[linear.name for linear in linears],
        where="--targets",
    )


def num_positions(config: Mapping[str, object]) -> int | None:
    """Return the positions that a model was trained for, None when its config does not say."""
    for key in ("max_position_embeddings", "n_positions"):
        value = config.get(key)
        if isinstance(value, int):
            return value
    return None
