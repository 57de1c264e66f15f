"""Being asked to stop: SIGINT, SIGTERM and SIGHUP end a study between two steps, with all of it saved.

The first signal raises ``KeyboardInterrupt`` or ``Terminated`` in the main thread: at once or, within
``deferred``, where ``check`` is called. A study runs within ``deferred``, so that no signal cuts a message,
an optimizer step or a transaction in two; libraries do not expect to be left just anywhere, and what is
raised in a destructor or a callback gets lost. A second signal ends the process on the spot. What a process
is told by signals is its own, so the state is this module's.
"""

import ctypes
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

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
    patience: float | None = None  # seconds, of what runs within ``at_latest``


@contextmanager
def stoppable() -> Iterator[None]:
    """Let the signals stop what runs meanwhile; those that are ignored, as under nohup, stay so."""
    _forget()
    previous = {
        number: signal.signal(number, _receive)
        for number in _STOPPING
        if signal.getsignal(number) is not signal.SIG_IGN
    }
    previous[signal.SIGALRM] = signal.signal(signal.SIGALRM, _lose_patience)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        _forget()


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


@contextmanager
def at_once() -> Iterator[None]:
    """Within ``deferred``, let a signal raise anywhere: for what takes long and may be left at any point."""
    depth, _State.depth = _State.depth, 0
    try:
        with _keeping_what_is_raised():
            check()
            yield
    finally:
        _State.depth = depth


@contextmanager
def at_latest(seconds: float) -> Iterator[None]:
    """Within ``deferred``, let a signal that was held back so long raise anywhere: for what may block."""
    before, _State.patience = _State.patience, seconds
    _set_alarm()
    try:
        with _keeping_what_is_raised():
            yield
    finally:
        _State.patience = before
        _set_alarm()


@contextmanager
def _keeping_what_is_raised() -> Iterator[None]:
    """Raise again what a signal raised and a library swallowed, or made another error of."""
    before = _State.raised
    try:
        yield
    except Exception:
        if _State.raised and not before:
            _raise()
        raise
    if _State.raised and not before:
        _raise()


def check() -> None:
    """Raise what a signal that was held back stands for, once."""
    if _State.received is not None and not _State.raised:
        _raise()


def was_raised() -> bool:
    """Return whether a signal is on the way to ending what runs."""
    return _State.raised


def _forget() -> None:
    _State.received, _State.raised, _State.depth, _State.patience = None, False, 0, None


def _set_alarm() -> None:
    """Have a signal that is held back raise in time, if what runs now may not block for long."""
    if _State.received is not None:
        held_back = not _State.raised and _State.patience is not None
        signal.setitimer(signal.ITIMER_REAL, (_State.patience or 0.0) if held_back else 0.0)


def _lose_patience(number: int, frame: FrameType | None) -> None:
    if _State.patience is not None:
        check()


def _raise() -> NoReturn:
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
    _set_alarm()
