"""Sentences on the confirmation: the verdict against the default, the tie, its price, what can be seen."""

from collections.abc import Iterable
from math import isfinite

from lora_tune.records import Comparison, Decision, Verdict
from lora_tune.report import formatting as fmt
from lora_tune.report.confirmation import (
    BaseSummary,
    CandidateSummary,
    ConfirmationSummary,
)
from lora_tune.stats.ratio import Interval
from lora_tune.units import GIB


def verdict_sentence(c: ConfirmationSummary) -> str:
    """Return the verdict on the best candidate against the default.

    It is one of better, no measurable difference, worse, or why nothing can be said.
    """
    decision = c.decision
    assert decision is not None
    if decision.verdict is Verdict.NONE or decision.against_default is None:
        return _no_verdict(c, decision)
    comparison = decision.against_default
    who, size = c.call(comparison.candidate), _size(decision, comparison)
    side = "below" if comparison.difference < 0 else "above"
    apart = f"{size} {side} that of the default configuration"
    basis = _basis(decision, comparison)
    if decision.verdict is Verdict.BETTER:
        return (
            f"Better than the default: the loss of {who} is {apart} ({basis})."
            f"{_chosen_too(c, decision, comparison)}"
        )
    if decision.verdict is Verdict.WORSE:
        return (
            f"Worse than the default: the loss of {who}, the best of the search, is {apart} ({basis}). "
            "The default is recommended; tuning did not beat the default."
        )
    return _tie_text(decision, comparison, f"the loss of {who} is {apart} ({basis})")


def anchor_tie_sentence(c: ConfirmationSummary, trial: int | None) -> str:
    """Say that the tool's own starting point is as good as the best, nothing when it is not."""
    if trial is None or c.decision is None or c.decision.verdict in (Verdict.SAME, Verdict.WORSE):
        return ""
    return (
        f"Tuning did not beat the tool's own default, anchor A1 (trial {trial}): it is "
        f"{'the best' if c.decision.best == f'trial {trial}' else 'tied with the best'}."
    )


def _no_verdict(c: ConfirmationSummary, decision: Decision) -> str:
    if c.default is None:
        return "No verdict against the default: this study has no default configuration to compare with."
    if c.default in decision.failed:
        reasons = "; ".join(c.candidate(c.default).reasons) or "no reason recorded"
        return (
            "No verdict against the default: the default configuration could not be trained "
            f"({fmt.one_line(reasons)})."
        )
    return (
        "Tuning did not beat the default: no other configuration was confirmed to compare with it."
    )


def _basis(decision: Decision, comparison: Comparison) -> str:
    """Return the interval of the difference, of its size where its sign is sure, and what it rests on."""
    low, high = comparison.low, comparison.high
    interval = f"interval of the difference {fmt.format_range(low, high)}"
    if low > 0 or high < 0:
        ends = sorted((abs(low), abs(high)))
        interval = f"interval {fmt.format_range(*ends, signed=False)}"
    return (
        f"95 % {interval}, {seeds_text(decision.seeds)}, "
        f"{fmt.plural(decision.num_rows, 'unseen row')}{_clusters_text(decision)}"
    )


def _size(decision: Decision, comparison: Comparison) -> str:
    size = abs(comparison.difference)
    text = f"{fmt.format_difference(size, signed=False)} nats per token"
    losses = [s.loss for s in decision.scores if s.candidate == comparison.reference]
    return f"{text} ({fmt.format_percent(size / losses[0])})" if losses else text


def _chosen_too(c: ConfirmationSummary, decision: Decision, comparison: Comparison) -> str:
    """Say that the recommended configuration, where it is not the best, beats the default as well."""
    if decision.chosen == comparison.candidate:
        return ""
    losses = {score.candidate: score.loss for score in decision.scores}
    gain = losses[comparison.reference] - losses[decision.chosen]
    return (
        f" So is the recommended {c.call(decision.chosen)}, tied with it, by "
        f"{fmt.format_difference(gain, signed=False)} "
        f"({fmt.format_percent(gain / losses[comparison.reference])})."
    )


def _tie_text(decision: Decision, comparison: Comparison, what: str) -> str:
    """Say in which way the default is not beaten: by noise, by the margin, or by what was tried."""
    end = "Tuning did not beat the default."
    if comparison.low <= 0 <= comparison.high:
        seen = visible_sentence(decision)
        return f"No measurable difference from the default: {what}, inside noise. {seen} {end}"
    best = next(score.loss for score in decision.scores if score.candidate == decision.best)
    if abs(comparison.difference) < decision.practical_margin * best:
        margin = fmt.format_percent(decision.practical_margin)
        return (
            f"No difference that matters from the default: {what}, less than the practical margin "
            f"of {margin}. {end}"
        )
    return (
        f"No sure difference from the default: {what}, not beyond doubt when several candidates were "
        f"compared with it ({fmt.format_p(comparison.p_adjusted)} by Holm's correction). {end}"
    )


def _clusters_text(decision: Decision) -> str:
    if decision.num_clusters in (0, decision.num_rows):
        return ""
    return f" in {fmt.plural(decision.num_clusters, 'group')}"


def seeds_text(seeds: int) -> str:
    """Return the number of seeds; of a single one also what it cannot show."""
    return "one seed, which shows no seed noise" if seeds == 1 else fmt.plural(seeds, "seed")


def interval_text(interval: Interval | None) -> str:
    """Return an interval of losses in brackets with a space before it, or nothing."""
    if interval is None:
        return ""
    return f" (95 % interval {fmt.format_loss(interval.low)} to {fmt.format_loss(interval.high)})"


def visible_sentence(decision: Decision) -> str:
    """Return the smallest difference that the confirmation can see."""
    if not isfinite(decision.smallest_visible):
        return "Which differences could be seen cannot be told from so few rows and seeds."
    size = fmt.format_difference(decision.smallest_visible, signed=False)
    return (
        f"The smallest difference that these rows and seeds would show in 4 of 5 studies is {size}."
    )


def confirmation_items(c: ConfirmationSummary) -> list[str]:
    """Return what the confirmation shows beside the verdict, one statement an item."""
    decision, chosen = c.decision, c.chosen
    if decision is None or chosen is None or chosen.score is None:
        return []
    score = chosen.score
    each = "" if len(score.seed_losses) == 1 else "each "
    items = [
        f"Confirmed loss of {c.call(chosen.name)}: {fmt.format_loss(score.loss)} nats per token"
        f"{interval_text(Interval(score.low, score.high))}, over "
        f"{fmt.plural(len(score.seed_losses), 'seed')} ({each}a training from a fresh random start) on "
        f"{fmt.plural(decision.num_rows, 'row')} that the search never saw"
        f" ({fmt.plural(c.num_labels or 0, 'target token')}, computed in "
        f"{fmt.one_line(c.compute_dtype or '')})."
    ]
    if c.base is not None:
        items.append(_base_item(c.base))
    if chosen.gap is not None:
        items.append(_gap_item(chosen, c, gap=chosen.gap))
    items += tie_items(c, decision)
    items += _noise_items(c, decision)
    if len(decision.scores) > 1:
        items.append(front_sentence(c, decision))
    return items


def base_sentence(c: ConfirmationSummary, base: BaseSummary) -> str:
    """Return how far the recommended configuration is from the untuned base."""
    if base.relative_reduction is None or c.decision is None:
        return f"The untuned base's loss is {fmt.format_loss(base.loss)} nats per token."
    side = "below" if base.relative_reduction >= 0 else "above"
    seeds = c.decision.seeds
    mean = "" if seeds == 1 else f", mean over {seeds} seeds,"
    return (
        f"On rows that the search never saw the loss of {c.call(c.decision.chosen)}{mean} is "
        f"{fmt.format_loss(_tuned(base))} nats per token, "
        f"{fmt.format_percent(abs(base.relative_reduction))} {side} the untuned base's "
        f"{fmt.format_loss(base.loss)}."
    )


def _tuned(base: BaseSummary) -> float:
    return base.loss + (base.difference or 0.0)


def reduction_text(base: BaseSummary) -> str:
    """Return the relative reduction of the base's loss with its interval."""
    if base.relative_reduction is None:
        return fmt.NOTHING
    text = fmt.format_percent(base.relative_reduction)
    if base.reduction_interval is None:
        return text
    low, high = base.reduction_interval
    return f"{text} (95 % interval {fmt.format_percent(low)} to {fmt.format_percent(high)})"


def _base_item(base: BaseSummary) -> str:
    return (
        f"Reduction against the untuned base: {reduction_text(base)}, the interval for the choice of "
        "rows alone."
    )


def search_sentence(c: ConfirmationSummary) -> str:
    """Return the loss that the search saw of the recommended configuration; nothing where it saw none."""
    if c.chosen is None or c.chosen.gap is None:
        return ""
    return (
        f"In the search, on other rows, the loss of {c.call(c.chosen.name)} was "
        f"{fmt.format_loss(c.chosen.search_loss)}; the confirmed one counts."
    )


def _gap_item(chosen: CandidateSummary, c: ConfirmationSummary, *, gap: float) -> str:
    dtype = ""
    if chosen.search_dtype != c.compute_dtype:
        dtype = f", computed in {fmt.one_line(chosen.search_dtype or '')}"
    base = ""
    if c.base is not None and c.base.selection_loss is not None:
        change = fmt.format_difference(c.base.loss - c.base.selection_loss)
        base = f"; from these rows to those the untuned base changes by {change}"
    rows = fmt.plural(chosen.search_rows or 0, "selection row")
    return (
        f"In the search its loss was {fmt.format_loss(chosen.search_loss)} on {rows}{dtype}, where the "
        "best of many looks better than it is. The confirmed loss, the one to quote, is "
        f"{fmt.format_difference(abs(gap), signed=False)} {'higher' if gap >= 0 else 'lower'}{base}."
    )


def tie_items(c: ConfirmationSummary, decision: Decision) -> list[str]:
    """Return who is tied with the best, what choosing the cheapest costs, and what is not settled."""
    others = [name for name in decision.tied if name != decision.best]
    best = c.call(decision.best)
    if not others:
        rivals = len(decision.scores) - 1
        return [f"No other candidate is tied with the best, {best}."] if rivals else []
    items = [
        f"Tied with the best, {best}: {names_text(c, others)}. Their difference is inside noise or below "
        f"the practical margin of {fmt.format_percent(decision.practical_margin)}; of those tied the "
        "cheapest is recommended, by memory, then time, then rank, then loss."
    ]
    if price := price_sentence(c):
        items.append(price)
    if decision.unresolved:
        items.append(unresolved_sentence(c, decision))
    return items


def unresolved_sentence(c: ConfirmationSummary, decision: Decision) -> str:
    """Say which ties are only a want of rows or seeds, and how many rows would do."""
    text = (
        f"Not settled: {names_text(c, decision.unresolved)} may be worse than "
        f"{c.call(decision.best)} by more than the practical margin, or not; the interval is too "
        "wide to tell."
    )
    if decision.rows_needed is None:
        return f"{text} More seeds are needed for it."
    return (
        f"{text} About {fmt.format_about(decision.rows_needed)} confirmation rows would settle it."
    )


def price_sentence(c: ConfirmationSummary) -> str:
    """Return what the cheapest of the tie set saves and costs; nothing when the best was chosen."""
    price, decision = c.price, c.decision
    if price is None or decision is None:
        return ""
    saved = []
    if abs(price.saved_bytes) >= 0.01 * GIB:
        saved.append(f"{-price.saved_bytes / GIB:+.2f} GiB")
    if price.saved_step_s is not None and abs(price.saved_step_s) >= 0.005:
        saved.append(f"{-price.saved_step_s:+.2f} s a step")
    if price.chosen_rank != price.best_rank:
        saved.append(f"rank {price.chosen_rank} instead of {price.best_rank}")
    comparison = c.candidate(price.chosen).against_best
    noise = comparison is None or comparison.low <= 0 <= comparison.high
    why = "inside noise" if noise else "below the practical margin"
    loss = f"a loss {fmt.format_percent(price.relative_loss)} higher, {why}"
    if fmt.format_percent(price.relative_loss) == fmt.format_percent(0):
        loss = "the same loss"
    return (
        f"Price of the cheapest: {c.call(price.chosen)} instead of {c.call(price.best)} is "
        f"{', '.join(saved) or 'as large'}, for {loss}."
    )


def _noise_items(c: ConfirmationSummary, decision: Decision) -> list[str]:
    share = fmt.format_percent(decision.practical_margin)
    margin = f"the practical margin ({share}, less counts as a tie)"
    if decision.seed_sd is None:
        items = [
            "One seed: each candidate was trained once more, so the chance in initialisation, "
            "dropout and data order is not in the intervals. Set select.seeds to 2 or more."
        ]
    else:
        items = [
            "Seed noise: one configuration's losses differ from seed to seed by "
            f"{fmt.format_difference(decision.seed_sd, signed=False)} (standard deviation)."
        ]
    best = next(score.loss for score in decision.scores if score.candidate == decision.best)
    if decision.smallest_visible <= decision.practical_margin * best:
        needed = f"That is enough for {margin}."
    elif decision.rows_needed is None:
        needed = f"Seeing {margin} needs more seeds; more rows alone would not do."
    else:
        needed = (
            f"Seeing {margin} would need about {fmt.format_about(decision.rows_needed)} "
            "confirmation rows."
        )
    return [*items, f"{visible_sentence(decision)} {needed}"]


def front_sentence(c: ConfirmationSummary, decision: Decision) -> str:
    """Return the Pareto front with its three named points."""
    front = decision.front
    if len(front.members) == 1:
        return (
            f"No trade-off to make: {c.call(front.best)} is the best in loss, memory and time alike "
            "(the Pareto front is it alone)."
        )
    return (
        "Best trade-offs of loss, memory and time (Pareto front: no other candidate is better in "
        f"one of them and no worse in the rest): {names_text(c, front.members)}. Lowest loss: "
        f"{c.call(front.best)}; best balance (knee): {c.call(front.knee)}; smallest within the "
        f"practical margin: {c.call(front.smallest)}."
    )


def adapter_sentence(c: ConfirmationSummary) -> str:
    """Say which training of the recommended configuration is in the folder adapter."""
    decision = c.decision
    assert decision is not None
    who = c.call(decision.chosen)
    if c.refit:
        return (
            f"The adapter is {who} trained once more on all rows, those of selection and "
            "confirmation included: that adapter itself was not scored, the losses here are of "
            "trainings without these rows."
        )
    ending = ""
    if c.refit_wanted:
        ending = " The training on all rows that select.refit asks for has not come to its end."
    if decision.seeds == 1:
        return f"The adapter is that of the one fresh training of {who}.{ending}"
    which = "the median by loss"
    if decision.seeds == 2:
        which = "the one of higher loss"
    elif decision.seeds % 2 == 0:
        which = "the upper of the two in the middle by loss"
    return (
        f"The adapter is that of {who}, seed {decision.median_seed}: of its {decision.seeds} seeds "
        f"{which}, not the luckiest.{ending}"
    )


def names_text(c: ConfirmationSummary, names: Iterable[str]) -> str:
    """Return candidates' names as a list in a sentence."""
    *first, last = (c.call(name) for name in names)
    return f"{', '.join(first)} and {last}" if first else last


def standing_text(candidate: CandidateSummary) -> str:
    """Return a candidate's place in one or two words, whether it is recommended included."""
    text = candidate.standing.value
    return f"{text}, chosen" if candidate.chosen else text
