"""The rows of a study as ``lora-tune check`` shows them: examples, lengths, what is trained on, doubles."""

import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from lora_tune.records import DataFingerprint
from lora_tune.report import formatting as fmt
from lora_tune.report.terminal import plain_table

if TYPE_CHECKING:
    from lora_tune.data.describe import TextPart
    from lora_tune.data.statistics import LengthBin, RowStatistics

OPEN, CLOSE = "{+", "+}"  # around text that carries loss, where there are no colours
MAX_PART = 400  # characters of a part of an example that are shown
BAR_WIDTH = 30
TEMPLATES = {
    "model": "the model's own",
    "none": "none: rows of plain text",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckedRows:
    """What is known of the rows beyond their number."""

    statistics: "RowStatistics"
    examples: "tuple[tuple[TextPart, ...], ...]"  # decoded training rows; empty without a tokenizer
    max_length: int
    tokens_are_estimated: bool


def rows_json(rows: CheckedRows, found: DataFingerprint) -> dict[str, object]:
    """Return the rows as part of the check's JSON object."""
    return {
        "chat_template": None if rows.tokens_are_estimated else found.chat_template,
        "num_bad": found.num_bad_rows,
        "num_duplicates": found.num_duplicates,
        "num_without_label": found.num_unlabelled,
        "train_tokens": found.num_train_tokens,
        "train_label_tokens": found.num_train_labels,
        "max_length": rows.max_length,
        "lengths": asdict(rows.statistics),
        "examples": [
            [{"text": part.text, "has_loss": part.has_loss} for part in example]
            for example in rows.examples
        ],
    }


def rows_lines(rows: CheckedRows, found: DataFingerprint) -> Iterator[str]:
    """Yield what a person should know of the rows, a sentence each."""
    about = "about " if rows.tokens_are_estimated else ""
    seen = rows.statistics
    if not rows.tokens_are_estimated:
        yield f"chat template: {TEMPLATES.get(found.chat_template, found.chat_template)}"
    share = found.num_train_labels / max(1, found.num_train_tokens)
    yield (
        f"{about}{fmt.format_percent(share)} of the training tokens carry loss "
        f"({fmt.format_count(found.num_train_labels)} of {fmt.format_count(found.num_train_tokens)})"
    )
    yield (
        f"{about}{seen.median:,} tokens in the middle, 95 % of the rows up to {seen.percentile_95:,}, "
        f"the longest {seen.longest:,}"
    )
    yield _cut_text(rows)
    yield from _doubles(seen, found)


def _cut_text(rows: CheckedRows) -> str:
    seen, about = rows.statistics, "about " if rows.tokens_are_estimated else ""
    if not seen.num_cut:
        return f"no row is longer than data.max_length = {rows.max_length:,}"
    text = (
        f"{about}{fmt.plural(seen.num_cut, 'row')} ({_share(seen.num_cut / seen.num_rows)}) "
        f"cut to data.max_length = {rows.max_length:,}: "
        f"{_share(seen.num_cut_tokens / seen.num_tokens)} of all tokens are lost"
    )
    if seen.num_cut <= seen.num_rows // 100:
        return text
    return f"{text}; {seen.percentile_99:,} would leave 99 % of the rows whole"


def _share(fraction: float) -> str:
    """Write a share in percent; a small one is not written as none.

    >>> _share(0.0004), _share(0.021)
    ('below 0.1 %', '2.1 %')
    """
    return "below 0.1 %" if 0 < fraction < 0.001 else fmt.format_percent(fraction)


def _doubles(seen: "RowStatistics", found: DataFingerprint) -> Iterator[str]:
    alike = "but for case, punctuation and white space"
    if found.num_duplicates:
        yield f"{fmt.plural(found.num_duplicates, 'duplicate')} left out"
    if seen.num_alike:
        yield f"{fmt.plural(seen.num_alike, 'training row')} like another one {alike}"
    doubles = "" if seen.num_alike or found.num_duplicates else "no exact duplicates, and "
    yield f"{doubles}no held-out row is also a training row, {alike}"


def rows_warnings(rows: CheckedRows) -> Iterator[str]:
    """Yield what should be mended before the study runs."""
    seen = rows.statistics
    if seen.num_without_label > seen.num_rows // 100:
        yield (
            f"{fmt.plural(seen.num_without_label, 'row')} ({_share(seen.num_without_label / seen.num_rows)}) "
            f"left out because no token with loss remains within data.max_length = {rows.max_length:,}; "
            f"95 % of the rows are no longer than {seen.percentile_95:,} tokens."
        )


def print_lengths(rows: CheckedRows, console: Console) -> None:
    """Print the histogram of lengths; what is cut is marked."""
    table = _histogram(rows)
    console.print(Padding(table, (0, 0, 0, 2), expand=False))


def _histogram(rows: CheckedRows) -> Table:
    table = plain_table()
    for header in ("tokens", "rows"):
        table.add_column(header, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    most = max(found.rows for found in rows.statistics.bins)
    for found in rows.statistics.bins:
        cut = found.low > rows.max_length
        table.add_row(
            f"{found.low:,} - {found.high:,}",
            fmt.format_count(found.rows),
            Text(f"{_bar(found, most)}{' cut' if cut else ''}"),
            style="yellow" if cut else "",
        )
    return table


def _bar(found: "LengthBin", most: int) -> str:
    return "#" * -(-BAR_WIDTH * found.rows // max(1, most))


def print_examples(rows: CheckedRows, console: Console) -> None:
    """Print decoded rows; what carries loss is bold and green, or marked where there are no colours."""
    how = "bold and green" if console.color_system else f"between {OPEN} and {CLOSE}"
    console.print(Padding(Text(f"Text that carries loss is {how}."), (0, 0, 0, 2)))
    for number, example in enumerate(rows.examples, start=1):
        console.print()
        console.print(Text(f"  row {number}", style="dim"))
        text = example_text(example, marked=console.color_system is None)
        text.rstrip()
        console.print(Padding(text, (0, 0, 0, 4), expand=False))


def example_text(example: "Sequence[TextPart]", *, marked: bool) -> Text:
    """Return a decoded row as text for a terminal; its control characters cannot reach it."""
    text = Text()
    for part in example:
        shown = _shortened(_visible(part.text))
        if not part.has_loss:
            text.append(shown)
        elif marked:
            text.append(f"{OPEN}{shown}{CLOSE}")
        else:
            text.append(shown, style="bold green")
    return text


def _visible(text: str) -> str:
    r"""Return foreign text with its line breaks, without other control and format characters.

    >>> _visible("a\r\n\tb\x1b[31m")
    'a\n    b[31m'
    """
    plain = text.replace("\r\n", "\n").expandtabs(4)
    return "".join(
        c for c in plain if c == "\n" or unicodedata.category(c) not in ("Cc", "Cf", "Cs")
    )


def _shortened(text: str) -> str:
    """Return both ends of a long text.

    >>> len(_shortened("word " * 1000)) < 500
    True
    """
    if len(text) <= MAX_PART:
        return text
    half = MAX_PART // 2
    left_out = fmt.format_count(len(text) - 2 * half)
    return f"{text[:half]} [... {left_out} characters ...] {text[-half:]}"
