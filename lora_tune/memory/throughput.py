"""Tokens per second of a training stack on a GPU, hours and cost, from a roofline.

One micro-batch takes the longer of two times, since the host runs ahead of the device:

    device  products + attention + head + elementwise kernels + dequantization + optimizer
    host    kernel launches * seconds per launch

    products        each pass: max(operations / matrix rate, weight bytes / bandwidth)
    dequantization  bytes / bandwidth, the same for any number of tokens: why lanes pay in NF4

A rate is a peak of the GPU catalogue times an efficiency. Where a card has measured points
(``catalog/throughput.toml``, written by ``benchmarks/vram_truth.py``) the answer is scaled by what they
showed and the interval is their scatter. Elsewhere the efficiencies are a prior and the interval is wide:

    matrix      0.70  large bfloat16 products reach 0.75 to 0.85 of the peak on A100, H100 and B200, and all
                      of it on RTX 3090, 4090 and 5090 (a public table of torch runs, contributors
                      zzc0208, Charming, HuanLin and others); the products of a layer are smaller
    attention   0.50  FlashAttention-2 forward and backward on an A100, arXiv 2307.08691, figures 4 to 6
    bandwidth   0.80  copies on the data sheets' bandwidth
    dequantize  0.25  litgpt's resource tables, A100 40 GB: nf4-dq against 16 bit, Llama 2 7B and 13B,
                      88 and 202 ms more for two passes: 0.20 to 0.24; later kernels are faster
    launch   15e-6 s  litgpt's again: 74, 97 and 141 ms for 16, 24 and 32 layers at some 100 tokens, 4.0
                      to 4.6 ms a layer, for about 250 launches

``PUBLISHED`` rows of the same file are other people's runs of the Trainer stacks; a test checks that each is
inside the prior's interval. They are not used to compute anything. No prices are shipped.
"""

import math
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Literal

from lora_tune.catalog.gpus import Gpu, find_gpu
from lora_tune.errors import StudyFileError
from lora_tune.memory.request import LaneShape, MemoryRequest, resolve_request
from lora_tune.memory.roofline import StepWork, step_work
from lora_tune.memory.shape import ModelShape

MATRIX_EFFICIENCY = 0.70
ATTENTION_EFFICIENCY = 0.50
BANDWIDTH_EFFICIENCY = 0.80
DEQUANTIZE_EFFICIENCY = 0.25
LAUNCH_S = 15e-6

# A prior may be wrong by these factors; the published rows reach from 0.84 to 1.44 of it.
PRIOR_LOW, PRIOR_HIGH = 0.5, 1.8
# Measured points never promise more than this: clocks, drivers and data differ between runs.
_LEAST_SPREAD_SAME_GPU, _LEAST_SPREAD_SAME_CLASS, _ONE_POINT_SPREAD = 0.10, 0.30, 0.25

PRIOR_SOURCE = (
    "prior: no measured point for this class of GPU; efficiencies from public runs of other stacks"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ThroughputEstimate:
    """Trained tokens per second, all lanes together; padding counts as tokens."""

    tokens_per_s: float
    low: float
    high: float
    basis: Literal["measured", "prior"]
    source: str
    parts: dict[str, float]  # seconds of a micro-batch; "host" runs beside the others


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredPoint:
    """A run that was timed: on which GPU, what was trained, and how fast."""

    gpu: str  # as in the catalogue
    shape: ModelShape
    request: MemoryRequest
    tokens_per_s: float
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TimePlan:
    """One GPU's row: hours and cost of a number of tokens, each with its interval."""

    gpu: str
    estimate: ThroughputEstimate
    hours: float
    hours_low: float
    hours_high: float
    cost: float | None  # in the currency of the price that was given; None: no price for this GPU
    cost_low: float | None
    cost_high: float | None


def estimate_throughput(
    shape: ModelShape,
    request: MemoryRequest,
    gpu: Gpu,
    *,
    accumulation_steps: int = 1,
    measured: Sequence[MeasuredPoint] | None = None,
) -> ThroughputEstimate:
    """Return the tokens per second of a trial pack on a GPU, with an interval.

    Args:
        shape: The base model.
        request: The trial pack and its stack.
        gpu: A row of the catalogue; whether the pack fits it is not asked here.
        accumulation_steps: Micro-batches per optimizer step.
        measured: Points to calibrate with; None: the installed table.

    Raises:
        TargetModulesError: A lane names a module that the model does not have.
    """
    work = step_work(shape, request)
    parts = _parts(work, gpu, request.compute_dtype, accumulation_steps)
    rate = work.tokens / _micro_batch_s(parts)
    points = measured_points() if measured is None else measured
    found = _calibration(gpu, points)
    if found is None:
        return ThroughputEstimate(
            tokens_per_s=rate,
            low=rate * PRIOR_LOW,
            high=rate * PRIOR_HIGH,
            basis="prior",
            source=PRIOR_SOURCE,
            parts=parts,
        )
    ratio, spread, source = found
    return ThroughputEstimate(
        tokens_per_s=rate * ratio,
        low=rate * ratio / (1 + spread),
        high=rate * ratio * (1 + spread),
        basis="measured",
        source=source,
        parts=parts,
    )


def plan_time(
    shape: ModelShape,
    request: MemoryRequest | Callable[[Gpu], MemoryRequest],
    gpus: Sequence[Gpu],
    *,
    tokens: int,
    prices: Mapping[str, float] | None = None,
    accumulation_steps: int = 1,
    measured: Sequence[MeasuredPoint] | None = None,
) -> tuple[TimePlan, ...]:
    """Return hours and cost of training ``tokens`` on each GPU, the cheapest first.

    GPUs without a price follow those with one, the fastest first.

    Args:
        shape: The base model.
        request: The trial pack, or a function that gives the pack of a GPU, since more lanes fit a
            larger one.
        gpus: Rows of the catalogue.
        tokens: Trained tokens, padding included, summed over lanes and trials.
        prices: GPU name, as a user writes it, to price per hour.
        accumulation_steps: Micro-batches per optimizer step.
        measured: As in ``estimate_throughput``.

    Raises:
        StudyFileError: ``tokens`` is below 1, or a price names no GPU of the catalogue or none of
            those asked for.
    """
    if tokens < 1:
        raise StudyFileError(f"--tokens is {tokens}; it must be at least 1.")
    by_gpu = _prices(prices or {}, gpus)
    rows = []
    for gpu in gpus:
        estimate = estimate_throughput(
            shape,
            request(gpu) if callable(request) else request,
            gpu,
            accumulation_steps=accumulation_steps,
            measured=measured,
        )
        rows.append(_time_plan(gpu, estimate, tokens, by_gpu.get(gpu.name)))
    return tuple(
        sorted(rows, key=lambda row: (math.inf if row.cost is None else row.cost, row.hours))
    )


def parse_price(text: str) -> tuple[str, float]:
    """Return the GPU's catalogue name and the price per hour of ``GPU=PER_HOUR``.

    Raises:
        StudyFileError: It is not of that form, the price is not above 0, or the GPU is unknown.

    >>> parse_price("rtx-4090=0.44")
    ('RTX 4090', 0.44)
    """
    name, separator, amount = text.rpartition("=")
    try:
        price = float(amount)
    except ValueError:
        price = math.nan
    if not separator or not name.strip() or not (0 < price < math.inf):
        raise StudyFileError(
            f'--price is "{text}"; write GPU=PRICE_PER_HOUR with a price above 0, such as '
            '"RTX 4090=0.44".'
        )
    return find_gpu(name).name, price


def read_points(text: str, table: str = "measured") -> tuple[MeasuredPoint, ...]:
    """Return the points of a table in a TOML text such as ``catalog/throughput.toml``.

    A row has gpu, source, tokens_per_s, the model's config.json keys (``config``), stack, quantization,
    compute_dtype, ranks and targets (one entry per lane), lora_dropout, micro_batch_size, max_length,
    gradient_checkpointing, and the other options of ``resolve_request`` where they differ from its defaults.

    Raises:
        StudyFileError: The GPU is not in the catalogue, or the stack cannot train so.
        KeyError: A row lacks a key: the table is ours, so that is a bug.
    """
    return tuple(_point(row) for row in tomllib.loads(text).get(table, ()))


@cache
def measured_points() -> tuple[MeasuredPoint, ...]:
    """Return the installed measured points of this tool's own stacks; none as long as no GPU was timed."""
    return read_points(_installed_table())


@cache
def published_points() -> tuple[MeasuredPoint, ...]:
    """Return other people's published runs, the check on the prior."""
    return read_points(_installed_table(), "published")


def _installed_table() -> str:
    return files("lora_tune.catalog").joinpath("throughput.toml").read_text("utf-8")


def _parts(
    work: StepWork, gpu: Gpu, compute_dtype: str, accumulation_steps: int
) -> dict[str, float]:
    """Return the seconds of each part of a micro-batch."""
    matrix = gpu.matrix_tflops(compute_dtype) * 1e12
    bandwidth = gpu.bandwidth_gb_s * 1e9
    products = max(
        work.layer_operations / (matrix * MATRIX_EFFICIENCY),
        work.weight_bytes / (bandwidth * BANDWIDTH_EFFICIENCY),
    )
    adapter_rate = gpu.fp32_tflops * 1e12 if work.adapters_in_float32 else matrix
    host = work.launches + work.optimizer_launches / accumulation_steps
    return {
        "products": work.passes * products,
        "adapters": work.adapter_operations / (adapter_rate * MATRIX_EFFICIENCY),
        "attention": work.attention_operations / (matrix * ATTENTION_EFFICIENCY),
        "head": work.head_operations / (matrix * MATRIX_EFFICIENCY),
        "elementwise": work.activation_bytes / (bandwidth * BANDWIDTH_EFFICIENCY),
        "dequantize": work.dequantized_bytes / (bandwidth * DEQUANTIZE_EFFICIENCY),
        "optimizer": work.optimizer_bytes / accumulation_steps / (bandwidth * BANDWIDTH_EFFICIENCY),
        "host": host * LAUNCH_S,
    }


def _micro_batch_s(parts: Mapping[str, float]) -> float:
    device = sum(seconds for name, seconds in parts.items() if name != "host")
    return max(device, parts["host"])


def _calibration(gpu: Gpu, points: Iterable[MeasuredPoint]) -> tuple[float, float, str] | None:
    """Return measured over modelled tokens/s, the relative spread, and the source; None without points.

    Points of the same card count alone; without them those of the same compute capability do.
    The ratio is a geometric mean, the spread two standard deviations of its logarithm.
    """
    known = [(point, find_gpu(point.gpu)) for point in points]
    same = [point for point, card in known if card.name == gpu.name]
    alike = [p for p, card in known if card.compute_capability == gpu.compute_capability]
    chosen, least = (same, _LEAST_SPREAD_SAME_GPU) if same else (alike, _LEAST_SPREAD_SAME_CLASS)
    if not chosen:
        return None
    ratios = [_log_ratio(point) for point in chosen]
    mean = sum(ratios) / len(ratios)
    if len(ratios) == 1:
        spread = max(least, _ONE_POINT_SPREAD)
    else:
        variance = sum((ratio - mean) ** 2 for ratio in ratios) / (len(ratios) - 1)
        spread = max(least, math.expm1(2 * math.sqrt(variance)))
    cards = ", ".join(dict.fromkeys(point.gpu for point in chosen))
    sources = ", ".join(dict.fromkeys(point.source for point in chosen))
    count = "1 point" if len(chosen) == 1 else f"{len(chosen)} points"
    return math.exp(mean), spread, f"{count} measured on {cards} ({sources})"


def _log_ratio(point: MeasuredPoint) -> float:
    work = step_work(point.shape, point.request)
    parts = _parts(work, find_gpu(point.gpu), point.request.compute_dtype, 1)
    return math.log(point.tokens_per_s * _micro_batch_s(parts) / work.tokens)


def _prices(prices: Mapping[str, float], gpus: Sequence[Gpu]) -> dict[str, float]:
    by_gpu = {find_gpu(name).name: price for name, price in prices.items()}
    names = [gpu.name for gpu in gpus]
    if strangers := [name for name in by_gpu if name not in names]:
        raise StudyFileError(
            f"--price names {', '.join(strangers)}, but no estimate of it was asked for. "
            f"GPUs in question: {', '.join(names) or 'none'}. Add --gpu, or --all-gpus."
        )
    return by_gpu


def _time_plan(
    gpu: Gpu, estimate: ThroughputEstimate, tokens: int, price: float | None
) -> TimePlan:
    hours, quick, slow = (
        tokens / rate / 3600 for rate in (estimate.tokens_per_s, estimate.high, estimate.low)
    )
    return TimePlan(
        gpu=gpu.name,
        estimate=estimate,
        hours=hours,
        hours_low=quick,
        hours_high=slow,
        cost=None if price is None else hours * price,
        cost_low=None if price is None else quick * price,
        cost_high=None if price is None else slow * price,
    )


def _point(row: Mapping[str, object]) -> MeasuredPoint:
    fields = dict(row)
    gpu = find_gpu(str(fields.pop("gpu"))).name
    source, rate = str(fields.pop("source")), float(str(fields.pop("tokens_per_s")))
    config = fields.pop("config")
    assert isinstance(config, Mapping)
    ranks, targets = fields.pop("ranks"), fields.pop("targets")
    assert isinstance(ranks, list)
    assert isinstance(targets, list)
    dropout = float(str(fields.pop("lora_dropout", 0.0)))
    lanes = tuple(
        LaneShape(rank=rank, targets=tuple(names), lora_dropout=dropout)
        for rank, names in zip(ranks, targets, strict=True)
    )
    fields.setdefault("gradient_accumulation", False)
    fields.setdefault("compute_capability", find_gpu(gpu).compute_capability)
    request = resolve_request(lanes=lanes, **fields)  # type: ignore[arg-type]
    return MeasuredPoint(
        gpu=gpu,
        shape=ModelShape.from_config(config),
        request=request,
        tokens_per_s=rate,
        source=source,
    )
