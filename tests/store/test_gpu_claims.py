"""Two studies on one GPU know of each other."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from lora_tune.store.gpu_claims import claim_gpu

GPU = "GPU-5e1f8c0a-0000-1111-2222-333344445555"
OTHER = """
import sys
from pathlib import Path
from lora_tune.store.gpu_claims import claim_gpu
print(claim_gpu(sys.argv[1], folder=Path(sys.argv[2])), flush=True)
sys.stdin.read()
"""


@contextmanager
def other_process(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that has claimed the GPU and waits until it is killed."""
    with subprocess.Popen(
        [sys.executable, "-c", OTHER, GPU, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "None\n"
        try:
            yield process
        finally:
            process.kill()


def test_who_else_trains_on_a_gpu_is_named_until_it_is_dead(tmp_path: Path) -> None:
    with other_process(tmp_path) as process:
        other = claim_gpu(GPU, folder=tmp_path)
        assert other is not None
        assert other.pid == process.pid
        assert claim_gpu(GPU.replace("5e", "6e"), folder=tmp_path) is None  # another card
    assert claim_gpu(GPU, folder=tmp_path) is None


def test_a_process_does_not_meet_itself(tmp_path: Path) -> None:
    assert claim_gpu(GPU, folder=tmp_path) is None
    assert claim_gpu(GPU, folder=tmp_path) is None


def test_where_no_lock_is_to_be_had_nothing_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    assert claim_gpu(GPU, folder=tmp_path / "file") is None
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / f"lora-tune-{os.getuid()}").symlink_to(tmp_path)  # somebody else's idea
    assert claim_gpu(GPU) is None
    assert not (tmp_path / "gpus").exists()
