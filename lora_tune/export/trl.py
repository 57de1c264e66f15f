"""``lora-tune export --to trl``: a script that trains the winner with TRL's SFTTrainer.

The rows go with it as the study's own tokens and labels, so that template, truncation and the choice of
what carries loss are exactly the study's.
"""

from collections.abc import Sequence

import jinja2

from lora_tune.export.framework_file import CARRIED, autocast_note, carried_note, header, prepare
from lora_tune.export.job import ExportJob, ExportResult
from lora_tune.export.settings import ADAM_BETAS, ADAM_EPSILON, WinnerSettings
from lora_tune.export.training_rows import TrainingRows
from lora_tune.files import write_text

SCRIPT = "train_trl.py"


def export(job: ExportJob) -> ExportResult:
    """Write the script and the rows that it trains on.

    Raises:
        StoreError: The study has no winner yet.
        StudyFileError: ``job.gpu`` is no GPU and no size.
    """
    found = prepare(job, stack="trl", tokens=True, adapter_dtype="float32")
    settings, rows = found.settings, found.rows
    carried = CARRIED if rows.reason else (*CARRIED, "rows, template and loss mask, as tokens")
    notes = (*found.notes, *differences(settings, rows), *settings.notes)
    path = job.folder / SCRIPT
    write_text(path, script_text(settings, rows, notes))
    return ExportResult(
        files=(path, *(job.folder / name for name in rows.files)),
        command=f"python {SCRIPT}",
        notes=(carried_note(carried), *notes),
    )


def script_text(settings: WinnerSettings, rows: TrainingRows, notes: Sequence[str]) -> str:
    """Return the script."""
    return (
        _environment()
        .get_template("train_trl.py.jinja")
        .render(
            header=header(settings, framework="Training script for TRL 1.16", notes=notes),
            s=settings,
            rows=rows,
            betas=ADAM_BETAS,
            epsilon=ADAM_EPSILON,
            seed_losses=", ".join(f"{loss:.6f}" for loss in settings.score.seed_losses),
        )
    )


def _environment() -> jinja2.Environment:
    """Return templates of Python code: every value is shown as a literal, a number or a name."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("lora_tune.export"),
        autoescape=False,  # it is Python; text goes through the filter ``literal``
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["literal"] = ascii
    return environment


def differences(settings: WinnerSettings, rows: TrainingRows) -> list[str]:
    """Return what TRL does otherwise."""
    notes = []
    if rows.reason and rows.loss == "last":
        notes.append(
            "the study trained on the last assistant turn alone; of your rows TRL trains on all assistant "
            'turns of "messages", so give it "prompt" and "completion" instead.'
        )
    if settings.quantization == "nf4":
        notes.append("TRL's bfloat16 adapter is turned back into float32, as the study trained it.")
    if settings.compute_dtype != "float32":
        notes.append(autocast_note("TRL"))
    return notes
