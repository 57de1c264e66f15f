"""HTML pages that stand alone: one file that asks for nothing and runs nothing but its own scripts.

The content security policy in the page forbids every request and every script and style that is not
named by its hash. Values are escaped by the templates. The data of charts are JSON in which no markup
can begin; nothing that came from outside is ever part of a script.
"""

import base64
import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import jinja2
from markupsafe import Markup, escape

from lora_tune import __version__
from lora_tune.report import formatting as fmt
from lora_tune.report.sections import TextTable

if TYPE_CHECKING:
    from lora_tune.report.charts import ReportChart

_NUMBER = re.compile(r"[-+]?\d[\d,.]*(e[-+]?\d+)?x?(?=$|[\s,])")

_QUANTITY = re.compile(
    r"(?<![\w.#&-])[-+]?\d[\d.,]*(?:e[-+]\d+|(?: ?%| GiB| MiB| min| s| h)(?!\w))"
)


def render_page(
    template: str, *, title: str, charts: Sequence["ReportChart"] = (), **context: object
) -> str:
    """Return a page as text for one HTML file.

    A template extends ``page.html.jinja``, fills its block ``main`` with calls of ``section`` (each
    becomes an entry of the contents list), and may use the other macros of ``page_macros.html.jinja``:
    ``table``, ``chart``, ``facts``, ``listing`` and ``code``. Every chart that it shows must be in
    ``charts``.

    Args:
        template: Name of the template, such as "study.html.jinja".
        title: What the browser's tab shows.
        charts: Drawn by the bundled Vega; without any the bundle is left out.
        context: What the template needs besides.
    """
    style, scripts = _asset("report.css"), [_asset("report.js")]
    themes: dict[str, object] = {}
    if charts:
        # Altair and vl-convert take a second to load: only for a page that has plots
        from lora_tune.report.charts import DARK_CONFIG, LIGHT_CONFIG, chart_bundle

        scripts.insert(0, Markup(_inline(chart_bundle(), "script")))
        themes = {"light": LIGHT_CONFIG, "dark": DARK_CONFIG}
    return (
        page_environment()
        .get_template(template)
        .render(
            title=title,
            charts=tuple(charts),
            themes=themes,
            style=style,
            scripts=scripts,
            policy=_policy(style, scripts),
            version=__version__,
            contents=[],
            **context,
        )
    )


def script_json(value: Any) -> Markup:
    r"""Return a value as JSON for a ``<script type="application/json">``, in ASCII, without markup.

    >>> print(script_json({"name": "</script><b>"}))
    {"name":"\u003c/script\u003e\u003cb\u003e"}
    """
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    for char in "<>&":
        text = text.replace(char, f"\\u{ord(char):04x}")
    return Markup(text)


def sentence(text: str) -> Markup:
    """Return text as HTML in which no line ends inside a number or before its unit.

    >>> print(sentence("rate 3e-4 & 9.5 %"))
    rate <span class="whole">3e-4</span> &amp; <span class="whole">9.5 %</span>
    """
    shown = str(escape(fmt.visible_text(text)))
    return Markup(_QUANTITY.sub(r'<span class="whole">\g<0></span>', shown))


def number_columns(table: TextTable) -> list[bool]:
    """Say of each column whether its cells are numbers, so that they are set flush right.

    >>> table = TextTable(headers=("name", "loss"), rows=(("7b", "2.31 to 2.4"), ("8b", "-")))
    >>> number_columns(table)
    [False, True]
    """
    return [_are_numbers(row[i] for row in table.rows) for i in range(len(table.headers))]


def _are_numbers(cells: Iterable[str]) -> bool:
    filled = [cell for cell in cells if cell not in ("", "-")]
    return bool(filled) and all(_NUMBER.match(cell) for cell in filled)


@cache
def page_environment() -> jinja2.Environment:
    """Return the templates of this room, every value escaped for HTML, invisible characters shown."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("lora_tune.report"),
        autoescape=True,
        finalize=lambda value: value if isinstance(value, Markup) else fmt.visible_text(str(value)),
        undefined=jinja2.StrictUndefined,
        extensions=["jinja2.ext.do"],
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["script_json"] = script_json
    environment.filters["number_columns"] = number_columns
    environment.filters["sentence"] = sentence
    return environment


@cache
def _asset(name: str) -> Markup:
    """Return a style sheet or script of this package, ready to stand between its tags."""
    text = files("lora_tune.report").joinpath("templates", name).read_text(encoding="utf-8")
    return Markup(_inline(text, "style" if name.endswith(".css") else "script"))


def _inline(text: str, tag: str) -> str:
    """Return text as a browser reads it between its tags, since the hash is of what it reads."""
    lowered = text.lower()
    assert f"</{tag}" not in lowered, f"the text would end its own <{tag}>"
    assert "<!--" not in lowered, "the text would begin a comment"
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _policy(style: str, scripts: Sequence[str]) -> str:
    """Return the content security policy: nothing from anywhere, and these texts alone."""
    allowed = " ".join(map(_hash, scripts))
    return (
        f"default-src 'none'; script-src {allowed}; style-src {_hash(style)}; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def _hash(text: str) -> str:
    digest = hashlib.sha256(text.encode("utf-8")).digest()
    return f"'sha256-{base64.b64encode(digest).decode('ascii')}'"
