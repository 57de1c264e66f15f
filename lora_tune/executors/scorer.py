"""Metrics of a lane: answers written with its adapter, decoded, and scored row by row.

Nothing here ends a trial: what goes wrong is the reason of a ``MetricResult``.
"""

from collections.abc import Mapping, Sequence

from transformers import PreTrainedTokenizerBase

from lora_tune.engine.base import BaseModel
from lora_tune.engine.generation import AnswerWriter, end_tokens, split_row
from lora_tune.engine.lora import LaneAdapter
from lora_tune.engine.memory_errors import is_out_of_memory
from lora_tune.errors import DataError
from lora_tune.metrics import Answer, Metric, score_answers
from lora_tune.records import MetricResult, TokenizedRow


class MetricScorer:
    """Scores adapters on rows by the metrics of a study."""

    def __init__(
        self,
        base: BaseModel,
        tokenizer: PreTrainedTokenizerBase,
        metrics: Mapping[str, Metric],
        *,
        max_new_tokens: int,
    ) -> None:
        """Begin with nothing written.

        Args:
            base: Writes the answers.
            tokenizer: Turns them into text; it is not changed.
            metrics: By name, as ``resolve_metrics`` returns them.
            max_new_tokens: Of an answer, at most.
        """
        self.base = base
        self.tokenizer = tokenizer
        self.metrics = metrics
        self.writer = AnswerWriter(base, max_new_tokens=max_new_tokens)

    def score(
        self, adapter: LaneAdapter | None, rows: Sequence[TokenizedRow], names: Sequence[str]
    ) -> tuple[MetricResult, ...]:
        """Return a result of every metric named, or the reason why there is none."""
        reason = ""
        try:
            answers = self.answers(adapter, rows)
        except Exception as error:
            reason = f"no answers were written: {reason_of(error)}"
            if is_out_of_memory(error):
                reason = "out of memory while writing the answer to a single row"
        if reason:
            return tuple(MetricResult(metric=name, reason=reason) for name in names)
        return tuple(score_answers(name, self.metrics[name], answers) for name in names)

    def answers(self, adapter: LaneAdapter | None, rows: Sequence[TokenizedRow]) -> list[Answer]:
        """Return the texts of every row; prompts keep their special tokens, the rest lose them."""
        parts = [split_row(row) for row in rows]
        ends = end_tokens(self.base, self.tokenizer, rows)
        written = self.writer.write(adapter, parts, ends=ends)
        return [
            Answer(
                text_of(self.tokenizer, part.prompt, special=True),
                text_of(self.tokenizer, part.reference),
                text_of(self.tokenizer, answer),
            )
            for part, answer in zip(parts, written, strict=True)
        ]


def text_of(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], *, special: bool = False
) -> str:
    """Return token ids as text, special tokens left out unless asked for."""
    return str(
        tokenizer.decode(
            list(ids), skip_special_tokens=not special, clean_up_tokenization_spaces=False
        )
    )


def check_prompts(rows: Sequence[TokenizedRow]) -> None:
    """Refuse rows that no answer can be written to.

    Raises:
        DataError: A row carries loss from its first token on.
    """
    without = sum(not split_row(row).prompt for row in rows)
    if without:
        raise DataError(
            f"select.metrics: {without} of {len(rows)} held-out rows have no prompt to answer; all of their "
            "text carries loss, as in rows of plain text. Take select.metrics out of the study file, or give "
            "the rows as prompt and completion."
        )


def reason_of(error: Exception) -> str:
    """Return in a line why answers could not be written or losses not be computed."""
    if is_out_of_memory(error):
        return "out of memory"
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
