"""What is free on this machine's GPU now, asked of the driver; torch is not needed for it."""

import os
import re
import subprocess

from lora_tune.catalog.gpus import find_gpu
from lora_tune.errors import MachineError, StudyFileError
from lora_tune.memory.verdict import Device
from lora_tune.units import MIB

_QUERY = ["--query-gpu=name,memory.free,compute_cap", "--format=csv,noheader,nounits"]
_ANSWER = re.compile(r"^(.+), *(\d+), *(\d+\.\d+)$")
_WAIT_S = 20  # a driver that is not loaded yet takes some seconds


def this_machines_gpu(*, key: str) -> Device:
    """Return the first visible GPU with the memory that is free on it now.

    Args:
        key: Where the user wrote ``auto``: ``--gpu`` or ``memory.gpu``.

    Raises:
        MachineError: There is no NVIDIA driver, no GPU, or the driver does not tell its memory.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip()
    if visible in ("", "-1"):
        raise MachineError(_sentence(key, "CUDA_VISIBLE_DEVICES hides every GPU"))
    try:
        done = subprocess.run(
            ["nvidia-smi", f"--id={visible}", *_QUERY],
            capture_output=True,
            text=True,
            timeout=_WAIT_S,
            check=True,
        )
    except FileNotFoundError as error:
        raise MachineError(_sentence(key, "nvidia-smi is not installed")) from error
    except subprocess.TimeoutExpired as error:
        raise MachineError(_sentence(key, f"nvidia-smi gave no answer in {_WAIT_S} s")) from error
    except (subprocess.CalledProcessError, OSError) as error:
        said = getattr(error, "stdout", None) or getattr(error, "stderr", None) or str(error)
        raise MachineError(_sentence(key, f"nvidia-smi says: {' '.join(said.split())}")) from error
    line = (done.stdout.splitlines() or [""])[0]
    match = _ANSWER.match(line)
    if match is None:
        raise MachineError(_sentence(key, f'nvidia-smi does not tell what is free ("{line}")'))
    name, free_mib, capability = match.groups()
    return Device(
        name=_catalogue_name(name),
        usable_bytes=int(free_mib) * MIB,
        compute_capability=capability,
        has_bfloat16=float(capability) >= 8,
    )


def _catalogue_name(name: str) -> str:
    try:
        return find_gpu(name).name
    except StudyFileError:
        return name


def _sentence(key: str, why: str) -> str:
    return (
        f'{key} is "auto", which means what is free on this machine\'s GPU, but {why}. '
        'Give --gpu with a GPU of the catalogue (lora-tune estimate --list) or a size such as "24GiB".'
    )
