"""Being asked to stop: SIGINT, SIGTERM and SIGHUP end a study between two steps, with all of it saved.

The first signal raises ``KeyboardInterrupt`` or ``Terminated`` in the main thread, at once or, within
``deferred``, when that is left: a message or an optimizer step is not cut in two. A second signal ends the
process on the spot. What a process is told by signals is its own, so the state is this module's.
"""

import ctypes
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from lora_tune.errors import Terminated

EXIT_INTERRUPTED = 130
EXIT_RESUMABLE = 75
EXIT_TERMINATED = 143  # by a second signal, without saving anything

SAME_REQUEST_S = (
    0.5  # some send SIGTERM and SIGHUP, or a signal to the group and to the process, at once
)

_STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class _State:
    received: int | None = None
    received_at = 0.0
    raised = False
    depth = 0


@contextmanager
def stoppable() -> Iterator[None]:
    """Let the signals stop what runs meanwhile; those that are ignored, as under nohup, stay so."""
    _State.received, _State.raised, _State.depth = None, False, 0
    previous = {
        number: signal.signal(number, _receive)
        for number in _STOPPING
        if signal.getsignal(number) is not signal.SIG_IGN
    }
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def deferred() -> Iterator[None]:
    """Hold a signal back meanwhile; it raises on leaving, or where ``check`` is called."""
    _State.depth += 1
    try:
        yield
    finally:
        _State.depth -= 1
    if _State.depth == 0:
        check()


def check() -> None:
    """Raise what a signal that was held back stands for, once."""
    if _State.received is None or _State.raised:
        return
    _State.raised = True
    raise KeyboardInterrupt if _State.received == signal.SIGINT else Terminated


def keep_exit_code() -> None:
    """Have this process end with the exit code that it is about to give, after a ``KeyboardInterrupt``.

    One that has passed through code that C runs, as in some imports, is remembered as unhandled, and Python
    would in the end kill itself by SIGINT. Running anything so forgets it.
    """
    ctypes.pythonapi.PyRun_SimpleString(b"pass")


def _receive(number: int, frame: FrameType | None) -> None:
    now = time.monotonic()
    if _State.received is not None and now - _State.received_at < SAME_REQUEST_S:
        return
    if _State.received is not None:
        os._exit(EXIT_INTERRUPTED if number == signal.SIGINT else EXIT_TERMINATED)
    _State.received, _State.received_at = number, now
    if _State.depth == 0:
        check()
