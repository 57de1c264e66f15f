"""The same trial by plain PEFT and torch: the witness against which packed lanes are checked.

Nothing here uses the packed layers, the chunked loss or the lane's optimizer step: PEFT's own layers,
the model's own forward with full logits, torch's cross entropy, and autograd. Only three
things are shared, since without them no two runs could agree: the rows of a step, the initial A
matrices, and the seeds of the dropout masks.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import bitsandbytes as bnb
import peft
import torch
import transformers
from torch import Tensor, nn

from lora_tune.engine.adapter_files import peft_config
from lora_tune.engine.base import DTYPES, quantization_config
from lora_tune.engine.batches import rows_of_step
from lora_tune.engine.lora import keyed_seed
from lora_tune.engine.schedule import learning_rate_at
from lora_tune.records import LaneJob, TokenizedRow

_ADAPTER = "default"


@dataclass
class Clock:
    """Where a trial is: what its dropout masks depend on."""

    step: int = 0
    micro_step: int = 0
    real_BT: Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.bool))


class SeededDropout(nn.Module):
    """``nn.Dropout`` whose mask is a function of (seed, step, micro-step, module).

    A mask has a row for each real token; what padding gets does not matter.
    """

    def __init__(self, probability: float, seed: int, name: str, clock: "Clock") -> None:
        super().__init__()
        self.probability = probability
        self.seed = seed
        self.name = name
        self.clock = clock

    def forward(self, x: Tensor) -> Tensor:
        """Return x with a share of its elements zeroed and the rest scaled up."""
        if not self.training:
            return x
        clock = self.clock
        seed = keyed_seed(self.seed, "dropout", clock.step, clock.micro_step, self.name)
        generator = torch.Generator(x.device).manual_seed(seed)
        drawn = torch.empty(
            int(clock.real_BT.sum()), x.shape[-1], dtype=torch.bool, device=x.device
        )
        drawn.bernoulli_(1 - self.probability, generator=generator)
        keep = torch.ones(x.shape, dtype=torch.bool, device=x.device)
        keep[clock.real_BT] = drawn
        return x * keep / (1 - self.probability)


class ReferenceTrial:
    """A trial trained alone by PEFT, one effective batch after the other."""

    def __init__(
        self,
        folder: Path,
        job: LaneJob,
        train: Sequence[TokenizedRow],
        *,
        initial: dict[str, tuple[Tensor, Tensor]],
        quantization: str,
        compute_dtype: str,
        effective_batch_size: int,
        micro_batch_size: int,
        max_grad_norm: float,
        weight_decay: float,
        device: str = "cpu",
    ) -> None:
        assert job.config is not None
        self.job, self.config, self.train = job, job.config, train
        self.effective_batch_size, self.micro_batch_size = effective_batch_size, micro_batch_size
        self.max_grad_norm = max_grad_norm
        self.clock = Clock()
        dtype = DTYPES[compute_dtype]
        base = transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            quantization_config=quantization_config(quantization, dtype),
            device_map={"": device},
            use_safetensors=True,
            trust_remote_code=False,
        )
        for module in base.modules():
            if isinstance(module, bnb.nn.Linear4bit):
                module.support_avx512bf16_for_cpu = False  # see engine/base.py
        config = peft_config(self.config, base_model=None, inference=False)
        self.model = peft.get_peft_model(base, config).eval()
        self.weights: dict[str, tuple[Tensor, Tensor]] = {}
        for name in self.config.target_modules:
            layer = self.model.base_model.model.get_submodule(name)
            pair = (layer.lora_A[_ADAPTER].weight, layer.lora_B[_ADAPTER].weight)
            for matrix, start in zip(pair, initial[name], strict=True):
                matrix.data.copy_(start)
            self.weights[name] = pair
            if self.config.lora_dropout:
                dropout = SeededDropout(
                    self.config.lora_dropout, self.config.dropout_seed, name, self.clock
                )
                layer.lora_dropout[_ADAPTER] = dropout.train()
        parameters = [matrix for pair in self.weights.values() for matrix in pair]
        self.optimizer = torch.optim.AdamW(parameters, weight_decay=weight_decay)
        self.scaler = torch.amp.GradScaler(device, enabled=compute_dtype == "float16")

    def accumulate(self, step: int) -> float:
        """Run the effective batch of ``step`` forward and backward; return its mean loss (nats)."""
        numbers = rows_of_step(
            len(self.train),
            step=step,
            batch_size=self.effective_batch_size,
            data_seed=self.config.data_seed,
        )
        rows = sorted((self.train[i] for i in numbers), key=lambda row: -len(row.input_ids))
        total_labels = sum(row.num_labels for row in rows)
        self.clock.step = step
        self.optimizer.zero_grad(set_to_none=True)
        mean = 0.0
        for micro in range(self.effective_batch_size // self.micro_batch_size):
            self.clock.micro_step = micro
            part = rows[micro * self.micro_batch_size : (micro + 1) * self.micro_batch_size]
            loss = self._summed_losses(part).sum() / total_labels
            self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            mean += float(loss.detach())
        return mean

    def train_step(self, step: int) -> float:
        """Do optimizer step ``step`` (1 is the first); return the loss before it."""
        loss = self.accumulate(step)
        self.scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(list(self.model.parameters()), self.max_grad_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate_at(
                step,
                peak=self.config.learning_rate,
                warmup_steps=self.job.warmup_steps,
                hold_step=self.job.hold_step,
                end_step=self.job.end_step,
            )
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return loss

    @torch.no_grad()
    def evaluate(self, rows: Sequence[TokenizedRow]) -> list[float]:
        """Return each row's summed loss in nats, one row at a time."""
        modules = [m for m in self.model.modules() if isinstance(m, SeededDropout)]
        for module in modules:
            module.eval()
        sums = [float(self._summed_losses([row])) for row in rows]
        for module in modules:
            module.train()
        return sums

    def _summed_losses(self, rows: Sequence[TokenizedRow]) -> Tensor:
        longest = max(len(row.input_ids) for row in rows)
        device = next(self.model.parameters()).device
        ids = torch.zeros(len(rows), longest, dtype=torch.int64)
        labels = torch.full((len(rows), longest), -100)
        for b, row in enumerate(rows):
            ids[b, : len(row.input_ids)] = torch.tensor(row.input_ids)
            labels[b, : len(row.labels)] = torch.tensor(row.labels)
        mask = torch.arange(longest) < torch.tensor([[len(row.input_ids)] for row in rows])
        self.clock.real_BT = mask.to(device)
        logits = self.model(
            input_ids=ids.to(device), attention_mask=self.clock.real_BT, use_cache=False
        ).logits
        per_token = nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1).float(),
            labels[:, 1:].flatten().to(device),
            ignore_index=-100,
            reduction="none",
        )
        return per_token.reshape(len(rows), -1).sum(-1)
