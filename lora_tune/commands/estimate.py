"""``lora-tune estimate``: what a run needs, term by term, and where it fits, without a GPU or torch.

The closed form answers for the families that it covers. Others, and ``--exact``, are traced: a real
step on the meta device, which imports torch and takes seconds.
"""

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version

from lora_tune.catalog.gpus import find_gpu, load_gpus
from lora_tune.commands.estimate_machine import this_machines_gpu
from lora_tune.commands.estimate_model import (
    EstimatedModel,
    find_estimated_model,
    num_positions,
)
from lora_tune.commands.estimate_options import EstimateOptions
from lora_tune.errors import InfeasibleError, StudyFileError
from lora_tune.memory.changes import Situation, changes_that_fit, term_to_blame
from lora_tune.memory.request import STACKS, MemoryRequest
from lora_tune.memory.solve import Fit, fit_on, smallest_device, solve
from lora_tune.memory.verdict import Device, Verdict, find_device, process_memory
from lora_tune.report.estimate import EstimateReport, GpuRow, Solved, estimate_json

# Whose behaviour the numbers follow.
_PACKAGES = ("lora-tune", "torch", "transformers", "peft", "bitsandbytes", "trl", "accelerate")
_SOLVED_OPTIONS = {
    "max-rank": "rank",
    "max-length": "max_length",
    "max-batch": "batch_size",
    "max-lanes": "lanes",
}
_MOST_EXPLAINED = 3  # GPUs for which changes are sought


def estimate(options: EstimateOptions, *, as_json: bool, require_fit: bool) -> None:
    """Print the estimate of one configuration.

    Raises:
        InfeasibleError: ``require_fit``, and a GPU that was asked for is not certain to fit.
        StudyFileError: An option is out of range, or the stack cannot have the combination.
        TargetModulesError: The targets are not on the model.
        ModelError: The model is not found or its config lacks a size.
        MachineError: ``--gpu auto`` on a machine without one.
    """
    if require_fit and not (options.gpus or options.all_gpus):
        raise StudyFileError("--require-fit needs a GPU to fit: add --gpu NAME, a size, or auto.")
    report = make_report(options)
    if as_json:
        print(json.dumps(estimate_json(report), indent=2))
    else:
        from lora_tune.report.estimate_table import print_estimate
        from lora_tune.report.terminal import open_console

        print_estimate(report, open_console())
    if require_fit:
        refuse_misfits(report.gpus)


def refuse_misfits(rows: Iterable[GpuRow]) -> None:
    """Raise unless every verdict is ``fits``.

    Raises:
        InfeasibleError: With the other verdicts.
    """
    others = [row.fit for row in rows if row.fit.verdict is not Verdict.FITS]
    if others:
        seen = ", ".join(f"{fit.device.name}: {fit.verdict}" for fit in others)
        raise InfeasibleError(f"--require-fit: not every GPU is certain to fit ({seen}).")


def make_report(options: EstimateOptions) -> EstimateReport:
    """Return the estimate of one configuration with its verdicts."""
    prices = _check_time(options)
    devices = find_devices(options.gpus, all_gpus=options.all_gpus)
    model = find_estimated_model(
        options.model,
        targets=options.targets,
        attention=options.attention,
        exact=options.exact,
        full_depth=options.full_depth,
    )
    request = options.request(model.targets)
    solved = None
    if options.solve == "min-gpu":
        solved, devices = _smallest(devices, request, model)
    elif options.solve is not None:
        solved, request = _solve(options.solve, devices, request, model)
    fits = [fit_on(device, request, model.estimate) for device in devices]
    headline = fits[0] if fits and (options.gpus or solved is not None) else None
    shown = headline.estimate if headline else model.estimate(request)
    device = headline.device if headline else None
    rows = _rows(fits, options, request, model)
    if options.tokens is not None:
        rows = _with_time(rows, options, request, model, prices)
    return EstimateReport(
        model=model.found.label,
        hub_id=model.found.hub_id,
        source=model.found.source,
        target_set=options.targets,
        accumulation_steps=options.gradient_accumulation_steps,
        request=request,
        estimate=shown,
        process=process_memory(shown, device),
        process_device=device.name if device else None,
        versions=_versions(),
        gpus=rows,
        smallest_gpu=None if fits or solved else _smallest_fit(request, model),
        solved=solved,
        tokens=options.tokens,
        notes=tuple(_notes(options, request, model, fits, traced=shown.method == "trace")),
    )


def _check_time(options: EstimateOptions) -> dict[str, float]:
    """Return the prices by GPU of the catalogue.

    Raises:
        StudyFileError: A price without tokens to pay for, or tokens without a GPU to train on.
    """
    if options.tokens is None:
        if options.prices:
            raise StudyFileError(
                "--price gives the cost of --tokens N or of --study FILE: add one."
            )
        return {}
    if not (options.gpus or options.all_gpus or options.solve == "min-gpu"):
        raise StudyFileError("--tokens gives the hours on a GPU: add --gpu NAME or --all-gpus.")
    from lora_tune.memory.throughput import parse_price

    return dict(parse_price(text) for text in options.prices)


def find_devices(gpus: Iterable[str], *, all_gpus: bool) -> list[Device]:
    """Return the devices asked for, each once, in the order asked; the catalogue comes last.

    Raises:
        StudyFileError: A name that is no GPU and no size.
        MachineError: ``auto`` without a GPU.
    """
    found = [_named(text) for text in gpus]
    if all_gpus:
        found += catalogued()
    return list({(device.name, device.usable_bytes): device for device in found}.values())


def _named(text: str) -> Device:
    if text.strip().casefold() == "auto":
        return this_machines_gpu(key="--gpu")
    return find_device(text, key="--gpu")


def catalogued() -> list[Device]:
    """Return the GPUs of the catalogue, smallest first."""
    return sorted(map(Device.of, load_gpus()), key=lambda device: device.usable_bytes)


def _smallest(
    devices: list[Device], request: MemoryRequest, model: EstimatedModel
) -> tuple[Solved, list[Device]]:
    found = smallest_device(devices or catalogued(), request, estimate=model.estimate)
    value = found.name if found else None
    asked = devices or ([found] if found else [])
    return Solved(variable="min-gpu", value=value, device=None), asked


def _solve(
    variable: str, devices: list[Device], request: MemoryRequest, model: EstimatedModel
) -> tuple[Solved, MemoryRequest]:
    if len(devices) != 1:
        raise StudyFileError(
            f"--solve {variable} needs exactly one --gpu to fill, not {len(devices)}: a GPU of the "
            'catalogue, a size such as "24GiB", or auto.'
        )
    if model.estimate(request).method == "trace":
        print("every step of --solve is a trace here, which takes minutes.", file=sys.stderr)
    solution = solve(variable, request, device=devices[0], estimate=model.estimate)
    solved = Solved(
        variable=variable,
        value=solution.value or None,
        device=devices[0].name,
        at_limit=solution.at_limit,
    )
    return solved, solution.request or request


def _smallest_fit(request: MemoryRequest, model: EstimatedModel) -> Fit | None:
    found = smallest_device(catalogued(), request, estimate=model.estimate)
    return fit_on(found, request, model.estimate) if found else None


def _rows(
    fits: list[Fit], options: EstimateOptions, request: MemoryRequest, model: EstimatedModel
) -> tuple[GpuRow, ...]:
    """Return the verdicts; where one is ``no``, with the term to blame and what would help."""
    misfits = [fit for fit in fits if fit.verdict is Verdict.NO]
    if not misfits:
        return tuple(GpuRow(fit=fit) for fit in fits)
    larger = smallest_device(catalogued(), request, estimate=model.estimate)
    explained = misfits if len(misfits) <= _MOST_EXPLAINED else misfits[-1:]
    rows = []
    for fit in fits:
        if fit.verdict is not Verdict.NO:
            rows.append(GpuRow(fit=fit))
            continue
        changes = None
        if fit in explained and fit.estimate.method != "trace":
            situation = Situation(
                device=fit.device,
                estimate=model.estimate,
                accumulation_steps=options.gradient_accumulation_steps,
                target_sets=model.target_sets(),
            )
            changes = changes_that_fit(request, situation)
        rows.append(
            GpuRow(
                fit=fit,
                blame=term_to_blame(fit.estimate, fit.device),
                changes=changes,
                larger_gpu=larger.name if larger else None,
            )
        )
    return tuple(rows)


def _with_time(
    rows: Sequence[GpuRow],
    options: EstimateOptions,
    request: MemoryRequest,
    model: EstimatedModel,
    prices: dict[str, float],
) -> tuple[GpuRow, ...]:
    """Return the rows with hours and cost, the cheapest first; what does not fit comes last.

    Hours are those of catalogued GPUs, whose speed is known, and of families with a closed form.
    """
    from lora_tune.memory.throughput import plan_time

    by_name = {row.fit.device.name: row for row in rows}
    catalogue = {gpu.name for gpu in load_gpus()}
    gpus = [find_gpu(name) for name in by_name if name in catalogue]
    if model.shape is None or options.tokens is None:
        return tuple(rows)
    plans = plan_time(
        model.shape,
        lambda gpu: by_name[gpu.name].fit.request,
        gpus,
        tokens=options.tokens,
        prices=prices,
        accumulation_steps=options.gradient_accumulation_steps,
    )
    timed = [
        replace(row, time=plan)
        for plan in plans
        for row in rows  # a card by name and the same card as it is free here are two rows
        if row.fit.device.name == plan.gpu and row.fit.verdict is not Verdict.NO
    ]
    done = [row.fit for row in timed]
    return (*timed, *(row for row in rows if row.fit not in done))


def _notes(
    options: EstimateOptions,
    request: MemoryRequest,
    model: EstimatedModel,
    fits: Sequence[Fit],
    *,
    traced: bool,
) -> Iterator[str]:
    stack = STACKS[request.stack]
    if traced and not options.exact:
        yield (
            f"no closed form for {model.found.config.get('model_type')} models: a real step was traced "
            "on the meta device, which takes seconds and torch."
        )
    shape = model.shape
    if stack.own_engine and shape is not None and (shape.final_softcap or shape.num_experts):
        what = "mixtures of experts" if shape.num_experts else "models that cap their logits"
        yield f"the engine does not train {what} yet: these are the bytes that its layers would take."
    if options.padded and stack.own_engine:
        yield (
            "--padded has no effect with stack lora-tune: rows are padded on the right and attention "
            "is causal, so no mask is made."
        )
    if options.label_fraction < 1 and request.stack in ("trainer", "trainer-kbit"):
        yield (
            f"--label-fraction has no effect with stack {request.stack}: it makes logits for every "
            "position."
        )
    option = _SOLVED_OPTIONS.get(options.solve or "", "")
    if option in options.written:
        yield f"--solve {options.solve} finds --{option.replace('_', '-')}: the one given has no effect."
    longest = num_positions(model.found.config)
    if longest is not None and request.max_length > longest:
        yield f"{request.max_length} tokens a row are more than the model's {longest} positions."
    yield from _notes_on_gpus(options, request, model, fits, traced=traced)


def _notes_on_gpus(
    options: EstimateOptions,
    request: MemoryRequest,
    model: EstimatedModel,
    fits: Sequence[Fit],
    *,
    traced: bool,
) -> Iterator[str]:
    narrow = [fit.device.name for fit in fits if not fit.device.has_bfloat16]
    if narrow and request.compute_dtype == "bfloat16":
        yield f"{', '.join(narrow)} has no bfloat16 units: training in bfloat16 is slow there."
    if traced and any(fit.verdict is Verdict.NO for fit in fits):
        yield "what would make it fit is sought with the closed form only."
    if options.tokens is not None and model.shape is None:
        yield "no hours: the speed of a family without a closed form is not modelled."
    if options.tokens is not None:
        unknown = [fit.device.name for fit in fits if not _in_catalogue(fit.device.name)]
        if unknown:
            yield f"no hours for {', '.join(unknown)}: the speed of a bare size is not known."


def _in_catalogue(name: str) -> bool:
    return any(gpu.name == name for gpu in load_gpus())


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
