"""The closed form against a real optimizer step of the engine, every storage counted.

The step runs on the CPU with real tensors; a dispatch mode adds up the storages that ops make and
drops them when they die, with the CUDA allocator's rounding. Nothing of the estimate is used.
"""

import weakref
from collections.abc import Iterator, Sequence

import pytest
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import lora_tune.engine.attention
from lora_tune.engine.base import BaseModel
from lora_tune.engine.pack import PackSettings, TrialPack
from lora_tune.memory.estimate import estimate_memory
from lora_tune.memory.request import LaneShape, MemoryRequest
from lora_tune.memory.shape import ModelShape
from lora_tune.records import LaneJob, TokenizedRow, TrialConfig
from lora_tune.trace.tracker import adds_up_gradients

ROWS, LENGTH = 2, 128
QV = ("q_proj", "v_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
ALL = (*QV, "k_proj", "o_proj", *MLP)
CONFIG = transformers.LlamaConfig(
    hidden_size=128,
    intermediate_size=352,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=160,
)


@pytest.fixture(autouse=True)
def one_part() -> Iterator[None]:
    """A dispatch mode sees the thread in which it is on: lanes must not be cut into parts."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class StorageCounter(TorchDispatchMode):
    """Counts the bytes of all living storages that were added or made under it."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.total = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.add.Tensor and adds_up_gradients(args):
            return args[0].add_(args[1])
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.add(leaf)
        return out

    def add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self.sizes:
            self.sizes[key] = -(-storage.nbytes() // 512) * 512
            self.total += self.sizes[key]
            self.peak = max(self.peak, self.total)
            weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self.total -= self.sizes.pop(key)


def counted_step(
    lanes: Sequence[LaneShape],
    *,
    dtype: str,
    checkpointing: bool,
    group_rank: int,
    micro_steps: int,
) -> tuple[int, int]:
    """Return the static bytes and the peak of the second optimizer step."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(CONFIG)
    base = BaseModel(model, compute_dtype=getattr(torch, dtype))
    base.set_gradient_checkpointing(checkpointing)
    row = TokenizedRow(input_ids=tuple(range(LENGTH)), labels=tuple(range(LENGTH)))
    settings = PackSettings(
        effective_batch_size=ROWS * micro_steps,
        micro_batch_size=ROWS,
        max_grad_norm=1.0,
        weight_decay=0.0,
        group_rank=group_rank,
    )
    pack = TrialPack(base, (row,) * ROWS * micro_steps, settings)
    running = [pack.new_lane(job(base, number, lane)) for number, lane in enumerate(lanes)]
    pack.train_step(running)
    counter = StorageCounter()
    for parameter in base.model.parameters():
        counter.add(parameter.data)
    for lane in running:
        flat = lane.adapter.flat
        for tensor in (flat, flat.grad, *lane.optimizer.state[flat].values()):
            counter.add(tensor)
    static = counter.total
    with counter:
        pack.train_step(running)
    return static, counter.peak


def job(base: BaseModel, number: int, lane: LaneShape) -> LaneJob:
    modules = tuple(s.name for s in base.linears if s.name.rpartition(".")[2] in lane.targets)
    config = TrialConfig(
        rank=lane.rank,
        lora_alpha=8.0,
        lora_dropout=lane.lora_dropout,
        target_set="tested",
        target_modules=modules,
        learning_rate=1e-3,
        init_seed=number,
    )
    return LaneJob(
        trial=number,
        rung=0,
        config=config,
        start_step=0,
        hold_step=9,
        end_step=9,
        warmup_steps=1,
        eval_split="selection",
        eval_dtype="train",
        start_folder=None,
        result_folder=None,
    )


def lane(rank: int, targets: tuple[str, ...], dropout: float = 0.0) -> LaneShape:
    return LaneShape(rank=rank, targets=targets, lora_dropout=dropout)


PACKS = {
    "qv": (lane(8, QV),),
    "all": (lane(8, ALL),),
    "all, dropout": (lane(8, ALL, 0.05),),
    "mlp": (lane(8, MLP),),
    "three lanes": (lane(8, ALL),) * 3,
    "three lanes, dropout": (lane(8, ALL, 0.1),) * 3,
    "mixed": (lane(4, QV), lane(16, ALL, 0.1), lane(8, MLP, 0.05)),
}
CASES = [
    pytest.param(name, group_rank, id=f"{name}, {group_rank}")
    for name, lanes in PACKS.items()
    for group_rank in ([0, 20, 64] if len(lanes) > 1 else [64])
]


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("pack", "group_rank"), CASES)
def test_the_estimate_of_a_step_is_what_the_engine_allocates(
    pack: str, dtype: str, checkpointing: bool, group_rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lora_tune.engine.attention, "SHORT", 0)  # a CPU's own form in 16 bit
    lanes = PACKS[pack]
    # Micro-batches alternate over the cases rather than double them.
    micro_steps = 2 if len(lanes) == 1 else 1
    static, measured = counted_step(
        lanes,
        dtype=dtype,
        checkpointing=checkpointing,
        group_rank=group_rank,
        micro_steps=micro_steps,
    )
    request = MemoryRequest(
        quantization="none",
        compute_dtype=dtype,
        lanes=lanes,
        micro_batch_size=ROWS,
        max_length=LENGTH,
        gradient_checkpointing=checkpointing,
        compute_capability=None,
        gradient_accumulation=micro_steps > 1,
        group_rank=group_rank,
    )
    estimate = estimate_memory(ModelShape.from_config(CONFIG.to_dict()), request)
    terms = ("base_weights", "adapters", "gradients", "optimizer")
    known = sum(estimate.terms[term] for term in terms)
    assert 0 <= static - known < 0.01 * static  # rounding to 512 bytes, rotary buffers
    # Of what a step adds to the static bytes: at most 1 % too little. Too much: by 11 %
    # where lanes of different target sets have their widest moments at different times.
    ratio = (estimate.peak_allocated_bytes - static) / (measured - static)
    assert 0.99 < ratio < 1.12
