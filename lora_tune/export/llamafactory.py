"""``lora-tune export --to llamafactory``: the winner's settings as a configuration of LLaMA-Factory.

Key names: the dataclasses in ``llamafactory.hparams`` of 0.9.5; a test parses the file with them.
"""

import json
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

CONFIG, DATASETS = "llamafactory.yaml", "dataset_info.json"
DATASET = "study_train"
# Without k-bit preparation, adapters in float32, full logits (``prepare_model_for_training``).
STACK = "trainer"


def export(job: ExportJob) -> ExportResult:
    """Write the configuration, the rows that it trains on, and the entry that names them.

    Raises:
        StoreError: The study has no winner yet.
        StudyFileError: ``job.gpu`` is no GPU and no size.
    """
    found = prepare(job, stack=STACK, tokens=False)
    settings, rows = found.settings, found.rows
    notes = (*found.notes, *differences(settings, rows), *settings.notes)
    path, datasets = job.folder / CONFIG, job.folder / DATASETS
    write_text(path, config_text(settings, rows, notes))
    write_text(datasets, json.dumps({DATASET: _dataset(rows)}, indent=2) + "\n")
    return ExportResult(
        files=(path, datasets, *(job.folder / name for name in rows.files)),
        command=f"llamafactory-cli train {CONFIG}",
        notes=(carried_note(CARRIED), *notes),
    )


def config_text(settings: WinnerSettings, rows: TrainingRows, notes: Sequence[str]) -> str:
    """Return the configuration file."""
    top = header(settings, framework="Configuration for LLaMA-Factory 0.9.5", notes=notes)
    return f"{top}\n{yaml_text(_sections(settings, rows))}"


def _sections(settings: WinnerSettings, rows: TrainingRows) -> dict[str, dict[str, object]]:
    """Return the keys of the file, in sections with a name."""
    return {
        "base model": _model(settings),
        "adapter": _adapter(settings, rows),
        "rows": {
            "dataset_dir": ".",
            "dataset": DATASET,
            "cutoff_len": settings.max_length,
            "train_on_prompt": False,
            "mask_history": rows.loss == "last",
            "packing": False,
        },
        "training": _training(settings),
        "output": {
            "output_dir": "./llamafactory-output",
            "logging_steps": 10,
            "save_strategy": "no",  # the adapter is saved at the end
            "report_to": "none",
        },
    }


def _model(settings: WinnerSettings) -> dict[str, object]:
    model: dict[str, object] = {"model_name_or_path": settings.base}
    if settings.revision is not None:
        model["model_revision"] = settings.revision
    if settings.quantization == "nf4":
        model |= {
            "quantization_method": "bnb",
            "quantization_bit": 4,
            "quantization_type": "nf4",
            "double_quantization": True,
        }
    return model | {
        "bf16": settings.compute_dtype == "bfloat16",
        "fp16": settings.compute_dtype == "float16",
        "flash_attn": "sdpa",
        "disable_gradient_checkpointing": not settings.gradient_checkpointing,
    }


def _adapter(settings: WinnerSettings, rows: TrainingRows) -> dict[str, object]:
    return {
        "stage": "pt" if rows.is_text else "sft",
        "do_train": True,
        "finetuning_type": "lora",
        "lora_rank": settings.rank,
        "lora_alpha": settings.alpha,
        "lora_dropout": settings.lora_dropout,
        "lora_target": ",".join(settings.target_names),
        "use_rslora": settings.use_rslora,
    }


def _training(settings: WinnerSettings) -> dict[str, object]:
    schedule = settings.schedule.built_in
    return {
        "per_device_train_batch_size": settings.micro_batch_size,
        "gradient_accumulation_steps": settings.accumulation_steps,
        "max_steps": settings.schedule.steps,
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": "warmup_stable_decay",
        # both, or LLaMA-Factory makes a third of the steps stable
        "lr_scheduler_kwargs": {
            "num_stable_steps": schedule["num_stable_steps"],
            "num_decay_steps": schedule["num_decay_steps"],
            "decay_type": "linear",
        },
        "warmup_steps": schedule["num_warmup_steps"],
        "optim": "adamw_torch_fused",
        "adam_beta1": ADAM_BETAS[0],
        "adam_beta2": ADAM_BETAS[1],
        "adam_epsilon": ADAM_EPSILON,
        "weight_decay": settings.weight_decay,
        "max_grad_norm": settings.max_grad_norm,
        "seed": settings.seed,
    }


def _dataset(rows: TrainingRows) -> dict[str, object]:
    """Return the entry of dataset_info.json."""
    if rows.is_text:
        return {"file_name": TRAIN_FILE, "columns": {"prompt": "text"}}
    return {
        "file_name": TRAIN_FILE,
        "formatting": "sharegpt",
        "columns": {"messages": "messages"},
        "tags": {
            "role_tag": "role",
            "content_tag": "content",
            "user_tag": "user",
            "assistant_tag": "assistant",
            "observation_tag": "tool",
            "system_tag": "system",
        },
    }


def differences(settings: WinnerSettings, rows: TrainingRows) -> list[str]:
    """Return what LLaMA-Factory does otherwise, or cannot take."""
    notes = [schedule_note(settings)] if settings.schedule.warmup_steps > 1 else []
    notes += _of_rows(rows)
    if settings.compute_dtype != "float32":
        notes.append(autocast_note("LLaMA-Factory"))
    return notes


def _of_rows(rows: TrainingRows) -> list[str]:
    notes = []
    if not rows.is_text:
        notes.append(
            "template: none is named, so LLaMA-Factory reads the tokenizer's own; name one of its own "
            "(template: llama3, qwen3, ...) if it knows the model, and check a printed example."
        )
    if rows.template:
        notes.append(
            f"the study's own chat template is in {rows.template}, which LLaMA-Factory cannot take: put it "
            "into the tokenizer's folder, or name the template of LLaMA-Factory that is like it."
        )
    if rows.loss == "mixed":
        notes.append(
            "which turns carry loss is not carried: LLaMA-Factory takes all assistant turns or the last."
        )
    if rows.not_alternating:
        notes.append(
            f"{rows.not_alternating} rows in which user and assistant do not take turns are skipped by "
            "LLaMA-Factory."
        )
    return notes
