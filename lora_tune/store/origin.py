"""Where a finished study came from: its study file as settings, and the folder that paths in it start at."""

from pathlib import Path

from lora_tune.records import StudyLock, StudySnapshot
from lora_tune.store.folder import LOCK_FILE
from lora_tune.study.loader import validate_study
from lora_tune.study.spec import StudySpec


def spec_of(snapshot: StudySnapshot) -> StudySpec:
    """Return the resolved study file; the lock has the defaults of the version that ran the study."""
    return resolved_spec(snapshot.lock, snapshot.folder)


def resolved_spec(lock: StudyLock, folder: Path) -> StudySpec:
    """Return the study file that a folder's lock has in it.

    Raises:
        StudyFileError: This version does not know these settings.
    """
    values: dict[str, dict[str, object]] = {}
    for section, keys in lock.spec.items():
        assert isinstance(keys, dict)
        values[section] = dict(keys)
    if values["space"].get("lora_alpha") is not None:
        values["space"].pop("alpha_ratio", None)  # resolved, but not to be given together
    return validate_study(values, source=folder / LOCK_FILE)


def base_dir_of(snapshot: StudySnapshot, spec: StudySpec) -> Path:
    """Return the folder that paths of the study file are relative to.

    The lock has the study file as it was given, often relative to where the study was started. That
    place is known from the study's folder as long as nobody moved it; else it is taken to be here.
    """
    here = Path.cwd()
    below = Path(spec.study.output) / spec.study.name
    if not below.is_absolute():
        folder = snapshot.folder.resolve()
        for start in (here, *folder.parents):
            if (start / below).resolve() == folder:
                return (start / snapshot.lock.study_file).parent
    return (here / snapshot.lock.study_file).parent
