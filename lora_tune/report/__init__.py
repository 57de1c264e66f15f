"""Study folder to console table, page, Markdown, plots, CSV, JSON. Never trains, never imports torch.

The names below are loaded when they are asked for: an estimate's table needs neither jinja2 nor
the study reports, and a command that answers at once should not wait for them.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lora_tune.report.card import model_card
    from lora_tune.report.console import print_report
    from lora_tune.report.files import write_reports
    from lora_tune.report.markdown import markdown_escape
    from lora_tune.report.progress import ProgressView
    from lora_tune.report.study_markdown import render_markdown
    from lora_tune.report.summary import ReportSummary, summarize

_HOMES = {
    "ProgressView": "progress",
    "ReportSummary": "summary",
    "markdown_escape": "markdown",
    "model_card": "card",
    "print_report": "console",
    "render_markdown": "study_markdown",
    "summarize": "summary",
    "write_reports": "files",
}

__all__ = [
    "ProgressView",
    "ReportSummary",
    "markdown_escape",
    "model_card",
    "print_report",
    "render_markdown",
    "summarize",
    "write_reports",
]


def __getattr__(name: str) -> object:
    """Return a name of ``__all__`` from the module that defines it."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
