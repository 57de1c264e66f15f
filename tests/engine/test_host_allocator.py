"""Blocks that a step frees are there for the next one, without the kernel's help."""

import ctypes
import json
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
    done = subprocess.run(
        [sys.executable, "-c", PAGES, how], capture_output=True, text=True, check=True, timeout=120
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


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    assert keep_freed_memory() is False
