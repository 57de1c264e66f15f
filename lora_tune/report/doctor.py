"""What ``lora-tune doctor`` found, for people and as one JSON object."""

from dataclasses import asdict

from rich.console import Console
from rich.text import Text

from lora_tune.report import formatting as fmt
from lora_tune.report.terminal import plain_table, say, say_unbroken
from lora_tune.store.health import FIX, REBUILD, Examination


def examination_json(found: Examination) -> dict[str, object]:
    """Return an examination as plain values; its keys are always all there."""
    return {
        "study": found.name,
        "folder": str(found.folder),
        "well": found.is_well,
        "version": found.version,
        "owner": asdict(found.owner) if found.owner is not None else None,
        "storage": found.storage,
        "trials": found.num_trials,
        "published_folders": found.num_folders,
        "published_files": found.num_files,
        "findings": [asdict(finding) for finding in found.findings],
        "done": list(found.done),
    }


def print_examination(found: Examination, console: Console) -> None:
    """Print what was looked at, what was done, what is wrong, and what comes next."""
    for sentence in found.done:
        say(console, sentence)
    table = plain_table(header=False)
    for name, text in _facts(found).items():
        table.add_row(Text(name, style="bold"), Text(fmt.one_line(text)))
    console.print(table)
    console.print()
    if found.is_well:
        say(console, "All is well." if found.owner is None else "What can be checked is well.")
        return
    for finding in found.findings:
        say(console, f"{finding.path}: {finding.problem}.".replace("..", "."), style="yellow")
        if finding.advice:
            say(console, f"  {finding.advice}")
    console.print()
    remedies = {finding.remedy for finding in found.findings}
    options = [option for option in (FIX, REBUILD) if option in remedies]
    if options and found.owner is None:
        say_unbroken(console, f"Next: lora-tune doctor {found.folder} {' '.join(options)}")


def _facts(found: Examination) -> dict[str, str]:
    begun = f", begun by lora-tune {found.version}" if found.version else ""
    running = found.owner is not None
    left_out = "not looked at: the study is running"
    return {
        "study": f"{found.name} in {found.folder}{begun}",
        "owner": f"run by {found.owner}" if running else "nobody runs it",
        "database": left_out if running else _state(found, "database", found.storage),
        "records": _state(found, "records", fmt.plural(found.num_trials, "trial")),
        "files": _state(
            found,
            "files",
            f"{fmt.plural(found.num_files, 'file')} in "
            f"{fmt.plural(found.num_folders, 'published folder')}",
        ),
        "leftovers": left_out if running else _state(found, "leftovers", "of killed runs"),
    }


def _state(found: Examination, check: str, what: str) -> str:
    count = sum(finding.check == check for finding in found.findings)
    if check == "leftovers":
        return f"{count} {what}" if count else "none"
    return f"{what}: {fmt.plural(count, 'problem') if count else 'well'}"
