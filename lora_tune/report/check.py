"""What a study will do, before it begins: as sentences, on a terminal, and as one JSON object."""

import shlex
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from lora_tune.memory.throughput import ThroughputEstimate
from lora_tune.memory.verdict import Device
from lora_tune.records import Forecast, PreparedData, StudyPlan, TrialConfig
from lora_tune.redaction import redact
from lora_tune.report import formatting as fmt
from lora_tune.report.check_rows import (
    CheckedRows,
    print_examples,
    print_lengths,
    rows_json,
    rows_lines,
    rows_warnings,
)
from lora_tune.report.estimate_study import FrontierRow
from lora_tune.report.estimate_tables import frontier_table
from lora_tune.report.terminal import plain_table, say, say_unbroken
from lora_tune.search.plan import confirmation_runs, entered_trials
from lora_tune.stats.power import rows_needed, smallest_visible_difference
from lora_tune.units import format_bytes

# Standard deviation over rows of the difference of two configurations' losses, nats per target token,
# before a study has shown its own: the value that sizes of evaluation sets are usually worked out with.
TYPICAL_SIGMA_D = 0.05
TYPICAL_LOSS = 1.0  # nats per target token, of which the practical margin is a share


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckedAnchor:
    """A configuration that a study begins with, as it would be trained."""

    name: str
    config: TrialConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskNeed:
    """What a study will write: adapters, and the lane states that may still be needed."""

    folder: Path  # of the study
    free_bytes: int
    used_bytes: int  # by the folder already
    most_bytes: int  # every trial with the largest adapter that fits, every tie with a seat
    about_bytes: int  # the anchors, other trials with the mean adapter of the space, no ties


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyCheck:
    """Everything that ``lora-tune check`` found out; nothing was loaded or trained."""

    study: str
    study_file: str
    model: str
    device: Device
    budget_bytes: int
    safety: float
    data: PreparedData
    row_tokens: float  # mean of a training row
    rows: CheckedRows
    target_sets: tuple[FrontierRow, ...]
    anchors: tuple[CheckedAnchor, ...]
    default: TrialConfig | None  # what gains are measured against; None: it does not fit
    plan: StudyPlan
    eval_rows: tuple[int, ...]
    lanes: int
    micro_batch_size: int
    gradient_checkpointing: bool
    forecast: Forecast | None
    throughput: (
        ThroughputEstimate | None
    )  # of a full pack, from the data sheet; None: measured, or not known
    disk: DiskNeed
    practical_margin: float
    notes: tuple[str, ...]

    @property
    def tokens_are_estimated(self) -> bool:
        """Whether no tokenizer was at hand."""
        return self.rows.tokens_are_estimated

    @property
    def hours(self) -> tuple[float, float, float] | None:
        """Expected, least and most hours; the same number thrice where the speed was measured."""
        if self.forecast is None:
            return None
        hours, speed = self.forecast.total_s / 3600, self.throughput
        if speed is None:
            return hours, hours, hours
        return (
            hours,
            hours * speed.tokens_per_s / speed.high,
            hours * speed.tokens_per_s / speed.low,
        )


def forecast_sentence(forecast: Forecast) -> str:
    """Say how long a study will take, and which part takes what.

    >>> forecast_sentence(
    ...     Forecast(
    ...         tokens_per_s=200.0,
    ...         measured=True,
    ...         search_steps=117,
    ...         confirmation_steps=96,
    ...         search_s=240.0,
    ...         evaluation_s=50.0,
    ...         confirmation_s=125.0,
    ...         load_s=20.0,
    ...     )
    ... )
    'about 7 min: search 4.0, evaluation 0.8, confirmation 2.1, loading 0.3.'
    """
    unit, seconds = ("min", 60) if forecast.total_s < 7200 else ("h", 3600)
    parts = {
        "search": forecast.search_s,
        "evaluation": forecast.evaluation_s,
        "confirmation": forecast.confirmation_s,
        "loading": forecast.load_s,
    }
    shown = ", ".join(f"{name} {took / seconds:.1f}" for name, took in parts.items() if took)
    total = forecast.total_s / seconds
    return f"about {total:.{0 if total >= 2 else 1}f} {unit}: {shown}."


def power_sentence(num_rows: int, *, practical_margin: float) -> str:
    """Say which difference so many confirmation rows show, before the study's own scatter is known.

    >>> power_sentence(785, practical_margin=0.005)
    '785 confirmation rows show a difference of 0.0050 nats per token (80 % power at 5 %, if losses of two \
configurations differ by 0.05 from row to row); the practical margin, 0.005 at a loss of 1, needs 785.'
    """
    visible = smallest_visible_difference(sigma_d=TYPICAL_SIGMA_D, num_rows=num_rows)
    text = (
        f"{fmt.plural(num_rows, 'confirmation row')} show a difference of "
        f"{fmt.format_difference(visible, signed=False)} nats per token (80 % power at 5 %, if losses of two "
        f"configurations differ by {TYPICAL_SIGMA_D} from row to row)"
    )
    needed = margin_rows(practical_margin)
    if needed is None:
        return f"{text}."
    margin = fmt.format_plain(practical_margin * TYPICAL_LOSS)
    return (
        f"{text}; the practical margin, {margin} at a loss of {TYPICAL_LOSS:.0f}, needs "
        f"{fmt.format_count(needed)}."
    )


def margin_rows(practical_margin: float) -> int | None:
    """Return the confirmation rows with which the practical margin is seen; None without a margin."""
    if not practical_margin:
        return None
    return rows_needed(practical_margin * TYPICAL_LOSS, sigma_d=TYPICAL_SIGMA_D)


def print_check(check: StudyCheck, console: Console) -> None:
    """Print what was found: data, what fits, anchors, rungs, confirmation, time and power."""
    say(console, f"{check.study}: {check.model} on {check.device.name}", style="bold")
    say(
        console,
        f"{format_bytes(check.budget_bytes)} of {format_bytes(check.device.usable_bytes)} may be used "
        f"(memory.safety {check.safety:.0%}); nothing was loaded or trained",
    )
    _section(console, "Data", _data_lines(check))
    _title(console, "Lengths")
    print_lengths(check.rows, console)
    if check.rows.examples:
        _title(console, "Examples")
        print_examples(check.rows, console)
    _table(console, "What fits", frontier_table(check.target_sets, nothing="never fits"))
    if check.anchors or check.default:
        _table(console, "Begins with", _anchor_table(check))
    _table(console, "Trials", _rung_table(check))
    _section(console, "Confirmation", [_confirmation_line(check)])
    _section(console, "Time", _time_lines(check))
    _section(console, "Disk", _disk_lines(check.disk))
    _section(
        console,
        "Power",
        [power_sentence(check.plan.num_confirmation, practical_margin=check.practical_margin)],
    )
    if notes := all_notes(check):
        _section(console, "Notes", notes, style="yellow")
    console.print()
    say_unbroken(console, f"Next: lora-tune run {shlex.quote(check.study_file)}")


def check_json(check: StudyCheck) -> dict[str, object]:
    """Return the check as one JSON object; seconds, bytes and nats are not rounded."""
    plan, found = check.plan, check.data.fingerprint
    hours = check.hours
    return {
        "study": check.study,
        "model": check.model,
        "device": check.device.name,
        "budget_bytes": check.budget_bytes,
        "data": {
            "source": redact(found.source),
            "format": found.format,
            "train": plan.num_train,
            "selection": plan.num_selection,
            "confirmation": plan.num_confirmation,
            "row_tokens": check.row_tokens,
            "longest_row_tokens": found.max_tokens,
            "tokens_are_estimated": check.tokens_are_estimated,
            **rows_json(check.rows, found),
        },
        "target_sets": [
            {
                "name": row.target_set,
                "max_rank": row.max_rank,
                "trainable_parameters": row.trainable_parameters,
                "lanes": row.plan.most_lanes if row.plan else 0,
                "batch_size": row.plan.micro_batch_size if row.plan else None,
                "gradient_checkpointing": row.plan.gradient_checkpointing if row.plan else None,
            }
            for row in check.target_sets
        ],
        "anchors": [
            {"name": anchor.name, **_config_json(anchor.config)} for anchor in check.anchors
        ],
        "default": None if check.default is None else _config_json(check.default),
        "trials": plan.num_trials,
        "anchors_only": plan.anchors_only,
        "rungs": [
            {"steps": steps, "trials": trials, "selection_rows": rows}
            for steps, trials, rows in zip(plan.rungs, _entered(plan), check.eval_rows, strict=True)
        ],
        "finalists": plan.finalists,
        "seeds": plan.seeds,
        "search_steps": plan.search_steps,
        "confirmation_steps": plan.confirmation_steps,
        "lanes": check.lanes,
        "micro_batch_size": check.micro_batch_size,
        "gradient_checkpointing": check.gradient_checkpointing,
        "forecast": None
        if check.forecast is None
        else {**asdict(check.forecast), "total_s": check.forecast.total_s},
        "hours": None if hours is None else hours[0],
        "hours_low": None if hours is None else hours[1],
        "hours_high": None if hours is None else hours[2],
        "power": {
            "assumed_sigma_d": TYPICAL_SIGMA_D,
            "assumed_loss": TYPICAL_LOSS,
            "smallest_visible": smallest_visible_difference(
                sigma_d=TYPICAL_SIGMA_D, num_rows=plan.num_confirmation
            ),
            "rows_needed_for_margin": margin_rows(check.practical_margin),
        },
        "disk": {
            "folder": str(check.disk.folder),
            "free_bytes": check.disk.free_bytes,
            "used_bytes": check.disk.used_bytes,
            "most_bytes": check.disk.most_bytes,
            "about_bytes": check.disk.about_bytes,
        },
        "notes": all_notes(check),
    }


def all_notes(check: StudyCheck) -> list[str]:
    """Return what the study would say of itself, and what should be mended before it runs."""
    notes = (*check.notes, *rows_warnings(check.rows), *_disk_warnings(check.disk))
    return [redact(note) for note in notes]


def _config_json(config: TrialConfig) -> dict[str, object]:
    return {
        "target_set": config.target_set,
        "rank": config.rank,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": config.lora_dropout,
        "learning_rate": config.learning_rate,
    }


def _data_lines(check: StudyCheck) -> Iterator[str]:
    plan, found = check.plan, check.data.fingerprint
    yield (
        f"{plan.num_train:,} rows train, {plan.num_selection:,} choose between trials, "
        f"{plan.num_confirmation:,} confirm the winner"
    )
    about = "about " if check.tokens_are_estimated else ""
    yield f"{about}{check.row_tokens:.0f} tokens a training row, {about}{found.max_tokens:,} the longest"
    yield from rows_lines(check.rows, found)


def _anchor_table(check: StudyCheck) -> Table:
    table = plain_table()
    table.add_column("anchor", no_wrap=True)
    table.add_column("target set", no_wrap=True, overflow="ellipsis", max_width=24)
    for header in ("rank", "lora_alpha", "dropout", "learning rate"):
        table.add_column(header, justify="right", no_wrap=True)
    rows = [(anchor.name, anchor.config) for anchor in check.anchors]
    if check.default is not None:
        rows.append(("default", check.default))
    for name, config in rows:
        table.add_row(
            fmt.one_line(name),
            fmt.one_line(config.target_set),
            str(config.rank),
            fmt.format_plain(config.lora_alpha),
            fmt.format_plain(config.lora_dropout),
            fmt.format_scientific(config.learning_rate),
            style="dim" if name == "default" else "",
        )
    return table


def _rung_table(check: StudyCheck) -> Table:
    plan = check.plan
    table = plain_table()
    for header in ("rung", "steps", "trials", "with ties", "selection rows"):
        table.add_column(header, justify="right", no_wrap=True)
    most = entered_trials(plan.num_trials, len(plan.rungs), tie_seats=True)
    rows = zip(plan.rungs, _entered(plan), most, check.eval_rows, strict=True)
    for rung, (steps, trials, with_ties, eval_rows) in enumerate(rows):
        table.add_row(
            str(rung),
            fmt.format_count(steps),
            str(trials),
            fmt.NOTHING if with_ties == trials else f"<= {with_ties}",
            fmt.format_count(eval_rows),
        )
    return table


def _confirmation_line(check: StudyCheck) -> str:
    plan = check.plan
    return (
        f"{fmt.plural(plan.finalists, 'finalist')} and the default, {fmt.plural(plan.seeds, 'fresh seed')} "
        f"each: {fmt.plural(confirmation_runs(plan), 'run')} of {fmt.plural(plan.total_steps, 'step')}, "
        f"{fmt.format_count(plan.confirmation_steps)} steps beside {fmt.format_count(plan.search_steps)} "
        "of the search"
    )


def _time_lines(check: StudyCheck) -> Iterator[str]:
    packs = (
        f"{fmt.plural(check.lanes, 'lane')} a pack, {fmt.plural(check.micro_batch_size, 'row')} a lane and "
        f"pass, gradient checkpointing {'on' if check.gradient_checkpointing else 'off'}"
    )
    if check.forecast is None:
        yield packs
        yield "not known before the first start, which measures the speed"
        return
    yield f"{packs}: {fmt.format_count(check.forecast.tokens_per_s)} tokens/s"
    yield forecast_sentence(check.forecast)
    hours = check.hours
    if check.throughput is None:
        yield "speed measured when the study began"
    elif hours is not None:
        yield f"between {hours[1]:.2g} and {hours[2]:.2g} h; {check.throughput.source}"


def _disk_lines(disk: DiskNeed) -> Iterator[str]:
    already = f", {format_bytes(disk.used_bytes)} of it already there" if disk.used_bytes else ""
    yield (
        f"at most {format_bytes(disk.most_bytes)}, more likely {format_bytes(disk.about_bytes)}"
        f"{already}; {format_bytes(disk.free_bytes)} are free for {disk.folder}"
    )


def _disk_warnings(disk: DiskNeed) -> Iterator[str]:
    """Yield nothing where all fits, however large the trials become."""
    if disk.most_bytes - disk.used_bytes <= disk.free_bytes:
        return
    likely = disk.about_bytes - disk.used_bytes > disk.free_bytes
    yield (
        f"the disk {'will' if likely else 'may'} be full before the study ends: see Disk above. Free some "
        "space, choose another study.output, or lower space.rank or search.trials."
    )


def _entered(plan: StudyPlan) -> tuple[int, ...]:
    return entered_trials(plan.num_trials, len(plan.rungs))


def _section(
    console: Console,
    title: str,
    lines: "Iterator[str] | tuple[str, ...] | list[str]",
    style: str = "",
) -> None:
    _title(console, title)
    for line in lines:
        console.print(Padding(Text(fmt.one_line(line), style=style), (0, 0, 0, 2), expand=False))


def _table(console: Console, title: str, table: Table) -> None:
    _title(console, title)
    console.print(Padding(table, (0, 0, 0, 2), expand=False))


def _title(console: Console, title: str) -> None:
    console.print()
    console.print(Text(title, style="bold"))
