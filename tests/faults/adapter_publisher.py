"""A program that writes PEFT adapters and is killed while it does: prints what was left, as JSON.

``python adapter_publisher.py FOLDER CASE...`` with cases such as ``publish/fresh/random:15`` (kills at random
moments), ``peft/over-good/every-call`` (before each call that changes the disk, one after the other; needs
``counted_calls.c`` preloaded) and ``publish/over-good/every-call/no-exchange`` (on a kernel that cannot let
two folders change places). The writer is ``publish``, or ``peft``: its own ``save_pretrained`` alone. Every
weight of an adapter is the number of its generation, and the config names it too, so that a mixture is seen.
"""

import ctypes
import json
import os
import random
import shutil
import signal
import statistics
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import peft
import torch
import transformers
from safetensors.torch import load_file

from lora_tune.files import is_complete, publish_folder
from lora_tune.store.folder import StudyFolder

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


class Writer:
    """Writes generation after generation of one adapter to one place."""

    def __init__(self, kind: str, target: Path) -> None:
        self.kind, self.target = kind, target
        config = transformers.LlamaConfig(
            vocab_size=64,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
        )
        base = transformers.LlamaForCausalLM(config)
        self.model = peft.get_peft_model(
            base, peft.LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
        )

    def write(self, generation: int) -> None:
        with torch.no_grad():
            for parameter in self.model.parameters():
                if parameter.requires_grad:
                    parameter.fill_(float(generation))
        self.model.peft_config["default"].base_model_name_or_path = f"generation-{generation}"
        if self.kind == "peft":
            self.model.save_pretrained(self.target)
            return
        with publish_folder(self.target) as folder:
            self.model.save_pretrained(folder)

    def found(self) -> str:
        """Say what a reader finds: ``none``, ``half``, or ``whole``."""
        if not self.target.exists():
            return "none"
        if self.kind == "publish" and not is_complete(self.target):
            return "half"
        try:
            config = json.loads((self.target / CONFIG).read_text())
            weights = load_file(self.target / WEIGHTS)
        except Exception:  # whatever a reader would see
            return "half"
        generation = float(config["base_model_name_or_path"].removeprefix("generation-"))
        same = all(bool((tensor == generation).all()) for tensor in weights.values())
        return "whole" if same else "half"


def restore(writer: Writer, start: str) -> None:
    """Bring the place back to where a kill begins."""
    for path in writer.target.parent.iterdir():
        shutil.rmtree(path)
    if start == "over-good":
        writer.write(1)


def killed_at_random(writer: Writer, start: str, kills: int) -> Iterator[str]:
    """Kill ``kills`` writers, each at a moment of its first writes; yield what is found after each."""
    drawn, seconds = random.Random(11), []
    for generation in range(5):
        began = time.perf_counter()
        writer.write(generation)
        seconds.append(time.perf_counter() - began)
    for _ in range(kills):
        restore(writer, start)
        pid = os.fork()
        if pid == 0:
            for generation in range(2, 1000):
                writer.write(generation)
            os._exit(1)
        time.sleep(drawn.uniform(0, 3 * statistics.median(seconds)))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        yield found_after(writer)


def killed_at_every_call(writer: Writer, start: str, *, exchange: bool) -> Iterator[str]:
    """Kill a writer before its first call that changes the disk, the next before its second, and so on."""
    calls = ctypes.CDLL(None)
    for number in range(1, 10_000):
        restore(writer, start)
        pid = os.fork()
        if pid == 0:
            calls.allow_exchange(exchange)
            calls.kill_before_call(number)
            writer.write(2)
            os._exit(0)
        _, status = os.waitpid(pid, 0)
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0
            return
        yield found_after(writer)


def found_after(writer: Writer) -> str:
    """Say what a reader finds after a kill, and after the next start, which tidies."""
    found = writer.found()
    if found != "none" or not any(writer.target.parent.glob(".adapter.old.*")):
        return found
    StudyFolder(writer.target.parent).tidy()
    after = writer.found()
    return "whole after tidying" if after == "whole" else after


def run_case(case: str, folder: Path) -> dict[str, int]:
    """Return how often a reader found what."""
    kind, start, how, *options = case.split("/")
    folder.mkdir(parents=True)
    writer = Writer(kind, folder / "adapter")
    if how.startswith("random:"):
        return Counter(killed_at_random(writer, start, int(how.removeprefix("random:"))))
    return Counter(killed_at_every_call(writer, start, exchange="no-exchange" not in options))


def main() -> None:
    folder, *cases = sys.argv[1:]
    warnings.simplefilter("ignore")
    found = {case: run_case(case, Path(folder) / str(n)) for n, case in enumerate(cases)}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
