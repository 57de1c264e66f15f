"""Write questions about the Python standard library, answered by its own docstrings.

    python studies/pydoc_data.py [--output studies/data/pydoc.jsonl] [--limit N]

The rows come from the running interpreter: nothing is downloaded, and the same interpreter gives
the same bytes. Each row is a conversation of three short turns: a constant system turn, the
question, and the first sentence of the docstring. Modules that open windows, run tests or print
when imported are left out; so are names that begin with an underscore.
"""

import argparse
import contextlib
import importlib
import inspect
import io
import json
import os
import pkgutil
import re
import sys
import warnings
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

SYSTEM = "Python standard library."
QUESTIONS = {
    "module": "What is the module {} for?",
    "class": "What is the class {} for?",
    "function": "What does the function {} do?",
    "method": "What does the method {} do?",
}
# Left out: they open windows or a browser, print, run tests, are tools rather than libraries, or
# have hundreds of docstrings by rote.
SKIPPED_MODULES = {
    "__main__",
    "antigravity",
    "distutils",
    "encodings",
    "idlelib",
    "lib2to3",
    "pydoc_data",
    "test",
    "tests",
    "this",
    "tkinter",
    "turtle",
    "turtledemo",
}
MIN_WORDS, MAX_WORDS = 3, 30
# An answer is given once. Shared by more objects than this it says too little about any of them.
MAX_SHARED = 4

_SIGNATURE = re.compile(r"^[\w.]+\s*\(.*\)(\s*->\s*\S.*?)?(\s+--\s+|\s*[:.]?$)")
_SENTENCE_END = re.compile(r"(?<![a-z]\.[a-z])(?<!\betc)(?<!\bvs)[.!?](?=\s+[A-Z`'\"(]|$)")


def public_modules() -> Iterator[ModuleType]:
    """Import and yield the public modules of the standard library in order of their names."""
    for name in sorted(sys.stdlib_module_names):
        if not name.startswith("_") and name not in SKIPPED_MODULES:
            yield from _with_submodules(name)


def _with_submodules(name: str) -> Iterator[ModuleType]:
    # A module that cannot be imported here (another system's, or a missing library) has no rows.
    try:
        module = importlib.import_module(name)
    except (Exception, SystemExit):
        return
    yield module
    for child in sorted(
        info.name for info in pkgutil.iter_modules(getattr(module, "__path__", []))
    ):
        if not child.startswith("_") and child not in SKIPPED_MODULES:
            yield from _with_submodules(f"{name}.{child}")


def documented_objects(module: ModuleType) -> Iterator[tuple[str, str, object]]:
    """Yield kind, full name and object: the module, its functions, classes and their methods."""
    yield "module", module.__name__, module
    for name, value in _members(module):
        if not _is_at_home(value, module):
            continue  # imported from elsewhere; asked about there
        full_name = f"{module.__name__}.{name}".removeprefix("builtins.")
        if inspect.isclass(value):
            yield "class", full_name, value
            for method_name, method in _members(value):
                if method_name in vars(value) and callable(method) and not inspect.isclass(method):
                    yield "method", f"{full_name}.{method_name}", method
        elif inspect.isroutine(value):
            yield "function", full_name, value


def _is_at_home(value: object, module: ModuleType) -> bool:
    """Whether people know the object by this module: its own, or of its private C counterpart."""
    home = str(getattr(value, "__module__", None))
    private = home.startswith("_") and not home.startswith("__")
    return home == module.__name__ or private or (home, module.__name__) == ("posix", "os")


def _members(owner: object) -> Iterator[tuple[str, object]]:
    for name in sorted(vars(owner)):
        if not name.startswith("_"):
            with contextlib.suppress(Exception):
                yield name, getattr(owner, name)


def first_sentence(docstring: str) -> str | None:
    """Return the first sentence of a docstring, or None when it has none of a useful length.

    A leading signature such as ``foo(x) -> int`` is passed over.
    """
    for paragraph in re.split(r"\n\s*\n", inspect.cleandoc(docstring)):
        lines = [line.strip() for line in paragraph.splitlines()]
        while lines and (match := _SIGNATURE.match(lines[0])):
            lines[0] = lines[0][match.end() :].strip()
            if lines[0]:
                break
            lines.pop(0)
        text = " ".join(" ".join(lines).split())
        if not text:
            continue
        end = _SENTENCE_END.search(text)
        sentence = text[: end.end()] if end else text
        return sentence if _is_good(sentence) else None
    return None


def _is_good(sentence: str) -> bool:
    words = sentence.split()
    return (
        MIN_WORDS <= len(words) <= MAX_WORDS
        and sentence.isascii()
        and sentence.isprintable()
        and (sentence[0].isupper() or sentence[0] in "'\"`")
        and any(character.islower() for character in sentence)
        and not sentence.startswith("Usage:")
        and not sentence.endswith((":", ","))
        and not any(mark in sentence for mark in ("--------", " | ", " = ", "->", "XXX", "TODO"))
    )


def collect_rows() -> list[dict[str, list[dict[str, str]]]]:
    """Return the rows in order of module and name; nothing is written anywhere."""
    objects_by_answer: dict[str, list[tuple[str, str]]] = defaultdict(list)
    seen: set[int] = set()
    keep = []  # objects stay alive, so that an id is not given twice
    for module in public_modules():
        for kind, name, value in documented_objects(module):
            docstring = getattr(value, "__doc__", None)
            if id(value) in seen or not isinstance(docstring, str):
                continue
            seen.add(id(value))
            keep.append(value)
            answer = first_sentence(docstring)
            if answer is not None:
                objects_by_answer[answer].append((kind, name))
    named = [
        (min(objects, key=lambda item: (item[1].count("."), item[1])), answer)
        for answer, objects in objects_by_answer.items()
        if len(objects) <= MAX_SHARED
    ]
    return [_row(kind, name, answer) for (kind, name), answer in sorted(named, key=_by_name)]


def _by_name(named: tuple[tuple[str, str], str]) -> tuple[str, str]:
    (_, name), answer = named
    return name, answer


def _row(kind: str, name: str, answer: str) -> dict[str, list[dict[str, str]]]:
    turns = (("system", SYSTEM), ("user", QUESTIONS[kind].format(name)), ("assistant", answer))
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Keep what modules print or warn of on import away from the terminal."""
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        yield


def write_rows(rows: list[dict[str, list[dict[str, str]]]], output: Path) -> None:
    """Write the rows as JSON lines; the file appears whole or not at all."""
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_name(f".{output.name}.{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8", newline="\n") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        temporary.replace(output)
    finally:
        temporary.unlink(missing_ok=True)


def main() -> None:
    """Parse the command line, collect the rows and write them."""
    default = Path(__file__).resolve().parent / "data" / "pydoc.jsonl"
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--output", type=Path, default=default, help="JSONL file to write")
    parser.add_argument("--limit", type=int, help="write only so many rows, spread evenly")
    arguments = parser.parse_args()
    with silence():
        rows = collect_rows()
    if arguments.limit is not None and arguments.limit < len(rows):
        count = max(arguments.limit, 0)
        rows = [rows[i * len(rows) // count] for i in range(count)]
    write_rows(rows, arguments.output)
    print(f"{len(rows)} rows in {arguments.output}")


if __name__ == "__main__":
    main()
