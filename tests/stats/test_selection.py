"""The rule of the decision, sentence by sentence, on small confirmations whose truth is known."""

import json
from dataclasses import asdict, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stats_runs import evaluation, noisy_runs

from lora_tune.records import Verdict
from lora_tune.stats.holm import holm
from lora_tune.stats.paired import paired_difference
from lora_tune.stats.selection import CandidateRuns, decide

MARGIN = 0.005


def decided(*runs, default="default", **options):
    return decide(runs, default=default, practical_margin=MARGIN, **options)


def exact(name, *losses, memory=10, step_s=1.0, rank=16, dropout=0.0):
    """Return a candidate whose runs differ by their means alone, to within a millionth a row."""
    rows = [1e-6 * (hash_like(name) * row % 7) for row in range(50)]
    return CandidateRuns(
        name=name,
        evaluations=tuple(evaluation([loss + row for row in rows]) for loss in losses),
        peak_bytes=int(memory * 2**30),
        step_s=step_s,
        rank=rank,
        lora_dropout=dropout,
    )


def hash_like(name):
    return sum(name.encode())


# Rule 1: scores and comparisons


def test_the_score_is_the_mean_over_seeds_and_the_best_has_the_lowest():
    found = decided(exact("a", 2.0, 2.2), exact("b", 1.9, 2.5), default=None)
    assert [(s.candidate, round(s.loss, 3)) for s in found.scores] == [("a", 2.1), ("b", 2.2)]
    assert found.best == "a"
    assert found.scores[0].seed_losses == pytest.approx((2.0, 2.2), abs=1e-5)
    assert found.scores[0].low < found.scores[0].loss < found.scores[0].high


def test_with_one_seed_a_comparison_is_that_of_the_rows():
    a, b = noisy_runs("a", 2.0, seeds=1), noisy_runs("b", 2.01, seeds=1)
    found = decided(a, b, default=None)
    expected = paired_difference(b.evaluations[0], a.evaluations[0])
    comparison = found.against_best[0]
    assert comparison.difference == pytest.approx(expected.difference)
    assert comparison.standard_error == pytest.approx(expected.standard_error, rel=0.06)
    assert (comparison.seed_error, found.seed_sd, found.seeds) == (0.0, None, 1)


def test_seed_noise_widens_the_interval():
    calm = decided(noisy_runs("a", 2.0), noisy_runs("b", 2.02), default=None)
    wild = decided(
        noisy_runs("a", 2.0, shifts=(-0.02, 0, 0.02)),
        noisy_runs("b", 2.02, shifts=(0.02, 0, -0.02)),
        default=None,
    )
    assert calm.tied == ("a",)
    assert wild.tied == ("a", "b")
    assert wild.against_best[0].row_error == pytest.approx(calm.against_best[0].row_error)
    assert wild.seed_sd == pytest.approx(0.02)


def test_clusters_make_the_interval_wider_and_are_counted():
    rows = [0.01 * ((row // 10) % 5) for row in range(200)]
    a = replace(exact("a", 2.0, 2.0), evaluations=(evaluation([2.0] * 200),) * 2)
    b = replace(exact("b", 2.0, 2.0), evaluations=(evaluation([2.0 + row for row in rows]),) * 2)
    alone = decided(a, b, default=None)
    grouped = decided(a, b, default=None, clusters=[row // 10 for row in range(200)])
    assert (alone.num_clusters, grouped.num_clusters, grouped.num_rows) == (200, 20, 200)
    assert grouped.against_best[0].row_error > 2.5 * alone.against_best[0].row_error


# Rule 2: ties


def test_a_difference_beyond_noise_and_margin_is_no_tie():
    found = decided(exact("a", 2.0, 2.0001), exact("b", 2.02, 2.0201), default=None)
    assert found.tied == ("a",)
    assert found.against_best[0].p_value < 0.001


def test_a_difference_within_the_margin_is_a_tie_however_sure():
    found = decided(exact("a", 2.0, 2.0001), exact("b", 2.009, 2.0091), default=None)
    assert found.against_best[0].low > 0
    assert found.tied == ("a", "b")
    assert found.unresolved == ()


def test_an_interval_that_includes_zero_is_a_tie_and_unresolved_when_it_reaches_far():
    found = decided(exact("a", 2.0, 2.1), exact("b", 2.05, 2.15), default=None)
    assert found.against_best[0].low < 0 < found.against_best[0].high
    assert found.tied == ("a", "b")
    assert found.unresolved == ("b",)


def test_a_tie_by_interval_that_ends_below_two_percent_is_resolved():
    # Variance of the seeds 1.8e-5, error of the difference 0.0042, t(2) 4.30: 0.012 +- 0.018, to 1.5 % of 2.
    found = decided(exact("a", 1.997, 2.003), exact("b", 2.009, 2.015), default=None)
    assert found.against_best[0].low < 0
    assert found.against_best[0].high == pytest.approx(0.0303, abs=5e-4)
    assert found.tied == ("a", "b")
    assert found.unresolved == ()
    wider = decided(exact("a", 1.99, 2.01), exact("b", 2.005, 2.025), default=None)
    assert wider.unresolved == ("b",)


def test_holm_corrects_over_all_candidates_and_can_tie_the_default():
    # Error of the lead sqrt(2 * 1e-4 / 2) = 0.01. Alone t(2) is 5: p 0.038, enough.
    alone = decided(exact("default", 2.04, 2.06), exact("a", 2.0, 2.0))
    assert alone.against_default.p_adjusted == pytest.approx(0.0377, abs=1e-3)
    assert alone.verdict is Verdict.BETTER
    # With a third candidate t(3) is 4: p 0.028, twice that is not enough, though the interval is below zero.
    found = decided(exact("default", 2.03, 2.05), exact("a", 2.0, 2.0), exact("b", 2.03, 2.03))
    against = found.against_default
    assert against.candidate == "a"
    assert against.p_value == pytest.approx(0.028, abs=1e-3)
    assert against.p_adjusted == pytest.approx(2 * against.p_value)
    assert against.high < 0
    assert "default" in found.tied
    assert found.verdict is Verdict.SAME


def test_the_p_values_against_the_best_are_corrected_together():
    found = decided(*(noisy_runs(name, 2.0 + 0.004 * i) for i, name in enumerate("abcd")))
    raw = [c.p_value for c in found.against_best]
    assert [c.p_adjusted for c in found.against_best] == pytest.approx(holm(raw))


# Rule 3: the verdict


def test_better_when_the_default_is_behind_beyond_noise_and_margin():
    found = decided(noisy_runs("a", 2.0), noisy_runs("default", 2.1))
    assert found.verdict is Verdict.BETTER
    assert (found.chosen, found.default) == ("a", "default")
    assert found.against_default.candidate == "a"
    assert found.against_default.reference == "default"
    assert found.against_default.high < 0


def test_not_distinguishable_when_the_default_is_behind_by_less_than_the_margin():
    found = decided(exact("a", 2.0, 2.0001), exact("default", 2.009, 2.0091))
    assert found.against_default.high < 0
    assert found.verdict is Verdict.SAME


def test_worse_when_the_default_is_best_and_nothing_ties_with_it():
    found = decided(noisy_runs("a", 2.1), noisy_runs("b", 2.2), noisy_runs("default", 2.0))
    assert found.verdict is Verdict.WORSE
    assert found.chosen == "default"
    assert found.against_default.candidate == "a"
    assert found.against_default.low > 0


def test_the_default_as_best_with_a_tie_is_not_distinguishable():
    found = decided(exact("a", 2.001, 2.001), exact("default", 2.0, 2.0))
    assert found.verdict is Verdict.SAME


@pytest.mark.parametrize("default", [None, "never tried"])
def test_without_a_default_there_is_no_verdict(default):
    found = decided(noisy_runs("a", 2.0), noisy_runs("b", 2.1), default=default)
    assert (found.verdict, found.default, found.against_default) == (Verdict.NONE, None, None)
    assert found.chosen == "a"


# Rule 4: the choice


@pytest.mark.parametrize(
    ("cheap", "dear"),
    [
        ({"memory": 10, "step_s": 9.0, "rank": 64}, {"memory": 10.5}),
        ({"step_s": 1.0, "rank": 64}, {"step_s": 1.06}),
        ({"rank": 8, "dropout": 0.1}, {"rank": 16}),
    ],
)
def test_of_tied_ones_the_cheapest_in_memory_time_rank_is_chosen(cheap, dear):
    found = decided(exact("a", 2.0, 2.0, **dear), exact("b", 2.004, 2.004, **cheap), default=None)
    assert found.best == "a"
    assert found.tied == ("a", "b")
    assert found.chosen == "b"


def test_dropout_is_no_cost_and_decides_between_equal_losses_alone():
    dear, free = {"dropout": 0.05}, {"dropout": 0.0}
    worse = decided(exact("a", 2.0, 2.0, **dear), exact("b", 2.004, 2.004, **free), default=None)
    assert worse.chosen == "a"
    equal = decided(exact("a", 2.0, 2.0, **dear), exact("b", 2.0, 2.0, **free), default=None)
    assert equal.chosen == "b"


def test_equal_costs_leave_the_choice_to_the_loss():
    assert decided(exact("b", 2.0, 2.0), exact("a", 2.004, 2.004), default=None).chosen == "b"


@pytest.mark.parametrize(
    "dear", [{"memory": 10.49}, {"step_s": 1.049}], ids=["half a GiB", "five percent"]
)
def test_differences_within_the_error_of_a_cost_do_not_count(dear):
    found = decided(
        exact("a", 2.0, 2.0, rank=8, **dear), exact("b", 2.004, 2.004, rank=16), default=None
    )
    assert found.chosen == "a"


def test_unknown_times_are_left_out():
    found = decided(
        exact("a", 2.0, 2.0, step_s=0.0, rank=8), exact("b", 2.004, 2.004, step_s=0.1), default=None
    )
    assert found.chosen == "a"


def test_what_is_not_tied_is_not_chosen_however_cheap():
    found = decided(noisy_runs("a", 2.0), noisy_runs("b", 2.1, memory=4), default=None)
    assert found.chosen == "a"


def test_a_better_verdict_is_kept_by_choosing_what_leads_the_default_itself():
    # "b" is cheap and within the margin of "a", but itself leads the default by less than the margin.
    a, b = exact("a", 2.0, 2.0001), exact("b", 2.009, 2.0091, memory=4)
    found = decided(a, b, exact("default", 2.015, 2.0151))
    assert found.verdict is Verdict.BETTER
    assert found.tied == ("a", "b")
    assert found.chosen == "a"
    far = decided(a, b, exact("default", 2.1, 2.1001))
    assert far.chosen == "b"


def test_nothing_measured_worse_than_the_default_beyond_the_margin_is_chosen():
    # "b" is tied with the best by a wide interval alone; its mean is 2 % above the default's.
    found = decided(
        exact("a", 1.98, 2.08), exact("b", 2.03, 2.13, memory=4), exact("default", 1.99, 2.09)
    )
    assert found.tied == ("a", "default", "b")
    assert found.verdict is Verdict.SAME
    assert found.chosen in ("a", "default")


def test_nothing_measured_worse_than_the_default_beyond_noise_is_chosen():
    found = decided(exact("a", 2.008, 2.0081, memory=4), exact("default", 2.0, 2.0001))
    assert found.tied == ("default", "a")
    assert found.against_default.low > 0
    assert found.chosen == "default"


def test_a_cheap_one_within_the_margin_of_the_default_is_chosen():
    found = decided(exact("a", 2.002, 2.004, memory=4), exact("default", 2.0, 2.002))
    assert found.verdict is Verdict.SAME
    assert found.chosen == "a"


# Rule 5: the seed that is shipped


@pytest.mark.parametrize(
    ("losses", "seed"), [((2.3, 2.1, 2.2), 2), ((2.1, 2.2), 1), ((2.2, 2.1), 0), ((2.1,), 0)]
)
def test_the_median_seed_is_shipped_of_two_the_unluckier(losses, seed):
    assert decided(exact("a", *losses), default=None).median_seed == seed


# Edges


def test_a_candidate_with_a_failed_run_cannot_be_chosen():
    broken = replace(noisy_runs("a", 1.0, memory=1), evaluations=(evaluation([1.0]), None))
    found = decided(broken, noisy_runs("b", 2.0), noisy_runs("default", 2.1))
    assert found.failed == ("a",)
    assert found.chosen == "b"
    assert all(score.candidate != "a" for score in found.scores)


def test_a_failed_default_leaves_no_verdict():
    found = decided(noisy_runs("a", 2.0), replace(noisy_runs("default", 2.0), evaluations=(None,)))
    assert (found.verdict, found.failed, found.default) == (Verdict.NONE, ("default",), None)


def test_a_default_alone_is_chosen_without_a_comparison():
    found = decided(noisy_runs("default", 2.0))
    assert (found.chosen, found.verdict, found.against_default) == ("default", Verdict.SAME, None)
    assert found.against_best == ()
    assert found.smallest_visible > 0


def test_when_nothing_succeeded_the_error_names_who_failed():
    with pytest.raises(ValueError, match=r"no candidate .* came to its end; failed: a, default"):
        decided(*(replace(noisy_runs(n, 2.0), evaluations=(None,)) for n in ("a", "default")))
    with pytest.raises(ValueError, match="failed: none"):
        decided()


def test_two_candidates_of_one_name_are_refused():
    with pytest.raises(ValueError, match="same name"):
        decided(noisy_runs("a", 2.0), noisy_runs("a", 2.1))


def test_rows_of_a_single_conversation_tie_everything_and_stay_finite():
    found = decided(noisy_runs("a", 2.0), noisy_runs("default", 2.5), clusters=[1] * 200)
    assert found.verdict is Verdict.SAME
    assert found.unresolved == ("default",)
    json.dumps(asdict(found), allow_nan=False)


def test_identical_losses_are_tied_without_any_error():
    found = decided(exact("a", 2.0, 2.0), replace(exact("a", 2.0, 2.0), name="default"))
    assert found.against_default.p_value == 1.0
    assert set(found.tied) == {"a", "default"}


@settings(max_examples=25, deadline=None)
@given(
    losses=st.lists(st.floats(1.98, 2.06), min_size=1, max_size=4, unique=True),
    memories=st.permutations([8.0, 9.0, 9.2, 12.0]),
    random=st.randoms(use_true_random=False),
)
def test_the_order_of_candidates_and_rows_does_not_matter(losses, memories, random):
    names = ["default", "trial 1", "trial 2", "trial 3"][: len(losses)]
    runs = [
        noisy_runs(name, loss, rows=40, memory=memory, seed_sd=0.01)
        for name, loss, memory in zip(names, losses, memories, strict=False)
    ]
    straight = decided(*runs)
    shuffled = runs[:]
    random.shuffle(shuffled)
    assert decided(*shuffled) == straight
    order = list(range(40))
    random.shuffle(order)
    permuted = decided(*(replace(r, evaluations=_permuted(r.evaluations, order)) for r in runs))
    assert permuted.best == straight.best
    assert [s.loss for s in permuted.scores] == pytest.approx([s.loss for s in straight.scores])
    for one, other in zip(permuted.against_best, straight.against_best, strict=True):
        assert one.seed_error == pytest.approx(other.seed_error, abs=1e-9)
        assert one.row_error == pytest.approx(other.row_error, rel=0.15)  # other resamples


def _permuted(evaluations, order):
    return tuple(
        replace(
            found,
            loss_sums=tuple(found.loss_sums[row] for row in order),
            label_counts=tuple(found.label_counts[row] for row in order),
        )
        for found in evaluations
    )


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(st.floats(1.95, 2.1), st.floats(4, 12), st.sampled_from([8, 64])),
        min_size=2,
        max_size=4,
    ),
    st.sampled_from([0.0, 0.002, 0.02]),
    st.integers(1, 3),
)
def test_verdict_and_choice_always_agree(candidates, seed_sd, seeds):
    runs = [
        noisy_runs(name, loss, rows=40, memory=memory, rank=rank, seed_sd=seed_sd, seeds=seeds)
        for name, (loss, memory, rank) in zip(
            ("default", "trial 1", "trial 2", "trial 3"), candidates, strict=False
        )
    ]
    found = decided(*runs)
    loss = {score.candidate: score.loss for score in found.scores}
    assert found.chosen in found.tied
    assert found.tied[0] == found.best
    assert set(found.unresolved) <= set(found.tied) - {found.best}
    lead = loss["default"] - loss[found.chosen]
    if found.verdict is Verdict.BETTER:
        assert lead >= MARGIN * loss[found.best]
    else:
        assert lead >= -MARGIN * loss[found.best] - 1e-12
    if found.verdict is Verdict.WORSE:
        assert found.chosen == found.best == "default"
    assert (found.verdict is Verdict.SAME) == ("default" in found.tied and len(found.tied) > 1)
