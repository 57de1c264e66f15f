"""Text metrics against worked examples and another implementation, and how a user's own function is taken in.

ROUGE-L: the examples of Lin 2004, numbers that the package rouge-score 0.1.2 gave, and the textbook table for
the common subsequence. A function of one's own is a real module in a folder.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_tune.errors import StudyFileError
from lora_tune.metrics import (
    METRICS,
    Answer,
    check_metrics,
    exact_match,
    resolve_metrics,
    rouge_l,
    score_answers,
)


@pytest.mark.parametrize(
    ("reference", "prediction", "value"),
    [
        ("Paris", "Paris", 1.0),
        ("Paris", " \n Paris\t", 1.0),
        ("\u00a0Paris\n", "Paris", 1.0),  # Unicode's whitespace too
        ("Paris", "paris", 0.0),
        ("Paris", "Paris.", 0.0),
        ("a b", "a  b", 0.0),
        ("Paris", "", 0.0),
    ],
)
def test_exact_match_forgives_whitespace_at_the_ends_alone(reference, prediction, value) -> None:
    assert exact_match("Capital of France?", reference, prediction) == value


@pytest.mark.parametrize(
    ("reference", "prediction", "value"),
    [
        # Lin 2004, section 3.1: S1 against S2 and S3; S4 shows that it sees order
        ("police killed the gunman", "police kill the gunman", 3 / 4),
        ("police killed the gunman", "the gunman kill police", 2 / 4),
        ("police killed the gunman", "the gunman police killed", 2 / 4),
        # rouge_scorer.RougeScorer(["rougeL"]).score(reference, prediction) of rouge-score 0.1.2
        ("The cat sat on the mat.", "A cat was sitting on the mat, purring.", 0.5714285714285715),
        ("def f(x):\n  return x_1 + 2", "def g(x):\n  return 2 + x_1", 0.7142857142857143),
        ("Paris is the capital of France", "The capital of France is Paris", 0.6666666666666666),
        ("It's 3.5 km; don't run!", "It is 3.5 km - do not run.", 0.625),
        ("yes", "", 0.0),
        ("", "", 0.0),
    ],
)
def test_rouge_l_gives_published_numbers(reference: str, prediction: str, value: float) -> None:
    assert rouge_l("", reference, prediction) == pytest.approx(value, rel=1e-12)


@pytest.mark.parametrize(
    ("reference", "prediction", "value"),
    [
        ("Die Maus l\u00e4uft", "die maus l\u00e4uft", 1.0),
        ("l\u00e4uft", "la\u0308uft", 1.0),  # the same letter, composed and not
        ("\u043a\u043e\u0442 \u0438 \u043f\u0435\u0441", "\u043f\u0435\u0441 \u0438", 2 / 5),
        ("\u6771\u4eac\u90fd", "\u4eac\u90fd", 4 / 5),  # no spaces: letter by letter
        ("\u0939\u093f\u0928\u094d\u0926\u0940", "\u0939\u093f\u0928\u094d\u0926\u0940", 1.0),
    ],
)
def test_rouge_l_reads_words_of_other_scripts(reference, prediction, value: float) -> None:
    assert rouge_l("", reference, prediction) == pytest.approx(value)


def common_subsequence(first: list[str], second: list[str]) -> int:
    """Return its length by the table of all prefixes."""
    table = [[0] * (len(second) + 1) for _ in range(len(first) + 1)]
    for i, a in enumerate(first):
        for j, b in enumerate(second):
            longer = max(table[i][j + 1], table[i + 1][j])
            table[i + 1][j + 1] = table[i][j] + 1 if a == b else longer
    return table[-1][-1]


words = st.lists(st.sampled_from("abcd"), max_size=90)


@given(words, words)
def test_rouge_l_counts_the_longest_common_subsequence(first: list[str], second: list[str]) -> None:
    common = common_subsequence(first, second)
    wanted = 2 * common / (len(first) + len(second)) if common else 0.0
    assert rouge_l("", " ".join(first), " ".join(second)) == pytest.approx(wanted)


@pytest.mark.parametrize("name", METRICS)
@given(text=st.text(), other=st.text())
def test_every_metric_is_a_share_and_whole_for_equal_texts(name: str, text: str, other) -> None:
    metric = METRICS[name]
    assert 0 <= metric("", text, other) <= 1
    assert metric("", text, text) == 1 or (name == "rouge-l" and rouge_l("", text, text) == 0)


# Scoring.

ANSWERS = [Answer("p", "yes", "yes"), Answer("p", "no", "yes"), Answer("p", "no", " no ")]


def test_values_are_row_by_row() -> None:
    found = score_answers("exact-match", exact_match, ANSWERS)
    assert (found.metric, found.values, found.reason) == ("exact-match", (1.0, 0.0, 1.0), "")
    assert found.mean == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("returned", "value"), [(True, 1.0), (2, 2.0), (np.float32(0.5), 0.5), (np.array(3), 3.0)]
)
def test_a_function_may_return_any_kind_of_number(returned: object, value: float) -> None:
    found = score_answers("own:f", lambda *texts: returned, ANSWERS)
    assert found.values == (value,) * 3


@pytest.mark.parametrize("returned", [None, "0.5", float("nan"), float("inf"), [1.0], 10**400])
def test_what_is_no_finite_number_makes_the_reason(returned: object) -> None:
    found = score_answers("own:f", lambda p, r, a: 1.0 if r == "yes" else returned, ANSWERS)
    assert (found.values, found.mean) == ((), None)
    assert found.reason.startswith("row 2: the value is ")
    assert found.reason.endswith(", which is no finite number")
    assert len(found.reason) < 150


def test_an_error_of_a_function_makes_the_reason_with_its_line() -> None:
    def divide(prompt: str, reference: str, prediction: str) -> float:
        return 1 / (len(reference) - 2)

    found = score_answers("own:divide", divide, ANSWERS)
    line = divide.__code__.co_firstlineno + 1
    assert found.values == ()
    assert found.reason == (
        f"row 2: ZeroDivisionError: division by zero (test_metrics.py, line {line})"
    )


def test_a_function_that_leaves_the_program_does_not_end_it() -> None:
    found = score_answers("own:f", lambda *texts: sys.exit("enough"), ANSWERS)
    assert found.reason.startswith("row 1: SystemExit: enough")


def test_an_interrupt_is_not_held_up() -> None:
    def interrupted(*texts: str) -> float:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score_answers("own:f", interrupted, ANSWERS)


# Names and the user's own functions.


@pytest.fixture(autouse=True)
def modules_as_before() -> Iterator[None]:
    """Forget modules and paths that a test brings in."""
    path, modules = list(sys.path), set(sys.modules)
    yield
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        del sys.modules[name]


def write(folder: Path, name: str, text: str) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text, encoding="utf-8")


def refusal(names: tuple[str, ...], folder: Path, *, allow_code: bool = True) -> str:
    with pytest.raises(StudyFileError) as caught:
        resolve_metrics(names, allow_code=allow_code, base_dir=folder)
    return str(caught.value)


def test_built_in_metrics_need_no_permission(tmp_path: Path) -> None:
    names = ("rouge-l", "exact-match")
    found = resolve_metrics(names, allow_code=False, base_dir=tmp_path)
    assert found == {"rouge-l": rouge_l, "exact-match": exact_match}
    assert list(found) == list(names)
    assert resolve_metrics((), allow_code=False, base_dir=tmp_path) == {}


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            ("rouge-l", "exact_match"),
            'select.metrics[1] is "exact_match", which is no metric; did you mean exact-match? Known: '
            "exact-match, rouge-l; or a function of your own as module:function.",
        ),
        (
            ("bleu",),
            'select.metrics[0] is "bleu", which is no metric. Known: exact-match, rouge-l; or a function of '
            "your own as module:function.",
        ),
        (
            ("../own.py:score",),
            'select.metrics[0] is "../own.py:score", which is no metric. Known: exact-match, rouge-l; or a '
            "function of your own as module:function.",
        ),
        (
            ("rouge-l", "rouge-l"),
            'select.metrics[1] is "rouge-l", which is there already. Name each metric once.',
        ),
    ],
)
def test_a_name_that_is_no_metric_is_refused(names, message: str, tmp_path: Path) -> None:
    assert refusal(names, tmp_path, allow_code=True) == message
    assert refusal(names, tmp_path, allow_code=False) == message


def test_without_permission_no_code_of_the_user_runs(tmp_path: Path) -> None:
    write(tmp_path, "own_touch.py", "open('touched', 'w')\ndef score(p, r, a): return 1.0\n")
    assert refusal(("own_touch:score",), tmp_path, allow_code=False) == (
        'select.metrics[0] is "own_touch:score": a function of your own is code that runs with your rights. '
        "Look at it, then add --allow-code to the command, or take it out of select.metrics."
    )
    assert "own_touch" not in sys.modules
    with pytest.raises(StudyFileError, match="--allow-code"):
        check_metrics(["own_touch:score"], allow_code=False)


def test_a_function_beside_the_study_file_is_found(tmp_path: Path) -> None:
    write(tmp_path, "own_length.py", "def score(p, r, a):\n    return len(a) - len(r)\n")
    found = resolve_metrics(["own_length:score"], allow_code=True, base_dir=tmp_path)
    answers = [Answer("p", "four", "seventh")]
    assert score_answers("x", found["own_length:score"], answers).values == (3.0,)


def test_a_package_and_its_neighbours_are_found_also_when_imported_late(tmp_path: Path) -> None:
    write(tmp_path, "own_pack/__init__.py", "")
    write(
        tmp_path,
        "own_pack/inner.py",
        "def score(p, r, a):\n    import own_neighbour\n    return own_neighbour.VALUE\n",
    )
    write(tmp_path, "own_neighbour.py", "VALUE = 0.25\n")
    write(tmp_path, "json.py", "raise RuntimeError('shadows the library')\n")
    found = resolve_metrics(["own_pack.inner:score"], allow_code=True, base_dir=tmp_path)
    result = score_answers("x", found["own_pack.inner:score"], ANSWERS)
    assert (result.values, result.reason) == ((0.25,) * 3, "")
    assert sys.path[0] != str(tmp_path)  # libraries imported from now on are not shadowed


def test_a_function_of_an_installed_package_is_found(tmp_path: Path) -> None:
    [function] = resolve_metrics(
        ["lora_tune.metrics:rouge_l"], allow_code=True, base_dir=tmp_path
    ).values()
    assert function is rouge_l


@pytest.mark.parametrize(
    ("text", "name", "message"),
    [
        (None, "own_none:score", "there is no module own_none, neither beside the study file in"),
        ("import own_missing_library", "own_a:score", "own_a needs own_missing_library: No module"),
        ("1 / 0", "own_b:score", "cannot be imported: ZeroDivisionError: division by zero (own_b.py"),
        ("def score(", "own_c:score", "own_c cannot be imported: SyntaxError: '(' was never closed"),
        ("x = 1", "own_d:score", "own_d.py must define a function score, it has none."),
        ("score = 3", "own_e:score", "own_e.py must define a function score, it has a value of type int."),
        (
            "def score(reference, prediction): return 1.0",
            "own_f:score",
            "must take three texts (prompt, reference, prediction): too many positional arguments.",
        ),
    ],
)  # fmt: skip
def test_a_function_that_cannot_be_loaded_is_refused_before_any_training(
    text: str | None, name: str, message: str, tmp_path: Path
) -> None:
    if text is not None:
        write(tmp_path, f"{name.partition(':')[0]}.py", text)
    found = refusal((name,), tmp_path)
    assert found.startswith(f'select.metrics[0] is "{name}"')
    assert message in found
    assert "\n" not in found


def test_a_file_beside_the_study_may_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    write(tmp_path / "elsewhere", "linked_metric.py", "def score(p, r, a): return 1.0\n")
    (tmp_path / "study").mkdir()
    link = tmp_path / "study" / "linked_metric.py"
    link.symlink_to(tmp_path / "elsewhere" / "linked_metric.py")
    found = resolve_metrics(("linked_metric:score",), allow_code=True, base_dir=tmp_path / "study")
    assert found["linked_metric:score"]("", "", "") == 1.0


def test_a_file_named_as_a_module_in_use_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "json.py", "def score(p, r, a): return 1.0\n")
    found = refusal(("json:score",), tmp_path)
    assert "another module named json is in use" in found
    assert found.endswith("Give your file another name.")
