"""``lora-tune estimate --study``: what of a study's whole space fits, before any data is read.

For every target set the largest rank of the space that fits each GPU, and how many lanes; by the gate
that the study itself uses. The longest row is taken to be ``data.max_length``, the worst case.
"""

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path

from lora_tune.catalog.gpus import load_gpus
from lora_tune.commands.estimate import find_devices
from lora_tune.commands.estimate_machine import this_machines_gpu
from lora_tune.commands.estimate_options import refuse_others
from lora_tune.errors import InfeasibleError, StudyFileError
from lora_tune.hub import find_config
from lora_tune.memory.request import (
    GROUP_RANK_OF_GPUS,
    LaneShape,
    MemoryRequest,
    resolve_request,
)
from lora_tune.memory.shape import ModelShape
from lora_tune.memory.throughput import parse_price, plan_time
from lora_tune.memory.verdict import DEFAULT_CAPABILITY, Device, find_device
from lora_tune.records import TargetSet
from lora_tune.report.estimate_study import FrontierRow, GpuFrontier, StudyFrontier, frontier_json
from lora_tune.search.forecast import study_tokens
from lora_tune.search.gate import Gate, PackPlan, resolve_sets
from lora_tune.search.plan import most_trials
from lora_tune.study.loader import load_study
from lora_tune.study.spec import StudySpec

_TAKEN = {"study", "gpu", "all_gpus", "as_json", "require_fit", "tokens", "price"}


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyQuestion:
    """What is asked of a study beside its file."""

    gpus: tuple[str, ...]
    all_gpus: bool
    tokens: int | None
    prices: tuple[str, ...]


def estimate_study(
    study: str, question: StudyQuestion, *, as_json: bool, require_fit: bool, given: set[str]
) -> None:
    """Print the frontier of rank against target set on each GPU.

    Raises:
        InfeasibleError: ``require_fit``, and nothing of the space fits some GPU.
        StudyFileError: The study file, or an option that has no meaning with it.
        ModelError: The base is not found, or its family has no closed form.
    """
    refuse_others(given, allowed=_TAKEN, why="--study takes every setting from the file")
    frontier = find_frontier(study, question)
    if as_json:
        print(json.dumps(frontier_json(frontier), indent=2))
    else:
        from lora_tune.report.estimate_tables import print_frontier
        from lora_tune.report.terminal import open_console

        print_frontier(frontier, open_console())
    empty = [gpu.device.name for gpu in frontier.gpus if gpu.problem]
    if require_fit and empty:
        raise InfeasibleError(f"--require-fit: nothing of the space fits {', '.join(empty)}.")


def find_frontier(study: str, question: StudyQuestion) -> StudyFrontier:
    """Return what fits of a study's space on each GPU asked for, else on its ``memory.gpu``."""
    path = Path(study)
    spec = load_study(path)
    found = find_config(spec.model.base, base_dir=path.parent)
    shape = ModelShape.from_config(found.config)
    modules, notes = resolve_sets(
        spec.space, model_type=shape.model_type, linears=shape.linear_names
    )
    devices = find_devices(question.gpus, all_gpus=question.all_gpus) or [_device_of(spec)]
    frontiers = [_frontier(spec, shape, modules, device) for device in devices]
    tokens = question.tokens
    if tokens is None:
        tokens, note = _tokens(spec)
        notes.append(note)
    if tokens is not None:
        frontiers = _with_time(frontiers, spec, shape, question, tokens)
    elif question.prices:
        raise StudyFileError(f"--price: the length of the study is not known. {notes[-1]}")
    return StudyFrontier(
        study=spec.study.name,
        model=found.label,
        max_length=spec.data.max_length,
        safety=spec.memory.safety,
        tokens=tokens,
        gpus=tuple(frontiers),
        notes=tuple(notes),
    )


def _device_of(spec: StudySpec) -> Device:
    if spec.memory.gpu.strip().casefold() == "auto":
        return this_machines_gpu(key="memory.gpu")
    return find_device(spec.memory.gpu, key="memory.gpu")


def _tokens(spec: StudySpec) -> tuple[int | None, str]:
    try:
        counted = study_tokens(spec)
    except StudyFileError as error:
        return None, f"no hours: {error}"
    return counted.tokens, counted.note


def _frontier(
    spec: StudySpec, shape: ModelShape, modules: dict[str, tuple[str, ...]], device: Device
) -> GpuFrontier:
    there = spec.memory.model_copy(update={"gpu": device.name})
    dtype = _compute_dtype(spec, device)
    gate = Gate(
        spec.model_copy(update={"memory": there}),
        shape,
        compute_dtype=dtype,
        max_tokens=spec.data.max_length,
        budget_bytes=int(device.usable_bytes * spec.memory.safety),
        group_rank=0 if dtype == "float16" else GROUP_RANK_OF_GPUS,
        compute_capability=device.compute_capability or DEFAULT_CAPABILITY,
    )
    try:
        sets, _ = gate.target_sets(modules)
        plan = gate.pack_plan(sets)
    except InfeasibleError as error:
        return GpuFrontier(device=device, rows=(), plan=None, problem=str(error), time=None)
    return GpuFrontier(
        device=device,
        rows=tuple(_row(gate, target) for target in sets),
        plan=plan,
        problem="",
        time=None,
    )


def _row(gate: Gate, target: TargetSet) -> FrontierRow:
    plan = gate.pack_plan([target]) if target.max_rank else None
    return FrontierRow(
        target_set=target.name,
        modules=target.modules,
        max_rank=target.max_rank,
        trainable_parameters=target.max_rank * target.trainable_parameters_per_rank,
        plan=plan,
    )


def _compute_dtype(spec: StudySpec, device: Device) -> str:
    """Return the compute type as a study on that GPU would choose it."""
    if spec.model.compute_dtype != "auto":
        return spec.model.compute_dtype
    return "bfloat16" if device.has_bfloat16 else "float16"


def _with_time(
    frontiers: list[GpuFrontier],
    spec: StudySpec,
    shape: ModelShape,
    question: StudyQuestion,
    tokens: int,
) -> list[GpuFrontier]:
    """Return the frontiers with hours and cost of the whole study, the cheapest first."""
    prices = dict(parse_price(text) for text in question.prices)
    names = [frontier.device.name for frontier in frontiers]
    if strangers := [name for name in prices if name not in names]:
        raise StudyFileError(
            f"--price names {', '.join(strangers)}, but the study is judged on {', '.join(names)}. "
            "Add --gpu, or --all-gpus."
        )
    catalogue = {gpu.name: gpu for gpu in load_gpus()}
    done = []
    for frontier in frontiers:
        gpu = catalogue.get(frontier.device.name)
        if frontier.plan is None or gpu is None:
            done.append(frontier)
            continue
        rows = spec.train.effective_batch_size // frontier.plan.micro_batch_size
        plans = plan_time(
            shape,
            _largest_pack(frontier, frontier.plan, spec),
            [gpu],
            tokens=tokens,
            prices={name: price for name, price in prices.items() if name == gpu.name},
            accumulation_steps=max(1, rows),
        )
        done.append(replace(frontier, time=plans[0]))
    return sorted(done, key=_cost_then_hours)


def _cost_then_hours(frontier: GpuFrontier) -> tuple[float, float]:
    plan = frontier.time
    if plan is None:
        return math.inf, math.inf
    return math.inf if plan.cost is None else plan.cost, plan.hours


def _largest_pack(frontier: GpuFrontier, plan: PackPlan, spec: StudySpec) -> MemoryRequest:
    """Return the pack of the largest lanes that the study would train on the GPU."""
    largest = max(frontier.rows, key=lambda row: row.trainable_parameters)
    lane = LaneShape(
        rank=largest.max_rank,
        targets=largest.modules,
        lora_dropout=max(spec.space.lora_dropout),
    )
    return resolve_request(
        stack="lora-tune",
        quantization=spec.model.quantization,
        compute_dtype=_compute_dtype(spec, frontier.device),
        lanes=(lane,) * min(plan.most_lanes, most_trials(spec)),
        micro_batch_size=plan.micro_batch_size,
        max_length=spec.data.max_length,
        gradient_checkpointing=plan.gradient_checkpointing,
        gradient_accumulation=plan.micro_batch_size < spec.train.effective_batch_size,
    )
