"""``lora-tune verify``: train a finished trial again by plain PEFT and compare."""

import json

from lora_tune.report.terminal import open_console
from lora_tune.report.verify import (
    VerifyView,
    cost_sentence,
    print_verification,
    verification_json,
)
from lora_tune.store.find import find_study
from lora_tune.verification.compare import compare
from lora_tune.verification.process import PlainRequest, run_plainly
from lora_tune.verification.task import verify_task


def verify(study: str | None, *, trial: int | None, num_seeds: int, as_json: bool) -> bool:
    """Show the trial beside plain PEFT; return whether they agree.

    Args:
        study: A started study as ``store.find`` knows it.
        trial: Its number; None is the winner.
        num_seeds: Further plain runs with other seeds, from which seed noise is measured.
        as_json: One object instead of the table.

    Raises:
        LoraTuneError: There is nothing to compare, or the rows or the base model are gone.
    """
    task = verify_task(find_study(study).snapshot(), trial)
    number, num_runs = task.record.number, 1 + num_seeds
    with VerifyView(num_runs) as view:
        view.note(
            cost_sentence(trial=number, num_runs=num_runs, seconds=task.plain_seconds(num_runs))
        )
        request = PlainRequest(folder=str(task.folder), trial=number, num_seeds=num_seeds)
        found = compare(task, run_plainly(request, view))
    if as_json:
        print(json.dumps(verification_json(found), indent=2))
    else:
        print_verification(found, open_console())
    return found.agrees
