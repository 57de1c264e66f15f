"""The summary of a study: who won, how sure that is, what it cost, and what to be wary of."""

from dataclasses import replace

import pytest
from report_studies import (
    confirmed_study,
    evaluation,
    finished_study,
    fruitless_study,
    half_confirmed_study,
    rung_result,
    single_trial_study,
    unfinished_study,
)

from lora_tune.errors import StoreError
from lora_tune.records import StudySnapshot, TrialState
from lora_tune.report import summarize, wording
from lora_tune.report.ranking import ranked
from lora_tune.report.summary import Outcome


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


def undecided(study: StudySnapshot) -> StudySnapshot:
    """Return the study as it was before its confirmation began."""
    return replace(study, confirmation=None)


def test_a_finished_study_names_what_was_chosen_and_its_confirmed_loss():
    summary = summarize(finished_study())
    assert (summary.outcome, summary.chosen, summary.leader) == (Outcome.FINISHED, "trial 3", 3)
    assert summary.config.rank == 16
    c = summary.confirmation
    assert c.chosen.score.loss == pytest.approx(2.335)
    assert c.base.loss == pytest.approx(2.874)
    assert c.base.relative_reduction == pytest.approx(1 - 2.335 / 2.874)
    assert (
        c.base.reduction_interval.low < c.base.relative_reduction < c.base.reduction_interval.high
    )
    assert c.chosen.search_loss == pytest.approx(2.303)
    assert c.chosen.gap == pytest.approx(2.335 - 2.303)


def test_pairing_makes_the_difference_surer_than_the_loss():
    c = summarize(finished_study()).confirmation
    assert c.base.difference_standard_error < c.chosen.score.standard_error / 3


def test_rows_of_one_conversation_count_once_in_the_intervals_of_the_base():
    study = finished_study()
    alone = summarize(study).confirmation.base
    twice = tuple(i // 12 for i in range(96))
    confirmation = replace(study.confirmation, clusters=twice)
    grouped = summarize(replace(study, confirmation=confirmation)).confirmation.base
    assert grouped.loss == pytest.approx(alone.loss)
    one_group = replace(study.confirmation, clusters=(0,) * 96)
    assert summarize(replace(study, confirmation=one_group)).confirmation.base.interval is None
    assert grouped.interval != alone.interval


def test_counts_and_costs_add_up_over_the_trials_and_a_repeat_costs_nothing():
    summary = summarize(finished_study())
    assert summary.states == {
        "complete": 3,
        "pruned": 6,
        "cached": 1,
        "diverged": 1,
        "infeasible": 1,
        "failed": 1,
    }
    runs = 6 * 82_456
    assert summary.cost.num_tokens == sum(r.num_tokens for r in summary.rungs) + runs == 865_856
    assert summary.cost.tokens_per_s == pytest.approx(865_856 / 2184)
    assert [(r.num_trials, r.num_promoted) for r in summary.rungs] == [(9, 5), (5, 3), (3, 0)]
    assert [(c.rung, c.num_trials) for c in summary.correlations] == [(0, 5), (1, 3)]


def test_steps_are_those_of_segments_with_their_cool_downs():
    cost = summarize(finished_study()).cost
    # Rungs of 25, 100 and 200 steps are entered at 0, 20 and 80: 9 * 25 + 5 * 80 + 3 * 120.
    assert cost.search_steps == 985
    assert cost.confirmation_steps == 6 * 200
    assert cost.grid_steps == 12 * 200
    assert cost.forecast_error == pytest.approx(2184 / 2040 - 1)
    assert summarize(half_confirmed_study()).cost.forecast_error is None
    assert summarize(half_confirmed_study()).cost.confirmation_steps == 3 * 200


def test_a_small_lead_is_called_noise_and_names_the_trial():
    summary = summarize(undecided(finished_study()))
    assert summary.runner_up.trial == 3
    assert summary.runner_up.within_noise
    assert "within noise of trial 3" in wording.runner_up_sentence(summary)
    assert "did not measurably beat it" in wording.anchor_sentence(summary)


def test_a_clear_lead_is_called_more_than_noise():
    summary = summarize(with_results(undecided(finished_study()), 7, 2.3, 2.2, 2.1))
    assert not summary.runner_up.within_noise
    assert summary.runner_up.z > 3
    assert "more than noise" in wording.runner_up_sentence(summary)


def test_a_leader_that_overfitted_is_said_to_be_higher_at_the_last_rung():
    summary = summarize(with_results(undecided(finished_study()), 7, 2.6, 2.29, 2.306))
    assert summary.runner_up.lead < 0
    assert "Trial 3 was lower than trial 7" in wording.runner_up_sentence(summary)
    assert summary.runner_up.trial_loss == pytest.approx(2.303)


def test_trials_are_compared_at_the_highest_rung_that_they_share():
    study = undecided(finished_study())
    study = with_results(study, 0, 2.62, 2.42)
    study = with_results(study, 3, 2.61, 2.41)
    summary = summarize(study)
    assert (summary.leader, summary.runner_up.trial, summary.runner_up.rung) == (7, 6, 1)
    assert (summary.best_anchor.trial, summary.best_anchor.rung) == (4, 1)


def test_a_trial_that_diverged_after_a_good_rung_is_nobodys_rival():
    study = undecided(finished_study())
    diverged = replace(study.trials[3], state=TrialState.DIVERGED)
    study = replace(study, trials=(*study.trials[:3], diverged, *study.trials[4:]))
    assert summarize(study).runner_up.trial == 0
    assert ranked(study.trials)[-1].state in (TrialState.FAILED, TrialState.DIVERGED)


def test_an_anchor_that_leads_the_search_is_said_to_be_one():
    summary = summarize(unfinished_study())
    assert summary.best_anchor is None
    assert "Trial 3 is anchor A4" in wording.anchor_sentence(summary)


def test_the_place_at_the_first_rung_is_that_among_trained_trials():
    # There trial 7 has 2.608, the lowest, and trial 3 comes after it.
    assert summarize(undecided(finished_study())).first_rung_place == (1, 9)
    assert summarize(finished_study()).first_rung_place == (2, 9)


def test_no_gain_over_the_base_is_not_sold_as_one():
    same = confirmed_study({"trial 7": (2.8739, 2.8745)})
    assert wording.headline(summarize(same)).startswith("No measurable difference from the untuned")
    worse = summarize(confirmed_study({"trial 7": (3.2, 3.21)}))
    assert wording.headline(worse).startswith("Keep the untuned base")
    assert "above the untuned base's" in wording.recommendation(worse)


def test_redundancy_of_learning_rate_and_ratio_is_shown_with_enough_trials():
    """Losses made of the effective step alone, then of the ratio as well."""
    study = undecided(finished_study())
    assert summarize(study).redundancy is None
    assert "alpha ratio:" not in " ".join(wording.certainty(summarize(study)))
    trials = {"step": [], "ratio": []}
    for number in range(24):
        rank, ratio, step = (
            (8, 32, 64)[number % 3],
            (0.5, 1, 4)[number // 3 % 3],
            1e-4 * 2 ** (number % 5),
        )
        config = replace(
            study.trials[0].config,
            rank=rank,
            lora_alpha=rank * ratio,
            learning_rate=step / rank / ratio,
        )
        noise = 0.002 * (number * 7 % 5 - 2)
        of_step = 2.5 + 0.1 * (number % 5 - 2) ** 2 + noise
        for kind, loss in (("step", of_step), ("ratio", of_step + 0.3 * ratio)):
            record = replace(
                study.trials[0], number=number, config=config, rungs=(rung_result(number, 0, loss),)
            )
            trials[kind].append(record)
    alone = summarize(replace(study, trials=tuple(trials["step"])))
    text = " ".join(wording.certainty(alone))
    assert "Learning rate and alpha ratio: of the differences between 24 trials" in text
    assert alone.redundancy.step > 0.9
    assert "learning rate and ratio act as one setting." in text
    both = " ".join(wording.certainty(summarize(replace(study, trials=tuple(trials["ratio"])))))
    assert "the ratio mattered by itself here." in both


def test_an_unfinished_study_has_a_leader_but_no_winner():
    summary = summarize(unfinished_study())
    assert (summary.outcome, summary.chosen, summary.leader) == (Outcome.UNFINISHED, None, 3)
    assert "7 of 12 trials" in wording.recommendation(summary)
    assert "not confirmed" in wording.recommendation(summary)


def test_a_confirmation_under_way_has_runs_but_no_choice():
    summary = summarize(half_confirmed_study())
    assert (summary.outcome, summary.chosen, summary.leader) == (Outcome.UNFINISHED, None, 7)
    assert "confirmation: 3 of 6 runs" in wording.headline(summary)
    assert wording.conclusions(summary) == []


def test_a_confirmation_in_which_every_run_failed_recommends_nothing():
    study = half_confirmed_study()
    failed = tuple(
        replace(run, state=TrialState.DIVERGED, evaluation=None, reason="loss 9 at step 3")
        for run in finished_study().confirmation.runs
    )
    study = replace(study, confirmation=replace(study.confirmation, runs=failed))
    summary = summarize(study)
    assert summary.outcome is Outcome.NOTHING
    text = wording.recommendation(summary)
    assert text.startswith("Nothing can be recommended: none of 3 candidates came through")
    assert "trial 7, seed 0 diverged: loss 9 at step 3" in text


def test_a_study_without_a_success_recommends_nothing():
    summary = summarize(fruitless_study())
    assert (summary.outcome, summary.leader, summary.config) == (Outcome.NOTHING, None, None)
    assert wording.recommendation(summary).startswith("Nothing can be recommended")


def test_a_study_that_has_not_begun_is_unfinished():
    study = replace(unfinished_study(), trials=(), wall_s=0.0)
    summary = summarize(study)
    assert summary.outcome is Outcome.UNFINISHED
    assert summary.cost.tokens_per_s is None


def test_a_single_trial_has_nothing_to_compare_with():
    summary = summarize(single_trial_study())
    assert (summary.chosen, summary.runner_up, summary.best_anchor) == ("trial 0", None, None)
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
    summary = summarize(with_config(undecided(finished_study()), 7, **changes))
    assert any(warning in text for text in summary.warnings)


def test_a_learning_rate_near_a_diverged_one_is_warned_about():
    near = summarize(undecided(finished_study())).warnings
    assert any("less than a factor of 2 from where trial 1 diverged" in text for text in near)
    far = with_config(undecided(finished_study()), 7, learning_rate=4e-4)
    assert summarize(far).warnings == ()


def test_a_peak_above_the_budget_and_a_clamped_rank_are_warned_about():
    study = undecided(finished_study())
    budget = study.trials[10].rungs[0].peak_bytes
    plan = replace(study.lock.plan, budget_bytes=budget, device="cuda")
    study = replace(study, lock=replace(study.lock, plan=plan))
    clamped = replace(study.trials[7], suggested=replace(study.trials[7].suggested, rank=128))
    study = replace(study, trials=(*study.trials[:7], clamped, *study.trials[8:]))
    text = " ".join(summarize(study).warnings)
    assert "The measured peak of trial 11 was above the budget of 2.93 GiB." in text
    on_cpu = replace(study, lock=replace(study.lock, plan=replace(plan, device="cpu")))
    assert "measured peak" not in " ".join(summarize(on_cpu).warnings)  # it is of the process
    assert "proposed with rank 128 and trained with 32" in text


def test_damaged_confirmations_are_refused():
    study = finished_study()
    with pytest.raises(StoreError, match="names trial 7, which the study does not have"):
        summarize(replace(study, trials=study.trials[:7]))
    other = evaluation(2.9, split="other")
    with pytest.raises(StoreError, match="confirmed on different rows"):
        summarize(replace(study, confirmation=replace(study.confirmation, base_evaluation=other)))
    decision = replace(study.confirmation.decision, chosen="trial 9")
    with pytest.raises(StoreError, match="names trial 9, which is no candidate"):
        summarize(replace(study, confirmation=replace(study.confirmation, decision=decision)))
