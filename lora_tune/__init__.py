"""Hyperparameter sweeps of LoRA and QLoRA: many trials packed on one frozen 4-bit base."""

__version__ = "0.1.0"
