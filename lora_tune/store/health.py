"""What is wrong with the files of a study folder; nothing is changed by looking.

The database is compared with the records elsewhere, since that takes the search.
"""

import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from lora_tune.errors import StoreError
from lora_tune.files import MANIFEST, published_digests, sha256_of
from lora_tune.records import TrialRecord
from lora_tune.store.folder import (
    ADAPTER_FOLDER,
    CONFIRMATION_FILE,
    RUNS_FOLDER,
    TRIAL_FILE,
    StudyFolder,
)
from lora_tune.store.leftovers import TRACKER_FOLDERS, leftovers_below
from lora_tune.store.owner import Owner

FIX, REBUILD = "--fix", "--rebuild"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """Something that is wrong, and what to do about it."""

    check: str  # "database", "records", "files", "leftovers", "links", "lock"
    path: str  # relative to the study's folder
    problem: str  # the rest of a sentence that begins with the path
    advice: str
    remedy: str = ""  # the option of ``lora-tune doctor`` that mends it; empty: none does


@dataclass(frozen=True, slots=True, kw_only=True)
class Examination:
    """All that was looked at."""

    folder: Path
    name: str
    version: str  # of lora-tune, that began the study; empty: not known
    owner: Owner | None
    storage: str  # "study.db", or what is known of a server
    num_trials: int
    num_folders: int  # published ones
    num_files: int  # in these
    findings: tuple[Finding, ...]
    done: tuple[str, ...] = ()  # what was mended, as sentences

    @property
    def is_well(self) -> bool:
        """Whether nothing is wrong."""
        return not self.findings


class ReadRecords(NamedTuple):
    """The trial records that can be read, by number, and what is wrong with the others."""

    good: dict[int, TrialRecord]
    bad: dict[int, str]

    @property
    def is_whole(self) -> bool:
        """Whether every trial up to the last one has a record."""
        return not self.bad and sorted(self.good) == list(range(len(self.good)))


def read_records(store: StudyFolder) -> ReadRecords:
    """Read every trial's record; one that is damaged or missing does not hide the others."""
    good: dict[int, TrialRecord] = {}
    bad: dict[int, str] = {}
    for folder in sorted((store.path / "trials").glob("*")):
        if not folder.name.isdigit():
            continue
        number = int(folder.name)
        try:
            good[number] = store.load_trial(number)
            if good[number].number != number:
                bad[number] = f"is the record of trial {good.pop(number).number}"
        except StoreError as error:
            if (folder / TRIAL_FILE).exists():
                bad[number] = f"cannot be read ({_first_in_brackets(str(error))})"
            elif any(not path.name.startswith(".") for path in folder.iterdir()):
                bad[number] = "is missing"
    for number in range(max([*good, *bad], default=-1) + 1):
        if number not in good:
            bad.setdefault(number, "is missing")
    return ReadRecords(good, bad)


def _first_in_brackets(text: str) -> str:
    return text.partition("(")[2].partition("). ")[0]


class PublishedFolders(NamedTuple):
    """What the manifests of a study cover, and where they are not kept."""

    num_folders: int
    num_files: int
    findings: list[Finding]


def check_published(store: StudyFolder) -> PublishedFolders:
    """Compare every file of every published folder with its manifest."""
    num_folders, num_files, findings = 0, 0, []
    for folder in _published_below(store.path):
        num_folders += 1
        digests = published_digests(folder)
        where = folder.relative_to(store.path)
        if digests is None:
            if os.path.lexists(folder / MANIFEST):  # else it was removed meanwhile
                findings.append(_damaged(where / MANIFEST, "cannot be read as a manifest"))
            continue
        problems = {n: _problem(folder / n, digest) for n, digest in sorted(digests.items())}
        num_files += len(digests)
        if published_digests(folder) == digests:  # else it was replaced meanwhile
            findings += [_damaged(where / n, said) for n, said in problems.items() if said]
    return PublishedFolders(num_folders, num_files, findings)


def _published_below(folder: Path) -> Iterator[Path]:
    """Yield the folders with a manifest; hidden ones were never published."""
    for place, folders, files in os.walk(folder):
        foreign = TRACKER_FOLDERS if Path(place) == folder else ()
        folders[:] = sorted(n for n in folders if not n.startswith(".") and n not in foreign)
        if MANIFEST in files:
            yield Path(place)


def _problem(path: Path, digest: str) -> str | None:
    try:
        if not stat.S_ISREG(os.lstat(path).st_mode):
            return "is no file of its own, as it was when it was published"
        return "differs from what was published" if sha256_of(path) != digest else None
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read ({error.strerror})"


def _damaged(path: Path, problem: str) -> Finding:
    return Finding(check="files", path=str(path), problem=problem, advice=_advice(path))


def _advice(path: Path) -> str:
    top = path.parts[0]
    if any(re.fullmatch(r"state-\d+|.+\.state", part) for part in path.parts[:-1]):
        return "Delete that folder: the next run begins this segment again."
    if top == ADAPTER_FOLDER:
        return f"Delete {ADAPTER_FOLDER} and run the study again: it is published again."
    if top == RUNS_FOLDER:
        return (
            f"Bring it back from a copy. Or delete {CONFIRMATION_FILE} and run the study again: the "
            "finalists are trained once more."
        )
    if top == "trials":
        trial = Path(*path.parts[:2])
        return (
            f"Bring it back from a copy. Or move {trial} away and give lora-tune doctor --rebuild: the "
            "next run trains this trial again."
        )
    return "Delete the folder and make it again."


def check_leftovers(store: StudyFolder) -> list[Finding]:
    """Return what killed writers left."""
    findings = []
    for left in leftovers_below(store.path):
        place = str(left.path.relative_to(store.path))
        problem, advice = "was left by a run that was killed", "Remove it"
        if left.rescued is not None:
            problem = f"has the only {left.rescued.name}, put aside by a run that was killed"
            advice = "Bring it back"
        findings.append(
            Finding(
                check="leftovers",
                path=place,
                problem=problem,
                advice=f"{advice}: lora-tune doctor --fix, or the next lora-tune run, does.",
                remedy=FIX,
            )
        )
    return findings


def check_links(store: StudyFolder) -> list[Finding]:
    """Return the links that lead out of the study's folder."""
    return [
        Finding(
            check="links",
            path=str(link.relative_to(store.path)),
            problem="is a link that leads out of the study's folder",
            advice="Put the files themselves there, or delete the link: nothing is written through it.",
        )
        for link in store.links_out()
    ]
