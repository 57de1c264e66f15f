"""What a whole study writes of its answers: by the shipped adapter, once, and never at the study's expense.

The witness is plain PEFT on the adapter folder: transformers' ``generate`` one prompt at a time, and the
model's own logits with torch's cross entropy.
"""

import contextlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from test_end_to_end import WORDS, copy_of
from test_end_to_end import workplace as workplace  # the fixture
from test_going_on import run

from lora_tune.data import prepare_data
from lora_tune.executors.behaviour import subjects_of
from lora_tune.records import UNTUNED, Behaviour, PreparedData, ProgressState, StudySnapshot
from lora_tune.report.behaviour import summarize_behaviour
from lora_tune.store.folder import StudyFolder
from lora_tune.study.loader import load_study

GENERAL_TEXT = (
    Path(__file__).parents[2].joinpath("lora_tune", "data", "general_text.txt").read_text()
)


class Listening:
    """A view that keeps the notes, and does something at the first that contains ``words``."""

    def __init__(self, words: str = "", then: Any = None) -> None:
        self.words, self.then = words, then
        self.notes: list[str] = []

    def update(self, state: ProgressState) -> None:
        pass

    def note(self, text: str) -> None:
        self.notes.append(text)
        if self.then is not None and self.words in text:
            self.then()


def interrupt() -> None:
    raise KeyboardInterrupt


BEFORE, AFTER = "answers to held-out prompts", "that took"


@pytest.fixture(scope="module")
def finished(workplace: Path, tmp_path_factory: pytest.TempPathFactory) -> StudySnapshot:
    return run(copy_of(workplace, tmp_path_factory.mktemp("behaviour") / "run"))


def behaviour_of(snapshot: StudySnapshot) -> Behaviour:
    assert snapshot.behaviour is not None
    return snapshot.behaviour


def parts_of(snapshot: StudySnapshot) -> tuple[Any, PreparedData, Any]:
    """Return the tokenizer, the data and plain PEFT's model of the shipped adapter."""
    folder = snapshot.folder.parent.parent
    with contextlib.chdir(folder):
        spec = load_study(Path("going.toml"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "model")
    data = prepare_data(spec.data, tokenizer=tokenizer, seed=spec.study.seed, base_dir=folder)
    base = transformers.AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    return tokenizer, data, peft.PeftModel.from_pretrained(base, snapshot.folder / "adapter").eval()


def test_five_prompts_are_answered_by_base_default_and_chosen(finished: StudySnapshot) -> None:
    found, confirmation = behaviour_of(finished), finished.confirmation
    assert confirmation is not None
    assert confirmation.decision is not None
    chosen = confirmation.decision.chosen
    assert (found.chosen, found.default, found.reason) == (chosen, "default", "")
    assert chosen != "default"
    seeds = {score.candidate: score.median_seed for score in confirmation.decision.scores}
    assert (found.chosen_seed, found.default_seed) == (seeds[chosen], seeds["default"])
    assert len(found.samples) == 5
    for sample in found.samples:
        assert [answer.subject for answer in sample.answers] == [UNTUNED, "default", chosen]
        assert all(answer.ended == (answer.num_tokens < 64) for answer in sample.answers)
        assert sample.prompt.startswith("<user>")  # as a person reads it, without special tokens
        assert "</s>" not in sample.prompt
    assert found.max_new_tokens == 64
    assert [row.subject for row in found.general_losses] == [UNTUNED, "default", chosen]
    assert len({sample.row for sample in found.samples}) == 5


@torch.no_grad()
def test_answers_and_general_loss_are_those_of_the_shipped_adapter(finished: StudySnapshot) -> None:
    found = behaviour_of(finished)
    tokenizer, data, model = parts_of(finished)
    answers = set()
    for sample in found.samples:
        row = data.confirmation[sample.row]
        length = next(i for i, label in enumerate(row.labels) if label != -100)
        ids = torch.tensor([row.input_ids[:length]])
        written = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=64,
            eos_token_id=1,
            pad_token_id=1,
        )[0, length:]
        shipped = sample.answers[-1]
        assert shipped.text == tokenizer.decode(written, skip_special_tokens=True)
        assert shipped.text != sample.answers[0].text  # the adapter does something
        assert sample.reference == tokenizer.decode(row.input_ids[length:-1])
        answers.add(shipped.text)
    assert len(answers) > 1
    ids_of_text = tokenizer(GENERAL_TEXT, add_special_tokens=False)["input_ids"]
    total = count = 0.0
    for start in range(0, len(ids_of_text), 64):
        part = torch.tensor(ids_of_text[start : start + 64])
        logits = model(input_ids=part[None]).logits[0, :-1]
        total += float(torch.nn.functional.cross_entropy(logits, part[1:], reduction="sum"))
        count += len(part) - 1
    assert found.general_tokens == count
    assert found.general_losses[-1].loss == pytest.approx(total / count, rel=1e-5)


def test_a_default_without_a_complete_run_does_not_answer(finished: StudySnapshot) -> None:
    confirmation = finished.confirmation
    assert confirmation is not None
    decision = confirmation.decision
    assert decision is not None
    runs = finished.folder / "confirmation"
    names = [subject.name for subject in subjects_of(confirmation, runs)]
    assert names == [UNTUNED, "default", decision.chosen]
    left = tuple(score for score in decision.scores if score.candidate != "default")
    failed = replace(confirmation, decision=replace(decision, scores=left, failed=("default",)))
    assert [subject.name for subject in subjects_of(failed, runs)] == [names[0], names[2]]
    itself = replace(confirmation, decision=replace(decision, chosen="default"))
    assert [subject.name for subject in subjects_of(itself, runs)] == names[:2]


def test_its_time_is_told_and_counted(workplace: Path, tmp_path: Path) -> None:
    view, seconds = Listening(), []

    def look() -> None:
        seconds.append(json.loads((path / "runtime.json").read_text())["wall_s"])

    folder = copy_of(workplace, tmp_path / "run")
    path = folder / "reports" / "going"
    view.words, view.then = AFTER, look
    snapshot = run(folder, view)
    [said] = [note for note in view.notes if note.startswith(BEFORE)]
    assert "untuned base, default, trial" in said
    assert sum(note.startswith(AFTER) for note in view.notes) == 1
    last = max(run.span.ended_s for run in snapshot.confirmation.runs)
    assert last < seconds[0] <= snapshot.wall_s


@pytest.mark.parametrize("where", [BEFORE, AFTER])
def test_a_study_stopped_around_its_answers_ends_as_one_that_was_not(
    workplace: Path, finished: StudySnapshot, tmp_path: Path, where: str
) -> None:
    folder = copy_of(workplace, tmp_path / "run")
    path = folder / "reports" / "going" / "behaviour.json"
    with pytest.raises(KeyboardInterrupt):
        run(folder, Listening(where, interrupt))
    assert path.exists() == (where == AFTER)
    assert not (path.parent / "adapter").exists()
    before = path.stat() if path.exists() else None
    view = Listening()
    again = run(folder, view)
    assert behaviour_of(again) == behaviour_of(finished)
    assert any(note.startswith(BEFORE) for note in view.notes) == (where == BEFORE)
    assert before is None or path.stat().st_ino == before.st_ino
    assert (path.parent / "adapter").exists()


def test_another_decision_gets_other_answers(finished: StudySnapshot, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished.folder.parent.parent, folder)
    more = run(folder, trials="8")
    assert more.confirmation is not None
    assert more.confirmation.decision is not None
    chosen = more.confirmation.decision.chosen
    assert chosen != behaviour_of(finished).chosen  # what this test rests on
    assert behaviour_of(more).chosen == chosen
    assert behaviour_of(more).samples[0].answers[-1].subject == chosen


@pytest.mark.parametrize("whose", ["chosen_seed", "default_seed"])
def test_answers_of_an_adapter_of_another_seed_are_written_anew_and_not_shown_before(
    finished: StudySnapshot, tmp_path: Path, whose: str
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished.folder.parent.parent, folder)
    store = StudyFolder(folder / "reports" / "going")
    found = behaviour_of(finished)
    store.save_behaviour(replace(found, **{whose: 1 - getattr(found, whose), "samples": ()}))
    if whose == "chosen_seed":
        assert summarize_behaviour(store.snapshot()) is None
    shutil.rmtree(store.path / "adapter")  # so that there is something left to do
    assert behaviour_of(run(folder)) == found


def test_no_samples_no_look_at_answers(workplace: Path, tmp_path: Path) -> None:
    folder = copy_of(workplace, tmp_path / "run")
    view = Listening()
    snapshot = run(folder, view, seeds="2\nsamples = 0")
    assert snapshot.behaviour is None
    assert summarize_behaviour(snapshot) is None
    assert not any(note.startswith(BEFORE) for note in view.notes)
    assert snapshot.adapter_bytes > 0


def test_rows_of_plain_text_have_no_prompts_but_a_general_loss(
    workplace: Path, tmp_path: Path
) -> None:
    folder = copy_of(workplace, tmp_path / "run")
    (folder / "rows.jsonl").unlink()
    texts = [" ".join(WORDS[(i * 7 + k * (1 + i % 5)) % 16] for k in range(9)) for i in range(160)]
    rows = [json.dumps({"text": f"{text} {WORDS[i % 16]}"}) for i, text in enumerate(texts)]
    (folder / "rows.jsonl").write_text("\n".join(rows))
    snapshot = run(folder)
    found = behaviour_of(snapshot)
    assert found.samples == ()
    assert found.reason.startswith("no answers to prompts: no held-out row has a prompt")
    assert len(found.general_losses) == 3
    assert snapshot.adapter_bytes > 0


def test_a_model_that_cannot_write_leaves_the_study_finished_with_a_reason(
    workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise NotImplementedError("this cache is not supported")

    monkeypatch.setattr(transformers.LlamaForCausalLM, "generate", refuse)
    view = Listening()
    snapshot = run(copy_of(workplace, tmp_path / "run"), view)
    found = behaviour_of(snapshot)
    assert found.samples == ()
    assert found.reason == (
        "no answers to prompts: NotImplementedError: this cache is not supported"
    )
    assert len(found.general_losses) == 3
    assert snapshot.adapter_bytes > 0
    assert any("something is missing: no answers to prompts" in note for note in view.notes)
    summary = summarize_behaviour(snapshot)
    assert summary is not None
    assert (summary.samples, summary.collapsed, summary.reason) == ((), (), found.reason)


def test_a_damaged_adapter_of_the_default_is_a_reason_and_no_more(
    workplace: Path, tmp_path: Path
) -> None:
    folder = copy_of(workplace, tmp_path / "run")

    def damage() -> None:
        for path in folder.glob("reports/going/confirmation/default-*/adapter_model.safetensors"):
            path.write_bytes(path.read_bytes()[:-1] + b"\x07")

    snapshot = run(folder, Listening(BEFORE, damage))
    found = behaviour_of(snapshot)
    assert (found.samples, found.general_losses) == ((), ())
    assert found.reason.count("missing or damaged") == 2
    assert "default-seed-" in found.reason
    assert snapshot.adapter_bytes > 0


def test_after_a_refit_the_answers_are_those_of_the_scored_adapter(
    workplace: Path, finished: StudySnapshot, tmp_path: Path
) -> None:
    folder = copy_of(workplace, tmp_path / "run")
    snapshot = run(folder, seeds='2\nrefit = "all-rows"')
    assert behaviour_of(snapshot).samples == behaviour_of(finished).samples
    summary = summarize_behaviour(snapshot)
    assert summary is not None
    assert "trained once more on all rows" in summary.sentences[-1]
