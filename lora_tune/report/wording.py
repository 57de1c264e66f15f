"""The sentences that console, Markdown and model card share. Plain text, not escaped."""

from lora_tune.memory.calibration import QUANTILE, least_residuals
from lora_tune.records import StudyLock
from lora_tune.report import formatting as fmt
from lora_tune.report.memory import MemorySummary, format_residual
from lora_tune.report.statistics import Interval
from lora_tune.report.summary import (
    ConfirmationSummary,
    Outcome,
    PairedComparison,
    ReportSummary,
    RungCorrelation,
    spec_value,
)


def recommendation(summary: ReportSummary) -> str:
    """Return what to use and why, in one paragraph."""
    if summary.outcome is Outcome.NOTHING:
        return (
            f"Nothing can be recommended: none of {fmt.plural(_count(summary), 'trial')} "
            f"succeeded ({states_text(summary)}). The reasons are in the table of trials."
        )
    if summary.config is None:
        return f"Nothing can be recommended yet: {progress_text(summary)}, none with a result."
    settings = settings_text(summary)
    if summary.confirmation is None:
        return (
            f"Unfinished ({progress_text(summary)}); the best so far is trial {summary.leader}: "
            f"{settings}. It was not confirmed on unseen rows."
        )
    return f"{_verdict(summary, settings)} {confirmed_loss(summary.confirmation)}"


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


def settings_text(summary: ReportSummary) -> str:
    """Return the leader's searched settings, separated by commas."""
    config = summary.config
    if config is None:
        return ""
    return (
        f"rank {config.rank}, lora_alpha {fmt.format_plain(config.lora_alpha)}, "
        f"dropout {fmt.format_plain(config.lora_dropout)}, "
        f"target modules {fmt.one_line(config.target_set)}, "
        f"learning rate {fmt.format_scientific(config.learning_rate)}"
    )


def confirmed_loss(confirmation: ConfirmationSummary) -> str:
    """Return the confirmed loss of the winner against the untuned base, with intervals."""
    c = confirmation
    change = "below" if c.relative_reduction >= 0 else "above"
    return (
        f"On {fmt.plural(c.num_examples, 'row')} that the search never saw its loss is "
        f"{fmt.format_loss(c.winner_loss)} nats per token"
        f"{interval_text(c.winner_interval)}, {fmt.format_percent(abs(c.relative_reduction))} "
        f"{change} the untuned base's {fmt.format_loss(c.base_loss)}."
    )


def reduction_text(confirmation: ConfirmationSummary) -> str:
    """Return the relative reduction of the loss with its interval."""
    interval = confirmation.reduction_interval
    text = fmt.format_percent(confirmation.relative_reduction)
    if interval is None:
        return text
    low, high = fmt.format_percent(interval.low), fmt.format_percent(interval.high)
    return f"{text} (95 % interval {low} to {high})"


def interval_text(interval: Interval | None) -> str:
    """Return an interval of losses in brackets with a space before it, or nothing."""
    if interval is None:
        return ""
    low, high = fmt.format_loss(interval.low), fmt.format_loss(interval.high)
    return f" (95 % interval {low} to {high})"


def certainty(summary: ReportSummary) -> list[str]:
    """Return how far the recommendation can be trusted, one statement an item."""
    items = []
    if summary.confirmation is not None:
        items += _confirmation_items(summary.confirmation)
    else:
        items.append(
            "The losses below are from the rows on which trials were chosen. The best of many "
            "looks better there than it is; rows kept for the confirmation were not opened."
        )
    if summary.leader is not None:
        items.append(runner_up_sentence(summary))
        items.append(anchor_sentence(summary))
    items.append(
        "One seed: each trial was trained once, and no comparison with fresh seeds was made. The "
        "intervals cover the choice of evaluation rows, not the chance in initialisation, "
        "dropout and data order."
    )
    items += [
        f"The order of trials at rung {c.rung} against rung {c.next_rung}: rank correlation "
        f"{c.spearman:.2f} over the {c.num_trials} trials that reached both{_other_rows(c)}."
        for c in summary.correlations
    ]
    return items


def _other_rows(c: RungCorrelation) -> str:
    """Say that the losses of two rungs are over other rows, where they are."""
    if c.eval_rows == c.next_eval_rows:
        return ""
    return f", on {c.eval_rows} and {c.next_eval_rows} selection rows"


def _confirmation_items(c: ConfirmationSummary) -> list[str]:
    base = f"untuned base {fmt.format_loss(c.base_loss)}{interval_text(c.base_interval)}"
    items = [
        f"Confirmed on {fmt.plural(c.num_examples, 'unseen row')} "
        f"({fmt.plural(c.num_labels, 'target token')}, computed in {fmt.one_line(c.compute_dtype)}): "
        f"loss {fmt.format_loss(c.winner_loss)}{interval_text(c.winner_interval)}, {base}. "
        f"Relative reduction {reduction_text(c)}."
    ]
    if c.difference_standard_error is not None:
        items.append(
            f"Paired difference to the base {fmt.format_difference(c.difference)} nats per token, "
            f"standard error {fmt.format_difference(c.difference_standard_error, signed=False)} "
            "(clustered by row)."
        )
    if c.selection_loss is not None:
        dtype = ""
        if c.selection_dtype != c.compute_dtype:
            dtype = f", computed in {fmt.one_line(c.selection_dtype or '')}"
        base_gap = ""
        if c.base_selection_loss is not None:
            change = fmt.format_difference(c.base_loss - c.base_selection_loss)
            base_gap = f" (for the untuned base, between the same rows, it is {change})"
        items.append(
            f"The search saw {fmt.format_loss(c.selection_loss)} on {c.selection_examples} selection "
            f"rows{dtype}; "
            f"the step from there to the confirmed loss is {fmt.format_difference(c.gap)}"
            f"{base_gap}. Quote the confirmed loss."
        )
    return items


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
    if rival.z is not None:
        error = fmt.format_difference(rival.standard_error, signed=False)
        numbers = f" (standard error {error}, z = {abs(rival.z):.1f})"
    if rival.within_noise:
        return f"within noise of trial {rival.trial}{numbers}"
    margin = ", though below the practical margin of the study" if rival.within_margin else ""
    return f"more than noise{numbers}{margin}"


def states_text(summary: ReportSummary) -> str:
    """Return the number of trials in each state, largest first."""
    ordered = sorted(summary.states.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{count} {state}" for state, count in ordered) or "no trials"


def progress_text(summary: ReportSummary) -> str:
    """Return how many trials there are, of how many planned, and their states."""
    count = _count(summary)
    planned = summary.trials_planned
    of = f" of {planned}" if planned is not None and planned != count else ""
    return f"{count}{of} trials: {states_text(summary)}"


def schedule_text(lock: StudyLock) -> str:
    """Say under which training a learning rate of this study was found."""
    steps = max(lock.rungs, default=0)
    batch = setting_text(lock, "train", "effective_batch_size")
    optimizer = setting_text(lock, "train", "optimizer")
    name = "AdamW" if optimizer == "adamw" else optimizer
    return (
        f"{name}, effective batch size {batch}, {fmt.plural(steps, 'step')}, "
        f"{fmt.plural(lock.warmup_steps, 'warm-up step')}, then {decay_text(lock)}"
    )


def decay_text(lock: StudyLock) -> str:
    """Return the learning rate's course after the warm-up."""
    cooldown = spec_value(lock.spec, "train", "cooldown_ratio")
    if not isinstance(cooldown, int | float) or cooldown == 0:
        return "constant"
    return f"constant, falling linearly to zero over the last {100 * cooldown:.0f} % of the steps"


def setting_text(lock: StudyLock, section: str, key: str) -> str:
    """Return a key of the resolved study file as text."""
    value = spec_value(lock.spec, section, key)
    if value is None:
        return "not recorded"
    return fmt.format_plain(value) if isinstance(value, float) else fmt.one_line(str(value))


def next_step(summary: ReportSummary, lock: StudyLock) -> str:
    """Return the command that goes on from here, or what to do next."""
    if summary.outcome is Outcome.UNFINISHED:
        return fmt.one_line(lock.command)
    if summary.outcome is Outcome.NOTHING:
        return "mend the study file by the reasons above, then run it under a new name"
    return "load the adapter as shown in the report"


def _verdict(summary: ReportSummary, settings: str) -> str:
    assert summary.confirmation is not None
    interval = summary.confirmation.reduction_interval
    who = f"trial {summary.leader} ({settings})"
    if interval is not None and interval.low > 0:
        return f"Use {who}."
    if interval is not None and interval.high < 0:
        return f"Keep the untuned base: the best of the search, {who}, is worse than it."
    return f"No measurable difference from the untuned base: the best of the search is {who}."


def _count(summary: ReportSummary) -> int:
    return sum(summary.states.values())
