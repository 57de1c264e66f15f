"""``lora-tune report``: make the reports of a study again from its folder alone."""

from rich.console import Console

from lora_tune.report import print_report, write_reports
from lora_tune.store.find import find_study


def report(study: str | None) -> None:
    """Write report.md, trials.csv and report.json, and print the report."""
    snapshot = find_study(study).snapshot()
    paths = write_reports(snapshot)
    print_report(snapshot, Console())
    Console(stderr=True).print(
        f"written: {', '.join(str(path) for path in paths)}", highlight=False
    )
