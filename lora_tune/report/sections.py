"""The tables and captions of a study's report as plain text: report.md and the page show the same ones."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lora_tune.records import LanePlan, StudySnapshot
from lora_tune.report import candidates, memory, probe, resolved, verdict, wording
from lora_tune.report import formatting as fmt
from lora_tune.report.answers import subject_name
from lora_tune.report.behaviour import BehaviourSummary
from lora_tune.report.confirmation import ConfirmationSummary
from lora_tune.report.cost import CostSummary
from lora_tune.report.ranking import kept_early, measured_peak, ranked
from lora_tune.report.summary import Outcome, ReportSummary
from lora_tune.report.tables import trial_columns
from lora_tune.units import format_bytes, format_duration


@dataclass(frozen=True, slots=True, kw_only=True)
class TextTable:
    """A table as text; every row has as many cells as there are headers."""

    headers: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def text_table(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> TextTable:
    """Return headers and rows as one value."""
    return TextTable(headers=tuple(headers), rows=tuple(map(tuple, rows)))


RATE_NOTE = (
    "The learning rate holds for this batch size, length of training and lora_alpha; with others tune "
    "it again."
)
SCORES_CAPTION = (
    "Each was trained anew with fresh seeds at full length and scored on rows that the search never saw. "
    'Losses are nats per target token; "search loss" is what the search saw at that length on its own '
    'rows, "gap" the confirmed loss less that. "To the best" is paired by row and above 0 where the '
    "candidate is worse, p is the chance of such a difference if there were none (adjusted for the "
    "number of comparisons by Holm)."
)
CANDIDATES_CAPTION = (
    'What they are: memory is the estimate for one alone, "s a step" its share of the measured '
    "time."
)
RESIDUALS_CAPTION = (
    "A residual is measured / predicted - 1: above 0 the estimate was too low. The margin covers the "
    "peaks of packs like these. Reserved and process hold cached blocks too, which the allocator gives "
    "back before memory runs out, so they can exceed what was needed."
)
# Of the states whose names do not say it all; the reason of each trial stands in its row.
STATE_MEANINGS = {
    "cached": "A cached trial has the settings of an earlier one and was answered with its result.",
    "diverged": "Diverged: the loss rose far above its beginning or was no number.",
    "infeasible": "Infeasible: memory ran out with the trial alone on the device.",
    "failed": "Failed: a fault of the machine or of the tool, which says nothing of the settings.",
    "running": "Running: not at its end; it goes on when the study does.",
}
PACKS_CAPTION = (
    "Each row is a pack over steps in which its lanes did not change, beside the estimate for the same "
    "lanes, rows and longest batch. All packs, and unrounded, are in memory.csv."
)


def settings_table(snapshot: StudySnapshot, summary: ReportSummary) -> TextTable | None:
    """Return what was trained of the recommended configuration; None where there is none."""
    config, lock = summary.config, snapshot.lock
    if config is None or summary.outcome is Outcome.NOTHING:
        return None
    scaling = "lora_alpha / sqrt(rank)" if config.use_rslora else "lora_alpha / rank"
    modules = sorted({name.rpartition(".")[2] for name in config.target_modules})
    rows = [
        ("rank", _rank_text(snapshot, summary)),
        ("lora_alpha", fmt.format_plain(config.lora_alpha)),
        ("scaling", f"{fmt.format_plain(config.scaling)} ({scaling})"),
        ("lora_dropout", fmt.format_plain(config.lora_dropout)),
        (
            "target modules",
            f"{config.target_set}: {', '.join(modules)} "
            f"({fmt.plural(len(config.target_modules), 'layer')})",
        ),
        ("learning rate", fmt.format_scientific(config.learning_rate)),
        ("optimizer", resolved.setting_text(lock, "train", "optimizer")),
        ("weight decay", resolved.setting_text(lock, "train", "weight_decay")),
        ("gradient clipping", f"norm {resolved.setting_text(lock, 'train', 'max_grad_norm')}"),
        ("effective batch size", resolved.setting_text(lock, "train", "effective_batch_size")),
        ("steps", str(summary.steps)),
        ("warm-up steps", str(lock.warmup_steps)),
        ("schedule", resolved.decay_text(lock)),
        ("longest row", f"{resolved.setting_text(lock, 'data', 'max_length')} tokens"),
    ]
    return text_table(("setting", "value"), rows)


def _rank_text(snapshot: StudySnapshot, summary: ReportSummary) -> str:
    """Return the rank that was trained, and the proposed one where it did not fit."""
    assert summary.config is not None
    rank = summary.config.rank
    for trial in snapshot.trials:
        if trial.number == summary.leader and trial.suggested.rank > rank:
            return f"{rank} ({trial.suggested.rank} was proposed, {rank} is the largest that fits)"
    return str(rank)


def adapter_sentence(summary: ReportSummary) -> str:
    """Say which training the adapter is; nothing before the decision."""
    c = summary.confirmation
    return verdict.adapter_sentence(c) if c is not None and c.decision is not None else ""


def scores_table(summary: ReportSummary) -> TextTable | None:
    """Return how each candidate scored; None before the confirmation."""
    if summary.confirmation is None:
        return None
    return text_table(*candidates.score_table(summary.confirmation))


def candidates_table(summary: ReportSummary) -> TextTable | None:
    """Return what each candidate is and costs; None before the confirmation."""
    if summary.confirmation is None:
        return None
    rows = candidates.setting_rows(summary.confirmation)
    return text_table(candidates.SETTING_HEADERS, rows)


def metrics_table(summary: ReportSummary) -> TextTable | None:
    """Return the metrics beside the loss; None where the study has none."""
    if summary.confirmation is None or not summary.confirmation.metrics:
        return None
    return text_table(*candidates.metric_table(summary.confirmation))


def metrics_caption(summary: ReportSummary) -> str:
    """Say what the metrics are means of."""
    return candidates.metric_caption(summary.confirmation) if summary.confirmation else ""


def metric_reasons(summary: ReportSummary) -> list[str]:
    """Return why metrics have no value."""
    return candidates.metric_reasons(summary.confirmation) if summary.confirmation else []


def trials_table(snapshot: StudySnapshot) -> TextTable:
    """Return all trials, best first."""
    columns = trial_columns(snapshot.lock.plan.device)
    rows = [[c.text(t) for c in columns] for t in ranked(snapshot.trials)]
    return text_table([c.header for c in columns], rows)


def trials_caption(snapshot: StudySnapshot, summary: ReportSummary) -> str:
    """Say how the table of trials is read."""
    plan = snapshot.lock.plan
    measured = ""
    if plan.device.startswith("cuda"):
        measured = ", measured the peak of the pack in which the trial trained"
    text = (
        "Best first. The loss is nats per target token on the selection rows, at the highest rung that "
        "the trial reached; compare it only between trials with the same number of steps. Predicted is "
        f"the estimated peak of {plan.lanes} such {'lane' if plan.lanes == 1 else 'lanes'} training "
        f"together{measured}; tokens/s is the trial's own share of its pack."
    )
    if any(kept_early(t) for t in snapshot.trials):
        text += (
            ' Steps such as "100 of 200" mean that the trial was better at step 100 than at 200 (it '
            "overfitted), and that state was kept."
        )
    return text + "".join(
        f" {meaning}" for state, meaning in STATE_MEANINGS.items() if state in summary.states
    )


def rungs_table(summary: ReportSummary) -> TextTable:
    """Return what each rung of the search showed."""
    headers = (
        "rung",
        "steps",
        "rows",
        "trials",
        "went on",
        "best",
        "loss",
        "median",
        "tokens",
        "lane time",
    )
    rows = [
        (
            str(r.rung),
            str(r.steps),
            f"{r.eval_rows} of {r.selection_rows}",
            str(r.num_trials),
            fmt.NOTHING if r is summary.rungs[-1] else str(r.num_promoted),
            fmt.NOTHING if r.best_trial is None else f"trial {r.best_trial}",
            fmt.format_loss(r.best_loss),
            fmt.format_loss(r.median_loss),
            fmt.format_count(r.num_tokens),
            format_duration(r.lane_s),
        )
        for r in summary.rungs
    ]
    return text_table(headers, rows)


def rungs_caption(summary: ReportSummary) -> str:
    """Say how the table of rungs is read."""
    fewer = ""
    if any(r.eval_rows < r.selection_rows for r in summary.rungs):
        fewer = (
            " Early rungs use fewer, so that evaluation costs at most a fifth of their training; losses "
            "of rungs with other rows do not compare."
        )
    return (
        "Rows are the selection rows that the rung was evaluated on, the first ones of the split: losses "
        f"compare within a rung.{fewer} Lane time counts each lane of a pack, so it can exceed the time "
        "that passed."
    )


def plan_sentence(snapshot: StudySnapshot) -> str:
    """Return what the study was planned to be; nothing in a study of an older version."""
    plan = snapshot.lock.study_plan
    if plan is None:
        return ""
    best = "best" if plan.finalists == 1 else f"{plan.finalists} best"
    return (
        f"Planned: {plan.num_trials} trials, then a confirmation of the {best}, one more if it is tied "
        f"with the last of them, and the default, {plan.seeds} "
        f"{'seed' if plan.seeds == 1 else 'seeds'} each."
    )


def memory_table(snapshot: StudySnapshot, summary: ReportSummary) -> TextTable:
    """Return budget, highest peaks, and how trials were packed."""
    plan = snapshot.lock.plan
    predicted = max((t.predicted_bytes for t in snapshot.trials if measured_peak(t)), default=0)
    kind = "highest measured peak (allocated)"
    if not plan.device.startswith("cuda"):
        kind = "highest memory of the process, libraries included"
    rows = [
        ("budget", _budget_text(plan)),
        ("highest prediction of a trained pack", fmt.format_memory(predicted)),
        (kind, fmt.format_memory(summary.highest_peak_bytes)),
        ("lanes trained together", str(plan.lanes)),
        ("micro-batch per lane", str(plan.micro_batch_size)),
        ("gradient checkpointing", "on" if plan.gradient_checkpointing else "off"),
        ("low-rank products", _products_text(plan)),
    ]
    return text_table(("memory and packing", "value"), rows)


def _products_text(plan: LanePlan) -> str:
    if plan.group_rank == 0:
        return "one product a lane"
    return f"one product for neighbouring lanes, up to {plan.group_rank} ranks together"


def _budget_text(plan: LanePlan) -> str:
    text = format_bytes(plan.budget_bytes)
    if not plan.capacity_bytes:
        return text
    share = fmt.format_percent(plan.budget_bytes / plan.capacity_bytes)
    return f"{text} ({share} of {format_bytes(plan.capacity_bytes)})"


def probe_table(snapshot: StudySnapshot) -> TextTable | None:
    """Return the readings of the probe; None where nothing was measured."""
    plan = snapshot.lock.plan
    if not plan.probe_readings:
        return None
    return text_table(probe.PROBE_HEADERS, probe.probe_rows(plan))


def probe_caption(snapshot: StudySnapshot) -> str:
    """Say what the probe measured, how long it took and what it was for."""
    use = "More rows or lanes are kept if they give a tenth more tokens/s."
    if isinstance(resolved.spec_value(snapshot.lock.spec, "run", "lanes"), int):
        use = "It served the forecast alone: the study file sets the lanes."
    return (
        f"Measured in this order before the first trial ({_probe_cost(snapshot)}): a training step of "
        "equal lanes at the largest rank, on rows of about the mean length, the same in every reading. "
        f"{use}"
    )


def _probe_cost(snapshot: StudySnapshot) -> str:
    """Say how long the probe took, beside the study if that is known."""
    seconds, wall_s = snapshot.lock.plan.probe_s, snapshot.wall_s
    text = f"{seconds:.1f} s"
    return f"{text}, {fmt.format_percent(seconds / wall_s)} of the study so far" if wall_s else text


def spread_table(summary: ReportSummary) -> TextTable | None:
    """Return how far measured peaks were off the estimate; None where no reading counts."""
    if summary.memory is None or not summary.memory.spreads:
        return None
    return text_table(memory.SPREAD_HEADERS, memory.spread_rows(summary.memory))


def packs_table(snapshot: StudySnapshot) -> TextTable | None:
    """Return the measured packs; None without readings, as on a CPU."""
    readings = snapshot.memory.readings
    if not readings:
        return None
    return text_table(memory.PACK_HEADERS, memory.pack_rows(readings))


def data_table(snapshot: StudySnapshot) -> TextTable:
    """Return what the data were."""
    data = snapshot.lock.data
    rows = [
        ("source", data.source),
        ("format", data.format),
        ("chat template", data.chat_template),
        ("rows to train on", fmt.format_count(data.num_train)),
        ("rows to select on", fmt.format_count(data.num_selection)),
        ("rows to confirm on", fmt.format_count(data.num_confirmation)),
        ("training tokens", fmt.format_count(data.num_train_tokens)),
        ("of these with loss", fmt.format_count(data.num_train_labels)),
        ("longest row", f"{fmt.format_count(data.max_tokens)} tokens"),
        ("duplicates removed", fmt.format_count(data.num_duplicates)),
        ("rows that could not be read", fmt.format_count(data.num_bad_rows)),
        ("rows without a target token", fmt.format_count(data.num_unlabelled)),
        ("rows cut to length", fmt.format_count(data.num_truncated)),
        ("fingerprint (SHA-256)", data.sha256),
    ]
    return text_table(("data", "value"), rows)


def environment_table(snapshot: StudySnapshot) -> TextTable:
    """Return base model, hardware, versions and seed."""
    lock = snapshot.lock
    model = lock.model
    rows = [
        ("base model", model.base),
        ("hub id", model.hub_id or "not known"),
        ("revision", model.revision or "not known"),
        (
            "architecture",
            f"{model.architecture}, {fmt.format_count(model.num_parameters)} parameters",
        ),
        ("license of the base", model.license or "not known"),
        ("quantization", model.quantization),
        ("compute type", lock.plan.compute_dtype),
        *resolved.hardware_rows(lock),
        *lock.versions.items(),
        ("study file (SHA-256)", lock.spec_sha256),
        ("seed", resolved.setting_text(lock, "study", "seed")),
        ("started", lock.created),
    ]
    return text_table(("environment", "value"), rows)


def cost_table(summary: ReportSummary) -> TextTable:
    """Return time, tokens and steps beside what was forecast and what a full grid would take."""
    cost = summary.cost
    speed = fmt.NOTHING
    if cost.tokens_per_s is not None:
        speed = f"{fmt.format_count(cost.tokens_per_s)} (loading and evaluation included)"
    rows = [
        (f"wall time on the {wording.device_name(summary.device)}", _time_text(cost)),
        *_forecast_rows(cost),
        ("training tokens", fmt.format_count(cost.num_tokens)),
        ("tokens/s", speed),
        ("steps of the search", _share_text(cost.search_steps, cost.grid_steps)),
        ("steps of the confirmation", _share_text(cost.confirmation_steps, cost.grid_steps)),
        ("steps of every trial trained fully", fmt.format_count(cost.grid_steps)),
    ]
    return text_table(("cost", "value"), rows)


def _time_text(cost: CostSummary) -> str:
    if not cost.wall_s:
        return fmt.NOTHING  # the run was killed before it could write the time down
    text = format_duration(cost.wall_s)
    if cost.wall_s >= 60:
        text += f" ({cost.wall_s:.0f} s)"
    if cost.forecast_error is None:
        return text
    return f"{text}, {wording.forecast_error_text(cost.forecast_error)}"


def _forecast_rows(cost: CostSummary) -> list[tuple[str, str]]:
    forecast = cost.forecast
    if forecast is None:
        return []
    return [
        (
            "forecast",
            f"{format_duration(forecast.total_s)} if no trial ends early: loading "
            f"{format_duration(forecast.load_s)}, search "
            f"{format_duration(forecast.search_s)}, its evaluation "
            f"{format_duration(forecast.evaluation_s)}, confirmation "
            f"{format_duration(forecast.confirmation_s)}",
        ),
        (
            "steps in the forecast",
            f"search {fmt.format_count(forecast.search_steps)}, confirmation "
            f"{fmt.format_count(forecast.confirmation_steps)}",
        ),
    ]


def _share_text(steps: int, whole: int) -> str:
    if not whole:
        return fmt.format_count(steps)
    return f"{fmt.format_count(steps)} ({fmt.format_percent(steps / whole)} of every trial trained fully)"


def forgetting_table(behaviour: BehaviourSummary, c: ConfirmationSummary) -> TextTable | None:
    """Return the loss on general text before and after; None where it was not measured."""
    if not behaviour.forgetting:
        return None
    rows = [
        (
            subject_name(row.subject, c),
            fmt.format_loss(row.loss),
            fmt.NOTHING if row.change is None else memory.format_residual(row.change),
        )
        for row in behaviour.forgetting
    ]
    return text_table(("adapter", "loss on general text", "against the untuned base"), rows)


def target_sets_table(snapshot: StudySnapshot) -> TextTable:
    """Return which modules of the base each target set matched, and what fits of it."""
    rows = [
        (
            found.name,
            fmt.format_count(len(found.modules)),
            "none fits" if found.max_rank == 0 else str(found.max_rank),
            fmt.format_count(found.trainable_parameters_per_rank),
            ", ".join(module_ranges(found.modules)),
        )
        for found in snapshot.lock.target_sets
    ]
    headers = ("target set", "layers", "largest rank that fits", "parameters per rank", "modules")
    return text_table(headers, rows)


def module_ranges(modules: Iterable[str]) -> list[str]:
    """Return full module names with the numbers of like ones joined, in the order of their first.

    >>> module_ranges(["h.0.mlp.up", "h.1.mlp.up", "h.3.mlp.up", "lm_head"])
    ['h.{0-1,3}.mlp.up', 'lm_head']
    """
    numbers: dict[tuple[str, str], list[int]] = {}
    for name in modules:
        before, number, after = _split_at_number(name)
        numbers.setdefault((before, after), []).extend([] if number is None else [number])
    return [
        f"{before}{_runs_text(sorted(found))}{after}" for (before, after), found in numbers.items()
    ]


def _split_at_number(name: str) -> tuple[str, int | None, str]:
    """Return a module's name before, at and after the number of its layer."""
    parts = name.split(".")
    for i, part in enumerate(parts):
        if part.isascii() and part.isdecimal() and len(part) < 7:
            before, after = parts[:i], parts[i + 1 :]
            return ".".join([*before, ""]), int(part), ".".join(["", *after])
    return name, None, ""


def _runs_text(numbers: Sequence[int]) -> str:
    """Return rising numbers, those that follow each other as a range; nothing for none."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    texts = [str(low) if low == high else f"{low}-{high}" for low, high in runs]
    return f"{{{','.join(texts)}}}" if len(numbers) > 1 else "".join(texts)
