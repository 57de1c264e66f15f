"""The JSON Schema of study.toml, for editors: every key with its meaning, choices and default.

It is made from ``StudySpec`` alone. What two keys say to each other (``micro_batch_size`` divides
``effective_batch_size``, ``alpha_ratio`` or ``lora_alpha``) is beyond it; the loader checks that.
"""

import json
from typing import Any

from lora_tune.study.spec import StudySpec

DIALECT = "https://json-schema.org/draft/2020-12/schema"
TITLE = "A lora-tune study file"


def study_schema() -> dict[str, Any]:
    """Return the schema as a JSON object (draft 2020-12).

    >>> study_schema()["$defs"]["MemorySection"]["properties"]["safety"]["default"]
    0.95
    """
    found = _plain(StudySpec.model_json_schema())
    assert isinstance(found, dict)
    for section in found["properties"].values():
        section.pop("default", None)  # those of its keys say the same
    return {"$schema": DIALECT, "title": TITLE, **found}


def schema_text() -> str:
    """Return the schema as the text of its file."""
    return json.dumps(study_schema(), indent=2) + "\n"


def _plain(value: Any, *, of_keys: bool = False) -> Any:
    """Return a part of the schema without what TOML has no word for, and without repeated names.

    Args:
        value: The part.
        of_keys: Its own keys are those of a section, which may be called ``title`` or ``default``.
    """
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if not isinstance(value, dict):
        return value
    if of_keys:
        return {key: _plain(item) for key, item in value.items()}
    kept = {
        key: _plain(item, of_keys=key in ("properties", "$defs"))
        for key, item in value.items()
        if key != "title" and not (key == "default" and item is None)
    }
    if "description" in kept:
        kept["description"] = plain_description(kept["description"])
    kinds = [kind for kind in kept.get("anyOf", ()) if kind != {"type": "null"}]
    if len(kinds) == 1:
        del kept["anyOf"]
        return {**kinds[0], **kept}
    return {**kept, "anyOf": kinds} if kinds else kept


def plain_description(text: str) -> str:
    r"""Return a docstring as one line of text with Markdown's quotes around code.

    >>> plain_description("``auto``: 24, or as many as the\n    budget allows.")
    '`auto`: 24, or as many as the budget allows.'
    """
    return " ".join(text.replace("``", "`").split())
