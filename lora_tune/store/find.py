"""STUDY on the command line: a folder, a study.toml, a name under ``reports/``, or the newest."""

from pathlib import Path

from lora_tune.errors import StoreError, nearest
from lora_tune.store.folder import LOCK_FILE, StudyFolder
from lora_tune.study.loader import load_study

REPORTS = Path("reports")


def find_study(study: str | None) -> StudyFolder:
    """Return the study folder that ``study`` means; None means the one changed last.

    Raises:
        StoreError: There is no such study.
        StudyFileError: ``study`` is a study file that cannot be used.
    """
    if study is None:
        locks = sorted(REPORTS.glob(f"*/{LOCK_FILE}"), key=lambda path: path.stat().st_mtime)
        started = [path for path in locks if not _is_report_alone(path.parent)]
        if not started:
            raise StoreError(
                f"no study below {REPORTS}/. Start one with: lora-tune run STUDY.toml, or name its folder."
            )
        return StudyFolder(started[-1].parent)
    path = Path(study)
    if path.suffix == ".toml":
        spec = load_study(path)
        return _started(Path(spec.study.output) / spec.study.name, study)
    named = REPORTS / study
    if path.is_dir() and ((path / LOCK_FILE).is_file() or not (named / LOCK_FILE).is_file()):
        return _started(path, study)
    return _started(named, study)


def _is_report_alone(folder: Path) -> bool:
    """Return whether a folder has a report but no trials, as one that was passed on for reading.

    A checkout may date it later than any study.
    """
    return (folder / "report.json").is_file() and not (folder / "trials").is_dir()


def _started(folder: Path, study: str) -> StudyFolder:
    if not (folder / LOCK_FILE).is_file():
        known = sorted(path.parent.name for path in REPORTS.glob(f"*/{LOCK_FILE}"))
        listed = f" Studies below {REPORTS}/: {', '.join(known)}." if known else ""
        raise StoreError(
            f'"{study}" is no started study: there is no {folder / LOCK_FILE}'
            f"{nearest(study, known) or '.'}"
            f"{listed} Start it with: lora-tune run STUDY.toml"
        )
    return StudyFolder(folder)
