"""Arguments that several commands share, and what a shell offers for them when Tab is pressed.

A shell waits for the answer, so nothing heavy is imported for it: names of studies are names of folders,
models and GPUs are those of the catalogue's tables.
"""

from pathlib import Path
from typing import Annotated

import typer

from lora_tune.export.targets import TARGETS


def started_studies(incomplete: str) -> list[str]:
    """Return the names of started studies below reports/, the newest first."""
    locks = sorted(
        Path("reports").glob("*/study.lock.json"),
        key=lambda lock: lock.stat().st_mtime,
        reverse=True,
    )
    return [lock.parent.name for lock in locks if lock.parent.name.startswith(incomplete)]


def study_files(incomplete: str) -> list[str]:
    """Return study files and folders that may hold one, as far as a path has been typed."""
    typed = Path(incomplete)
    parent = typed if incomplete.endswith("/") or not incomplete else typed.parent
    if not parent.is_dir():
        return []
    found = sorted(
        path
        for path in parent.iterdir()
        if path.suffix == ".toml" or (path.is_dir() and not path.name.startswith("."))
    )
    names = [f"{path}/" if path.is_dir() else str(path) for path in found]
    return [name for name in names if name.startswith(incomplete)]


def studies_and_files(incomplete: str) -> list[str]:
    """Return what ``run`` takes: study files, and names of started studies."""
    return [*study_files(incomplete), *started_studies(incomplete)]


def catalogue_models(incomplete: str) -> list[str]:
    """Return the catalogue's short names of models."""
    from lora_tune.catalog.models import load_models

    names = (model.name for model in load_models())
    return [name for name in names if name.startswith(incomplete.casefold())]


def catalogue_gpus(incomplete: str) -> list[str]:
    """Return the catalogue's GPUs without spaces, which a shell would need quoted, in the case typed."""
    from lora_tune.catalog.gpus import load_gpus

    names = [gpu.name.replace(" ", "-") for gpu in load_gpus()]
    found = [name for name in names if name.startswith(incomplete)]
    return found or [name for name in map(str.lower, names) if name.startswith(incomplete)]


def export_targets(incomplete: str) -> list[tuple[str, str]]:
    """Return what a study can be exported to, and what each makes."""
    return [(name, row.makes) for name, row in TARGETS.items() if name.startswith(incomplete)]


STUDY_HELP = "A study's folder, its study.toml, or its name under reports/; the newest."

StudyArgument = Annotated[
    str | None,
    typer.Argument(metavar="STUDY", help=STUDY_HELP, autocompletion=started_studies),
]
StudyFileArgument = Annotated[
    str, typer.Argument(metavar="FILE", help="A study file.", autocompletion=study_files)
]
GpuOption = Annotated[
    str | None,
    typer.Option(
        metavar="GPU",
        help="A GPU of the catalogue or a size, instead of the study's memory.gpu.",
        autocompletion=catalogue_gpus,
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON object instead.")]
