"""Answers of a lane's adapter against plain PEFT and transformers' ``generate``, one row at a time.

Rows have prompts of different lengths, so that a batch is padded; one family of models is there for each way
in which padding could be seen. The base must be the same after writing as before, also after an error.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from test_exactness import SETTINGS, gradients, load, make_job, randomize_b
from test_flat_rows import FLAT, PADDED, build
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from lora_tune.engine import attention
from lora_tune.engine.adapter_files import save_adapter
from lora_tune.engine.base import BaseModel, quantization_config
from lora_tune.engine.generation import AnswerWriter, PromptAndReference, end_tokens, split_row
from lora_tune.engine.lane import Lane
from lora_tune.engine.pack import TrialPack
from lora_tune.records import TokenizedRow

NEW_TOKENS = 12
NO_END: frozenset[int] = frozenset()


def make_parts(
    lengths: Sequence[int], *, vocab: int = 99, seed: int = 0
) -> list[PromptAndReference]:
    generator = np.random.default_rng(seed)
    return [
        PromptAndReference(
            tuple(int(i) for i in generator.integers(3, vocab, size=length)), (5,) * (length % 4)
        )
        for length in lengths
    ]


PARTS = make_parts((9, 3, 14, 1, 3, 22, 9))


def trained_lane(base: BaseModel, rows: tuple[TokenizedRow, ...], lane: int) -> Lane:
    """Return a lane after two steps, its adapter far enough from zero to change answers."""
    pack = TrialPack(base, rows, SETTINGS)
    started = pack.new_lane(make_job(lane))
    randomize_b(started)
    pack.train_step([started])
    pack.train_step([started])
    return started


def peft_answers(
    folder: Path, adapter: Path, quantization: str, parts: Sequence[PromptAndReference]
) -> list[tuple[int, ...]]:
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        quantization_config=quantization_config(quantization, torch.float32),
        device_map={"": "cpu"},
    )
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # see engine/base.py
    return lone_answers(peft.PeftModel.from_pretrained(model, adapter).eval(), parts)


def lone_answers(
    model: Any, parts: Sequence[PromptAndReference], **keys: Any
) -> list[tuple[int, ...]]:
    answers = []
    for part in parts:
        ids = torch.tensor([part.prompt])
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=NEW_TOKENS,
            pad_token_id=0,
            **keys,
        )
        answer = out[0, len(part.prompt) :].tolist()
        answers.append(tuple(token for token in answer if token != 2))
    return answers


@pytest.fixture(scope="module")
def rows(make_rows: Callable[..., tuple[TokenizedRow, ...]]) -> tuple[TokenizedRow, ...]:
    return make_rows(20)


@pytest.mark.parametrize("quantization", ["nf4", "none"])
@pytest.mark.parametrize("lane", [0, 2])  # dropout 0.1, all linear layers; dropout 0.1, mlp
def test_answers_of_an_adapter_are_those_of_plain_peft(
    tiny_llama: Path, rows, tmp_path: Path, quantization: str, lane: int
) -> None:
    base = load(tiny_llama, quantization, "float32")
    adapter = trained_lane(base, rows, lane).adapter
    writer = AnswerWriter(base, max_new_tokens=NEW_TOKENS)
    found = writer.write(adapter, PARTS, ends=frozenset({2}))
    save_adapter(adapter, tmp_path, base_model=None)
    assert found == peft_answers(tiny_llama, tmp_path, quantization, PARTS)
    assert found != writer.write(None, PARTS, ends=frozenset({2}))  # the adapter does something


@pytest.mark.parametrize("family", [*FLAT, *PADDED])
def test_every_family_answers_in_a_batch_as_its_rows_do_alone(family: str) -> None:
    config = {**FLAT, **PADDED}[family]
    base = build(config)
    found = AnswerWriter(base, max_new_tokens=NEW_TOKENS).write(None, PARTS, ends=NO_END)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    model.generation_config.eos_token_id = None
    wanted = lone_answers(model, PARTS)
    assert [tuple(t for t in answer if t != 2) for answer in found] == wanted
    assert len(set(found)) > 1


def test_an_answer_ends_before_the_first_end_token(tiny_llama: Path) -> None:
    base = load(tiny_llama, "none", "float32")
    writer = AnswerWriter(base, max_new_tokens=NEW_TOKENS)
    whole = writer.write(None, PARTS, ends=NO_END)
    assert {len(answer) for answer in whole} == {NEW_TOKENS}
    ends = frozenset({whole[0][3], whole[2][5]})
    wanted = []
    for answer in whole:
        cut = next((i for i, token in enumerate(answer) if token in ends), NEW_TOKENS)
        wanted.append(answer[:cut])
    assert len(wanted[0]) < NEW_TOKENS
    assert writer.write(None, PARTS, ends=ends) == wanted


def test_settings_of_the_model_s_generation_config_do_not_change_answers(tiny_llama: Path) -> None:
    base = load(tiny_llama, "none", "float32")
    writer = AnswerWriter(base, max_new_tokens=NEW_TOKENS)
    wanted = writer.write(None, PARTS, ends=NO_END)
    own = base.model.generation_config
    own.repetition_penalty, own.no_repeat_ngram_size = 5.0, 2
    own.do_sample, own.temperature, own.min_new_tokens = True, 3.0, 4
    assert writer.write(None, PARTS, ends=NO_END) == wanted
    assert base.model.generation_config is own
    assert own.repetition_penalty == 5.0


class SmallMemory(AnswerWriter):
    """Runs out of memory, after it has written, with more than ``most`` rows."""

    most = 2

    def _generate(self, prompts: Any, ends: Any) -> list[tuple[int, ...]]:
        found = super()._generate(prompts, ends)
        if len(prompts) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return found


def test_a_batch_too_large_for_the_memory_is_halved_and_stays_small(tiny_llama: Path) -> None:
    base = load(tiny_llama, "none", "float32")
    wanted = AnswerWriter(base, max_new_tokens=NEW_TOKENS).write(None, PARTS, ends=NO_END)
    writer = SmallMemory(base, max_new_tokens=NEW_TOKENS)
    assert writer.write(None, PARTS, ends=NO_END) == wanted
    assert writer.batch_rows == 1  # 7, 3, 1


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("fails", [False, True])
def test_training_goes_on_with_the_same_bits_after_writing(
    tiny_llama: Path, rows, checkpointing: bool, fails: bool
) -> None:
    def next_step(*, written: bool) -> tuple[float, dict[str, torch.Tensor]]:
        base = load(tiny_llama, "nf4", "float32")
        base.set_gradient_checkpointing(checkpointing)
        lane = trained_lane(base, rows, 0)
        modes = [module.training for module in base.model.modules()]
        if written:
            writer = SmallMemory(base, max_new_tokens=NEW_TOKENS)
            writer.most = 0 if fails else 9
            if fails:
                with pytest.raises(torch.OutOfMemoryError):
                    writer.write(lane.adapter, PARTS, ends=NO_END)
            else:
                writer.write(lane.adapter, PARTS, ends=NO_END)
        assert base.model.config._attn_implementation == attention.NAME
        assert [module.training for module in base.model.modules()] == modes
        assert (base.layout.adapters, base.layout.tokens, base.layout.rows) == ((), (), None)
        pack = TrialPack(base, rows, SETTINGS)
        pack.train_step([lane])
        return lane.points[-1].train_loss, gradients(lane)

    loss, found = next_step(written=True)
    wanted_loss, wanted = next_step(written=False)
    assert loss == wanted_loss
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_checkpointing_does_not_change_answers(tiny_llama: Path, rows) -> None:
    base = load(tiny_llama, "none", "float32")
    adapter = trained_lane(base, rows, 0).adapter
    writer = AnswerWriter(base, max_new_tokens=NEW_TOKENS)
    wanted = writer.write(adapter, PARTS, ends=NO_END)
    base.set_gradient_checkpointing(True)
    assert writer.write(adapter, PARTS, ends=NO_END) == wanted


@pytest.mark.parametrize(
    ("labelled", "prompt", "reference"),
    [
        ("-----xxxx", 5, 4),
        ("--xx--xxx", 6, 3),  # an earlier turn that carries loss belongs to the prompt
        ("--xx--xx-", 6, 2),  # the newline behind the end of the turn
        ("xxxxxxxxx", 0, 9),  # plain text
    ],
)
def test_the_last_run_of_labels_is_the_reference(labelled, prompt: int, reference: int) -> None:
    ids = tuple(range(10, 19))
    labels = tuple(i if mark == "x" else -100 for i, mark in zip(ids, labelled, strict=True))
    found = split_row(TokenizedRow(input_ids=ids, labels=labels))
    assert found == (ids[:prompt], ids[prompt : prompt + reference])


def test_answers_end_at_the_token_that_closes_the_turns_of_the_data(tiny_llama: Path, rows) -> None:
    base = load(tiny_llama, "none", "float32")
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(131)}, unk_token="w0"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w4")
    closed = [
        TokenizedRow(input_ids=(*row.input_ids, 9), labels=(*row.labels, 9)) for row in rows[:5]
    ]
    assert end_tokens(base, tokenizer, closed) == {2, 4}  # w9 is an ordinary word
    tokenizer.add_special_tokens({"additional_special_tokens": ["w9"]})
    assert end_tokens(base, tokenizer, closed) == {2, 4, 9}
    base.model.generation_config.eos_token_id = [2, 7]
    assert end_tokens(base, tokenizer, rows) == {2, 4, 7}
