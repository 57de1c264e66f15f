"""A disk of a few MiB that a test can fill up: a tmpfs, mounted where the test says.

Skipped by name where this process may not mount; a failure where ``LORA_TUNE_TESTS_REQUIRE`` names ``tmpfs``.
"""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass(frozen=True)
class SmallDisk:
    """A mounted disk."""

    folder: Path

    def fill(self, *, leave: int = 0) -> None:
        """Write until there are ``leave`` bytes of room, or not one more."""
        with (self.folder / "filler").open("ab", buffering=0) as stream:
            block = 1 << 20
            while block:
                found = os.statvfs(self.folder)
                if leave and found.f_bavail * found.f_frsize - block < leave:
                    block //= 2
                    continue
                try:
                    stream.write(bytes(block))
                except OSError:
                    block //= 2

    def make_room(self) -> None:
        """Let there be room again, as after somebody has cleared up."""
        (self.folder / "filler").unlink(missing_ok=True)

    def grow(self, size: str) -> None:
        """Make the disk larger."""
        _mount("-o", f"remount,size={size}", str(self.folder))


@contextmanager
def mounted(folder: Path, size: str) -> Iterator[SmallDisk]:
    """Mount a disk of this size, such as ``8m``, on a new folder."""
    folder.mkdir(parents=True)
    try:
        _mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder))
    except (OSError, subprocess.CalledProcessError) as error:
        if "tmpfs" in os.environ.get("LORA_TUNE_TESTS_REQUIRE", "").split(","):
            raise
        pytest.skip(f"tmpfs: this process may not mount one ({error})")
    try:
        yield SmallDisk(folder)
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=False)
        with suppress(OSError):
            folder.rmdir()


def _mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True, capture_output=True)
