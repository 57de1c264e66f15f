"""The largest rank, length, micro-batch or number of lanes that fits a device; the smallest device.

By bisection on the estimate to a value whose verdict is ``fits`` while one step more has another. The
estimate grows with each of them, but for lengths around a sliding window on devices or in types without
flash attention: there a longer row can need less, and the value found is a boundary, perhaps not
the last.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from types import MappingProxyType

from lora_tune.memory.estimate import estimate_memory
from lora_tune.memory.request import MemoryRequest, resolve_request
from lora_tune.memory.reserved import reserved_within
from lora_tune.memory.shape import ModelShape
from lora_tune.memory.verdict import (
    DEFAULT_CAPABILITY,
    Device,
    ProcessMemory,
    Verdict,
    judge,
    process_memory,
)
from lora_tune.records import MemoryEstimate

Estimate = Callable[[MemoryRequest], MemoryEstimate]

LIMITS: Mapping[str, int] = MappingProxyType(
    {"max-rank": 2**17, "max-length": 2**24, "max-batch": 2**16, "max-lanes": 2**10}
)
"""What can be solved for, and where the search ends: beyond any use."""

SOLVABLE = (*LIMITS, "min-gpu")


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """A request judged on a device."""

    device: Device
    request: MemoryRequest
    estimate: MemoryEstimate
    process: ProcessMemory
    verdict: Verdict

    @property
    def headroom_bytes(self) -> int:
        """What is expected to stay free; negative when it is missing."""
        return self.device.usable_bytes - self.process.process_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Solution:
    """The largest value that fits; 0 when not even 1 does."""

    variable: str  # one of LIMITS
    value: int
    request: MemoryRequest | None  # with the value put in; None: nothing fits
    at_limit: bool  # the search ended before the memory did


def changed(request: MemoryRequest, **changes: object) -> MemoryRequest:
    """Return the request with other settings, what the stack settles resolved again.

    A setting that is changed to None is left to the stack.

    Raises:
        StudyFileError: The stack cannot have the combination.
    """
    known = {f.name: getattr(request, f.name) for f in fields(request)}
    known |= changes
    return resolve_request(
        **{n: value for n, value in known.items() if n not in ("group_rank", "chunk_tokens")}
    )


@dataclass(frozen=True, slots=True)
class ClosedForm:
    """The closed form of a model with the allocator replayed; each request is replayed once."""

    shape: ModelShape
    _known: dict[MemoryRequest, MemoryEstimate] = field(default_factory=dict)

    def __call__(self, request: MemoryRequest) -> MemoryEstimate:
        """Return the estimate with reserved memory on a device that has room to spare."""
        if request not in self._known:
            self._known[request] = estimate_memory(self.shape, request, reserved=True)
        return self._known[request]

    def quick(self, request: MemoryRequest) -> MemoryEstimate:
        """Return the estimate without a replay: a lower bound."""
        return estimate_memory(self.shape, request)

    def within(self, request: MemoryRequest, capacity_bytes: int) -> MemoryEstimate | None:
        """Return the estimate on a device with so much room for torch, None when it runs out."""
        reserved = reserved_within(self.shape, request, capacity_bytes)
        if reserved is None:
            return None
        found = self(request)
        return replace(found, peak_reserved_bytes=max(reserved, found.peak_allocated_bytes))


def fit_on(device: Device, request: MemoryRequest, estimate: Estimate) -> Fit:
    """Return the verdict on a request, its workspaces and kernels those of the device.

    What would be tight with all that the allocator likes to keep is replayed once more with the
    room that the device has: it may do with less.
    """
    capability = device.compute_capability or DEFAULT_CAPABILITY
    there = replace(request, compute_capability=capability)
    found = estimate(there)
    process = process_memory(found, device)
    verdict = judge(process, device.usable_bytes)
    if verdict is Verdict.TIGHT and isinstance(estimate, ClosedForm):
        around = process.high_bytes - found.peak_reserved_bytes  # context and model error
        squeezed = estimate.within(there, device.usable_bytes - around)
        if squeezed is not None:
            found = squeezed
            process = process_memory(found, device)
            verdict = judge(process, device.usable_bytes)
    return Fit(device=device, request=there, estimate=found, process=process, verdict=verdict)


def fitting(device: Device, request: MemoryRequest, estimate: Estimate) -> Fit | None:
    """Return the fit of a request that fits the device, else None.

    The closed form without a replay rules most requests out first.
    """
    quick = estimate.quick if isinstance(estimate, ClosedForm) else estimate
    if fit_on(device, request, quick).verdict is not Verdict.FITS:
        return None
    fit = fit_on(device, request, estimate)
    return fit if fit.verdict is Verdict.FITS else None


def largest(fits: Callable[[int], bool], *, limit: int) -> int:
    """Return the largest number from 1 to ``limit`` that fits, 0 when 1 does not.

    Args:
        fits: False from some number on.
        limit: Where the search ends.

    >>> [largest(lambda n: 7 * n <= room, limit=1000) for room in (6, 7, 700, 10**6)]
    [0, 1, 100, 1000]
    """
    good, bad = 0, 1
    while bad <= limit and fits(bad):
        good, bad = bad, 2 * bad
    bad = min(bad, limit + 1)
    while bad - good > 1:
        middle = (good + bad) // 2
        if fits(middle):
            good = middle
        else:
            bad = middle
    return good


def solve(
    variable: str,
    request: MemoryRequest,
    *,
    device: Device,
    estimate: Estimate,
) -> Solution:
    """Return the largest value of a variable with which the request fits the device.

    Args:
        variable: One of ``LIMITS``.
        request: All other settings; lanes are alike.
        device: What it must fit.
        estimate: Closed form or trace.

    Raises:
        StudyFileError: The stack cannot vary it: lanes other than one on a foreign stack.
    """
    limit = LIMITS[variable]
    if variable == "max-lanes":
        put(request, variable, 2)
    value = largest(
        lambda n: fitting(device, put(request, variable, n), estimate) is not None,
        limit=limit,
    )
    return Solution(
        variable=variable,
        value=value,
        request=put(request, variable, value) if value else None,
        at_limit=value == limit,
    )


def put(request: MemoryRequest, variable: str, value: int) -> MemoryRequest:
    """Return the request with the variable at a value."""
    if variable == "max-rank":
        lanes = tuple(replace(lane, rank=value) for lane in request.lanes)
        return changed(request, lanes=lanes)
    if variable == "max-lanes":
        return changed(request, lanes=request.lanes[:1] * value)
    name = {"max-length": "max_length", "max-batch": "micro_batch_size"}[variable]
    return changed(request, **{name: value})


def smallest_device(
    devices: Iterable[Device],
    request: MemoryRequest,
    *,
    estimate: Estimate,
) -> Device | None:
    """Return the device with least memory that the request fits, None when it fits none."""
    for device in sorted(devices, key=lambda device: device.usable_bytes):
        if fitting(device, request, estimate) is not None:
            return device
    return None
