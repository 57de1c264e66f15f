"""Memory again for another framework's stack, and the smallest change of the batch that makes it fit.

Our engine needs less than the frameworks, so a micro-batch that fitted a study may not fit them. First the
micro-batch is lowered at equal effective batch, then gradient checkpointing is switched on: neither
changes what is learned.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from lora_tune.errors import StudyFileError
from lora_tune.export.settings import WinnerSettings
from lora_tune.memory.request import LaneShape, MemoryRequest, resolve_request
from lora_tune.memory.shape import ModelShape
from lora_tune.memory.solve import ClosedForm, Fit, fit_on, fitting
from lora_tune.memory.verdict import Device, Verdict, find_device
from lora_tune.records import StudyLock
from lora_tune.report.resolved import spec_value
from lora_tune.units import format_bytes, parse_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Refit:
    """The batch that a framework gets, and sentences on its memory."""

    micro_batch_size: int
    gradient_checkpointing: bool
    notes: tuple[str, ...]

    def applied(self, settings: WinnerSettings) -> WinnerSettings:
        """Return the settings with this batch."""
        return replace(
            settings,
            micro_batch_size=self.micro_batch_size,
            gradient_checkpointing=self.gradient_checkpointing,
        )


def refit_memory(
    settings: WinnerSettings,
    lock: StudyLock,
    *,
    stack: str,
    gpu: str | None,
    adapter_dtype: str | None = None,
) -> Refit:
    """Return the largest micro-batch, not above the study's, with which a stack fits a GPU.

    Args:
        settings: What is trained.
        lock: Of the study, for its own budget.
        stack: One of ``memory.request.STACKS``.
        gpu: Of the catalogue, or a size; None: what the study ran on.
        adapter_dtype: Where the exported file sets another type than the stack's own.

    Raises:
        StudyFileError: ``gpu`` is no GPU and no size.
    """
    unchanged = Refit(
        micro_batch_size=settings.micro_batch_size,
        gradient_checkpointing=settings.gradient_checkpointing,
        notes=(),
    )
    device = _device(lock, gpu)
    if device is None:
        note = "memory was not estimated: the study ran on a CPU and names no GPU. Add --gpu."
        return replace(unchanged, notes=(note,))
    if settings.shape is None:
        note = (
            "memory was not estimated: the base's config is not here, or its family has no closed form. "
            f"lora-tune estimate --exact --stack {stack} counts it."
        )
        return replace(unchanged, notes=(note,))
    try:
        return _refit(settings, settings.shape, device, stack, adapter_dtype, unchanged)
    except StudyFileError as error:
        return replace(unchanged, notes=(f"memory was not estimated: {error}",))


def _refit(
    settings: WinnerSettings,
    shape: ModelShape,
    device: Device,
    stack: str,
    adapter_dtype: str | None,
    asked: Refit,
) -> Refit:
    estimate = ClosedForm(shape)

    def request(choice: Refit) -> MemoryRequest:
        return _request(choice.applied(settings), stack, adapter_dtype)

    before = fit_on(device, request(asked), estimate)
    size = format_bytes(device.usable_bytes)
    where = device.name if parse_bytes(device.name) else f"{device.name}, {size}"
    basis = f"stack {stack}, rows of {settings.longest_row} tokens, {where}"
    if before.verdict is Verdict.FITS:
        return replace(asked, notes=(f"memory: {_bytes(before)} ({basis}), which fits.",))
    for choice in _choices(asked):
        fit = fitting(device, request(choice), estimate)
        if fit is not None:
            note = (
                f"memory: {_bytes(before)} ({basis}; verdict: {before.verdict}); "
                f"{_changes(asked, choice, settings)}: {_bytes(fit)}, which fits."
            )
            return replace(choice, notes=(note,))
    smallest = replace(asked, micro_batch_size=1, gradient_checkpointing=True)
    last = fit_on(device, request(smallest), estimate)
    missing = format_bytes(max(0, last.process.high_bytes - device.usable_bytes))
    note = (
        f"memory: it is not certain to fit: {_bytes(last)} ({basis}) even with one row a pass and "
        f"gradient checkpointing; up to {missing} are missing. Take a larger GPU, or a lower max_length."
    )
    return replace(smallest, notes=(note,))


def _choices(asked: Refit) -> Iterator[Refit]:
    """Yield smaller micro-batches, then all of them with gradient checkpointing."""
    whole = asked.micro_batch_size
    sizes = [size for size in range(whole, 0, -1) if whole % size == 0]
    yield from (replace(asked, micro_batch_size=size) for size in sizes[1:])
    if not asked.gradient_checkpointing:
        for size in sizes:
            yield replace(asked, micro_batch_size=size, gradient_checkpointing=True)


def _request(settings: WinnerSettings, stack: str, adapter_dtype: str | None) -> MemoryRequest:
    lane = LaneShape(
        rank=settings.rank, targets=settings.target_modules, lora_dropout=settings.lora_dropout
    )
    return resolve_request(
        stack=stack,
        quantization=settings.quantization,
        compute_dtype=settings.compute_dtype,
        lanes=(lane,),
        micro_batch_size=settings.micro_batch_size,
        max_length=settings.longest_row,
        gradient_checkpointing=settings.gradient_checkpointing,
        gradient_accumulation=settings.accumulation_steps > 1,
        adapter_dtype=adapter_dtype,
        padded=settings.micro_batch_size > 1,
    )


def _device(lock: StudyLock, gpu: str | None) -> Device | None:
    """Return what memory is judged against: the GPU asked for, that of the study file, or the study's own."""
    if gpu is not None and gpu.strip().casefold() == "auto":
        raise StudyFileError(
            '--gpu is "auto": name the GPU that will train, or its size such as "24GiB".'
        )
    if gpu is not None:
        return find_device(gpu, key="--gpu")
    named = spec_value(lock.spec, "memory", "gpu")
    if isinstance(named, str) and named.strip().casefold() != "auto":
        return find_device(named, key="memory.gpu")
    if lock.plan.device != "cuda":
        return None
    return Device(
        name=lock.hardware.get("gpu", "the study's GPU"),
        usable_bytes=lock.plan.capacity_bytes or lock.plan.budget_bytes,
        compute_capability=None,
    )


def _changes(asked: Refit, choice: Refit, settings: WinnerSettings) -> str:
    parts = []
    if choice.micro_batch_size != asked.micro_batch_size:
        steps = settings.effective_batch_size // choice.micro_batch_size
        parts.append(
            f"micro-batch lowered from {asked.micro_batch_size} to {choice.micro_batch_size} rows "
            f"({steps} accumulated, {settings.effective_batch_size} a step as before)"
        )
    if choice.gradient_checkpointing and not asked.gradient_checkpointing:
        parts.append("gradient checkpointing switched on")
    return ", ".join(parts)


def _bytes(fit: Fit) -> str:
    return format_bytes(fit.process.process_bytes)
