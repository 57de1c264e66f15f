"""The table of trials: the same columns for the console, Markdown and, unrounded, for CSV."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_tune.records import StudySnapshot, TrialRecord, TrialState
from lora_tune.report import formatting as fmt
from lora_tune.report.ranking import effective_step, kept_early, measured_peak

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """A column for people. ``keep`` orders what a narrow console drops: the lowest goes first."""

    header: str
    text: Callable[[TrialRecord], str]
    keep: int
    numeric: bool = True


def tokens_per_s(trial: TrialRecord) -> float | None:
    """Return the lane's own training speed, while it shared the device with its pack."""
    wall_s = sum(r.wall_s for r in trial.rungs)
    return sum(r.num_tokens for r in trial.rungs) / wall_s if wall_s > 0 else None


def _speed_text(trial: TrialRecord) -> str:
    speed = tokens_per_s(trial)
    return fmt.NOTHING if speed is None else fmt.format_count(speed)


def remark(trial: TrialRecord) -> str:
    """Return why a trial ended as it did, what it repeats, and where it differs from the proposal."""
    parts = [fmt.one_line(trial.reason)]
    if trial.repeats is not None and f"trial {trial.repeats}" not in trial.reason:
        parts.append(f"same as trial {trial.repeats}")
    if trial.suggested.rank != trial.config.rank:
        parts.append(f"rank {trial.suggested.rank} proposed")
    if trial.kept is not None and kept_early(trial):
        parts.append(f"overfitted, step {trial.kept.steps} kept")
    return "; ".join(part for part in parts if part)


def _steps_text(trial: TrialRecord) -> str:
    if trial.state is TrialState.CACHED or not trial.steps:
        return fmt.NOTHING
    if trial.kept is not None and kept_early(trial):
        return f"{trial.kept.steps} of {trial.steps}"
    return str(trial.steps)


def _loss_text(trial: TrialRecord) -> str:
    return fmt.format_loss(trial.kept.eval_loss if trial.kept else None)


ALWAYS = 100

TRIAL_COLUMNS = (
    Column(header="trial", text=lambda t: str(t.number), keep=ALWAYS),
    Column(header="origin", text=lambda t: fmt.one_line(t.origin), keep=5, numeric=False),
    Column(header="state", text=lambda t: t.state.value, keep=ALWAYS, numeric=False),
    Column(header="rank", text=lambda t: str(t.config.rank), keep=ALWAYS),
    Column(header="alpha", text=lambda t: fmt.format_plain(t.config.lora_alpha), keep=9),
    Column(
        header="ratio", text=lambda t: fmt.format_plain(t.config.lora_alpha / t.config.rank), keep=3
    ),
    Column(header="dropout", text=lambda t: fmt.format_plain(t.config.lora_dropout), keep=7),
    Column(
        header="targets", text=lambda t: fmt.one_line(t.config.target_set), keep=10, numeric=False
    ),
    Column(header="lr", text=lambda t: fmt.format_scientific(t.config.learning_rate), keep=ALWAYS),
    Column(header="steps", text=_steps_text, keep=8),
    Column(header="loss", text=_loss_text, keep=ALWAYS),
    Column(header="predicted", text=lambda t: fmt.format_memory(t.predicted_bytes), keep=4),
    Column(header="measured", text=lambda t: fmt.format_memory(measured_peak(t)), keep=6),
    Column(header="tokens/s", text=_speed_text, keep=2),
    Column(header="remark", text=remark, keep=1, numeric=False),
)


def trial_columns(device: str) -> tuple[Column, ...]:
    """Return the columns that mean something on a device.

    On a CPU a trial's measured peak is left out: it is that of the process, libraries included, and says
    nothing of the trial.
    """
    if device.startswith("cuda"):
        return TRIAL_COLUMNS
    return tuple(column for column in TRIAL_COLUMNS if column.header != "measured")


def trial_row(trial: TrialRecord, *, num_rungs: int) -> dict[str, object]:
    """Return one trial as a flat row of unrounded values, None where there is none.

    What was trained comes first (``rank``, ``lora_alpha``, ...); ``suggested_*`` is what the sampler
    had proposed, before the clamp to the memory budget. ``repeats`` is the earlier trial whose result
    a cached one has; ``kept_steps`` is below ``steps`` for a trial that overfitted.
    """
    losses = {r.rung: r.eval_loss for r in trial.rungs}
    last, kept = trial.rungs[-1] if trial.rungs else None, trial.kept
    config, suggested = trial.config, trial.suggested
    return {
        "trial": trial.number,
        "state": trial.state.value,
        "origin": _utf8(trial.origin),
        "repeats": trial.repeats,
        "rank": config.rank,
        "lora_alpha": config.lora_alpha,
        "alpha_ratio": config.lora_alpha / config.rank,
        "lora_dropout": config.lora_dropout,
        "target_set": _utf8(config.target_set),
        "learning_rate": config.learning_rate,
        "effective_step": effective_step(config),
        "scaling": config.scaling,
        "use_rslora": config.use_rslora,
        "num_target_modules": len(config.target_modules),
        "trainable_parameters": trial.trainable_parameters,
        "rung": last.rung if last else None,
        "steps": last.steps if last else None,
        "eval_loss": last.eval_loss if last else None,
        "eval_rows": len(last.evaluation.label_counts) if last else None,
        "kept_steps": kept.steps if kept else None,
        "kept_loss": kept.eval_loss if kept else None,
        **{f"eval_loss_rung_{rung}": losses.get(rung) for rung in range(num_rungs)},
        "predicted_bytes": trial.predicted_bytes,
        "peak_bytes": measured_peak(trial) or None,
        "pack_lanes": last.pack_lanes if last else None,
        "num_tokens": sum(r.num_tokens for r in trial.rungs),
        "wall_s": sum(r.wall_s for r in trial.rungs),
        "tokens_per_s": tokens_per_s(trial),
        "suggested_rank": suggested.rank,
        "suggested_alpha_ratio": suggested.alpha_ratio,
        "suggested_lora_dropout": suggested.lora_dropout,
        "suggested_target_set": _utf8(suggested.target_set),
        "suggested_effective_step": suggested.effective_step,
        "init_seed": config.init_seed,
        "dropout_seed": config.dropout_seed,
        "data_seed": config.data_seed,
        "penalty": trial.penalty,
        "reason": _utf8(trial.reason),
    }


def _utf8(text: str) -> str:
    """Return text that pandas can hold: a file name that is not UTF-8 has lone surrogates."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def trials_frame(snapshot: StudySnapshot) -> "pd.DataFrame":
    """Return every trial as a row of a pandas table, by number, unrounded.

    Whole numbers that some trials lack (steps, peak) stay whole: they are nullable columns.
    """
    import pandas as pd

    num_rungs = len(snapshot.lock.rungs)
    frame = pd.DataFrame([trial_row(t, num_rungs=num_rungs) for t in snapshot.trials])
    if frame.empty:
        return pd.DataFrame(columns=["trial", "state"])
    whole = ["repeats", "rung", "steps", "eval_rows", "kept_steps", "peak_bytes", "pack_lanes"]
    return frame.astype(dict.fromkeys(whole, "Int64"))
