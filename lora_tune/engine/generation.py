"""Answers to the prompts of rows: greedy decoding with a lane's adapter, or with the untuned base.

A row's prompt is everything before its last run of labels, the last turn that carries loss; the reference is
that run. Decoding is transformers' ``generate`` with its cache: the most probable token each time, no
sampling, no beams, and nothing of the model's generation_config.json but its end tokens (a repetition
penalty, say, would change answers). It stops at an end token or after ``max_new_tokens``.

Shape key: B rows of a batch, P tokens of its longest prompt, T tokens with the answer.

Training lays rows in one line without padding (engine/attention.py), which a cache cannot follow. Here
prompts are padded on the left, under a mask, and the model has torch's attention while it writes.
"""

import gc
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import takewhile
from typing import NamedTuple

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.modeling_layers import GradientCheckpointingLayer

from lora_tune.engine.attention import attend_as_loaded, attend_by_rows
from lora_tune.engine.base import BaseModel
from lora_tune.engine.batches import IGNORED
from lora_tune.engine.lora import LaneAdapter
from lora_tune.engine.memory_errors import is_out_of_memory
from lora_tune.records import TokenizedRow

# Of a batch, while memory lasts. On two CPU cores a 135M model wrote 63, 120 and 128 tokens/s with 16, 32 and
# 64 rows.
MOST_ROWS = 32


class PromptAndReference(NamedTuple):
    """A row's token ids: what the model is given, and what stands there in the data."""

    prompt: tuple[int, ...]
    reference: tuple[int, ...]


def split_row(row: TokenizedRow) -> PromptAndReference:
    """Return what precedes the last run of labels, and that run; nothing precedes a row of plain text.

    >>> split_row(TokenizedRow(input_ids=(5, 6, 7, 8, 9), labels=(-100, 6, -100, 8, 9)))
    PromptAndReference(prompt=(5, 6, 7), reference=(8, 9))
    """
    stop = len(row.labels)
    while stop and row.labels[stop - 1] == IGNORED:
        stop -= 1
    start = stop
    while start and row.labels[start - 1] != IGNORED:
        start -= 1
    return PromptAndReference(row.input_ids[:start], row.input_ids[start:stop])


def end_tokens(
    base: BaseModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[TokenizedRow]
) -> frozenset[int]:
    """Return the ids at which an answer ends.

    These are the end tokens of the model's generation config, the tokenizer's end of text, and the
    token with which most of the rows' references end if it is a special one: a chat template may close turns
    with a token that an untuned model does not end with.
    """
    config: transformers.GenerationConfig | None = base.model.generation_config
    named = config.eos_token_id if config is not None else None
    found = {named} if isinstance(named, int) else set(named or ())
    if tokenizer.eos_token_id is not None:
        found.add(tokenizer.eos_token_id)
    last = Counter(reference[-1] for _, reference in map(split_row, rows) if reference)
    for token, _ in last.most_common(1):
        added = tokenizer.added_tokens_decoder.get(token)
        if added is not None and added.special:
            found.add(token)
    return frozenset(int(token) for token in found)


class AnswerWriter:
    """Writes answers in batches; ``batch_rows`` is halved when memory runs out, and stays so."""

    def __init__(self, base: BaseModel, *, max_new_tokens: int) -> None:
        self.base = base
        self.max_new_tokens = max_new_tokens
        self.batch_rows = MOST_ROWS

    def write(
        self,
        adapter: LaneAdapter | None,
        rows: Sequence[PromptAndReference],
        *,
        ends: frozenset[int],
    ) -> list[tuple[int, ...]]:
        """Return the token ids of every row's answer, in the rows' order, without the end token.

        References only tell which answers may be of like length: those share a batch.

        Args:
            adapter: Its dropout is off; None: the untuned base.
            rows: Each with a prompt of at least one token.
            ends: Ids at which an answer ends.

        Raises:
            torch.OutOfMemoryError: There is not memory enough for a single row (or whatever else
                ``is_out_of_memory`` knows).
        """
        answers: dict[int, tuple[int, ...]] = {}
        waiting = sorted(range(len(rows)), key=lambda i: -len(rows[i].reference))
        while waiting:
            batch = waiting[: self.batch_rows]
            failed = False
            try:
                with _generating(self.base, adapter):
                    found = self._generate([rows[i].prompt for i in batch], ends)
            except Exception as error:
                if not is_out_of_memory(error) or len(batch) == 1:
                    raise
                failed = True  # leave the handler first: the traceback holds the tensors
            if failed:
                self.batch_rows = len(batch) // 2
                free_what_failed(self.base.device)
                continue
            answers |= zip(batch, found, strict=True)
            waiting = waiting[len(batch) :]
        return [answers[i] for i in range(len(rows))]

    def _generate(
        self, prompts: Sequence[tuple[int, ...]], ends: frozenset[int]
    ) -> list[tuple[int, ...]]:
        model = self.base.model
        filler = min(ends, default=0)
        longest = max(map(len, prompts))
        ids_BP = torch.full((len(prompts), longest), filler)
        mask_BP = torch.zeros_like(ids_BP)
        for b, prompt in enumerate(prompts):
            ids_BP[b, longest - len(prompt) :] = torch.tensor(prompt)
            mask_BP[b, longest - len(prompt) :] = 1
        # generate() fills what is not given here from the model's own generation config
        model.generation_config = transformers.GenerationConfig(
            do_sample=False,
            num_beams=1,
            max_new_tokens=self.max_new_tokens,
            eos_token_id=sorted(ends) or None,
            pad_token_id=filler,
        )
        out_BT: Tensor = model.generate(  # type: ignore[operator]
            input_ids=ids_BP.to(self.base.device), attention_mask=mask_BP.to(self.base.device)
        )
        written = out_BT[:, longest:].tolist()
        return [tuple(takewhile(lambda token: token not in ends, row)) for row in written]


@contextmanager
def _generating(base: BaseModel, adapter: LaneAdapter | None) -> Iterator[None]:
    """Let the model write with one adapter on every row; then leave it as training needs it."""
    model, layout = base.model, base.layout
    config = model.generation_config
    # a checkpointed layer drops the cache without an error
    checkpointed = [
        module
        for module in model.modules()
        if isinstance(module, GradientCheckpointingLayer) and module.training
    ]
    layout.adapters, layout.steps = (adapter,), (0,)
    # the adapter's tokens are all there are, however many a pass has
    layout.set_pass((slice(0, None),), (None,), None)
    try:
        for module in checkpointed:
            module.training = False
        if base.flat:
            attend_as_loaded(model)
        yield
    finally:
        if base.flat:
            attend_by_rows(model, layout)
        for module in checkpointed:
            module.training = True
        model.generation_config = config
        layout.clear()


def free_what_failed(device: torch.device) -> None:
    """Give back the memory that a pass has left which failed; call it outside of the handler."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
