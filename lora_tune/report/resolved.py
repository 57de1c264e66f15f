"""What the resolved study file says, as values and as text for people."""

from lora_tune.records import StudyLock
from lora_tune.report import formatting as fmt
from lora_tune.units import format_bytes


def spec_value(spec: object, *keys: str) -> object:
    """Return a nested value of a study file, None where a key is missing."""
    for key in keys:
        spec = spec.get(key) if isinstance(spec, dict) else None
    return spec


def eval_rows(lock: StudyLock, rung: int) -> int:
    """Return how many selection rows a rung is evaluated on; all in a study of an older version."""
    return lock.eval_rows[rung] if lock.eval_rows else lock.data.num_selection


def planned_trials(lock: StudyLock) -> int | None:
    """Return how many trials the study is to have; None where nothing says so."""
    if lock.study_plan is not None:
        return lock.study_plan.num_trials
    planned = spec_value(lock.spec, "search", "trials")
    return planned if isinstance(planned, int) else None


def setting_text(lock: StudyLock, section: str, key: str) -> str:
    """Return a key of the resolved study file as text."""
    value = spec_value(lock.spec, section, key)
    if value is None:
        return "not recorded"
    return fmt.format_plain(value) if isinstance(value, float) else fmt.one_line(str(value))


def hardware_rows(lock: StudyLock) -> list[tuple[str, str]]:
    """Return the hardware as names and values for people, memory in GiB."""
    rows = []
    for name, value in lock.hardware.items():
        if name.endswith("_bytes") and value.isdecimal():
            name, value = name.removesuffix("_bytes"), format_bytes(int(value))
        rows.append((name.replace("_", " "), value))
    if "device" not in lock.hardware:
        rows.insert(0, ("device", lock.plan.device))
    return rows


def schedule_text(lock: StudyLock, *, steps: int) -> str:
    """Say under which training, of so many steps, a learning rate of this study was found."""
    batch = setting_text(lock, "train", "effective_batch_size")
    optimizer = setting_text(lock, "train", "optimizer")
    name = "AdamW" if optimizer == "adamw" else optimizer
    return (
        f"{name}, effective batch size {batch}, {fmt.plural(steps, 'step')}, "
        f"{fmt.plural(lock.warmup_steps, 'warm-up step')}, then {decay_text(lock)}"
    )


def gguf_note(lock: StudyLock) -> str | None:
    """Return what the planning noted of a base that came from a GGUF file, and whose hub weights differ."""
    return next((note for note in lock.notes if note.startswith("the base comes from ")), None)


def decay_text(lock: StudyLock) -> str:
    """Return the learning rate's course after the warm-up."""
    cooldown = spec_value(lock.spec, "train", "cooldown_ratio")
    if not isinstance(cooldown, int | float) or cooldown == 0:
        return "constant"
    return f"constant, falling linearly to zero over the last {100 * cooldown:.0f} % of the steps"
