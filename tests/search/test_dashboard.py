"""The study database as optuna-dashboard shows it, beside the records it was told from.

The dashboard's own server is asked over HTTP: its page, and the JSON that the page is drawn from.
"""

import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from urllib.request import urlopen
from wsgiref.simple_server import WSGIRequestHandler, make_server

import optuna
import optuna_dashboard
import pytest
from table_study import Disk, TableExecutor, drive, early, in_order, make_ladder, outcome_of

from lora_tune.records import LaneJob, LaneOutcome, TrialRecord, TrialState
from lora_tune.store.database import open_optuna_study

EARLY = {1: TrialState.DIVERGED, 2: TrialState.INFEASIBLE, 4: TrialState.FAILED}
TOLD_AS = {
    TrialState.COMPLETE: "Complete",
    TrialState.PRUNED: "Complete",  # it finished rung 0, which is all that Optuna is told
    TrialState.CACHED: "Complete",
    TrialState.DIVERGED: "Pruned",
    TrialState.INFEASIBLE: "Pruned",
    TrialState.FAILED: "Fail",
}


class Quiet(WSGIRequestHandler):
    """Answers without a line for every request."""

    def log_message(self, *arguments: object) -> None:
        pass


@dataclass(frozen=True)
class Dashboard:
    """A running dashboard, and the records of the study that it shows."""

    url: str
    records: list[TrialRecord]

    def text(self, path: str) -> str:
        with urlopen(self.url + path, timeout=60) as answer:
            return str(answer.read().decode())

    def study(self) -> dict[str, object]:
        [summary] = json.loads(self.text("/api/studies"))["study_summaries"]
        found = json.loads(self.text(f"/api/studies/{summary['study_id']}"))
        assert isinstance(found, dict)
        return {**found, "name": summary["study_name"]}


def fate(job: LaneJob) -> LaneOutcome:
    """Return how a segment ends: three trials early, the others as the table says."""
    if job.trial in EARLY:
        return early(job, EARLY[job.trial], f"why trial {job.trial} ended")
    return outcome_of(job)


@pytest.fixture(scope="module")
def dashboard(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Dashboard]:
    """The dashboard's server on the database of a finished study without a model."""
    path = tmp_path_factory.mktemp("study") / "study.db"
    disk = Disk()
    study = open_optuna_study(path, name="table", num_records=0)
    ladder = make_ladder(study, disk, half_step=False)
    drive(ladder, TableExecutor(fate=fate))
    ladder.finalists(2)
    storage = optuna.storages.RDBStorage(f"sqlite:///{path}")
    server = make_server("127.0.0.1", 0, optuna_dashboard.wsgi(storage), handler_class=Quiet)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield Dashboard(f"http://127.0.0.1:{server.server_port}", in_order(disk.records.values()))
    server.shutdown()
    thread.join()
    server.server_close()
    storage.engine.dispose()


def attributes(trial: dict[str, object]) -> dict[str, str]:
    """Return a trial's attributes as they are shown: text as it is, numbers as JSON."""
    listed = trial["user_attrs"]
    assert isinstance(listed, list)
    return {entry["key"]: entry["value"] for entry in listed}


def test_the_page_is_served(dashboard: Dashboard) -> None:
    page = dashboard.text("/dashboard")
    assert "<html" in page.lower()
    assert "/static/bundle.js" in page


def test_trials_have_our_numbers_states_and_rung_0_losses(dashboard: Dashboard) -> None:
    found = dashboard.study()
    assert found["name"] == "table"
    trials = found["trials"]
    assert isinstance(trials, list)
    assert [trial["number"] for trial in trials] == [r.number for r in dashboard.records]
    for trial, record in zip(trials, dashboard.records, strict=True):
        assert trial["state"] == TOLD_AS[record.state], record
        if record.rungs:
            assert trial["values"] == [record.rungs[0].eval_loss]


def test_every_attribute_is_a_flat_value_and_says_what_was_trained(dashboard: Dashboard) -> None:
    trials = dashboard.study()["trials"]
    assert isinstance(trials, list)
    for trial, record in zip(trials, dashboard.records, strict=True):
        found = attributes(trial)
        assert not any(value.startswith(("{", "[")) for value in found.values())
        assert found["number"] == str(record.number)
        assert found["origin"] == record.origin
        assert found["trained_rank"] == str(record.config.rank)
        assert float(found["trained_learning_rate"]) == record.config.learning_rate
        assert found["predicted_bytes"] == str(record.predicted_bytes)
        if record.rungs:
            assert found["adapter"] == f"trials/{record.number:04d}/rung-0"
            assert found["peak_bytes"] == str(record.rungs[0].peak_bytes)


def test_trials_that_ended_early_say_why(dashboard: Dashboard) -> None:
    trials = dashboard.study()["trials"]
    assert isinstance(trials, list)
    for number, state in EARLY.items():
        found = attributes(trials[number])
        assert found["state"] == state
        assert found["reason"] == f"why trial {number} ended"
        assert "adapter" not in found
