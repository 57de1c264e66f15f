"""Blocks that a step frees are there for the next one, without the kernel's help."""

import ctypes
import json
import os
import subprocess
import sys
from typing import Any

import pytest

from lora_tune.engine.host_allocator import keep_freed_memory

PAGES = """
import json, resource, sys
import torch
from lora_tune.engine.host_allocator import keep_freed_memory

taken = keep_freed_memory() if sys.argv[1] == "keep" else None

def step() -> int:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for size in (3_000_000, 16_000_000, 7_000_000):
        torch.empty(size).fill_(1.0)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

# an aligned block does not fit the place of its twin before neighbours have joined, which is a matter of luck
print(json.dumps([taken, min(step() for _ in range(10))]))
"""


def faults(how: str) -> list[Any]:
    environ = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC")}
    done = subprocess.run(
        [sys.executable, "-c", PAGES, how],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
        env=environ,
    )
    found: list[Any] = json.loads(done.stdout)
    return found


def has_glibc() -> bool:
    return hasattr(ctypes.CDLL(None), "gnu_get_libc_version")


@pytest.mark.skipif(not has_glibc(), reason="needs glibc")
def test_a_later_step_asks_the_kernel_for_no_pages() -> None:
    (_, usual), (taken, kept) = faults("leave"), faults("keep")
    assert taken is True
    assert usual > 10_000  # 104 MB in pages of 4 KiB
    assert kept < usual / 100


class Recorder:
    """A C library whose mallopt takes blocks up to a size."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.calls: list[tuple[int, int]] = []

    def mallopt(self, what: int, value: int) -> int:
        self.calls.append((what, value))
        return int(value <= self.most)


@pytest.mark.parametrize(
    ("most", "taken", "sizes"),
    [
        (1 << 31, True, [1 << 30]),
        (1 << 25, True, [1 << 30, 1 << 25]),
        (0, False, [1 << 30, 1 << 25]),
    ],
)
def test_an_older_glibc_takes_what_it_can(
    monkeypatch: pytest.MonkeyPatch, most: int, taken: bool, sizes: list[int]
) -> None:
    library = Recorder(most)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    assert keep_freed_memory({}) is taken
    assert library.calls == [(-8, 1), *((-3, size) for size in sizes), (-1, -1)]


def test_a_number_of_arenas_that_a_person_gave_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    library = Recorder(1 << 31)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    assert keep_freed_memory({"MALLOC_ARENA_MAX": "4"}) is True
    assert library.calls == [(-3, 1 << 30), (-1, -1)]


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    assert keep_freed_memory({}) is False


def test_what_a_person_said_of_the_allocator_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    library = Recorder(1 << 31)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    assert keep_freed_memory({"MALLOC_TRIM_THRESHOLD_": "1"}) is False
    assert library.calls == []
