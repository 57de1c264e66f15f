"""Charts as pictures, and the JavaScript that draws them in a page. No browser, no network."""

import re
import subprocess
import sys
import textwrap
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from typing import Any

from lora_tune.report.charts.chart import ReportChart
from lora_tune.report.charts.theme import LIGHT_CONFIG

WIDTH = 640
"""Of a picture in pixels: fits a page of GitHub or the hub."""

VEGA_LITE = "6.4"
"""The version that Altair 6.3 writes; the page and the pictures use the same one."""

_TITLE_WIDTH = 76  # letters of a title's line in such a picture
_BUNDLER = """
import sys, vl_convert
bundle = vl_convert.javascript_bundle(sys.argv[1], vl_version=sys.argv[2])
sys.stdout.buffer.write(bundle.encode("utf-8"))
"""
_CLIP_PATH = re.compile(r'(<clipPath id="clip|clip-path="url\(#clip)(\d+)')


def chart_svg(chart: ReportChart) -> str:
    """Return the chart as an SVG picture on white, its title drawn in; same chart, same bytes.

    No file and no address is read: the data are in the specification.
    """
    import vl_convert

    title = {"text": textwrap.wrap(chart.title, _TITLE_WIDTH), "offset": 12}
    spec: dict[str, Any] = {**chart.spec, "width": WIDTH, "title": title, "padding": 10}
    svg: str = vl_convert.vegalite_to_svg(
        spec,
        vl_version=VEGA_LITE,
        config={**LIGHT_CONFIG, "background": "white"},
        allowed_base_urls=[],
    )
    return _renumbered(svg)


def _renumbered(svg: str) -> str:
    """Return the picture with its clip paths counted from 1: Vega counts on from picture to picture."""
    numbers: dict[str, int] = {}

    def own(match: re.Match[str]) -> str:
        return f"{match[1]}{numbers.setdefault(match[2], len(numbers) + 1)}"

    return _CLIP_PATH.sub(own, svg)


def begin_bundle() -> None:
    """Begin to make the script in the background, for a caller that will want it.

    It takes more than a second of one core, in which the rest of a report can be made.
    """
    _bundle()


def chart_bundle() -> str:
    """Return Vega, Vega-Lite and vega-embed as one script that sets ``vegaEmbed``; about 0.9 MB."""
    return _bundle().result()


@cache
def _bundle() -> Future[str]:
    with_one_thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="chart-bundle")
    future = with_one_thread.submit(_make_bundle)
    with_one_thread.shutdown(wait=False)
    return future


def _make_bundle() -> str:
    # A process of its own: vl-convert holds this one's interpreter while it bundles.
    exports = "window.vegaEmbed = vegaEmbed; window.vegaLite = vegaLite; window.vega = vega;"
    command = [sys.executable, "-c", _BUNDLER, exports, VEGA_LITE]
    done = subprocess.run(command, capture_output=True, check=False)
    if done.returncode != 0:
        reason = done.stderr.decode("utf-8", "replace").strip().rpartition("\n")[2]
        raise RuntimeError(f"vl-convert made no JavaScript bundle: {reason}")
    # its many short names stay its own; as a plain script they would be the page's too
    return f"(() => {{{done.stdout.decode('utf-8')}}})();"
