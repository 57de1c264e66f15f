"""The recommended configuration alone: a few lines to paste, or one flat object for scripts."""

import json
import shlex
from pathlib import Path

from rich.console import Console

from lora_tune.catalog.targets import short_names
from lora_tune.errors import AllTrialsFailedError
from lora_tune.records import StudyLock, StudySnapshot, TrialConfig
from lora_tune.report import formatting as fmt
from lora_tune.report import wording
from lora_tune.report.behaviour import summarize_behaviour
from lora_tune.report.confirmation import ConfirmationSummary
from lora_tune.report.markdown import environment, load_adapter_context
from lora_tune.report.report_json import plain
from lora_tune.report.resolved import spec_value
from lora_tune.report.summary import Outcome, ReportSummary, summarize
from lora_tune.report.terminal import say, say_unbroken
from lora_tune.store.folder import ADAPTER_FOLDER
from lora_tune.study.choices import toml_literal


def best_json(snapshot: StudySnapshot) -> dict[str, object]:
    """Return the recommendation as one flat object; before the decision that of the best trial so far.

    Losses are nats per target token. What is not known is null: all settings before the first result,
    intervals and the losses of base and default before the decision; so is a number that is not finite.

    Raises:
        AllTrialsFailedError: All is over and nothing can be recommended.
    """
    summary = _summary(snapshot)
    lock, c, behaviour = snapshot.lock, summary.confirmation, summarize_behaviour(snapshot)
    finished = summary.outcome is Outcome.FINISHED
    adapter = _adapter(snapshot) if finished else None
    found: dict[str, object] = {
        "study": lock.name,
        "folder": str(snapshot.folder),
        "finished": finished,
        "candidate": _candidate(summary),
        "trial": summary.leader,
        "is_default": finished and c is not None and summary.chosen == c.default,
        **_settings(summary.config, lock),
        "effective_batch_size": spec_value(lock.spec, "train", "effective_batch_size"),
        "steps": summary.steps if summary.config is not None else None,
        **_losses(snapshot, summary),
        "verdict": c.decision.verdict.value if c is not None and c.decision is not None else None,
        "forgot": None if behaviour is None else behaviour.forgot,
        "base_model": lock.model.base,
        "hub_id": lock.model.hub_id,
        "revision": lock.model.revision,
        "quantization": lock.model.quantization,
        "adapter": None if adapter is None else str(adapter),
        "load_code": None if adapter is None else _load_code(snapshot, adapter),
    }
    return {key: plain(value) for key, value in found.items()}


def print_best(snapshot: StudySnapshot, console: Console) -> None:
    """Print the settings as lines of TOML, what is known of their loss, and how to load the adapter.

    Raises:
        AllTrialsFailedError: All is over and nothing can be recommended.
    """
    summary = _summary(snapshot)
    if summary.config is None:
        say(console, wording.headline(summary))
        return
    so_far = "" if summary.outcome is Outcome.FINISHED else "unfinished, the best so far is "
    say_unbroken(console, f"# {summary.name}: {so_far}{_candidate(summary)}")
    for line in settings_lines(summary.config):
        say_unbroken(console, line)
    console.print()
    for sentence in _sentences(snapshot, summary):
        say(console, sentence)
    adapter = _adapter(snapshot)
    if summary.outcome is not Outcome.FINISHED:
        say_unbroken(console, f"Next: {wording.next_step(summary, snapshot.lock)}")
    elif adapter is not None:
        say_unbroken(console, f"Adapter: {adapter}")
        call = f"PeftModel.from_pretrained(base, {json.dumps(str(adapter))})"
        say_unbroken(console, f"Load: model = {call}")
        folder = shlex.quote(str(snapshot.folder))
        say_unbroken(console, f"Next: lora-tune export {folder} --to TARGET")


def settings_lines(config: TrialConfig) -> list[str]:
    """Return the searched settings as lines of TOML, as an anchor of a study file has them."""
    modules = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in config.target_modules))
    target_set = fmt.one_line(config.target_set)
    return [
        f"rank = {config.rank}",
        f"lora_alpha = {fmt.format_plain(config.lora_alpha)}",
        f"lora_dropout = {fmt.format_plain(config.lora_dropout)}",
        f"target_modules = {toml_literal(target_set)}  # {modules}",
        f"learning_rate = {toml_literal(float(f'{config.learning_rate:.4g}'))}",
        *(["use_rslora = true"] if config.use_rslora else []),
    ]


def _summary(snapshot: StudySnapshot) -> ReportSummary:
    summary = summarize(snapshot)
    if summary.outcome is Outcome.NOTHING:
        raise AllTrialsFailedError(f"{snapshot.folder}: {wording.headline(summary)}")
    return summary


def _candidate(summary: ReportSummary) -> str | None:
    if summary.chosen is not None:
        return summary.chosen
    return None if summary.leader is None else f"trial {summary.leader}"


def _settings(config: TrialConfig | None, lock: StudyLock) -> dict[str, object]:
    if config is None:
        keys = ("rank", "lora_alpha", "lora_dropout", "target_set", "target_modules")
        return dict.fromkeys((*keys, "learning_rate", "use_rslora"))
    return {
        "rank": config.rank,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": config.lora_dropout,
        "target_set": config.target_set,
        "target_modules": _modules(config, lock),
        "learning_rate": config.learning_rate,
        "use_rslora": config.use_rslora,
    }


def _modules(config: TrialConfig, lock: StudyLock) -> list[str]:
    """Return the names by which PEFT adapts just the trained layers: short ones where that is certain.

    All linear layers are on record where the study offered ``all-linear``; without them names are full.
    """
    linears = next((found.modules for found in lock.target_sets if found.name == "all-linear"), ())
    return list(short_names(config.target_modules, linears))


def _losses(snapshot: StudySnapshot, summary: ReportSummary) -> dict[str, object]:
    """Return the confirmed loss beside base and default; before the decision that of the search."""
    c = summary.confirmation
    score = c.chosen.score if c is not None and c.chosen is not None else None
    return {
        "loss": _searched_loss(snapshot, summary) if score is None else score.loss,
        "loss_low": None if score is None else score.low,
        "loss_high": None if score is None else score.high,
        "loss_rows": "selection" if score is None else "confirmation",
        "seeds": c.decision.seeds if c is not None and c.decision is not None else None,
        "base_loss": c.base.loss if c is not None and c.base is not None else None,
        "default_loss": None if c is None else _default_loss(c),
    }


def _searched_loss(snapshot: StudySnapshot, summary: ReportSummary) -> float | None:
    """Return the best trial's loss on the selection rows."""
    leader = next((t for t in snapshot.trials if t.number == summary.leader), None)
    return leader.kept.eval_loss if leader is not None and leader.kept is not None else None


def _default_loss(c: ConfirmationSummary) -> float | None:
    score = c.candidate(c.default).score if c.default is not None else None
    return None if score is None else score.loss


def _sentences(snapshot: StudySnapshot, summary: ReportSummary) -> list[str]:
    found = wording.conclusions(summary)
    if not found:
        loss = fmt.format_loss(_searched_loss(snapshot, summary))
        found = [f"Loss {loss} on the selection rows; it is not confirmed on unseen rows yet."]
    elif summary.confirmation is not None and summary.confirmation.chosen is not None:
        score = summary.confirmation.chosen.score
        if score is not None:
            interval = f"{fmt.format_loss(score.low)} to {fmt.format_loss(score.high)}"
            found.insert(
                0, f"Confirmed loss {fmt.format_loss(score.loss)} (95 % interval {interval})."
            )
    behaviour = summarize_behaviour(snapshot)
    if behaviour is not None and (behaviour.forgot or behaviour.collapsed):
        found.extend(f"Warning: {sentence}" for sentence in behaviour.sentences)
    return found


def _adapter(snapshot: StudySnapshot) -> Path | None:
    return snapshot.folder / ADAPTER_FOLDER if snapshot.adapter_bytes else None


def _load_code(snapshot: StudySnapshot, adapter: Path) -> str:
    """Return the Python code that loads base and adapter, as report.md shows it."""
    context = load_adapter_context(snapshot, adapter=str(adapter))
    text = environment().get_template("load_adapter.jinja").render(load=context)
    return text.partition("```python\n")[2].partition("\n```")[0] + "\n"
