"""Metrics beside the loss: what an answer is worth, from three texts and nothing else.

A metric is a function of (prompt, reference, prediction) that gives a number for one row. The built-in
ones are in ``METRICS``; ``module:function`` in ``select.metrics`` names one of the user's own, which
is loaded only when the command line allows code. What a metric raises, or returns that is no finite
number, becomes the reason of its ``MetricResult``: a metric never ends a study. Answers are made elsewhere
(``engine/generation.py``).
"""

import importlib
import inspect
import re
import sys
import traceback
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from lora_tune.errors import StudyFileError, nearest
from lora_tune.records import MetricResult

Metric = Callable[[str, str, str], float]

_OWN = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*", re.ASCII)
# Scripts that set no space between words: each of their letters counts as a word.
_UNSPACED = re.compile(
    "([\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff])"
)


class Answer(NamedTuple):
    """A row's texts; the prediction is what the model wrote."""

    prompt: str
    reference: str
    prediction: str


def exact_match(prompt: str, reference: str, prediction: str) -> float:
    r"""Return 1 when prediction and reference are equal but for whitespace around them, else 0.

    Case, punctuation and whitespace inside count.

    >>> exact_match("2 + 2?", "4", " 4\n"), exact_match("2 + 2?", "4", "4.")
    (1.0, 0.0)
    """
    return float(prediction.strip() == reference.strip())


def rouge_l(prompt: str, reference: str, prediction: str) -> float:
    """Return ROUGE-L of the whole texts: 2 P R / (P + R) of their longest common subsequence of words.

    P is its length over the prediction's words, R over the reference's. Words are runs of letters, digits and
    marks, in lower case, not stemmed; in scripts without spaces every letter is a word. 0 when either text
    has no word. On ASCII text this is ``rougeL`` of the package rouge-score.

    Source: Lin 2004, ROUGE: A Package for Automatic Evaluation of Summaries, section 3.1, with beta = 1.

    >>> rouge_l("", "police killed the gunman", "police kill the gunman")
    0.75
    """
    wanted, found = _words(reference), _words(prediction)
    common = _common_length(wanted, found)
    return 2 * common / (len(wanted) + len(found)) if common else 0.0


METRICS: Mapping[str, Metric] = {"exact-match": exact_match, "rouge-l": rouge_l}


def check_metrics(names: Sequence[str], *, allow_code: bool) -> None:
    """Refuse names that stand for no metric; no code of the user's is loaded.

    Raises:
        StudyFileError: A name is unknown or given twice, or names a function and code is not allowed.
    """
    for place, name in enumerate(names):
        where = f'select.metrics[{place}] is "{name}"'
        if name in names[:place]:
            raise StudyFileError(f"{where}, which is there already. Name each metric once.")
        if name in METRICS:
            continue
        if not _OWN.fullmatch(name):
            raise StudyFileError(
                f"{where}, which is no metric{nearest(name, METRICS) or '.'} Known: "
                f"{', '.join(METRICS)}; or a function of your own as module:function."
            )
        if not allow_code:
            raise StudyFileError(
                f"{where}: a function of your own is code that runs with your rights. Look at it, then add "
                "--allow-code to the command, or take it out of select.metrics."
            )


def resolve_metrics(names: Sequence[str], *, allow_code: bool, base_dir: Path) -> dict[str, Metric]:
    """Return the functions of ``select.metrics`` by their names, in the order given.

    Args:
        names: Built-in names, or ``module:function``.
        allow_code: Whether a function of the user's own may be loaded.
        base_dir: Folder of the study file: modules are looked for there first, then on ``sys.path``.

    Raises:
        StudyFileError: As ``check_metrics``; or a function cannot be loaded or does not take three texts.
    """
    check_metrics(names, allow_code=allow_code)
    return {
        name: METRICS.get(name) or _load(name, f'select.metrics[{place}] is "{name}"', base_dir)
        for place, name in enumerate(names)
    }


def score_answers(name: str, metric: Metric, answers: Sequence[Answer]) -> MetricResult:
    """Return a metric's value of every answer; the first that has none makes the reason.

    Rows are counted from 1 in the reason.
    """
    values = []
    for number, answer in enumerate(answers, start=1):
        try:
            returned = metric(*answer)
        except (Exception, SystemExit) as error:
            return MetricResult(metric=name, reason=f"row {number}: {_describe(error)}")
        value = _as_number(returned)
        if value is None:
            shown = repr(returned)[:80]
            return MetricResult(
                metric=name, reason=f"row {number}: the value is {shown}, which is no finite number"
            )
        values.append(value)
    return MetricResult(metric=name, values=tuple(values))


def _as_number(value: object) -> float | None:
    """Return a finite number as float (numpy's and torch's scalars and bools too); None for all else."""
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return None
    return number if abs(number) < float("inf") and not isinstance(value, str) else None


def _words(text: str) -> list[str]:
    lower = unicodedata.normalize("NFKC", text).lower()
    kept = "".join(c if unicodedata.category(c)[0] in "LNM" else " " for c in lower)
    return _UNSPACED.sub(r" \1 ", kept).split()


def _common_length(first: Sequence[str], second: Sequence[str]) -> int:
    """Return the length of the longest common subsequence.

    One row of the usual table is the bits of one number: a 0 where the length grows by one.

    Source: Hyyroe 2004, Bit-parallel LCS-length computation revisited.
    """
    places: dict[str, int] = {}
    for place, word in enumerate(first):
        places[word] = places.get(word, 0) | 1 << place
    full = (1 << len(first)) - 1
    row = full
    for word in second:
        hits = row & places.get(word, 0)
        row = (row + hits) | (row - hits)
    return len(first) - (row & full).bit_count()


def _load(name: str, where: str, base_dir: Path) -> Metric:
    module_name, _, function_name = name.partition(":")
    module = _import(module_name, where, base_dir.resolve())
    function = getattr(module, function_name, None)
    if not callable(function):
        kind = "has none" if function is None else f"has a value of type {type(function).__name__}"
        raise StudyFileError(
            f"{where}: {module.__file__ or module_name} must define a function {function_name}, it {kind}."
        )
    try:
        inspect.signature(function).bind("prompt", "reference", "prediction")
    except TypeError as error:
        raise StudyFileError(
            f"{where}: the function must take three texts (prompt, reference, prediction): {error}."
        ) from error
    except ValueError:  # some functions written in C do not tell
        pass
    metric: Metric = function
    return metric


def _import(name: str, where: str, folder: Path) -> ModuleType:
    """Import a module, the study file's folder first; later imports look there last."""
    top = name.partition(".")[0]
    beside = any((folder / place).exists() for place in (f"{top}.py", f"{top}/__init__.py"))
    importlib.invalidate_caches()
    sys.path.insert(0, str(folder))
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise StudyFileError(f"{where}: {name} needs {error.name}: {error}.") from error
        raise StudyFileError(
            f"{where}: there is no module {error.name}, neither beside the study file in {folder} "
            "nor among the installed packages."
        ) from error
    except (Exception, SystemExit) as error:
        raise StudyFileError(f"{where}: {name} cannot be imported: {_describe(error)}.") from error
    finally:
        sys.path.remove(str(folder))
        if str(folder) not in sys.path:
            sys.path.append(str(folder))
    file = Path(module.__file__ or "")  # that of the study's folder may be a link to elsewhere
    if beside and not any(path.is_relative_to(folder) for path in (file, file.resolve())):
        raise StudyFileError(
            f"{where}: another module named {top} is in use ({module.__file__ or 'built in'}). Give your "
            "file another name."
        )
    return module


def _describe(error: BaseException) -> str:
    """Return an error in a line: its type, its message, and the line of code that raised it."""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename != __file__ and not frame.filename.startswith("<")
    ]
    place = ""
    if frames and not isinstance(error, SyntaxError):  # which says its own place
        place = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})"
    message = " ".join(str(error).split())
    return f"{type(error).__name__}{': ' if message else ''}{message}{place}"
