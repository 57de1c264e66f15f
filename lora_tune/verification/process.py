"""Starting the process that trains plainly, following it, and taking its answer.

A fresh interpreter, never a fork: it inherits no model, no generator and no setting of this process.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Protocol

from pydantic import TypeAdapter

import lora_tune
from lora_tune import errors
from lora_tune.errors import MachineError

_MODULE = "lora_tune.verification.plain"


@dataclass(frozen=True, slots=True, kw_only=True)
class PlainRequest:
    """What to train: a trial of a study folder, and again with ``num_seeds`` other seeds."""

    folder: str
    trial: int
    num_seeds: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PlainRun:
    """One plain run: the training loss of every step, then each selection row's summed loss (nats)."""

    train_losses: tuple[float, ...]
    loss_sums: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PlainResult:
    """All that plain PEFT found. The first run has the trial's own seeds."""

    adapter_loss_sums: tuple[float, ...]  # the stored adapter, loaded by PEFT
    runs: tuple[PlainRun, ...]


class PlainView(Protocol):
    """Is told how the runs go; ``report.verify.VerifyView`` is one."""

    def step(self, *, run: int, step: int, end_step: int, loss: float) -> None:
        """Hear of an optimizer step; run 0 has the trial's own seeds."""
        ...

    def end(self, *, run: int, loss: float) -> None:
        """Hear of a run's evaluation loss."""
        ...


def run_plainly(request: PlainRequest, view: PlainView) -> PlainResult:
    """Train in a fresh process and return what it found.

    Raises:
        LoraTuneError: What the process says in one message; ``MachineError`` if it was killed.
        RuntimeError: It failed by a bug; the text is its traceback.
    """
    with tempfile.TemporaryFile() as messages:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", _MODULE, json.dumps(asdict(request))],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=messages,
            text=True,
            encoding="utf-8",
            env=_environment(),
        )
        try:
            result = _follow(process, view)
        finally:
            if process.poll() is None:
                process.terminate()
            process.wait()
        if result is None:
            _raise_end(process.returncode, messages)
        assert result is not None
        return result


def _follow(process: subprocess.Popen[str], view: PlainView) -> PlainResult | None:
    """Tell the view what the process says until it ends; return its result, None without one."""
    assert process.stdout is not None
    result = None
    with process.stdout as lines:
        for line in lines:
            values = json.loads(line)
            event = values.pop("event")
            if event == "step":
                view.step(**values)
            elif event == "end":
                view.end(**values)
            elif event == "result":
                result = TypeAdapter(PlainResult).validate_python(values)
            else:
                raise getattr(errors, values["kind"])(values["message"])
    process.wait()
    return result


def _raise_end(code: int, messages: IO[bytes]) -> None:
    if code < 0:
        name = signal.Signals(-code).name
        raise MachineError(
            f"the process that trains by plain PEFT was ended by {name}. If nobody stopped it, memory ran "
            "out: plain PEFT holds the logits of every token. Free memory and try again."
        )
    messages.seek(0)
    text = messages.read().decode("utf-8", "replace")
    raise RuntimeError(f"the process that trains by plain PEFT ended with {code}:\n{text}")


def _environment() -> dict[str, str]:
    """Return this process's environment, so that the same package is found from any folder."""
    root = str(Path(lora_tune.__file__).parent.parent)
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    # see commands/run.py
    defaults = {"OMP_WAIT_POLICY": "PASSIVE"}
    return {**defaults, **os.environ, "PYTHONPATH": os.pathsep.join(paths)}
