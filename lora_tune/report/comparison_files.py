"""The files of a comparison of studies, and the comparison on a terminal."""

import json
import logging
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from lora_tune.records import StudySnapshot
from lora_tune.report import comparison_tables as tables
from lora_tune.report import comparison_wording, wording
from lora_tune.report import formatting as fmt
from lora_tune.report.comparison import StudyComparison, StudyGroup
from lora_tune.report.files import page_with_plots, write_files
from lora_tune.report.markdown import Markdown, environment, markdown_table
from lora_tune.report.page import render_page
from lora_tune.report.plots import Plots, draw_comparison
from lora_tune.report.report_json import ChartData, chart_data, plain
from lora_tune.report.sections import TextTable
from lora_tune.report.terminal import plain_table, say, say_unbroken

if TYPE_CHECKING:
    from lora_tune.report.charts import ReportChart

FORMAT_VERSION = 1

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparisonData:
    """comparison.json: a row a study as in comparison.csv, the groups that compare, and the sentences."""

    format_version: int
    conclusions: tuple[str, ...]
    studies: tuple[dict[str, object], ...]
    groups: tuple[StudyGroup, ...]
    charts: tuple[ChartData, ...]
    problems: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Study:
    label: str
    headline: str
    folder: str


def write_comparison(
    comparison: StudyComparison, snapshots: Sequence[StudySnapshot], folder: Path
) -> list[Path]:
    """Write comparison.md, comparison.html, comparison.json, comparison.csv and plots/.

    As with a study's report all are made before the first is written, and a plot that cannot be made
    costs the plot alone.

    Args:
        comparison: What was found.
        snapshots: The same studies, for the plots.
        folder: Is made if it does not exist.

    Returns:
        The paths written, the pictures last.
    """
    plots = draw_comparison(snapshots)

    def render(charts: Sequence["ReportChart"], problems: Sequence[str]) -> str:
        return render_comparison_html(comparison, charts=charts, problems=problems)

    page, problems = page_with_plots(render, plots)
    shown = [chart for chart in plots.charts if chart.name in plots.pictures]
    data = comparison_data(comparison, plots, problems=problems)
    frame = tables.comparison_frame(comparison)
    contents = {
        "comparison.md": render_comparison_markdown(comparison, charts=shown, problems=problems),
        "comparison.html": page,
        "comparison.json": json.dumps(data, indent=2, allow_nan=False) + "\n",
        "comparison.csv": frame.to_csv(index=False, lineterminator="\n"),
    }
    for sentence in problems:
        logger.warning(sentence)
    return write_files(folder, contents, plots.pictures, index="comparison.json")


def comparison_data(
    comparison: StudyComparison, plots: Plots, *, problems: Sequence[str] = ()
) -> dict[str, Any]:
    """Return the object of comparison.json as plain values; the sentences are not shortened."""
    data: dict[str, Any] = plain(
        ComparisonData(
            format_version=FORMAT_VERSION,
            conclusions=tuple(comparison_wording.conclusions(comparison)),
            studies=tables.comparison_rows(comparison),
            groups=comparison.groups,
            charts=chart_data(plots.charts, drawn=plots.pictures),
            problems=tuple(problems),
        )
    )
    return data


def render_comparison_markdown(
    comparison: StudyComparison,
    *,
    charts: Sequence["ReportChart"] = (),
    problems: Sequence[str] = (),
) -> str:
    """Return comparison.md; ``charts`` are those whose pictures are in the folder plots beside it."""
    return (
        environment()
        .get_template("comparison.md.jinja")
        .render(
            title=_names(comparison),
            conclusions=comparison_wording.conclusions(comparison),
            problems=problems,
            findings_caption=tables.FINDINGS_CAPTION,
            findings=_markdown(tables.findings_table(comparison)),
            charts=charts,
            differing=_markdown(tables.setup_table(comparison, differing=True)),
            same=_markdown(tables.setup_table(comparison, differing=False)),
            studies=_studies(comparison),
        )
    )


def render_comparison_html(
    comparison: StudyComparison,
    *,
    charts: Sequence["ReportChart"] = (),
    problems: Sequence[str] = (),
) -> str:
    """Return comparison.html, made like a study's page."""
    names = _names(comparison)
    return render_page(
        "comparison.html.jinja",
        title=f"LoRA studies {fmt.one_line(names)}",
        charts=charts,
        names=names,
        conclusions=comparison_wording.conclusions(comparison),
        problems=problems,
        findings_caption=tables.FINDINGS_CAPTION,
        findings=tables.findings_table(comparison),
        differing=tables.setup_table(comparison, differing=True),
        same=tables.setup_table(comparison, differing=False),
        studies=_studies(comparison),
        command=_command(comparison),
    )


def print_comparison(comparison: StudyComparison, console: Console, *, folder: Path) -> None:
    """Print what was found, the studies side by side, what differs, and where the files are."""
    for place, sentence in enumerate(comparison_wording.conclusions(comparison)):
        say(console, sentence, style="" if place else "bold")
    _print_table(console, tables.findings_table(comparison))
    differing = tables.setup_table(comparison, differing=True)
    if differing is not None:
        _print_table(console, differing)
    console.print()
    say_unbroken(console, f"Report: {folder / 'comparison.html'}")


def _print_table(console: Console, shown: TextTable) -> None:
    table = plain_table()
    for header in shown.headers:
        table.add_column(Text(fmt.one_line(header)), overflow="fold")
    for row in shown.rows:
        table.add_row(*(Text(fmt.one_line(cell)) for cell in row))
    console.print()
    console.print(table)


def _markdown(table: TextTable | None) -> Markdown | None:
    return None if table is None else markdown_table(table.headers, table.rows)


def _names(comparison: StudyComparison) -> str:
    *first, last = (study.label for study in comparison.studies)
    return f"{', '.join(first)} and {last}"


def _command(comparison: StudyComparison) -> str:
    folders = (shlex.quote(fmt.one_line(str(study.folder))) for study in comparison.studies)
    return f"lora-tune report {' '.join(folders)}"


def _studies(comparison: StudyComparison) -> list[_Study]:
    return [
        _Study(
            label=study.label,
            headline=wording.headline(study.summary),
            folder=str(study.folder),
        )
        for study in comparison.studies
    ]
