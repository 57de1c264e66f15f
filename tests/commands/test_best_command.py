"""``lora-tune best``: what it prints can be pasted, and its object is flat, plain and the record's."""

import json
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
from report_studies import (
    confirmed_study,
    finished_study,
    fruitless_study,
    half_confirmed_study,
    older_study,
    unfinished_study,
)

from lora_tune.commands.best import best
from lora_tune.errors import AllTrialsFailedError
from lora_tune.records import StudySnapshot
from lora_tune.store.folder import ADAPTER_FOLDER, StudyFolder
from lora_tune.study.loader import validate_study


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in an empty folder, on a wide plain console."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path


def save(study: StudySnapshot, *, adapter: bool = True) -> None:
    """Write the records of a study below reports/, as a run does."""
    folder = StudyFolder(Path("reports") / study.lock.name)
    folder.path.mkdir(parents=True)
    folder.save_lock(study.lock)
    for trial in study.trials:
        folder.save_trial(trial)
    if study.confirmation is not None:
        folder.save_confirmation(study.confirmation)
    if study.behaviour is not None:
        folder.save_behaviour(study.behaviour)
    if adapter:
        (folder.path / ADAPTER_FOLDER).mkdir()
        (folder.path / ADAPTER_FOLDER / "adapter_model.safetensors").write_bytes(b"weights")


def best_of(capsys: pytest.CaptureFixture[str]) -> dict[str, object]:
    best(None, as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert isinstance(found, dict)
    return found


def text_of(capsys: pytest.CaptureFixture[str]) -> str:
    best(None, as_json=False)
    return capsys.readouterr().out


def test_the_object_is_flat_and_its_values_are_those_of_the_record(
    capsys: pytest.CaptureFixture[str],
) -> None:
    study = finished_study()
    save(study)
    found = best_of(capsys)
    assert study.confirmation is not None
    decision = study.confirmation.decision
    assert decision is not None
    score = next(s for s in decision.scores if s.candidate == decision.chosen)
    config = study.confirmation.candidate(decision.chosen).config
    assert (found["finished"], found["candidate"]) == (True, decision.chosen)
    assert (found["loss"], found["loss_low"], found["loss_high"]) == (
        score.loss,
        score.low,
        score.high,
    )
    assert (found["rank"], found["lora_alpha"]) == (config.rank, config.lora_alpha)
    assert found["learning_rate"] == config.learning_rate
    assert found["verdict"] == decision.verdict.value
    assert found["loss_rows"] == "confirmation"
    assert found["adapter"] == "reports/docstrings/adapter"
    for key, value in found.items():
        flat = isinstance(value, str | int | float | bool | None)
        assert flat or key == "target_modules", key


def test_target_modules_are_the_shortest_names_that_match_no_other_layer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    study = finished_study()
    assert study.confirmation is not None
    assert study.confirmation.decision is not None
    config = study.confirmation.candidate(study.confirmation.decision.chosen).config
    trained = config.target_modules
    twins = tuple(name.replace("self_attn.q_proj", "cross_attn.q_proj") for name in trained)
    inside = ["self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj", "mlp.down_proj"]
    last = [name.rpartition(".")[2] for name in inside]
    cases = {
        "alike": ("all-linear", trained, last),
        "twins": ("all-linear", (*trained, *twins), inside),
        "unknown": ("attention", trained, list(trained)),
    }
    for name, (offered, linears, expected) in cases.items():
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        [target_set] = study.lock.target_sets
        target_set = replace(target_set, name=offered, modules=linears)
        save(replace(study, lock=replace(study.lock, target_sets=(target_set,))))
        assert best_of(capsys)["target_modules"] == expected, name
        assert max(map(len, text_of(capsys).partition("\n\n")[0].splitlines())) < 80


def test_the_code_that_loads_it_is_python(capsys: pytest.CaptureFixture[str]) -> None:
    save(finished_study())
    code = best_of(capsys)["load_code"]
    assert isinstance(code, str)
    compile(code, "load.py", "exec")
    assert '"reports/docstrings/adapter"' in code


def test_every_state_of_a_study_has_the_same_keys(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = {}
    makers = (finished_study, older_study, unfinished_study, half_confirmed_study)
    for make in makers:
        (tmp_path / make.__name__).mkdir()
        monkeypatch.chdir(tmp_path / make.__name__)
        save(make())
        seen[make.__name__] = best_of(capsys)
    assert len({tuple(found) for found in seen.values()}) == 1
    assert [found["finished"] for found in seen.values()] == [True, True, False, False]


def test_the_lines_are_an_anchor_of_a_study_file(capsys: pytest.CaptureFixture[str]) -> None:
    save(finished_study())
    text = text_of(capsys)
    settings = tomllib.loads(text.partition("\n\n")[0])
    values = {
        "model": {"base": "m"},
        "data": {"train": "x"},
        "search": {"anchors": [settings]},
    }
    spec = validate_study(values, source=Path("x.toml"))
    [anchor] = spec.search.anchors
    found = best_of(capsys)
    assert (anchor.rank, anchor.lora_alpha) == (found["rank"], found["lora_alpha"])
    assert anchor.learning_rate == pytest.approx(found["learning_rate"], rel=1e-3)
    assert anchor.target_modules == found["target_set"]


def test_loss_verdict_adapter_and_the_next_step_are_named(
    capsys: pytest.CaptureFixture[str],
) -> None:
    save(finished_study())
    text = text_of(capsys)
    assert "Confirmed loss " in text
    assert "than the default" in text
    assert "Adapter: reports/docstrings/adapter" in text
    assert 'Load: model = PeftModel.from_pretrained(base, "reports/docstrings/adapter")' in text
    assert text.endswith("Next: lora-tune export reports/docstrings --to TARGET\n")


def test_a_study_that_still_runs_shows_its_best_so_far(capsys: pytest.CaptureFixture[str]) -> None:
    study = unfinished_study()
    save(study, adapter=False)
    found = best_of(capsys)
    leader = next(t for t in study.trials if t.number == found["trial"])
    assert leader.kept is not None
    assert (found["finished"], found["loss"]) == (False, leader.kept.eval_loss)
    assert found["loss_rows"] == "selection"
    assert found["loss_low"] is found["verdict"] is found["adapter"] is None
    text = text_of(capsys)
    assert text.startswith(f"# docstrings: unfinished, the best so far is trial {found['trial']}\n")
    assert "it is not confirmed on unseen rows yet" in text
    assert text.endswith("Next: lora-tune run studies/docstrings.toml\n")


def test_a_study_without_any_result_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    save(replace(unfinished_study(), trials=()), adapter=False)
    found = best_of(capsys)
    assert found["finished"] is False
    assert found["rank"] is found["loss"] is found["trial"] is found["steps"] is None
    assert text_of(capsys).startswith("Nothing can be recommended yet")


def test_a_default_that_is_no_trial_is_recommended_as_such(
    capsys: pytest.CaptureFixture[str],
) -> None:
    losses = {"trial 3": (2.5, 2.51), "trial 5": (2.3, 2.31)}
    save(confirmed_study(losses))
    found = best_of(capsys)
    assert (found["candidate"], found["is_default"]) == ("trial 5", True)


def test_a_study_in_which_nothing_succeeded_ends_with_its_own_error(
    capsys: pytest.CaptureFixture[str],
) -> None:
    save(fruitless_study(), adapter=False)
    for as_json in (False, True):
        with pytest.raises(AllTrialsFailedError, match="Nothing can be recommended") as caught:
            best(None, as_json=as_json)
        assert caught.value.exit_code == 6
    assert capsys.readouterr().out == ""
