"""``lora-tune best``: the recommended configuration alone."""

import json

from lora_tune.report.best import best_json, print_best
from lora_tune.report.caveats import missing_trials
from lora_tune.report.terminal import open_console, say
from lora_tune.store.find import find_study


def best(study: str | None, *, as_json: bool) -> None:
    """Print the configuration that a study recommends, or its best so far.

    Args:
        study: A started study as ``store.find`` knows it.
        as_json: One flat object instead.

    Raises:
        AllTrialsFailedError: All is over and nothing can be recommended.
        StoreError: There is no such study, or its folder is damaged.
    """
    snapshot = find_study(study).snapshot()
    for warning in missing_trials(snapshot):
        say(open_console(stderr=True), f"Warning: {warning}", style="yellow")
    if as_json:
        print(json.dumps(best_json(snapshot), indent=2, allow_nan=False))
    else:
        print_best(snapshot, open_console())
