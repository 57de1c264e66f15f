"""The timeline of a study: a span for every segment, none over another, also where the study was stopped."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
from test_end_to_end import copy_of
from test_end_to_end import workplace as workplace  # the fixture
from test_going_on import run, stopped

from lora_tune.records import LaneSpan, StudySnapshot
from lora_tune.store.folder import StudyFolder


def spans_of(study: StudySnapshot) -> list[LaneSpan]:
    spans = [result.span for trial in study.trials for result in trial.rungs]
    spans += [run.span for run in study.confirmation.runs] if study.confirmation else []
    assert all(span is not None for span in spans)
    spans += [trial.span for trial in study.trials]  # of those that ended early
    return [span for span in spans if span is not None]


def assert_apart(spans: list[LaneSpan]) -> None:
    assert all(0 < span.began_s < span.ended_s for span in spans)
    for slot in {span.slot for span in spans}:
        own = sorted((span.began_s, span.ended_s) for span in spans if span.slot == slot)
        assert all(before[1] <= after[0] for before, after in pairwise(own))


def test_every_segment_has_a_span_and_the_confirmation_follows_the_search(
    workplace: Path, tmp_path: Path
) -> None:
    study = run(copy_of(workplace, tmp_path / "run"))
    spans = spans_of(study)
    assert_apart(spans)
    assert {span.slot for span in spans} == {0, 1}  # run.lanes is 2
    assert max(span.ended_s for span in spans) < study.wall_s
    assert study.confirmation is not None
    search_end = max(r.span.ended_s for t in study.trials for r in t.rungs if r.span is not None)
    assert all(r.span is not None and r.span.began_s >= search_end for r in study.confirmation.runs)


@pytest.mark.parametrize("killed", [False, True])
def test_the_spans_of_a_study_that_goes_on_lie_after_the_earlier_ones(
    workplace: Path, tmp_path: Path, killed: bool
) -> None:
    folder = copy_of(workplace, tmp_path / "run")
    stopped(folder, lambda state: state.trials_done >= 2, trials="6")
    store = StudyFolder(folder / "reports" / "going")
    if killed:  # between a record and the time of the run
        (store.path / "runtime.json").write_text(json.dumps({"wall_s": 0.0}))
    before = spans_of(store.snapshot())
    assert before
    study = run(folder, trials="6")
    after = [span for span in spans_of(study) if span not in before]
    assert len(spans_of(study)) == len(before) + len(after)
    assert_apart(spans_of(study))
    assert max(span.ended_s for span in before) <= min(span.began_s for span in after)


def test_the_lock_knows_the_bytes_of_the_base(workplace: Path, tmp_path: Path) -> None:
    study = run(copy_of(workplace, tmp_path / "run"))
    weights = (workplace / "model" / "model.safetensors").stat().st_size
    assert study.lock.model.base_bytes == pytest.approx(weights, rel=0.05)  # float32, not quantized
