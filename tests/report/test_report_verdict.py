"""The sentences on a confirmation, against decisions made by the real rule on made-up losses.

With 96 rows the error of a paired difference is about 0.006 nats per token.
"""

from dataclasses import replace

import pytest
from report_studies import confirmation, confirmed_study, finished_study

from lora_tune.records import Decision, StudySnapshot, TrialState, Verdict
from lora_tune.report import summarize, verdict, wording
from lora_tune.report.confirmation import ConfirmationSummary, Standing


def confirmed(losses, *, default="trial 5") -> ConfirmationSummary:
    """Return the summary of a confirmation with these losses."""
    summary = summarize(confirmed_study(losses, default=default)).confirmation
    assert summary is not None
    return summary


def with_decision(study: StudySnapshot, **changes: object) -> ConfirmationSummary:
    """Return the summary of a study with other fields of its decision."""
    decision = replace(study.confirmation.decision, **changes)
    study = replace(study, confirmation=replace(study.confirmation, decision=decision))
    return summarize(study).confirmation


def decision_of(c: ConfirmationSummary) -> Decision:
    """Return the decision, which is there."""
    assert c.decision is not None
    return c.decision


def test_better_says_by_how_much_how_sure_and_on_what():
    c = confirmed({"trial 7": (2.329, 2.333), "trial 5": (2.571, 2.579)})
    text = verdict.verdict_sentence(c)
    assert text.startswith(
        "Better than the default: the loss of trial 7 is 0.24 nats per token (9.5 %) below that of "
        "the default configuration (95 % interval 0.2"
    )
    assert text.endswith(", 2 seeds, 96 unseen rows).")
    assert "did not beat" not in text


def test_a_cheaper_choice_than_the_best_is_said_to_beat_the_default_as_well():
    text = verdict.verdict_sentence(summarize(finished_study()).confirmation)
    # (2.575 - 2.335) and its share of 2.575
    assert text.endswith("So is the recommended trial 3, tied with it, by 0.24 (9.3 %).")


def test_same_names_the_smallest_difference_that_could_be_seen():
    c = confirmed({"trial 7": (2.331, 2.335), "trial 5": (2.333, 2.339)})
    assert decision_of(c).verdict is Verdict.SAME
    text = verdict.verdict_sentence(c)
    assert text.startswith(
        "No measurable difference from the default: the loss of trial 7 is 0.0030 nats per token (0.1 %) "
        "below that of the default configuration (95 % interval of the difference -0.0"
    )
    assert "inside noise" in text
    seen = f"{decision_of(c).smallest_visible:.3f}"
    assert f"would show in 4 of 5 studies is {seen}." in text
    assert text.endswith("Tuning did not beat the default.")


def test_same_by_the_practical_margin_is_not_called_noise():
    c = confirmed({"trial 7": (2.331, 2.335), "trial 5": (2.334, 2.338)})
    comparison = replace(decision_of(c).against_default, low=-0.005, high=-0.001)
    decision = replace(decision_of(c), against_default=comparison)
    text = verdict.verdict_sentence(replace(c, decision=decision))
    assert text == (
        "No difference that matters from the default: the loss of trial 7 is 0.0030 nats per token "
        "(0.1 %) below that of the default configuration (95 % interval 0.0010 to 0.0050, 2 seeds, 96 "
        "unseen rows), less than the practical margin of 0.5 %. Tuning did not beat the default."
    )


def test_same_by_the_number_of_candidates_names_the_corrected_p_value():
    c = confirmed({"trial 7": (2.331, 2.335), "trial 5": (2.334, 2.338)})
    comparison = replace(
        decision_of(c).against_default, difference=-0.05, low=-0.09, high=-0.01, p_adjusted=0.0712
    )
    decision = replace(decision_of(c), against_default=comparison)
    text = verdict.verdict_sentence(replace(c, decision=decision))
    assert text.startswith("No sure difference from the default: the loss of trial 7 is 0.05")
    assert "several candidates were compared with it (p = 0.07 by Holm's correction)." in text
    assert "inside noise" not in text
    assert "practical margin" not in text


def test_worse_recommends_the_default():
    study = confirmed_study({"trial 7": (2.57, 2.58), "trial 5": (2.329, 2.331)})
    c = summarize(study).confirmation
    assert decision_of(c).verdict is Verdict.WORSE
    text = verdict.verdict_sentence(c)
    assert text.startswith(
        "Worse than the default: the loss of trial 7, the best of the search, is 0.24 nats per token "
        "(10.5 %) above"
    )
    assert "The default is recommended; tuning did not beat the default." in text
    assert wording.headline(summarize(study)).startswith("Use the default (trial 5): rank 16,")


def test_without_a_default_there_is_no_verdict_and_that_is_said():
    text = verdict.verdict_sentence(confirmed({"trial 7": (2.3, 2.31)}, default=None))
    assert text == (
        "No verdict against the default: this study has no default configuration to compare with."
    )


def test_a_default_that_failed_is_named_with_its_reason():
    c = confirmed({"trial 7": (2.3, 2.31), "trial 5": (2.5, None)})
    assert decision_of(c).verdict is Verdict.NONE
    assert verdict.verdict_sentence(c) == (
        "No verdict against the default: the default configuration could not be trained "
        "(seed 1 diverged: loss 9.02 at step 31)."
    )
    assert c.candidate("trial 5").standing is Standing.FAILED


@pytest.mark.parametrize(
    ("losses", "words"),
    [
        ({"trial 0": (2.33, 2.33), "trial 7": (2.333, 2.335)}, "it is the best."),
        ({"trial 7": (2.33, 2.33), "trial 0": (2.333, 2.335)}, "it is tied with the best."),
    ],
)
def test_the_first_anchor_in_the_tie_set_is_said_not_to_be_beaten(losses, words):
    summary = summarize(confirmed_study({**losses, "trial 5": (2.57, 2.58)}))
    text = wording.recommendation(summary)
    assert "Better than the default" in text
    assert f"Tuning did not beat the tool's own default, anchor A1 (trial 0): {words}" in text


def test_the_first_anchor_that_was_beaten_is_not_mentioned():
    losses = {"trial 7": (2.33, 2.33), "trial 0": (2.45, 2.46), "trial 5": (2.57, 2.58)}
    assert "anchor A1" not in wording.recommendation(summarize(confirmed_study(losses)))


def test_the_price_of_the_cheapest_is_what_it_saves_and_costs():
    c = summarize(finished_study()).confirmation
    assert verdict.price_sentence(c) == (
        "Price of the cheapest: trial 3 instead of trial 7 is -0.64 GiB, rank 16 instead of 32, for a "
        "loss 0.2 % higher, inside noise."
    )
    alone = confirmed({"trial 7": (2.3, 2.31), "trial 5": (2.57, 2.58)})
    assert verdict.price_sentence(alone) == ""


def test_an_unresolved_tie_names_the_rows_that_would_settle_it():
    study = finished_study()
    c = with_decision(study, unresolved=("trial 3",), rows_needed=1234)
    text = " ".join(verdict.confirmation_items(c))
    assert "Not settled: trial 3 may be worse than trial 7" in text
    assert "About 1,200 confirmation rows would settle it." in text
    assert c.candidate("trial 3").standing is Standing.UNRESOLVED
    c = with_decision(study, unresolved=("trial 3",), rows_needed=None)
    assert "More seeds are needed for it." in " ".join(verdict.confirmation_items(c))


def test_seed_noise_power_and_front_are_stated():
    c = summarize(finished_study()).confirmation
    text = " ".join(verdict.confirmation_items(c))
    # The seeds of each candidate are 0.004, 0.004 and 0.008 apart: sqrt of the mean of d**2 / 2.
    assert decision_of(c).seed_sd == pytest.approx((((0.004**2) * 2 + 0.008**2) / 6) ** 0.5)
    assert "differ from seed to seed by 0.0040 (standard deviation)" in text
    assert f"would show in 4 of 5 studies is {decision_of(c).smallest_visible:.3f}." in text
    assert f"would need about {decision_of(c).rows_needed / 10:.0f}0 confirmation rows." in text
    front = decision_of(c).front
    assert "): trial 7 and trial 3. Lowest loss: trial 7;" in text
    assert f"best balance (knee): {front.knee}; smallest within" in text
    assert text.endswith("practical margin: trial 3.")


def test_a_split_that_sees_the_margin_says_that_it_is_enough():
    c = with_decision(finished_study(), smallest_visible=0.001)
    assert "That is enough for the practical margin" in " ".join(verdict.confirmation_items(c))
    c = with_decision(finished_study(), rows_needed=None)
    assert "needs more seeds; more rows alone" in " ".join(verdict.confirmation_items(c))
    c = with_decision(finished_study(), smallest_visible=float("inf"))
    assert "cannot be told from so few rows" in " ".join(verdict.confirmation_items(c))


def test_one_seed_is_said_to_show_no_seed_noise():
    c = confirmed({"trial 7": (2.331,), "trial 5": (2.57,)})
    assert "one seed, which shows no seed noise" in verdict.verdict_sentence(c)
    text = " ".join(verdict.confirmation_items(c))
    assert "Set select.seeds to 2 or more." in text
    assert "over 1 seed (a training" in text
    assert (
        verdict.adapter_sentence(c) == "The adapter is that of the one fresh training of trial 7."
    )


def test_search_score_confirmed_score_and_gap_stand_side_by_side():
    text = " ".join(verdict.confirmation_items(summarize(finished_study()).confirmation))
    assert "In the search its loss was 2.303 on 96 selection rows, computed in bfloat16" in text
    assert "the one to quote, is 0.032 higher; from these rows to those the untuned base" in text


def test_a_candidate_that_the_search_ended_early_has_no_gap():
    c = summarize(finished_study()).confirmation
    default = c.candidate("trial 5")
    assert (default.search_loss, default.gap) == (None, None)


def test_the_shipped_adapter_is_named_by_its_seed_or_as_trained_on_all_rows():
    study = finished_study()
    c = summarize(study).confirmation
    assert decision_of(c).median_seed == 0
    assert verdict.adapter_sentence(c) == (
        "The adapter is that of trial 3, seed 0: of its 2 seeds the one of higher loss, not the "
        "luckiest."
    )
    four = confirmed({"trial 7": (2.30, 2.33, 2.31, 2.32), "trial 5": (2.57, 2.58, 2.57, 2.58)})
    assert "seed 3: of its 4 seeds the upper of the two in the middle" in (
        verdict.adapter_sentence(four)
    )
    three = confirmed({"trial 7": (2.30, 2.33, 2.31), "trial 5": (2.57, 2.58, 2.57)})
    assert verdict.adapter_sentence(three) == (
        "The adapter is that of trial 7, seed 2: of its 3 seeds the median by loss, not the luckiest."
    )
    refit = replace(c, refit=True)
    assert "was not scored" in verdict.adapter_sentence(refit)
    lost = verdict.adapter_sentence(replace(c, refit_wanted=True))
    assert lost.endswith(
        "not the luckiest. The training on all rows that select.refit asks for has not come to its end."
    )


def test_grouped_rows_are_counted_as_groups():
    study = finished_study()
    trials = study.trials
    made = confirmation(trials, {"trial 7": (2.33, 2.33), "trial 5": (2.57, 2.57)})
    decision = replace(made.decision, num_clusters=24)
    study = replace(study, confirmation=replace(made, decision=decision))
    text = verdict.verdict_sentence(summarize(study).confirmation)
    assert "96 unseen rows in 24 groups)" in text


def test_an_overfitted_leader_says_at_which_step_it_was_kept():
    study = finished_study()
    kept = confirmation(study.trials, {"trial 0": (2.33, 2.33), "trial 5": (2.57, 2.57)})
    study = replace(study, confirmation=kept)
    text = " ".join(wording.certainty(summarize(study)))
    assert "Trial 0 was better after 100 steps than after 200" in text


def test_a_run_that_is_still_going_counts_neither_as_done_nor_as_failed():
    study = finished_study()
    runs = tuple(
        replace(run, state=TrialState.RUNNING, evaluation=None) if run.seed == 1 else run
        for run in study.confirmation.runs
    )
    begun = replace(study.confirmation, runs=runs, decision=None)
    c = summarize(replace(study, confirmation=begun)).confirmation
    assert (c.num_runs, c.num_runs_planned) == (3, 6)
    assert all(candidate.reasons == () for candidate in c.candidates)


def test_a_front_of_one_candidate_is_called_no_trade_off():
    c = confirmed({"trial 3": (2.3, 2.31), "trial 7": (2.57, 2.58)}, default=None)
    front = replace(decision_of(c).front, members=("trial 3",), best="trial 3", knee="trial 3")
    decision = replace(decision_of(c), front=front)
    assert verdict.front_sentence(c, decision) == (
        "No trade-off to make: trial 3 is the best in loss, memory and time alike (the Pareto front is "
        "it alone)."
    )
