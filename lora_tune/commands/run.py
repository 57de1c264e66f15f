"""``lora-tune run``: run a study to its end, or go on with one."""

import os
import signal
from pathlib import Path
from types import FrameType

from rich.console import Console

from lora_tune.errors import Terminated
from lora_tune.metrics import check_metrics
from lora_tune.report import ProgressView, print_report
from lora_tune.store.find import find_study
from lora_tune.study.loader import load_study


def run(study: str, *, command: str, allow_code: bool) -> None:
    """Run the study and print its report.

    Args:
        study: A study file, or a started study as ``store.find`` knows it.
        command: The command line, for the record.
        allow_code: Whether ``select.metrics`` may name functions of the user's own modules.
    """
    path = _study_file(study)
    spec = load_study(path)
    check_metrics(spec.select.metrics, allow_code=allow_code)
    # OpenMP reads this when torch is imported. By default its threads spin at every barrier, and on a
    # CPU that is shared with anything else training then slows down up to tenfold; see docs/log.md.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # torch's CUDA allocator reads this when it is first used. Passes differ in their number of tokens, and
    # segments that can grow do not break into pieces over them.
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    # Heavy imports come after the study file has been found good.
    from lora_tune.tuner import run_study

    previous = signal.signal(signal.SIGTERM, _terminate)
    try:
        with ProgressView() as view:
            snapshot = run_study(
                spec, study_file=path, command=command, view=view, allow_code=allow_code
            )
    finally:
        signal.signal(signal.SIGTERM, previous)
    print_report(snapshot, Console(), next_command=f"lora-tune verify {snapshot.folder}")


def _study_file(study: str) -> Path:
    path = Path(study)
    if path.suffix == ".toml" or path.is_file():
        return path
    folder = find_study(study)
    lock = folder.load_lock()
    assert lock is not None
    return Path(lock.study_file)


def _terminate(number: int, frame: FrameType | None) -> None:
    raise Terminated
