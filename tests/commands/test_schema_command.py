"""``lora-tune schema``: an independent validator accepts and refuses what the loader accepts and refuses."""

import copy
import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from lora_tune.commands.schema import schema
from lora_tune.errors import StudyFileError
from lora_tune.study.loader import validate_study
from lora_tune.study.schema import schema_text, study_schema
from lora_tune.study.spec import StudySpec

ROOT = Path(__file__).parents[2]
STUDIES = sorted((ROOT / "studies").glob("*.toml"))
SMALL: dict[str, Any] = {"model": {"base": "m"}, "data": {"train": "rows.jsonl"}}


def errors_of(values: dict[str, Any]) -> list[str]:
    """Return where the validator finds faults, as dotted keys."""
    found = Draft202012Validator(study_schema()).iter_errors(values)
    return sorted(".".join(map(str, error.absolute_path)) for error in found)


def changed(section: str, key: str, value: object) -> dict[str, Any]:
    values = copy.deepcopy(SMALL)
    values.setdefault(section, {})[key] = value
    return values


def test_it_is_a_valid_schema_of_the_newest_draft() -> None:
    Draft202012Validator.check_schema(study_schema())
    assert study_schema()["$schema"] == Draft202012Validator.META_SCHEMA["$id"]


def test_the_committed_file_is_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    schema()
    printed = capsys.readouterr().out
    assert printed == schema_text()
    committed = ROOT / "docs" / "study.schema.json"
    assert committed.read_text("utf-8") == printed, (
        "lora-tune schema > docs/study.schema.json writes it anew"
    )


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_example_studies_pass(path: Path) -> None:
    assert errors_of(tomllib.loads(path.read_text("utf-8"))) == []


def test_every_key_is_described_and_has_its_real_default() -> None:
    sections = study_schema()["$defs"]
    seen = 0
    for name, field in StudySpec.model_fields.items():
        declared = field.annotation
        assert declared is not None
        keys = sections[declared.__name__]["properties"]
        assert list(keys) == list(declared.model_fields), name
        for key, found in declared.model_fields.items():
            assert keys[key]["description"].strip(), f"{name}.{key}"
            assert "``" not in keys[key]["description"]
            if not found.is_required() and found.default is not None:
                plain = json.loads(json.dumps(found.default))
                assert keys[key]["default"] == plain, f"{name}.{key}"
            elif not found.is_required():
                assert keys[key]["examples"], f"{name}.{key} is shown by init"
            seen += 1
    assert seen > 45


def test_nothing_speaks_of_null_which_toml_has_not() -> None:
    assert "null" not in schema_text()


@pytest.mark.parametrize(
    ("section", "key", "value", "where"),
    [
        ("space", "rnk", [4], "space"),
        ("space", "rank", ["32"], "space.rank.0"),
        ("space", "rank", [], "space.rank"),
        ("space", "rank", [2048], "space.rank.0"),
        ("space", "learning_rate", [1e-4], "space.learning_rate"),
        ("space", "learning_rate", [1e-4, 1e-3, 1e-2], "space.learning_rate"),
        ("space", "lora_dropout", [1.0], "space.lora_dropout.0"),
        ("model", "quantization", "int8", "model.quantization"),
        ("train", "micro_batch_size", "large", "train.micro_batch_size"),
        ("search", "trials", 0, "search.trials"),
        ("search", "anchors", ["A9"], "search.anchors.0"),
        ("search", "anchors", [{"rnk": 8}], "search.anchors.0"),
        ("select", "seeds", 21, "select.seeds"),
        ("memory", "safety", 1.5, "memory.safety"),
        ("run", "trackers", ["comet"], "run.trackers.0"),
        ("study", "name", "a/b", "study.name"),
        ("data", "max_length", "long", "data.max_length"),
        ("extra", "key", 1, ""),
    ],
)
def test_planted_mistakes_are_refused_where_they_are_and_by_the_loader_too(
    section: str, key: str, value: object, where: str
) -> None:
    values = changed(section, key, value)
    assert where in errors_of(values)
    with pytest.raises(StudyFileError):
        validate_study(values, source=Path("x.toml"))


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("search", "trials", 5),
        ("search", "anchors", ["A1", {"rank": 8, "target_modules": ["q_proj"]}]),
        ("space", "target_modules", ["mlp", ["q_proj", "v_proj"]]),
        ("space", "learning_rate", [1, 2]),
        ("train", "gradient_checkpointing", True),
        ("data", "group", "conversation"),
    ],
)
def test_other_right_values_pass_both(section: str, key: str, value: object) -> None:
    values = changed(section, key, value)
    assert errors_of(values) == []
    validate_study(values, source=Path("x.toml"))


def test_what_has_no_default_is_missed() -> None:
    assert errors_of({"data": {"train": "x"}, "model": {}}) == ["model"]
    assert errors_of({}) == ["", ""]
