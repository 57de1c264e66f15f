"""``lora-tune doctor``: is a study's folder whole, and what to do where it is not.

Without options it only looks. ``--fix`` removes what killed runs left behind. ``--rebuild`` makes the
database again from the trial records, and a record that is lost or damaged again from the database. What
it replaces is put aside, never deleted. Both need the study for themselves.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from lora_tune.errors import LoraTuneError, MachineError, StoreError
from lora_tune.records import StudyLock, TrialRecord
from lora_tune.redaction import MASK, redact, same_when_masked
from lora_tune.report.doctor import examination_json, print_examination
from lora_tune.report.terminal import open_console
from lora_tune.store.find import find_study
from lora_tune.store.folder import (
    CONFIRMATION_FILE,
    DATABASE,
    LOCK_FILE,
    TRIAL_FILE,
    StudyFolder,
)
from lora_tune.store.health import (
    REBUILD,
    Examination,
    Finding,
    ReadRecords,
    check_leftovers,
    check_links,
    check_published,
    read_records,
)
from lora_tune.store.origin import resolved_spec
from lora_tune.store.owner import find_owner
from lora_tune.study.loader import load_study

if TYPE_CHECKING:
    import optuna

    from lora_tune.search.restoring import SearchRecord


def doctor(study: str | None, *, fix: bool, rebuild: bool, as_json: bool) -> bool:
    """Examine a study's folder, mend what was asked for, and print what is wrong.

    Args:
        study: A started study as ``store.find`` knows it.
        fix: Remove what killed runs left, and bring back what they had put aside.
        rebuild: Make the database, or lost records, again.
        as_json: Print one JSON object.

    Returns:
        Whether nothing is wrong, or nothing is any more.

    Raises:
        StoreError: There is no such study, or it cannot be mended: it runs, or too much is lost.
        MachineError: PostgreSQL's driver is not installed.
    """
    store = find_study(study)
    done: list[str] = []
    if fix or rebuild:
        with store.owned():
            done += mend(store) if fix else []
            done += _rebuild(store, study) if rebuild else []
    found = replace(examine(store, study), done=tuple(map(redact, done)))
    if as_json:
        print(json.dumps(examination_json(found), indent=2))
    else:
        print_examination(found, open_console())
    return found.is_well


def examine(store: StudyFolder, study: str | None = None) -> Examination:
    """Return what is wrong with a study's folder; nothing is changed.

    What changes while a study runs, its database and what is being written, is left out then.
    """
    owner = find_owner(store.path)
    published = check_published(store)
    findings = [*published.findings, *check_links(store)]
    if owner is None:
        findings += check_leftovers(store)
    records = read_records(store)
    findings += [_record_finding(number, problem) for number, problem in records.bad.items()]
    lock, storage = None, DATABASE
    try:
        lock = store.load_lock()
        assert lock is not None  # find_study saw it
        if owner is None:
            url = _storage_of(lock, study)
            storage = DATABASE if url is None else f"PostgreSQL, {redact(url).rpartition('@')[2]}"
            findings += _search_findings(store, lock, records, url)
    except LoraTuneError as error:
        said = str(error).replace(f"{store.path / LOCK_FILE}: ", "").replace("\n", " ")
        findings.append(Finding(check="lock", path=LOCK_FILE, problem=said.rstrip("."), advice=""))
    return Examination(
        folder=store.path,
        name=lock.name if lock is not None else store.path.name,
        version=lock.versions.get("lora-tune", "") if lock is not None else "",
        owner=owner,
        storage=storage,
        num_trials=len(records.good),
        num_folders=published.num_folders,
        num_files=published.num_files,
        findings=tuple(findings),
    )


def mend(store: StudyFolder) -> list[str]:
    """Remove what killed runs left in a folder that this process owns; return what was done."""
    num_left, said = len(check_leftovers(store)), store.tidy()
    return [*([f"{num_left} leftovers of killed runs were removed."] if num_left else []), *said]


class _Facts(NamedTuple):
    """What database and records say, as far as they can be read."""

    search: "SearchRecord"
    records: ReadRecords  # without those that contradict themselves
    trials: "Sequence[optuna.trial.FrozenTrial] | None"  # None: the database cannot be read
    problem: str  # why not


def _facts(store: StudyFolder, lock: StudyLock, records: ReadRecords, url: str | None) -> _Facts:
    from lora_tune.search.restoring import SearchRecord
    from lora_tune.store.database import read_trials

    search = SearchRecord(resolved_spec(lock, store.path), lock)
    faults = {n: fault for n, r in records.good.items() if (fault := search.fault_of(r))}
    good = {n: record for n, record in records.good.items() if n not in faults}
    bad = {**records.bad, **faults}
    try:
        if url is None:
            trials = read_trials(store.path / DATABASE, name=lock.name)
        else:
            from lora_tune.store.postgres import read_postgres_trials

            trials = read_postgres_trials(url, name=lock.name, created=lock.created)
    except (StoreError, MachineError) as error:
        return _Facts(search, ReadRecords(good, bad), None, str(error))
    for number in search.without_record(good.keys() | bad.keys(), trials):
        bad[number] = "is missing"
    return _Facts(search, ReadRecords(good, bad), trials, "")


def _search_findings(
    store: StudyFolder, lock: StudyLock, records: ReadRecords, url: str | None
) -> list[Finding]:
    """Return what is wrong with the database, and with records that contradict themselves."""
    facts = _facts(store, lock, records, url)
    new = {n: text for n, text in facts.records.bad.items() if n not in records.bad}
    findings = [_record_finding(number, text) for number, text in new.items()]
    place = DATABASE if url is None else "run.storage"
    if facts.trials is None:
        begun = bool(records.good or records.bad)
        if begun or (url is None and (store.path / DATABASE).exists()):
            problem = _without_place(facts.problem)
            reached = url is None or "has no study" in problem
            findings.append(_database_finding(place, problem) if reached else _away(place, problem))
        return findings
    if facts.records.is_whole:
        known = [facts.records.good[number] for number in sorted(facts.records.good)]
        found = facts.search.differences(known, facts.trials)
        findings += [
            _database_finding(place, f"does not fit the records: {text}") for text in found
        ]
    return findings


def _record_finding(number: int, problem: str) -> Finding:
    return Finding(
        check="records",
        path=f"trials/{number:04d}/{TRIAL_FILE}",
        problem=problem,
        advice="Bring the file back from a copy, or make it again from the database: lora-tune doctor "
        "--rebuild does. What was trained of this trial is then trained again.",
        remedy=REBUILD,
    )


def _database_finding(place: str, problem: str) -> Finding:
    return Finding(
        check="database",
        path=place,
        problem=problem,
        advice="Make it again from the trial records: lora-tune doctor --rebuild does, and puts the old one "
        "aside.",
        remedy=REBUILD,
    )


def _away(place: str, problem: str) -> Finding:
    advice = "The records in trials do not depend on it. Look again when the server answers."
    return Finding(check="database", path=place, problem=problem, advice=advice)


def _without_place(message: str) -> str:
    """Return the first sentence of an error's message without the path that it begins with."""
    text = message.partition(": ")[2]
    return text.partition(". ")[0].rstrip(".")


def _storage_of(lock: StudyLock, study: str | None) -> str | None:
    """Return the address of the study's database server, its password from the study file if need be."""
    run = lock.spec.get("run")
    noted = run.get("storage") if isinstance(run, dict) else None
    if not isinstance(noted, str) or MASK not in noted:
        return noted
    for path in (study or "", lock.study_file):
        if path.endswith(".toml") and Path(path).is_file():
            given = load_study(Path(path)).run.storage
            if given is not None and same_when_masked(noted, given):
                return given
    raise StoreError(
        f"run.storage: the password of {noted} is in the study file alone, which is not at "
        f"{lock.study_file}. Give the study file's path instead of the study's name."
    )


def _rebuild(store: StudyFolder, study: str | None) -> list[str]:
    """Make lost records again from the database, and a faulty database from the records.

    Returns:
        What was done, as sentences.

    Raises:
        StoreError: A trial is neither in the records nor in the database.
    """
    lock = store.load_lock()
    assert lock is not None
    url = _storage_of(lock, study)
    facts = _facts(store, lock, read_records(store), url)
    made = _lost_records(facts, store.path)
    done = [_save_again(store, record, facts.records.bad[record.number]) for record in made]
    good = {**facts.records.good, **{record.number: record for record in made}}
    records = [good[number] for number in sorted(good)]
    if facts.trials is not None and not facts.search.differences(records, facts.trials):
        return [*done, "" if done else f"{DATABASE} fits the records: nothing was to be done."]
    return [*done, _new_database(store, lock, facts.search, records, url)]


def _lost_records(facts: _Facts, folder: Path) -> list[TrialRecord]:
    """Return a record for every trial that has none which can be used."""
    found, lost = [], {}
    for number, problem in sorted(facts.records.bad.items()):
        trials = facts.trials or ()
        try:
            found.append(facts.search.record_of(trials[number]))
        except (IndexError, KeyError, TypeError, ValueError):
            lost[number] = problem
    if lost:
        names = ", ".join(f"trials/{number:04d}/{TRIAL_FILE} {lost[number]}" for number in lost)
        why = facts.problem.partition(". ")[0] or f"{DATABASE} does not have them either"
        raise StoreError(
            f"{folder}: {names}, and {why}. Nothing was changed. Bring one of the two back from a copy: "
            "without it the search cannot go on. Adapters of the other trials are still in trials."
        )
    return found


def _save_again(store: StudyFolder, record: TrialRecord, problem: str) -> str:
    """Write a record that was made again, a damaged one put aside; return a sentence on it."""
    path = store.trial_folder(record.number) / TRIAL_FILE
    aside = ""
    if os.path.lexists(path):
        number = 1
        while os.path.lexists(to := path.with_name(f"{TRIAL_FILE}.damaged-{number}")):
            number += 1
        os.replace(path, to)
        aside = f" The damaged one is {to.name} beside it."
    store.save_trial(record)
    again = " The next run trains it again." if record.state.value == "running" else ""
    where = path.relative_to(store.path)
    return f"{where} {problem}: made again from the database.{again}{aside}"


def _new_database(
    store: StudyFolder,
    lock: StudyLock,
    search: "SearchRecord",
    records: Sequence[TrialRecord],
    url: str | None,
) -> str:
    """Make the database anew from the records; return a sentence on it."""
    from lora_tune.search.ladder import num_counted

    wanted = lock.study_plan.num_trials if lock.study_plan is not None else None
    all_begun = wanted is not None and num_counted(records) >= wanted
    is_over = all_begun or (store.path / CONFIRMATION_FILE).exists()

    def fill(new: "optuna.Study") -> None:
        search.fill(new, records, is_over=is_over)

    if url is None:
        from lora_tune.store.database import new_database

        aside = new_database(store.path / DATABASE, name=lock.name, fill=fill)
        left = f" The old one is {aside.name}." if aside is not None else ""
        return f"{DATABASE} was made again from the records of {len(records)} trials.{left}"
    from lora_tune.store.postgres import new_postgres_study

    name = new_postgres_study(
        url, name=lock.name, created=lock.created, folder=store.path, fill=fill
    )
    left = f' The old one is "{name}".' if name is not None else ""
    return (
        f'the study "{lock.name}" on the server was made again from the records of '
        f"{len(records)} trials.{left}"
    )
