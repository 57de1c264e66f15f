"""What the files for all frameworks share: settings that fit the framework, rows, header, YAML, notes."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from textwrap import wrap

import yaml  # type: ignore[import-untyped]

from lora_tune.export.job import ExportJob
from lora_tune.export.refit_memory import refit_memory
from lora_tune.export.settings import WinnerSettings, winner_settings
from lora_tune.export.training_rows import TrainingRows, write_rows
from lora_tune.report import formatting as fmt

CARRIED = (
    "base and revision",
    "quantization",
    "compute dtype",
    "rank",
    "lora_alpha",
    "lora_dropout",
    "use_rslora",
    "target modules",
    "learning rate",
    "schedule",
    "optimizer",
    "weight decay",
    "clip norm",
    "effective batch size",
    "gradient checkpointing",
    "max_length",
    "steps",
    "loss as the mean over the target tokens of a step",
)
"""What every target carries."""
_WIDTH = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """What a target writes down."""

    settings: WinnerSettings  # with a batch that fits the framework
    rows: TrainingRows
    notes: tuple[str, ...]  # of memory and rows


def prepare(
    job: ExportJob, *, stack: str, tokens: bool, adapter_dtype: str | None = None
) -> Prepared:
    """Return the winner's settings as they fit a stack, and write its rows into the job's folder.

    Args:
        job: The export.
        stack: One of ``memory.request.STACKS``.
        tokens: As in ``write_rows``.
        adapter_dtype: As in ``refit_memory``.

    Raises:
        StoreError: The study has no winner yet.
        StudyFileError: ``job.gpu`` is no GPU and no size.
    """
    settings = winner_settings(job.snapshot)
    refit = refit_memory(
        settings, job.snapshot.lock, stack=stack, gpu=job.gpu, adapter_dtype=adapter_dtype
    )
    rows = write_rows(job, settings, tokens=tokens)
    settings = refit.applied(settings)
    if rows.base_folder:
        settings = replace(settings, base=rows.base_folder)
    return Prepared(settings=settings, rows=rows, notes=(*refit.notes, *rows.notes))


def header(settings: WinnerSettings, *, framework: str, notes: Sequence[str]) -> str:
    """Return comment lines: what this is, the confirmed loss, changes, and what differs from the study."""
    score = settings.score
    losses = (
        f"{fmt.format_loss(score.loss)} nats per target token "
        f"(95 % interval {fmt.format_loss(score.low)} to {fmt.format_loss(score.high)})"
    )
    texts = [
        f"{framework}: {settings.chosen} of the lora-tune study {settings.study}, begun {settings.created}.",
        f"Confirmed loss on {settings.num_confirmation} rows that the search never saw: {losses}.",
        f"For one GPU: {settings.effective_batch_size} rows an optimizer step. On several, divide "
        "the accumulation steps by their number.",
        "Notes:",
        *(f"- {note}" for note in notes),
    ]
    return "".join(f"# {line}\n" for text in texts for line in _lines(text))


def _lines(text: str) -> list[str]:
    indent = "  " if text.startswith("- ") else ""
    return wrap(fmt.one_line(text), _WIDTH - 2, subsequent_indent=indent) or [""]


def yaml_text(sections: Mapping[str, Mapping[str, object]]) -> str:
    """Return sections of keys as YAML, each below a comment with its name."""
    return "\n".join(f"# {name}\n{_dump(values)}" for name, values in sections.items())


def _dump(values: Mapping[str, object]) -> str:
    return str(
        yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True, default_flow_style=False)
    )


def carried_note(names: Iterable[str]) -> str:
    """Return the sentence that lists what was carried."""
    return f"carried: {', '.join(names)}."


def schedule_note(settings: WinnerSettings) -> str:
    """Return what is not exact in transformers' own schedule."""
    warmup = settings.schedule.warmup_steps
    return (
        f"warm-up: transformers begins at zero, the study at 1/{warmup} of the peak; both reach it at step "
        f"{warmup}. Peak and cool-down are exact."
    )


def autocast_note(framework: str) -> str:
    """Return what differs in 16 bit."""
    return f"{framework} computes under autocast, the study without: small differences of rounding."
