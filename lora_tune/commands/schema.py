"""``lora-tune schema``: what may stand in a study file, for editors."""

from lora_tune.study.schema import schema_text


def schema() -> None:
    """Print the JSON Schema of study.toml."""
    print(schema_text(), end="")
