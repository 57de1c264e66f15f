"""The files of a report: text, page, pictures, numbers and tables, each replaced in one step."""

import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lora_tune.files import write_text
from lora_tune.records import StudySnapshot
from lora_tune.report.memory import memory_frame
from lora_tune.report.plots import Plots, attempt, draw_study
from lora_tune.report.report_json import report_data
from lora_tune.report.study_markdown import render_markdown
from lora_tune.report.study_page import render_html
from lora_tune.report.tables import trials_frame
from lora_tune.store.folder import ADAPTER_FOLDER

if TYPE_CHECKING:
    from lora_tune.report.charts import ReportChart

PLOTS_FOLDER = "plots"

logger = logging.getLogger(__name__)


def write_reports(snapshot: StudySnapshot, *, folder: Path | None = None) -> list[Path]:
    """Write report.md, report.html, report.json, trials.csv, plots/ and, after readings on a GPU, memory.csv.

    All are made before the first is written, and each replaces its predecessor in one step, so a reader
    never sees half a file. When plots or the page cannot be made, the rest is written, says so, and the
    reason is logged as a warning.

    Args:
        snapshot: The study, finished or not.
        folder: Where to write instead of the study's folder.

    Returns:
        The paths written, the pictures last.
    """
    target = folder or snapshot.folder
    adapter = None if folder is None else snapshot.folder / ADAPTER_FOLDER
    plots = draw_study(snapshot)

    def render(charts: Sequence["ReportChart"], problems: Sequence[str]) -> str:
        place = str(adapter or ADAPTER_FOLDER)
        return render_html(snapshot, charts=charts, problems=problems, adapter=place)

    page, problems = page_with_plots(render, plots)
    contents = {
        "report.md": render_markdown(
            snapshot,
            charts=[chart for chart in plots.charts if chart.name in plots.pictures],
            problems=problems,
            adapter=adapter,
        ),
        "report.html": page,
        "report.json": json_text(snapshot, plots, problems=problems),
        "trials.csv": trials_frame(snapshot).to_csv(index=False, lineterminator="\n"),
    }
    if snapshot.memory.readings:
        contents["memory.csv"] = memory_frame(snapshot).to_csv(index=False, lineterminator="\n")
    for sentence in problems:
        logger.warning(sentence)
    return write_files(target, contents, plots.pictures, index="report.json")


def json_text(snapshot: StudySnapshot, plots: Plots, *, problems: tuple[str, ...] = ()) -> str:
    """Return report.json."""
    data = report_data(snapshot, charts=plots.charts, drawn=plots.pictures, problems=problems)
    return json.dumps(data, indent=2, allow_nan=False) + "\n"


def write_files(
    folder: Path, contents: Mapping[str, str], pictures: Mapping[str, str], *, index: str
) -> list[Path]:
    """Write files by name, and pictures before them, as the text shows these.

    Pictures of plots that are no longer there are removed.

    Args:
        folder: Is made if it does not exist.
        contents: Text by name of the file.
        pictures: SVG by name of the plot.
        index: The JSON file among them that lists the plots; its predecessor names the older ones.
    """
    (folder / PLOTS_FOLDER if pictures else folder).mkdir(parents=True, exist_ok=True)
    older = set(_plots_in(folder / index))
    drawn = [folder / PLOTS_FOLDER / f"{name}.svg" for name in pictures]
    for path, picture in zip(drawn, pictures.values(), strict=True):
        write_text(path, picture)
    for name, text in contents.items():
        write_text(folder / name, text)
    for name in older - pictures.keys():
        (folder / PLOTS_FOLDER / f"{name}.svg").unlink(missing_ok=True)
    return [folder / name for name in contents] + drawn


def _plots_in(index: Path) -> Iterable[str]:
    """Return the names of the plots that an earlier report drew; none where there is no such file."""
    try:
        charts = json.loads(index.read_text(encoding="utf-8"))["charts"]
        return [Path(chart["file"]).stem for chart in charts if chart["file"]]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def page_with_plots(
    render: Callable[[Sequence["ReportChart"], Sequence[str]], str], plots: Plots
) -> tuple[str, tuple[str, ...]]:
    """Return a page and all that is missing; where the plots cannot be put into it, the page without.

    Args:
        render: Makes the page of charts and of sentences that say what is missing.
        plots: The charts.
    """
    page, problem = attempt("The plots of the page", lambda: render(plots.charts, plots.problems))
    if page is not None:
        return page, plots.problems
    problems = (*plots.problems, problem)
    return render((), problems), problems
