"""Study folder to console table, Markdown, CSV, JSON. Never trains, never imports torch."""

from lora_tune.report.card import model_card
from lora_tune.report.console import print_report
from lora_tune.report.files import write_reports
from lora_tune.report.markdown import markdown_escape, render_markdown
from lora_tune.report.progress import ProgressView
from lora_tune.report.summary import ReportSummary, summarize

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
