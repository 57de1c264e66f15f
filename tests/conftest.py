"""Small real things shared by the tests: tiny models with random weights, rows, jobs."""

import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# The models of the tests are so small that a second thread only waits; on a busy machine it waits long.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from lora_tune.records import TokenizedRow

if TYPE_CHECKING:
    from lora_tune.engine.memory_reading import MemoryPeaks

for _number in (signal.SIGINT, signal.SIGHUP):
    # Under nohup, or in the background of a script, these are ignored, and programs that tests start would
    # inherit that. A handler that does nothing they do not inherit.
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, lambda *_: None)

collect_ignore = ["faults/fuzz_with_atheris.py"]  # a program that imports what is no dependency


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer Llama with random weights, as a folder with safetensors."""
    import torch
    import transformers

    folder = tmp_path_factory.mktemp("tiny-llama")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=131,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.2,  # large enough that losses and gradients differ between lanes
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def make_rows() -> Callable[..., tuple[TokenizedRow, ...]]:
    """Return a maker of random rows of mixed lengths whose second half carries the labels."""

    def make(
        count: int, *, seed: int = 0, vocab: int = 131, longest: int = 24
    ) -> tuple[TokenizedRow, ...]:
        generator = np.random.default_rng(seed)
        rows = []
        for _ in range(count):
            length = int(generator.integers(6, longest + 1))
            ids = tuple(int(i) for i in generator.integers(3, vocab, size=length))
            masked = length // 2
            rows.append(TokenizedRow(input_ids=ids, labels=(-100,) * masked + ids[masked:]))
        return tuple(rows)

    return make


class ReplayMeter:
    """A GPU's memory meter that replays given peaks: the n-th after the n-th restart, then the last."""

    device_name = "Replay 9000"
    device_id = ""

    def __init__(
        self, free_bytes: int, peaks: Sequence[tuple[int, int, int]], *, shown: int = 1
    ) -> None:
        self.free_bytes = free_bytes
        self.replayed = list(peaks)
        self.restarts = 0
        self.shown = shown

    def restart(self) -> None:
        self.restarts += 1

    def peaks(self) -> "MemoryPeaks":
        from lora_tune.engine.memory_reading import MemoryPeaks

        number = min(max(self.restarts, 1), len(self.replayed)) - 1
        return MemoryPeaks(*self.replayed[number])

    def in_use(self) -> int:
        return self.shown * self.restarts

    def allocated_beside(self, tensors: object) -> int:
        return 0


@pytest.fixture(scope="session")
def replay_meter() -> type[ReplayMeter]:
    """The class of meters that replay given peaks."""
    return ReplayMeter
