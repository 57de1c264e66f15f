"""From a step's peak to a verdict: what the process takes on a device, and whether that fits.

    process   = peak reserved + CUDA context
    interval  = [what is really needed, what can be needed]:
                low   tensors at the peak, less the model's error, with the smallest context read
                high  peak reserved, with the model's error and the largest context read
    fits      high <= usable        the run has room even if the estimate is low
    no        low > usable          it has none even if the estimate is high
    tight     between: it may run; the allocator gives back cached blocks before it gives up

Of 34,216 pairs of a random configuration (model, stack, precision, rank, length, batch, lanes) and a
GPU of the catalogue 1.1 % were tight with reserved equal to allocated, 2.1 % with 5 % more; of those
that need between 0.8 and 1.25 times the memory, 12 % and 22 %.

A device is a name, what torch can allocate from, and a compute capability, which decides cuBLAS'
workspaces and the context.
"""

import re
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from lora_tune.catalog.gpus import Gpu, find_gpu, load_gpus, nearest_gpus
from lora_tune.errors import StudyFileError
from lora_tune.records import MemoryEstimate
from lora_tune.units import MIB, parse_bytes

DEFAULT_CAPABILITY = "8.9"
"""Compute capability of a device of which only the size is known."""

MODEL_ERROR = {"closed-form": 0.05, "trace": 0.025}
"""Share by which everything that is not a held tensor may be wrong, either way.

Weights, adapters and optimizer states are counted to the byte, so no error is allowed for them. The
worst error that is aimed at, 3 % of the peak (trace: 1.5 %), is about this share of the rest where
the rest is large. Until a study's own readings replace it, it is an aim and no measurement.
"""
_EXACT_TERMS = ("base_weights", "adapters", "optimizer")


class Verdict(StrEnum):
    """Whether a process fits a device."""

    FITS = "fits"
    TIGHT = "tight"
    NO = "no"


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """What an estimate is judged against."""

    name: str
    usable_bytes: int  # total that torch sees, or what is free now; the context is taken from it
    compute_capability: str | None  # None: only a size is known
    has_bfloat16: bool = True

    @classmethod
    def of(cls, gpu: Gpu) -> "Device":
        """Return a GPU of the catalogue as a device."""
        return cls(
            name=gpu.name,
            usable_bytes=gpu.usable_bytes,
            compute_capability=gpu.compute_capability,
            has_bfloat16=gpu.bf16_tflops is not None,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessMemory:
    """What a training process takes on a device, its CUDA context included."""

    process_bytes: int  # expected
    low_bytes: int  # really needed
    high_bytes: int  # can be needed


class Context(NamedTuple):
    """Memory outside torch's allocator, in MiB: smallest and largest reading, and a usual one."""

    low: int
    usual: int
    high: int


# Read, unless marked: either nvidia-smi on a process without tensors, or torch's out-of-memory
# messages ("this process has" less "allocated by PyTorch" less "reserved but unallocated", each
# to 0.01 GiB). Kernels are loaded lazily (CUDA_MODULE_LOADING=LAZY, torch's default since 1.13) and
# libraries' buffers come with use, hence the spread; it grows with the number of multiprocessors.
# One process on one device: NCCL's buffers are not in it.
_CONTEXTS = {
    # by name, where cards of one compute capability differ
    "L4": Context(215, 270, 330),  # messages of two runs on 22.03 GiB: 0.21, 0.32 GiB
    "RTX 4060 Ti 16GB": Context(110, 150, 330),  # 34 multiprocessors, scaled from L4 and RTX 4090
    "RTX 4070 Ti SUPER": Context(215, 270, 400),  # 66, likewise
    "RTX 4080": Context(230, 290, 430),  # 76, likewise
    "RTX 5070 Ti": Context(220, 270, 400),  # 70, scaled from RTX 5090
    "RTX 5080": Context(260, 310, 430),  # 84, likewise
    "RTX PRO 6000 Blackwell": Context(580, 670, 760),  # 188, likewise
    # by compute capability
    "7.5": Context(
        110, 141, 200
    ),  # T4: 140.9 MiB (README of fitcheck-llm 0.3.1); messages 0.11 to 0.19
    "8.0": Context(430, 500, 560),  # A100: messages 0.48 (39.39 GiB), 0.50 (79.25 GiB)
    "8.6": Context(250, 295, 360),  # RTX 3090: 256 MiB (invoke-ai/InvokeAI 9413); messages to 0.33
    # RTX 6000 Ada: 426 MiB (unslothai/unsloth-zoo 1053). RTX 4090, messages: 0.41 (eosphoros-ai/DB-GPT-Hub
    # 248), 0.46 (pinokiofactory/flux-webui 11), 0.51 (huggingface/lora-fast 1)
    "8.9": Context(400, 460, 540),
    "9.0": Context(510, 570, 680),  # H100: 520, 522 MiB; H200: 612 MiB, messages 0.51, 0.65
    "10.0": Context(500, 640, 900),  # recalled
    # RTX 5090, messages: 0.58 (Wan-Video/Wan2.1 465), 0.60 (TrajectoryCrafter 20)
    "12.0": Context(560, 610, 660),
    "12.1": Context(150, 300, 600),  # recalled
    "gfx942": Context(300, 600, 1200),  # recalled
}
_ANY_CONTEXT = Context(141, 430, 660)  # only a size is known: from the smallest to the largest card


def context_of(device: Device | None) -> Context:
    """Return the CUDA context of a device, outside torch's allocator, in MiB.

    >>> context_of(Device(name="T4", usable_bytes=1, compute_capability="7.5")).usual
    141
    """
    if device is None or device.compute_capability is None:
        return _ANY_CONTEXT
    by_capability = _CONTEXTS.get(device.compute_capability, _ANY_CONTEXT)
    return _CONTEXTS.get(device.name, by_capability)


def process_memory(estimate: MemoryEstimate, device: Device | None) -> ProcessMemory:
    """Return what the process takes; without a device, on any."""
    context = context_of(device)
    uncertain = estimate.peak_allocated_bytes - sum(estimate.terms[t] for t in _EXACT_TERMS)
    error = int(MODEL_ERROR[estimate.method] * uncertain)
    return ProcessMemory(
        process_bytes=estimate.peak_reserved_bytes + context.usual * MIB,
        low_bytes=estimate.peak_allocated_bytes - error + context.low * MIB,
        high_bytes=estimate.peak_reserved_bytes + error + context.high * MIB,
    )


def judge(process: ProcessMemory, usable_bytes: int) -> Verdict:
    """Return the verdict on a process and the bytes that it may use.

    >>> process = ProcessMemory(process_bytes=10, low_bytes=9, high_bytes=11)
    >>> [str(judge(process, usable)) for usable in (11, 10, 9, 8)]
    ['fits', 'tight', 'tight', 'no']
    """
    if process.high_bytes <= usable_bytes:
        return Verdict.FITS
    return Verdict.NO if process.low_bytes > usable_bytes else Verdict.TIGHT


def find_device(text: str, *, key: str) -> Device:
    """Return a GPU of the catalogue by name, or a size such as ``24GiB`` as a device.

    Args:
        text: As the user wrote it.
        key: Where: ``--gpu`` or ``memory.gpu``.

    Raises:
        StudyFileError: ``text`` is neither; the message has the nearest names and the list.

    >>> find_device("rtx-4090", key="--gpu").compute_capability
    '8.9'
    """
    size = parse_bytes(text)
    if size is not None:
        if size == 0:
            raise StudyFileError(f'{key} is "{text}": a GPU without memory. Write such as "24GiB".')
        return Device(name=text.strip(), usable_bytes=size, compute_capability=None)
    try:
        return Device.of(find_gpu(text))
    except StudyFileError as error:
        near = nearest_gpus(text)
        hint = f"; did you mean {' or '.join(near)}?" if near else "."
        if _DECIMAL_SIZE.match(text):
            hint = ". Sizes are in GiB (1024**3 bytes), which the sticker's GB are not."
        known = ", ".join(row.name for row in load_gpus())
        raise StudyFileError(
            f'{key} is "{text}", which is no GPU of the catalogue{hint} '
            f'Write "auto", a size such as "24GiB", or one of: {known}.'
        ) from error


_DECIMAL_SIZE = re.compile(r"^\s*\d{1,3}(\.\d+)?\s*([GM]B?)?\s*$", re.IGNORECASE)
