"""The process that writes a study's rows: ``python -m lora_tune.export.row_writer``.

Its one argument is a ``RowRequest`` as JSON; its answer on standard output is a ``TrainingRows``. It reads
the rows as the study did and checks by their fingerprint that they are the same.
"""

import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from lora_tune.data.chat import choose_template
from lora_tune.data.encode import EncodedRow, RowEncoder
from lora_tune.data.formats import Conversation, Example, PlainText
from lora_tune.data.prepare import prepare_with
from lora_tune.data.reading import RowError
from lora_tune.data.tokenizer import local_tokenizer
from lora_tune.engine.convert import converted_folder
from lora_tune.errors import LoraTuneError
from lora_tune.export.training_rows import (
    CONFIRMATION_FILE,
    TEMPLATE_FILE,
    TRAIN_FILE,
    RowRequest,
    TrainingRows,
)
from lora_tune.files import write_text
from lora_tune.hub import find_model
from lora_tune.records import PreparedData, StudyLock, TokenizedRow
from lora_tune.store.folder import StudyFolder
from lora_tune.store.origin import spec_of
from lora_tune.study.spec import DataSection

_Tokens = tuple[tuple[int, ...], tuple[int, ...]]


class RememberingEncoder:
    """The study's encoder, which also remembers the text that each row of tokens came from."""

    def __init__(self, encoder: RowEncoder) -> None:
        self.encoder = encoder
        self.examples: dict[_Tokens, Example] = {}

    @property
    def notes(self) -> Sequence[str]:
        """As of the study's encoder."""
        return self.encoder.notes

    @property
    def chat_template(self) -> str:
        """As of the study's encoder."""
        return self.encoder.chat_template

    def encode(self, examples: Sequence[Example]) -> list[EncodedRow | RowError]:
        """Encode examples together, in order."""
        found = self.encoder.encode(examples)
        for example, encoded in zip(examples, found, strict=True):
            if isinstance(encoded, EncodedRow):
                row = encoded.row
                self.examples.setdefault((row.input_ids, row.labels), example)
        return found

    def example_of(self, row: TokenizedRow) -> Example:
        """Return the text of a row."""
        return self.examples[row.input_ids, row.labels]


def write(request: RowRequest) -> TrainingRows:
    """Write the files and say what is in them.

    Raises:
        LoraTuneError: Study or rows cannot be read.
    """
    snapshot = StudyFolder(Path(request.study)).snapshot()
    lock, spec = snapshot.lock, spec_of(snapshot)
    data = spec.data
    base_dir = Path(request.base_dir)
    tokenizer = local_tokenizer(
        lock.model.base, revision=lock.model.revision, base_dir=base_dir
    ) or _hub_tokenizer(lock)
    if tokenizer is None:
        return TrainingRows(reason=f"the tokenizer of {lock.model.base} is not on this machine")
    encoder = RememberingEncoder(RowEncoder(data, tokenizer=tokenizer, base_dir=base_dir))
    prepared = prepare_with(
        encoder, data, tokenizer=tokenizer, seed=spec.study.seed, base_dir=base_dir
    )
    if prepared.fingerprint.sha256 != lock.data.sha256:
        return TrainingRows(reason=f"the rows of {data.train} are not those of the study any more")
    found = _write_files(request, data, prepared, encoder, tokenizer)
    gguf = _own_gguf(lock, base_dir)
    return replace(found, base_folder=str(converted_folder(gguf))) if gguf else found


def _own_gguf(lock: StudyLock, base_dir: Path) -> Path | None:
    """Return the base where it is a GGUF file that no hub id stands for: other programs need a folder."""
    if lock.model.hub_id is not None:
        return None
    return find_model(lock.model.base, revision=None, base_dir=base_dir).gguf


def _hub_tokenizer(lock: StudyLock) -> PreTrainedTokenizerBase | None:
    if lock.model.hub_id is None:
        return None
    return local_tokenizer(lock.model.hub_id, revision=lock.model.revision, base_dir=Path.cwd())


def _write_files(
    request: RowRequest,
    data: DataSection,
    prepared: PreparedData,
    encoder: RememberingEncoder,
    tokenizer: PreTrainedTokenizerBase,
) -> TrainingRows:
    folder = Path(request.folder)
    splits = {TRAIN_FILE: prepared.train}
    if request.tokens:
        splits[CONFIRMATION_FILE] = prepared.confirmation
    examples = [encoder.example_of(row) for row in prepared.train]
    chats = [example for example in examples if isinstance(example, Conversation)]
    last_only = data.train_on == "last-assistant"
    loss = _loss_kind(chats, last_only=last_only)
    for name, rows in splits.items():
        lines = _lines(
            rows,
            encoder,
            tokens=request.tokens,
            last_only=last_only,
            marked=loss != "all" and not request.tokens,
        )
        # As they are: what looks like a token in a row is data, which training elsewhere has to see too.
        with (folder / name).open("w", encoding="utf-8") as stream:
            stream.writelines(lines)
    files, notes, template = [*splits], [], None
    if chats and data.chat_template is not None:
        chosen = choose_template(
            data.chat_template, tokenizer=tokenizer, base_dir=Path(request.base_dir)
        )
        write_text(folder / TEMPLATE_FILE, chosen.text)
        template = TEMPLATE_FILE
        files.append(TEMPLATE_FILE)
    text = tokenizer.chat_template if template is None else (folder / template).read_text("utf-8")
    if chats and isinstance(text, str) and "strftime_now" in text and not request.tokens:
        notes.append("the chat template writes today's date, where the study had one fixed date.")
    if 0 < len(chats) < len(examples):
        notes.append(f"{len(examples) - len(chats)} rows are plain text and are left out.")
    return TrainingRows(
        files=tuple(files),
        is_text=not chats,
        loss=loss,
        template=template,
        not_alternating=sum(not _alternates(chat) for chat in chats),
        notes=tuple(notes),
    )


def _lines(
    rows: Iterable[TokenizedRow],
    encoder: RememberingEncoder,
    *,
    tokens: bool,
    last_only: bool,
    marked: bool,
) -> Iterator[str]:
    """Yield a row a line: its text, and its tokens or which of its turns carry loss."""
    for row in rows:
        example = encoder.example_of(row)
        value: dict[str, object] = {}
        if isinstance(example, PlainText):
            value["text"] = example.text
        else:
            value["messages"] = turns = [message._asdict() for message in example.messages]
            if marked:
                wanted = _loss_turns(example, last_only=last_only)
                for number, turn in enumerate(turns):
                    turn["train"] = number in wanted
        if tokens:
            value |= {"input_ids": row.input_ids, "labels": row.labels}
        yield json.dumps(value) + "\n"


def _loss_kind(chats: Sequence[Conversation], *, last_only: bool) -> str:
    """Return which assistant turns carry loss in every conversation."""
    wanted = [_loss_turns(chat, last_only=last_only) for chat in chats]
    answers = [_loss_turns(chat, last_only=False, start=0) for chat in chats]
    if wanted == answers:
        return "all"
    ends = [[len(chat.messages) - 1] for chat in chats]
    return "last" if wanted == ends else "mixed"


def _loss_turns(chat: Conversation, *, last_only: bool, start: int | None = None) -> list[int]:
    first = chat.loss_from if start is None else start
    turns = [i for i, m in enumerate(chat.messages) if m.role == "assistant" and i >= first]
    return turns[-1:] if last_only else turns


def _alternates(chat: Conversation) -> bool:
    roles = [message.role for message in chat.messages]
    roles = roles[1:] if roles[:1] == ["system"] else roles
    return roles == ["user", "assistant"] * (len(roles) // 2)


def main() -> None:
    """Answer the request in the first argument; an error that the user can mend is a reason."""
    # Whatever a library prints must not end up in the answer.
    answer = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    try:
        found = write(RowRequest(**json.loads(sys.argv[1])))
    except LoraTuneError as error:
        found = TrainingRows(reason=" ".join(str(error).split()))
    answer.write(json.dumps(asdict(found)))
    answer.close()


if __name__ == "__main__":
    main()
