"""How numbers and foreign text are written for people. Files for machines are not rounded."""

import unicodedata

from lora_tune.units import format_bytes
from lora_tune.units import plural as plural  # with the others of a report

NOTHING = "-"

# Characters that reorder the text around them: a file name must not rewrite its row.
_BIDI = frozenset("\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def format_loss(loss: float | None) -> str:
    """Write a loss with 4 significant digits.

    >>> format_loss(2.3), format_loss(0.0123456), format_loss(None)
    ('2.300', '0.01235', '-')
    """
    return NOTHING if loss is None else f"{loss:#.4g}".rstrip(".")


def format_difference(difference: float | None, *, signed: bool = True) -> str:
    """Write a small difference of losses with 2 significant digits, without an exponent.

    >>> format_difference(0.01234), format_difference(-0.1234), format_difference(0.5, signed=False)
    ('+0.012', '-0.12', '0.50')
    """
    if difference is None:
        return NOTHING
    digits = 2
    while digits < 6 and 0 < abs(difference) < 10 ** (1 - digits):
        digits += 1
    return f"{difference:+.{digits}f}" if signed else f"{difference:.{digits}f}"


def format_scientific(value: float) -> str:
    """Write a learning rate as it stands in a study file.

    >>> format_scientific(0.0002), format_scientific(0.00031623), format_scientific(0.1)
    ('2e-4', '3.16e-4', '1e-1')
    """
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


def format_percent(fraction: float) -> str:
    """Write a share in percent with one decimal.

    >>> format_percent(0.1842)
    '18.4 %'
    """
    return f"{100 * fraction:.1f} %"


def format_share(fraction: float) -> str:
    """Write an estimated share of a variance; one that comes out below zero is none.

    >>> format_share(0.7142), format_share(-0.02)
    ('71 %', '0 %')
    """
    return f"{max(0.0, 100 * fraction):.0f} %"


def format_p(p_value: float) -> str:
    """Write a p value in hundredths, never as an exact zero.

    >>> format_p(0.6123), format_p(0.0341), format_p(2e-7)
    ('p = 0.61', 'p = 0.03', 'p below 0.01')
    """
    return "p below 0.01" if p_value < 0.01 else f"p = {p_value:.2f}"


def format_range(low: float, high: float, *, signed: bool = True) -> str:
    """Write the ends of an interval of differences.

    >>> format_range(-0.0123, 0.0456), format_range(0.01, 0.02, signed=False)
    ('-0.012 to +0.046', '0.010 to 0.020')
    """
    return f"{format_difference(low, signed=signed)} to {format_difference(high, signed=signed)}"


def format_metric(value: float) -> str:
    """Write a metric without digits that a thousand rows could not show.

    >>> format_metric(0.4167), format_metric(0.0123), format_metric(123.44)
    ('0.42', '0.012', '123.4')
    """
    if abs(value) >= 10:
        return f"{value:,.1f}"
    return f"{value:.3f}" if 0 < abs(value) < 0.1 else f"{value:.2f}"


def format_plain(value: float) -> str:
    """Write a setting such as a dropout or an alpha without needless zeros.

    >>> format_plain(32.0), format_plain(0.05)
    ('32', '0.05')
    """
    return f"{value:.4g}"


def format_count(count: float) -> str:
    """Write a count, or a rate, as whole number with thousands set apart.

    >>> format_count(1234567.4)
    '1,234,567'
    """
    return f"{count:,.0f}"


def format_about(count: int) -> str:
    """Write a count that is an estimate, with 2 significant digits.

    >>> format_about(12345), format_about(142), format_about(7)
    ('12,000', '140', '7')
    """
    return format_count(float(f"{count:.2g}"))


def format_memory(num_bytes: int) -> str:
    """Write a peak; 0 means that it was not measured.

    >>> format_memory(2**30), format_memory(0)
    ('1.00 GiB', '-')
    """
    return format_bytes(num_bytes) if num_bytes else NOTHING


def one_line(text: str) -> str:
    r"""Return foreign text on one line, without control characters.

    An escape sequence in a file name or an error message must not reach the terminal.

    >>> one_line("out of\nmemory \x1b[31mred")
    'out of memory [31mred'
    """
    words = " ".join(text.split())
    return "".join(
        c for c in words if unicodedata.category(c) not in ("Cc", "Cs") and c not in _BIDI
    )


def visible_text(text: str) -> str:
    r"""Return foreign text with its line breaks, what cannot be seen in it written as escapes.

    Control characters, marks that reorder the text around them and halves of pairs would be lost, or
    act on what shows them.

    >>> visible_text("evil\u202etxt.exe \x1b[31m \ud800")
    'evil\\u202etxt.exe \\x1b[31m \\ud800'
    """
    if text.isprintable():
        return text
    return "".join(_escape(c) if _is_invisible(c) else c for c in text)


def _is_invisible(char: str) -> bool:
    return char in _BIDI or (
        unicodedata.category(char) in ("Cc", "Cs", "Zl", "Zp") and char not in "\n\t"
    )


def _escape(char: str) -> str:
    return char.encode("unicode_escape").decode("ascii")
