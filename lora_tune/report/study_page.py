"""report.html: the study's report as one page, the recommendation on its first screen."""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from markupsafe import Markup, escape

from lora_tune.records import StudySnapshot
from lora_tune.report import formatting as fmt
from lora_tune.report import probe, sections, wording
from lora_tune.report.answers import answers_caption
from lora_tune.report.behaviour import BehaviourSummary, summarize_behaviour
from lora_tune.report.markdown import environment, load_adapter_context
from lora_tune.report.page import page_environment, render_page
from lora_tune.report.page_answers import answered_prompts
from lora_tune.report.page_facts import key_facts, use_command
from lora_tune.report.page_trials import state_counts, trial_table
from lora_tune.report.summary import Outcome, ReportSummary, summarize

if TYPE_CHECKING:
    from lora_tune.report.charts import ReportChart


def render_html(
    snapshot: StudySnapshot,
    *,
    charts: Sequence["ReportChart"] | None = None,
    problems: Sequence[str] = (),
    adapter: str = "adapter",
) -> str:
    """Return report.html of a study, finished or not.

    Args:
        snapshot: The study.
        charts: Those to show; None: all that the study has.
        problems: What could not be made of the report and why, as sentences.
        adapter: Folder of the adapter, as seen from the page.
    """
    if charts is None:
        from lora_tune.report.charts import study_charts

        charts = study_charts(snapshot)
    summary = summarize(snapshot)
    behaviour = summarize_behaviour(snapshot)
    state = "" if summary.outcome is Outcome.FINISHED else f" ({summary.outcome.value})"
    return render_page(
        "study.html.jinja",
        title=f"LoRA study {fmt.one_line(snapshot.lock.name)}{state}",
        charts=charts,
        problems=problems,
        adapter=adapter,
        lock=snapshot.lock,
        summary=summary,
        **_decision(snapshot, summary),
        **_behaviour(snapshot, summary, behaviour),
        **_confirmation(summary),
        **_search(snapshot, summary),
        **_memory(snapshot, summary),
        **_provenance(snapshot, summary),
        **_load(snapshot, adapter),
    )


def _decision(snapshot: StudySnapshot, summary: ReportSummary) -> dict[str, object]:
    decided = summary.chosen is not None
    return {
        "finished": summary.outcome is Outcome.FINISHED,
        "headline": wording.headline(summary),
        "waiting": wording.waiting_sentence(summary),
        "conclusions": wording.conclusions(summary),
        "cost_sentence": wording.cost_sentence(summary),
        "facts_list": key_facts(snapshot, summary),
        "use": use_command(snapshot.folder) if decided else None,
        "resume": fmt.one_line(snapshot.lock.command)
        if summary.outcome is Outcome.UNFINISHED
        else None,
        "next_step": wording.next_step(summary, snapshot.lock),
        "settings": sections.settings_table(snapshot, summary),
        "adapter_sentence": sections.adapter_sentence(summary),
        "rate_note": sections.RATE_NOTE,
    }


def _behaviour(
    snapshot: StudySnapshot, summary: ReportSummary, behaviour: BehaviourSummary | None
) -> dict[str, object]:
    c = summary.confirmation
    if behaviour is None or c is None:
        return {"behaviour": None, "alarming": False, "sizes": wording.sizes_sentence(snapshot)}
    return {
        "behaviour": behaviour,
        "answers": answered_prompts(behaviour, c),
        "answers_caption": answers_caption(behaviour),
        "forgetting": sections.forgetting_table(behaviour, c),
        "forgetting_caption": f"Nats per token, over {fmt.plural(behaviour.general_tokens, 'token')}.",
        "alarming": behaviour.forgot or bool(behaviour.collapsed),
        "sizes": wording.sizes_sentence(snapshot),
    }


def _confirmation(summary: ReportSummary) -> dict[str, object]:
    return {
        "certainty": wording.certainty(summary),
        "scores": sections.scores_table(summary),
        "scores_caption": sections.SCORES_CAPTION,
        "candidates": sections.candidates_table(summary),
        "candidates_caption": sections.CANDIDATES_CAPTION,
        "metrics": sections.metrics_table(summary),
        "metrics_caption": sections.metrics_caption(summary),
        "metric_reasons": sections.metric_reasons(summary),
    }


def _search(snapshot: StudySnapshot, summary: ReportSummary) -> dict[str, object]:
    return {
        "trials": trial_table(snapshot, leader=summary.leader),
        "states": state_counts(summary),
        "trials_caption": sections.trials_caption(snapshot, summary),
        "rungs": sections.rungs_table(summary),
        "rungs_caption": sections.rungs_caption(summary),
        "plan_sentence": sections.plan_sentence(snapshot),
        "target_sets": sections.target_sets_table(snapshot),
    }


def _memory(snapshot: StudySnapshot, summary: ReportSummary) -> dict[str, object]:
    return {
        "memory": sections.memory_table(snapshot, summary),
        "probe": sections.probe_table(snapshot),
        "probe_sentence": probe.probe_sentence(snapshot.lock.plan),
        "probe_caption": sections.probe_caption(snapshot),
        "memory_sentences": wording.memory_sentences(summary),
        "spread": sections.spread_table(summary),
        "residuals_caption": sections.RESIDUALS_CAPTION,
        "packs": sections.packs_table(snapshot),
        "packs_caption": sections.PACKS_CAPTION,
    }


def _provenance(snapshot: StudySnapshot, summary: ReportSummary) -> dict[str, object]:
    return {
        "cost": sections.cost_table(summary),
        "data": sections.data_table(snapshot),
        "environment": sections.environment_table(snapshot),
        "command": fmt.one_line(snapshot.lock.command),
    }


def _load(snapshot: StudySnapshot, adapter: str) -> dict[str, object]:
    """Return the Python code that loads the adapter and what to know of it, as they are in report.md."""
    load = load_adapter_context(snapshot, adapter=adapter)
    code = environment().get_template("load_code.jinja").render(load=load)
    if load["gguf"] is not None:
        name = str(escape(fmt.one_line(str(load["gguf"]))))
        load["gguf"] = Markup(name.replace("`", "&#96;"))  # no code, whatever the file is called
    notes = page_environment().get_template("load_notes.jinja").render(load=load)
    paragraphs = [_with_code(text) for text in notes.strip().split("\n\n") if text]
    return {"load_code": code.strip(), "load_notes": paragraphs}


def _with_code(paragraph: str) -> Markup:
    """Return text that is escaped for HTML with what stands in backticks as code."""
    return Markup(re.sub("`([^`]+)`", r"<code>\1</code>", paragraph))
