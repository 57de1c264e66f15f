"""What the report says of answers and general losses: the numbers, the flags, and when it says nothing."""

from dataclasses import replace

import pytest
from report_studies import behaviour, finished_study, older_study, unfinished_study

from lora_tune.records import Behaviour, GeneralLoss, StudySnapshot
from lora_tune.report.behaviour import BehaviourSummary, ForgettingRow, summarize_behaviour

LOOP = "the end of the file is the end of the file, and " * 6


def with_behaviour(found: Behaviour) -> StudySnapshot:
    study = finished_study()
    assert study.confirmation is not None
    decision = study.confirmation.decision
    assert decision is not None
    confirmation = replace(
        study.confirmation,
        decision=replace(decision, chosen=found.chosen),
        default=found.default,
    )
    return replace(study, behaviour=found, confirmation=confirmation)


def summary_of(found: Behaviour) -> BehaviourSummary:
    summary = summarize_behaviour(with_behaviour(found))
    assert summary is not None
    return summary


def losses(base: float, default: float, chosen: float) -> tuple[GeneralLoss, ...]:
    names = ("untuned base", "trial 5", "trial 3")
    return tuple(
        GeneralLoss(subject=name, loss=loss)
        for name, loss in zip(names, (base, default, chosen), strict=True)
    )


def answering(subject: str, text: str, found: Behaviour) -> Behaviour:
    """Return the same with other answers of one subject."""
    samples = tuple(
        replace(
            sample,
            answers=tuple(
                replace(answer, text=text) if answer.subject == subject else answer
                for answer in sample.answers
            ),
        )
        for sample in found.samples
    )
    return replace(found, samples=samples)


def test_losses_are_told_with_their_change_against_the_base() -> None:
    summary = summary_of(replace(behaviour(), general_losses=losses(3.10, 3.131, 3.255)))
    assert summary.subjects == ("untuned base", "trial 5", "trial 3")
    assert [row.change for row in summary.forgetting] == [
        None,
        pytest.approx(0.01),
        pytest.approx(0.05),
    ]
    assert summary.sentences == (
        "On a general text (plain prose that comes with the tool) that is no part of the data the loss goes "
        "from 3.100 nats per token to 3.255 with trial 3 (+5.0 %) and to 3.131 with the default (+1.0 %).",
    )
    assert not summary.forgot
    assert summary.collapsed == ()


@pytest.mark.parametrize(("chosen", "forgot"), [(3.409, False), (3.411, True)])
def test_more_than_a_tenth_is_called_forgetting(chosen: float, forgot: bool) -> None:
    summary = summary_of(replace(behaviour(), general_losses=losses(3.1, 3.1, chosen)))
    assert summary.forgot == forgot
    assert any("Forgetting" in sentence for sentence in summary.sentences) == forgot


def test_a_default_that_forgets_is_no_fault_of_the_chosen_one() -> None:
    assert not summary_of(replace(behaviour(), general_losses=losses(3.1, 9.0, 3.1))).forgot


def test_a_chosen_default_has_one_column_and_one_change() -> None:
    summary = summary_of(behaviour(chosen="trial 5", default="trial 5"))
    assert summary.subjects == ("untuned base", "trial 5")
    [sentence] = summary.sentences
    assert sentence.count(" to ") == 1
    assert "trial 5, the default" in sentence


def test_collapsed_output_is_told_with_how_the_base_writes() -> None:
    found = answering("trial 3", LOOP, behaviour())
    summary = summary_of(found)
    assert summary.collapsed == (("trial 3", "all 5 answers are the same"),)
    assert summary.sentences[-1] == (
        "Collapsed output of trial 3: all 5 answers are the same; "
        "those of the untuned base have no such fault."
    )
    both = summary_of(answering("untuned base", "", found))
    assert [subject for subject, _ in both.collapsed] == ["untuned base", "trial 3"]
    assert both.sentences[-1].endswith("; of the untuned base 5 of 5 answers are empty.")
    base_alone = summary_of(answering("untuned base", "", behaviour()))
    assert base_alone.sentences[-1] == (
        "Of the untuned base 5 of 5 answers are empty; after tuning they no longer count as collapsed."
    )


def test_a_reason_is_handed_on_and_nothing_is_made_up() -> None:
    found = replace(behaviour(), samples=(), general_losses=(), reason="out of memory")
    summary = summary_of(found)
    assert (summary.reason, summary.sentences, summary.subjects) == ("out of memory", (), ())
    assert (summary.forgetting, summary.forgot, summary.collapsed) == ((), False, ())


def test_a_base_that_gives_no_loss_has_no_changes() -> None:
    summary = summary_of(replace(behaviour(), general_losses=losses(0.0, 1.0, 1.0)))
    assert summary.forgetting[-1] == ForgettingRow(subject="trial 3", loss=1.0, change=None)
    assert summary.sentences == ()


def test_answers_of_another_candidate_than_the_chosen_are_not_shown() -> None:
    study = finished_study()
    assert study.behaviour is not None
    stale = replace(study, behaviour=replace(study.behaviour, chosen="trial 7"))
    assert summarize_behaviour(stale) is None
    assert summarize_behaviour(study) is not None


def test_studies_without_answers_have_no_summary() -> None:
    assert summarize_behaviour(older_study()) is None
    assert summarize_behaviour(unfinished_study()) is None


def test_a_refit_is_told_from_the_adapter_that_answered() -> None:
    study = finished_study()
    assert study.confirmation is not None
    refit = replace(study, confirmation=replace(study.confirmation, refit=True))
    summary = summarize_behaviour(refit)
    assert summary is not None
    assert "these prompts among them" in summary.sentences[-1]
