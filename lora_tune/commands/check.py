"""``lora-tune check``: what a study will do, from its file, its rows and the catalogue alone.

The base is not loaded. Memory is judged by the gate that the study itself uses, sizes are planned by the
same functions, time comes from the GPU's data sheet, or from the study's own probe once it has begun.
Where the base's tokenizer is not on this machine rows are counted and their tokens guessed.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import NamedTuple

import psutil

from lora_tune.catalog.gpus import Gpu, load_gpus
from lora_tune.commands.check_disk import disk_need
from lora_tune.commands.check_rows import GUESS_MARGIN, read_rows
from lora_tune.commands.estimate_machine import this_machines_gpu
from lora_tune.errors import MachineError, UncoveredModelError
from lora_tune.hub import ModelConfig, find_config, unusable_model
from lora_tune.memory.request import (
    GROUP_RANK_OF_CPUS,
    GROUP_RANK_OF_GPUS,
    WORTHWHILE_GAIN,
    LaneShape,
    MemoryRequest,
    resolve_request,
)
from lora_tune.memory.shape import ModelShape
from lora_tune.memory.solve import Estimate
from lora_tune.memory.throughput import ThroughputEstimate, estimate_throughput
from lora_tune.memory.verdict import DEFAULT_CAPABILITY, Device, find_device
from lora_tune.metrics import check_metrics
from lora_tune.records import StudyLock, TargetSet, TrialConfig
from lora_tune.report.check import CheckedAnchor, StudyCheck, check_json, print_check
from lora_tune.report.estimate_study import FrontierRow
from lora_tune.search.anchors import folklore_default, is_folklore, plan_anchors
from lora_tune.search.forecast import StudySpeed, measured_speed, plan_and_forecast
from lora_tune.search.gate import (
    Gate,
    PackPlan,
    check_base_config,
    pack_plan_of,
    resolve_sets,
)
from lora_tune.search.plan import SplitSizes, confirmation_dtype, most_trials
from lora_tune.search.space import SearchSpace
from lora_tune.store.folder import StudyFolder
from lora_tune.study.loader import load_study, notes_on_credentials
from lora_tune.study.spec import StudySpec
from lora_tune.trackers import check_trackers


def check(study: str, *, gpu: str | None, as_json: bool) -> None:
    """Print what a study will do.

    Args:
        study: The study file.
        gpu: A GPU or a size to judge it on, instead of the study's own ``memory.gpu``.
        as_json: Print one JSON object.

    Raises:
        LoraTuneError: What ``lora-tune run`` would refuse too: file, data, model, memory.
    """
    found = check_study(Path(study), gpu=gpu)
    if as_json:
        print(json.dumps(check_json(found), indent=2))
        return
    from lora_tune.report.terminal import open_console

    print_check(found, open_console())


class Place(NamedTuple):
    """Where the study would train."""

    device: Device
    on_cpu: bool
    begun: bool  # what a begun study measured counts: the GPU is not one that was asked for instead
    notes: tuple[str, ...]


class Base(NamedTuple):
    """The base's sizes and what answers for its memory."""

    found: ModelConfig
    shape: ModelShape
    estimate: Estimate | None  # None: the closed form


def check_study(path: Path, *, gpu: str | None = None) -> StudyCheck:
    """Return what a study will do; nothing is written."""
    spec = load_study(path)
    check_trackers(spec.run.trackers)
    check_metrics(
        spec.select.metrics, allow_code=True
    )  # names alone: no code of theirs is run here
    if gpu is not None:
        spec = spec.model_copy(update={"memory": spec.memory.model_copy(update={"gpu": gpu})})
    place = _place(spec)._replace(begun=gpu is None)
    base = _base(spec, path.parent)
    check_base_config(spec, base.found.config)
    modules, set_notes = resolve_sets(
        spec.space, model_type=base.shape.model_type, linears=base.shape.linear_names
    )
    data, rows = read_rows(spec, path.parent)
    longest = data.fingerprint.max_tokens
    if rows.tokens_are_estimated:
        longest = min(spec.data.max_length, GUESS_MARGIN * longest)
    gate = _gate(spec, base, place, longest)
    target_sets, gate_notes = gate.target_sets(modules)
    pack_plan = gate.pack_plan(target_sets)
    sizes = SplitSizes.of(data)
    space = SearchSpace(spec.space, target_sets, seed=spec.study.seed)
    anchors = plan_anchors(
        space,
        spec.search.anchors,
        effective_batch_size=spec.train.effective_batch_size,
        num_train=sizes.train,
    )
    row_tokens = sum(len(row.input_ids) for row in data.train) / sizes.train
    speed = _speed(spec, base, place, target_sets, pack_plan, row_tokens)
    planned = plan_and_forecast(
        spec,
        sizes,
        num_anchors=len(anchors.anchors),
        gradient_checkpointing=speed.plan.gradient_checkpointing,
        speed=speed.of_packs,
    )
    configs = [
        CheckedAnchor(name=a.name, config=space.effective(a.params)) for a in anchors.anchors
    ]
    return StudyCheck(
        study=spec.study.name,
        study_file=str(path),
        model=base.found.label,
        device=place.device,
        budget_bytes=gate.budget_bytes,
        safety=spec.memory.safety,
        data=data,
        row_tokens=row_tokens,
        rows=rows,
        target_sets=tuple(_row(gate, target) for target in target_sets),
        anchors=tuple(configs),
        default=_default_beside(spec, base, gate, pack_plan, configs),
        plan=planned.plan,
        eval_rows=planned.eval_rows,
        lanes=speed.plan.most_lanes,
        micro_batch_size=speed.plan.micro_batch_size,
        gradient_checkpointing=speed.plan.gradient_checkpointing,
        forecast=planned.forecast,
        throughput=speed.modelled,
        disk=disk_need(
            spec,
            target_sets,
            planned.plan,
            [anchor.config for anchor in configs],
            lanes=speed.plan.most_lanes,
        ),
        practical_margin=spec.select.practical_margin,
        notes=(
            *notes_on_credentials(spec, path),
            *place.notes,
            *data.notes,
            *set_notes,
            *gate_notes,
            *anchors.notes,
            *planned.notes,
            *speed.notes,
        ),
    )


def _place(spec: StudySpec) -> Place:
    """Return the device that the study would train on, without torch."""
    gpu = spec.memory.gpu.strip()
    if gpu.casefold() != "auto":
        device = find_device(gpu, key="memory.gpu")
        return Place(device, spec.run.device == "cpu", True, ())
    if spec.run.device != "cpu":
        try:
            return Place(this_machines_gpu(key="memory.gpu"), False, True, ())
        except MachineError:
            if spec.run.device == "cuda":
                raise
    host = Device(
        name="the CPU",
        usable_bytes=int(psutil.virtual_memory().available),
        compute_capability=None,
    )
    note = "no NVIDIA GPU was found: the study would train on the CPU, in what memory is free now."
    return Place(host, True, True, (note,) if spec.run.device != "cpu" else ())


def _base(spec: StudySpec, base_dir: Path) -> Base:
    found = find_config(spec.model.base, base_dir=base_dir)
    try:
        return Base(found, ModelShape.from_config(found.config), None)
    except UncoveredModelError:
        return _traced_base(found)


def _traced_base(found: ModelConfig) -> Base:
    """Return a family without a closed form: its sizes from the model that transformers builds."""
    import tempfile

    from lora_tune.engine.base import read_meta_model
    from lora_tune.trace.estimate import trace_memory

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(dict(found.config)), "utf-8")
        try:
            meta = read_meta_model(Path(folder))
        except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
            raise unusable_model(f'model.base "{found.label}"', error) from error
    return Base(
        found,
        ModelShape.from_linears(found.config, *meta),
        cache(lambda request: trace_memory(found.config, request)),
    )


def _gate(spec: StudySpec, base: Base, place: Place, max_tokens: int) -> Gate:
    dtype = _compute_dtype(spec, place)
    group_rank = GROUP_RANK_OF_CPUS if place.on_cpu else GROUP_RANK_OF_GPUS
    capability = place.device.compute_capability or DEFAULT_CAPABILITY
    return Gate(
        spec,
        base.shape,
        compute_dtype=dtype,
        max_tokens=max_tokens,
        budget_bytes=int(place.device.usable_bytes * spec.memory.safety),
        group_rank=0 if dtype == "float16" else group_rank,
        compute_capability=None if place.on_cpu else capability,
        estimate=base.estimate,
    )


def _compute_dtype(spec: StudySpec, place: Place) -> str:
    """Return the compute type as the study would choose it before it measures."""
    if spec.model.compute_dtype != "auto":
        return spec.model.compute_dtype
    if place.on_cpu:
        return "float32"
    return "bfloat16" if place.device.has_bfloat16 else "float16"


def _row(gate: Gate, target: TargetSet) -> FrontierRow:
    return FrontierRow(
        target_set=target.name,
        modules=target.modules,
        max_rank=target.max_rank,
        trainable_parameters=target.max_rank * target.trainable_parameters_per_rank,
        plan=gate.pack_plan([target]) if target.max_rank else None,
    )


def _default_beside(
    spec: StudySpec, base: Base, gate: Gate, plan: PackPlan, anchors: list[CheckedAnchor]
) -> TrialConfig | None:
    """Return the configuration that gains are measured against, if it is none of the anchors."""
    if any(is_folklore(anchor.config) for anchor in anchors):
        return None
    return folklore_default(
        model_type=base.shape.model_type,
        linears=base.shape.linear_names,
        seed=spec.study.seed,
        fits=lambda config: gate.predict(config, plan, lanes=1)[0] <= gate.budget_bytes,
    )


class Speed(NamedTuple):
    """How fast the study trains, as far as it is known, and with which packs."""

    of_packs: StudySpeed | None
    modelled: ThroughputEstimate | None  # of a full pack; None: measured, or not known
    plan: PackPlan
    notes: tuple[str, ...]


def _speed(
    spec: StudySpec,
    base: Base,
    place: Place,
    target_sets: Sequence[TargetSet],
    pack_plan: PackPlan,
    row_tokens: float,
) -> Speed:
    """Return the speed: as measured if the study has begun, else by the data sheet, else none."""
    lock = StudyFolder(Path(spec.study.output) / spec.study.name).load_lock()
    if lock is not None and place.begun:
        measured = _measured(spec, lock, row_tokens)
        if measured is not None:
            return measured
    trials = most_trials(spec)
    plan = replace(pack_plan, most_lanes=min(pack_plan.most_lanes, trials))
    gpu = next((gpu for gpu in load_gpus() if gpu.name == place.device.name), None)
    if place.on_cpu:
        why = "no hours: the speed of a CPU is measured when the study begins."
        return Speed(None, None, plan, (why,))
    if gpu is None or not base.shape.covered:
        what = (
            "GPUs of the catalogue (lora-tune estimate --list)" if gpu is None else "other families"
        )
        return Speed(None, None, plan, (f"no hours: the speed is modelled for {what} only.",))
    return _modelled(spec, base, gpu, target_sets, plan, row_tokens)


def _measured(spec: StudySpec, lock: StudyLock, row_tokens: float) -> Speed | None:
    speed = measured_speed(
        lock.plan,
        row_tokens=row_tokens,
        confirmed_in_float32=confirmation_dtype(spec, lock.plan.device) == "float32",
        load_s=lock.forecast.load_s if lock.forecast else 0.0,
    )
    note = "the study has begun: lanes and speed are those that it measured."
    return None if speed is None else Speed(speed, None, pack_plan_of(lock), (note,))


def _modelled(
    spec: StudySpec,
    base: Base,
    gpu: Gpu,
    target_sets: Sequence[TargetSet],
    plan: PackPlan,
    row_tokens: float,
) -> Speed:
    """Return the speed by the data sheet, with as many lanes as the probe would keep."""
    passes = spec.train.effective_batch_size // plan.micro_batch_size

    def of_lanes(lanes: int) -> ThroughputEstimate:
        return estimate_throughput(
            base.shape,
            _pack_request(spec, gpu, target_sets, replace(plan, most_lanes=lanes), row_tokens),
            gpu,
            accumulation_steps=max(1, passes),
        )

    kept, found = 1, {1: of_lanes(1)}
    wanted = plan.most_lanes if spec.run.lanes == "auto" else 1
    while 2 * kept <= wanted:
        found[2 * kept] = of_lanes(2 * kept)
        if found[2 * kept].tokens_per_s < (1 + WORTHWHILE_GAIN) * found[kept].tokens_per_s:
            break
        kept *= 2
    lanes = kept if spec.run.lanes == "auto" else plan.most_lanes
    full = found.setdefault(lanes, of_lanes(lanes))
    slowdown = 1.0
    if spec.select.compute_dtype == "float32" and spec.model.compute_dtype != "float32":
        slowdown = gpu.matrix_tflops("bfloat16") / gpu.fp32_tflops
    speed = StudySpeed(
        readings=tuple(sorted((n, e.tokens_per_s) for n, e in found.items() if n <= lanes)),
        lanes=lanes,
        row_tokens=row_tokens,
        measured=False,
        confirmation_slowdown=slowdown,
    )
    return Speed(speed, full, replace(plan, most_lanes=lanes), ())


def _pack_request(
    spec: StudySpec,
    gpu: Gpu,
    target_sets: Sequence[TargetSet],
    plan: PackPlan,
    row_tokens: float,
) -> MemoryRequest:
    """Return a pack of the largest lanes on rows of mean length: packs have no padding."""
    largest = max(target_sets, key=lambda t: t.max_rank * t.trainable_parameters_per_rank)
    lane = LaneShape(
        rank=largest.max_rank,
        targets=largest.modules,
        lora_dropout=max(spec.space.lora_dropout),
    )
    dtype = spec.model.compute_dtype
    if dtype == "auto":
        dtype = "float16" if gpu.bf16_tflops is None else "bfloat16"
    return resolve_request(
        stack="lora-tune",
        quantization=spec.model.quantization,
        compute_dtype=dtype,
        lanes=(lane,) * plan.most_lanes,
        micro_batch_size=plan.micro_batch_size,
        max_length=max(1, round(row_tokens)),
        gradient_checkpointing=plan.gradient_checkpointing,
        gradient_accumulation=plan.micro_batch_size < spec.train.effective_batch_size,
    )
