"""``lora-tune report``: make the reports of a study again from its folder alone, or compare studies."""

import gc
import json
from collections.abc import Sequence
from pathlib import Path

from lora_tune.commands.place import check_writable
from lora_tune.errors import StoreError, StudyFileError
from lora_tune.records import StudySnapshot
from lora_tune.report import print_report, write_reports
from lora_tune.report.caveats import missing_trials
from lora_tune.report.terminal import open_console, say, say_unbroken
from lora_tune.store.find import REPORTS, find_study
from lora_tune.store.folder import LOCK_FILE, StudyFolder

MAX_NAMES = 3  # of studies in the name of a comparison's folder


def report(studies: Sequence[str], *, output: Path | None, as_json: bool) -> None:
    """Write the report of a study, or the comparison of several, and print it.

    Works while a study runs: its records appear whole or not at all.

    Args:
        studies: As ``store.find`` knows them; none: the newest.
        output: Folder to write to instead of the study's own, or of ``reports/<A>-vs-<B>``.
        as_json: Print report.json, or comparison.json, instead of the tables.

    Raises:
        StoreError: There is no such study, or its folder cannot be written.
        StudyFileError: ``output`` cannot be written to, or a study is named twice.
    """
    # Records hold no cycles, and looking for some among those of 500 trials takes 7 % of the command.
    gc.disable()
    try:
        _report_or_compare(studies or [None], output, as_json=as_json)
    finally:
        gc.enable()


def _report_or_compare(wanted: Sequence[str | None], output: Path | None, *, as_json: bool) -> None:
    snapshots = [find_study(study).snapshot() for study in wanted]
    if as_json or len(snapshots) > 1:
        _warn(snapshots)
    if len(snapshots) == 1:
        _report(snapshots[0], output, as_json=as_json)
    else:
        _compare(snapshots, output or REPORTS / _name(snapshots), as_json=as_json)


def _warn(snapshots: Sequence[StudySnapshot]) -> None:
    """Say on stderr what a report for people says among its warnings."""
    for snapshot in snapshots:
        for warning in missing_trials(snapshot):
            say(open_console(stderr=True), f"Warning: {snapshot.folder}: {warning}", style="yellow")


def _report(snapshot: StudySnapshot, output: Path | None, *, as_json: bool) -> None:
    if output is not None and output.resolve() == snapshot.folder.resolve():
        output = None
    if output is not None:
        _check(output)
    else:
        StudyFolder(snapshot.folder).check_links()
        if not snapshot.trials:
            _check_nothing_is_lost(snapshot.folder)
    try:
        paths = write_reports(snapshot, folder=output)
    except PermissionError as error:
        raise _not_written(error) from error
    if as_json:
        _print_file(paths, "report.json")
    else:
        print_report(snapshot, open_console(), folder=output)
    _say_written(paths)


def _compare(snapshots: Sequence[StudySnapshot], output: Path, *, as_json: bool) -> None:
    # A single study's report needs none of this.
    from lora_tune.report.comparison import compare_studies
    from lora_tune.report.comparison_files import print_comparison, write_comparison

    comparison = compare_studies(snapshots)
    _check(output)
    try:
        paths = write_comparison(comparison, snapshots, output)
    except PermissionError as error:
        raise _not_written(error) from error
    if as_json:
        _print_file(paths, "comparison.json")
    else:
        print_comparison(comparison, open_console(), folder=output)
    _say_written(paths)


def _name(snapshots: Sequence[StudySnapshot]) -> str:
    names = [snapshot.folder.resolve().name for snapshot in snapshots]
    if len(names) > MAX_NAMES:
        names = [*names[: MAX_NAMES - 1], f"{len(names) - MAX_NAMES + 1}-more"]
    return "-vs-".join(names)


def _check(output: Path) -> None:
    """Refuse a folder that is another study's: its report would be overwritten by a foreign one."""
    if (output / LOCK_FILE).is_file():
        raise StudyFileError(
            f"{output}: is the folder of a study, whose own report would be replaced. Name another "
            "folder with --output."
        )
    if output.exists() and not output.is_dir():
        raise StudyFileError(
            f"{output}: is a file; --output names a folder, which is made if need be."
        )
    check_writable(output)


def _check_nothing_is_lost(folder: Path) -> None:
    """Refuse to replace a report of trials whose records are gone, as in a folder that was thinned out."""
    try:
        trials = json.loads((folder / "report.json").read_text(encoding="utf-8"))["trials"]
    except (OSError, ValueError, KeyError, TypeError):
        return
    if trials:
        raise StoreError(
            f"{folder}: has a report of {len(trials)} trials, but no records of them in "
            f"{folder / 'trials'}; a new report would be empty. Read {folder / 'report.md'}, or name "
            "another folder with --output."
        )


def _not_written(error: PermissionError) -> StoreError:
    return StoreError(
        f"{error.filename}: cannot be written ({error.strerror}). Name a folder of your own with --output."
    )


def _print_file(paths: Sequence[Path], name: str) -> None:
    text = next(path for path in paths if path.name == name).read_text(encoding="utf-8")
    print(text, end="")


def _say_written(paths: Sequence[Path]) -> None:
    """Name on stderr what was written, pictures by their number."""
    console = open_console(stderr=True)
    files = [path.name for path in paths if path.suffix != ".svg"]
    pictures = len(paths) - len(files)
    also = f" and {pictures} plots in plots/" if pictures else ""
    say_unbroken(console, f"written in {paths[0].parent}: {', '.join(files)}{also}")
