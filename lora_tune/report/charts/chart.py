"""A chart of a report: its words and its Vega-Lite specification.

Specifications are made with Altair, without data; the rows are put beside them afterwards, because
Altair looks at every row that it is given. They carry no colours of a theme and no title: the page
shows the title as text, a picture gets it drawn in (``render.py``).

Texts of users reach a specification as rows, domains and descriptions only, never inside an expression.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import altair as alt

Row = dict[str, object]
"""Short keys of our own; values are finite numbers, text without control characters, or None."""

HEIGHT = 320
"""Of a chart in pixels; the width is the container's."""

GREY = "#808080"
"""For what stands behind the marks: contrast of about 4 to 1 on white and on a dark page."""

# Without a key, a chart would take the wheel and the finger from the page that it stands in.
_WITH_SHIFT = {
    "zoom": "wheel![event.shiftKey]",
    "translate": "[pointerdown[event.shiftKey], window:pointerup] > window:pointermove!",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportChart:
    """A chart with all the words that belong to it."""

    name: str  # a file name and page id, such as "loss-memory"
    title: str  # a sentence that says the chart's message
    text: str  # text alternative, with the numbers
    caption: str  # how to read it
    spec: dict[str, object]  # Vega-Lite, width "container"


def report_chart(
    layers: Sequence[alt.Chart],
    *,
    name: str,
    title: str,
    text: str,
    caption: str,
    rows: Mapping[str, Sequence[Row]],
    height: int = HEIGHT,
    zoom: str = "",
    zoom_axes: str = "xy",
) -> ReportChart:
    """Return a chart of layers that share their axes.

    Args:
        layers: From the back to the front; each names its rows with ``layer``. One without rows is left
            out: Vega would warn of a scale without an end.
        name: As in ``ReportChart``, like ``title``, ``text`` and ``caption``.
        title: The message.
        text: The alternative.
        caption: How to read it.
        rows: The data by the names that the layers use.
        height: In pixels.
        zoom: Rows of the layer whose axes a reader can zoom and move, with the Shift key held; "": none.
        zoom_axes: Which of the two.
    """
    drawn = [one for one in layers if rows[one.data.name]]
    zoomed = next((i for i, one in enumerate(drawn) if one.data.name == zoom), None)
    if zoomed is not None:
        drawn[zoomed] = drawn[zoomed].add_params(
            alt.selection_interval(
                name="zoom", bind="scales", encodings=list(zoom_axes), **_WITH_SHIFT
            )
        )
    chart = alt.layer(*drawn).properties(
        width="container", height=height, description=f"{title} {text}"
    )
    # the tests validate every specification against Altair's schema, which takes longer than making it
    spec: dict[str, object] = chart.to_dict(validate=False)
    spec.pop("config", None)  # Altair's own theme
    spec["datasets"] = {key: list(values) for key, values in rows.items()}
    return ReportChart(name=name, title=title, text=text, caption=caption, spec=spec)


def layer(rows: str) -> alt.Chart:
    """Return a layer that draws the rows of this name."""
    return alt.Chart(alt.NamedData(name=rows))
