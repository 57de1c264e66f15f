"""Units as people read them. Inside the program memory is bytes and time is seconds."""

import re

GIB = 1024**3
MIB = 1024**2

_SIZE = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*(GiB|MiB)\s*$", re.IGNORECASE)


def format_bytes(num_bytes: float) -> str:
    """Write bytes as GiB (1024**3), or as MiB below a tenth of a GiB.

    >>> format_bytes(5702540160)
    '5.31 GiB'
    >>> format_bytes(3 * 1024**2)
    '3.0 MiB'
    """
    if abs(num_bytes) >= 0.1 * GIB:
        return f"{num_bytes / GIB:.2f} GiB"
    return f"{num_bytes / MIB:.1f} MiB"


def parse_bytes(text: str) -> int | None:
    """Return the bytes that a text such as ``24GiB`` or ``512 MiB`` names, or None.

    >>> parse_bytes("24GiB")
    25769803776
    >>> parse_bytes("rtx-4090") is None
    True
    """
    match = _SIZE.match(text)
    if match is None or len(match[1]) > 15:
        return None
    return int(float(match[1]) * (GIB if match[2].lower() == "gib" else MIB))


def format_duration(seconds: float) -> str:
    """Write seconds as a person would say them.

    >>> format_duration(42.4), format_duration(192), format_duration(7260)
    ('42 s', '3 min 12 s', '2 h 1 min')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def plural(count: int, noun: str) -> str:
    """Write a count with its noun.

    >>> plural(1, "trial"), plural(2, "trial"), plural(4915, "row")
    ('1 trial', '2 trials', '4,915 rows')
    """
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
