"""The largest rank, length, micro-batch or number of lanes that fits a device; the smallest device.

By bisection on the estimate, which grows with each of them, to the last value whose verdict is
``fits``: for one step more the same estimate gives another verdict.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from types import MappingProxyType

from lora_tune.memory.request import MemoryRequest, resolve_request
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
        **{name: value for name, value in known.items() if name not in ("grouped", "chunk_tokens")}
    )


def fit_on(device: Device, request: MemoryRequest, estimate: Estimate) -> Fit:
    """Return the verdict on a request, its workspaces those of the device."""
    capability = device.compute_capability or DEFAULT_CAPABILITY
    there = replace(request, compute_capability=capability)
    found = estimate(there)
    process = process_memory(found, device)
    return Fit(
        device=device,
        request=there,
        estimate=found,
        process=process,
        verdict=judge(process, device.usable_bytes),
    )


def fitting(
    device: Device, request: MemoryRequest, estimate: Estimate, *, quick: Estimate | None
) -> Fit | None:
    """Return the fit of a request that fits the device, else None.

    Args:
        device: What it must fit.
        request: The settings.
        estimate: What decides.
        quick: A lower bound that rules most requests out first; None: there is no quicker one.
    """
    if quick is not None and fit_on(device, request, quick).verdict is not Verdict.FITS:
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
    quick: Estimate | None = None,
) -> Solution:
    """Return the largest value of a variable with which the request fits the device.

    Args:
        variable: One of ``LIMITS``.
        request: All other settings; lanes are alike.
        device: What it must fit.
        estimate: Closed form or trace.
        quick: As ``fitting`` takes it.

    Raises:
        StudyFileError: The stack cannot vary it: lanes other than one on a foreign stack.
    """
    limit = LIMITS[variable]
    if variable == "max-lanes":
        put(request, variable, 2)
    value = largest(
        lambda n: fitting(device, put(request, variable, n), estimate, quick=quick) is not None,
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
    quick: Estimate | None = None,
) -> Device | None:
    """Return the device with least memory that the request fits, None when it fits none."""
    for device in sorted(devices, key=lambda device: device.usable_bytes):
        if fitting(device, request, estimate, quick=quick) is not None:
            return device
    return None
