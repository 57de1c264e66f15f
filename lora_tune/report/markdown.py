"""Markdown in which every value is escaped: tables, code, the environment of the templates.

Names, paths and reasons come from users, data sets and other programs. The environment
escapes each value that a template shows, unless the code marked it as ``Markdown``.
"""

import re
from collections.abc import Iterable, Sequence
from functools import cache

import jinja2

from lora_tune.records import StudySnapshot
from lora_tune.report import formatting as fmt

_SPECIAL = re.compile(r"[\\`*\[\]|~$]|(?<![0-9A-Za-z])_|_(?![0-9A-Za-z])")
_LINE_START = re.compile(r"^(#{1,6}(?=\s|$)|[-+](?=[\s-]|$)|=+|\d+(?=[.)](\s|$)))")
_ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}


class Markdown(str):
    """Text that is Markdown already and must not be escaped again."""

    __slots__ = ()


def markdown_escape(text: str) -> str:
    r"""Return text that Markdown and HTML show as it is, on one line, also in a table's cell.

    Underscores inside a word are left alone: Markdown gives them no meaning.

    >>> markdown_escape("a|b <script> lora_alpha *x*\n# y")
    'a\\|b &lt;script&gt; lora_alpha \\*x\\* # y'
    """
    line = _escape_inline(text)
    start = _LINE_START.match(line)
    if start is None:
        return line
    cut = start.end() if start[1].isdigit() else 0
    return f"{line[:cut]}\\{line[cut:]}"


def _escape_inline(text: str) -> str:
    """Escape for a place where no line begins, such as a cell: a ``-`` stays a ``-`` there."""
    line = "".join(_ENTITIES.get(c, c) for c in fmt.one_line(text))
    return _SPECIAL.sub(lambda match: "\\" + match[0], line)


def markdown_table(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> Markdown:
    """Return a table, its cells escaped and padded so that the source reads well too."""
    table = [[_escape_inline(cell) for cell in row] for row in (headers, *rows)]
    widths = [max(3, *(len(row[i]) for row in table)) for i in range(len(headers))]
    table.insert(1, ["-" * width for width in widths])
    lines = ("| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in table)
    return Markdown("\n".join(lines))


def code_block(text: str, language: str = "") -> Markdown:
    """Return a fenced block, its fence longer than any run of backticks in the text."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return Markdown(f"{fence}{language}\n{text}\n{fence}")


def python_literal(text: str) -> Markdown:
    """Return text as a Python string in ASCII, on one line.

    >>> print(python_literal("org/model"))
    "org/model"
    """
    literal = ascii(text)
    plain = literal[1:-1]
    return Markdown(f'"{plain}"' if '"' not in plain and "\\" not in plain else literal)


@cache
def environment() -> jinja2.Environment:
    """Return the templates of this room, with Markdown escaping of every value."""
    return jinja2.Environment(
        loader=jinja2.PackageLoader("lora_tune.report"),
        autoescape=False,  # HTML escaping alone would leave Markdown open; see ``finalize``
        finalize=lambda value: (
            value if isinstance(value, Markdown) else markdown_escape(str(value))
        ),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def load_adapter_context(snapshot: StudySnapshot, *, adapter: str) -> dict[str, object]:
    """Return what ``load_adapter.jinja`` needs.

    The compute type is the one of the confirmation, so that the reported loss is met again.
    """
    model = snapshot.lock.model
    base = model.hub_id
    from_gguf = model.base.lower().endswith(".gguf")
    if base is None and not from_gguf:
        base = model.base
    dtype = snapshot.lock.plan.compute_dtype
    if snapshot.confirmation is not None:
        evaluations = [r.evaluation for r in snapshot.confirmation.runs if r.evaluation is not None]
        dtype = evaluations[0].compute_dtype if evaluations else dtype
    return {
        "base": python_literal(base or "path/to/the/base/model"),
        "known": base is not None,
        "revision": python_literal(model.revision) if model.hub_id and model.revision else None,
        "adapter": python_literal(adapter),
        "nf4": model.quantization == "nf4",
        "dtype": Markdown(dtype if dtype in ("bfloat16", "float16") else "float32"),
        "gguf": re.split(r"[\\/]", model.base)[-1] if from_gguf else None,
    }
