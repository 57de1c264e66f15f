"""Rows of any common format to tokens with a label mask, and three deterministic splits.

The names below are loaded when they are asked for: who only reads rows need not wait for transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lora_tune.data.chat import template_names
    from lora_tune.data.describe import describe_rows
    from lora_tune.data.groups import row_clusters
    from lora_tune.data.prepare import prepare_data

_HOMES = {
    "describe_rows": "describe",
    "prepare_data": "prepare",
    "row_clusters": "groups",
    "template_names": "chat",
}

__all__ = ["describe_rows", "prepare_data", "row_clusters", "template_names"]


def __getattr__(name: str) -> object:
    """Return a name of ``__all__`` from the module that defines it."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
