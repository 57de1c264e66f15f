"""What a campaign of faults has counted, as a small JSON file for the table of docs/reliability.md.

``campaign.py`` sets the folder and reads it afterwards; without it nothing is written, so a campaign may also
be run by pytest alone.
"""

import json
import os
from datetime import UTC, datetime
from pathlib import Path

FOLDER_VARIABLE = "LORA_TUNE_CAMPAIGN_OUT"


def record(name: str, **numbers: float | str) -> None:
    """Keep what a campaign counted under its name; the last word on a name counts.

    Args:
        name: Of the campaign, in lower case with hyphens: ``publishing-kills``.
        numbers: What was done and what was found, counts and seconds. No paths and no hosts.
    """
    folder = os.environ.get(FOLDER_VARIABLE)
    if not folder:
        return
    found = {"campaign": name, "date": datetime.now(UTC).date().isoformat(), "numbers": numbers}
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    (target / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def recorded(folder: Path) -> list[dict[str, object]]:
    """Return what campaigns have recorded in a folder, by name."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
