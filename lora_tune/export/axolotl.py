"""``lora-tune export --to axolotl``: the winner's settings as a configuration file of axolotl.

Key names: ``axolotl.utils.schemas`` of 0.19.0; a test loads the file with those classes.
"""

import math
from collections.abc import Sequence

from lora_tune.export.framework_file import (
    CARRIED,
    autocast_note,
    carried_note,
    header,
    prepare,
    schedule_note,
    yaml_text,
)
from lora_tune.export.job import ExportJob, ExportResult
from lora_tune.export.settings import ADAM_BETAS, ADAM_EPSILON, WinnerSettings
from lora_tune.export.training_rows import TRAIN_FILE, TrainingRows
from lora_tune.files import write_text
from lora_tune.report import formatting as fmt

CONFIG = "axolotl.yml"
# It prepares a 4-bit base for k-bit training and then casts what was widened back to 16 bit
# (``ModelLoader._apply_post_model_load_setup``), which is the stack without k-bit preparation.
STACK = "trainer"


def export(job: ExportJob) -> ExportResult:
    """Write the configuration and the rows that it trains on.

    Raises:
        StoreError: The study has no winner yet.
        StudyFileError: ``job.gpu`` is no GPU and no size.
    """
    found = prepare(job, stack=STACK, tokens=False)
    settings, rows = found.settings, found.rows
    notes = (*found.notes, *differences(settings, rows), *settings.notes)
    path = job.folder / CONFIG
    write_text(path, config_text(settings, rows, notes))
    return ExportResult(
        files=(path, *(job.folder / name for name in rows.files)),
        command=f"axolotl train {CONFIG}",
        notes=(carried_note(carried(settings)), *notes),
    )


def config_text(settings: WinnerSettings, rows: TrainingRows, notes: Sequence[str]) -> str:
    """Return the configuration file."""
    top = header(settings, framework="Configuration for axolotl 0.19", notes=notes)
    return f"{top}\n{yaml_text(_sections(settings, rows))}"


def _whole_alpha(settings: WinnerSettings) -> int:
    """Return lora_alpha as axolotl takes it: a whole number, at least 1."""
    return max(1, round(settings.lora_alpha))


def _sections(settings: WinnerSettings, rows: TrainingRows) -> dict[str, dict[str, object]]:
    """Return the keys of the file, in sections with a name."""
    return {
        "base model": _model(settings),
        "adapter": _adapter(settings),
        "rows": _data(settings, rows),
        "training": _training(settings),
        "output": {
            "output_dir": "./axolotl-output",
            "logging_steps": 10,
            "save_strategy": "no",  # the adapter is saved at the end
        },
    }


def _model(settings: WinnerSettings) -> dict[str, object]:
    model: dict[str, object] = {"base_model": settings.base}
    if settings.revision is not None:
        model["revision_of_model"] = settings.revision
    return model | {
        "load_in_4bit": settings.quantization == "nf4",  # with double quantization
        "load_in_8bit": False,
        "bf16": settings.compute_dtype == "bfloat16",
        "fp16": settings.compute_dtype == "float16",
        "attn_implementation": "sdpa",
    }


def _adapter(settings: WinnerSettings) -> dict[str, object]:
    return {
        "adapter": "qlora" if settings.quantization == "nf4" else "lora",
        "lora_r": settings.rank,
        "lora_alpha": _whole_alpha(settings),
        "lora_dropout": settings.lora_dropout,
        "lora_target_modules": list(settings.target_names),
        "lora_target_linear": False,
        "peft_use_rslora": settings.use_rslora,
    }


def _training(settings: WinnerSettings) -> dict[str, object]:
    schedule = settings.schedule.built_in
    return {
        "micro_batch_size": settings.micro_batch_size,
        "gradient_accumulation_steps": settings.accumulation_steps,
        "max_steps": settings.schedule.steps,
        "num_epochs": math.ceil(settings.epochs),
        "learning_rate": _learning_rate(settings),
        "lr_scheduler": "warmup_stable_decay",
        "lr_scheduler_kwargs": {
            "num_decay_steps": schedule["num_decay_steps"],
            "decay_type": "linear",
        },
        "warmup_steps": schedule["num_warmup_steps"],
        "optimizer": "adamw_torch_fused",
        "adam_beta1": ADAM_BETAS[0],
        "adam_beta2": ADAM_BETAS[1],
        "adam_epsilon": ADAM_EPSILON,
        "weight_decay": settings.weight_decay,
        "max_grad_norm": settings.max_grad_norm,
        "gradient_checkpointing": settings.gradient_checkpointing,
        "seed": settings.seed,
    }


def _data(settings: WinnerSettings, rows: TrainingRows) -> dict[str, object]:
    data: dict[str, object] = {"path": TRAIN_FILE, "ds_type": "json"}
    if rows.is_text:
        data |= {"type": "completion", "field": "text"}
    else:
        data |= {
            "type": "chat_template",
            "field_messages": "messages",
            "message_property_mappings": {"role": "role", "content": "content"},
            "roles_to_train": ["assistant"],
            "train_on_eos": "turn",
        }
        if rows.loss != "all":
            data["message_field_training"] = "train"
    found: dict[str, object] = {"datasets": [data]}
    if not rows.is_text:
        found["chat_template"] = "jinja" if rows.template else "tokenizer_default"
        if rows.template:
            found["chat_template_jinja"] = rows.template
    return found | {
        "train_on_inputs": False,
        "sequence_len": settings.max_length,
        "excess_length_strategy": "truncate",
        "sample_packing": False,
        "pad_to_sequence_len": False,
        "val_set_size": 0.0,
    }


def _learning_rate(settings: WinnerSettings) -> float:
    """Return the learning rate that keeps the effective step where lora_alpha had to be rounded."""
    alpha = _whole_alpha(settings)
    if alpha == settings.alpha:
        return settings.learning_rate
    return settings.learning_rate * settings.lora_alpha / alpha


def carried(settings: WinnerSettings) -> tuple[str, ...]:
    """Return what is carried: all but a lora_alpha that is no whole number."""
    is_whole = _whole_alpha(settings) == settings.alpha
    return tuple(name for name in CARRIED if is_whole or name != "lora_alpha")


def differences(settings: WinnerSettings, rows: TrainingRows) -> list[str]:
    """Return what axolotl does otherwise, or cannot take."""
    alpha = _whole_alpha(settings)
    notes = [schedule_note(settings)] if settings.schedule.warmup_steps > 1 else []
    if settings.schedule.built_in["num_warmup_steps"] == 1:
        notes.append("axolotl makes one warm-up step two: the peak comes a step later.")
    if alpha != settings.alpha:
        notes.append(
            f"lora_alpha is {alpha}, not {settings.alpha}: axolotl takes whole numbers. The learning rate "
            f"is {fmt.format_scientific(_learning_rate(settings))}, not "
            f"{fmt.format_scientific(settings.learning_rate)}, so that their product stays."
        )
    if rows.reason and rows.loss == "last":
        notes.append(
            "the study trained on the last assistant turn alone: give the other assistant turns of your "
            'rows "train": false, or axolotl trains on all of them.'
        )
    if not rows.is_text:
        notes.append(
            "axolotl finds the tokens that carry loss by its own reading of the chat template."
        )
    if settings.compute_dtype != "float32":
        notes.append(autocast_note("axolotl"))
    return notes
