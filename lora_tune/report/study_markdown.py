"""report.md: the tables and sentences of a study's report, put into its template."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lora_tune.records import StudySnapshot
from lora_tune.report import answers, memory, probe, sections, wording
from lora_tune.report import formatting as fmt
from lora_tune.report.behaviour import BehaviourSummary, summarize_behaviour
from lora_tune.report.markdown import (
    Markdown,
    code_block,
    environment,
    load_adapter_context,
    markdown_table,
)
from lora_tune.report.sections import TextTable
from lora_tune.report.summary import ReportSummary, summarize

if TYPE_CHECKING:
    from lora_tune.report.charts import ReportChart


def render_markdown(
    snapshot: StudySnapshot,
    *,
    charts: Sequence["ReportChart"] = (),
    problems: Sequence[str] = (),
    adapter: Path | None = None,
) -> str:
    """Return report.md of a study, finished or not.

    Args:
        snapshot: The study.
        charts: Those whose pictures are in the folder plots beside the report.
        problems: What could not be made of the report and why, as sentences.
        adapter: Where the adapter is; None: in the folder adapter beside the report.
    """
    summary = summarize(snapshot)
    behaviour = summarize_behaviour(snapshot)
    template = environment().get_template("report.md.jinja")
    return template.render(
        lock=snapshot.lock,
        summary=summary,
        outcome=summary.outcome.value,
        headline=wording.headline(summary),
        waiting=wording.waiting_sentence(summary),
        conclusions=wording.conclusions(summary),
        cost_sentence=wording.cost_sentence(summary),
        sizes_sentence=wording.sizes_sentence(snapshot),
        problems=problems,
        behaviour=behaviour,
        forgetting=_forgetting(behaviour, summary),
        charts=charts,
        exchanges=_exchanges(behaviour, summary),
        answers_caption=answers.answers_caption(behaviour) if behaviour else "",
        adapter=sections.adapter_sentence(summary),
        settings=_table(sections.settings_table(snapshot, summary)),
        rate_note=sections.RATE_NOTE,
        certainty=wording.certainty(summary),
        scores=_table(sections.scores_table(summary)),
        scores_caption=sections.SCORES_CAPTION,
        candidates=_table(sections.candidates_table(summary)),
        candidates_caption=sections.CANDIDATES_CAPTION,
        metrics=_table(sections.metrics_table(summary)),
        metric_caption=sections.metrics_caption(summary),
        metric_reasons=sections.metric_reasons(summary),
        trials=_table(sections.trials_table(snapshot)),
        trials_caption=sections.trials_caption(snapshot, summary),
        rungs=_table(sections.rungs_table(summary)),
        rungs_caption=sections.rungs_caption(summary),
        plan_sentence=sections.plan_sentence(snapshot),
        memory=_table(sections.memory_table(snapshot, summary)),
        probe=_table(sections.probe_table(snapshot)),
        probe_sentence=probe.probe_sentence(snapshot.lock.plan),
        probe_caption=sections.probe_caption(snapshot),
        memory_sentences=wording.memory_sentences(summary),
        memory_spread=_table(sections.spread_table(summary)),
        memory_plot=_memory_plot(summary),
        residuals_caption=sections.RESIDUALS_CAPTION,
        memory_packs=_table(sections.packs_table(snapshot)),
        packs_caption=sections.PACKS_CAPTION,
        data=_table(sections.data_table(snapshot)),
        target_sets=_table(sections.target_sets_table(snapshot)),
        environment=_table(sections.environment_table(snapshot)),
        cost=_table(sections.cost_table(summary)),
        adapter_place=f"the folder {adapter or 'adapter, next to this report'}",
        load=load_adapter_context(snapshot, adapter=str(adapter or "adapter")),
        command=code_block(fmt.one_line(snapshot.lock.command), "sh"),
    )


def _table(table: TextTable | None) -> Markdown | None:
    return None if table is None else markdown_table(table.headers, table.rows)


def _forgetting(behaviour: BehaviourSummary | None, summary: ReportSummary) -> Markdown | None:
    if behaviour is None or summary.confirmation is None:
        return None
    return _table(sections.forgetting_table(behaviour, summary.confirmation))


def _exchanges(
    behaviour: BehaviourSummary | None, summary: ReportSummary
) -> list[answers.Exchange]:
    if behaviour is None or summary.confirmation is None:
        return []
    return answers.exchanges(behaviour, summary.confirmation)


def _memory_plot(summary: ReportSummary) -> Markdown | None:
    if summary.memory is None or not summary.memory.spreads:
        return None
    return code_block(memory.scatter_plot(summary.memory), "text")
