"""Commands of the program in processes of their own that need not import torch and the like again.

A server imports them once and forks for every command, so that a study takes a second or two
and not ten. What is said and the exit code are those of ``lora-tune``. The training child of ``run.executor
= "process"`` is a new program and gains nothing.
"""

import atexit
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import NamedTuple

NOTHING: Mapping[str, str] = {}


class Done(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str


class Commands:
    """A server of commands; one runs at a time."""

    def __init__(
        self, server: "subprocess.Popen[str]", place: "tempfile.TemporaryDirectory[str]"
    ) -> None:
        self._server = server
        self._folder = place  # removed when this goes
        self._place = Path(place.name)
        self._number = 0

    def start(
        self, *arguments: str | Path, cwd: Path, environ: Mapping[str, str] = NOTHING
    ) -> None:
        """Begin a command; ``finish`` has to be called before the next."""
        self._number += 1
        line = {
            "arguments": [str(argument) for argument in arguments],
            "cwd": str(cwd),
            "environ": dict(environ),
            "out": str(self._place / f"{self._number}.out"),
            "err": str(self._place / f"{self._number}.err"),
            "ended": str(self._place / f"{self._number}.code"),
        }
        assert self._server.stdin is not None
        self._server.stdin.write(json.dumps(line) + "\n")
        self._server.stdin.flush()

    @property
    def ended(self) -> bool:
        """Whether the command is over."""
        return (self._place / f"{self._number}.code").exists()

    def finish(self) -> Done:
        """Wait for the command."""
        assert self._server.stdout is not None
        code = int(self._server.stdout.readline())
        out, err = (self._place / f"{self._number}.{name}" for name in ("out", "err"))
        return Done(code, out.read_text(errors="replace"), err.read_text(errors="replace"))

    def run(self, *arguments: str | Path, cwd: Path, environ: Mapping[str, str] = NOTHING) -> Done:
        """Run a command to its end."""
        self.start(*arguments, cwd=cwd, environ=environ)
        return self.finish()


@cache
def commands() -> Commands:
    """Return the server of this test run, started when it is first needed."""
    server = subprocess.Popen(
        [sys.executable, __file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )
    place = tempfile.TemporaryDirectory(prefix="commands-")
    atexit.register(server.wait)
    assert server.stdin is not None
    atexit.register(server.stdin.close)
    return Commands(server, place)


def _serve() -> None:
    import lora_tune.report
    import lora_tune.tuner  # noqa: F401

    for line in sys.stdin:
        task = json.loads(line)
        pid = os.fork()
        if pid == 0:
            _become(task)
        _, status = os.waitpid(pid, 0)
        code = os.waitstatus_to_exitcode(status)
        Path(task["ended"]).write_text(str(code))
        print(code, flush=True)


def _become(task: dict[str, object]) -> None:
    from lora_tune.cli import main

    for name, descriptor in (("out", 1), ("err", 2)):
        os.dup2(os.open(str(task[name]), os.O_WRONLY | os.O_CREAT, 0o600), descriptor)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    environ, arguments = task["environ"], task["arguments"]
    assert isinstance(environ, dict)
    assert isinstance(arguments, list)
    os.environ.update(environ)
    os.chdir(str(task["cwd"]))
    sys.argv = ["lora-tune", *arguments]
    code: object = 0
    try:
        main()
    except SystemExit as end:
        code = end.code
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))


if __name__ == "__main__":
    _serve()
