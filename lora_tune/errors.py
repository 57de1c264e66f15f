"""Errors that are the user's to mend: one message, no traceback, an exit code by class.

Anything that is not a ``LoraTuneError`` is a bug and keeps its traceback (exit code 1).

    LoraTuneError
    |-- StudyFileError       3  study.toml: unknown key, wrong type, value out of range
    |-- DataError            3  rows: missing file, unknown format, no label token, too few rows
    |-- TargetModulesError   3  a target-module set that the model does not have
    |-- StoreError           4  the study folder is unreadable, damaged or owned by another process
    |-- DatabaseAwayError   75  the database server was away for too long; the same command goes on
    |-- InfeasibleError      5  no configuration fits the memory
    |-- AllTrialsFailedError 6  nothing to recommend
    |-- MachineError     7  the machine lacks what the study needs: a GPU that torch can use
    |   `-- DiskFullError       there is no room on disk; the same command goes on when there is
    `-- ModelError           8  the base model cannot be found, read or used
        `-- UncoveredModelError   its memory has no closed form: the trace must count it

A message says where, what was seen, what is allowed and what to do.
"""

from collections.abc import Iterable
from difflib import get_close_matches


class LoraTuneError(Exception):
    """A mistake that the user can mend; shown as one message without a traceback."""

    exit_code = 3


class StudyFileError(LoraTuneError, ValueError):
    """The study file, or an option that stands for a key of it, cannot be used as written."""

    exit_code = 3


class DataError(LoraTuneError, ValueError):
    """The training data cannot be used as they are."""

    exit_code = 3


class TargetModulesError(LoraTuneError, ValueError):
    """A target-module set matches nothing, or only part of a group, on this model."""

    exit_code = 3


class StoreError(LoraTuneError, OSError):
    """The study folder cannot be read, is damaged, or belongs to another process."""

    exit_code = 4


class DatabaseAwayError(LoraTuneError, ConnectionError):
    """The database server was away for longer than a study waits; nothing is lost."""

    exit_code = 75  # as after SIGTERM: the same command goes on


class InfeasibleError(LoraTuneError, ValueError):
    """Not even the smallest configuration of the space fits the memory budget."""

    exit_code = 5


class AllTrialsFailedError(LoraTuneError, RuntimeError):
    """Every trial diverged, ran out of memory or failed, so there is nothing to recommend."""

    exit_code = 6


class MachineError(LoraTuneError, RuntimeError):
    """The machine lacks something that the study needs."""

    exit_code = 7


class DiskFullError(MachineError):
    """What was to be written did not fit on the disk, or would not have."""


class ModelError(LoraTuneError, RuntimeError):
    """The base model cannot be found, read or used."""

    exit_code = 8


class UncoveredModelError(ModelError):
    """The model's memory has no closed form; it is found by tracing the real model."""


class Terminated(BaseException):
    """SIGTERM arrived: the study stops cleanly and the same command goes on later."""


def nearest(word: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean X?"`` for the known word nearest to ``word``, or an empty string.

    >>> nearest("lora_dropuot", ["lora_dropout", "rank"])
    '; did you mean lora_dropout?'
    >>> nearest("zzz", ["lora_dropout", "rank"])
    ''
    """
    close = get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else ""
