"""``lora-tune export``: a finished study's winner in the form that another program takes.

Paths of what was written go to standard output, one a line; everything said goes to standard error.
"""

import json
import os
import shlex
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

from rich.console import Console

from lora_tune import __version__
from lora_tune.commands.place import check_writable
from lora_tune.errors import StudyFileError, nearest
from lora_tune.export.adapter import adapter_folder, chosen_candidate, decided
from lora_tune.export.job import ExportJob, ExportResult
from lora_tune.export.targets import TARGETS, Target
from lora_tune.files import MANIFEST, is_complete, publish_folder, published_digests
from lora_tune.records import StudySnapshot
from lora_tune.report.confirmation import summarize_confirmation
from lora_tune.report.terminal import open_console, say, say_unbroken
from lora_tune.store.find import find_study
from lora_tune.units import MIB

EXPORT_FOLDER = "export"
MARK_FILE = "export.json"  # in every export: what it is and where it came from


class _Upload(NamedTuple):
    repo: str
    url: str
    public: bool


def export(
    study: str | None,
    *,
    target: str,
    output: Path | None,
    gpu: str | None,
    push: str | None,
    public: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Write the export, publish it in one step, and upload it if asked to.

    Args:
        study: A finished study as ``store.find`` knows it.
        target: One of ``export.targets.TARGETS``.
        output: The folder to make; None: ``export/<target>`` in the study's folder.
        gpu: GPU or size for which a framework's memory is estimated.
        push: Repository on the hub.
        public: Make it public.
        force: Replace a folder that is no unchanged export.
        as_json: One object on standard output instead of paths.

    Raises:
        LoraTuneError: With one message; no folder is left half-written.
    """
    row = _target(target)
    _check_options(row, gpu=gpu, push=push, public=public)
    if gpu is not None and gpu.strip().casefold() == "auto":
        from lora_tune.commands.estimate_machine import this_machines_gpu

        gpu = f"{this_machines_gpu(key='--gpu').usable_bytes // MIB}MiB"
    folder = find_study(study)
    folder.check_links()  # what an export copies, and may upload, is the study's own
    snapshot = folder.snapshot()
    decided(snapshot)
    summarize_confirmation(snapshot)  # records that contradict each other make no export
    if row.needs_adapter:
        adapter_folder(snapshot)
    final = (output or snapshot.folder / EXPORT_FOLDER / row.name).absolute()
    _check_place(final, snapshot, force=force)
    repo = _check_push(push) if push is not None else None
    console = open_console(stderr=True)
    result = _write(row, snapshot, final, gpu=gpu, console=console)
    upload = _push(repo, final, row, snapshot, public=public) if repo is not None else None
    if as_json:
        print(json.dumps(_as_json(row, final, result, upload), indent=2))
    else:
        for path in result.files:
            print(path)
    _show(console, final, result, upload)


def _target(name: str) -> Target:
    if name not in TARGETS:
        known = ", ".join(TARGETS)
        raise StudyFileError(
            f'--to is "{name}", which is no target{nearest(name, TARGETS) or "."} Known: {known}.'
        )
    return TARGETS[name]


def _check_options(row: Target, *, gpu: str | None, push: str | None, public: bool) -> None:
    if gpu is not None and not row.uses_gpu:
        users = ", ".join(name for name, other in TARGETS.items() if other.uses_gpu)
        raise StudyFileError(
            f"--gpu has no meaning with --to {row.name}: leave it out ({users} use it)."
        )
    if push is not None and not row.can_be_pushed:
        pushed = " and ".join(name for name, other in TARGETS.items() if other.can_be_pushed)
        raise StudyFileError(f"--push goes with --to {pushed}, not with --to {row.name}.")
    if public and push is None:
        raise StudyFileError("--public goes with --push REPO: without it nothing is uploaded.")


def _check_place(final: Path, snapshot: StudySnapshot, *, force: bool) -> None:
    """Refuse to replace what is no export of ours, or one that somebody has changed.

    Raises:
        StudyFileError: With what to do.
    """
    if not os.path.isfile(final):  # which has a message of its own
        check_writable(final)
    real, study = final.resolve(), snapshot.folder.resolve()
    for kept in (Path.cwd(), Path.home(), study):
        if kept.resolve().is_relative_to(real):
            raise StudyFileError(
                f"{final}: the export would replace {kept}. Give another --output."
            )
    if real.is_relative_to(study) and not real.is_relative_to(study / EXPORT_FOLDER):
        raise StudyFileError(
            f"{final}: this is inside the study's own folder. Give another --output, or leave it out for "
            f"{snapshot.folder / EXPORT_FOLDER}."
        )
    if not final.exists() and not final.is_symlink():
        return
    if final.is_symlink() or not final.is_dir():
        raise StudyFileError(f"{final}: this is a file or a link. Give a folder as --output.")
    if not force and any(final.iterdir()) and not _is_unchanged_export(final):
        raise StudyFileError(
            f"{final}: this folder is no export, or something in it was changed or added since. Give another "
            "--output, or replace it with all that is in it by --force."
        )


def _is_unchanged_export(folder: Path) -> bool:
    published = published_digests(folder) or {}
    found = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    return MARK_FILE in published and found == {*published, MANIFEST} and is_complete(folder)


def _write(
    row: Target, snapshot: StudySnapshot, final: Path, *, gpu: str | None, console: Console
) -> ExportResult:
    """Let the target fill a folder and publish it; return the result with the files' final paths."""

    def note(text: str) -> None:
        say(console, text, style="dim")

    with publish_folder(final) as folder:
        job = ExportJob(snapshot=snapshot, folder=folder, gpu=gpu, note=note)
        # late: some targets import torch, the others must not wait for it
        result: ExportResult = import_module(f"lora_tune.export.{row.name}").export(job)
        mark = folder / MARK_FILE
        mark.write_text(json.dumps(_mark(row, snapshot), indent=1) + "\n", encoding="utf-8")
        files = tuple(final / path.relative_to(folder) for path in result.files)
    return ExportResult(files=files, command=result.command, notes=result.notes)


def _mark(row: Target, snapshot: StudySnapshot) -> dict[str, object]:
    return {
        "lora_tune": __version__,
        "target": row.name,
        "study": snapshot.lock.name,
        "spec_sha256": snapshot.lock.spec_sha256,
        "data_sha256": snapshot.lock.data.sha256,
        "candidate": chosen_candidate(snapshot).name,
    }


def _check_push(repo: str) -> str:
    from lora_tune.export.push import check_push

    return check_push(repo)


def _push(repo: str, final: Path, row: Target, snapshot: StudySnapshot, *, public: bool) -> _Upload:
    from lora_tune.export.push import push_folder

    message = f"Upload the {row.name} of study {snapshot.lock.name}"
    return _Upload(repo, push_folder(repo, final, public=public, message=message), public)


def _as_json(
    row: Target, final: Path, result: ExportResult, upload: _Upload | None
) -> dict[str, object]:
    return {
        "target": row.name,
        "folder": str(final),
        "files": [str(path) for path in result.files],
        "command": result.command,
        "notes": list(result.notes),
        "pushed": None if upload is None else upload._asdict(),
    }


def _show(console: Console, final: Path, result: ExportResult, upload: _Upload | None) -> None:
    for text in result.notes:
        say(console, f"note: {text}")
    if upload is not None:
        who = "public" if upload.public else "private"
        say_unbroken(console, f"uploaded ({who}): {upload.url}")
    say(console, "Next:")
    for line in _next_lines(final, result.command):
        say_unbroken(console, line)


def _next_lines(final: Path, command: str) -> Iterable[str]:
    return (f"cd {shlex.quote(str(final))}", *command.splitlines())
