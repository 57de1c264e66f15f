"""Where a signal raises, and that the exit code of a process that was interrupted is its own."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import pytest

from lora_tune import signals
from lora_tune.errors import Terminated

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


def stop(number: int = signal.SIGTERM) -> None:
    os.kill(os.getpid(), number)


def in_a_study(body: Callable[[], None]) -> None:
    with signals.stoppable(), signals.deferred():
        body()


@pytest.mark.parametrize(
    ("number", "error"),
    [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated), (signal.SIGHUP, Terminated)],
)
def test_a_signal_is_held_back_until_it_is_asked_for(number, error):
    reached = []

    def body():
        with signals.deferred():
            stop(number)
            reached.append("the end of the inner part")
        reached.append("what comes after it")
        signals.check()
        reached.append("what comes after the check")

    with pytest.raises(error):
        in_a_study(body)
    assert reached == ["the end of the inner part", "what comes after it"]


def test_a_signal_that_nobody_asked_for_raises_in_the_end():
    reached = []

    def body():
        stop()
        reached.append("the end")

    with pytest.raises(Terminated):
        in_a_study(body)
    assert reached == ["the end"]


def test_what_takes_long_may_be_left_anywhere():
    reached = []

    def body():
        with signals.at_once():
            stop()
            reached.append("what comes after the signal")

    with pytest.raises(Terminated):
        in_a_study(body)
    assert reached == []


def test_what_takes_long_is_not_begun_when_the_study_is_to_stop():
    reached = []

    def body():
        stop()
        with signals.at_once():
            reached.append("what takes long")

    with pytest.raises(Terminated):
        in_a_study(body)
    assert reached == []


class Interrupted:
    """Is met by a signal when it goes."""

    def __del__(self) -> None:
        stop()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_signal_that_got_lost_in_a_destructor_raises_after_all():
    reached = []

    def body():
        with signals.at_once():
            Interrupted()
            reached.append("what comes after it")
        reached.append("what comes after what takes long")

    with pytest.raises(Terminated):
        in_a_study(body)
    assert reached == ["what comes after it"]


@pytest.mark.parametrize("region", [signals.at_once, lambda: signals.at_latest(0.1)])
def test_a_signal_of_which_a_library_made_another_error_is_still_a_signal(region):
    def body():
        with region():
            try:
                stop()
                time.sleep(5)
            except Terminated as error:
                raise RuntimeError("the library's own") from error

    with pytest.raises(Terminated):
        in_a_study(body)


def test_an_error_without_a_signal_stays_what_it_is():
    def body():
        with signals.at_once(), signals.at_latest(1):
            raise RuntimeError("the library's own")

    with pytest.raises(RuntimeError, match="the library's own"):
        in_a_study(body)


@pytest.mark.parametrize("before", [True, False])
def test_what_may_block_is_left_when_a_signal_has_been_held_back_too_long(before):
    reached = []

    def body():
        if before:
            stop()
        with signals.at_latest(60), signals.at_latest(0.2):
            if not before:
                stop()
            reached.append("what comes after the signal")
            time.sleep(30)
            reached.append("the end")

    began = time.monotonic()
    with pytest.raises(Terminated):
        in_a_study(body)
    assert 0.1 < time.monotonic() - began < 10
    assert reached == ["what comes after the signal"]


def test_what_ends_in_time_is_not_left():
    reached = []

    def body():
        with signals.at_latest(0.2):
            stop()
            reached.append("the end")
        time.sleep(0.4)
        reached.append("what comes after it")
        signals.check()

    with pytest.raises(Terminated):
        in_a_study(body)
    assert reached == ["the end", "what comes after it"]


def test_who_tidies_up_after_a_signal_is_not_interrupted_by_it_again():
    reached = []

    def body():
        try:
            stop()
            signals.check()
        finally:
            assert signals.was_raised()
            signals.check()
            with signals.at_once(), signals.deferred():
                reached.append("tidied up")

    with pytest.raises(Terminated):
        in_a_study(body)
    assert reached == ["tidied up"]
    assert not signals.was_raised()
