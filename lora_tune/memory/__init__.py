"""Closed form of the memory of a training step. Never imports torch."""
