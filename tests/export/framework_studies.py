"""Finished studies for exports to other frameworks, written without training, and how files are read back."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from lora_tune.export.job import ExportJob
from lora_tune.hub import find_config
from lora_tune.memory.shape import ModelShape
from lora_tune.records import (
    Candidate,
    Confirmation,
    ConfirmationRun,
    DataFingerprint,
    EvalResult,
    LanePlan,
    ModelIdentity,
    StudyLock,
    StudySnapshot,
    TargetSet,
    TrialConfig,
    TrialState,
)
from lora_tune.stats.selection import CandidateRuns, decide
from lora_tune.store.folder import StudyFolder
from lora_tune.study.loader import validate_study
from lora_tune.units import GIB

LLAMA = "meta-llama/Llama-3.1-8B"
SHAPE = ModelShape.from_config(find_config(LLAMA, base_dir=Path()).config)
OTHER_MODULES = ("lm_head", "model.embed_tokens", "model.norm", "model.layers.0.input_layernorm")


def modules(*suffixes: str) -> tuple[str, ...]:
    """Return the full names of the Llama's linear layers that end so; all without a suffix."""
    return tuple(n for n in SHAPE.linear_names if not suffixes or n.endswith(suffixes))


WINNERS: dict[str, dict[str, object]] = {
    "a small rank": {"rank": 1, "lora_alpha": 1.0},
    "a large rank and alpha": {"rank": 256, "lora_alpha": 2048.0},
    "an alpha that is no whole number": {"rank": 4, "lora_alpha": 2.5},
    "an alpha below one": {"rank": 2, "lora_alpha": 0.5},
    "dropout": {"lora_dropout": 0.05},
    "attention, two matrices": {"target_modules": modules("q_proj", "v_proj")},
    "the mlp": {"target_modules": modules("gate_proj", "up_proj", "down_proj")},
    "all linear layers": {"target_modules": modules()},
    "one layer alone": {"target_modules": ("model.layers.3.self_attn.q_proj",)},
    "a low learning rate": {"learning_rate": 3.1622776601683795e-05},
    "a learning rate with all its digits": {"learning_rate": 0.01860666942489916},
    "rank-stabilised scaling": {"use_rslora": True},
    "a base that is not quantized": {"quantization": "none"},
    "float16": {"compute_dtype": "float16"},
    "float32": {"compute_dtype": "float32", "quantization": "none"},
}
"""Every searched setting, and what else a study decides, by what is special about it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadBack:
    """What an exported file says, in the study's own terms."""

    base: str
    revision: str | None
    quantization: str
    compute_dtype: str
    rank: int
    lora_alpha: float
    lora_dropout: float
    use_rslora: bool
    target_modules: list[str]  # as the framework hands them to PEFT
    learning_rate: float
    rates: list[float]  # of every step, as a share of the peak
    betas: tuple[float, float]
    epsilon: float
    weight_decay: float
    max_grad_norm: float
    rows_a_step: int
    checkpointing: bool
    max_length: int
    seed: int


def finished_study(
    folder: Path,
    *,
    quantization: str = "nf4",
    compute_dtype: str = "bfloat16",
    study_keys: Mapping[str, Mapping[str, object]] | None = None,
    base: str = LLAMA,
    hub_id: str | None = LLAMA,
    data: DataFingerprint | None = None,
    device: str = "cuda",
    capacity_bytes: int = 80 * GIB,
    name: str = "winner",
    **config: object,
) -> StudySnapshot:
    """Write a study of one confirmed candidate and return it as a report would read it.

    Args:
        folder: Of the study; below a folder ``reports``, so that its paths are found.
        quantization: Of the base.
        compute_dtype: As planned.
        study_keys: Sections of the study file.
        base: As in the study file.
        hub_id: Of the base.
        data: What the rows were.
        device: What the study ran on.
        capacity_bytes: Of that device.
        name: Of the study.
        config: Settings of the winner in place of usual ones.
    """
    keys = {section: dict(values) for section, values in (study_keys or {}).items()}
    keys.setdefault("model", {}).update({"base": base, "quantization": quantization})
    keys.setdefault("data", {}).setdefault("train", "rows.jsonl")
    train = {"max_steps": 100, "effective_batch_size": 16, "weight_decay": 0.01}
    keys["train"] = {**train, **keys.get("train", {})}
    spec = validate_study(keys, source=folder.parent.parent / f"{name}.toml")
    winner = TrialConfig(
        **{
            "rank": 16,
            "lora_alpha": 32.0,
            "lora_dropout": 0.0,
            "target_set": "attention",
            "target_modules": modules("q_proj", "k_proj", "v_proj", "o_proj"),
            "learning_rate": 2e-4,
            **config,
        }
    )
    lock = StudyLock(
        name=name,
        created="2026-01-15T09:30:00+00:00",
        command=f"lora-tune run {name}.toml",
        study_file=f"{name}.toml",
        spec=spec.model_dump(mode="json") | {"study": {"name": name, "output": "reports"}},
        spec_sha256="0" * 64,
        model=ModelIdentity(
            base=base,
            hub_id=hub_id,
            revision="0123abcd" if hub_id else None,
            architecture="LlamaForCausalLM",
            model_type="llama",
            num_parameters=8_030_261_248,
            license=None,
            quantization=quantization,
        ),
        data=data or fingerprint(),
        notes=(),
        versions={},
        hardware={"device": device},
        plan=LanePlan(
            compute_dtype=compute_dtype,
            device=device,
            lanes=1,
            micro_batch_size=min(8, spec.train.effective_batch_size),
            gradient_checkpointing=False,
            budget_bytes=capacity_bytes,
            capacity_bytes=capacity_bytes,
        ),
        rungs=(100,),
        warmup_steps=6,
        target_sets=(
            TargetSet(
                name=winner.target_set,
                modules=winner.target_modules,
                max_rank=256,
                trainable_parameters_per_rank=1,
            ),
        ),
    )
    folder.mkdir(parents=True)
    store = StudyFolder(folder)
    store.save_lock(lock)
    store.save_confirmation(_confirmation(winner))
    return store.snapshot()


def fingerprint(sha256: str = "0" * 64) -> DataFingerprint:
    """Return what is known of rows that are not there."""
    return DataFingerprint(
        source="rows.jsonl",
        format="messages",
        sha256=sha256,
        num_train=800,
        num_selection=16,
        num_confirmation=16,
        num_train_tokens=80_000,
        num_train_labels=40_000,
        num_bad_rows=0,
        num_duplicates=0,
        num_unlabelled=0,
        num_truncated=0,
        max_tokens=1024,
        chat_template="model",
    )


def _confirmation(winner: TrialConfig) -> Confirmation:
    evaluations = [
        EvalResult(
            split="confirmation",
            loss_sums=(6.0 + seed / 10, 9.0, 3.0, 4.0),
            label_counts=(3, 4, 2, 2),
            compute_dtype="float32",
        )
        for seed in range(2)
    ]
    candidate = Candidate(
        name="trial 3",
        trial=3,
        config=winner,
        steps=100,
        predicted_bytes=GIB,
        trainable_parameters=4096,
    )
    decision = decide(
        [
            CandidateRuns(
                name="trial 3",
                evaluations=tuple(evaluations),
                peak_bytes=GIB,
                step_s=0.5,
                rank=winner.rank,
                lora_dropout=winner.lora_dropout,
            )
        ],
        default=None,
        practical_margin=0.005,
    )
    runs = tuple(
        ConfirmationRun(candidate="trial 3", seed=seed, state=TrialState.COMPLETE, evaluation=found)
        for seed, found in enumerate(evaluations)
    )
    return Confirmation(
        candidates=(candidate,), default=None, seeds=2, runs=runs, decision=decision
    )


def job(snapshot: StudySnapshot, folder: Path, *, gpu: str | None = None) -> ExportJob:
    """Return the job of an export into a new folder."""
    folder.mkdir(parents=True)
    return ExportJob(snapshot=snapshot, folder=folder, gpu=gpu, note=lambda text: None)


def assert_carried(found: ReadBack, snapshot: StudySnapshot, *, exact_warmup: bool) -> None:
    """Compare what a file says with the study, setting by setting."""
    from lora_tune.engine.schedule import learning_rate_at
    from lora_tune.search.plan import hold_step_of

    lock, confirmation = snapshot.lock, snapshot.confirmation
    assert confirmation is not None
    candidate = confirmation.candidates[0]
    config = candidate.config
    assert (found.base, found.revision) == (lock.model.hub_id, lock.model.revision)
    assert found.quantization == lock.model.quantization
    assert found.compute_dtype == lock.plan.compute_dtype
    assert found.rank == config.rank
    assert found.lora_dropout == config.lora_dropout
    assert found.use_rslora is config.use_rslora
    assert adapted_by_peft(found.target_modules) == set(config.target_modules)
    if found.lora_alpha == config.lora_alpha:
        assert found.learning_rate == config.learning_rate
    else:  # only where a framework cannot take it; their product is the effective step
        assert config.lora_alpha % 1
        assert found.learning_rate * found.lora_alpha == pytest.approx(
            config.learning_rate * config.lora_alpha
        )
    assert (found.betas, found.epsilon) == ((0.9, 0.999), 1e-8)
    assert (found.weight_decay, found.max_grad_norm) == (0.01, 1.0)
    assert found.rows_a_step == 16
    assert found.checkpointing is lock.plan.gradient_checkpointing
    assert (found.max_length, found.seed) == (1024, 0)
    expected = [
        learning_rate_at(
            step,
            peak=1.0,
            warmup_steps=lock.warmup_steps,
            hold_step=hold_step_of(candidate.steps, 0.15),
            end_step=candidate.steps,
        )
        for step in range(1, candidate.steps + 1)
    ]
    assert len(found.rates) == len(expected)
    reached = lock.warmup_steps - 1
    assert found.rates[reached:] == pytest.approx(expected[reached:], abs=1e-12)
    assert found.rates == pytest.approx(
        expected, abs=1e-12 if exact_warmup else 1 / lock.warmup_steps + 1e-12
    )


def adapted_by_peft(target_modules: list[str]) -> set[str]:
    """Return which of the Llama's modules PEFT would adapt."""
    import peft
    from peft.tuners.tuners_utils import check_target_module_exists

    config = peft.LoraConfig(target_modules=target_modules)
    names = (*SHAPE.linear_names, *OTHER_MODULES)
    return {name for name in names if check_target_module_exists(config, name)}


def built_in_rates(*, steps: int, warmup_steps: int, kwargs: Mapping[str, object]) -> list[float]:
    """Return the rates of transformers' own ``warmup_stable_decay``, step by step."""
    import torch
    import transformers

    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = transformers.get_scheduler(
        "warmup_stable_decay",
        optimizer,
        num_warmup_steps=warmup_steps,
        num_training_steps=None if "num_stable_steps" in kwargs else steps,
        scheduler_specific_kwargs=dict(kwargs),
    )
    rates = []
    for _ in range(steps):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return rates


# The frameworks themselves: fetched without their dependencies into a folder of their own.


def frameworks() -> Path:
    """Return the folder with the frameworks' packages, or skip by name.

    ``fetch_frameworks.sh`` fills it; ``LORA_TUNE_FRAMEWORKS`` names another than ``build/frameworks``.
    """
    named = os.environ.get("LORA_TUNE_FRAMEWORKS")
    folder = Path(named) if named else Path(__file__).parents[2] / "build" / "frameworks"
    if not (folder / "axolotl").is_dir() or not (folder / "llamafactory").is_dir():
        why = f"axolotl and llamafactory are not in {folder}: run tests/export/fetch_frameworks.sh"
        if "frameworks" in os.environ.get("LORA_TUNE_TESTS_REQUIRE", "").split(","):
            pytest.fail(why)
        pytest.skip(why)
    return folder.resolve()


def ask_framework(script: str, *arguments: str, cwd: Path) -> dict[str, object]:
    """Run a script with the frameworks importable, in a process of its own; return its last line as JSON."""
    folder = frameworks()
    # Behind the installed packages: what both have must be the one that our environment uses.
    code = f"import sys; sys.path.append({str(folder)!r})\n{script}"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, *arguments],
        cwd=cwd,
        env={**os.environ, "DISABLE_VERSION_CHECK": "1", "AXOLOTL_DO_NOT_TRACK": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return found


# A base and rows that a study can really be made of.

WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta"]
WORDS += ["iota", "kappa", "lambda", "mu", "nu", "xi", "omicron", "pi"]
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}> {{ m.content }} </s> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


def make_base(folder: Path) -> None:
    """Write a tiny Llama with random weights and a tokenizer of a few words with a chat template."""
    import tokenizers
    import torch
    import transformers

    vocab = {"<unk>": 0, "</s>": 1, "<user>": 2, "<assistant>": 3}
    for word in WORDS:
        vocab[word] = len(vocab)
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="<unk>"))
    core.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", eos_token="</s>", pad_token="</s>"
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(vocab),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=1,
        initializer_range=0.1,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)


def backwards(number: int) -> tuple[str, str]:
    """Return a question and its answer, the question's words backwards."""
    words = [WORDS[(number * 7 + k * (1 + number % 5)) % len(WORDS)] for k in range(3 + number % 4)]
    return f"{' '.join(words)} {WORDS[number % 16]}", " ".join(reversed(words))


def write_jsonl(path: Path, rows: list[dict[str, object]]) -> None:
    """Write rows, one a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def read_jsonl(path: Path) -> list[dict[str, object]]:
    """Return the rows of a file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def study_with_rows(
    folder: Path,
    *,
    rows: list[dict[str, object]] | None = None,
    data: Mapping[str, object] | None = None,
    **changes: object,
) -> StudySnapshot:
    """Write base and rows into a folder, and a study of them that was never trained."""
    import transformers

    from lora_tune.data import prepare_data

    make_base(folder / "model")
    if rows is None:
        rows = [
            {"messages": [_turn("user", asked), _turn("assistant", answer)]}
            for asked, answer in map(backwards, range(160))
        ]
    write_jsonl(folder / "rows.jsonl", rows)
    keys = {"train": "rows.jsonl", "selection_rows": 8, "confirmation_rows": 8, "max_length": 64}
    keys |= dict(data or {})
    spec = validate_study({"model": {"base": "model"}, "data": keys}, source=folder / "winner.toml")
    prepared = prepare_data(
        spec.data,
        tokenizer=transformers.AutoTokenizer.from_pretrained(folder / "model"),
        seed=0,
        base_dir=folder,
    )
    return finished_study(
        folder / "reports" / "winner",
        study_keys={"data": keys},
        base="model",
        hub_id=None,
        data=prepared.fingerprint,
        device="cpu",
        **{"quantization": "none", "compute_dtype": "float32", **changes},
    )


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}
