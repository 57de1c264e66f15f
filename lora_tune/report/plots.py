"""The charts of a report as pictures. A fault of the plotting libraries costs the plots, not the report."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from lora_tune.records import StudySnapshot
from lora_tune.report import formatting as fmt

if TYPE_CHECKING:
    from lora_tune.report.charts import ReportChart

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Plots:
    """Charts, their pictures by name, and what could not be made, as sentences."""

    charts: tuple["ReportChart", ...] = ()
    pictures: Mapping[str, str] = field(default_factory=dict)  # SVG
    problems: tuple[str, ...] = ()


def draw_study(snapshot: StudySnapshot) -> Plots:
    """Return the charts of a study and their pictures."""

    def charts() -> tuple["ReportChart", ...]:
        from lora_tune.report.charts import begin_bundle, study_charts

        begin_bundle()  # the page needs it last, and it takes as long as all charts
        return study_charts(snapshot)

    return draw(charts)


def draw_comparison(snapshots: Sequence[StudySnapshot]) -> Plots:
    """Return the charts that show several studies side by side, and their pictures."""

    def charts() -> tuple["ReportChart", ...]:
        from lora_tune.report.charts import begin_bundle, comparison_charts

        begin_bundle()
        return comparison_charts(snapshots)

    return draw(charts)


def draw(charts: Callable[[], Sequence["ReportChart"]]) -> Plots:
    """Return the charts that a function makes, with their pictures."""
    made, problem = attempt("The plots", lambda: tuple(charts()))
    if made is None:
        return Plots(problems=(problem,))
    pictures, problems = {}, []
    for chart in made:
        picture, problem = attempt(f"The plot {chart.name}", partial(_picture, chart))
        if picture is None:
            problems.append(problem)
        else:
            pictures[chart.name] = picture
    return Plots(charts=made, pictures=pictures, problems=tuple(problems))


def attempt(what: str, make: Callable[[], T]) -> tuple[T | None, str]:
    """Return what a function makes, or None and a sentence that says why there is none.

    Any error counts: a library that is missing or broken, too little memory for a picture, a bug. The
    study took hours, so its text must not be lost to a picture; the sentence is shown wherever the
    report is.
    """
    try:
        return make(), ""
    except Exception as error:
        reason = fmt.one_line(str(error))[:300] or "no reason given"
        return None, f"{what} could not be made ({type(error).__name__}: {reason})."


def _picture(chart: "ReportChart") -> str:
    from lora_tune.report.charts import chart_svg

    return chart_svg(chart)
