"""Records as a study of three trials leaves them: realistic values, every optional one absent once."""

from lora_tune.records import (
    Candidate,
    Confirmation,
    ConfirmationRun,
    DataFingerprint,
    EvalResult,
    LaneLimit,
    LanePlan,
    MemoryLog,
    MemoryReading,
    MetricResult,
    ModelIdentity,
    PackPeak,
    Point,
    ProbeReading,
    RungResult,
    StudyLock,
    SuggestedParams,
    TargetSet,
    TrialConfig,
    TrialRecord,
    TrialState,
)
from lora_tune.stats.selection import CandidateRuns, decide
from lora_tune.units import GIB


def evaluation(split: str = "selection") -> EvalResult:
    return EvalResult(
        split=split,
        loss_sums=(2.3000000000000003, 1e-17, 107.12345678901234, 0.1 + 0.2),
        label_counts=(3, 1, 40, 2),
        compute_dtype="float32",
    )


def trial_record(number: int = 0, state: TrialState = TrialState.COMPLETE) -> TrialRecord:
    """Return a trial that finished a rung, or one that ended early and has no loss at all."""
    early = state in (TrialState.DIVERGED, TrialState.INFEASIBLE, TrialState.FAILED)
    result = RungResult(
        rung=0,
        steps=25,
        eval_loss=evaluation().mean_loss,
        evaluation=evaluation(),
        points=(
            Point(step=1, train_loss=4.1, learning_rate=1e-5, grad_norm=1.9, num_tokens=412),
            Point(step=25, train_loss=2.9, learning_rate=1 / 3, grad_norm=0.0, num_tokens=398),
        ),
        wall_s=61.5,
        num_tokens=10_312,
        peak_bytes=3 * GIB + 1,
        pack_lanes=4,
    )
    return TrialRecord(
        number=number,
        state=state,
        origin="anchor A1" if number == 0 else "tpe",
        suggested=SuggestedParams(
            rank=64,
            alpha_ratio=None if early else 0.5,
            lora_dropout=0.05,
            target_set="mlp",
            effective_step=2.0000000000000004e-4,
        ),
        config=TrialConfig(
            rank=32,
            lora_alpha=16.0,
            lora_dropout=0.05,
            target_set="mlp",
            target_modules=("model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"),
            learning_rate=4.0000000000000007e-4,
            use_rslora=early,
            init_seed=7,
            dropout_seed=7,
            data_seed=7,
        ),
        predicted_bytes=2 * GIB + 123,
        trainable_parameters=1_048_576,
        rungs=() if early else (result,),
        reason='loss "inf" at step 3, überall' if early else "",
        first_loss=4.25 if early else None,
        penalty=4.51 if early else None,
    )


PROBE_READINGS = (
    ProbeReading(
        lanes=1,
        micro_batch_size=8,
        compute_dtype="bfloat16",
        tokens_per_s=402.90000000000003,
        peak_bytes=None,
    ),
    ProbeReading(
        lanes=2,
        micro_batch_size=8,
        compute_dtype="bfloat16",
        tokens_per_s=0.0,
        peak_bytes=3 * GIB,
        out_of_memory=True,
    ),
)


def study_lock(name: str = "docstrings") -> StudyLock:
    return StudyLock(
        name=name,
        created="2026-01-15T09:30:00+00:00",
        command="lora-tune run studies/docstrings.toml",
        study_file="studies/docstrings.toml",
        spec={
            "study": {"name": name, "seed": 7, "output": "reports"},
            "space": {"rank": [4, 8], "lora_alpha": None, "learning_rate": [3e-5, 2e-3]},
            "train": {"micro_batch_size": "auto", "gradient_checkpointing": False},
            "search": {"trials": 12, "rungs": [0.125, 1.0]},
            "select": {"practical_margin": 0.005},
        },
        spec_sha256="5f" * 32,
        model=ModelIdentity(
            base="./model.gguf",
            hub_id=None,
            revision=None,
            architecture="LlamaForCausalLM",
            model_type="llama",
            num_parameters=134_515_008,
            license=None,
            quantization="nf4",
        ),
        data=DataFingerprint(
            source="docstrings.jsonl",
            format="messages",
            sha256="c0ffee" * 10 + "beef",
            num_train=2_912,
            num_selection=4,
            num_confirmation=4,
            num_train_tokens=166_210,
            num_train_labels=61_870,
            num_bad_rows=3,
            num_duplicates=41,
            num_unlabelled=0,
            num_truncated=12,
            max_tokens=256,
            chat_template="model",
        ),
        notes=("format messages (detected).", "41 exact duplicates left out."),
        versions={"lora-tune": "0.1.0", "python": "3.11.9", "torch": "2.13.0"},
        hardware={"cpu": "two cores", "device": "cpu"},
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
        rungs=(25, 100),
        eval_rows=(3, 4),
        warmup_steps=6,
        target_sets=(
            TargetSet(
                name="mlp",
                modules=("model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"),
                max_rank=64,
                trainable_parameters_per_rank=61_440,
            ),
        ),
    )


def confirmation(base_selection_loss: float | None = 2.851) -> Confirmation:
    """Return a confirmation of one finalist and the default, one run of which diverged."""
    names = ("trial 0", "default")
    candidates = tuple(
        Candidate(
            name=name,
            trial=0 if name == "trial 0" else None,
            config=trial_record().config,
            steps=200,
            predicted_bytes=7 * GIB,
            trainable_parameters=1234,
        )
        for name in names
    )
    done = ConfirmationRun(
        candidate="trial 0",
        seed=0,
        state=TrialState.COMPLETE,
        evaluation=evaluation("confirmation"),
        metrics=(MetricResult(metric="exact-match", values=(1.0, 0.0)),),
        wall_s=12.25,
        num_tokens=10_000,
        peak_bytes=3 * GIB,
        pack_lanes=2,
    )
    ended = ConfirmationRun(
        candidate="default", seed=0, state=TrialState.DIVERGED, reason="loss inf at step 3"
    )
    return Confirmation(
        candidates=candidates,
        default="default",
        seeds=1,
        runs=(done, ended),
        base_evaluation=evaluation("confirmation"),
        base_selection_loss=base_selection_loss,
        clusters=(0, 0, 1, 2),
        decision=decide(
            [
                CandidateRuns(
                    name=name,
                    evaluations=(run.evaluation,),
                    peak_bytes=7 * GIB,
                    step_s=0.5,
                    rank=8,
                    lora_dropout=0.0,
                )
                for name, run in zip(names, (done, ended), strict=True)
            ],
            default="default",
            practical_margin=0.005,
            clusters=(0, 0, 1, 2),
        ),
    )


def memory_log() -> MemoryLog:
    reading = MemoryReading(
        measured=PackPeak(
            device="NVIDIA L4",
            trials=(0, 1),
            steps=25,
            rows=16,
            max_length=241,
            num_labels=1_702,
            allocated_bytes=3 * GIB + 17,
            reserved_bytes=3 * GIB + 4096,
            process_bytes=4 * GIB,
            free_bytes=22 * GIB,
        ),
        predicted_allocated_bytes=3 * GIB,
        predicted_reserved_bytes=3 * GIB + 1,
    )
    limit = LaneLimit(num_readings=1, margin=1 / 3, budget_bytes=20 * GIB, lanes_before=4, lanes=2)
    return MemoryLog(readings=(reading, reading), limits=(limit,))
