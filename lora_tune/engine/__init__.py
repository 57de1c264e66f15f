"""Lanes of a trial pack on one frozen base model."""
