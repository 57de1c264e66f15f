"""What a reader should be wary of: settings at the end of the space, divergence nearby, memory."""

from collections.abc import Sequence

from lora_tune.records import StudySnapshot, SuggestedParams, TrialConfig, TrialState
from lora_tune.report import formatting as fmt
from lora_tune.report.ranking import effective_step, measured_peak
from lora_tune.report.resolved import spec_value

MAX_NAMED = 5  # of missing trials


def caveats(
    snapshot: StudySnapshot, *, number: int | None, config: TrialConfig | None
) -> tuple[str, ...]:
    """Return warnings about the leading configuration and the study, as sentences.

    Args:
        snapshot: The study.
        number: Trial of the leading configuration; None for a default that was no trial, whose
            settings are not of the space.
        config: The leading configuration, None when there is none.
    """
    warnings = missing_trials(snapshot)
    trial = next((t for t in snapshot.trials if t.number == number), None)
    if config is not None and trial is not None:
        warnings += _edge_warnings(snapshot, config)
        warnings += _clamp_warning(trial.number, config, trial.suggested)
        warnings += _divergence_warnings(snapshot, trial.number, config)
    budget = snapshot.lock.plan.budget_bytes
    over = [t.number for t in snapshot.trials if measured_peak(t) > budget > 0]
    if over and snapshot.lock.plan.device.startswith("cuda"):  # a CPU's peak is of the process
        warnings.append(
            f"The measured peak of {_named(over)} was above the budget of "
            f"{fmt.format_memory(budget)}."
        )
    warnings += [
        f"The lanes of a pack were lowered from {limit.lanes_before} to {limit.lanes} after "
        f"{fmt.plural(limit.num_readings, 'pack')}: measured peaks may exceed the estimate by "
        f"{fmt.format_percent(limit.margin)}."
        for limit in snapshot.memory.limits
    ]
    return tuple(warnings)


def missing_trials(snapshot: StudySnapshot) -> list[str]:
    """Return a warning when trials are not there that were recorded before others: they have no gaps."""
    known = {trial.number for trial in snapshot.trials}
    gone = sorted(set(range(max(known, default=-1))) - known)
    if not gone:
        return []
    folders = ", ".join(f"trials/{number:04d}" for number in gone[:MAX_NAMED])
    if len(gone) == 1:
        return [f"{folders} is missing and left out here: restore it."]
    if len(gone) > MAX_NAMED:
        folders += f" and {len(gone) - MAX_NAMED} more"
    return [f"{folders} are missing and left out here: restore them."]


def _edge_warnings(snapshot: StudySnapshot, config: TrialConfig) -> list[str]:
    space = spec_value(snapshot.lock.spec, "space")
    warnings = [
        *_edge_warning("rank", config.rank, spec_value(space, "rank"), key="space.rank"),
        *_edge_warning(
            "effective step (learning rate times lora_alpha / 32)",
            effective_step(config),
            spec_value(space, "learning_rate"),
            key="space.learning_rate",
        ),
    ]
    if spec_value(space, "lora_alpha") is None:
        warnings += _edge_warning(
            "alpha ratio",
            config.lora_alpha / config.rank,
            spec_value(space, "alpha_ratio"),
            key="space.alpha_ratio",
        )
    return warnings


def _clamp_warning(number: int, config: TrialConfig, suggested: SuggestedParams) -> list[str]:
    if suggested.rank <= config.rank:
        return []
    return [
        f"Trial {number} was proposed with rank {suggested.rank} and trained with {config.rank}, "
        "the largest that fits the memory budget."
    ]


def _edge_warning(name: str, value: float, choices: object, *, key: str) -> list[str]:
    """Warn when a value is within 5 % of the lowest or highest of at least two choices."""
    if not isinstance(choices, list | tuple):
        return []
    numbers = sorted({float(c) for c in choices if isinstance(c, int | float)})
    if len(numbers) < 2:
        return []
    plain = 0.01 <= value < 10_000
    text = fmt.format_plain(value) if plain else fmt.format_scientific(value)
    for bound, side, advice in ((numbers[0], "lower", "down"), (numbers[-1], "upper", "up")):
        if abs(value - bound) <= 0.05 * bound:
            return [
                f"The {name} of {text} is at the {side} end of the space: a better one may lie "
                f"beyond it. Extend {key} {advice}ward."
            ]
    return []


def _divergence_warnings(snapshot: StudySnapshot, number: int, config: TrialConfig) -> list[str]:
    """Warn when a diverged trial took a step less than twice the leader's (or half of it)."""
    own = effective_step(config)
    near = [
        t.number
        for t in snapshot.trials
        if t.state is TrialState.DIVERGED and own / 2 < effective_step(t.config) < own * 2
    ]
    if not near:
        return []
    return [
        f"The learning rate of trial {number} is less than a factor of 2 from where "
        f"{_named(near)} diverged (compared as learning rate times lora_alpha / 32). "
        f"Results vary more from run to run there; a smaller one is the safer choice."
    ]


def _named(numbers: Sequence[int]) -> str:
    return f"{'trial' if len(numbers) == 1 else 'trials'} {', '.join(map(str, numbers))}"
