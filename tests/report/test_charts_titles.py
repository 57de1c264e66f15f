"""A chart's title says what the data show, and no more: titles for many shapes of studies."""

import re
from dataclasses import replace
from typing import Any

import pytest
from charts_studies import all_diverged_study, gpu_study, searched_study
from report_studies import (
    confirmed_study,
    finished_study,
    fruitless_study,
    single_trial_study,
    unfinished_study,
)

from lora_tune.records import StudySnapshot, TrialState
from lora_tune.report.charts import ReportChart, comparison_charts, importance, study_charts
from lora_tune.report.charts.importance import importance_chart
from lora_tune.report.charts.learning_curves import learning_curves_chart
from lora_tune.report.charts.learning_rate import learning_rate_chart
from lora_tune.report.charts.loss_memory import loss_memory_chart
from lora_tune.report.charts.memory import memory_chart
from lora_tune.report.charts.parallel import parallel_chart
from lora_tune.report.charts.rank_targets import rank_targets_chart
from lora_tune.report.charts.timeline import timeline_chart
from lora_tune.report.comparison import compare_studies
from lora_tune.report.comparison_wording import conclusions
from lora_tune.search import importance as setting_importance


def title(make: Any, study: StudySnapshot) -> str:
    chart: ReportChart | None = make(study)
    assert chart is not None
    return chart.title


def without_divergence(study: StudySnapshot) -> StudySnapshot:
    kept = tuple(t for t in study.trials if t.state is not TrialState.DIVERGED)
    return replace(study, trials=kept)


def test_loss_and_memory() -> None:
    assert (
        title(loss_memory_chart, finished_study())
        == "Trial 3 is tied with the best, trial 7, and needs 0.64 GiB less."
    )
    alone = confirmed_study({"trial 7": (2.30, 2.31), "trial 5": (2.57, 2.58)})
    assert title(loss_memory_chart, alone) == (
        "Trial 7 has the lowest confirmed loss, 2.305, and needs 3.98 GiB alone; the default (trial 5) "
        "needs 3.34 GiB for 2.575."
    )
    cheapest = confirmed_study({"trial 3": (2.30, 2.31), "trial 7": (2.57, 2.58)}, default=None)
    assert title(loss_memory_chart, cheapest) == (
        "Trial 3 has the lowest confirmed loss, 2.305, and needs 3.34 GiB alone, the least of those "
        "confirmed."
    )
    assert title(loss_memory_chart, single_trial_study()) == (
        "Trial 0 is the only candidate that was confirmed: loss 2.335, 3.34 GiB alone."
    )
    assert title(loss_memory_chart, unfinished_study()) == (
        "Not confirmed yet: trial 3 is the best so far, loss 2.303 after 200 steps, 2.72 GiB for a pack of "
        "4 such lanes."
    )
    assert loss_memory_chart(fruitless_study()) is None


def test_learning_rate_with_a_sharp_edge_of_divergence() -> None:
    assert title(learning_rate_chart, finished_study()) == (
        "At the first rung (25 steps) the lowest loss is at a learning rate of 5.28e-4; trials diverge from "
        "1e-3 on."
    )


def test_learning_rate_without_divergence_names_how_far_was_tried() -> None:
    assert title(learning_rate_chart, without_divergence(finished_study())) == (
        "At the first rung (25 steps) the lowest loss is at a learning rate of 5.28e-4; no trial diverged "
        "there up to 8e-4."
    )


def test_learning_rate_where_diverged_and_trained_trials_overlap() -> None:
    study = finished_study()
    low = replace(study.trials[1], config=replace(study.trials[1].config, learning_rate=2e-4))
    trials = (study.trials[0], low, *study.trials[2:])
    text = title(learning_rate_chart, replace(study, trials=trials))
    assert re.search(r"; some trials diverge from \S+ on, others train up to \S+\.$", text)


def test_a_trial_that_diverges_at_a_later_rung_has_trained_at_the_first() -> None:
    trials = without_divergence(finished_study()).trials
    late = replace(trials[0], state=TrialState.DIVERGED, rungs=trials[0].rungs[:1])
    study = replace(finished_study(), trials=(late, *trials[1:]))
    assert title(learning_rate_chart, study).endswith("; no trial diverged there up to 8e-4.")
    rate, parallel = learning_rate_chart(study), parallel_chart(study)
    assert rate is not None
    assert parallel is not None
    assert (rate.spec["datasets"]["diverged"], parallel.spec["datasets"]["diverged"]) == ([], [])
    assert "diverged, at" not in rate.text
    assert rate.caption.endswith("1 trial among the marks diverged at a later rung.")
    assert "Dashed" not in parallel.caption


def test_learning_rate_of_studies_in_which_nothing_trained() -> None:
    assert title(learning_rate_chart, all_diverged_study()) == (
        "All of 12 trials diverged, at a learning rate of 1e-4 and above."
    )
    assert title(learning_rate_chart, fruitless_study()) == (
        "No trial reached the first rung: 4 of 12 trials diverged, at a learning rate of 3e-4 and above."
    )


def test_rank_and_targets_need_two_trials_for_a_claim() -> None:
    study = finished_study()
    assert title(rank_targets_chart, study) == (
        "At the first rung (25 steps) the median loss is lowest at rank 32 (2.632) and with target modules "
        "all-linear (2.620)."
    )
    few = replace(study, trials=(study.trials[3], study.trials[4], study.trials[10]))
    assert title(rank_targets_chart, few) == (
        "Too few trials to compare ranks and target modules: 3 trials, 3 ranks, 3 target sets."
    )
    assert rank_targets_chart(single_trial_study()) is None


def test_learning_curves_say_how_many_were_stopped() -> None:
    assert title(learning_curves_chart, finished_study()) == (
        "Recommended: trial 3, whose training loss went from 4.100 to 3.000 in 10 steps; 6 of 9 trials were "
        "stopped earlier."
    )
    assert title(learning_curves_chart, unfinished_study()).startswith("Best so far: trial 3, ")
    assert "stopped" not in title(learning_curves_chart, single_trial_study())


def test_parallel_coordinates_say_what_the_best_have_in_common() -> None:
    assert title(parallel_chart, finished_study()) == (
        "The 3 best of 9 trials at the first rung (25 steps) have rank 16 to 64, effective step 3e-4 to "
        "5.28e-4 and target modules all-linear."
    )
    # with one lora_alpha for all, the effective step is the learning rate
    one = searched_study(30)
    trials = tuple(replace(t, config=replace(t.config, lora_alpha=32.0)) for t in one.trials)
    assert ", learning rate " in title(parallel_chart, replace(one, trials=trials))
    assert parallel_chart(single_trial_study()) is None


def test_importance_names_the_planted_setting_and_is_silent_about_noise() -> None:
    planted = title(importance_chart, searched_study(80))
    assert planted.startswith("Effective step mattered most for a good loss at the first rung: ")
    assert title(importance_chart, searched_study(40, effect=0.0)).startswith(
        "No setting stands out for certain: "
    )


def test_chart_and_search_agree_on_how_many_trials_are_enough() -> None:
    assert importance.MIN_TRIALS == setting_importance.MIN_TRIALS == 16


def test_memory_speaks_of_a_gpu_alone() -> None:
    assert title(memory_chart, gpu_study()) == (
        "The measured peak of 5 packs was -3.0 % to +10.0 % off the estimate, median +0.0 %; memory ran out "
        "in 1 pack."
    )
    assert memory_chart(finished_study()) is None


def test_the_timeline_says_how_full_the_lanes_were() -> None:
    study = finished_study()
    chart = timeline_chart(study)
    assert chart is not None
    spans = [r.span for t in study.trials[:12] for r in t.rungs if r.span is not None]
    spans += [r.span for r in study.confirmation.runs if r.span is not None]
    busy = sum(span.ended_s - span.began_s for span in spans)
    whole = max(s.ended_s for s in spans) - min(s.began_s for s in spans)
    lanes = len({span.slot for span in spans})
    assert (
        f"{len(spans)} segments in {lanes} lanes fill {100 * busy / (lanes * whole):.0f} %"
        in chart.title
    )


def test_compared_studies_are_told_apart_by_their_rows_and_not_by_overlapping_intervals() -> None:
    good = finished_study()
    worse = confirmed_study({"trial 7": (2.43, 2.44), "trial 5": (2.57, 2.58)})
    worse = replace(worse, folder=worse.folder / "b", lock=replace(worse.lock, name="worse"))
    scores = [study.confirmation.decision.scores[0] for study in (good, worse)]
    assert scores[1].low < scores[0].high, "the intervals overlap, the rows are as hard for both"
    losses, memory = comparison_charts([good, worse])
    assert losses.title == (
        "docstrings has the lowest confirmed loss, 2.335; the other is higher by more than noise."
    )
    assert memory.title == (
        "What is recommended needs 3.34 GiB (docstrings) to 3.98 GiB (worse) to train alone."
    )
    same = replace(good, folder=good.folder / "c", lock=replace(good.lock, name="same"))
    assert comparison_charts([good, same])[0].title == (
        "docstrings has the lowest confirmed loss, 2.335; not to be told from it: same."
    )


def test_a_title_and_the_sentences_of_a_comparison_agree_on_what_is_noise() -> None:
    """Of two differences one alone would count: with both, by Holm, it does not."""
    study = finished_study()
    shifts = {"first": 0.0, "second": 0.03, "third": 0.031}
    studies = [
        replace(
            confirmed_study({"trial 7": (2.329 + s, 2.341 + s), "trial 5": (2.571, 2.579)}),
            folder=study.folder / name,
            lock=replace(study.lock, name=name),
        )
        for name, s in shifts.items()
    ]
    found = compare_studies(studies)
    second = found.groups[0].differences[0]
    assert second.low > 0, "the interval of the pair alone excludes 0"
    assert second.p_adjusted >= 0.05
    sentences = " ".join(conclusions(found))
    assert sentences.count("inside noise") == 2
    assert comparison_charts(studies)[0].title.endswith("not to be told from it: second and third.")


def test_studies_on_other_rows_are_not_compared() -> None:
    first = finished_study()
    base = first.confirmation.base_evaluation
    other_base = replace(base, loss_sums=tuple(2 * loss for loss in base.loss_sums))
    other = replace(
        first,
        folder=first.folder / "b",
        lock=replace(first.lock, name="other", data=replace(first.lock.data, sha256="0" * 64)),
        confirmation=replace(first.confirmation, base_evaluation=other_base),
    )
    losses, _ = comparison_charts([first, other])
    assert losses.title == (
        "Not all were confirmed on the same rows, and losses on other rows do not compare: "
        "docstrings 2.335 and other 2.335."
    )
    assert "losses on other rows do not compare" in losses.caption


@pytest.mark.parametrize("study", [finished_study, unfinished_study, gpu_study, fruitless_study])
def test_the_text_alternative_has_numbers(study: Any) -> None:
    for chart in study_charts(study()):
        assert len(re.findall(r"\d", chart.text)) >= 3, chart.name
