"""The rows of a study file read as the study reads them, and looked at on the way.

transformers is imported only here, after the study file was found good.
"""

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from lora_tune.records import PreparedData
from lora_tune.report.check_rows import CheckedRows
from lora_tune.study.spec import StudySpec

GUESS_MARGIN = 2  # by which the longest row may be longer than its estimate
NUM_EXAMPLES = 3


class ReadRows(NamedTuple):
    """The splits, and what there is to say of the rows."""

    data: PreparedData
    checked: CheckedRows


def read_rows(spec: StudySpec, base_dir: Path) -> ReadRows:
    """Read all rows; without the base's tokenizer their tokens are guessed.

    Raises:
        DataError: As a run of the study would.
    """
    from lora_tune.data.describe import decode_parts
    from lora_tune.data.encode import RowEncoder
    from lora_tune.data.estimate import TextEncoder
    from lora_tune.data.prepare import prepare_with
    from lora_tune.data.statistics import MeasuredEncoder
    from lora_tune.data.tokenizer import local_tokenizer

    tokenizer = local_tokenizer(spec.model.base, revision=spec.model.revision, base_dir=base_dir)
    encoder = MeasuredEncoder(
        TextEncoder(spec.data)
        if tokenizer is None
        else RowEncoder(spec.data, tokenizer=tokenizer, base_dir=base_dir)
    )
    data = prepare_with(
        encoder, spec.data, tokenizer=tokenizer, seed=spec.study.seed, base_dir=base_dir
    )
    if tokenizer is None:
        data = replace(data, notes=(*data.notes, *_unchecked(spec)))
    shown = data.train[:NUM_EXAMPLES] if tokenizer is not None else ()
    checked = CheckedRows(
        statistics=encoder.statistics(data, max_length=spec.data.max_length),
        examples=tuple(tuple(decode_parts(row, tokenizer)) for row in shown),
        max_length=spec.data.max_length,
        tokens_are_estimated=tokenizer is None,
    )
    return ReadRows(data, checked)


def _unchecked(spec: StudySpec) -> tuple[str, ...]:
    return (
        f"the tokenizer of {spec.model.base} is not on this machine: rows are counted, their tokens are "
        f"estimated (4 characters each, 5 more a turn), and rows {GUESS_MARGIN} times as long have to fit.",
        "not checked without it: the chat template, which tokens carry loss, the true lengths.",
    )
