"""A new study file: every key of ``StudySpec`` with its meaning, choices and default above it.

The keys that a first study is likely to touch are set; all others stand there commented out. Meanings,
limits and defaults come from the schema, so they cannot differ from what the loader does.
"""

import textwrap
from collections.abc import Iterator, Mapping

import tomlkit
from tomlkit.items import Table

from lora_tune.study.choices import Json, choices, toml_literal
from lora_tune.study.schema import study_schema

# Set in a new file, even to the default, because a first study is likely to change them.
_SHOWN = {
    "model": ("quantization",),
    "data": ("max_length",),
    "train": ("epochs", "effective_batch_size"),
    "space": ("rank", "lora_dropout", "target_modules", "learning_rate"),
    "search": ("trials",),
    "memory": ("gpu",),
    "select": ("finalists",),
}
_WIDTH = 98
_HEADER = (
    "A study of lora-tune. Lines that are commented out show the default of a key, or an example where there "
    "is none. Paths of model and data are relative to this file."
)


def study_template(given: Mapping[str, Mapping[str, object]], *, schema: str) -> str:
    """Return the text of a study file.

    Args:
        given: Values by section and key, at least ``model.base`` and ``data.train``.
        schema: Where an editor finds the JSON Schema: a path relative to the file, or a URL.
    """
    found = study_schema()
    document = tomlkit.document()
    for line in textwrap.wrap(_HEADER, _WIDTH):
        document.add(tomlkit.comment(line))
    for name, reference in found["properties"].items():
        section = found["$defs"][reference["$ref"].rpartition("/")[2]]
        table = _table(section, given.get(name, {}), _SHOWN.get(name, ()))
        document.add(name, table.comment(_meaning_of_section(section["description"])))
    return f"#:schema {schema}\n{tomlkit.dumps(document)}"


def _meaning_of_section(description: str) -> str:
    """Return ``[model]: the frozen base.`` as a sentence."""
    text = description.partition(": ")[2]
    return text[:1].upper() + text[1:]


def _table(section: Json, given: Mapping[str, object], shown: tuple[str, ...]) -> Table:
    table = tomlkit.table()
    required = section.get("required", ())
    for key, meaning in section["properties"].items():
        table.add(tomlkit.nl())
        for line in _explanation(meaning, required=key in required):
            table.add(tomlkit.comment(line))
        if key in given:
            table.add(key, tomlkit.value(toml_literal(given[key])))
        elif key in shown:
            table.add(key, tomlkit.value(toml_literal(meaning["default"])))
        else:
            value = meaning["default"] if "default" in meaning else meaning["examples"][0]
            table.add(tomlkit.comment(f"{key} = {toml_literal(value)}"))
    table.add(tomlkit.nl())
    return table


def _explanation(meaning: Json, *, required: bool) -> Iterator[str]:
    """Yield the lines above a key: what it means, what may stand there, and the default."""
    facts = [choices(meaning)]
    if not required:
        default = meaning.get("default")
        facts.append(f"default: {'none' if default is None else toml_literal(default)}")
    text = f"{meaning['description'].rstrip('.')} ({'; '.join(facts)})."
    yield from textwrap.wrap(text, _WIDTH, break_long_words=False, break_on_hyphens=False)
