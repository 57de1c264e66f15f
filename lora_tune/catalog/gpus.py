"""GPUs and the memory they really have, from ``gpus.toml`` next to this file.

A card's usable memory is what torch can allocate from, which is less than the sticker says:
"24 GB" is 22.0 GiB on an L4 and 23.7 GiB on a 3090. Every row of the table names its source.
"""

import tomllib
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from importlib.resources import files

from lora_tune.errors import StudyFileError
from lora_tune.units import MIB

# Words that people and drivers write before the name that tells cards apart.
_MAKERS = ("nvidia", "geforce", "tesla", "amd", "instinct", "rtx")


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One row of the catalogue."""

    name: str
    aliases: tuple[str, ...]
    memory_mib: int | None  # as nvidia-smi shows it; None: it shows nothing
    usable_bytes: int  # what torch can allocate from, CUDA context not yet subtracted
    usable_is_read: bool  # False: a cautious default, not a reading
    bandwidth_gb_s: float  # 1e9 bytes/s
    bf16_tflops: float | None  # dense, 1e12 operations/s; None: no bfloat16 units
    fp16_tflops: float  # dense, float32 accumulation
    fp32_tflops: float  # without TensorFloat-32
    compute_capability: str
    source: str

    @property
    def names(self) -> tuple[str, ...]:
        """The name and its aliases."""
        return (self.name, *self.aliases)

    def matrix_tflops(self, compute_dtype: str) -> float:
        """Return the peak matrix rate in a compute type, 1e12 operations/s.

        Without bfloat16 units the rate is that of float32, which is what torch falls back to.

        >>> find_gpu("T4").matrix_tflops("float16"), find_gpu("T4").matrix_tflops("bfloat16")
        (65, 8.1)
        """
        if compute_dtype == "float16":
            return self.fp16_tflops
        if compute_dtype == "bfloat16" and self.bf16_tflops is not None:
            return self.bf16_tflops
        return self.fp32_tflops


@cache
def load_gpus() -> tuple[Gpu, ...]:
    """Return the catalogue in the order of the table."""
    text = files("lora_tune.catalog").joinpath("gpus.toml").read_text("utf-8")
    return tuple(
        Gpu(
            name=row["name"],
            aliases=tuple(row.get("aliases", ())),
            memory_mib=row.get("memory_mib"),
            usable_bytes=row["usable_mib"] * MIB,
            usable_is_read=row["usable_is_read"],
            bandwidth_gb_s=row["bandwidth_gb_s"],
            bf16_tflops=row.get("bf16_tflops"),
            fp16_tflops=row.get("fp16_tflops", row.get("bf16_tflops")),
            fp32_tflops=row["fp32_tflops"],
            compute_capability=row["compute_capability"],
            source=row["source"],
        )
        for row in tomllib.loads(text)["gpu"]
    )


def find_gpu(name: str) -> Gpu:
    """Return the catalogue's GPU of that name.

    Case, spaces, hyphens, underscores and the maker's words in front do not matter.

    Raises:
        StudyFileError: No such GPU; the message has the nearest names and the whole list.

    >>> find_gpu("rtx-4090").name, find_gpu("NVIDIA A100-SXM4-80GB").name
    ('RTX 4090', 'A100 80GB')
    """
    by_key = {_key(known): gpu for gpu in load_gpus() for known in gpu.names}
    gpu = by_key.get(_key(name))
    if gpu is None:
        near = nearest_gpus(name)
        hint = f"; did you mean {' or '.join(near)}?" if near else "."
        known = ", ".join(gpu.name for gpu in load_gpus())
        raise StudyFileError(f'unknown GPU "{name}"{hint} Known: {known}.')
    return gpu


def nearest_gpus(name: str, limit: int = 3) -> tuple[str, ...]:
    """Return the names most like ``name``: those that contain it first, then similar spellings.

    >>> nearest_gpus("A100")
    ('A100 40GB', 'A100 80GB')
    """
    key = _key(name)
    by_key = {_key(gpu.name): gpu.name for gpu in load_gpus()}
    containing = [known for known in by_key if key and key in known]
    similar = containing or get_close_matches(key, by_key, n=limit, cutoff=0.6)
    return tuple(by_key[known] for known in similar[:limit])


def _key(name: str) -> str:
    key = "".join(char for char in name.casefold() if char not in " -_")
    for maker in _MAKERS:
        key = key.removeprefix(maker)
    return key
