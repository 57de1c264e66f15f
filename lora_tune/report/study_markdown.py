"""report.md: the tables and sentences of a study's report, put into its template."""

from lora_tune.records import LanePlan, StudySnapshot
from lora_tune.report import candidates, memory, probe, resolved, verdict, wording
from lora_tune.report import formatting as fmt
from lora_tune.report.cost import CostSummary
from lora_tune.report.markdown import (
    Markdown,
    code_block,
    environment,
    load_adapter_context,
    markdown_table,
)
from lora_tune.report.ranking import kept_early, measured_peak, ranked
from lora_tune.report.summary import Outcome, ReportSummary, summarize
from lora_tune.report.tables import trial_columns
from lora_tune.units import format_bytes, format_duration


def render_markdown(snapshot: StudySnapshot) -> str:
    """Return report.md of a study, finished or not."""
    summary = summarize(snapshot)
    template = environment().get_template("report.md.jinja")
    return template.render(
        lock=snapshot.lock,
        summary=summary,
        outcome=summary.outcome.value,
        headline=wording.headline(summary),
        conclusions=wording.conclusions(summary),
        cost_sentence=wording.cost_sentence(summary),
        adapter=_adapter(summary),
        settings=_settings(snapshot, summary),
        certainty=wording.certainty(summary),
        scores=_scores(summary),
        candidates=_candidates(summary),
        metrics=_metrics(summary),
        metric_caption=candidates.metric_caption(summary.confirmation)
        if summary.confirmation
        else "",
        metric_reasons=_metric_reasons(summary),
        trials=_trials(snapshot),
        kept_early=any(kept_early(t) for t in snapshot.trials),
        has_cached="cached" in summary.states,
        rungs=_rungs(summary),
        uses_fewer_rows=any(r.eval_rows < r.selection_rows for r in summary.rungs),
        memory=_memory(snapshot, summary),
        probe=_probe(snapshot),
        probe_sentence=probe.probe_sentence(snapshot.lock.plan),
        probe_cost=_probe_cost(snapshot),
        lanes_are_set=isinstance(resolved.spec_value(snapshot.lock.spec, "run", "lanes"), int),
        memory_sentences=wording.memory_sentences(summary),
        memory_spread=_memory_spread(summary),
        memory_plot=_memory_plot(summary),
        memory_packs=_memory_packs(snapshot),
        data=_data(snapshot),
        environment=_environment(snapshot),
        cost=_cost(summary),
        on_gpu=snapshot.lock.plan.device.startswith("cuda"),
        load=load_adapter_context(snapshot, adapter="adapter"),
        command=code_block(fmt.one_line(snapshot.lock.command), "sh"),
    )


def _settings(snapshot: StudySnapshot, summary: ReportSummary) -> Markdown | None:
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
    return markdown_table(("setting", "value"), rows)


def _rank_text(snapshot: StudySnapshot, summary: ReportSummary) -> str:
    """Return the rank that was trained, and the proposed one where it did not fit."""
    assert summary.config is not None
    rank = summary.config.rank
    for trial in snapshot.trials:
        if trial.number == summary.leader and trial.suggested.rank > rank:
            return f"{rank} ({trial.suggested.rank} was proposed, {rank} is the largest that fits)"
    return str(rank)


def _adapter(summary: ReportSummary) -> str:
    c = summary.confirmation
    return verdict.adapter_sentence(c) if c is not None and c.decision is not None else ""


def _scores(summary: ReportSummary) -> Markdown | None:
    if summary.confirmation is None:
        return None
    return markdown_table(*candidates.score_table(summary.confirmation))


def _candidates(summary: ReportSummary) -> Markdown | None:
    if summary.confirmation is None:
        return None
    rows = candidates.setting_rows(summary.confirmation)
    return markdown_table(candidates.SETTING_HEADERS, rows)


def _metrics(summary: ReportSummary) -> Markdown | None:
    if summary.confirmation is None or not summary.confirmation.metrics:
        return None
    return markdown_table(*candidates.metric_table(summary.confirmation))


def _metric_reasons(summary: ReportSummary) -> list[str]:
    return candidates.metric_reasons(summary.confirmation) if summary.confirmation else []


def _trials(snapshot: StudySnapshot) -> Markdown:
    columns = trial_columns(snapshot.lock.plan.device)
    rows = [[c.text(t) for c in columns] for t in ranked(snapshot.trials)]
    return markdown_table([c.header for c in columns], rows)


def _rungs(summary: ReportSummary) -> Markdown:
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
    return markdown_table(
        headers,
        [
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
        ],
    )


def _memory(snapshot: StudySnapshot, summary: ReportSummary) -> Markdown:
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
    return markdown_table(("memory and packing", "value"), rows)


def _products_text(plan: LanePlan) -> str:
    if plan.group_rank == 0:
        return "one product a lane"
    return f"one product for neighbouring lanes, up to {plan.group_rank} ranks together"


def _probe(snapshot: StudySnapshot) -> Markdown | None:
    plan = snapshot.lock.plan
    if not plan.probe_readings:
        return None
    return markdown_table(probe.PROBE_HEADERS, probe.probe_rows(plan))


def _probe_cost(snapshot: StudySnapshot) -> str:
    """Say how long the probe took, beside the study if that is known."""
    seconds, wall_s = snapshot.lock.plan.probe_s, snapshot.wall_s
    text = f"{seconds:.1f} s"
    return f"{text}, {fmt.format_percent(seconds / wall_s)} of the study so far" if wall_s else text


def _budget_text(plan: LanePlan) -> str:
    text = format_bytes(plan.budget_bytes)
    if not plan.capacity_bytes:
        return text
    share = fmt.format_percent(plan.budget_bytes / plan.capacity_bytes)
    return f"{text} ({share} of {format_bytes(plan.capacity_bytes)})"


def _memory_spread(summary: ReportSummary) -> Markdown | None:
    if summary.memory is None or not summary.memory.spreads:
        return None
    return markdown_table(memory.SPREAD_HEADERS, memory.spread_rows(summary.memory))


def _memory_plot(summary: ReportSummary) -> Markdown | None:
    if summary.memory is None or not summary.memory.spreads:
        return None
    return code_block(memory.scatter_plot(summary.memory), "text")


def _memory_packs(snapshot: StudySnapshot) -> Markdown | None:
    readings = snapshot.memory.readings
    if not readings:
        return None
    return markdown_table(memory.PACK_HEADERS, memory.pack_rows(readings))


def _data(snapshot: StudySnapshot) -> Markdown:
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
    return markdown_table(("data", "value"), rows)


def _environment(snapshot: StudySnapshot) -> Markdown:
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
    return markdown_table(("environment", "value"), rows)


def _cost(summary: ReportSummary) -> Markdown:
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
    return markdown_table(("cost", "value"), rows)


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
