"""Memory that large data files take, measured in a process of its own.

    python tests/faults/large_data.py read FILE...
    python tests/faults/large_data.py prepare TOKENIZER FILE

prints one JSON list: of each file its size, and the peak of resident memory above what the process had when
it began to read, in bytes. Imports and tokenizer are there before, and a few rows were read.
"""

import csv
import gc
import json
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

WORDS = 350  # of a row: about 2 kB


def rows(num_bytes: int, seed: int = 0) -> Iterator[tuple[str, str]]:
    """Yield questions and answers in English words, about so many bytes of them."""
    from lora_tune.data.general_text import general_text

    words, generator = general_text().split(), random.Random(seed)
    size = 0
    while size < num_bytes:
        text = generator.choices(words, k=WORDS)
        question, answer = " ".join(text[:120]), " ".join(text[120:])
        size += len(question) + len(answer)
        yield question, answer


def write_files(folder: Path, num_bytes: int) -> list[Path]:
    """Write the same rows as the four kinds of files."""
    import pyarrow
    import pyarrow.parquet

    pairs = list(rows(num_bytes))
    named = [{"prompt": question, "completion": answer} for question, answer in pairs]
    paths = [folder / f"rows.{kind}" for kind in ("jsonl", "json", "csv", "parquet")]
    paths[0].write_text("".join(json.dumps(row) + "\n" for row in named), encoding="utf-8")
    paths[1].write_text(json.dumps(named, indent=1), encoding="utf-8")
    with paths[2].open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("prompt", "completion"), *pairs])
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(named), paths[3])
    return paths


def write_hostile_files(folder: Path, num_bytes: int) -> list[Path]:
    """Write large files of which no row can be used."""
    contents = {
        "one line.jsonl": b'{"text": "' + b"x" * num_bytes + b'"}',
        "old line ends.jsonl": b'{"text": "abcdefghi"}\r' * (num_bytes // 22),
        "brackets.jsonl": b"[" * num_bytes,
        "one string.json": b'["' + b"x" * num_bytes,
        "brackets.json": b"[" * num_bytes,
        "broken at once.json": b"[{]" + b'{"text": "abcdefghi"},\n' * (num_bytes // 23),
        "open quote.csv": b'text\n"' + b"some words\n" * (num_bytes // 11),
        "one line.csv": b"text\n" + b"x" * num_bytes,
        "empty space.parquet": b"PAR1" + bytes(num_bytes) + b"PAR1",
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return [folder / name for name in contents]


def _memory(key: str) -> int:
    """Return a line of this process's memory: ``VmRSS`` now, ``VmHWM`` its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(key))


def measured(work: Callable[[], object]) -> int:
    """Return by how many bytes the resident memory was at most above its size at the start."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    start = _memory("VmRSS:")
    result = work()
    peak = _memory("VmHWM:")
    del result
    return max(0, peak - start)


def read(path: Path) -> str | int:
    """Read a file row by row; return the rows or the message."""
    from lora_tune.data.reading import read_rows
    from lora_tune.errors import DataError

    try:
        return sum(1 for _ in read_rows(path.name, split="train", base_dir=path.parent))
    except DataError as error:
        return str(error)


def main() -> None:
    """Measure and print."""
    what, *arguments = sys.argv[1:]
    if what == "read":
        paths = [Path(name) for name in arguments]
        works = [lambda path=path: read(path) for path in paths]
        read(paths[0])
    else:
        from transformers import AutoTokenizer

        from lora_tune.data import prepare_data
        from lora_tune.study.spec import DataSection

        tokenizer = AutoTokenizer.from_pretrained(arguments[0])
        paths = [Path(arguments[1])]
        data = DataSection(train=paths[0].name)
        tokenizer(["a few words"] * 8, return_offsets_mapping=True)
        works = [lambda: prepare_data(data, tokenizer=tokenizer, seed=0, base_dir=paths[0].parent)]
    found = []
    for path, work in zip(paths, works, strict=True):
        found.append({"size": path.stat().st_size, "above": measured(work), "name": path.name})
    print(json.dumps(found))


if __name__ == "__main__":
    main()
