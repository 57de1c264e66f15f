"""What a study starts from: inputs read and checked, then resolved and measured once.

Everything that can be wrong with the input is found here, before the study folder is made. What
``make_lock`` decides goes into ``study.lock.json`` and is used again on resume.
"""

import hashlib
import os
import platform
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import psutil
import torch
import transformers

from lora_tune.data import prepare_data
from lora_tune.engine.base import DTYPES, BaseModel, load_base_model, read_meta_model
from lora_tune.engine.base_size import base_bytes
from lora_tune.engine.convert import converted_folder
from lora_tune.engine.lora import default_group_rank
from lora_tune.engine.pack import PackSettings
from lora_tune.engine.probe import (
    Probe,
    ProbeOptions,
    by_product_speed,
    mean_length,
    rising_sizes,
)
from lora_tune.errors import MachineError, UncoveredModelError
from lora_tune.hub import ModelFiles, find_model, unusable_model
from lora_tune.memory.fit import resolve_budget
from lora_tune.memory.request import MemoryRequest
from lora_tune.memory.shape import ModelShape
from lora_tune.memory.solve import Estimate
from lora_tune.records import (
    LanePlan,
    MemoryEstimate,
    ModelIdentity,
    PreparedData,
    StudyLock,
    TargetSet,
    TrialConfig,
)
from lora_tune.redaction import redact
from lora_tune.report.check import forecast_sentence
from lora_tune.report.probe import probe_sentence
from lora_tune.search.anchors import plan_anchors
from lora_tune.search.forecast import PlannedStudy, measured_speed, plan_and_forecast
from lora_tune.search.gate import Gate, check_base_config, resolve_sets
from lora_tune.search.plan import SplitSizes, budget_hours, confirmation_dtype, most_trials
from lora_tune.search.space import SearchSpace
from lora_tune.study.spec import StudySpec
from lora_tune.trace.estimate import trace_memory

MOST_WARMUP_STEPS = 100
_CPU_DTYPES = ("float32", "bfloat16")  # float16 is slow there
_PACKAGES = (
    "lora-tune",
    "torch",
    "transformers",
    "peft",
    "bitsandbytes",
    "optuna",
    "datasets",
    "trl",
)
Note = Callable[[str], None]


class Inputs(NamedTuple):
    """Everything a study starts from, read and checked."""

    spec: StudySpec
    files: ModelFiles
    folder: Path  # config, tokenizer and safetensors of the base
    device: str
    tokenizer: transformers.PreTrainedTokenizerBase
    data: PreparedData
    shape: ModelShape
    config: Mapping[str, object]  # the base's config.json
    modules: dict[str, tuple[str, ...]]  # target sets as full module names
    notes: list[str]


class Draft(NamedTuple):
    """What the memory estimate decides before the base is loaded."""

    target_sets: tuple[TargetSet, ...]
    plan: LanePlan
    open_sizes: tuple[int, ...]  # micro-batches that a measurement may choose from
    most_lanes: Callable[[int], int]  # how many lanes of a micro-batch fit
    notes: tuple[str, ...]


def read_inputs(spec: StudySpec, *, base_dir: Path, lock: StudyLock | None) -> Inputs:
    """Find and check model, data and target sets; nothing is written but the model cache.

    A study that has begun keeps to the device and the hub revision of its ``lock``.
    """
    device = _choose_device(spec.run.device)
    revision = spec.model.revision
    if lock is not None:
        revision = lock.model.revision
        if device != lock.plan.device:
            raise MachineError(
                f"the study {lock.name} began on {lock.plan.device}, this machine offers {device}. Go on "
                "where it began, or give the study another name (study.name)."
            )
    files = find_model(spec.model.base, revision=revision, base_dir=base_dir)
    folder = files.folder if files.folder is not None else converted_folder(_gguf(files))
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            folder, trust_remote_code=False, local_files_only=True
        )
        config = transformers.AutoConfig.from_pretrained(
            folder, trust_remote_code=False, local_files_only=True
        )
        meta = read_meta_model(folder)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise unusable_model(f'model.base "{spec.model.base}"', error) from error
    check_base_config(spec, config.to_dict())
    modules, set_notes = resolve_sets(
        spec.space, model_type=config.model_type, linears=[linear.name for linear in meta.linears]
    )
    data = prepare_data(spec.data, tokenizer=tokenizer, seed=spec.study.seed, base_dir=base_dir)
    fields = config.to_dict()
    try:
        shape = ModelShape.from_config(fields)
    except UncoveredModelError:
        shape = ModelShape.from_linears(fields, *meta)
        set_notes.append(
            f"the memory of {config.model_type} models is counted on a traced step: there is no closed form."
        )
    if files.gguf is not None and files.hub_id is not None:
        set_notes.append(
            f"the base comes from {files.gguf.name}: its weights were quantized once already and differ "
            f"slightly from those of {files.hub_id}."
        )
    return Inputs(
        spec=spec,
        files=files,
        folder=folder,
        device=device,
        tokenizer=tokenizer,
        data=data,
        shape=shape,
        config=fields,
        modules=modules,
        notes=[*data.notes, *set_notes],
    )


def draft_plan(inputs: Inputs, *, free_bytes: int, workers: int = 1) -> Draft:
    """Decide from the estimate alone, before the base is loaded, what fits and how it trains.

    Args:
        inputs: What the study starts from.
        free_bytes: What the base and the lanes may use together on this machine's device: what is
            free before the base is loaded, not what the card is sold with.
        workers: Child processes that will train; on a CPU they share what is free.

    Raises:
        InfeasibleError: Nothing of the space fits.
        StudyFileError: ``memory.gpu`` names no GPU.
    """
    spec = inputs.spec
    gpu, safety = spec.memory.gpu, spec.memory.safety
    if inputs.device == "cpu":
        free_bytes //= workers
    budget = resolve_budget(gpu, safety=safety, free_bytes=free_bytes)
    dtype = _load_dtype(inputs)
    # in float16 an overflow is an ordinary event, which neighbours must not share
    group_rank = 0 if dtype == "float16" else default_group_rank(inputs.device)
    gate = make_gate(inputs, dtype, budget, group_rank=group_rank)
    target_sets, notes = gate.target_sets(inputs.modules)
    pack_plan = gate.pack_plan(target_sets)
    if spec.run.lanes != "auto" and pack_plan.most_lanes < spec.run.lanes:
        notes.append(
            f"run.lanes is lowered from {spec.run.lanes} to {pack_plan.most_lanes}: more do not fit."
        )
    plan = LanePlan(
        compute_dtype=dtype,
        device=inputs.device,
        lanes=pack_plan.most_lanes,
        micro_batch_size=pack_plan.micro_batch_size,
        gradient_checkpointing=pack_plan.gradient_checkpointing,
        group_rank=group_rank,
        budget_bytes=budget,
        capacity_bytes=resolve_budget(gpu, safety=1.0, free_bytes=free_bytes),
        workers=workers,
    )

    def most_lanes(micro_batch_size: int) -> int:
        return gate.most_lanes(replace(pack_plan, micro_batch_size=micro_batch_size), target_sets)

    return Draft(target_sets, plan, gate.open_sizes(pack_plan), cache(most_lanes), tuple(notes))


def make_lock(
    inputs: Inputs,
    base: BaseModel,
    draft: Draft,
    *,
    command: str,
    study_file: Path,
    note: Note,
    load_s: float = 0.0,
    clock: Callable[[], float] = time.perf_counter,
) -> StudyLock:
    """Settle the draft by measurement and return what the whole study will keep to.

    Args:
        inputs: What the study starts from.
        base: The loaded base; it is left as the study trains it.
        draft: What the estimate decided.
        command: The command line, for the record.
        study_file: Where the study file is, for the record.
        note: Is told what is measured and decided.
        load_s: Seconds that reading the inputs and loading the base took, for the forecast.
        clock: Returns seconds.
    """
    spec, data = inputs.spec, inputs.data
    sizes = SplitSizes.of(data)
    num_anchors = count_anchors(spec, draft.target_sets, num_train=sizes.train)
    drafted = plan_and_forecast(
        spec,
        sizes,
        num_anchors=num_anchors,
        gradient_checkpointing=draft.plan.gradient_checkpointing,
        speed=None,
        num_devices=draft.plan.num_devices,
    )
    if not base.flat:
        note(
            f"the attention of {type(base.model).__name__} cannot be cut into rows, so the rows of a pass "
            "are padded to its longest one: it trains slower than others of its size."
        )
    plan = _measure(draft, inputs, base, drafted, note, clock)
    begins_s = load_s + plan.probe_s
    planned = _forecast(spec, plan, data, sizes, num_anchors, load_s=begins_s)
    for text in planned.notes:
        note(text)
    if planned.forecast is not None:
        note(forecast_sentence(planned.forecast))
    total_steps = planned.plan.total_steps
    return StudyLock(
        name=spec.study.name,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        command=command,
        study_file=str(study_file),
        spec=spec.model_dump(mode="json"),
        spec_sha256=spec_hash(spec),
        model=_identity(inputs, base),
        data=data.fingerprint,
        notes=(*inputs.notes, *draft.notes, *planned.notes),
        versions={"python": platform.python_version(), **{p: _version(p) for p in _PACKAGES}},
        hardware=_hardware(inputs.device),
        plan=plan,
        rungs=planned.plan.rungs,
        warmup_steps=min(MOST_WARMUP_STEPS, round(spec.train.warmup_ratio * total_steps)),
        target_sets=draft.target_sets,
        eval_rows=planned.eval_rows,
        study_plan=planned.plan,
        forecast=planned.forecast,
    )


def _version(package: str) -> str:
    """Return a package's version; what runs from a source tree alone is not installed.

    >>> _version("no-such-package")
    'not installed'
    """
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def plan_again(inputs: Inputs, lock: StudyLock) -> StudyLock:
    """Return the lock of a study that goes on, its trials and its forecast following a changed budget.

    Rungs, splits and speed are those of the first start; a study of an older version, which has no plan,
    gets one.
    """
    sizes = SplitSizes(
        train=lock.data.num_train,
        selection=lock.data.num_selection,
        confirmation=lock.data.num_confirmation,
    )
    load_s = lock.forecast.load_s if lock.forecast else lock.plan.probe_s
    num_anchors = count_anchors(inputs.spec, lock.target_sets, num_train=sizes.train)
    planned = _forecast(inputs.spec, lock.plan, inputs.data, sizes, num_anchors, load_s=load_s)
    return replace(lock, study_plan=planned.plan, forecast=planned.forecast)


def count_anchors(spec: StudySpec, target_sets: Sequence[TargetSet], *, num_train: int) -> int:
    """Return how many known configurations the search of a study begins with."""
    space = SearchSpace(spec.space, target_sets, seed=spec.study.seed)
    plan = plan_anchors(
        space,
        spec.search.anchors,
        effective_batch_size=spec.train.effective_batch_size,
        num_train=num_train,
    )
    return len(plan.anchors)


def _forecast(
    spec: StudySpec,
    plan: LanePlan,
    data: PreparedData,
    sizes: SplitSizes,
    num_anchors: int,
    *,
    load_s: float,
) -> PlannedStudy:
    """Return the sizes of the study with what they take at the speed that was measured."""
    return plan_and_forecast(
        spec,
        sizes,
        num_anchors=num_anchors,
        gradient_checkpointing=plan.gradient_checkpointing,
        num_devices=plan.num_devices,
        speed=measured_speed(
            plan,
            row_tokens=mean_length(data.train),
            confirmed_in_float32=confirmation_dtype(spec, plan.device) == "float32",
            load_s=load_s,
        ),
    )


def _measure(
    draft: Draft,
    inputs: Inputs,
    base: BaseModel,
    drafted: PlannedStudy,
    note: Note,
    clock: Callable[[], float],
) -> LanePlan:
    """Settle by short readings what the study leaves to measurement; the base is left so."""
    plan = draft.plan
    base.set_gradient_checkpointing(plan.gradient_checkpointing)
    options = _probe_options(draft, inputs, drafted, clock)
    settings = pack_settings(inputs.spec, plan)
    config = _largest_config(draft.target_sets)
    probe = Probe(base, inputs.data.train, settings, config, options, clock=clock)
    what = "which plan is fastest" if probe.is_needed else "how fast it trains"
    note(f"measuring {what}, for at most a twentieth of the study's time ...")
    found = probe.run()
    plan = replace(
        plan,
        compute_dtype=found.compute_dtype,
        probe_readings=found.readings,
        probe_s=found.probe_s,
        probe_cut=found.cut,
    )
    if inputs.spec.run.lanes == "auto":
        plan = replace(plan, lanes=found.lanes, micro_batch_size=found.micro_batch_size)
    note(
        f"lanes a pack: {plan.lanes}; rows a lane and pass: {plan.micro_batch_size}; {plan.compute_dtype}; "
        f"gradient checkpointing {'on' if plan.gradient_checkpointing else 'off'}."
    )
    if sentence := probe_sentence(plan):
        note(sentence)
    return plan


def _probe_options(
    draft: Draft, inputs: Inputs, drafted: PlannedStudy, clock: Callable[[], float]
) -> ProbeOptions:
    """Return what the probe may choose from, and how long the study will be."""
    spec, plan, row_tokens = inputs.spec, draft.plan, mean_length(inputs.data.train)
    sizes, trials = draft.open_sizes, most_trials(spec)
    lanes_are_open = spec.run.lanes == "auto"
    if not lanes_are_open:  # at most the compute type is open, for which a small pass will do
        whole = plan.micro_batch_size
        divisors = [size for size in range(1, whole + 1) if whole % size == 0]
        sizes = rising_sizes(divisors, mean_tokens=row_tokens)[:1]
    dtypes: tuple[str, ...] = (plan.compute_dtype,)
    if spec.model.compute_dtype == "auto" and inputs.device == "cpu":
        dtypes = by_product_speed(_CPU_DTYPES, clock=clock)
    steps = drafted.plan.search_steps + drafted.plan.confirmation_steps
    hours = budget_hours(spec, num_devices=plan.num_devices)
    given = (1, sizes[0]) if len(sizes) == 1 else None  # the first reading, taken in any case
    if not lanes_are_open:
        given = (plan.lanes, plan.micro_batch_size)
    return ProbeOptions(
        micro_batch_sizes=sizes,
        most_lanes=lambda size: min(trials, draft.most_lanes(size)) if lanes_are_open else 1,
        compute_dtypes=dtypes,
        study_tokens=steps * spec.train.effective_batch_size * row_tokens,
        most_study_s=float("inf") if hours is None else 3600 * hours,
        given=given,
    )


def _largest_config(target_sets: tuple[TargetSet, ...]) -> TrialConfig:
    """Return a lane at the largest rank of the last target set that fits."""
    largest = next(t for t in reversed(target_sets) if t.max_rank)
    return TrialConfig(
        rank=largest.max_rank,
        lora_alpha=largest.max_rank,
        lora_dropout=0.0,
        target_set=largest.name,
        target_modules=largest.modules,
        learning_rate=1e-6,
    )


def make_gate(inputs: Inputs, dtype: str, budget_bytes: int, *, group_rank: int) -> Gate:
    """Return the gate of a study whose longest row decides the batch."""
    return Gate(
        inputs.spec,
        inputs.shape,
        compute_dtype=dtype,
        max_tokens=inputs.data.fingerprint.max_tokens,
        budget_bytes=budget_bytes,
        group_rank=group_rank,
        compute_capability=_compute_capability(inputs.device),
        estimate=None if inputs.shape.covered else _tracer(inputs.config),
    )


def _tracer(config: Mapping[str, object]) -> Estimate:
    """Return the trace of a base without a closed form; each request is traced once."""

    @cache
    def trace(request: MemoryRequest) -> MemoryEstimate:
        return trace_memory(config, request)

    return trace


def load_base(inputs: Inputs, lock: StudyLock | None) -> BaseModel:
    """Load the base, always from the same type, and compute in the one that the study settled on.

    Undecided, on a CPU, it is float32, which needs more memory; quantizing from another type on resume
    could give other 4-bit weights.
    """
    base = load_base_model(
        inputs.folder,
        quantization=inputs.spec.model.quantization,
        compute_dtype=_load_dtype(inputs),
        device=inputs.device,
        check_rows=inputs.data.train,
    )
    if lock is not None:
        base.set_compute_dtype(DTYPES[lock.plan.compute_dtype])
    return base


def _load_dtype(inputs: Inputs) -> str:
    if inputs.spec.model.compute_dtype != "auto":
        return inputs.spec.model.compute_dtype
    if inputs.device == "cpu":
        return "float32"
    return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"


def pack_settings(spec: StudySpec, plan: LanePlan) -> PackSettings:
    """Return what all lanes of a study have in common."""
    return PackSettings(
        effective_batch_size=spec.train.effective_batch_size,
        micro_batch_size=plan.micro_batch_size,
        max_grad_norm=spec.train.max_grad_norm,
        weight_decay=spec.train.weight_decay,
        group_rank=plan.group_rank,
    )


def spec_hash(spec: StudySpec) -> str:
    """Return the SHA-256 of the resolved study file, as the lock has it: without credentials."""
    return hashlib.sha256(redact(spec.model_dump_json()).encode()).hexdigest()


def _choose_device(wanted: str) -> str:
    """Return ``cpu`` or ``cuda``; a GPU that torch cannot use is an error, not a slow run."""
    available = torch.cuda.is_available()
    if wanted == "cpu":
        return "cpu"
    if available:
        return "cuda"
    has_gpu = Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None
    if has_gpu:
        raise MachineError(
            f"this machine has an NVIDIA GPU, but torch {torch.__version__} cannot use it. Install the "
            f"CUDA build: pip install --force-reinstall torch=={torch.__version__.split('+')[0]} (or "
            'set run.device = "cpu" to train on the CPU).'
        )
    if wanted == "cuda":
        raise MachineError(
            'run.device is "cuda", but no NVIDIA GPU was found. Use "auto" or "cpu".'
        )
    return "cpu"


def _compute_capability(device: str) -> str | None:
    if device != "cuda":
        return None
    major, minor = torch.cuda.get_device_capability()
    return f"{major}.{minor}"


def _hardware(device: str) -> dict[str, str]:
    found = {
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "cores": str(os.cpu_count()),
        "host_memory_bytes": str(psutil.virtual_memory().total),
        "device": device,
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found["gpu"] = properties.name
        found["gpu_memory_bytes"] = str(properties.total_memory)
        found["cuda"] = str(torch.version.cuda)
    return found


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _identity(inputs: Inputs, base: BaseModel) -> ModelIdentity:
    return ModelIdentity(
        base=inputs.spec.model.base,
        hub_id=inputs.files.hub_id,
        revision=inputs.files.revision,
        architecture=type(base.model).__name__,
        model_type=inputs.shape.model_type,
        num_parameters=inputs.shape.num_parameters,
        license=inputs.files.license,
        quantization=inputs.spec.model.quantization,
        base_bytes=base_bytes(base.model),
    )


def _gguf(files: ModelFiles) -> Path:
    assert files.gguf is not None
    return files.gguf
