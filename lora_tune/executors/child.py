"""The main program of a child process: ``python -m lora_tune.executors.child FD [MODULE ...]``.

FD is one end of a socket pair; the modules are imported while the first message is made. That is a
pickled ``WorkerTask``: an object whose class the child can import, with ``open(note) -> Worker``. What the
worker says of itself is told by ``Opened(worker.opened)``. From then on the child takes ``Submit``,
``Limit``, ``Ask`` and ``Stop``, also between two steps of its lanes (the worker's ``on_step``), and answers
with what ``messages`` lists. Anything with the methods of ``Worker`` will do: a stand-in that sleeps instead
of training serves to test the coordinator.

The child ends when its coordinator does: the kernel sees to that, and a thread that reads the pipe. Signals
to end are the coordinator's to handle, so the child ignores them.
"""

import ctypes
import faulthandler
import os
import pickle
import queue
import signal
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from importlib import import_module
from multiprocessing.connection import Connection

from lora_tune.errors import LoraTuneError
from lora_tune.executors.interface import Worker
from lora_tune.executors.messages import (
    Answered,
    Ask,
    Continue,
    Crashed,
    Ended,
    Limit,
    Note,
    Opened,
    Progress,
    Refused,
    Stop,
    Stopped,
    Submit,
    WorkerTask,
)
from lora_tune.redaction import redact

EXIT_ALONE = 70  # the coordinator has gone
EXIT_CRASHED = 71
_END_WITH_PARENT = 1  # PR_SET_PDEATHSIG of Linux
PROGRESS_S = 0.25  # between two messages about the lanes, at least


class _StopAskedError(Exception):
    """The coordinator wants all lanes saved."""


class _Child:
    """Serves one worker."""

    def __init__(self, link: Connection) -> None:
        self.link = link
        self.inbox: queue.SimpleQueue[object] = queue.SimpleQueue()
        self.told_at = 0.0
        self.limit = 0  # lanes, as last told

    def serve(self) -> None:
        """Open the worker and do what is asked until told to stop."""
        try:
            task: WorkerTask = pickle.loads(self.link.recv_bytes())
        except EOFError:
            os._exit(EXIT_ALONE)
        threading.Thread(target=self._read, daemon=True).start()
        worker = task.open(lambda text: self.link.send(Note(text)))
        worker.on_step = lambda: self._between_steps(worker)
        self.link.send(Opened(worker.opened))
        try:
            while True:
                self._wait_for_jobs(worker)
                if outcomes := worker.wait():
                    peaks = tuple(worker.take_pack_peaks())
                    self.link.send(Ended(tuple(outcomes), peaks, _progress(worker)))
        except _StopAskedError:
            worker.save_states()
            self.link.send(Stopped())

    def _wait_for_jobs(self, worker: Worker) -> None:
        while not isinstance(message := self.inbox.get(), Continue):
            self._handle(worker, message)

    def _read(self) -> None:
        try:
            while True:
                self.inbox.put(self.link.recv())
        except (EOFError, OSError):
            os._exit(EXIT_ALONE)

    def _between_steps(self, worker: Worker) -> None:
        self._take_messages(worker)
        if time.monotonic() - self.told_at >= PROGRESS_S:
            self.link.send(_progress(worker))
            self.told_at = time.monotonic()

    def _take_messages(self, worker: Worker) -> None:
        while not self.inbox.empty():
            self._handle(worker, self.inbox.get())

    def _handle(self, worker: Worker, message: object) -> None:
        if isinstance(message, Submit):
            worker.submit(message.job)
        elif isinstance(message, Limit):
            # what it has lowered itself, when memory ran out, stays so
            halved = worker.max_lanes < self.limit
            lanes = message.max_lanes
            worker.max_lanes = min(worker.max_lanes, lanes) if halved else lanes
            self.limit = lanes
        elif isinstance(message, Ask):
            self.link.send(Answered(worker.answer(message.question)))
        elif isinstance(message, Stop):
            raise _StopAskedError
        else:
            raise TypeError(f"no message for a child: {message!r}")


def _progress(worker: Worker) -> Progress:
    return Progress(worker.readings(), worker.num_tokens, worker.memory_bytes())


def main(descriptor: int, modules: Sequence[str]) -> None:
    """Serve the coordinator at the other end of the socket."""
    ctypes.CDLL(None).prctl(
        _END_WITH_PARENT, signal.SIGKILL, 0, 0, 0
    )  # also while it imports or hangs
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    faulthandler.enable()
    link = Connection(descriptor)
    try:
        for module in modules:
            import_module(module)
        _Child(link).serve()
    except LoraTuneError as error:
        link.send(Refused(error))
    except Exception as error:
        print(redact(traceback.format_exc()), file=sys.stderr, flush=True)
        text = " ".join(str(error).split())
        link.send(Crashed(redact(f"{type(error).__name__}: {text}"[:500])))
        # no tidying up: after an error of a GPU that can hang
        os._exit(EXIT_CRASHED)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
