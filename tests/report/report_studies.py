"""Snapshots of studies as a store would read them: realistic numbers, made without training."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from lora_tune.records import (
    Behaviour,
    Candidate,
    Confirmation,
    ConfirmationRun,
    DataFingerprint,
    EvalResult,
    Forecast,
    GeneralLoss,
    LanePlan,
    LaneSpan,
    MetricResult,
    ModelIdentity,
    Point,
    ProbeReading,
    RungResult,
    Sample,
    SampleAnswer,
    StudyLock,
    StudyPlan,
    StudySnapshot,
    SuggestedParams,
    TargetSet,
    TrialConfig,
    TrialRecord,
    TrialState,
)
from lora_tune.stats.selection import CandidateRuns, decide
from lora_tune.units import GIB, MIB

NUM_ROWS = 96
STEPS = (25, 100, 200)
NUM_SLOTS = 4
LOAD_S = 60.0  # until the first lane began
ADAPTER_BYTES = 3_942_104
BASE_BYTES = 113_283_072

# number, origin, state, rungs reached, rank, ratio, dropout, target set, learning rate, loss, reason
ROWS = (
    (0, "anchor A1", "complete", 3, 64, 0.5, 0.0, "all-linear", 3e-4, 2.310, ""),
    (1, "anchor A2", "diverged", 0, 64, 0.5, 0.0, "all-linear", 1e-3, 0.0, "loss 9.81 at step 14"),
    (2, "anchor A3", "pruned", 1, 64, 0.5, 0.0, "all-linear", 1e-4, 2.742, "not promoted"),
    (3, "anchor A4", "complete", 3, 16, 2.0, 0.0, "all-linear", 3e-4, 2.303, ""),
    (4, "anchor A5", "pruned", 2, 64, 0.5, 0.0, "mlp", 3e-4, 2.401, "not promoted"),
    (5, "anchor A6", "pruned", 1, 16, 2.0, 0.05, "attention-qv", 2e-4, 2.861, "not promoted"),
    (6, "tpe", "pruned", 2, 32, 1.0, 0.05, "all-linear", 4.1731e-4, 2.392, "not promoted"),
    (7, "tpe", "complete", 3, 32, 1.0, 0.05, "all-linear", 5.2804e-4, 2.298, ""),
    (8, "tpe", "infeasible", 0, 128, 2.0, 0.1, "all-linear", 2.2e-4, 0.0, "peak 4.31 GiB alone"),
    (9, "tpe", "failed", 0, 8, 4.0, 0.0, "attention", 6e-4, 0.0, "worker lost: signal 9"),
    (10, "tpe", "pruned", 1, 8, 8.0, 0.1, "attention", 1.4125e-4, 2.902, "not promoted"),
    (11, "tpe", "pruned", 1, 32, 1.0, 0.0, "mlp", 8e-4, 2.688, "not promoted"),
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


# Candidate to its losses by seed: trial 7 is best, trial 3 is tied and smaller, trial 5 the default.
CONFIRMED = {"trial 7": (2.329, 2.333), "trial 3": (2.337, 2.333), "trial 5": (2.571, 2.579)}
METRICS = {"trial 7": (0.41, 0.52), "trial 3": (0.4, 0.5), "trial 5": (0.3, 0.4), "": (0.1, 0.2)}


def metrics(name: str) -> tuple[MetricResult, ...]:
    """Return two metrics with values and one that could not be computed."""
    match, overlap = METRICS[name]
    draws = random.Random(f"metrics {name}")
    return (
        MetricResult(
            metric="exact-match",
            values=tuple(float(i < match * NUM_ROWS) for i in range(NUM_ROWS)),
        ),
        MetricResult(
            metric="rouge-l",
            values=tuple(min(1.0, max(0.0, draws.gauss(overlap, 0.2))) for _ in range(NUM_ROWS)),
        ),
        MetricResult(metric="style:length", reason="ZeroDivisionError in row 3: division by zero"),
    )


def candidate(name: str, trials: Sequence[TrialRecord]) -> Candidate:
    """Return a trial as a candidate; ``default`` is a configuration of its own."""
    number = None if name == "default" else int(name.removeprefix("trial "))
    record = trials[5 if number is None else number]
    return Candidate(
        name=name,
        trial=number,
        config=record.config,
        steps=STEPS[-1],
        predicted_bytes=record.predicted_bytes + record.config.rank * 40 * MIB,
        trainable_parameters=record.trainable_parameters,
    )


def run(name: str, seed: int, loss: float | None) -> ConfirmationRun:
    """Return a fresh training that ended with this loss; None: it diverged."""
    if loss is None:
        return ConfirmationRun(
            candidate=name, seed=seed, state=TrialState.DIVERGED, reason="loss 9.02 at step 31"
        )
    return ConfirmationRun(
        candidate=name,
        seed=seed,
        state=TrialState.COMPLETE,
        evaluation=evaluation(
            loss, split="confirmation", seed=hash_of(name) + seed, dtype="float32"
        ),
        wall_s=240.0,
        num_tokens=82_456,
        peak_bytes=int(2.9 * GIB),
        pack_lanes=4,
    )


def hash_of(name: str) -> int:
    """Return a number for a name, the same in every process."""
    return sum(ord(letter) * 31**i for i, letter in enumerate(name)) % 100_000


def confirmation(
    trials: Sequence[TrialRecord],
    losses: Mapping[str, Sequence[float | None]] = CONFIRMED,
    *,
    default: str | None = "trial 5",
    with_metrics: bool = False,
    step_s: float = 1.2,
) -> Confirmation:
    """Return a confirmation with these losses of each candidate's seeds, decided by the real rule."""
    candidates = tuple(candidate(name, trials) for name in losses)
    runs = tuple(
        run(name, seed, loss) for name, found in losses.items() for seed, loss in enumerate(found)
    )
    decision = decide(
        [
            CandidateRuns(
                name=c.name,
                evaluations=tuple(r.evaluation for r in runs if r.candidate == c.name),
                peak_bytes=c.predicted_bytes,
                step_s=step_s,
                rank=c.config.rank,
                lora_dropout=c.config.lora_dropout,
            )
            for c in candidates
        ],
        default=default,
        practical_margin=0.005,
    )
    if with_metrics:
        medians = {score.candidate: score.median_seed for score in decision.scores}
        runs = tuple(
            replace(r, metrics=metrics(r.candidate)) if r.seed == medians[r.candidate] else r
            for r in runs
        )
    return Confirmation(
        candidates=candidates,
        default=default,
        seeds=max(len(found) for found in losses.values()),
        runs=runs,
        base_evaluation=evaluation(2.874, split="confirmation", seed=999, dtype="float32"),
        base_selection_loss=2.851,
        base_metrics=metrics("") if with_metrics else (),
        decision=decision,
    )


def confirmed_study(
    losses: Mapping[str, Sequence[float | None]], *, default: str | None = "trial 5"
) -> StudySnapshot:
    """Return the finished study with other losses in its confirmation."""
    study = finished_study()
    confirmed = confirmation(study.trials, losses, default=default)
    assert confirmed.decision is not None
    return replace(
        study,
        confirmation=confirmed,
        behaviour=behaviour(confirmed.decision.chosen, default),
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
            "search": {"trials": "auto", "sampler": "tpe"},
            "select": {"practical_margin": 0.005, "seeds": "auto"},
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
            base_bytes=BASE_BYTES,
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
        study_plan=StudyPlan(
            num_train=2_912,
            num_selection=NUM_ROWS,
            num_confirmation=NUM_ROWS,
            total_steps=STEPS[-1],
            rungs=STEPS,
            num_trials=12,
            finalists=2,
            seeds=2,
            search_steps=735,
            confirmation_steps=1200,
        ),
        forecast=Forecast(
            tokens_per_s=590.3,
            measured=True,
            search_steps=735,
            confirmation_steps=1200,
            search_s=780.0,
            evaluation_s=190.0,
            confirmation_s=1010.0,
            load_s=60.0,
        ),
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


def with_repeat_clamp_and_overfit(trials: Sequence[TrialRecord]) -> tuple[TrialRecord, ...]:
    """Let trial 12 repeat trial 3, trial 4 be clamped from rank 128, trial 0 be best at step 100."""
    changed = list(trials)
    first = changed[0]
    changed[0] = replace(first, rungs=(first.rungs[0], rung_result(0, 1, 2.306), *first.rungs[2:]))
    changed[4] = replace(changed[4], suggested=replace(changed[4].suggested, rank=128))
    repeat = replace(trials[3], number=12, origin="tpe", state=TrialState.CACHED, repeats=3)
    return (*changed, repeat)


class Slots:
    """Gives segments the slot of the pack that is free first, as an executor does."""

    def __init__(self) -> None:
        self._free_s = [LOAD_S] * NUM_SLOTS

    def wait_for_all(self) -> None:
        """Let no segment begin before all that were placed have ended."""
        self._free_s = [max(self._free_s)] * NUM_SLOTS

    def place(self, wall_s: float) -> LaneSpan:
        """Return when and where the next segment is trained."""
        slot = min(range(NUM_SLOTS), key=lambda i: self._free_s[i])
        began_s = self._free_s[slot]
        self._free_s[slot] = began_s + wall_s
        return LaneSpan(slot=slot, began_s=began_s, ended_s=began_s + wall_s)


def with_spans(
    trials: Sequence[TrialRecord], found: Confirmation
) -> tuple[tuple[TrialRecord, ...], Confirmation]:
    """Return the same with a timeline: rung after rung on four slots, the confirmation after them."""
    slots, changed = Slots(), list(trials)
    for rung in range(len(STEPS)):
        slots.wait_for_all()
        for i, record in enumerate(changed):
            if record.state is not TrialState.CACHED and rung < len(record.rungs):
                results = list(record.rungs)
                results[rung] = replace(results[rung], span=slots.place(results[rung].wall_s))
                changed[i] = replace(record, rungs=tuple(results))
    slots.wait_for_all()
    runs = tuple(replace(r, span=slots.place(r.wall_s)) for r in found.runs)
    return tuple(changed), replace(found, runs=runs)


# Prompt, reference, and the answers of the untuned base, the default and the chosen candidate.
SAMPLES = (
    (
        "Write the docstring of this function.\n\ndef mean(values):\n    return sum(values) / len(values)",
        "Return the arithmetic mean of the values.",
        "The function `mean` takes a list of values and returns the sum of the values divided by",
        "Return the mean value of the values.",
        "Return the arithmetic mean of a sequence of values.",
    ),
    (
        "Write the docstring of this function.\n\ndef is_empty(path):\n    return not any(path.iterdir())",
        "Return True if the directory has no entries.",
        "```python\ndef is_empty(path):\n    return not any(path.iterdir())\n```",
        "Return whether the path is empty.",
        "Return True if the directory is empty, False otherwise.",
    ),
    (
        "Write the docstring of this function.\n\ndef close(self):\n    self._file.close()",
        "Close the underlying file.",
        "The `close` method closes the file. The file is closed. The file is closed. The file is",
        "Close the file.",
        "Close the underlying file.",
    ),
    (
        "Write the docstring of this function.\n\ndef swap(pair):\n    a, b = pair\n    return b, a",
        "Return the pair in reverse order.",
        "Here is a docstring: <swap> returns a | b, the pair.",
        "Swap the pair.",
        "Return the two items of a pair in reverse order.",
    ),
    (
        "Write the docstring of this function.\n\ndef now():\n    return time.time()",
        "Return the current time in seconds since the epoch.",
        "# now\n\n- returns the time\n- takes no arguments",
        "Return time.",
        "Return the current time in seconds since the Epoch.",
    ),
)
GENERAL_LOSSES = (3.412, 3.431, 3.446)  # untuned base, default, chosen
MAX_NEW_TOKENS = 48


def behaviour(chosen: str = "trial 3", default: str | None = "trial 5") -> Behaviour:
    """Return answers to five prompts; of the untuned base two were cut at the limit."""
    subjects = ["untuned base", *([default] if default not in (None, chosen) else []), chosen]
    column = {"untuned base": 2, default: 3, chosen: 4}
    cut = (0, 2)
    return Behaviour(
        chosen=chosen,
        default=default,
        samples=tuple(
            Sample(
                row=7 * number,
                prompt=sample[0],
                reference=sample[1],
                answers=tuple(
                    SampleAnswer(
                        subject=subject,
                        text=sample[column[subject]],
                        num_tokens=MAX_NEW_TOKENS
                        if column[subject] == 2 and number in cut
                        else len(sample[column[subject]].split()) + 3,
                        ended=not (column[subject] == 2 and number in cut),
                    )
                    for subject in subjects
                ),
            )
            for number, sample in enumerate(SAMPLES)
        ),
        max_new_tokens=MAX_NEW_TOKENS,
        general_text="plain prose that comes with the tool",
        general_tokens=1_843,
        general_losses=tuple(
            GeneralLoss(subject=subject, loss=GENERAL_LOSSES[column[subject] - 2])
            for subject in subjects
        ),
    )


def finished_study(folder: Path = Path("reports/docstrings")) -> StudySnapshot:
    """Return a study of twelve trials and a repeat, of which every state but running occurs."""
    trials = with_repeat_clamp_and_overfit([trial(row) for row in ROWS])
    trials, confirmed = with_spans(trials, confirmation(trials, with_metrics=True))
    return StudySnapshot(
        folder=folder,
        lock=lock(),
        trials=trials,
        confirmation=confirmed,
        wall_s=2184.0,
        behaviour=behaviour(),
        adapter_bytes=ADAPTER_BYTES,
    )


def older_study(folder: Path = Path("reports/docstrings")) -> StudySnapshot:
    """Return the finished study as a version wrote it that kept no spans, answers and sizes."""
    study = finished_study(folder)
    assert study.confirmation is not None
    trials = tuple(
        replace(t, rungs=tuple(replace(result, span=None) for result in t.rungs))
        for t in study.trials
    )
    runs = tuple(replace(r, span=None) for r in study.confirmation.runs)
    model = replace(study.lock.model, base_bytes=0)
    return replace(
        study,
        lock=replace(study.lock, model=model),
        trials=trials,
        confirmation=replace(study.confirmation, runs=runs),
        behaviour=None,
        adapter_bytes=0,
    )


def unfinished_study(folder: Path = Path("reports/docstrings")) -> StudySnapshot:
    """Return the same study after seven trials, the last of which still trains."""
    study = finished_study(folder)
    running = replace(study.trials[6], state=TrialState.RUNNING, rungs=(), reason="")
    return replace(
        study,
        trials=(*study.trials[:6], running),
        confirmation=None,
        behaviour=None,
        adapter_bytes=0,
    )


def half_confirmed_study(folder: Path = Path("reports/docstrings")) -> StudySnapshot:
    """Return the finished study as it was when three runs of its confirmation were missing."""
    study = finished_study(folder)
    assert study.confirmation is not None
    begun = replace(
        study.confirmation,
        runs=tuple(replace(run, metrics=()) for run in study.confirmation.runs[:3]),
        base_evaluation=None,
        base_metrics=(),
        decision=None,
    )
    return replace(study, confirmation=begun, behaviour=None, adapter_bytes=0)


def fruitless_study(folder: Path = Path("reports/docstrings")) -> StudySnapshot:
    """Return a study whose twelve trials all diverged, did not fit, or failed."""
    study = finished_study(folder)
    states = (TrialState.DIVERGED, TrialState.INFEASIBLE, TrialState.FAILED)
    trials = tuple(
        replace(t, state=states[t.number % 3], rungs=(), reason="see log", repeats=None)
        for t in study.trials[:12]
    )
    return replace(study, trials=trials, confirmation=None, behaviour=None, adapter_bytes=0)


def single_trial_study(folder: Path = Path("reports/docstrings")) -> StudySnapshot:
    """Return a study of one trial: it has one seed, no default, no plan and no forecast."""
    study = finished_study(folder)
    spec = {**study.lock.spec, "search": {"trials": 1, "sampler": "tpe"}}
    only = replace(study.trials[3], number=0)
    return replace(
        study,
        lock=replace(study.lock, spec=spec, study_plan=None, forecast=None),
        trials=(only,),
        confirmation=confirmation([only], {"trial 0": (2.335,)}, default=None),
        behaviour=behaviour("trial 0", None),
    )
