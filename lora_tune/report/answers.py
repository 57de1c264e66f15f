"""The answers to held-out prompts as Markdown: fenced, so that nothing in them acts as markup."""

from dataclasses import dataclass

from lora_tune.records import UNTUNED, SampleAnswer
from lora_tune.report import formatting as fmt
from lora_tune.report.behaviour import BehaviourSummary
from lora_tune.report.confirmation import ConfirmationSummary
from lora_tune.report.markdown import Markdown, code_block

MAX_LETTERS = 1500  # of a prompt or an answer; the whole of it is in behaviour.json


@dataclass(frozen=True, slots=True, kw_only=True)
class Exchange:
    """A prompt with its reference and its answers: name and fenced text of each."""

    row: int  # of the confirmation split
    texts: tuple[tuple[str, Markdown], ...]


def exchanges(found: BehaviourSummary, c: ConfirmationSummary) -> list[Exchange]:
    """Return every prompt with what the data say and what was answered, the base first."""
    return [
        Exchange(
            row=sample.row,
            texts=(
                ("Prompt", _fenced(sample.prompt)),
                ("Reference, as in the data", _fenced(sample.reference)),
                *(
                    (_heading(answer, c), _fenced(answer.text))
                    for subject in found.subjects
                    for answer in sample.answers
                    if answer.subject == subject
                ),
            ),
        )
        for sample in found.samples
    ]


def answers_caption(found: BehaviourSummary) -> str:
    """Say which prompts these are and how they were answered."""
    return (
        f"{fmt.plural(len(found.samples), 'prompt')} of the confirmation rows, which neither training nor "
        "search saw, each answered by always taking the most probable token, up to "
        f"{fmt.plural(found.max_new_tokens, 'token')}."
    )


def subject_name(subject: str, c: ConfirmationSummary) -> str:
    """Return a subject as it heads its answers: what it is, and whether it is recommended."""
    name = "the untuned base" if subject == UNTUNED else c.call(subject)
    chosen = c.chosen is not None and c.chosen.name == subject
    return f"{name}, recommended" if chosen else name


def _heading(answer: SampleAnswer, c: ConfirmationSummary) -> str:
    cut = "" if answer.ended else f" (cut after {fmt.plural(answer.num_tokens, 'token')})"
    return f"Answer of {subject_name(answer.subject, c)}{cut}"


def _fenced(text: str) -> Markdown:
    shown = fmt.visible_text(text)
    if len(shown) > MAX_LETTERS:
        left = fmt.format_count(len(shown) - MAX_LETTERS)
        shown = f"{shown[:MAX_LETTERS]}\n[... {left} more letters in behaviour.json]"
    return code_block(shown or "(nothing)", "text")
