"""Rows of any common format to tokens with a label mask, and three deterministic splits."""

from lora_tune.data.chat import template_names
from lora_tune.data.describe import describe_rows
from lora_tune.data.groups import row_clusters
from lora_tune.data.prepare import prepare_data

__all__ = ["describe_rows", "prepare_data", "row_clusters", "template_names"]
