"""Rows of any common format to tokens with a label mask, and three deterministic splits."""
