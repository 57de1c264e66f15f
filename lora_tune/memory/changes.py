"""What would make a request fit that does not: the term to blame and the smallest change.

Changes are tried from small to large: first those that train the same adapter in more time
(checkpointing, smaller micro-batches with accumulation, fewer lanes) or with other code (the stack),
then the base's precision, then what changes the result (length, rank, target modules). Each is
judged by the same estimate, and only what fits is offered.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

from lora_tune.errors import StudyFileError
from lora_tune.memory.request import STACKS, MemoryRequest
from lora_tune.memory.solve import Estimate, changed, fitting, largest, put
from lora_tune.memory.verdict import Device, context_of
from lora_tune.records import MemoryEstimate
from lora_tune.units import MIB

SHORTEST = 128  # tokens; hardly a training text is worth cutting further
_LENGTH_STEP = 64
_LOW_RANK = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """Options that make the request fit."""

    options: str  # as written on the command line
    process_bytes: int  # expected with them


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One setting to change, not yet judged."""

    options: str
    apply: Callable[[MemoryRequest], MemoryRequest]


@dataclass(frozen=True, slots=True, kw_only=True)
class Situation:
    """What changes may be made to, beside the request."""

    device: Device
    estimate: Estimate
    accumulation_steps: int
    target_sets: Mapping[str, tuple[str, ...]]  # named sets of the model, smallest first


def term_to_blame(estimate: MemoryEstimate, device: Device) -> str:
    """Return the term to look at: the base when it alone is too large, else the largest other one."""
    room = device.usable_bytes - context_of(device).low * MIB
    if estimate.terms["base_weights"] > room:
        return "base_weights"
    others = {name: size for name, size in estimate.terms.items() if name != "base_weights"}
    return max(others, key=lambda name: others[name])


def changes_that_fit(request: MemoryRequest, situation: Situation) -> tuple[Change, ...]:
    """Return what makes the request fit, smallest change first; nothing when no change does.

    Single changes, or, when none is enough, the fewest of them together.
    """
    singles = []
    for make in (_gentle_steps, _harder_steps):
        for step in make(request, situation):
            change = _judged([step], request, situation)
            if change is not None:
                singles.append(change)
    if singles:
        return tuple(singles)
    together = _together(request, situation)
    return () if together is None else (together,)


def _together(request: MemoryRequest, situation: Situation) -> Change | None:
    """Return changes taken together, gentle ones before harder ones, as few as are enough."""
    gentle = [
        *_flags(request),
        *_least_batch(request, situation),
        *_least_lanes(request),
        *_other_stack(request),
        *_quantized(request),
    ]
    steps: list[Step] = []
    for step in gentle:
        if _applied([*steps, step], request) is not None:
            steps.append(step)
    for extra in _extras(request, situation):
        taken = [*steps, *extra]
        there = _applied(taken, request)
        if there is None:
            continue
        if _judged(taken, request, situation) is None:
            taken += _shorter(there, situation)
        if _judged(taken, request, situation) is not None:
            return _judged(_as_few(taken, request, situation), request, situation)
    return None


def _extras(request: MemoryRequest, situation: Situation) -> Iterator[list[Step]]:
    """Yield what may be given up beside the length: nothing, rank, rank and target modules."""
    yield []
    lower = [_rank_step(_LOW_RANK)] if request.lanes[0].rank > _LOW_RANK else []
    yield lower
    for name, modules in list(situation.target_sets.items())[:1]:
        yield [*lower, _targets_step(name, modules)]


def _as_few(steps: list[Step], request: MemoryRequest, situation: Situation) -> list[Step]:
    """Return the steps without those that the others do not need."""
    for step in list(steps):
        rest = [other for other in steps if other is not step]
        if rest and _judged(rest, request, situation) is not None:
            steps = rest
    return steps


def _judged(steps: list[Step], request: MemoryRequest, situation: Situation) -> Change | None:
    """Return the steps as a change when the request then fits."""
    there = _applied(steps, request)
    if there is None:
        return None
    fit = fitting(situation.device, there, situation.estimate)
    if fit is None:
        return None
    options = " ".join(step.options for step in steps)
    return Change(options=options, process_bytes=fit.process.process_bytes)


def _applied(steps: list[Step], request: MemoryRequest) -> MemoryRequest | None:
    """Return the request after the steps, None when the stack cannot have it."""
    try:
        for step in steps:
            request = step.apply(request)
    except StudyFileError:
        return None
    return request


def _gentle_steps(request: MemoryRequest, situation: Situation) -> Iterator[Step]:
    yield from _flags(request)
    yield from _smaller_batch(request, situation)
    yield from _fewer_lanes(request, situation)
    yield from _other_stack(request)
    yield from _quantized(request)


def _harder_steps(request: MemoryRequest, situation: Situation) -> Iterator[Step]:
    yield from _shorter(request, situation)
    yield from _smaller_rank(request, situation)
    yield from _fewer_targets(request, situation)


def _flags(request: MemoryRequest) -> Iterator[Step]:
    if not request.gradient_checkpointing:
        yield Step(
            options="--gradient-checkpointing",
            apply=lambda r: changed(r, gradient_checkpointing=True),
        )
    if request.outputs_held:
        yield Step(options="--outputs dropped", apply=lambda r: changed(r, outputs_held=False))
    if request.optimizer == "adamw" and not STACKS[request.stack].own_engine:
        yield Step(
            options="--optimizer adamw-8bit", apply=lambda r: changed(r, optimizer="adamw-8bit")
        )


def _batch_step(request: MemoryRequest, situation: Situation, rows: int) -> Step:
    steps = situation.accumulation_steps * request.micro_batch_size // rows
    return Step(
        options=f"--batch-size {rows} --gradient-accumulation-steps {steps}",
        apply=lambda r: changed(r, micro_batch_size=rows, gradient_accumulation=True),
    )


def _smaller_batch(request: MemoryRequest, situation: Situation) -> Iterator[Step]:
    """Yield the largest divisor of the micro-batch that fits; the rows of a step stay the same."""
    rows = request.micro_batch_size
    for size in range(rows // 2, 0, -1):
        if rows % size == 0:
            step = _batch_step(request, situation, size)
            if _judged([step], request, situation) is not None:
                yield step
                return


def _least_batch(request: MemoryRequest, situation: Situation) -> Iterator[Step]:
    if request.micro_batch_size > 1:
        yield _batch_step(request, situation, 1)


def _lanes_step(lanes: int) -> Step:
    return Step(options=f"--lanes {lanes}", apply=lambda r: put(r, "max-lanes", lanes))


def _fewer_lanes(request: MemoryRequest, situation: Situation) -> Iterator[Step]:
    lanes = largest(
        lambda n: _judged([_lanes_step(n)], request, situation) is not None,
        limit=len(request.lanes) - 1,
    )
    if lanes:
        yield _lanes_step(lanes)


def _least_lanes(request: MemoryRequest) -> Iterator[Step]:
    if len(request.lanes) > 1:
        yield _lanes_step(1)


def _other_stack(request: MemoryRequest) -> Iterator[Step]:
    """Yield our stack, with what it needs changed beside."""
    if STACKS[request.stack].own_engine:
        return
    forced = {"stack": "lora-tune", "optimizer": "adamw", "outputs_held": False}
    options = "--stack lora-tune"
    if request.quantization == "nf4-single":
        forced["quantization"] = "nf4"
        options += " --quantization nf4"
    if request.compute_dtype == "float16":
        forced["compute_dtype"] = "bfloat16"
        options += " --dtype bfloat16"
    yield Step(
        options=options,
        apply=lambda r: changed(r, adapter_dtype=None, autocast=None, attention="sdpa", **forced),
    )


def _quantized(request: MemoryRequest) -> Iterator[Step]:
    if request.quantization == "none":
        yield Step(options="--quantization nf4", apply=lambda r: changed(r, quantization="nf4"))


def _length_step(length: int) -> Step:
    return Step(options=f"--max-length {length}", apply=lambda r: put(r, "max-length", length))


def _shorter(request: MemoryRequest, situation: Situation) -> Iterator[Step]:
    """Yield the longest length that fits, a multiple of 64."""
    steps = largest(
        lambda n: _judged([_length_step(n * _LENGTH_STEP)], request, situation) is not None,
        limit=(request.max_length - 1) // _LENGTH_STEP,
    )
    if steps * _LENGTH_STEP >= SHORTEST:
        yield _length_step(steps * _LENGTH_STEP)


def _rank_step(rank: int) -> Step:
    return Step(options=f"--rank {rank}", apply=lambda r: put(r, "max-rank", rank))


def _smaller_rank(request: MemoryRequest, situation: Situation) -> Iterator[Step]:
    """Yield the largest power of two below the rank that fits."""
    highest = max(lane.rank for lane in request.lanes)
    for power in range((highest - 1).bit_length() - 1, -1, -1):
        step = _rank_step(2**power)
        if _judged([step], request, situation) is not None:
            yield step
            return


def _targets_step(name: str, modules: tuple[str, ...]) -> Step:
    def apply(request: MemoryRequest) -> MemoryRequest:
        lanes = tuple(replace(lane, targets=modules) for lane in request.lanes)
        return changed(request, lanes=lanes)

    return Step(options=f"--targets {name}", apply=apply)


def _fewer_targets(request: MemoryRequest, situation: Situation) -> Iterator[Step]:
    """Yield the largest named set that adapts fewer parameters and fits."""
    trainable = situation.estimate(request).trainable_parameters
    for name, modules in reversed(list(situation.target_sets.items())):
        step = _targets_step(name, modules)
        if situation.estimate(step.apply(request)).trainable_parameters >= trainable:
            continue
        if _judged([step], request, situation) is not None:
            yield step
            return
