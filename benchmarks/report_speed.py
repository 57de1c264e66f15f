"""How long ``lora-tune report`` takes on a large study: the whole command, and its parts.

    python benchmarks/report_speed.py [--trials N] [--output FILE]

The study folder is made first, with records as a real study writes them: three rungs, the losses of 1,000
rows and 60 training points a rung, a confirmation and readings of a GPU. The command runs in a new
process each time; the parts are timed in one further process.
"""

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import TypeVar

from lora_tune.records import (
    Behaviour,
    Candidate,
    Confirmation,
    ConfirmationRun,
    EvalResult,
    GeneralLoss,
    LaneSpan,
    MemoryLog,
    MemoryReading,
    PackPeak,
    Point,
    RungResult,
    Sample,
    SampleAnswer,
    StudyLock,
    SuggestedParams,
    TrialConfig,
    TrialRecord,
    TrialState,
)
from lora_tune.stats.selection import CandidateRuns, decide
from lora_tune.store.folder import StudyFolder
from lora_tune.units import GIB, MIB

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results" / "report-cpu.json"
SAMPLE = ROOT / "reports" / "sample"  # its lock is the model of the large study's
STEPS = (100, 300, 900)
NUM_ROWS, NUM_POINTS, NUM_LANES = 1_000, 60, 8
RANKS, RATIOS, DROPOUTS = (4, 8, 16, 32, 64, 128), (0.25, 0.5, 1.0, 2.0, 4.0, 8.0), (0.0, 0.05, 0.1)
STARTS = 5

T = TypeVar("T")


def evaluation(loss: float, *, split: str, seed: int) -> EvalResult:
    """Return the losses of all rows around a mean."""
    rows, own = random.Random(split), random.Random(seed)
    counts = tuple(rows.randint(8, 400) for _ in range(NUM_ROWS))
    sums = tuple(n * max(0.01, loss + rows.gauss(0, 0.4) + own.gauss(0, 0.05)) for n in counts)
    return EvalResult(split=split, loss_sums=sums, label_counts=counts, compute_dtype="bfloat16")


def rung_result(number: int, rung: int, loss: float) -> RungResult:
    """Return what a trial showed at a rung."""
    began = 0 if rung == 0 else STEPS[rung - 1]
    steps = [began + (i + 1) * (STEPS[rung] - began) // NUM_POINTS for i in range(NUM_POINTS)]
    own = random.Random(number * 10 + rung)
    found = evaluation(loss, split="selection", seed=number * 10 + rung)
    start_s = 60.0 + 500.0 * (number // NUM_LANES) + 150.0 * rung
    return RungResult(
        rung=rung,
        steps=STEPS[rung],
        eval_loss=found.mean_loss,
        evaluation=found,
        points=tuple(
            Point(
                step=step,
                train_loss=loss + own.gauss(0.05, 0.1),
                learning_rate=3e-4,
                grad_norm=abs(own.gauss(0.8, 0.2)),
                num_tokens=step * 4_096,
            )
            for step in steps
        ),
        wall_s=140.0,
        num_tokens=(STEPS[rung] - began) * 4_096,
        peak_bytes=14 * GIB + number * MIB,
        pack_lanes=NUM_LANES,
        span=LaneSpan(slot=number % NUM_LANES, began_s=start_s, ended_s=start_s + 140.0),
    )


def trial(number: int, targets: Sequence[str]) -> TrialRecord:
    """Return a trial; of nine, one diverged and the others reached rung 2, 1 or 0."""
    own = random.Random(number)
    rank, ratio = own.choice(RANKS), own.choice(RATIOS)
    step = 10 ** own.uniform(-4.5, -3)
    reached = (0, 3, 2, 2, 1, 1, 1, 1, 1)[number % 9]
    loss = 1.2 + 0.1 * abs(own.gauss(0, 1))
    target_set = own.choice(targets)
    dropout = own.choice(DROPOUTS)
    return TrialRecord(
        number=number,
        state=(TrialState.DIVERGED, TrialState.PRUNED, TrialState.PRUNED, TrialState.COMPLETE)[
            reached
        ],
        origin="anchor A1" if number == 1 else "tpe",
        suggested=SuggestedParams(
            rank=rank,
            alpha_ratio=ratio,
            lora_dropout=dropout,
            target_set=target_set,
            effective_step=step,
        ),
        config=TrialConfig(
            rank=rank,
            lora_alpha=rank * ratio,
            lora_dropout=dropout,
            target_set=target_set,
            target_modules=tuple(f"model.layers.{i}.mlp.up_proj" for i in range(32)),
            learning_rate=step * 32 / (rank * ratio),
            init_seed=number,
            dropout_seed=number,
        ),
        predicted_bytes=13 * GIB + rank * 20 * MIB,
        trainable_parameters=rank * 655_360,
        rungs=tuple(rung_result(number, i, loss + 0.1 * (2 - i)) for i in range(reached)),
        reason="" if reached == 3 else "not promoted" if reached else "loss 9.81 at step 14",
        first_loss=None if reached else 2.3,
        penalty=None if reached else 4.5,
    )


def confirmation(trials: Sequence[TrialRecord]) -> Confirmation:
    """Return three finalists and the default, three seeds each, decided by the real rule."""
    best = sorted((t for t in trials if len(t.rungs) == 3), key=lambda t: t.rungs[-1].eval_loss)
    found = {t.number: t for t in [*best[:3], trials[1]]}
    candidates = tuple(
        Candidate(
            name=f"trial {t.number}",
            trial=t.number,
            config=t.config,
            steps=STEPS[-1],
            predicted_bytes=t.predicted_bytes,
            trainable_parameters=t.trainable_parameters,
        )
        for t in found.values()
    )
    runs = tuple(
        ConfirmationRun(
            candidate=f"trial {number}",
            seed=seed,
            state=TrialState.COMPLETE,
            evaluation=evaluation(
                t.rungs[-1].eval_loss, split="confirmation", seed=number * 7 + seed
            ),
            wall_s=420.0,
            num_tokens=STEPS[-1] * 4_096,
            peak_bytes=14 * GIB,
            pack_lanes=NUM_LANES,
            span=LaneSpan(slot=(place * 3 + seed) % NUM_LANES, began_s=5e4, ended_s=5.05e4),
        )
        for place, (number, t) in enumerate(found.items())
        for seed in range(3)
    )
    decision = decide(
        [
            CandidateRuns(
                name=c.name,
                evaluations=tuple(
                    r.evaluation for r in runs if r.candidate == c.name and r.evaluation
                ),
                peak_bytes=c.predicted_bytes,
                step_s=0.5,
                rank=c.config.rank,
                lora_dropout=c.config.lora_dropout,
            )
            for c in candidates
        ],
        default="trial 1",
        practical_margin=0.005,
    )
    return Confirmation(
        candidates=candidates,
        default="trial 1",
        seeds=3,
        runs=runs,
        base_evaluation=evaluation(1.9, split="confirmation", seed=5),
        base_selection_loss=1.9,
        decision=decision,
    )


def readings(count: int) -> MemoryLog:
    """Return measured packs beside their estimates."""
    own = random.Random(3)
    peaks = [14 * GIB + own.randint(-300, 300) * MIB for _ in range(count)]
    return MemoryLog(
        readings=tuple(
            MemoryReading(
                measured=PackPeak(
                    device="NVIDIA GeForce RTX 4090",
                    trials=tuple(range(number, number + NUM_LANES)),
                    steps=100,
                    rows=NUM_LANES,
                    max_length=512,
                    num_labels=2_048,
                    allocated_bytes=peak,
                    reserved_bytes=peak + 500 * MIB,
                    process_bytes=peak + 900 * MIB,
                    free_bytes=23 * GIB,
                ),
                predicted_allocated_bytes=14 * GIB,
                predicted_reserved_bytes=14 * GIB + 400 * MIB,
            )
            for number, peak in enumerate(peaks)
        ),
        limits=(),
    )


def behaviour(chosen: str) -> Behaviour:
    """Return five prompts with an answer of each of three subjects."""
    subjects = ("untuned base", "trial 1", chosen)
    return Behaviour(
        chosen=chosen,
        default="trial 1",
        samples=tuple(
            Sample(
                row=row,
                prompt="What does this function do? " * 20,
                reference="It returns the mean. " * 10,
                answers=tuple(
                    SampleAnswer(
                        subject=s, text=f"It returns {s}. " * 10, num_tokens=60, ended=True
                    )
                    for s in subjects
                ),
            )
            for row in range(5)
        ),
        max_new_tokens=256,
        general_text="plain prose",
        general_tokens=2_000,
        general_losses=tuple(GeneralLoss(subject=s, loss=3.1) for s in subjects),
    )


def make_study(path: Path, *, num_trials: int) -> None:
    """Write a finished study of so many trials."""
    folder = StudyFolder(path)
    sample = StudyFolder(SAMPLE).load_lock()
    assert sample is not None
    trials = [trial(n, [s.name for s in sample.target_sets]) for n in range(num_trials)]
    folder.path.mkdir(parents=True)
    folder.save_lock(large_lock(sample, num_trials))
    for record in trials:
        folder.save_trial(record)
    confirmed = confirmation(trials)
    assert confirmed.decision is not None
    folder.save_confirmation(confirmed)
    folder.save_memory(readings(num_trials // 2))
    folder.save_behaviour(behaviour(confirmed.decision.chosen))
    folder.save_runtime(51_000.0)


def large_lock(sample: StudyLock, num_trials: int) -> StudyLock:
    """Return the sample's lock with the splits, rungs and device of the large study."""
    plan = sample.study_plan
    return replace(
        sample,
        name="large",
        data=replace(sample.data, num_selection=NUM_ROWS, num_confirmation=NUM_ROWS),
        plan=replace(sample.plan, device="cuda", lanes=NUM_LANES, budget_bytes=22 * GIB),
        rungs=STEPS,
        eval_rows=(NUM_ROWS,) * len(STEPS),
        study_plan=plan
        and replace(plan, rungs=STEPS, total_steps=STEPS[-1], num_trials=num_trials, seeds=3),
    )


def commands(folder: Path) -> dict[str, list[float]]:
    """Return wall and processor seconds of the whole command, shortest first."""
    wall, processor = [], []
    for _ in range(STARTS):
        start, before = time.perf_counter(), os.times()
        subprocess.run(
            [sys.executable, "-m", "lora_tune.cli", "report", str(folder)],
            check=True,
            capture_output=True,
        )
        after = os.times()
        wall.append(round(time.perf_counter() - start, 2))
        processor.append(round(sum(after[2:4]) - sum(before[2:4]), 2))
    return {"wall_s": sorted(wall), "processor_s": sorted(processor)}


def parts(folder: Path) -> dict[str, dict[str, float]]:
    """Return wall and processor seconds of each part, in the order in which the command needs them."""
    found: dict[str, dict[str, float]] = {}

    def timed(name: str, call: Callable[[], T]) -> T:
        start, before = time.perf_counter(), time.process_time()
        result = call()
        found[name] = {
            "wall_s": round(time.perf_counter() - start, 3),
            "processor_s": round(time.process_time() - before, 3),
        }
        return result

    def imports() -> None:
        import pandas  # noqa: F401
        import rich.console  # noqa: F401

        import lora_tune.report.files
        import lora_tune.report.study_page  # noqa: F401

    timed("imports, pandas and altair included", imports)
    from lora_tune.report.charts import chart_bundle, chart_svg, study_charts
    from lora_tune.report.report_json import report_data
    from lora_tune.report.study_markdown import render_markdown
    from lora_tune.report.study_page import render_html
    from lora_tune.report.summary import summarize
    from lora_tune.report.tables import trials_frame

    snapshot = timed("load the folder", StudyFolder(folder).snapshot)
    timed("summary", lambda: summarize(snapshot))
    charts = timed("chart specs", lambda: study_charts(snapshot))
    timed("first SVG (starts vl-convert)", lambda: chart_svg(charts[0]))
    timed("other SVGs", lambda: [chart_svg(chart) for chart in charts[1:]])
    timed("JavaScript bundle", chart_bundle)
    timed("report.html", lambda: render_html(snapshot, charts=charts))
    timed("report.md", lambda: render_markdown(snapshot, charts=charts))
    timed("report.json", lambda: json.dumps(report_data(snapshot, charts=charts), indent=2))
    timed("trials.csv", lambda: trials_frame(snapshot).to_csv(index=False))
    return found


def measure(num_trials: int) -> dict[str, object]:
    """Make the study, run the command and the parts, and return what they took."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "large"
        make_study(folder, num_trials=num_trials)
        load = os.getloadavg()[
            0
        ]  # of other work: seconds on the clock mean little where it is above 0
        taken = commands(folder)
        program = (
            "import json, pathlib, sys, report_speed; "
            "print(json.dumps(report_speed.parts(pathlib.Path(sys.argv[1]))))"
        )
        done = subprocess.run(
            [sys.executable, "-c", program, str(folder)],
            check=True,
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)},
        )
        records = sum(path.stat().st_size for path in folder.rglob("trial.json"))
        page = folder / "report.html"
        return {
            "trials": num_trials,
            "records_mb": round(records / 1e6, 1),
            "report_html_mb": round(page.stat().st_size / 1e6, 2) if page.exists() else None,
            "load_before": round(load, 2),
            "command": taken,
            "parts": json.loads(done.stdout),
        }


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--trials", type=int, default=500)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    result = {
        **measure(options.trials),
        "machine": {
            "platform": platform.platform(),
            "python": platform.python_version(),
            "cores": os.cpu_count(),
        },
        "versions": {
            name: version(name) for name in ("altair", "vl-convert-python", "pandas", "pydantic")
        },
    }
    text = json.dumps(result, indent=2)
    print(text)
    options.output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
