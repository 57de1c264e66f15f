"""The charts' data are the study's: recomputed here from the snapshot, without the charts' own code."""

import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import altair as alt
import pytest
from charts_studies import all_diverged_study, gpu_study, searched_study
from report_studies import (
    finished_study,
    fruitless_study,
    half_confirmed_study,
    older_study,
    single_trial_study,
    unfinished_study,
)

from lora_tune.catalog.models import find_catalog_model
from lora_tune.catalog.targets import resolve_target_set
from lora_tune.memory.shape import ModelShape
from lora_tune.records import LaneSpan, StudySnapshot, TrialConfig, TrialState
from lora_tune.report.charts import ReportChart, comparison_charts, study_charts
from lora_tune.report.charts.learning_curves import MOST_POINTS, MOST_TRIALS, thinned_curve
from lora_tune.report.charts.learning_rate import EFFECTIVE_STEP, LEARNING_RATE, clearer_axis
from lora_tune.report.charts.loss_memory import alone_bytes
from lora_tune.search.gate import Gate, PackPlan
from lora_tune.study.loader import validate_study
from lora_tune.units import GIB

STUDIES = {
    "finished": finished_study,
    "unfinished": unfinished_study,
    "half confirmed": half_confirmed_study,
    "fruitless": fruitless_study,
    "single trial": single_trial_study,
    "older": older_study,
    "GPU": gpu_study,
    "all diverged": all_diverged_study,
    "40 trials": lambda: searched_study(40),
    "no trials": lambda: replace(finished_study(), trials=(), confirmation=None),
}


_made: dict[int, tuple[StudySnapshot, dict[str, ReportChart]]] = {}  # the study keeps its id taken


def charts_of(study: StudySnapshot) -> dict[str, ReportChart]:
    """Return the charts of a study by name, made once for each object."""
    if id(study) not in _made:
        _made[id(study)] = (study, {chart.name: chart for chart in study_charts(study)})
    return _made[id(study)][1]


def chart_of(study: StudySnapshot, name: str) -> ReportChart:
    return charts_of(study)[name]


def rows_of(study: StudySnapshot, chart: str, rows: str) -> list[dict[str, Any]]:
    datasets: Any = chart_of(study, chart).spec["datasets"]
    return list(datasets[rows])


def names_of(study: StudySnapshot) -> list[str]:
    return list(charts_of(study))


def numbers_in(value: object) -> Iterator[float]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from numbers_in(item)
    elif isinstance(value, float | int):
        yield float(value)


@pytest.mark.parametrize("study", STUDIES.values(), ids=STUDIES)
def test_every_specification_is_valid_complete_and_finite(study: Any) -> None:
    snapshot = study()
    charts = [*study_charts(snapshot)]
    if snapshot.confirmation is not None and snapshot.confirmation.decision is not None:
        charts += comparison_charts([snapshot, replace(snapshot, folder=snapshot.folder / "b")])
    assert len({chart.name for chart in charts}) == len(charts)
    for chart in charts:
        alt.LayerChart.from_dict(chart.spec, validate=True)
        json.dumps(chart.spec, allow_nan=False)
        assert all(math.isfinite(number) for number in numbers_in(chart.spec))
        assert chart.spec["width"] == "container"
        assert "config" not in chart.spec, "the theme is the page's"
        assert chart.spec["description"] == f"{chart.title} {chart.text}"
        assert (chart.title[-1], chart.text[-1], chart.caption[-1]) == (".", ".", ".")
        assert "tooltip" in json.dumps(chart.spec)


def test_which_charts_a_study_has() -> None:
    always = ["loss-memory", "learning-rate", "rank-targets", "learning-curves", "parallel"]
    assert names_of(finished_study()) == [*always, "timeline"]
    assert names_of(gpu_study()) == [*always, "memory", "timeline"]
    assert names_of(older_study()) == always
    assert names_of(fruitless_study()) == ["learning-rate"]
    assert names_of(replace(finished_study(), trials=(), confirmation=None)) == []
    searched = searched_study(20)
    assert names_of(searched) == [*always, "importance", "timeline"]


def test_importance_is_hidden_below_16_results_and_repeats_do_not_count() -> None:
    enough = searched_study(18)  # one of them diverged: 17 results
    assert "importance" in names_of(enough)
    short = replace(enough, trials=enough.trials[:16])  # 15 results
    assert "importance" not in names_of(short)
    repeats = tuple(
        replace(t, number=100 + t.number, state=TrialState.CACHED, repeats=t.number)
        for t in short.trials
    )
    assert "importance" not in names_of(replace(short, trials=(*short.trials, *repeats)))


# Loss and memory.


def test_candidates_of_the_chart_are_those_of_the_decision() -> None:
    study = finished_study()
    decision = study.confirmation.decision
    rows = {
        re.sub(r"the default \((.*)\)", r"\1", row["t"]): row
        for row in rows_of(study, "loss-memory", "candidates")
    }
    assert list(rows) == [score.candidate for score in decision.scores]
    for score in decision.scores:
        row = rows[score.candidate]
        assert row["y"] == pytest.approx(score.loss, rel=1e-5)
        assert (row["lo"], row["hi"]) == pytest.approx((score.low, score.high), rel=1e-5)
        assert row["x"] * GIB == pytest.approx(score.peak_bytes, rel=1e-5)
        assert (row["f"] == "yes") == (score.candidate in decision.front.members)
    assert [rows[name]["k"] for name in ("trial 3", "trial 7", "trial 5")] == [
        "recommended",
        "best",
        "worse than the best",
    ]


def test_the_front_falls_with_memory_and_no_candidate_lies_below_it() -> None:
    study = finished_study()
    front = rows_of(study, "loss-memory", "front")
    assert [row["x"] for row in front] == sorted(row["x"] for row in front)
    assert [row["y"] for row in front] == sorted((row["y"] for row in front), reverse=True)
    for row in rows_of(study, "loss-memory", "candidates"):
        assert not any(row["x"] < p["x"] and row["y"] < p["y"] for p in front)


def test_a_lane_alone_is_worked_out_from_its_pack_as_the_estimate_has_it() -> None:
    """Witness: the closed form itself, asked for one lane and for a pack of eight."""
    model = find_catalog_model("llama-3.1-8b").model
    shape = ModelShape.from_config(model.config)
    spec = validate_study(
        {"model": {"base": "llama-3.1-8b"}, "data": {"train": "rows.jsonl"}},
        source=Path("study.toml"),
    )
    gate = Gate(
        spec, shape, compute_dtype="bfloat16", max_tokens=512, budget_bytes=10**12, group_rank=64
    )
    plan = PackPlan(micro_batch_size=2, gradient_checkpointing=True, most_lanes=8)

    def predict(config: TrialConfig, lanes: int) -> int:
        modules = resolve_target_set(
            config.target_set, model_type=shape.model_type, linears=shape.linear_names
        )
        return gate.predict(replace(config, target_modules=modules), plan, lanes=lanes)[0]

    study = finished_study()
    trials = tuple(replace(t, predicted_bytes=predict(t.config, 8)) for t in study.trials)
    candidates = tuple(
        replace(c, predicted_bytes=predict(c.config, 1)) for c in study.confirmation.candidates
    )
    study = replace(
        study,
        trials=trials,
        confirmation=replace(study.confirmation, candidates=candidates),
        lock=replace(study.lock, plan=replace(study.lock.plan, lanes=8)),
    )
    alone = alone_bytes(study)
    assert len(alone) == len(trials)
    for trial in trials:
        assert alone[trial.number] == pytest.approx(predict(trial.config, 1), rel=0.005)
        assert alone[trial.number] < trial.predicted_bytes / 1.2, "the pack needs far more"


def test_trials_without_a_known_size_alone_are_left_out_and_not_said_to_be_there() -> None:
    study = finished_study()
    default_only = tuple(replace(c, trial=None) for c in study.confirmation.candidates)
    unknown = replace(study, confirmation=replace(study.confirmation, candidates=default_only))
    assert rows_of(unknown, "loss-memory", "trials") == []
    assert "grey" not in chart_of(unknown, "loss-memory").caption


def test_trials_behind_the_candidates_are_not_all_said_to_be_shorter() -> None:
    """Those of the last rung trained as long as a candidate."""
    study = finished_study()
    lone = replace(study, lock=replace(study.lock, plan=replace(study.lock.plan, lanes=1)))
    steps = {row["n"] for row in rows_of(lone, "loss-memory", "trials")}
    assert max(steps) == study.confirmation.candidates[0].steps > min(steps)
    assert "on other rows and many after fewer steps" in chart_of(lone, "loss-memory").caption


# Learning rate, rank and targets.


def first_losses(study: StudySnapshot) -> dict[str, float]:
    return {
        f"trial {t.number}": t.rungs[0].eval_loss
        for t in study.trials
        if t.rungs and t.state is not TrialState.CACHED
    }


def test_the_learning_rate_chart_has_every_trial_of_the_first_rung_once() -> None:
    study = finished_study()
    rows = rows_of(study, "learning-rate", "trials")
    losses = first_losses(study)
    assert {row["t"]: row["l"] for row in rows} == pytest.approx(losses, rel=1e-5)
    assert len(rows) == len(losses) == 9, "the repeat, trial 12, does not count"
    rates = {f"trial {t.number}": t.config.learning_rate for t in study.trials}
    assert all(row["x"] == pytest.approx(rates[row["t"]], rel=1e-5) for row in rows)
    assert [row["t"] for row in rows_of(study, "learning-rate", "diverged")] == ["trial 1"]
    assert [row["t"] for row in rows_of(study, "learning-rate", "chosen")] == ["trial 3"]
    assert rows_of(study, "learning-rate", "edge")[0]["x"] == 1e-3
    top = max(row["y"] for row in rows)
    assert rows_of(study, "learning-rate", "diverged")[0]["y"] > top


def test_the_axis_is_the_one_that_tells_diverged_trials_apart() -> None:
    """Alphas of 8 and 64 with one critical effective step: rates alone overlap, steps do not."""
    template = finished_study().trials[0]

    def made(step: float, alpha: float) -> Any:
        config = replace(template.config, lora_alpha=alpha, learning_rate=32 * step / alpha)
        return replace(template, config=config)

    trained = [made(step, alpha) for step in (1e-4, 8e-4) for alpha in (8.0, 64.0)]
    diverged = [made(step, alpha) for step in (1e-3, 2e-3) for alpha in (8.0, 64.0)]
    assert clearer_axis(trained, diverged) is EFFECTIVE_STEP
    assert clearer_axis(trained, []) is LEARNING_RATE
    same_alpha = ([made(1e-4, 32.0)], [made(1e-3, 32.0)])
    assert clearer_axis(*same_alpha) is LEARNING_RATE


def test_the_bars_of_ranks_are_medians_over_trials() -> None:
    study = finished_study()
    groups: dict[int, list[float]] = {}
    for t in study.trials:
        if t.rungs and t.state is not TrialState.CACHED:
            groups.setdefault(t.config.rank, []).append(t.rungs[0].eval_loss)
    rows = {row["r"]: (row["y"], row["n"]) for row in rows_of(study, "rank-targets", "medians")}
    assert list(rows) == sorted(groups)
    for rank, losses in groups.items():
        assert rows[rank] == (pytest.approx(median(losses), rel=1e-5), len(losses))


def test_a_study_of_one_rank_shows_its_target_sets_instead() -> None:
    study = finished_study()
    trials = tuple(replace(t, config=replace(t.config, rank=16)) for t in study.trials)
    rows = rows_of(replace(study, trials=trials), "rank-targets", "medians")
    assert {row["m"] for row in rows} == {"all-linear", "mlp", "attention", "attention-qv"}


# Curves.


def test_a_thinned_curve_keeps_the_mean_and_the_order_of_steps() -> None:
    trial = searched_study(1).trials[0]
    curve = thinned_curve(trial, size=3)
    assert curve is not None
    steps = [step for step, _ in curve.points]
    assert steps == sorted(steps)
    points = trial.rungs[0].points
    assert len(curve.points) == len(points) / 3
    assert curve.last_step == 120
    assert curve.points[1] == (5.0, pytest.approx(sum(p.train_loss for p in points[3:6]) / 3))
    whole = sum(loss for _, loss in curve.points) / len(curve.points)
    assert whole == pytest.approx(sum(p.train_loss for p in points) / len(points))


def test_the_longest_curve_of_a_study_has_50_points() -> None:
    study = searched_study(8)
    study = replace(study, lock=replace(study.lock, rungs=(120,)))
    counts = Counter(row["t"] for row in rows_of(study, "learning-curves", "behind"))
    assert set(counts.values()) == {40}  # of 120 steps, three a point
    longer = replace(study, lock=replace(study.lock, rungs=(120, 1000)))
    counts = Counter(row["t"] for row in rows_of(longer, "learning-curves", "behind"))
    assert set(counts.values()) == {120 / (1000 / MOST_POINTS)}


def test_the_branch_that_cooled_down_gives_way_to_the_rung_after_it() -> None:
    trial = finished_study().trials[0]
    first, second = trial.rungs[0], trial.rungs[1]
    point = first.points[0]
    branch = replace(
        first, points=tuple(replace(point, step=s, train_loss=9.0) for s in (1, 2, 3, 4))
    )
    later = replace(second, points=tuple(replace(point, step=s, train_loss=1.0) for s in (3, 4, 5)))
    curve = thinned_curve(replace(trial, rungs=(branch, later)), size=1)
    assert curve is not None
    assert curve.points == ((1, 9.0), (2, 9.0), (3, 1.0), (4, 1.0), (5, 1.0))


def test_curves_are_of_the_best_trials_and_the_recommended_one_is_in_front() -> None:
    study = finished_study()
    assert {row["t"] for row in rows_of(study, "learning-curves", "front")} == {"trial 3"}
    assert "trial 3" not in {row["t"] for row in rows_of(study, "learning-curves", "behind")}
    many = searched_study(120)
    best = sorted((t.rungs[0].eval_loss, t.number) for t in many.trials if t.rungs)[:MOST_TRIALS]
    shown = {row["t"] for row in rows_of(many, "learning-curves", "trials")}
    assert shown == {f"trial {number}" for _, number in best}
    assert "the best 40 of 108" in chart_of(many, "learning-curves").caption


def test_evaluations_stand_at_the_end_of_their_rung() -> None:
    study = finished_study()
    rows = rows_of(study, "learning-curves", "front_evaluations")
    expected = [(r.steps, pytest.approx(r.eval_loss, rel=1e-5)) for r in study.trials[3].rungs]
    assert [(row["x"], row["l"]) for row in rows] == expected


# Parallel coordinates.


def test_lines_stand_where_their_settings_are() -> None:
    study = finished_study()
    rows = {row["t"]: row for row in rows_of(study, "parallel", "trials")}
    losses = first_losses(study)
    assert set(rows) == set(losses)
    by_loss = sorted(losses, key=lambda name: losses[name])
    assert (rows[by_loss[0]]["p5"], rows[by_loss[0]]["c"]) == (0, 0)
    assert rows[by_loss[-1]]["c"] == 1
    trials = {f"trial {t.number}": t for t in study.trials}
    for place, value in (("p0", "rank"), ("p2", "lora_dropout")):
        ordered = sorted(rows.values(), key=lambda row: row[place])
        values = [getattr(trials[row["t"]].config, value) for row in ordered]
        assert values == sorted(values)
    places = [row[f"p{i}"] for row in rows.values() for i in range(6)]
    assert all(0 <= place <= 1 for place in places)
    ticks = rows_of(study, "parallel", "ticks")
    assert [tick["v"] for tick in ticks if tick["k"] == "rank"] == ["8", "16", "32", "64"]


# Memory and time.


def test_memory_marks_are_the_readings() -> None:
    study = gpu_study()
    rows = rows_of(study, "memory", "packs")
    for kind, predicted, measured in (
        ("allocated", "predicted_allocated_bytes", "allocated_bytes"),
        ("reserved", "predicted_reserved_bytes", "reserved_bytes"),
    ):
        marks = [(row["x"], row["y"]) for row in rows if row["k"] == kind]
        assert marks == [
            (
                pytest.approx(getattr(r, predicted) / GIB, rel=1e-5),
                pytest.approx(getattr(r.measured, measured) / GIB, rel=1e-5),
            )
            for r in study.memory.readings
        ]
    assert rows[0]["t"] == "0, 1, 2 and 3"
    assert [row["o"] for row in rows[-2:]] == ["ran out", "ran out"]
    assert rows_of(study, "memory", "budget")[0]["y"] == 4.0


def test_a_budget_far_above_the_readings_is_said_instead_of_drawn() -> None:
    study = gpu_study()
    plan = replace(study.lock.plan, budget_bytes=80 * GIB)
    study = replace(study, lock=replace(study.lock, plan=plan))
    assert rows_of(study, "memory", "budget") == []
    assert "80.00 GiB, lies above the chart" in chart_of(study, "memory").caption


def test_the_timeline_has_every_segment_that_has_a_time() -> None:
    study = finished_study()
    rows = rows_of(study, "timeline", "segments")
    spans = [
        (r.span.slot, r.span.began_s, r.span.ended_s)
        for t in study.trials
        if t.state is not TrialState.CACHED
        for r in t.rungs
        if r.span is not None
    ]
    spans += [
        (r.span.slot, r.span.began_s, r.span.ended_s)
        for r in study.confirmation.runs
        if r.span is not None
    ]
    assert len(spans) > 10
    shown = sorted((row["y"] - 1, 60 * row["x"], 60 * row["e"]) for row in rows)
    for bar, span in zip(shown, sorted(spans), strict=True):
        assert bar == pytest.approx(span, rel=1e-4)
    assert {row["k"] for row in rows} == {"rung 0", "rung 1", "rung 2", "confirmation"}


def test_a_trial_that_ended_early_has_a_bar_where_it_did() -> None:
    study = finished_study()
    assert "Pale" not in chart_of(study, "timeline").caption
    trials = list(study.trials)
    spans = [LaneSpan(slot=0, began_s=60.0, ended_s=s) for s in (66.0, 120.0)]
    trials[1] = replace(trials[1], span=spans[0])  # diverged before the first rung
    trials[2] = replace(trials[2], state=TrialState.INFEASIBLE, span=spans[1])  # after it
    early = replace(study, trials=tuple(trials))
    rows = rows_of(early, "timeline", "segments")
    found = [(r["t"], r["k"], r["s"], r["p"]) for r in rows if r["t"] in ("trial 1", "trial 2")]
    assert sorted(found) == [
        ("trial 1", "rung 0", "diverged", 1),
        ("trial 2", "rung 0", "promoted", 0),
        ("trial 2", "rung 1", "infeasible", 1),
    ]
    [bar] = [row for row in rows if row["t"] == "trial 1"]
    assert (bar["y"], bar["x"], bar["e"], bar["n"]) == (1, 1.0, 1.1, 25)
    assert len(rows) == len(rows_of(study, "timeline", "segments")) + 2
    chart = chart_of(early, "timeline")
    assert "Pale bars ended early" in chart.caption
    assert "no bar" not in chart.caption
    assert chart.text.endswith("; 2 segments ended early.")


# Several studies.


def test_a_comparison_has_each_studys_recommendation_default_and_base() -> None:
    first = finished_study()
    second = replace(
        finished_study(first.folder / "other"), lock=replace(first.lock, name="second")
    )
    losses, memory = comparison_charts([first, second])
    rows: Any = losses.spec["datasets"]["losses"]  # type: ignore[index]
    assert [(row["n"], row["k"]) for row in rows] == [
        (name, role)
        for name in ("docstrings", "second")
        for role in ("recommended", "default", "untuned base")
    ]
    decision = first.confirmation.decision
    loss = {score.candidate: score.loss for score in decision.scores}
    assert rows[0]["y"] == pytest.approx(loss["trial 3"], rel=1e-5)
    assert rows[1]["y"] == pytest.approx(loss["trial 5"], rel=1e-5)
    assert rows[2]["y"] == pytest.approx(first.confirmation.base_evaluation.mean_loss, rel=1e-5)
    marks: Any = memory.spec["datasets"]["candidates"]  # type: ignore[index]
    assert len(marks) == 2 * len(decision.scores)


def test_studies_of_one_name_are_told_apart_by_their_folders() -> None:
    first = finished_study()
    losses, _ = comparison_charts([first, replace(first, folder=first.folder / "again")])
    rows: Any = losses.spec["datasets"]["losses"]  # type: ignore[index]
    assert {row["n"] for row in rows} == {"reports/docstrings", "reports/docstrings/again"}


def test_nothing_is_compared_before_a_study_has_decided() -> None:
    waiting = unfinished_study()
    assert comparison_charts([waiting, replace(waiting, folder=waiting.folder / "b")]) == ()
    done = finished_study(waiting.folder / "done")
    charts = comparison_charts([waiting, done])
    assert [chart.name for chart in charts] == ["compare-losses", "compare-memory"]


# Size.


def test_the_specifications_of_500_trials_stay_below_a_megabyte() -> None:
    study = searched_study(500)
    charts = study_charts(study)
    sizes = {c.name: len(json.dumps(c.spec, separators=(",", ":"))) for c in charts}
    assert len(sizes) == 7
    assert sum(sizes.values()) < 1_000_000, sizes
