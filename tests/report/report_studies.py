"""Snapshots of studies as a store would read them: realistic numbers, made without training."""

import random
from dataclasses import replace
from pathlib import Path

from lora_tune.records import (
    Confirmation,
    DataFingerprint,
    EvalResult,
    LanePlan,
    ModelIdentity,
    Point,
    ProbeReading,
    RungResult,
    StudyLock,
    StudySnapshot,
    SuggestedParams,
    TargetSet,
    TrialConfig,
    TrialRecord,
    TrialState,
)
from lora_tune.units import GIB, MIB

NUM_ROWS = 96
STEPS = (25, 100, 200)

# number, origin, state, rungs reached, rank, ratio, dropout, target set, learning rate, loss, reason
ROWS = (
    (0, "anchor A1", "complete", 3, 64, 0.5, 0.0, "all-linear", 3e-4, 2.310, ""),
    (1, "anchor A2", "diverged", 0, 64, 0.5, 0.0, "all-linear", 1e-3, 0.0, "loss 9.81 at step 14"),
    (2, "anchor A3", "pruned", 1, 64, 0.5, 0.0, "all-linear", 1e-4, 2.442, "not promoted"),
    (3, "anchor A4", "complete", 3, 16, 2.0, 0.0, "all-linear", 3e-4, 2.303, ""),
    (4, "anchor A5", "pruned", 2, 64, 0.5, 0.0, "mlp", 3e-4, 2.351, "not promoted"),
    (5, "anchor A6", "pruned", 1, 16, 2.0, 0.05, "attention-qv", 2e-4, 2.561, "not promoted"),
    (6, "tpe", "pruned", 2, 32, 1.0, 0.05, "all-linear", 4.1731e-4, 2.322, "not promoted"),
    (7, "tpe", "complete", 3, 32, 1.0, 0.05, "all-linear", 5.2804e-4, 2.298, ""),
    (8, "tpe", "infeasible", 0, 128, 2.0, 0.1, "all-linear", 2.2e-4, 0.0, "peak 4.31 GiB alone"),
    (9, "tpe", "failed", 0, 8, 4.0, 0.0, "attention", 6e-4, 0.0, "worker lost: signal 9"),
    (10, "tpe", "pruned", 1, 8, 8.0, 0.1, "attention", 1.4125e-4, 2.602, "not promoted"),
    (11, "tpe", "pruned", 1, 32, 1.0, 0.0, "mlp", 8e-4, 2.388, "not promoted"),
)


def evaluation(
    loss: float, *, split: str = "selection", seed: int = 0, dtype: str = "bfloat16"
) -> EvalResult:
    """Return per-row losses around ``loss``; rows are as hard for one trial as for the next."""
    rows = random.Random(split)
    own = random.Random(seed)
    counts = tuple(rows.randint(8, 60) for _ in range(NUM_ROWS))
    hardness = [rows.gauss(0.0, 0.45) for _ in range(NUM_ROWS)]
    sums = [n * (loss + h + own.gauss(0.0, 0.05)) for n, h in zip(counts, hardness, strict=True)]
    shift = loss - sum(sums) / sum(counts)
    return EvalResult(
        split=split,
        loss_sums=tuple(s + shift * n for s, n in zip(sums, counts, strict=True)),
        label_counts=counts,
        compute_dtype=dtype,
    )


def rung_result(trial: int, rung: int, loss: float) -> RungResult:
    """Return what a trial showed at a rung of the ladder in ``STEPS``."""
    result = evaluation(loss, seed=100 * trial + rung)
    return RungResult(
        rung=rung,
        steps=STEPS[rung],
        eval_loss=result.mean_loss,
        evaluation=result,
        points=(
            Point(step=1, train_loss=4.1, learning_rate=1e-5, grad_norm=1.9, num_tokens=412),
            Point(step=10, train_loss=3.0, learning_rate=3e-4, grad_norm=0.7, num_tokens=4180),
        ),
        wall_s=(61.5, 188.0, 252.25)[rung],
        num_tokens=(10_312, 30_940, 41_204)[rung],
        peak_bytes=int(2.9 * GIB) + trial * 3 * MIB,
        pack_lanes=4,
    )


def trial(row: tuple[object, ...]) -> TrialRecord:
    """Return the record of one of ``ROWS``."""
    number, origin, state, reached, rank, ratio, dropout, targets, lr, loss, reason = row
    alpha = rank * ratio
    modules = ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj", "mlp.down_proj")
    config = TrialConfig(
        rank=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_set=targets,
        target_modules=tuple(f"model.layers.{i}.{m}" for i in range(2) for m in modules),
        learning_rate=lr,
        init_seed=1000 + number,
        dropout_seed=2000 + number,
        data_seed=7,
    )
    ahead = (0.31, 0.07, 0.0)
    return TrialRecord(
        number=number,
        state=TrialState(state),
        origin=origin,
        suggested=SuggestedParams(
            rank=rank,
            alpha_ratio=ratio,
            lora_dropout=dropout,
            target_set=targets,
            effective_step=lr * alpha / 32,
        ),
        config=config,
        predicted_bytes=int(2.7 * GIB) + rank * MIB,
        trainable_parameters=rank * 61_440,
        rungs=tuple(
            rung_result(number, rung, loss + ahead[rung] - ahead[reached - 1])
            for rung in range(reached)
        ),
        reason=reason,
        penalty=4.51 if state in ("diverged", "infeasible") else None,
    )


def probe_reading(lanes: int, size: int, speed: float, dtype: str = "bfloat16") -> ProbeReading:
    return ProbeReading(
        lanes=lanes,
        micro_batch_size=size,
        compute_dtype=dtype,
        tokens_per_s=speed,
        peak_bytes=None,
    )


PROBE_READINGS = (
    probe_reading(1, 4, 181.4, "float32"),
    probe_reading(1, 4, 239.0),
    probe_reading(1, 8, 310.7),
    probe_reading(2, 8, 402.9),
    probe_reading(4, 8, 590.3),
    probe_reading(8, 8, 608.0),
)


def lock() -> StudyLock:
    """Return the resolved study that all snapshots here share."""
    return StudyLock(
        name="docstrings",
        created="2026-01-15T09:30:00Z",
        command="lora-tune run studies/docstrings.toml",
        study_file="studies/first.toml",
        spec={
            "study": {"name": "docstrings", "seed": 7, "output": "reports"},
            "model": {"base": "smollm2-135m-instruct", "quantization": "nf4"},
            "data": {"train": "docstrings.jsonl", "max_length": 256},
            "train": {
                "effective_batch_size": 8,
                "optimizer": "adamw",
                "weight_decay": 0.0,
                "max_grad_norm": 1.0,
                "cooldown_ratio": 0.2,
            },
            "space": {
                "rank": [4, 8, 16, 32, 64, 128],
                "alpha_ratio": [0.25, 0.5, 1.0, 2.0, 4.0, 8.0],
                "lora_alpha": None,
                "learning_rate": [3e-5, 2e-3],
            },
            "search": {"trials": 12, "sampler": "tpe"},
            "select": {"practical_margin": 0.005},
        },
        spec_sha256="5f" * 32,
        model=ModelIdentity(
            base="smollm2-135m-instruct",
            hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
            revision="12fd25f77366fa6b3b4b768ec3050bf629380bac",
            architecture="LlamaForCausalLM",
            model_type="llama",
            num_parameters=134_515_008,
            license="apache-2.0",
            quantization="nf4",
        ),
        data=DataFingerprint(
            source="docstrings.jsonl",
            format="messages",
            sha256="c0ffee" * 10 + "beef",
            num_train=2_912,
            num_selection=NUM_ROWS,
            num_confirmation=NUM_ROWS,
            num_train_tokens=166_210,
            num_train_labels=61_870,
            num_bad_rows=3,
            num_duplicates=41,
            num_unlabelled=0,
            num_truncated=12,
            max_tokens=256,
            chat_template="model",
        ),
        notes=(
            "format messages found in docstrings.jsonl",
            "41 rows that occur more than once were kept once",
        ),
        versions={"lora-tune": "0.1.0", "python": "3.11.9", "torch": "2.13.0", "peft": "0.21.0"},
        hardware={"cpu": "2 cores, AVX512", "memory": "15.6 GiB"},
        plan=LanePlan(
            compute_dtype="bfloat16",
            device="cpu",
            lanes=4,
            micro_batch_size=8,
            gradient_checkpointing=False,
            group_rank=64,
            budget_bytes=4 * GIB,
            probe_readings=PROBE_READINGS,
            probe_s=31.25,
        ),
        rungs=STEPS,
        warmup_steps=6,
        target_sets=(
            TargetSet(
                name="all-linear",
                modules=("model.layers.0.mlp.up_proj",),
                max_rank=64,
                trainable_parameters_per_rank=61_440,
            ),
        ),
    )


def finished_study(folder: Path = Path("reports/docstrings")) -> StudySnapshot:
    """Return a study of twelve trials, of which every state but running occurs; trial 7 won."""
    return StudySnapshot(
        folder=folder,
        lock=lock(),
        trials=tuple(trial(row) for row in ROWS),
        confirmation=Confirmation(
            winner=7,
            winner_evaluation=evaluation(2.331, split="confirmation", seed=7, dtype="float32"),
            base_evaluation=evaluation(2.874, split="confirmation", seed=999, dtype="float32"),
            base_selection_loss=2.851,
        ),
        wall_s=1486.0,
    )


def unfinished_study(folder: Path = Path("reports/docstrings")) -> StudySnapshot:
    """Return the same study after seven trials, the last of which still trains."""
    study = finished_study(folder)
    running = replace(study.trials[6], state=TrialState.RUNNING, rungs=(), reason="")
    return replace(study, trials=(*study.trials[:6], running), confirmation=None)


def fruitless_study(folder: Path = Path("reports/docstrings")) -> StudySnapshot:
    """Return a study whose twelve trials all diverged, did not fit, or failed."""
    study = finished_study(folder)
    states = (TrialState.DIVERGED, TrialState.INFEASIBLE, TrialState.FAILED)
    trials = tuple(
        replace(t, state=states[t.number % 3], rungs=(), reason="see log") for t in study.trials
    )
    return replace(study, trials=trials, confirmation=None)


def single_trial_study(folder: Path = Path("reports/docstrings")) -> StudySnapshot:
    """Return the finished study as if trial 7 had been its only one."""
    study = finished_study(folder)
    spec = {**study.lock.spec, "search": {"trials": 1, "sampler": "tpe"}}
    return replace(study, lock=replace(study.lock, spec=spec), trials=(study.trials[7],))
