"""The answers to held-out prompts in report.html, those of base, default and chosen side by side."""

from dataclasses import dataclass

from lora_tune.records import Sample
from lora_tune.report import formatting as fmt
from lora_tune.report.answers import subject_name
from lora_tune.report.behaviour import BehaviourSummary
from lora_tune.report.confirmation import ConfirmationSummary


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerBox:
    """An answer under its heading."""

    heading: str
    text: str
    note: str
    chosen: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class AnsweredPrompt:
    """A prompt with its reference in the data and one box a subject."""

    row: int  # of the confirmation split
    prompt: str
    reference: str
    boxes: tuple[AnswerBox, ...]


def answered_prompts(behaviour: BehaviourSummary, c: ConfirmationSummary) -> list[AnsweredPrompt]:
    """Return every prompt with its answers, in the order of the subjects."""
    return [
        AnsweredPrompt(
            row=sample.row,
            prompt=sample.prompt,
            reference=sample.reference,
            boxes=tuple(_boxes(sample, behaviour, c)),
        )
        for sample in behaviour.samples
    ]


def _boxes(sample: Sample, behaviour: BehaviourSummary, c: ConfirmationSummary) -> list[AnswerBox]:
    answers = {answer.subject: answer for answer in sample.answers}
    chosen = c.chosen.name if c.chosen else None
    return [
        AnswerBox(
            heading=subject_name(subject, c),
            text=answers[subject].text,
            note=_length_text(answers[subject].num_tokens, ended=answers[subject].ended),
            chosen=subject == chosen,
        )
        for subject in behaviour.subjects
        if subject in answers
    ]


def _length_text(num_tokens: int, *, ended: bool) -> str:
    return fmt.plural(num_tokens, "token") if ended else f"cut at {fmt.plural(num_tokens, 'token')}"
