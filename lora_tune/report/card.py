"""The card of an adapter or a merged model: README.md with the front matter that the hub reads.

Everything foreign in it is escaped: the front matter is written by huggingface_hub's YAML writer, the text by
the Markdown environment. Folders of the machine that trained are left out.
"""

import re
from pathlib import Path

from lora_tune.errors import AllTrialsFailedError
from lora_tune.records import UNTUNED, ConfirmationRun, Decision, StudySnapshot
from lora_tune.report import candidates, merging, resolved, verdict, wording
from lora_tune.report import formatting as fmt
from lora_tune.report.behaviour import summarize_behaviour
from lora_tune.report.confirmation import ConfirmationSummary
from lora_tune.report.markdown import (
    Markdown,
    environment,
    load_adapter_context,
    markdown_table,
    python_literal,
)
from lora_tune.report.merging import MergeReport
from lora_tune.report.resolved import eval_rows, spec_value
from lora_tune.report.summary import Outcome, ReportSummary, summarize

_TASK = "text-generation"
_LOSS_NAME = "loss, nats per target token"
# Of data.train, when it is no hub data set.
_FILE_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")


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
    return _card(snapshot, base_model=base_model, merge=None)


def merged_card(snapshot: StudySnapshot, *, base_model: str | None, merge: MergeReport) -> str:
    """Return the README.md of the base with that adapter merged into it.

    Args:
        snapshot: The study.
        base_model: Hub id of the base, as for ``model_card``.
        merge: What was merged, and what became of the loss.

    Raises:
        AllTrialsFailedError: Nothing succeeded, so there is no model to describe.
    """
    return _card(snapshot, base_model=base_model, merge=merge)


def loading_script(snapshot: StudySnapshot, *, local_base: Path | None) -> str:
    """Return a Python script that loads the adapter from its own folder; the code of the card.

    Args:
        snapshot: The study.
        local_base: Where the base is on this machine, for a base without a hub id.
    """
    context = load_adapter_context(snapshot, adapter=".")
    if local_base is not None:
        context |= {"base": python_literal(str(local_base)), "known": True}
    code = environment().get_template("load_code.jinja").render(load=context)
    return f"{code}print(model.active_peft_config)\n"


def _card(snapshot: StudySnapshot, *, base_model: str | None, merge: MergeReport | None) -> str:
    summary = summarize(snapshot)
    if summary.config is None or summary.outcome is Outcome.NOTHING:
        raise AllTrialsFailedError(
            f"{snapshot.folder}: no trial succeeded ({wording.states_text(summary)}), so there is "
            "no adapter to describe. The reasons are in report.md."
        )
    hub_id = base_model if base_model and _is_hub_id(base_model) else None
    behaviour = summarize_behaviour(snapshot)
    body = (
        environment()
        .get_template("card.md.jinja")
        .render(
            name=snapshot.lock.name,
            base=hub_id or _last_part(snapshot.lock.model.base),
            base_model=hub_id,
            gguf_note=_gguf_note(snapshot) if hub_id and merge is None else "",
            license=snapshot.lock.model.license,
            merged=merge is not None,
            merge_sentences=merging.merge_sentences(merge) if merge else [],
            merge_table=_merge_table(merge),
            result=_result(summary),
            metric=_metric(summary),
            behaviour=behaviour.sentences if behaviour is not None else (),
            adapter=_adapter(summary),
            settings=_settings(summary),
            schedule=resolved.schedule_text(snapshot.lock, steps=summary.steps),
            search=_search(snapshot, summary),
            seeds=_seeds(summary),
            data=_data(snapshot),
            environment=_environment(snapshot),
            load=_load(snapshot, hub_id),
            dtype=Markdown(merge.dtype if merge else ""),
        )
    )
    return f"---\n{_front_matter(snapshot, hub_id, merge)}\n---\n\n{body}"


def _gguf_note(snapshot: StudySnapshot) -> str:
    note = resolved.gguf_note(snapshot.lock) or ""
    return note[:1].upper() + note[1:]


def _front_matter(snapshot: StudySnapshot, hub_id: str | None, merge: MergeReport | None) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    relation = "finetune" if merge is not None else "adapter"
    loss = _model_loss(snapshot, merge)
    name, kind, split = _data_name(snapshot)
    results = None
    if loss is not None:
        results = [
            EvalResult(
                task_type=_TASK,
                dataset_type=kind,
                dataset_name=f"{name}, held-out rows",
                dataset_split=split,
                metric_type="loss",
                metric_name=_LOSS_NAME,
                metric_value=float(f"{loss:.6g}"),
                verified=False,
            )
        ]
    data = ModelCardData(
        base_model=hub_id,
        base_model_relation=relation if hub_id else None,
        datasets=[kind] if split is not None else None,
        library_name="peft" if merge is None else "transformers",
        license=snapshot.lock.model.license,
        pipeline_tag=_TASK,
        tags=["lora", "lora-tune"],
        model_name=snapshot.lock.name if results else None,
        eval_results=results,
    )
    return data.to_yaml()


def _model_loss(snapshot: StudySnapshot, merge: MergeReport | None) -> float | None:
    """Return the loss on the confirmation rows of the very weights that the card is about."""
    confirmation = snapshot.confirmation
    if confirmation is None or confirmation.decision is None or confirmation.refit:
        return None  # trained on these rows, or not scored
    if merge is not None:
        return merge.scores.merged.mean_loss if merge.scores else None
    shipped = _shipped_run(snapshot)
    return shipped.evaluation.mean_loss if shipped and shipped.evaluation else None


def _shipped_run(snapshot: StudySnapshot) -> ConfirmationRun | None:
    assert snapshot.confirmation is not None
    assert snapshot.confirmation.decision is not None
    decision = snapshot.confirmation.decision
    runs = snapshot.confirmation.runs_of(decision.chosen)
    return next((run for run in runs if run.seed == decision.median_seed), None)


def _data_name(snapshot: StudySnapshot) -> tuple[str, str, str | None]:
    """Return the data set's name, its hub id or what stands for it, and its split if it is of the hub."""
    source = snapshot.lock.data.source
    if not source.lower().endswith(_FILE_SUFFIXES) and _is_hub_id(source):
        return source, source, str(spec_value(snapshot.lock.spec, "data", "split") or "train")
    name = _last_part(source)
    stem = re.split(r"[\\/]", name)[-1].rpartition(".")[0] or name
    return name, re.sub(r"[^A-Za-z0-9]+", "-", stem).strip("-").lower() or "data", None


def _merge_table(merge: MergeReport | None) -> Markdown | None:
    rows = merging.merge_rows(merge) if merge is not None else []
    return markdown_table(("loss, nats per target token", "measured"), rows) if rows else None


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
