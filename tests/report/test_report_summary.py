"""The summary of a study: who won, how sure that is, what it cost, and what to be wary of."""

from dataclasses import replace

import pytest
from report_studies import (
    evaluation,
    finished_study,
    fruitless_study,
    rung_result,
    single_trial_study,
    unfinished_study,
)

from lora_tune.errors import StoreError
from lora_tune.records import StudySnapshot, TrialState
from lora_tune.report import summarize, wording
from lora_tune.report.summary import Outcome, ranked


def with_config(study: StudySnapshot, number: int, **changes: object) -> StudySnapshot:
    """Return the study with other settings of one trial."""
    trials = list(study.trials)
    trials[number] = replace(trials[number], config=replace(trials[number].config, **changes))
    return replace(study, trials=tuple(trials))


def with_results(study: StudySnapshot, number: int, *losses: float) -> StudySnapshot:
    """Return the study with other losses of one trial, one a rung."""
    trials = list(study.trials)
    rungs = tuple(rung_result(number, rung, loss) for rung, loss in enumerate(losses))
    trials[number] = replace(trials[number], rungs=rungs)
    return replace(study, trials=tuple(trials))


def test_a_finished_study_names_its_winner_and_the_confirmed_losses():
    summary = summarize(finished_study())
    assert (summary.outcome, summary.winner, summary.leader) == (Outcome.FINISHED, 7, 7)
    assert summary.config.rank == 32
    c = summary.confirmation
    assert (c.winner_loss, c.base_loss) == (pytest.approx(2.331), pytest.approx(2.874))
    assert c.relative_reduction == pytest.approx(1 - 2.331 / 2.874)
    assert c.reduction_interval.low < c.relative_reduction < c.reduction_interval.high
    assert c.winner_interval.low < c.winner_loss < c.winner_interval.high
    assert c.gap == pytest.approx(2.331 - 2.298)


def test_pairing_makes_the_difference_surer_than_the_loss():
    c = summarize(finished_study()).confirmation
    assert c.difference_standard_error < c.winner_standard_error / 3


def test_counts_and_costs_add_up_over_the_trials():
    study = finished_study()
    summary = summarize(study)
    assert summary.states == {
        "complete": 3,
        "pruned": 6,
        "diverged": 1,
        "infeasible": 1,
        "failed": 1,
    }
    assert summary.num_tokens == sum(r.num_tokens for r in summary.rungs) == 371_120
    assert summary.tokens_per_s == pytest.approx(371_120 / 1486)
    assert [(r.num_trials, r.num_promoted) for r in summary.rungs] == [(9, 5), (5, 3), (3, 0)]
    assert [(c.rung, c.num_trials) for c in summary.correlations] == [(0, 5), (1, 3)]


def test_a_small_lead_is_called_noise_and_names_the_trial():
    summary = summarize(finished_study())
    assert summary.runner_up.trial == 3
    assert summary.runner_up.within_noise
    assert "within noise of trial 3" in wording.runner_up_sentence(summary)
    assert "did not measurably beat it" in wording.anchor_sentence(summary)


def test_a_clear_lead_is_called_more_than_noise():
    summary = summarize(with_results(finished_study(), 7, 2.3, 2.2, 2.1))
    assert not summary.runner_up.within_noise
    assert summary.runner_up.z > 3
    assert "more than noise" in wording.runner_up_sentence(summary)


def test_a_winner_that_was_not_the_lowest_says_so():
    summary = summarize(with_results(finished_study(), 7, 2.6, 2.4, 2.306))
    assert summary.runner_up.lead < 0
    assert "Trial 3 was lower than trial 7" in wording.runner_up_sentence(summary)
    assert summary.best_selection_loss == pytest.approx(2.303)


def test_trials_are_compared_at_the_highest_rung_that_they_share():
    study = finished_study()
    study = with_results(study, 0, 2.62, 2.38)
    study = with_results(study, 3, 2.61, 2.37)
    summary = summarize(study)
    assert (summary.runner_up.trial, summary.runner_up.rung) == (6, 1)
    assert (summary.best_anchor.trial, summary.best_anchor.rung) == (4, 1)


def test_a_trial_that_diverged_after_a_good_rung_is_nobodys_rival():
    study = finished_study()
    diverged = replace(study.trials[3], state=TrialState.DIVERGED)
    study = replace(study, trials=(*study.trials[:3], diverged, *study.trials[4:]))
    assert summarize(study).runner_up.trial == 0
    assert ranked(study.trials)[-1].state in (TrialState.FAILED, TrialState.DIVERGED)


def test_an_anchor_that_wins_is_said_to_be_one():
    study = finished_study()
    study = replace(study, confirmation=replace(study.confirmation, winner=3))
    summary = summarize(study)
    assert summary.best_anchor is None
    assert "Trial 3 is anchor A4" in wording.anchor_sentence(summary)


def test_no_gain_over_the_base_is_not_sold_as_one():
    study = finished_study()
    same = evaluation(2.8739, split="confirmation", seed=7, dtype="float32")
    study = replace(study, confirmation=replace(study.confirmation, winner_evaluation=same))
    assert wording.recommendation(summarize(study)).startswith("No measurable difference from")
    worse = evaluation(3.2, split="confirmation", seed=7, dtype="float32")
    study = replace(study, confirmation=replace(study.confirmation, winner_evaluation=worse))
    text = wording.recommendation(summarize(study))
    assert text.startswith("Keep the untuned base")
    assert "above the untuned base's" in text


def test_an_unfinished_study_has_a_leader_but_no_winner():
    summary = summarize(unfinished_study())
    assert (summary.outcome, summary.winner, summary.leader) == (Outcome.UNFINISHED, None, 3)
    assert "not confirmed" in wording.recommendation(summary)


def test_a_study_without_a_success_recommends_nothing():
    summary = summarize(fruitless_study())
    assert (summary.outcome, summary.leader, summary.config) == (Outcome.NOTHING, None, None)
    assert wording.recommendation(summary).startswith("Nothing can be recommended")


def test_a_study_that_has_not_begun_is_unfinished():
    study = replace(unfinished_study(), trials=(), wall_s=0.0)
    summary = summarize(study)
    assert summary.outcome is Outcome.UNFINISHED
    assert summary.tokens_per_s is None


def test_a_single_trial_has_nothing_to_compare_with():
    summary = summarize(single_trial_study())
    assert (summary.winner, summary.runner_up, summary.best_anchor) == (7, None, None)
    assert wording.runner_up_sentence(summary) == "No other trial has a result to compare with."


@pytest.mark.parametrize(
    ("changes", "warning"),
    [
        ({"rank": 128, "lora_alpha": 64.0}, "rank of 128 is at the upper end"),
        ({"rank": 4, "lora_alpha": 8.0}, "rank of 4 is at the lower end"),
        ({"lora_alpha": 256.0, "learning_rate": 1e-4}, "alpha ratio of 8 is at the upper end"),
        ({"learning_rate": 1.99e-3}, "Extend space.learning_rate upward"),
        ({"learning_rate": 3e-5}, "Extend space.learning_rate downward"),
    ],
)
def test_settings_at_the_end_of_the_space_are_warned_about(changes, warning):
    summary = summarize(with_config(finished_study(), 7, **changes))
    assert any(warning in text for text in summary.warnings)


def test_a_learning_rate_near_a_diverged_one_is_warned_about():
    near = summarize(finished_study()).warnings
    assert any("less than a factor of 2 from where trial 1 diverged" in text for text in near)
    far = with_config(finished_study(), 7, learning_rate=4e-4)
    assert summarize(far).warnings == ()


def test_a_peak_above_the_budget_and_a_clamped_rank_are_warned_about():
    study = finished_study()
    plan = replace(study.lock.plan, budget_bytes=study.trials[10].rungs[0].peak_bytes)
    study = replace(study, lock=replace(study.lock, plan=plan))
    clamped = replace(study.trials[7], suggested=replace(study.trials[7].suggested, rank=128))
    study = replace(study, trials=(*study.trials[:7], clamped, *study.trials[8:]))
    text = " ".join(summarize(study).warnings)
    assert "The measured peak of trial 11 was above the budget of 2.93 GiB." in text
    assert "proposed with rank 128 and trained with 32" in text


def test_damaged_confirmations_are_refused():
    study = finished_study()
    with pytest.raises(StoreError, match="names trial 77, which the study does not have"):
        summarize(replace(study, confirmation=replace(study.confirmation, winner=77)))
    other = evaluation(2.9, split="other")
    with pytest.raises(StoreError, match="confirmed on different rows"):
        summarize(replace(study, confirmation=replace(study.confirmation, base_evaluation=other)))
