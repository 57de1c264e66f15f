"""The two looks of a chart: on a light page and in print, and on a dark page.

Colours are those of Okabe and Ito, told apart with the common kinds of colour blindness
(https://jfly.uni-koeln.de/color/), made darker on white and lighter on black where their contrast was
below 3 to 1. Charts never say by colour alone what matters: shape, dash or a label says it too.
"""

from typing import Any

HALO = "halo"
"""Name of the style of a text's outline in the colour of the page."""

_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif"


def _config(
    *, page: str, text: str, quiet: str, grid: str, category: list[str], ramp: list[str]
) -> dict[str, Any]:
    return {
        "background": "transparent",
        "font": _FONT,
        "axis": {
            "labelColor": text,
            "titleColor": text,
            "domainColor": quiet,
            "tickColor": quiet,
            "gridColor": grid,
            "labelFontSize": 12,
            "titleFontSize": 12,
            "titleFontWeight": "normal",
            "titlePadding": 8,
            "labelOverlap": "parity",
            "labelSeparation": 4,
        },
        "legend": {
            "orient": "bottom",
            "direction": "horizontal",
            "labelColor": text,
            "titleColor": text,
            "labelFontSize": 12,
            "titleFontSize": 12,
            "titleFontWeight": "normal",
            "labelLimit": 180,
            "symbolSize": 90,
        },
        "title": {"color": text, "subtitleColor": text, "anchor": "start", "fontSize": 14},
        "text": {"color": text, "fontSize": 12},
        "view": {"stroke": None},
        # behind text that stands on lines
        "style": {HALO: {"stroke": page, "strokeWidth": 4, "strokeJoin": "round"}},
        "range": {"category": category, "ordinal": ramp, "ramp": ramp, "heatmap": ramp},
    }


LIGHT_CONFIG: dict[str, Any] = _config(
    page="#ffffff",
    text="#24292f",
    quiet="#8c959f",
    grid="#e6e9ec",
    category=["#0072b2", "#d55e00", "#009e73", "#b8528c", "#a87300", "#5f4bb6", "#5c6670"],
    ramp=["#08306b", "#2171b5", "#6baed6", "#c6d3de"],
)
DARK_CONFIG: dict[str, Any] = _config(
    page="#0d1117",
    text="#e6edf3",
    quiet="#6e7681",
    grid="#2b3138",
    category=["#56b4e9", "#ff8a3d", "#2dd4a0", "#e6a3c8", "#f0e442", "#b79be8", "#a9b1ba"],
    ramp=["#f0f6ff", "#8cc4f5", "#3d83bd", "#34495c"],
)
