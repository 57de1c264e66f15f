"""The winner's settings as values: all that another training framework needs to train it again.

The same numbers in every framework: what a framework calls them, and what it cannot take, is decided by
the module of its target.
"""

from dataclasses import dataclass
from pathlib import Path

from lora_tune.catalog.targets import short_names
from lora_tune.errors import LoraTuneError, StoreError
from lora_tune.hub import find_config, find_model
from lora_tune.memory.shape import ModelShape
from lora_tune.records import CandidateScore, Confirmation, Decision, StudyLock, StudySnapshot
from lora_tune.report.resolved import gguf_note
from lora_tune.search.plan import hold_step_of
from lora_tune.store.origin import base_dir_of, spec_of

# torch's defaults, which the engine's AdamW keeps.
ADAM_BETAS, ADAM_EPSILON = (0.9, 0.999), 1e-8


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """Learning rate over a run: it rises, holds, and falls linearly, as ``engine.schedule`` has it."""

    steps: int
    warmup_steps: int
    hold_step: int  # the last step at the peak

    @property
    def built_in(self) -> dict[str, int]:
        """Return the nearest of transformers' ``warmup_stable_decay`` with a linear decay.

        Its step 1 has the rate 0 where ours has 1 / warmup_steps of the peak, so its warm-up is one step
        shorter to reach the peak at the same step. Peak and decay are the same to the last step.

        >>> Schedule(steps=100, warmup_steps=6, hold_step=85).built_in
        {'num_warmup_steps': 5, 'num_stable_steps': 79, 'num_decay_steps': 16}
        """
        warmup = min(max(0, self.warmup_steps - 1), self.hold_step - 1)
        return {
            "num_warmup_steps": warmup,
            "num_stable_steps": self.hold_step - 1 - warmup,
            "num_decay_steps": self.steps - self.hold_step + 1,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class WinnerSettings:
    """Everything that a run of the chosen configuration needs."""

    study: str
    created: str  # when the study began, ISO 8601
    chosen: str  # "trial 7" or "default"
    score: CandidateScore
    seed_sd: float | None  # of one run's confirmed loss; None with a single seed
    base: str  # hub id, or the absolute path of a folder or file
    base_is_path: bool
    revision: str | None
    quantization: str  # "nf4" (with double quantization) or "none"
    compute_dtype: str
    rank: int
    lora_alpha: float
    lora_dropout: float
    use_rslora: bool
    target_modules: tuple[str, ...]  # full names
    target_names: tuple[str, ...]  # as short as they can be told from all other linear layers
    learning_rate: float
    weight_decay: float
    max_grad_norm: float
    effective_batch_size: int
    micro_batch_size: int
    gradient_checkpointing: bool
    max_length: int
    longest_row: int  # tokens, of the study's rows
    schedule: Schedule
    epochs: float  # passes over the training rows in that many steps
    seed: int
    train_on: str
    num_train: int
    num_confirmation: int
    base_dir: Path  # that paths of the study file are relative to
    shape: ModelShape | None  # None: its config is not here, or its memory has no closed form
    notes: tuple[str, ...]

    @property
    def accumulation_steps(self) -> int:
        """Return the micro-batches of an optimizer step."""
        return self.effective_batch_size // self.micro_batch_size

    @property
    def alpha(self) -> int | float:
        """Return lora_alpha, as a whole number where it is one."""
        return int(self.lora_alpha) if self.lora_alpha.is_integer() else self.lora_alpha


def winner_settings(snapshot: StudySnapshot) -> WinnerSettings:
    """Return the settings of the configuration that a study recommends.

    Raises:
        StoreError: The study has not decided yet.
    """
    lock = snapshot.lock
    confirmation, decision = _decided(snapshot)
    candidate = confirmation.candidate(decision.chosen)
    config, steps = candidate.config, candidate.steps
    spec = spec_of(snapshot)
    train, base_dir = spec.train, base_dir_of(snapshot, spec)
    base = _find_base(lock, base_dir)
    shape = _find_shape(lock, base_dir)
    return WinnerSettings(
        study=lock.name,
        created=lock.created,
        chosen=decision.chosen,
        score=next(score for score in decision.scores if score.candidate == decision.chosen),
        seed_sd=decision.seed_sd,
        base=base.name,
        base_is_path=base.is_path,
        revision=lock.model.revision if not base.is_path else None,
        quantization=lock.model.quantization,
        compute_dtype=lock.plan.compute_dtype,
        rank=config.rank,
        lora_alpha=float(config.lora_alpha),
        lora_dropout=config.lora_dropout,
        use_rslora=config.use_rslora,
        target_modules=config.target_modules,
        target_names=short_names(config.target_modules, shape.linear_names if shape else ()),
        learning_rate=config.learning_rate,
        weight_decay=train.weight_decay,
        max_grad_norm=train.max_grad_norm,
        effective_batch_size=train.effective_batch_size,
        micro_batch_size=lock.plan.micro_batch_size,
        gradient_checkpointing=lock.plan.gradient_checkpointing,
        max_length=spec.data.max_length,
        longest_row=lock.data.max_tokens,
        schedule=_schedule(lock, steps, train.cooldown_ratio),
        epochs=steps * train.effective_batch_size / lock.data.num_train,
        seed=spec.study.seed,
        train_on=spec.data.train_on,
        num_train=lock.data.num_train,
        num_confirmation=lock.data.num_confirmation,
        base_dir=base_dir,
        shape=shape,
        notes=(*base.notes, *_notes(lock, refit=confirmation.refit)),
    )


def _decided(snapshot: StudySnapshot) -> tuple[Confirmation, Decision]:
    lock, confirmation = snapshot.lock, snapshot.confirmation
    decision = confirmation.decision if confirmation is not None else None
    if confirmation is None or decision is None:
        raise StoreError(
            f"{snapshot.folder}: the study {lock.name} has no winner yet, so there are no settings to "
            f"export. Finish it with: lora-tune run {lock.study_file}"
        )
    return confirmation, decision


def _schedule(lock: StudyLock, steps: int, cooldown_ratio: float) -> Schedule:
    hold_step = hold_step_of(steps, cooldown_ratio)
    return Schedule(steps=steps, warmup_steps=lock.warmup_steps, hold_step=hold_step)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Base:
    name: str
    is_path: bool
    notes: tuple[str, ...] = ()


def _find_base(lock: StudyLock, base_dir: Path) -> _Base:
    """Return how another program finds the base: its hub id where there is one, else its absolute path."""
    model = lock.model
    if model.hub_id is not None:
        return _Base(name=model.hub_id, is_path=False, notes=_weights_note(lock, model.hub_id))
    try:
        files = find_model(model.base, revision=None, base_dir=base_dir)
    except LoraTuneError as error:
        said = str(error).splitlines()[0]
        note = f"the base model was not found here, so its name stands as in the study file: {said}"
        return _Base(name=model.base, is_path=True, notes=(note,))
    path = files.folder or files.gguf
    if path is None:
        return _Base(name=model.base, is_path=False)
    return _Base(name=str(path), is_path=True)


def _weights_note(lock: StudyLock, hub_id: str) -> tuple[str, ...]:
    if lock.model.base == hub_id or lock.model.revision is not None:
        return ()
    if note := gguf_note(lock):
        return (f"{note} The file names {hub_id}.",)
    return (
        f"the study trained on weights that came as {lock.model.base}; the file names {hub_id}, whose "
        "weights may differ slightly (a GGUF file was quantized once already).",
    )


def _find_shape(lock: StudyLock, base_dir: Path) -> ModelShape | None:
    """Return the sizes of the base, None where its config is not here or has no closed form."""
    try:
        return ModelShape.from_config(find_config(lock.model.base, base_dir=base_dir).config)
    except LoraTuneError:
        return None


def _notes(lock: StudyLock, *, refit: bool) -> list[str]:
    notes = [
        "the order of the rows, the initial adapter and the dropout masks are drawn by another generator: "
        "the seed's number is carried, its numbers are not."
    ]
    if lock.plan.compute_dtype == "float32" and lock.plan.device == "cpu":
        notes.append(
            "it computes in float32, as the study did on a CPU; on a GPU bfloat16 is several times faster."
        )
    if refit:
        notes.append(
            "the study's own adapter was trained once more on all rows; here it is the training rows "
            "alone, so that the confirmed loss can be met."
        )
    return notes
