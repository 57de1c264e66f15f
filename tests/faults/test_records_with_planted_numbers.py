"""Records with a number that cannot be a result, put there by hand or by a damaged disk: one message.

What a study writes may hold such a number among training readings, as float16 makes them, and it is read
back as it was.
"""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from report_studies import finished_study
from test_planted_numbers import (
    BAD,
    NOT_FINITE,
    PLANTED_STEP,
    REFUSED,
    SHOWN,
    finish,
    make_job,
    planted,
    splits,  # noqa: F401  # the fixture
    spoiled_record,
)

from lora_tune.commands.report import report
from lora_tune.engine.base import load_base_model
from lora_tune.errors import StoreError
from lora_tune.records import StudySnapshot, TrialState
from lora_tune.store.folder import StudyFolder

LITERALS = ("NaN", "Infinity", "-Infinity", "1e999", '"nan"', '"-inf"')


def written(study: StudySnapshot, folder: Path) -> StudyFolder:
    assert study.confirmation is not None
    store = StudyFolder(folder)
    store.save_lock(study.lock)
    for trial in study.trials:
        store.save_trial(trial)
    store.save_confirmation(study.confirmation)
    store.save_runtime(study.wall_s)
    return store


def same(found: object, wanted: object) -> bool:
    return repr(found) == repr(wanted)  # a NaN does not equal itself


@pytest.mark.parametrize("value", NOT_FINITE)
@pytest.mark.parametrize("place", SHOWN)
def test_training_readings_come_back_as_they_were(tmp_path: Path, place: str, value: float) -> None:
    study = spoiled_record(place, value)
    found = written(study, tmp_path).snapshot()
    assert same(found.trials, study.trials)
    texts = [path.read_text() for path in tmp_path.glob("trials/*/trial.json")]

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    for text in texts:
        json.loads(text, parse_constant=refuse)
    assert sum('"NaN"' in text or 'Infinity"' in text for text in texts) == 1


@pytest.mark.parametrize("value", NOT_FINITE)
@pytest.mark.parametrize("place", REFUSED)
def test_a_result_that_cannot_be_one_is_refused_when_it_is_read(
    tmp_path: Path, place: str, value: float
) -> None:
    store = written(spoiled_record(place, value), tmp_path)
    with pytest.raises(StoreError) as found:
        store.snapshot()
    message = str(found.value)
    assert message.startswith(str(tmp_path))
    assert "holds what cannot be a result (" in message
    assert "\n" not in message
    with pytest.raises(StoreError, match="holds what cannot be a result"):
        report([str(tmp_path)], output=None, as_json=False)


@pytest.mark.parametrize("literal", LITERALS)
def test_no_way_to_write_such_a_number_by_hand_gets_through(tmp_path: Path, literal: str) -> None:
    store = written(finished_study(), tmp_path)
    path = tmp_path / "trials" / "0003" / "trial.json"
    lines = path.read_text().splitlines()
    [place, *_] = [n for n, line in enumerate(lines) if '"eval_loss":' in line]
    lines[place] = f'   "eval_loss": {literal},'
    path.write_text("\n".join(lines))
    with pytest.raises(StoreError, match=r"0003/trial\.json: holds what cannot be .*eval_loss"):
        store.load_trials()


def test_an_overflow_of_float16_leaves_a_study_that_can_be_read(
    tiny_llama: Path,
    tmp_path: Path,
    splits: dict[str, Any],  # noqa: F811
) -> None:
    """The step is left out and training goes on: an ordinary event, whose gradient norm is on record."""
    base = load_base_model(tiny_llama, quantization="none", compute_dtype="float16", device="cpu")
    with planted(base, "gradient", math.inf):
        [outcome] = finish(base, splits, [make_job(BAD)]).values()
    assert outcome.state is TrialState.COMPLETE
    assert not math.isfinite(outcome.points[PLANTED_STEP - 1].grad_norm)
    study = finished_study()
    first = replace(study.trials[0].rungs[0], points=outcome.points)
    trial = replace(study.trials[0], rungs=(first, *study.trials[0].rungs[1:]))
    store = StudyFolder(tmp_path)
    store.save_trial(trial)
    assert same(store.load_trial(0), trial)
