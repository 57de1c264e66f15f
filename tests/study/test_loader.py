"""The study file: what a good one becomes, and that every fault is named where it stands.

Messages that people see most are goldens; a fuzz holds that nothing but a ``StudyFileError`` comes out.
"""

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from lora_tune.errors import StudyFileError
from lora_tune.study.faults import dotted
from lora_tune.study.loader import load_study, validate_study
from lora_tune.study.spec import Section, StudySpec

STUDIES = Path(__file__).parents[2] / "studies"
REQUIRED = """
[model]
base = "smollm2-135m-instruct"
[data]
train = "rows.jsonl"
"""
TRAIN_KEYS = (
    "cooldown_ratio, effective_batch_size, epochs, gradient_checkpointing, max_grad_norm, max_steps, "
    "micro_batch_size, optimizer, warmup_ratio, weight_decay"
)
SECTIONS = "data, memory, model, run, search, select, space, study, train"


def write(folder: Path, text: str, name: str = "sweep.toml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def message_of(path: Path) -> str:
    with pytest.raises(StudyFileError) as caught:
        load_study(path)
    assert caught.value.exit_code == 3
    return str(caught.value)


def faults_of(folder: Path, text: str) -> list[tuple[int, str]]:
    """Return what each line of the message says after the file's name: a line in it, or 0, and a fault."""
    path = write(folder, text)
    found = []
    for line in message_of(path).split("\n"):
        match = re.fullmatch(rf"{re.escape(str(path))}(?::(\d+))?: (.+)", line)
        assert match, line
        found.append((int(match[1] or 0), match[2]))
    return found


def test_two_keys_make_a_study(tmp_path: Path) -> None:
    spec = load_study(write(tmp_path, REQUIRED))
    assert spec.model.base == "smollm2-135m-instruct"
    assert spec.data.train == "rows.jsonl"


def test_all_other_values_are_the_declared_defaults(tmp_path: Path) -> None:
    spec = load_study(write(tmp_path, REQUIRED))
    for section_name in StudySpec.model_fields:
        section = getattr(spec, section_name)
        for key, field in type(section).model_fields.items():
            if (section_name, key) in {("model", "base"), ("data", "train"), ("study", "name")}:
                continue
            assert getattr(section, key) == field.get_default(), f"{section_name}.{key}"


def test_the_defaults_that_a_user_is_promised(tmp_path: Path) -> None:
    spec = load_study(write(tmp_path, REQUIRED))
    assert spec.model.quantization == "nf4"
    assert spec.space.rank == (4, 8, 16, 32, 64, 128)
    assert spec.space.alpha_ratio == (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
    assert spec.space.target_modules == ("attention-qv", "attention", "mlp", "all-linear")
    assert spec.search.trials == "auto"
    assert spec.search.anchors == ("A1", "A2", "A3", "A4", "A5", "A6")
    assert spec.select.seeds == "auto"
    assert spec.search.rungs == (0.125, 0.5, 1.0)
    assert spec.run.lanes == "auto"
    assert spec.study.output == "reports"


def test_a_study_is_named_after_its_file_unless_it_names_itself(tmp_path: Path) -> None:
    assert load_study(write(tmp_path, REQUIRED, "my-sweep.v2.toml")).study.name == "my-sweep.v2"
    named = '[study]\nname = "other"\n' + REQUIRED
    assert load_study(write(tmp_path, named)).study.name == "other"
    assert load_study(write(tmp_path, REQUIRED, "my sweep (2).toml")).study.name == "my-sweep-2"
    assert load_study(write(tmp_path, REQUIRED, ".toml")).study.name == "toml"
    assert load_study(write(tmp_path, REQUIRED, "(?).toml")).study.name == "study"
    empty = '[study]\nname = ""\nseed = 3\n' + REQUIRED
    assert load_study(write(tmp_path, empty)).study.name == "sweep"


def test_a_spec_cannot_be_changed(tmp_path: Path) -> None:
    spec = load_study(write(tmp_path, REQUIRED))
    with pytest.raises(ValidationError, match="frozen"):
        spec.train.epochs = 3.0


@pytest.mark.parametrize("path", sorted(STUDIES.glob("*.toml")), ids=lambda path: path.name)
def test_every_example_study_loads_and_says_only_what_it_has_to(path: Path) -> None:
    spec = load_study(path)
    assert spec.study.name == path.stem
    given_values = tomllib.loads(path.read_text(encoding="utf-8"))
    for section, keys in given_values.items():
        assert keys.keys() <= type(getattr(spec, section)).model_fields.keys()


def test_there_is_an_example_study() -> None:
    assert list(STUDIES.glob("*.toml"))


def test_values_of_all_kinds_are_read_as_written(tmp_path: Path) -> None:
    text = REQUIRED + (
        "[train]\nmicro_batch_size = 4\ngradient_checkpointing = false\nmax_steps = 200\n"
        '[space]\nrank = [8]\nlora_alpha = 32\ntarget_modules = ["mlp", ["q_proj", "v_proj"]]\n'
        "learning_rate = [1e-4, 1e-3]\n"
        "[run]\nlanes = 4\n"
    )
    spec = load_study(write(tmp_path, text))
    assert (spec.train.micro_batch_size, spec.train.gradient_checkpointing) == (4, False)
    assert spec.space.target_modules == ("mlp", ("q_proj", "v_proj"))
    assert (spec.space.lora_alpha, spec.run.lanes) == (32.0, 4)


# Goldens: one fault, one line.


@pytest.mark.parametrize(
    ("text", "line", "fault"),
    [
        (
            '[space]\nrank = [8, 16, "32"]',
            2,
            'space.rank[2] is "32" (text); it should be a whole number from 1 to 1024. Write 32 '
            'without quotes.',
        ),
        (
            "[space]\nrank = [0]",
            2,
            "space.rank[0] is 0 (a whole number); it should be a whole number from 1 to 1024.",
        ),
        (
            "[space]\nrank = 8",
            2,
            "space.rank is 8 (a whole number); it should be a list, each value a whole number "
            "from 1 to 1024. Write [8].",
        ),
        (
            "[space]\nrank = []",
            2,
            "space.rank is [] (a list); it should be a list with at least one value.",
        ),
        (
            "[train]\nmax_steps = 2.5",
            2,
            "train.max_steps is 2.5 (a number); it should be a whole number from 1 to 10_000_000.",
        ),
        (
            '[train]\nmax_steps = "10"',
            2,
            'train.max_steps is "10" (text); it should be a whole number from 1 to 10_000_000. '
            'Write 10 without quotes.',
        ),
        (
            "[train]\nmax_steps = 0",
            2,
            "train.max_steps is 0 (a whole number); it should be a whole number from 1 to 10_000_000.",
        ),
        (
            '[train]\nepochs = "two"',
            2,
            'train.epochs is "two" (text); it should be a number above 0, at most 10000.',
        ),
        (
            "[train]\nepochs = inf",
            2,
            "train.epochs is inf (a number); it should be a number above 0, at most 10000.",
        ),
        (
            "[train]\nepochs = nan",
            2,
            "train.epochs is nan (a number); it should be a number above 0, at most 10000.",
        ),
        (
            "[train]\nepochs = 0",
            2,
            "train.epochs is 0 (a whole number); it should be a number above 0, at most 10000.",
        ),
        (
            "[space]\nlora_dropout = [0.0, 1.0]",
            2,
            "space.lora_dropout[1] is 1.0 (a number); it should be a number from 0, below 1.",
        ),
        (
            "[space]\nlora_dropout = 0.1",
            2,
            "space.lora_dropout is 0.1 (a number); it should be a list, each value a number from "
            "0, below 1. Write [0.1].",
        ),
        (
            "[space]\ntarget_modules = []",
            2,
            "space.target_modules is [] (a list); it should be a list with at least one value.",
        ),
        (
            '[space]\ntarget_modules = ["mlp", 3]',
            2,
            "space.target_modules[1] is 3 (a whole number); it should be text or a list, each "
            "value text.",
        ),
        (
            "[space]\nlearning_rate = [1e-4]",
            2,
            "space.learning_rate is [0.0001] (a list); it should be [lowest, highest], each a "
            "number from 1e-12 to 1000.",
        ),
        (
            "[space]\nlearning_rate = [1e-3, 1e-4]",
            2,
            "space.learning_rate is [0.001, 0.0001], which is [highest, lowest]; write [0.0001, 0.001].",
        ),
        (
            "[space]\nlora_alpha = 32\nalpha_ratio = [1.0]",
            3,
            "space: give alpha_ratio or lora_alpha, not both.",
        ),
        (
            '[run]\nlanes = "many"',
            2,
            'run.lanes is "many" (text); it should be "auto" or a whole number from 1 to 256.',
        ),
        (
            "[run]\nlanes = 0",
            2,
            'run.lanes is 0 (a whole number); it should be "auto" or a whole number from 1 to 256.',
        ),
        (
            '[train]\ngradient_checkpointing = "maybe"',
            2,
            'train.gradient_checkpointing is "maybe" (text); it should be "auto", true or false.',
        ),
        (
            "[train]\nmicro_batch_size = 3",
            2,
            "train.micro_batch_size 3 does not divide effective_batch_size 16; the passes of a "
            "step are of equal size.",
        ),
        (
            "[search]\nrungs = [0.5]",
            2,
            "search.rungs are [0.5]; they must rise and end with 1.0, such as [0.25, 0.5, 1.0].",
        ),
        (
            "[search]\nrungs = [0.5, 0.25, 1.0]",
            2,
            "search.rungs are [0.5, 0.25, 1.0]; they must rise and end with 1.0, such as [0.25, "
            "0.5, 1.0].",
        ),
        (
            '[search]\nsampler = "cma"',
            2,
            'search.sampler is "cma" (text); it should be "tpe", "gp", "random" or "grid".',
        ),
        (
            '[search]\nanchors = ["A7"]',
            2,
            'search.anchors[0] is "A7" (text); it should be "A1", "A2", "A3", "A4", "A5", "A6" '
            'or a table.',
        ),
        (
            '[search]\nanchors = ["A1", {rnk = 8}]',
            2,
            "unknown key search.anchors[1].rnk; did you mean rank? Known: learning_rate, "
            "lora_alpha, lora_dropout, rank, target_modules.",
        ),
        (
            "[study]\nseed = -1",
            2,
            "study.seed is -1 (a whole number); it should be a whole number from 0, below "
            "2_147_483_648.",
        ),
        (
            "[study]\nseed = true",
            2,
            "study.seed is true (true/false); it should be a whole number from 0, below 2_147_483_648.",
        ),
        (
            "[study]\nseed = 2026-01-15",
            2,
            "study.seed is 2026-01-15 (a date); it should be a whole number from 0, below "
            "2_147_483_648.",
        ),
        (
            '[study]\nname = "a/b"',
            2,
            'study.name is "a/b" (text); it should be letters, digits, _, . and -, at most 100, '
            'beginning with a letter, a digit or _.',
        ),
        (
            "[study]\nname = 0",
            2,
            "study.name is 0 (a whole number); it should be text.",
        ),
        (
            "[memory]\ngpu = 24",
            2,
            "memory.gpu is 24 (a whole number); it should be text.",
        ),
        (
            "[train]\nepoch = 2",
            2,
            f"unknown key train.epoch; did you mean epochs? Known: {TRAIN_KEYS}.",
        ),
        (
            "[train]\nzzz = 2",
            2,
            f"unknown key train.zzz. Known: {TRAIN_KEYS}.",
        ),
        (
            "[train]\nweight-decay = 0.1",
            2,
            f"unknown key train.weight-decay; did you mean weight_decay? Known: {TRAIN_KEYS}.",
        ),
        (
            "[train]\nint = 2",
            2,
            f"unknown key train.int. Known: {TRAIN_KEYS}.",
        ),
        (
            '[train]\n"epochs[0]" = 2',
            2,
            f'unknown key train."epochs[0]"; did you mean epochs? Known: {TRAIN_KEYS}.',
        ),
        (
            "[spaces]\nrank = [8]",
            1,
            f"unknown key spaces; did you mean space? Known: {SECTIONS}.",
        ),
        (
            "[tpu]",
            1,
            f"unknown key tpu. Known: {SECTIONS}.",
        ),
    ],
)  # fmt: skip
def test_one_fault_is_one_line(tmp_path: Path, text: str, line: int, fault: str) -> None:
    assert faults_of(tmp_path, f"{text}\n{REQUIRED}") == [(line, fault)]


@pytest.mark.parametrize(
    ("text", "faults"),
    [
        (
            "",
            [
                (0, "model.base is missing and has no default. Add it below [model]."),
                (0, "data.train is missing and has no default. Add it below [data]."),
            ],
        ),
        (
            "[data]\ntrain = 'x'",
            [(0, "model.base is missing and has no default. Add it below [model].")],
        ),
        (
            "[model]\n[data]\n",
            [
                (1, "model.base is missing and has no default. Add it below [model]."),
                (2, "data.train is missing and has no default. Add it below [data]."),
            ],
        ),
        (
            "model = 'x'\n[data]\ntrain = ''",
            [
                (1, 'model is "x" (text); it should be a section.'),
                (3, 'data.train is "" (text); it should be text that is not empty.'),
            ],
        ),
    ],
)
def test_what_is_missing_is_named(tmp_path: Path, text: str, faults: list[tuple[int, str]]) -> None:
    assert faults_of(tmp_path, text) == faults


def test_all_faults_come_in_one_message_in_the_order_of_the_file(tmp_path: Path) -> None:
    text = (
        "[train]\nepoch = 1\nmax_steps = 0\nmax-steps = 4\n"
        "[model]\nquantization = 'int8'\n[data]\ntrain = 'x'\n"
        "[space]\nrank = [8,\n  0,\n  4096]\nlora_dropout = [0.5, 2]\n[run]\nlanes = 'all'\n"
    )
    assert faults_of(tmp_path, text) == [
        (2, f"unknown key train.epoch; did you mean epochs? Known: {TRAIN_KEYS}."),
        (
            3,
            "train.max_steps is 0 (a whole number); it should be a whole number from 1 to 10_000_000.",
        ),
        (4, f"unknown key train.max-steps; did you mean max_steps? Known: {TRAIN_KEYS}."),
        (5, "model.base is missing and has no default. Add it below [model]."),
        (6, 'model.quantization is "int8" (text); it should be "nf4" or "none".'),
        (11, "space.rank[1] is 0 (a whole number); it should be a whole number from 1 to 1024."),
        (12, "space.rank[2] is 4096 (a whole number); it should be a whole number from 1 to 1024."),
        (13, "space.lora_dropout[1] is 2 (a whole number); it should be a number from 0, below 1."),
        (15, 'run.lanes is "all" (text); it should be "auto" or a whole number from 1 to 256.'),
    ]


def test_of_very_many_faults_the_first_are_shown_and_the_others_counted(tmp_path: Path) -> None:
    text = "[train]\n" + "".join(f"key_{n} = 1\n" for n in range(500))
    *first, last = faults_of(tmp_path, text)
    assert [line for line, _ in first] == [0, 0, *range(2, 20)]
    assert last == (0, "and 482 more faults like these.")


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    path = tmp_path / "nothing.toml"
    assert message_of(path) == (
        f"{path}: no such study file. Give the path of a .toml file, e.g. studies/quickstart.toml."
    )


def test_a_file_that_is_not_toml(tmp_path: Path) -> None:
    path = write(tmp_path, "[model]\nbase = smollm2\n")
    assert message_of(path) == (
        f"{path}:2: not valid TOML: base = smollm2 | Text needs quotes; numbers, true and false have none, "
        "and each key needs a value."
    )


def test_a_key_given_twice(tmp_path: Path) -> None:
    path = write(tmp_path, '[model]\nbase = "a"\nbase = "b"\n')
    assert message_of(path) == (
        f'{path}:3: not valid TOML: base = "b" | The key is there twice: keep one.'
    )


def test_a_file_that_is_not_text(tmp_path: Path) -> None:
    path = tmp_path / "weights.toml"
    path.write_bytes(b"\xff\xfe\x00")
    assert message_of(path) == f"{path}: UTF-16 text; save it as UTF-8."


def test_a_folder_is_not_a_study_file(tmp_path: Path) -> None:
    assert message_of(tmp_path) == f"{tmp_path}: a folder; name the study file in it."


# Fuzz: one value of a valid study replaced, or one key added.

VALID: dict[str, dict[str, Any]] = {
    "study": {"name": "sweep", "seed": 1, "output": "reports"},
    "model": {"base": "m", "revision": "main", "quantization": "nf4", "compute_dtype": "auto"},
    "data": {"train": "rows.jsonl", "max_length": 64, "selection_rows": 8},
    "train": {"epochs": 1.0, "micro_batch_size": 4, "gradient_checkpointing": "auto"},
    "space": {"rank": [8, 16], "target_modules": ["mlp", ["q_proj"]], "learning_rate": [1e-4, 1e-3]},
    "search": {"trials": 8, "rungs": [0.5, 1.0], "anchors": ["A1", {"rank": 8}]},
    "memory": {"gpu": "24GiB", "safety": 0.9},
    "select": {"practical_margin": 0.01},
    "run": {"lanes": 2, "device": "cpu"},
}  # fmt: skip
PLACES = [(section, key) for section, keys in VALID.items() for key in keys]
json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=6)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=5,
)
odd_words = st.one_of(
    st.text(max_size=8),
    st.sampled_from(["int", "str", "rank", "max-steps", "a.b", "lanes[0]", "literal['auto']", "["]),
)


def with_value(section: str, key: str | None, value: object) -> dict[str, Any]:
    values: dict[str, Any] = {name: dict(keys) for name, keys in VALID.items()}
    if key is None:
        values[section] = value
    else:
        values[section] = {**values.get(section, {}), key: value}
    return values


def check_refusal(values: dict[str, Any]) -> None:
    """Validate; a refusal must name the file in every line and be readable."""
    try:
        assert isinstance(validate_study(values, source=Path("studies/fuzz.toml")), Section)
        return
    except StudyFileError as error:
        message = str(error)
    assert message.startswith("studies/fuzz.toml: ")
    assert all(message.removeprefix("studies/fuzz.toml: ").split("\nstudies/fuzz.toml: "))
    assert "should" not in message or "it should be " in message
    assert "Input should" not in message


def test_the_study_that_is_fuzzed_is_valid() -> None:
    validate_study(VALID, source=Path("fuzz.toml"))


@settings(max_examples=300, deadline=None)
@given(place=st.sampled_from(PLACES), value=json_values)
def test_any_value_in_place_of_another_is_taken_or_refused(
    place: tuple[str, str], value: object
) -> None:
    check_refusal(with_value(*place, value))


@settings(max_examples=150, deadline=None)
@given(section=st.sampled_from(sorted(VALID)), value=json_values)
def test_any_value_in_place_of_a_section_is_taken_or_refused(section: str, value: object) -> None:
    check_refusal(with_value(section, None, value))


@settings(max_examples=200, deadline=None)
@given(section=st.sampled_from(sorted(VALID)), key=odd_words, value=json_values)
def test_a_key_that_does_not_exist_is_always_refused_under_its_own_name(
    section: str, key: str, value: object
) -> None:
    if key in type(getattr(validate_study(VALID, source=Path("x")), section)).model_fields:
        return
    with pytest.raises(StudyFileError) as caught:
        validate_study(with_value(section, key, value), source=Path("studies/fuzz.toml"))
    assert f"studies/fuzz.toml: unknown key {dotted((section, key))}" in str(caught.value)
