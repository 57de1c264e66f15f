"""A trial's record beside what plain PEFT found."""

from importlib.metadata import version

from lora_tune.report.verify import LossPair, StepLosses, Verification
from lora_tune.stats.ratio import ratio_estimate
from lora_tune.verification.process import PlainResult, PlainRun
from lora_tune.verification.task import VerifyTask

# Another version of one of these may round, quantize or draw otherwise.
_PACKAGES = ("torch", "transformers", "peft", "bitsandbytes")


def compare(task: VerifyTask, plain: PlainResult) -> Verification:
    """Return both sides, and what is needed to judge their difference."""
    evaluation, lock = task.result.evaluation, task.lock
    first, *others = plain.runs
    labels = evaluation.label_counts
    differences = [a - b for a, b in zip(first.loss_sums, evaluation.loss_sums, strict=True)]
    return Verification(
        study=lock.name,
        folder=task.folder,
        trial=task.record.number,
        rung=task.result.rung,
        num_steps=task.result.steps,
        most_lanes=max(result.pack_lanes for result in task.record.rungs),
        quantization=task.spec.model.quantization,
        compute_dtype=evaluation.compute_dtype,
        device=lock.plan.device,
        training=tuple(
            StepLosses(point.step, point.train_loss, first.train_losses[point.step - 1])
            for point in task.points()
        ),
        evaluation=LossPair(task.result.eval_loss, _mean_loss(first, labels)),
        standard_error=ratio_estimate(differences, labels).standard_error,
        largest_row_difference=max(
            abs(d) / count for d, count in zip(differences, labels, strict=True)
        ),
        num_rows=len(labels),
        adapter=LossPair(evaluation.mean_loss, sum(plain.adapter_loss_sums) / sum(labels)),
        other_seed_losses=tuple(_mean_loss(run, labels) for run in others),
        other_versions=_other_versions(task),
    )


def _mean_loss(run: PlainRun, label_counts: tuple[int, ...]) -> float:
    return sum(run.loss_sums) / sum(label_counts)


def _other_versions(task: VerifyTask) -> dict[str, tuple[str, str]]:
    now = {name: version(name) for name in _PACKAGES}
    then = task.lock.versions
    return {
        name: (then[name], now[name]) for name in now if name in then and then[name] != now[name]
    }
