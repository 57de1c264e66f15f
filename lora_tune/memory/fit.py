"""What fits: the budget of a GPU, the largest rank or batch below it, and advice when nothing is."""

from collections.abc import Callable, Sequence

from lora_tune.catalog.gpus import load_gpus
from lora_tune.memory.verdict import find_device
from lora_tune.records import MemoryEstimate
from lora_tune.units import format_bytes

_SHORTEST_ADVICE = 64  # tokens; no training text is worth cutting further


def resolve_budget(gpu: str, *, safety: float, free_bytes: int) -> int:
    """Return the bytes that a trial pack may use by the estimate.

    Args:
        gpu: ``[memory] gpu``: ``auto``, a size such as ``24GiB``, or a GPU of the catalogue.
        safety: Share of the memory that may be used, above 0 and at most 1.
        free_bytes: What is free on this machine's device; used for ``auto`` only.

    Raises:
        StudyFileError: ``gpu`` is none of these.

    >>> resolve_budget("24GiB", safety=0.5, free_bytes=0)
    12884901888
    """
    if gpu.strip().casefold() == "auto":
        return int(free_bytes * safety)
    return int(find_device(gpu, key="memory.gpu").usable_bytes * safety)


def largest_that_fits(
    candidates: Sequence[int], estimate: Callable[[int], int], budget_bytes: int
) -> int:
    """Return the largest candidate whose estimate is within the budget, 0 when none is.

    >>> largest_that_fits([1, 2, 4, 8], lambda rows: 100 * rows, budget_bytes=500)
    4
    """
    descending = sorted(candidates, reverse=True)
    return next((value for value in descending if estimate(value) <= budget_bytes), 0)


def explain_no_fit(
    estimate: MemoryEstimate,
    budget_bytes: int,
    *,
    configuration: str,
    budget: str,
    safety: float,
    max_length: int,
    peak_at_length: Callable[[int], int],
) -> str:
    """Return the message for a study in which not even the smallest configuration fits.

    Args:
        estimate: Of the smallest configuration.
        budget_bytes: What it was allowed, safety included.
        configuration: The smallest configuration, such as ``rank 4, attention-qv``.
        budget: Where the budget comes from, such as ``RTX 4090, 95 %``.
        safety: Share of a GPU that may be used, for the advice of a larger one.
        max_length: Tokens per row of the study.
        peak_at_length: Peak of the same configuration at another length, for the advice.
    """
    peak = estimate.peak_allocated_bytes
    largest = sorted(estimate.terms.items(), key=lambda term: -term[1])[:2]
    shown = ", ".join(f"{name.replace('_', ' ')} {format_bytes(size)}" for name, size in largest)
    advice = [
        text
        for text in (
            _shorter_rows(peak, budget_bytes, max_length, peak_at_length),
            _larger_gpu(peak, safety),
        )
        if text
    ]
    told = "; or ".join(advice) or "choose a smaller base model"
    hint = f" {told[0].upper()}{told[1:]}."
    return (
        f"no trial fits: the smallest configuration ({configuration}) needs {format_bytes(peak)}, "
        f"the budget is {format_bytes(budget_bytes)} ({budget}).\n"
        f"  Largest terms: {shown}.{hint}"
    )


def _shorter_rows(
    peak: int, budget_bytes: int, max_length: int, peak_at_length: Callable[[int], int]
) -> str:
    length = max_length // 2
    while length >= _SHORTEST_ADVICE:
        shorter = peak_at_length(length)
        if shorter <= budget_bytes:
            saved = format_bytes(peak - shorter)
            return f"Lower data.max_length from {max_length} to {length} (saves {saved})"
        length //= 2
    return ""


def _larger_gpu(peak: int, safety: float) -> str:
    fitting = [gpu for gpu in load_gpus() if gpu.usable_bytes * safety >= peak]
    if not fitting:
        return ""
    smallest = min(fitting, key=lambda gpu: gpu.usable_bytes)
    return f"choose a larger GPU, from {smallest.name} ({format_bytes(smallest.usable_bytes)}) on"
