"""The model card of an adapter: README.md with the front matter that the hub reads."""

import re

from lora_tune.errors import AllTrialsFailedError
from lora_tune.records import Decision, StudySnapshot
from lora_tune.report import candidates, resolved, verdict, wording
from lora_tune.report import formatting as fmt
from lora_tune.report.confirmation import UNTUNED, ConfirmationSummary
from lora_tune.report.markdown import (
    Markdown,
    environment,
    load_adapter_context,
    markdown_table,
    python_literal,
)
from lora_tune.report.resolved import eval_rows, spec_value
from lora_tune.report.summary import Outcome, ReportSummary, summarize


def model_card(snapshot: StudySnapshot, *, base_model: str | None) -> str:
    """Return the README.md of the adapter of the configuration that a study recommends.

    Folders of the machine that trained it are left out: of a path only the last part is named.

    Args:
        snapshot: The study; without a confirmation the card says so.
        base_model: Hub id of the base. None, or a text that is no valid id, leaves the field out
            and the card says that none is known.

    Raises:
        AllTrialsFailedError: Nothing succeeded, so there is no adapter to describe.
    """
    summary = summarize(snapshot)
    if summary.config is None or summary.outcome is Outcome.NOTHING:
        raise AllTrialsFailedError(
            f"{snapshot.folder}: no trial succeeded ({wording.states_text(summary)}), so there is "
            "no adapter to describe. The reasons are in report.md."
        )
    hub_id = base_model if base_model and _is_hub_id(base_model) else None
    body = (
        environment()
        .get_template("card.md.jinja")
        .render(
            name=snapshot.lock.name,
            base=hub_id or _last_part(snapshot.lock.model.base),
            base_model=hub_id,
            result=_result(summary),
            metric=_metric(summary),
            adapter=_adapter(summary),
            settings=_settings(summary),
            schedule=resolved.schedule_text(snapshot.lock, steps=summary.steps),
            search=_search(snapshot, summary),
            seeds=_seeds(summary),
            data=_data(snapshot),
            environment=_environment(snapshot),
            load=_load(snapshot, hub_id),
        )
    )
    return f"---\n{_front_matter(snapshot, hub_id)}\n---\n\n{body}"


def _front_matter(snapshot: StudySnapshot, hub_id: str | None) -> str:
    from huggingface_hub import ModelCardData

    data = ModelCardData(
        base_model=hub_id,
        library_name="peft",
        license=snapshot.lock.model.license,
        pipeline_tag="text-generation",
        tags=["lora", "lora-tune"],
    )
    return data.to_yaml()


def _is_hub_id(text: str) -> bool:
    from huggingface_hub import utils
    from huggingface_hub.errors import HFValidationError

    try:
        utils.validate_repo_id(text)  # type: ignore[attr-defined]  # public, but not listed
    except HFValidationError:
        return False
    return not text.lower().endswith(".gguf")


def _last_part(path: str) -> str:
    """Return the last part of an absolute path, anything else as it is."""
    if re.match(r"[\\/~]|[A-Za-z]:[\\/]", path):
        return re.split(r"[\\/]", path.rstrip("\\/"))[-1]
    return path


def _result(summary: ReportSummary) -> list[str]:
    """Return the verdict and the confirmed loss; where the base is no worse, that comes first."""
    sentences = wording.conclusions(summary)
    base = summary.confirmation.base if summary.confirmation else None
    interval = base.reduction_interval if base is not None else None
    if sentences and interval is not None and interval.low > 0:
        return sentences
    return [wording.headline(summary), *sentences]


def _adapter(summary: ReportSummary) -> str:
    c = summary.confirmation
    return verdict.adapter_sentence(c) if c is not None and c.decision is not None else ""


def _metric(summary: ReportSummary) -> Markdown | None:
    c = summary.confirmation
    if c is None or c.chosen is None or c.chosen.score is None or c.decision is None:
        return None
    score = c.chosen.score
    interval = f"{fmt.format_loss(score.low)} to {fmt.format_loss(score.high)}"
    rows = [
        (
            "this configuration",
            f"{fmt.format_loss(score.loss)} (95 % interval {interval})",
        ),
        ("each seed", ", ".join(map(fmt.format_loss, score.seed_losses))),
        *_base_rows(summary),
        ("rows", _rows_text(c, c.decision)),
        ("computed in", fmt.one_line(c.compute_dtype or "")),
        *_metric_rows(summary),
    ]
    return markdown_table(("loss, nats per target token", "confirmed"), rows)


def _rows_text(c: ConfirmationSummary, decision: Decision) -> str:
    if c.refit:
        return (
            f"{decision.num_rows}, not used in these trainings or the search; this adapter saw them"
        )
    return f"{decision.num_rows}, not used in training or search"


def _base_rows(summary: ReportSummary) -> list[tuple[str, str]]:
    base = summary.confirmation.base if summary.confirmation else None
    if base is None:
        return []
    return [
        ("untuned base", f"{fmt.format_loss(base.loss)}{verdict.interval_text(base.interval)}"),
        ("relative reduction", verdict.reduction_text(base)),
    ]


def _metric_rows(summary: ReportSummary) -> list[tuple[str, str]]:
    c = summary.confirmation
    if c is None:
        return []
    return [
        (f"{m.metric}, {fmt.one_line(m.subject)}", candidates.metric_text(m))
        for m in c.metrics
        if m.mean is not None and m.subject in (summary.chosen, UNTUNED)
    ]


def _settings(summary: ReportSummary) -> Markdown:
    config = summary.config
    assert config is not None
    modules = sorted({name.rpartition(".")[2] for name in config.target_modules})
    rows = [
        ("rank", str(config.rank)),
        ("lora_alpha", fmt.format_plain(config.lora_alpha)),
        ("lora_dropout", fmt.format_plain(config.lora_dropout)),
        ("target modules", f"{config.target_set}: {', '.join(modules)}"),
        ("learning rate", fmt.format_scientific(config.learning_rate)),
        ("rank-stabilised scaling", "yes" if config.use_rslora else "no"),
    ]
    return markdown_table(("setting", "value"), rows)


def _search(snapshot: StudySnapshot, summary: ReportSummary) -> str:
    lock = snapshot.lock
    version = lock.versions.get("lora-tune", lock.versions.get("lora_tune", ""))
    version = f" of lora-tune {version}" if version else " of lora-tune"
    rungs = ", ".join(map(str, lock.rungs))
    rows = [str(eval_rows(lock, rung)) for rung in range(len(lock.rungs))]
    if len(set(rows)) == 1:
        rows = rows[:1]
    return (
        f"{_origin(summary)} of study {lock.name}{version}, which tried {wording.progress_text(summary)}. "
        f"Trials were proposed by known starting points (anchors) and the sampler "
        f"{spec_value(lock.spec, 'search', 'sampler')}, and compared after {rungs} steps on "
        f"{', '.join(rows)} rows."
    )


def _origin(summary: ReportSummary) -> str:
    if summary.leader is None:
        return "The default configuration"
    return f"Trial {summary.leader} ({summary.leader_origin})"


def _seeds(summary: ReportSummary) -> str:
    """Return how often the configuration was trained, the adapter's own training included."""
    c = summary.confirmation
    if c is None or c.decision is None:
        return "Each trial was trained once; no comparison with fresh seeds was made yet."
    return (
        f"The best of the search were then trained again, {fmt.plural(c.decision.seeds, 'time')} each "
        "with fresh seeds, and scored on rows that the search never saw."
    )


def _data(snapshot: StudySnapshot) -> Markdown:
    data = snapshot.lock.data
    rows = [
        ("source", _last_part(data.source)),
        ("format", data.format),
        (
            "rows",
            f"{fmt.format_count(data.num_train)} to train on, {data.num_selection} to select on, "
            f"{data.num_confirmation} to confirm on",
        ),
        ("training tokens", fmt.format_count(data.num_train_tokens)),
        ("fingerprint (SHA-256)", data.sha256),
    ]
    return markdown_table(("data", "value"), rows)


def _environment(snapshot: StudySnapshot) -> Markdown:
    lock = snapshot.lock
    rows = [
        ("quantization of the base", lock.model.quantization),
        ("compute type in training", lock.plan.compute_dtype),
        *resolved.hardware_rows(lock),
        *lock.versions.items(),
    ]
    return markdown_table(("environment", "value"), rows)


def _load(snapshot: StudySnapshot, hub_id: str | None) -> dict[str, object]:
    context = load_adapter_context(snapshot, adapter="path/to/this/adapter")
    model = snapshot.lock.model
    if hub_id is not None:
        context |= {"base": python_literal(hub_id), "known": True}
        if hub_id != model.hub_id:
            context |= {"revision": None}
    elif model.hub_id is None and _last_part(model.base) != model.base:
        context |= {"base": python_literal("path/to/the/base/model")}
    return context
