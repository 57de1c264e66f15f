"""From ``[data]`` of the study file to three tokenized splits: read, convert, encode, split."""

import hashlib
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple, Protocol

from transformers import PreTrainedTokenizerBase

from lora_tune.data.describe import decode_row
from lora_tune.data.encode import EncodedRow, RowEncoder
from lora_tune.data.formats import Example, PlainText, choose_format, convert_row, unused_columns
from lora_tune.data.groups import check_group_column, group_of, row_clusters
from lora_tune.data.likeness import Likeness, likeness
from lora_tune.data.reading import RawRow, RowError, brief, brief_names, find_file, read_rows
from lora_tune.data.splits import KeyedRow, Splits, split_rows, split_with_eval, token_key
from lora_tune.errors import DataError
from lora_tune.records import DataFingerprint, PreparedData, TokenizedRow
from lora_tune.study.spec import DataSection
from lora_tune.units import plural

_HEAD_ROWS = 200  # rows that are looked at to find the format
_BATCH_ROWS = 256  # rows tokenized together, fewer if they are long
_BATCH_CHARACTERS = 500_000  # tokens with their places take about thirty times the text
_SHOWN_FAULTS = 3
_SHOWN_ROW = 600  # characters


def prepare_data(
    data: DataSection, *, tokenizer: PreTrainedTokenizerBase, seed: int, base_dir: Path
) -> PreparedData:
    """Read the rows of a study, tokenize and label them, and deal them into the three splits.

    Args:
        data: The ``[data]`` section.
        tokenizer: The base model's tokenizer; it is not changed.
        seed: The study's seed; with the rows' content it fixes the splits.
        base_dir: Folder of the study file.

    Returns:
        The splits, each in an order that does not depend on the order of the file.

    Raises:
        DataError: The rows cannot be read or used, too many of them are bad, no label is left, the
            column of ``data.group`` is missing, or there are too few rows for three splits.
    """
    encoder = RowEncoder(data, tokenizer=tokenizer, base_dir=base_dir)
    return prepare_with(encoder, data, tokenizer=tokenizer, seed=seed, base_dir=base_dir)


class Encoder(Protocol):
    """What turns examples into rows of tokens; ``RowEncoder`` is the one that a study trains on."""

    @property
    def notes(self) -> Sequence[str]:
        """What was special, as sentences."""
        ...

    @property
    def chat_template(self) -> str:
        """As in the fingerprint of the data."""
        ...

    def encode(self, examples: Sequence[Example]) -> list[EncodedRow | RowError]:
        """Encode examples together, in order."""
        ...


def prepare_with(
    encoder: Encoder,
    data: DataSection,
    *,
    tokenizer: PreTrainedTokenizerBase | None,
    seed: int,
    base_dir: Path,
) -> PreparedData:
    """Do the same with another encoder; the tokenizer is only there to show a row in a message."""
    sources = [data.train] if data.eval is None else [data.train, data.eval]
    loaded = [
        _load(source, data=data, encoder=encoder, seed=seed, base_dir=base_dir)
        for source in sources
    ]
    for source in loaded:
        source.check(data, tokenizer)
    notes = [note for source in loaded for note in source.notes(data)]
    notes += encoder.notes
    if data.split != "train" and all(find_file(source, base_dir) for source in sources):
        notes.append(f"data.split = {data.split!r} is without effect: the rows come from files.")

    if data.eval is not None:
        notes += loaded[0].leave_out(loaded[1])
    try:
        splits = _split(loaded, data, seed)
    except DataError as error:
        raise DataError("\n  ".join([str(error), *notes])) from error
    if data.group is not None:
        notes.append(_group_note(splits, data.group))
    notes += _likeness_notes(splits, loaded, grouped=data.group is not None)
    return PreparedData(
        train=splits.train,
        selection=splits.selection,
        confirmation=splits.confirmation,
        fingerprint=_fingerprint(splits, loaded, encoder.chat_template),
        notes=tuple(notes),
    )


def _split(loaded: list["_Source"], data: DataSection, seed: int) -> Splits:
    rows = [source.rows for source in loaded]
    wanted = {"selection_rows": data.selection_rows, "confirmation_rows": data.confirmation_rows}
    if data.eval is None:
        return split_rows(rows[0], **wanted, seed=seed)
    return split_with_eval(rows[0], rows[1], **wanted, seed=seed)


@dataclass(slots=True, kw_only=True)
class _Source:
    """What came out of one file or hub data set."""

    name: str
    format: str
    rows: dict[bytes, KeyedRow] = field(default_factory=dict)
    num_read: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    first_faults: list[str] = field(default_factory=list)
    unused: set[str] = field(default_factory=set)
    num_truncated: int = 0
    num_duplicates: int = 0
    num_unlabelled: int = 0
    example_unlabelled: EncodedRow | None = None

    @property
    def num_bad(self) -> int:
        return self.faults.total()

    def add_fault(self, where: str, fault: RowError) -> None:
        self.faults[fault.reason] += 1
        if len(self.first_faults) < _SHOWN_FAULTS:
            self.first_faults.append(f"{where}: {fault}")

    def add(self, encoded: EncodedRow, key: bytes, alike: Likeness, group: str) -> None:
        row = encoded.row
        if group:
            row = TokenizedRow(input_ids=row.input_ids, labels=row.labels, group=group)
        self.num_truncated += encoded.full_length > len(row.input_ids)
        if row.num_labels == 0:
            self.num_unlabelled += 1
            self.example_unlabelled = self.example_unlabelled or encoded
            return
        tokens = token_key(row)
        kept = self.rows.get(tokens)
        self.num_duplicates += kept is not None
        # Of rows with the same tokens the smallest hash stays, whatever the order of the file.
        if kept is None or (key, group) < (kept.key, kept.row.group):
            self.rows[tokens] = KeyedRow(key, row, alike)

    def leave_out(self, held_out: "_Source") -> Iterator[str]:
        """Remove the rows, and the groups, of the held-out source; say so, a sentence each."""
        shared = self.rows.keys() & held_out.rows.keys()
        for ids in shared:
            del self.rows[ids]
        self.num_duplicates += len(shared)
        if shared:
            yield f"{len(shared)} rows of {self.name} are also in {held_out.name}; they are not trained on."
        wholes = {keyed.likeness.whole for keyed in held_out.rows.values()}
        near = [tokens for tokens, keyed in self.rows.items() if keyed.likeness.whole in wholes]
        for tokens in near:
            del self.rows[tokens]
        self.num_duplicates += len(near)
        if near:
            yield (
                f"{len(near)} rows of {self.name} are also in {held_out.name} but for case, punctuation "
                "and white space; they are not trained on."
            )
        groups = {keyed.row.group for keyed in held_out.rows.values()} - {""}
        alike = [ids for ids, keyed in self.rows.items() if keyed.row.group in groups]
        for ids in alike:
            del self.rows[ids]
        if alike:
            yield (
                f"{len(alike)} rows of {self.name} are of groups that are also in {held_out.name}; "
                "they are not trained on."
            )

    def check(self, data: DataSection, tokenizer: PreTrainedTokenizerBase | None) -> None:
        """Stop the study if the source cannot be trusted.

        Raises:
            DataError: No rows, too many bad ones, or none with a label.
        """
        if self.num_read == 0:
            raise DataError(f"{self.name} has no rows.")
        if self.num_bad > data.max_bad_fraction * self.num_read:
            raise DataError(_too_many_faults(self, data.max_bad_fraction))
        if not self.rows and self.example_unlabelled is not None:
            raise DataError(_no_labels(self, self.example_unlabelled, data, tokenizer))
        if not self.rows:
            raise DataError(f"{self.name} has no usable row.\n  " + "\n  ".join(self.first_faults))

    def notes(self, data: DataSection) -> Iterator[str]:
        """Say what was detected, dropped and cut, a sentence each."""
        how = "detected" if data.format == "auto" else "as data.format says"
        yield f"{self.name}: {plural(self.num_read, 'row')}, format {self.format} ({how})."
        if self.unused:
            yield f"{self.name}: not used: {brief_names(self.unused)}."
        if self.num_bad:
            reasons = ", ".join(f"{n} {reason}" for reason, n in self.faults.most_common())
            yield (
                f"{self.name}: {plural(self.num_bad, 'bad row')} left out ({reasons}); the first is "
                f"{self.first_faults[0]}."
            )
        if self.num_truncated:
            yield f"{self.name}: {plural(self.num_truncated, 'row')} cut to {data.max_length} tokens."
        if self.num_unlabelled:
            rows = plural(self.num_unlabelled, "row")
            yield f"{self.name}: {rows} left out for lack of a token with a label."
        if self.num_duplicates:
            yield f"{self.name}: {plural(self.num_duplicates, 'exact duplicate')} left out."


def _load(name: str, *, data: DataSection, encoder: Encoder, seed: int, base_dir: Path) -> _Source:
    raw_rows = read_rows(name, split=data.split, base_dir=base_dir)
    head = list(islice(raw_rows, _HEAD_ROWS))
    objects = [row.value for row in head if isinstance(row.value, Mapping)]
    fmt = choose_format(name, data.format, objects) if objects else "text"
    source = _Source(name=name, format=fmt)
    if data.group is not None and objects:
        check_group_column(name, data.group, objects)
    for value in objects:
        source.unused |= unused_columns(fmt, value) - {data.group}
    for batch in _batches(_convert(chain(head, raw_rows), source, data.group)):
        encoded_rows = encoder.encode([read.example for read in batch])
        for read, encoded in zip(batch, encoded_rows, strict=True):
            if isinstance(encoded, RowError):
                source.add_fault(read.where, encoded)
            else:
                key, alike = read.example.sort_key(seed), likeness(read.example)
                source.add(encoded, key, alike, read.group)
    return source


class _Read(NamedTuple):
    """A row that was understood: its place, its meaning and its group."""

    where: str
    example: Example
    group: str


def _convert(raw_rows: Iterable[RawRow], source: _Source, column: str | None) -> Iterator[_Read]:
    for where, value in raw_rows:
        source.num_read += 1
        try:
            example = convert_row(source.format, value)
            yield _Read(where, example, "" if column is None else group_of(value, column))
        except RowError as fault:
            source.add_fault(where, fault)


def _likeness_notes(splits: Splits, loaded: list[_Source], *, grouped: bool) -> Iterator[str]:
    """Say how many rows look like another one, and how many held-out rows have a trained prompt."""
    unused = {tokens: row.likeness for source in loaded for tokens, row in source.rows.items()}
    parts = [[unused.pop(token_key(row)) for row in split] for split in splits]
    held_out = {row.whole for part in parts[1:] for row in part}
    left_out = sum(row.whole in held_out for row in unused.values()) if grouped else 0
    if left_out:
        yield (
            f"{left_out} rows are also in another split, in another group, but for case, punctuation and "
            "white space; they are left out."
        )
    num_alike = sum(len(part) - len({row.whole for row in part}) for part in parts)
    if num_alike:
        yield (
            f"{num_alike} rows look like another one but for case, punctuation and white space; they "
            "are kept, in the same split."
        )
    trained = {row.prompt for row in parts[0]}
    asked_again = sum(row.prompt in trained for part in parts[1:] for row in part)
    if asked_again:
        yield (
            f"{asked_again} held-out rows have the prompt of a training row, with another answer: losses "
            "there may look better than they are. If these prompts are questions rather than one "
            "instruction to all, leave such rows out, or name a column that they have in common in "
            "data.group."
        )


def _group_note(splits: Splits, column: str) -> str:
    """Say how many rows of how many groups each split has."""
    parts = [
        f"{name} {len(rows)} rows of {len(set(row_clusters(rows)))}"
        for name, rows in zip(Splits._fields, splits, strict=True)
    ]
    return f"rows with the same {column} stay together; rows and groups: {', '.join(parts)}."


def _batches(examples: Iterator[_Read]) -> Iterator[list[_Read]]:
    batch: list[_Read] = []
    characters = 0
    for read in examples:
        batch.append(read)
        characters += _num_characters(read.example)
        if len(batch) == _BATCH_ROWS or characters > _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _num_characters(example: Example) -> int:
    if isinstance(example, PlainText):
        return len(example.text)
    return sum(len(message.content) for message in example.messages)


def _too_many_faults(source: _Source, limit: float) -> str:
    reasons = ", ".join(f"{n} {reason}" for reason, n in source.faults.most_common())
    return "\n  ".join(
        [
            f"{source.name}: {source.num_bad} of {source.num_read} rows are bad ({reasons}); "
            f"data.max_bad_fraction allows {limit:.3g} of them. The first:",
            *source.first_faults,
            "Mend these rows, or raise data.max_bad_fraction to leave them out.",
        ]
    )


def _no_labels(
    source: _Source,
    example: EncodedRow,
    data: DataSection,
    tokenizer: PreTrainedTokenizerBase | None,
) -> str:
    if example.full_length > data.max_length:
        why = (
            f"rows are cut to data.max_length = {data.max_length} tokens before the text that "
            f"carries loss begins (this one has {example.full_length}). Raise data.max_length."
        )
    else:
        why = (
            f"with data.train_on = {data.train_on!r} nothing of it carries loss: the chat template "
            "leaves the assistant's text out, or the row is a single token."
        )
    row = "" if tokenizer is None else repr(decode_row(example.row, tokenizer))
    text = f"\n  {brief(row, _SHOWN_ROW)}" if row else ""
    return f"{source.name}: none of {source.num_read} rows has a token to learn; {why}{text}"


def _fingerprint(splits: Splits, loaded: list[_Source], chat_template: str) -> DataFingerprint:
    digest = hashlib.sha256()
    for split in splits:
        digest.update(array("q", [len(split)]).tobytes())
        for row in split:
            _update(digest, row)
    return DataFingerprint(
        source=" + ".join(source.name for source in loaded),
        format=", ".join(dict.fromkeys(source.format for source in loaded)),
        sha256=digest.hexdigest(),
        num_train=len(splits.train),
        num_selection=len(splits.selection),
        num_confirmation=len(splits.confirmation),
        num_train_tokens=sum(len(row.input_ids) for row in splits.train),
        num_train_labels=sum(row.num_labels for row in splits.train),
        num_bad_rows=sum(source.num_bad for source in loaded),
        num_duplicates=sum(source.num_duplicates for source in loaded),
        num_unlabelled=sum(source.num_unlabelled for source in loaded),
        num_truncated=sum(source.num_truncated for source in loaded),
        max_tokens=max(len(row.input_ids) for split in splits for row in split),
        chat_template=chat_template,
    )


def _update(digest: "hashlib._Hash", row: TokenizedRow) -> None:
    digest.update(array("q", [len(row.input_ids)]).tobytes())
    digest.update(array("q", row.input_ids).tobytes())
    digest.update(array("q", row.labels).tobytes())
    if row.group:  # rows without groups keep the hash that they always had
        digest.update(row.group.encode("utf-8", "surrogatepass"))
