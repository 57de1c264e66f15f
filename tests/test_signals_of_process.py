"""The exit code of a process that was interrupted is its own."""

import subprocess
import sys

import pytest

INTERRUPTED_IN_C = """
import ctypes, sys
from lora_tune.signals import keep_exit_code
ctypes.pythonapi.PyRun_SimpleString(b"raise KeyboardInterrupt")
{then}
sys.exit(130)
"""


@pytest.mark.parametrize(("then", "code"), [("", -2), ("keep_exit_code()", 130)])
def test_an_interrupt_that_passed_through_c_code_does_not_end_the_process_by_a_signal(
    tmp_path, then, code
):
    (tmp_path / "interrupted.py").write_text(INTERRUPTED_IN_C.format(then=then))
    ended = subprocess.run(
        [sys.executable, "-m", "interrupted"], cwd=tmp_path, capture_output=True, check=False
    )
    assert ended.returncode == code
