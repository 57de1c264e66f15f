"""An estimate as text and as an object, from values that are written here.

So what is printed does not depend on what the closed form says today. The table for people is
compared with a golden file.
"""

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from lora_tune.catalog.gpus import find_gpu, load_gpus
from lora_tune.catalog.models import load_models
from lora_tune.memory.changes import Change
from lora_tune.memory.request import LaneShape, resolve_request
from lora_tune.memory.solve import Fit
from lora_tune.memory.throughput import ThroughputEstimate, TimePlan
from lora_tune.memory.verdict import Device, ProcessMemory, judge
from lora_tune.records import MemoryEstimate
from lora_tune.report.estimate import EstimateReport, GpuRow, Solved, estimate_json
from lora_tune.report.estimate_table import print_estimate
from lora_tune.report.estimate_tables import print_catalogue
from lora_tune.units import GIB

GOLDEN = Path(__file__).parent / "golden" / "estimate.txt"

REQUEST = resolve_request(
    stack="trainer",
    quantization="nf4",
    compute_dtype="bfloat16",
    lanes=(LaneShape(rank=16, targets=("self_attn.q_proj",), lora_dropout=0.05),),
    micro_batch_size=4,
    max_length=2048,
    gradient_checkpointing=True,
    gradient_accumulation=True,
)
ESTIMATE = MemoryEstimate(
    peak_allocated_bytes=19 * GIB,
    peak_reserved_bytes=20 * GIB,
    peak_phase="loss",
    terms={
        "base_weights": 5 * GIB,
        "adapters": GIB // 4,
        "gradients": 0,
        "optimizer": GIB // 2,
        "activations": 2 * GIB,
        "logits_and_loss": 11 * GIB,
        "workspace": GIB // 4,
    },
    trainable_parameters=41_943_040,
    base_parameters=8_030_261_248,
)
PROCESS = ProcessMemory(process_bytes=20 * GIB + GIB // 2, low_bytes=19 * GIB, high_bytes=21 * GIB)


def fit(gpu: str) -> Fit:
    device = Device.of(find_gpu(gpu))
    return Fit(
        device=device,
        request=REQUEST,
        estimate=ESTIMATE,
        process=PROCESS,
        verdict=judge(PROCESS, device.usable_bytes),
    )


REPORT = EstimateReport(
    model="llama-3.1-8b",
    hub_id="meta-llama/Llama-3.1-8B",
    source="catalogue",
    target_set="all-linear",
    accumulation_steps=4,
    request=REQUEST,
    estimate=ESTIMATE,
    process=PROCESS,
    process_device="RTX 4090",
    versions={"lora-tune": "1"},
    gpus=(
        GpuRow(fit=fit("RTX 4090")),
        GpuRow(
            fit=fit("T4"),
            blame="logits_and_loss",
            changes=(
                Change(options="--stack lora-tune", process_bytes=10 * GIB),
                Change(options="--max-length 1024", process_bytes=12 * GIB),
            ),
            larger_gpu="A10G",
        ),
    ),
    smallest_gpu=None,
    solved=None,
    tokens=None,
    notes=("T4 has no bfloat16 units: training in bfloat16 is slow there.",),
)


def printed(report: EstimateReport, width: int = 80) -> str:
    stream = io.StringIO()
    print_estimate(report, Console(file=stream, width=width))
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines()) + "\n"


def test_the_table_for_people_is_the_golden_one() -> None:
    assert printed(REPORT) == GOLDEN.read_text("utf-8")


@pytest.mark.parametrize("width", [60, 80, 120])
def test_no_line_is_wider_than_the_terminal_and_no_number_is_cut(width: int) -> None:
    rows = tuple(GpuRow(fit=fit(gpu.name)) for gpu in load_gpus())
    text = printed(replace(REPORT, gpus=rows), width)
    assert max(map(len, text.splitlines())) <= width
    assert "\u2026" not in text
    for row in rows:
        assert f"{row.fit.headroom_bytes / GIB:+.2f}" in text


def test_bars_are_as_long_as_their_shares() -> None:
    lines = printed(REPORT).splitlines()
    lengths = {
        name: line.count("\u2588")
        for name in ("base weights", "logits and loss", "gradients")
        for line in lines
        if line.startswith(name)
    }
    assert lengths["gradients"] == 0
    assert lengths["logits and loss"] / lengths["base weights"] == pytest.approx(11 / 5, rel=0.1)


def test_a_terminal_without_unicode_gets_ascii_bars() -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    print_estimate(REPORT, Console(file=stream, width=80))
    stream.flush()
    assert "####" in stream.buffer.getvalue().decode("ascii")  # type: ignore[attr-defined]


def test_without_a_gpu_the_smallest_of_the_catalogue_is_named() -> None:
    text = printed(replace(REPORT, gpus=(), smallest_gpu=fit("RTX 4090")))
    assert "Smallest GPU of the catalogue that fits: RTX 4090 (23.61 GiB usable)." in " ".join(
        text.split()
    )
    text = printed(replace(REPORT, gpus=(), smallest_gpu=None))
    assert "No GPU of the catalogue is certain to fit it." in text


@pytest.mark.parametrize(
    ("solved", "says"),
    [
        (
            Solved(variable="max-rank", value=118, device="T4"),
            "Largest rank that fits T4: 118\n",
        ),
        (
            Solved(variable="max-length", value=2**24, device="T4", at_limit=True),
            "Largest length in tokens that fits T4: 16,777,216, where the search ends\n",
        ),
        (
            Solved(variable="max-batch", value=None, device="T4"),
            "No micro-batch fits T4, not even 1.",
        ),
        (Solved(variable="min-gpu", value="A40", device=None), "Smallest GPU that fits: A40\n"),
        (
            Solved(variable="min-gpu", value=None, device=None),
            "None of the GPUs asked is certain to fit.",
        ),
    ],
    ids=lambda value: value.variable if isinstance(value, Solved) else "",
)
def test_what_was_solved_is_said_in_a_sentence(solved: Solved, says: str) -> None:
    assert says in printed(replace(REPORT, solved=solved))


def timed(gpu: str, *, cost: float | None) -> GpuRow:
    speed = ThroughputEstimate(
        tokens_per_s=1000.0, low=500.0, high=1800.0, basis="prior", source="a prior", parts={}
    )
    plan = TimePlan(
        gpu=gpu,
        estimate=speed,
        hours=2.5,
        hours_low=1.4,
        hours_high=5.0,
        cost=cost,
        cost_low=None if cost is None else cost / 2,
        cost_high=None if cost is None else cost * 2,
    )
    return GpuRow(fit=fit(gpu), time=plan)


def test_hours_and_cost_fit_a_narrow_terminal_with_their_intervals() -> None:
    rows = (timed("RTX PRO 6000 Blackwell", cost=1.25), timed("RTX 4090", cost=None))
    text = printed(replace(REPORT, gpus=rows, tokens=9_000_000))
    assert "2.5 (1.4 to 5)" in text
    assert "1.25 (0.62 to 2.5)" in text
    assert "\u2026" not in text
    assert "Hours for 9,000,000 tokens" in text
    wide = printed(replace(REPORT, gpus=rows, tokens=9_000_000), 120)
    assert "usable GiB" in wide
    assert "usable GiB" not in text


def test_the_object_is_plain_json_and_keeps_every_byte() -> None:
    rows = (timed("RTX 4090", cost=1.25), *REPORT.gpus[1:])
    found = json.loads(json.dumps(estimate_json(replace(REPORT, gpus=rows, tokens=9))))
    assert list(found) == [
        "model", "hub_id", "model_source", "settings", "trainable_parameters", "base_parameters",
        "peak_allocated_bytes", "peak_phase", "terms", "peak_reserved_bytes", "process_bytes",
        "interval_bytes", "method", "stack", "versions", "tokens", "hours", "cost", "gpus", "notes",
    ]  # fmt: skip
    assert found["terms"] == ESTIMATE.terms
    assert found["interval_bytes"] == [19 * GIB, 21 * GIB]
    assert (found["hours"], found["cost"]) == (2.5, 1.25)
    assert found["settings"]["autocast"] is True
    first, second = found["gpus"]
    assert first["cost_interval"] == [0.625, 2.5]
    assert second["changes"][0] == {"options": "--stack lora-tune", "process_bytes": 10 * GIB}
    assert (second["blame"], second["larger_gpu"]) == ("logits_and_loss", "A10G")
    assert "hours" not in second


def test_the_catalogue_is_printed_whole() -> None:
    stream = io.StringIO()
    models = [(row, row.parameters or 10**9) for row in load_models()]
    print_catalogue(models, load_gpus(), Console(file=stream, width=80))
    text = stream.getvalue()
    assert all(row.name in text for row in load_models())
    assert all(gpu.name in text for gpu in load_gpus())
    assert max(map(len, text.splitlines())) <= 80
