"""The sentences that console, Markdown and model card share. Plain text, not escaped."""

from lora_tune.memory.calibration import QUANTILE, least_residuals
from lora_tune.records import StudyLock, StudySnapshot, TrialConfig, TrialState
from lora_tune.report import formatting as fmt
from lora_tune.report import verdict
from lora_tune.report.cost import CostSummary
from lora_tune.report.memory import MemorySummary, format_residual
from lora_tune.report.rivals import PairedComparison
from lora_tune.report.rungs import RungCorrelation
from lora_tune.report.summary import Outcome, ReportSummary
from lora_tune.stats.redundancy import Redundancy
from lora_tune.units import format_bytes, format_duration

SIGNIFICANCE = 0.05
LEAST_CORRELATED = 5  # trials, before the agreement of two rungs is worth a sentence
MOST_NAMED = 10  # trials in a list of those that are waiting


def recommendation(summary: ReportSummary) -> str:
    """Return what to use, the verdict against the default, and the confirmed loss: one paragraph."""
    return " ".join(text for text in (headline(summary), *conclusions(summary)) if text)


def headline(summary: ReportSummary) -> str:
    """Return what to use, or why nothing can be recommended."""
    if summary.outcome is Outcome.NOTHING:
        return _nothing(summary)
    if summary.config is None:
        return f"Nothing can be recommended yet: {progress_text(summary)}, none with a result."
    settings = settings_text(summary.config)
    c = summary.confirmation
    if c is None or c.decision is None or summary.chosen is None:
        return (
            f"Unfinished ({progress_text(summary)}{runs_text(summary)}); the best so far is trial "
            f"{summary.leader}: {settings}. It is not confirmed on unseen rows yet."
        )
    who = f"{c.call(summary.chosen)}: {settings}"
    interval = c.base.reduction_interval if c.base else None
    if interval is not None and interval.high < 0:
        return f"Keep the untuned base: the best configuration is worse than it ({who})."
    if interval is not None and interval.low <= 0:
        return f"No measurable difference from the untuned base: the best configuration is {who}."
    return f"Use {who}."


def conclusions(summary: ReportSummary) -> list[str]:
    """Return the verdict and the confirmed loss against the untuned base; nothing before the decision."""
    c = summary.confirmation
    if c is None or c.decision is None:
        return []
    anchor = verdict.anchor_tie_sentence(c, summary.tied_anchor)
    sentences = [f"{verdict.verdict_sentence(c)} {anchor}".rstrip()]
    if c.base is not None:
        sentences.append(verdict.base_sentence(c, c.base))
    return sentences


def _nothing(summary: ReportSummary) -> str:
    c = summary.confirmation
    if c is not None:
        reasons = "; ".join(f"{x.name}, {reason}" for x in c.candidates for reason in x.reasons[:1])
        return (
            f"Nothing can be recommended: none of {fmt.plural(len(c.candidates), 'candidate')} came "
            f"through its confirmation ({fmt.one_line(reasons)})."
        )
    return (
        f"Nothing can be recommended: none of {fmt.plural(_count(summary), 'trial')} "
        f"succeeded ({states_text(summary)}). The reasons are in the table of trials."
    )


def memory_sentences(summary: ReportSummary) -> list[str]:
    """Return what the packs' measured memory says about the estimate; nothing without readings."""
    memory = summary.memory
    if memory is None:
        return []
    packs = fmt.plural(memory.num_readings, "pack")
    if not memory.spreads:
        return [f"{packs} measured, too short to say how good the estimate is."]
    allocated = memory.spreads[0]
    sentences = [
        f"{packs} measured: peak allocated was {format_residual(allocated.lowest)} to "
        f"{format_residual(allocated.highest)} off the estimate, median "
        f"{format_residual(allocated.median)}.",
        f"Safety margin: {fmt.format_percent(allocated.margin)}, {_margin_origin(memory)}.",
    ]
    if memory.num_out_of_memory:
        sentences.append(f"Memory ran out in {fmt.plural(memory.num_out_of_memory, 'pack')}.")
    if memory.supported_safety is not None:
        sentences.append(
            "What the process took, cached blocks included, supports memory.safety up to "
            f"{memory.supported_safety:.3f} for such packs."
        )
    return sentences


def _margin_origin(memory: MemorySummary) -> str:
    share = fmt.format_percent(QUANTILE)
    if not memory.margin_is_prior:
        return f"which covers {share} of such packs by the study's own residuals"
    needed = f"{least_residuals()} packs are needed for a margin of {share} of their own"
    if memory.spreads[0].margin > memory.prior_margin:
        return f"the largest residual; {needed}"
    return f"that of memory.safety; {needed}"


def settings_text(config: TrialConfig) -> str:
    """Return the searched settings as they were trained, separated by commas."""
    return (
        f"rank {config.rank}, lora_alpha {fmt.format_plain(config.lora_alpha)}, "
        f"dropout {fmt.format_plain(config.lora_dropout)}, "
        f"target modules {fmt.one_line(config.target_set)}, "
        f"learning rate {fmt.format_scientific(config.learning_rate)}"
    )


def runs_text(summary: ReportSummary) -> str:
    """Return how far the confirmation is, with a comma before it; nothing before it began."""
    c = summary.confirmation
    if c is None:
        return ""
    return f"; confirmation: {c.num_runs} of {fmt.plural(c.num_runs_planned, 'run')}"


def certainty(summary: ReportSummary) -> list[str]:
    """Return how far the recommendation can be trusted, one statement an item; nothing without one."""
    c = summary.confirmation
    if summary.outcome is Outcome.NOTHING:
        return []
    if c is not None and c.decision is not None:
        items = verdict.confirmation_items(c)
    else:
        items = _unconfirmed_items(summary)
    if summary.anchors_only:
        items.append(
            "The data are too small to compare short trainings: only the known good starting points "
            "(anchors) were tried, each at full length."
        )
    if summary.kept_early is not None:
        kept, trained = summary.kept_early
        items.append(
            f"Trial {summary.leader} was better after {kept} steps than after {trained}: trained "
            f"longer it overfitted, so the state of step {kept} counts."
        )
    if summary.first_rung_place is not None and len(summary.rungs) > 1:
        place, count = summary.first_rung_place
        items.append(
            f"At the first rung ({summary.rungs[0].steps} steps) trial {summary.leader} was number "
            f"{place} of {count}."
        )
    if summary.redundancy is not None:
        items.append(redundancy_sentence(summary.redundancy))
    return items + [
        f"Of the {found.num_trials} trials that reached both, the order at rung {found.rung} and at rung "
        f"{found.next_rung} has a rank correlation of {found.spearman:.2f} (1 is the same order)"
        f"{_other_rows(found)}."
        for found in summary.correlations
        if found.num_trials >= LEAST_CORRELATED
    ]


def redundancy_sentence(redundancy: Redundancy) -> str:
    """Say whether the alpha ratio was a setting of its own on the study's trials."""
    step, ratio = (fmt.format_share(x) for x in (redundancy.step, redundancy.ratio))
    found = (
        "no effect of the ratio by itself is seen here: learning rate and ratio act as one setting"
    )
    if redundancy.p_value < SIGNIFICANCE:
        found = "the ratio mattered by itself here"
    return (
        f"Learning rate and alpha ratio: of the differences between {redundancy.num_trials} trials at "
        f"the first rung the effective step (learning rate times lora_alpha / 32) explains {step} "
        f"beyond rank, and the ratio {ratio} more ({fmt.format_p(redundancy.p_value)}): {found}."
    )


def _unconfirmed_items(summary: ReportSummary) -> list[str]:
    items = [
        "The losses below are from the rows on which trials were chosen. The best of many "
        "looks better there than it is; what the rows kept for the confirmation say is not known yet."
    ]
    if summary.leader is not None:
        items += [runner_up_sentence(summary), anchor_sentence(summary)]
    items.append(
        "One seed: each trial was trained once. The intervals cover the choice of evaluation rows, "
        "not the chance in initialisation, dropout and data order."
    )
    return items


def _other_rows(c: RungCorrelation) -> str:
    """Say that the losses of two rungs are over other rows, where they are."""
    if c.eval_rows == c.next_eval_rows:
        return ""
    return f", on {c.eval_rows} and {c.next_eval_rows} selection rows"


def runner_up_sentence(summary: ReportSummary) -> str:
    """Say whether the lead over the next best trial is more than noise."""
    rival = summary.runner_up
    if rival is None:
        return "No other trial has a result to compare with."
    where = f"at rung {rival.rung} ({rival.steps} steps)"
    size = f"{fmt.format_difference(abs(rival.lead), signed=False)} nats per token"
    if rival.lead >= 0:
        text = f"Trial {summary.leader} leads trial {rival.trial} {where} by {size}"
    else:
        text = f"Trial {rival.trial} was lower than trial {summary.leader} {where} by {size}"
    return f"{text}: {_noise_text(rival)}."


def anchor_sentence(summary: ReportSummary) -> str:
    """Say whether the search beat the settings that it began with."""
    if summary.leader_origin is not None and summary.leader_origin.startswith("anchor"):
        return (
            f"Trial {summary.leader} is {fmt.one_line(summary.leader_origin)}, a setting that the "
            "search began with: nothing that it proposed was preferred"
            f"{' so far' if summary.outcome is Outcome.UNFINISHED else ''}."
        )
    anchor = summary.best_anchor
    if anchor is None:
        return "No starting point (anchor) has a result to compare with."
    if anchor == summary.runner_up:
        verdict = "did not measurably beat it" if anchor.within_noise else "changed that much"
        return (
            f"Trial {anchor.trial} is also the best setting that the search began with "
            f"({fmt.one_line(anchor.origin)}): the search {verdict}."
        )
    name = f"trial {anchor.trial} ({fmt.one_line(anchor.origin)})"
    where = f"at rung {anchor.rung} ({anchor.steps} steps)"
    if anchor.lead < 0:
        return (
            f"The best starting point, {name}, was lower {where} by "
            f"{fmt.format_difference(-anchor.lead, signed=False)}: {_noise_text(anchor)}."
        )
    verdict = "" if not anchor.within_noise else " The search did not measurably beat it."
    return (
        f"Against the best starting point, {name}, {where}: "
        f"{fmt.format_loss(anchor.leader_loss)} against {fmt.format_loss(anchor.trial_loss)}, "
        f"{_noise_text(anchor)}.{verdict}"
    )


def _noise_text(rival: PairedComparison) -> str:
    numbers = ""
    if rival.standard_error is not None:
        numbers = f" (standard error {fmt.format_difference(rival.standard_error, signed=False)})"
    if rival.within_noise:
        return f"within noise of trial {rival.trial}{numbers}"
    margin = ", though below the practical margin of the study" if rival.within_margin else ""
    return f"more than noise{numbers}{margin}"


def forecast_sentence(cost: CostSummary) -> str:
    """Return what was forecast beside what it took; nothing without a forecast."""
    forecast = cost.forecast
    if forecast is None:
        return ""
    source = "measured speed" if forecast.measured else "the GPU's data sheet"
    text = f"Forecast {format_duration(forecast.total_s)} (by {source}, if no trial ends early)"
    if cost.forecast_error is None:
        return f"{text}; {format_duration(cost.wall_s)} spent." if cost.wall_s else f"{text}."
    error = forecast_error_text(cost.forecast_error)
    return f"{text}; it took {format_duration(cost.wall_s)}, {error}."


def forecast_error_text(error: float) -> str:
    """Return took / forecast - 1 in words.

    >>> forecast_error_text(0.07), forecast_error_text(-0.2), forecast_error_text(4.61)
    ('7 % longer than forecast', '20 % shorter than forecast', '5.6 times as long as forecast')
    """
    if error >= 1:
        return f"{1 + error:.1f} times as long as forecast"
    return f"{abs(100 * error):.0f} % {'longer' if error >= 0 else 'shorter'} than forecast"


def cost_sentence(summary: ReportSummary) -> str:
    """Return what the study took and what training the recommended configuration takes, if known."""
    cost, c = summary.cost, summary.confirmation
    parts = []
    if cost.wall_s > 0:
        error = cost.forecast_error
        against = f", {forecast_error_text(error)}" if error is not None else ""
        took = "took" if summary.outcome is not Outcome.UNFINISHED else "has taken"
        device = device_name(summary.device)
        parts.append(f"The study {took} {format_duration(cost.wall_s)} on the {device}{against}.")
    if c is not None and c.chosen is not None and c.chosen.candidate.predicted_bytes:
        memory = fmt.format_memory(c.chosen.candidate.predicted_bytes)
        parts.append(f"Training {c.call(c.chosen.name)} alone needs {memory} by the estimate.")
    return " ".join(parts)


def sizes_sentence(snapshot: StudySnapshot) -> str:
    """Return what the adapter and its base take, in bytes; nothing where neither is known."""
    adapter, base = snapshot.adapter_bytes, snapshot.lock.model.base_bytes
    if not adapter and not base:
        return ""
    held = f"the base in memory {_size_text(base)}"
    if not adapter:
        return f"Sizes: {held}."
    if not base:
        return f"Sizes: the adapter's file {_size_text(adapter)}."
    return (
        f"Sizes: the adapter's file {_size_text(adapter)}, {held}; the adapter is "
        f"{fmt.format_percent(adapter / base)} of it."
    )


def _size_text(num_bytes: int) -> str:
    return f"{format_bytes(num_bytes)} ({fmt.format_count(num_bytes)} bytes)"


def device_name(device: str) -> str:
    """Return what a study ran on as people say it."""
    return "GPU" if device.startswith("cuda") else "CPU"


def states_text(summary: ReportSummary) -> str:
    """Return the number of trials in each state, largest first."""
    ordered = sorted(summary.states.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{count} {state}" for state, count in ordered) or "no trials"


def progress_text(summary: ReportSummary) -> str:
    """Return how many trials there are, of how many planned, and their states."""
    repeats = summary.states.get(TrialState.CACHED.value, 0)
    count = _count(summary) - repeats
    planned = summary.trials_planned
    done = fmt.plural(count, "trial")
    if planned is not None and planned != count:
        done = f"{count} of {fmt.plural(planned, 'trial')}"
    also = f" and {fmt.plural(repeats, 'repeat')}" if repeats else ""
    return f"{done}{also}: {states_text(summary)}"


def waiting_sentence(summary: ReportSummary) -> str:
    """Return what is still to be done; nothing of a study that is over.

    A study that trains at this moment and one that was interrupted have the same records.
    """
    if summary.outcome is not Outcome.UNFINISHED:
        return ""
    parts = [_waiting_trials(summary.waiting), _not_begun(summary), _missing_runs(summary)]
    return f"Not finished: {'; '.join(part for part in parts if part)}." if any(parts) else ""


def _waiting_trials(numbers: tuple[int, ...]) -> str:
    if not numbers:
        return ""
    names = ", ".join(map(str, numbers[:MOST_NAMED]))
    more = ", ..." if len(numbers) > MOST_NAMED else ""
    who = fmt.plural(len(numbers), "trial")
    return f"{who} {'waits' if len(numbers) == 1 else 'wait'} to go on ({names}{more})"


def _not_begun(summary: ReportSummary) -> str:
    """Return how many of the trials planned are still to be proposed; nothing once all of them are."""
    repeats = summary.states.get(TrialState.CACHED.value, 0)
    missing = (summary.trials_planned or 0) - (_count(summary) - repeats)
    if summary.confirmation is not None or missing <= 0:
        return ""
    return f"{fmt.plural(missing, 'trial')} {'has' if missing == 1 else 'have'} not begun"


def _missing_runs(summary: ReportSummary) -> str:
    c = summary.confirmation
    if c is None:
        return "the confirmation is still to come"
    missing = c.num_runs_planned - c.num_runs
    if missing <= 0:
        return ""
    return f"{fmt.plural(missing, 'run')} of the confirmation {'is' if missing == 1 else 'are'} missing"


def next_step(summary: ReportSummary, lock: StudyLock) -> str:
    """Return the command that goes on from here, or what to do next."""
    if summary.outcome is Outcome.UNFINISHED:
        return fmt.one_line(lock.command)
    if summary.outcome is Outcome.NOTHING:
        return "mend the study file by the reasons above, then run it under a new name"
    return "load the adapter as shown in the report"


def _count(summary: ReportSummary) -> int:
    return sum(summary.states.values())
