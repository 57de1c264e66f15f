"""The memory section of a report: residuals and margins by hand, the files, and the text that people see."""

import io
from dataclasses import replace

import pandas as pd
import pytest
from report_studies import finished_study
from rich.console import Console

from lora_tune.records import LaneLimit, MemoryLog, MemoryReading, PackPeak, StudySnapshot
from lora_tune.report import print_report, render_markdown, summarize, write_reports
from lora_tune.report.files import report_data
from lora_tune.report.memory import MAX_ROWS, pack_rows, scatter_plot
from lora_tune.report.wording import memory_sentences
from lora_tune.units import GIB, MIB


def reading(off: float, *, trials: tuple[int, ...] = (0, 1), **changes: object) -> MemoryReading:
    """Return a pack of 4 GiB by the estimate whose peak allocated was ``off`` times that more."""
    allocated = round(4 * GIB * (1 + off))
    peak = PackPeak(
        device="NVIDIA L4",
        trials=trials,
        steps=25,
        rows=16,
        max_length=241,
        num_labels=1_702,
        allocated_bytes=allocated,
        reserved_bytes=allocated + 128 * MIB,
        process_bytes=allocated + 384 * MIB,
        free_bytes=22 * GIB,
    )
    return MemoryReading(
        measured=replace(peak, **changes),
        predicted_allocated_bytes=4 * GIB,
        predicted_reserved_bytes=4 * GIB + 64 * MIB,
    )


def study(*readings: MemoryReading, limits: tuple[LaneLimit, ...] = ()) -> StudySnapshot:
    snapshot = finished_study()
    plan = replace(
        snapshot.lock.plan, device="cuda", budget_bytes=19 * GIB, capacity_bytes=20 * GIB
    )
    spec = {**snapshot.lock.spec, "memory": {"gpu": "auto", "safety": 0.95}}
    return replace(
        snapshot,
        lock=replace(snapshot.lock, plan=plan, spec=spec),
        memory=MemoryLog(readings=readings, limits=limits),
    )


FEW = (reading(0.01), reading(-0.005, trials=(2, 3)), reading(0.03, trials=(4,)))


def test_residuals_and_margin_of_few_packs_by_hand():
    memory = summarize(study(*FEW)).memory
    allocated, reserved, process = memory.spreads
    assert (allocated.peak, reserved.peak, process.peak) == ("allocated", "reserved", "process")
    assert allocated.residuals == pytest.approx((0.01, -0.005, 0.03))
    assert (allocated.lowest, allocated.median, allocated.highest) == pytest.approx(
        (-0.005, 0.01, 0.03)
    )
    assert allocated.margin == pytest.approx(1 / 0.95 - 1)
    # (4 GiB * 1.03 + 128 MiB) / (4 GiB + 64 MiB) and (4 GiB * 1.03 + 384 MiB) / (4 GiB + 64 MiB)
    assert reserved.highest == pytest.approx((4096 * 1.03 + 128) / 4160 - 1)
    assert process.highest == pytest.approx((4096 * 1.03 + 384) / 4160 - 1)
    assert process.margin == pytest.approx(process.highest)  # above the prior
    assert memory.outside_bytes == 256 * MIB
    assert memory.margin_is_prior
    assert memory.supported_safety is None


def test_nineteen_packs_make_their_own_margin():
    readings = [reading(0.001 * k) for k in range(19)]
    summary = summarize(study(*readings))
    assert not summary.memory.margin_is_prior
    assert summary.memory.spreads[0].margin == pytest.approx(0.018)
    # the process took 4 GiB * 1.018 + 384 MiB of 4 GiB predicted
    wanted = 4096 / (4096 * 1.018 + 384)
    assert summary.memory.supported_safety == pytest.approx(wanted)
    assert memory_sentences(summary) == [
        "19 packs measured: peak allocated was +0.0 % to +1.8 % off the estimate, median +0.9 %.",
        "Safety margin: 1.8 %, which covers 95.0 % of such packs by the study's own residuals.",
        "What the process took, cached blocks included, supports memory.safety up to "
        f"{wanted:.3f} for such packs.",
    ]


@pytest.mark.parametrize(
    ("readings", "wanted"),
    [
        (
            FEW,
            "Safety margin: 5.3 %, that of memory.safety; 19 packs are needed for a margin of 95.0 % "
            "of their own.",
        ),
        (
            (reading(0.08),),
            "Safety margin: 8.0 %, the largest residual; 19 packs are needed for a margin of 95.0 % "
            "of their own.",
        ),
        ((reading(0.0, steps=1),), "1 pack measured, too short to say how good the estimate is."),
        (
            (reading(0.01), reading(0.0, out_of_memory=True, steps=0)),
            "Memory ran out in 1 pack.",
        ),
    ],
)
def test_the_sentences_say_where_the_margin_comes_from(readings, wanted):
    assert wanted in memory_sentences(summarize(study(*readings)))


def test_a_study_without_readings_has_no_section():
    snapshot = finished_study()
    assert summarize(snapshot).memory is None
    assert memory_sentences(summarize(snapshot)) == []
    assert "Predicted and measured" not in render_markdown(snapshot)
    assert report_data(snapshot)["memory"] == {"readings": [], "limits": []}


SECTION = """\
### Predicted and measured

- 3 packs measured: peak allocated was -0.5 % to +3.0 % off the estimate, median +1.0 %.
- Safety margin: 5.3 %, that of memory.safety; 19 packs are needed for a margin of 95.0 % of their own.

| peak      | packs | lowest | median | highest | margin |
| --------- | ----- | ------ | ------ | ------- | ------ |
| allocated | 3     | -0.5 % | +1.0 % | +3.0 %  | 5.3 %  |
| reserved  | 3     | +1.0 % | +2.5 % | +4.5 %  | 5.3 %  |
| process   | 3     | +7.2 % | +8.7 % | +10.6 % | 10.6 % |

```text
          -0.5 %                                           +10.6 %
allocated . |    .         .
reserved    |    .       .         .
process     |                                   .       .        .
```
"""


def test_the_section_in_markdown():
    text = render_markdown(study(*FEW))
    begin = text.index("### Predicted and measured")
    assert text[begin : begin + len(SECTION)] == SECTION
    assert "| budget" in text
    assert "19.00 GiB (95.0 % of 20.00 GiB)" in text
    assert (
        "| 4      | 25    | 16   | 241     | 4.00 GiB             | 4.12 GiB | +3.0 %   "
        "| 4.06 GiB            | 4.25 GiB | +4.5 %   | 4.50 GiB |      |"
    ) in text


def test_the_plot_puts_every_pack_where_it_belongs():
    summary = summarize(study(*[reading(0.01)] * 3, *[reading(0.02)] * 7, reading(-0.01)))
    axis, allocated, *_ = scatter_plot(summary.memory).splitlines()
    low, high = -0.01, summary.memory.spreads[2].highest
    assert axis.split() == ["-1.0", "%", f"{100 * high:+.1f}", "%"]
    for value, mark in ((-0.01, "."), (0.0, "|"), (0.01, ":"), (0.02, "#")):
        assert allocated[10 + int((value - low) / (high - low) * 56)] == mark


def test_a_pack_that_ran_out_of_memory_shows_a_bound():
    # 22 GiB free, of which 256 MiB went elsewhere: at least 21.75 / 4 - 1
    [row] = pack_rows([reading(0.0, out_of_memory=True, steps=0)])
    assert row[6] == "at least +443.8 %"
    assert row[-1] == "out of memory"


def test_a_long_study_shows_the_packs_that_were_furthest_off_in_the_order_of_time():
    readings = [reading(0.0001 * ((37 * n) % 100), trials=(n,)) for n in range(100)]
    shown = [int(row[0]) for row in pack_rows(readings)]
    wanted = sorted(range(100), key=lambda n: -((37 * n) % 100))[:MAX_ROWS]
    assert shown == sorted(wanted)


def test_lowered_lanes_are_a_warning():
    limit = LaneLimit(num_readings=4, margin=0.123, budget_bytes=GIB, lanes_before=8, lanes=5)
    assert (
        "The lanes of a pack were lowered from 8 to 5 after 4 packs: measured peaks may exceed the "
        "estimate by 12.3 %."
    ) in summarize(study(*FEW, limits=(limit,))).warnings


def test_the_console_says_it_in_a_line():
    stream = io.StringIO()
    print_report(study(*FEW), Console(file=stream, width=400))
    [line] = [line for line in stream.getvalue().splitlines() if line.startswith("Memory:")]
    assert "3 packs measured: peak allocated was -0.5 % to +3.0 % off the estimate" in line


def test_memory_csv_has_every_reading_unrounded(tmp_path):
    snapshot = replace(study(*FEW, reading(0.0, steps=1)), folder=tmp_path)
    paths = write_reports(snapshot)
    assert [path.name for path in paths if path.suffix == ".csv"] == ["trials.csv", "memory.csv"]
    frame = pd.read_csv(tmp_path / "memory.csv", dtype={"trials": str})
    assert list(frame["trials"]) == ["0 1", "2 3", "4", "0 1"]
    assert list(frame["lanes"]) == [2, 2, 1, 2]
    assert list(frame["counted"]) == [True, True, True, False]
    for row, value in zip(frame.to_dict("records"), snapshot.memory.readings, strict=True):
        assert row["allocated_bytes"] == value.measured.allocated_bytes
        assert row["predicted_allocated_bytes"] == value.predicted_allocated_bytes
        assert row["allocated_residual"] == value.measured.allocated_bytes / (4 * GIB) - 1
        assert row["process_bytes"] == value.measured.process_bytes
