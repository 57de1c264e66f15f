"""What merging did to the loss: the adapter as trained beside the merged model, row by row.

An adapter that was trained on a 4-bit base has learned to make up for that base's rounding too. Merged into
the 16-bit base it meets other weights, so the loss moves; how much is measured, not assumed.
"""

from dataclasses import dataclass

from lora_tune.records import EvalResult
from lora_tune.report import formatting as fmt
from lora_tune.report import verdict
from lora_tune.stats.paired import PairedDifference
from lora_tune.stats.ratio import ratio_estimate

_QUANTIZED = {"nf4": "NF4 base", "none": "base"}


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeScores:
    """Both models on the same rows of the confirmation split, computed in the same type by the same code."""

    as_trained: EvalResult  # the adapter on the base that it was trained on
    merged: EvalResult
    difference: PairedDifference  # merged less as trained; above 0 merging cost something


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeReport:
    """A merged model for its card."""

    dtype: str  # of its weights
    quantization: str  # of the base that the adapter was trained on: "nf4" or "none"
    scores: MergeScores | None
    reason: str = ""  # why there are no scores
    refit: bool = False  # the adapter was trained on these rows too
    from_gguf: bool = False  # the base was read from a GGUF file

    @property
    def trained_base(self) -> str:
        """How the base is called that the adapter was trained on."""
        return _QUANTIZED.get(self.quantization, f"{self.quantization} base")


def merge_rows(report: MergeReport) -> list[tuple[str, str]]:
    """Return the rows of the table of losses, nats per target token; none without scores."""
    scores = report.scores
    if scores is None:
        return []
    difference = scores.difference
    return [
        (f"before: adapter on the {report.trained_base}, as trained", _loss(scores.as_trained)),
        (f"after: merged, {report.dtype}", _loss(scores.merged)),
        (
            "merged less as trained, paired by row",
            f"{fmt.format_difference(difference.difference)} (95 % interval "
            f"{fmt.format_range(difference.low, difference.high)})",
        ),
        ("rows", str(difference.num_rows)),
        ("computed in", scores.merged.compute_dtype),
    ]


def merge_sentences(report: MergeReport) -> list[str]:
    """Say what the weights are, what became of the loss, and what to mind."""
    sentences = [f"The adapter is merged into the base's {report.dtype} weights."]
    if report.from_gguf:
        sentences.append(
            "The base was read from a GGUF file: its weights were quantized once already and differ slightly "
            "from those on the hub."
        )
    if report.quantization != "none":
        sentences.append(
            f"It was trained on the {report.trained_base}, whose weights differ from these: the merged model "
            "is another model than the one that was tuned and scored."
        )
    if report.scores is None:
        sentences.append(f"Its loss was not measured: {report.reason}")
        return sentences
    sentences.append(_outcome(report, report.scores))
    if report.refit:
        sentences.append(
            "The adapter was trained on these rows too, so only the difference tells something."
        )
    return sentences


def _outcome(report: MergeReport, scores: MergeScores) -> str:
    before, after = scores.as_trained.mean_loss, scores.merged.mean_loss
    found = scores.difference
    what = (
        f"Merging moved the loss on {fmt.plural(found.num_rows, 'confirmation row')} from "
        f"{fmt.format_loss(before)} to {fmt.format_loss(after)} nats per token "
        f"({100 * found.difference / before:+.2f} %; 95 % interval of the difference "
        f"{fmt.format_range(found.low, found.high)})"
    )
    if found.within_noise:
        return f"{what}: no difference that these rows could show."
    return f"{what}: {'worse' if found.difference > 0 else 'better'} than as trained."


def _loss(evaluation: EvalResult) -> str:
    interval = ratio_estimate(evaluation.loss_sums, evaluation.label_counts).interval
    return f"{fmt.format_loss(evaluation.mean_loss)}{verdict.interval_text(interval)}"
