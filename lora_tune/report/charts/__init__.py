"""The plots of a report: Vega-Lite specifications with their words, pictures of them, and the script.

One module a chart. Each reads the snapshot alone and returns None when there is nothing to show.
"""

from collections.abc import Callable, Sequence

from lora_tune.records import StudySnapshot
from lora_tune.report.charts.chart import ReportChart
from lora_tune.report.charts.comparison import compared_losses_chart, compared_memory_chart
from lora_tune.report.charts.importance import importance_chart
from lora_tune.report.charts.learning_curves import learning_curves_chart
from lora_tune.report.charts.learning_rate import learning_rate_chart
from lora_tune.report.charts.loss_memory import loss_memory_chart
from lora_tune.report.charts.memory import memory_chart
from lora_tune.report.charts.parallel import parallel_chart
from lora_tune.report.charts.rank_targets import rank_targets_chart
from lora_tune.report.charts.render import begin_bundle, chart_bundle, chart_svg
from lora_tune.report.charts.theme import DARK_CONFIG, LIGHT_CONFIG
from lora_tune.report.charts.timeline import timeline_chart

__all__ = [
    "DARK_CONFIG",
    "LIGHT_CONFIG",
    "ReportChart",
    "begin_bundle",
    "chart_bundle",
    "chart_svg",
    "comparison_charts",
    "study_charts",
]

_STUDY_CHARTS: tuple[Callable[[StudySnapshot], ReportChart | None], ...] = (
    loss_memory_chart,
    learning_rate_chart,
    rank_targets_chart,
    learning_curves_chart,
    parallel_chart,
    importance_chart,
    memory_chart,
    timeline_chart,
)


def study_charts(snapshot: StudySnapshot) -> tuple[ReportChart, ...]:
    """Return the charts of a study that have something to show, in the order of the report."""
    made = (make(snapshot) for make in _STUDY_CHARTS)
    return tuple(chart for chart in made if chart is not None)


def comparison_charts(snapshots: Sequence[StudySnapshot]) -> tuple[ReportChart, ...]:
    """Return the charts that show several studies side by side; none before one has decided."""
    made = (compared_losses_chart(snapshots), compared_memory_chart(snapshots))
    return tuple(chart for chart in made if chart is not None)
