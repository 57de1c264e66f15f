"""How the untuned base, the default and the chosen candidate write, and what they lost on general text.

After the decision some prompts of the confirmation split are answered by all of them, greedily, so that a
person can compare what the numbers stand for. The adapters are those of the median seeds, scored on these
rows and not trained on them; one that was trained once more on all rows has seen the prompts.

Nothing here ends a study: what goes wrong is the reason of the ``Behaviour``.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from transformers import PreTrainedTokenizerBase

from lora_tune.data.general_text import describe_general_text, general_rows
from lora_tune.engine.adapter_files import load_adapter
from lora_tune.engine.base import BaseModel
from lora_tune.engine.generation import (
    AnswerWriter,
    PromptAndReference,
    end_tokens,
    free_what_failed,
    split_row,
)
from lora_tune.engine.lora import LaneAdapter
from lora_tune.engine.pack import TrialPack
from lora_tune.errors import DataError, LoraTuneError, StoreError
from lora_tune.executors.scorer import reason_of, text_of
from lora_tune.files import is_complete
from lora_tune.records import (
    UNTUNED,
    Behaviour,
    Confirmation,
    GeneralLoss,
    Sample,
    SampleAnswer,
    TokenizedRow,
    TrialConfig,
)
from lora_tune.search.confirmation import run_folder

# Tokens of an answer, at most. All of it took 20 s for a 135M model in NF4 on two CPU cores.
NEW_TOKENS = {"cpu": 64, "cuda": 128}

T = TypeVar("T")


class Subject(NamedTuple):
    """Who answers: the untuned base, or an adapter from its folder."""

    name: str
    config: TrialConfig | None
    folder: Path | None
    seed: int | None = None  # that its adapter was trained with


@dataclass(frozen=True, slots=True, kw_only=True)
class BehaviourPlan:
    """What is looked at."""

    num_samples: int
    max_length: int  # tokens of a row of the general text
    seed: int  # where the evenly spaced prompts begin


def subjects_of(confirmation: Confirmation, folder: Path) -> tuple[Subject, ...]:
    """Return who answers after the decision; a default without a complete run does not.

    Args:
        confirmation: With its decision.
        folder: Where the runs' adapters are.
    """
    decision = confirmation.decision
    assert decision is not None
    seeds = {score.candidate: score.median_seed for score in decision.scores}
    names = dict.fromkeys(
        name for name in (confirmation.default, decision.chosen) if name is not None
    )
    return (
        Subject(UNTUNED, None, None),
        *(
            Subject(
                name,
                confirmation.candidate(name).config,
                run_folder(folder, name, seeds[name]),
                seeds[name],
            )
            for name in names
            if name in seeds
        ),
    )


class BehaviourObserver:
    """Lets subjects answer and measures them, on the base of a pack whose lanes have all left."""

    def __init__(
        self, pack: TrialPack, tokenizer: PreTrainedTokenizerBase, plan: BehaviourPlan
    ) -> None:
        self.pack = pack
        self.base: BaseModel = pack.base
        self.tokenizer = tokenizer
        self.plan = plan
        self.writer = AnswerWriter(pack.base, max_new_tokens=NEW_TOKENS[pack.base.device.type])

    def observe(
        self,
        subjects: Sequence[Subject],
        rows: Sequence[TokenizedRow],
        *,
        chosen: str,
        default: str | None,
    ) -> Behaviour:
        """Return all answers and losses; each kind is there for all subjects or for none.

        Args:
            subjects: As ``subjects_of`` returns them.
            rows: The confirmation split.
            chosen: Name of the chosen candidate.
            default: Name of the default; None: it has no complete run.
        """
        reasons: list[str] = []
        seeds = {subject.name: subject.seed for subject in subjects}
        general = self._try(
            lambda: general_rows(self.tokenizer, max_length=self.plan.max_length),
            "no general text",
            reasons,
        )
        losses = self._try(
            lambda: self.general_losses(subjects, general) if general else (),
            "no loss on general text",
            reasons,
        )
        samples = self._try(lambda: self.samples(subjects, rows), "no answers to prompts", reasons)
        return Behaviour(
            chosen=chosen,
            default=default,
            samples=samples,
            max_new_tokens=self.writer.max_new_tokens,
            general_text=describe_general_text(),
            general_tokens=sum(row.num_labels for row in general),
            general_losses=losses,
            chosen_seed=seeds.get(chosen),
            default_seed=seeds.get(default) if default is not None else None,
            reason="; ".join(reasons),
        )

    def general_losses(
        self, subjects: Sequence[Subject], rows: Sequence[TokenizedRow]
    ) -> tuple[GeneralLoss, ...]:
        """Return every subject's mean loss over the rows, one subject after the other.

        Raises:
            ArithmeticError: A loss is not finite, as may happen in float16.
        """
        found = []
        for subject in subjects:
            [result] = self.pack.evaluate([self._load(subject)], rows, split="general text")
            if not math.isfinite(result.mean_loss):
                raise ArithmeticError(f"the loss of {subject.name} is {result.mean_loss}")
            found.append(GeneralLoss(subject=subject.name, loss=result.mean_loss))
        return tuple(found)

    def samples(
        self, subjects: Sequence[Subject], rows: Sequence[TokenizedRow]
    ) -> tuple[Sample, ...]:
        """Return the subjects' answers to some of the rows' prompts.

        Raises:
            DataError: No row has a prompt that leaves room for an answer.
        """
        parts = {number: split_row(row) for number, row in enumerate(rows)}
        usable = [number for number, part in parts.items() if self._leaves_room(part)]
        if not usable:
            raise DataError(
                "no held-out row has a prompt to answer; all of their text carries loss, as in rows of "
                "plain text, or the prompts fill the model's positions"
            )
        chosen = evenly_spaced(usable, self.plan.num_samples, seed=self.plan.seed)
        asked = [parts[number] for number in chosen]
        ends = end_tokens(self.base, self.tokenizer, rows)
        answers = [
            (subject.name, self.writer.write(self._load(subject), asked, ends=ends))
            for subject in subjects
        ]
        return tuple(
            Sample(
                row=number,
                prompt=readable_prompt(self.tokenizer, part.prompt),
                reference=text_of(self.tokenizer, part.reference),
                answers=tuple(self._answer(name, written[place]) for name, written in answers),
            )
            for place, (number, part) in enumerate(zip(chosen, asked, strict=True))
        )

    def _leaves_room(self, part: PromptAndReference) -> bool:
        limit = getattr(self.base.model.config, "max_position_embeddings", None)
        needed = len(part.prompt) + self.writer.max_new_tokens
        return bool(part.prompt) and (limit is None or needed <= limit)

    def _answer(self, subject: str, ids: tuple[int, ...]) -> SampleAnswer:
        return SampleAnswer(
            subject=subject,
            text=text_of(self.tokenizer, ids),
            num_tokens=len(ids),
            ended=len(ids) < self.writer.max_new_tokens,
        )

    def _load(self, subject: Subject) -> LaneAdapter | None:
        if subject.config is None or subject.folder is None:
            return None
        if not is_complete(subject.folder):
            raise StoreError(f"{subject.folder}: missing or damaged")
        return load_adapter(subject.config, subject.folder, self.base.linears, self.base.device)

    def _try(
        self, look: Callable[[], tuple[T, ...]], missing: str, reasons: list[str]
    ) -> tuple[T, ...]:
        """Return what there is to see; nothing, and why, when that fails."""
        try:
            return look()
        except LoraTuneError as error:
            reasons.append(f"{missing}: {error}")
        except Exception as error:
            reasons.append(f"{missing}: {reason_of(error)}")
        free_what_failed(self.base.device)
        return ()


def evenly_spaced(numbers: Sequence[int], count: int, *, seed: int) -> list[int]:
    """Return ``count`` of the numbers, or all where there are fewer, at equal distances.

    The seed says where between the first and the second distance they begin; neither length nor content
    of a row has a part in it.

    >>> evenly_spaced(range(100), 4, seed=0)
    [15, 40, 65, 90]
    """
    if len(numbers) <= count:
        return list(numbers)
    step = len(numbers) / count
    start = float(np.random.default_rng(seed).random()) * step
    return [numbers[int(start + k * step)] for k in range(count)]


def readable_prompt(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """Return a prompt for people: special tokens are line breaks, roles of a chat template stay."""
    special = {n for n, token in tokenizer.added_tokens_decoder.items() if token.special}
    pieces = [
        text_of(tokenizer, list(part)).strip()
        for is_special, part in groupby(ids, key=special.__contains__)
        if not is_special
    ]
    return "\n".join(piece for piece in pieces if piece)
