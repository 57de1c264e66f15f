"""How the model writes after tuning: held-out prompts answered side by side, forgetting, collapse.

The answers and losses come from behaviour.json. What is judged here: whether answers have collapsed
(``stats.repetition``, the untuned base by the same measure), and whether too much was forgotten.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from lora_tune.records import UNTUNED, Behaviour, GeneralLoss, Sample, StudySnapshot
from lora_tune.report import formatting as fmt
from lora_tune.stats.repetition import collapse_reason

# A judgement, no law: at a loss of 3 a tenth makes a perplexity of 20 one of 27.
FORGOTTEN = 0.10


@dataclass(frozen=True, slots=True, kw_only=True)
class ForgettingRow:
    """A subject's loss on the general text, nats per token."""

    subject: str
    loss: float
    change: float | None  # against the untuned base: 0.05 is 5 % worse; None for the base itself


@dataclass(frozen=True, slots=True, kw_only=True)
class BehaviourSummary:
    """What a report shows of behaviour.json."""

    samples: tuple[Sample, ...]
    subjects: tuple[str, ...]  # columns: untuned base, default, chosen; a chosen default once
    max_new_tokens: int  # where an answer was cut
    forgetting: tuple[ForgettingRow, ...]  # in the order of ``subjects``; empty: not measured
    general_text: str
    general_tokens: int
    collapsed: tuple[tuple[str, str], ...]  # subject and what is wrong, as a part of a sentence
    forgot: bool  # the chosen one's general loss is too far above the base's
    sentences: tuple[str, ...]  # what was found, for report and console
    reason: str  # why something is missing; empty: nothing is


def summarize_behaviour(snapshot: StudySnapshot) -> BehaviourSummary | None:
    """Return what is known of the chosen candidate's behaviour.

    None where nothing was written, and when it was of another adapter than the one chosen now.
    """
    found, confirmation = snapshot.behaviour, snapshot.confirmation
    if found is None or confirmation is None or confirmation.decision is None:
        return None
    decision = confirmation.decision
    if decision.chosen != found.chosen or found.chosen_seed not in (None, decision.median_seed):
        return None
    subjects = _subjects(found)
    forgetting = _forgetting(found.general_losses)
    chosen = next((row for row in forgetting if row.subject == found.chosen), None)
    forgot = chosen is not None and chosen.change is not None and chosen.change > FORGOTTEN
    collapsed = tuple(_collapsed(found.samples, subjects))
    sentences = [
        *_forgetting_sentences(found, forgetting, forgot=forgot),
        *_collapse_sentences(found, collapsed),
    ]
    if confirmation.refit:
        sentences.append(
            "Answers and general loss are those of the adapter that was scored; the one that is shipped "
            "was trained once more on all rows, these prompts among them."
        )
    return BehaviourSummary(
        samples=found.samples,
        subjects=subjects,
        max_new_tokens=found.max_new_tokens,
        forgetting=forgetting,
        general_text=found.general_text,
        general_tokens=found.general_tokens,
        collapsed=collapsed,
        forgot=forgot,
        sentences=tuple(sentences),
        reason=found.reason,
    )


def _subjects(found: Behaviour) -> tuple[str, ...]:
    """Return whose answers or losses there are, in the order of the columns."""
    known = {answer.subject for sample in found.samples for answer in sample.answers}
    known |= {row.subject for row in found.general_losses}
    wanted = dict.fromkeys((UNTUNED, found.default, found.chosen))
    return tuple(name for name in wanted if name is not None and name in known)


def _forgetting(losses: tuple[GeneralLoss, ...]) -> tuple[ForgettingRow, ...]:
    base = next((row.loss for row in losses if row.subject == UNTUNED), None)
    return tuple(
        ForgettingRow(
            subject=row.subject,
            loss=row.loss,
            change=None if row.subject == UNTUNED or not base else row.loss / base - 1,
        )
        for row in losses
    )


def _collapsed(samples: tuple[Sample, ...], subjects: tuple[str, ...]) -> Iterable[tuple[str, str]]:
    for subject in subjects:
        pairs = [
            (answer.text, sample.reference)
            for sample in samples
            for answer in sample.answers
            if answer.subject == subject
        ]
        reason = collapse_reason([text for text, _ in pairs], [wanted for _, wanted in pairs])
        if reason is not None:
            yield subject, reason


def _forgetting_sentences(
    found: Behaviour, rows: tuple[ForgettingRow, ...], *, forgot: bool
) -> Iterable[str]:
    base = next((row for row in rows if row.subject == UNTUNED), None)
    tuned = [row for row in rows if row.change is not None]
    if base is None or not tuned:
        return
    changes = [
        f"to {fmt.format_loss(row.loss)} with {_the(row.subject, found)} ({_signed(row.change)})"
        for row in sorted(tuned, key=lambda row: row.subject != found.chosen)
    ]
    yield (
        f"On a general text ({found.general_text}) that is no part of the data the loss goes from "
        f"{fmt.format_loss(base.loss)} nats per token {' and '.join(changes)}."
    )
    if forgot:
        yield (
            f"Forgetting: more than {100 * FORGOTTEN:.0f} % above the untuned base on general text. If the "
            "model must keep its general ability, lower space.learning_rate or train.epochs, or mix general "
            "rows into the training data."
        )


def _collapse_sentences(found: Behaviour, collapsed: tuple[tuple[str, str], ...]) -> Iterable[str]:
    reasons = dict(collapsed)
    for subject, reason in collapsed:
        if subject == UNTUNED:
            continue
        text = f"Collapsed output of {_the(subject, found)}: {reason}"
        base = reasons.get(UNTUNED)
        if base is None:
            yield f"{text}; those of the untuned base have no such fault."
        else:
            yield f"{text}; of the untuned base {base}."
    if reasons.keys() == {UNTUNED}:
        yield (
            f"Of the untuned base {reasons[UNTUNED]}; after tuning they no longer count as collapsed."
        )


def _the(subject: str, found: Behaviour) -> str:
    if subject == found.chosen == found.default:
        return f"{subject}, the default"
    return "the default" if subject == found.default else subject


def _signed(change: float | None) -> str:
    return "" if change is None else f"{100 * change:+.1f} %"
