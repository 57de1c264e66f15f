"""``lora-tune verify`` on studies of a tiny Llama, run to their end in this process.

Packed training against plain PEFT in a fresh process, in NF4 and unquantized; faults planted in the
record; the verdict's rule by values; and bad input, which ends with one message and writes nothing.
"""

import contextlib
import io
import json
import shutil
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from rich.console import Console
from test_end_to_end import STUDY, copy_of, lora_tune
from test_end_to_end import workplace as workplace  # the fixture

from lora_tune.errors import DataError, MachineError, ModelError, StoreError
from lora_tune.records import ProgressState, TrialRecord, TrialState
from lora_tune.report.verify import (
    LossPair,
    StepLosses,
    Verification,
    VerifyView,
    print_verification,
    verdict,
    verification_json,
)
from lora_tune.store.folder import StudyFolder
from lora_tune.store.origin import base_dir_of, spec_of
from lora_tune.study.loader import load_study
from lora_tune.verification.compare import compare
from lora_tune.verification.process import PlainRequest, run_plainly
from lora_tune.verification.task import verify_task

WINNER_STEPS = 12


class Quiet:
    """A view that shows nothing."""

    def update(self, state: ProgressState) -> None:
        pass

    def note(self, text: str) -> None:
        pass


@pytest.fixture(scope="module")
def finished(workplace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the studies ``nf4`` and ``plain`` were run to their end."""
    from lora_tune.tuner import run_study

    folder = copy_of(workplace, tmp_path_factory.mktemp("finished") / "run")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name, quantization in (("nf4", "nf4"), ("plain", "none")):
            file = Path(f"{name}.toml")
            file.unlink()  # the link
            text = STUDY.format(quantization=quantization).replace("trials = 8", "trials = 4")
            file.write_text(text)
            run_study(load_study(file), study_file=file, command="lora-tune run", view=Quiet())
    return folder


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished studies that a test may damage."""
    shutil.copytree(finished, tmp_path / "copy", symlinks=True)
    return tmp_path / "copy"


def winner_of(store: StudyFolder) -> TrialRecord:
    confirmation = store.load_confirmation()
    assert confirmation is not None
    assert confirmation.decision is not None
    trial = confirmation.candidate(confirmation.decision.chosen).trial
    assert trial is not None
    return store.load_trials()[trial]


def contents(folder: Path) -> dict[str, float]:
    return {str(path): path.stat().st_mtime for path in sorted(folder.rglob("*"))}


def verified_here(store: StudyFolder, *, seeds: int = 0) -> Verification:
    """Do in this process what the command does in a fresh one, which takes seconds to start."""
    from lora_tune.verification.plain import train_plainly

    task = verify_task(store.snapshot(), None)
    return compare(task, train_plainly(task, num_seeds=seeds, emit=lambda event, values: None))


def test_a_packed_nf4_trial_gives_what_plain_peft_gives(finished, tmp_path) -> None:
    before = contents(finished)
    # from another folder: the study is found by its path, its rows and base by the study file's place
    done = lora_tune("verify", str(finished / "reports" / "nf4"), "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    record = winner_of(StudyFolder(finished / "reports" / "nf4"))
    assert (found["trial"], found["rung"], found["steps"]) == (record.number, 1, WINNER_STEPS)
    assert found["most_lanes"] == 2
    evaluation = found["evaluation"]
    assert evaluation["packed"] == record.rungs[1].eval_loss
    # float32 sums in another order, over 12 steps
    assert evaluation["relative_difference"] < 1e-4
    assert evaluation["largest_row_difference"] < 1e-4
    assert found["adapter"]["relative_difference"] < 1e-5
    training = found["training"]
    assert training["largest_relative_difference"] < 1e-4
    # rung 0 cooled down in its last step; the winner came along without that
    assert training["steps"] == list(range(1, WINNER_STEPS + 1))
    assert training["packed"][5] == record.rungs[1].points[0].train_loss
    losses = found["seed_noise"]["losses"]
    assert losses[0] == evaluation["plain"]
    assert len(set(losses)) == 3
    assert found["seed_noise"]["value"] == pytest.approx(statistics.stdev(losses))
    assert found["agrees"]
    assert found["verdict"].startswith("agrees: ")
    assert "plain run 3 of 3 (other seeds): evaluation loss" in done.stderr
    assert contents(finished) == before
    assert list(tmp_path.iterdir()) == []


def test_a_packed_trial_on_an_unquantized_base_gives_what_plain_peft_gives(
    finished, monkeypatch
) -> None:
    monkeypatch.chdir(finished)
    found = verified_here(StudyFolder(Path("reports/plain")), seeds=1)
    assert found.evaluation.relative < 1e-4
    assert found.adapter.relative < 1e-5
    assert found.widest_step is not None
    assert found.widest_step.pair.relative < 1e-4
    assert found.seed_noise == pytest.approx(
        abs(found.other_seed_losses[0] - found.evaluation.plain) / 2**0.5
    )
    assert found.agrees


def test_a_record_that_claims_another_alpha_is_noticed(copied) -> None:
    store = StudyFolder(copied / "reports" / "plain")
    record = winner_of(store)
    config = replace(record.config, lora_alpha=2 * record.config.lora_alpha)
    store.save_trial(replace(record, config=config))
    done = lora_tune("verify", "plain", "--seeds", "0", cwd=copied)
    assert done.returncode == 9, done.stderr
    words = " ".join(done.stdout.split())
    assert "Verdict: differs: the difference" in words
    assert (
        "more than float32 rounding (up to 0.1 % of the loss) explains. Seed noise was not" in words
    )
    assert "Traceback" not in done.stderr


def test_a_record_that_claims_a_better_loss_is_noticed(copied, monkeypatch) -> None:
    store = StudyFolder(copied / "reports" / "plain")
    record = winner_of(store)
    last = record.rungs[-1]
    sums = tuple(0.99 * loss for loss in last.evaluation.loss_sums)
    store.save_trial(
        replace(record, rungs=(*record.rungs[:-1], replace(last, eval_loss=0.99 * last.eval_loss)))
    )
    monkeypatch.chdir(copied)
    found = verified_here(store)
    assert not found.is_rounding
    assert found.adapter_agrees
    better = replace(last, evaluation=replace(last.evaluation, loss_sums=sums))
    store.save_trial(replace(record, rungs=(*record.rungs[:-1], better)))
    found = verified_here(store)
    assert found.is_rounding
    assert not found.adapter_agrees
    assert not found.agrees


def test_rows_that_changed_are_refused_by_the_fresh_process(copied) -> None:
    rows = (copied / "rows.jsonl").read_text()
    (copied / "rows.jsonl").unlink()  # the link
    (copied / "rows.jsonl").write_text(rows.replace("alpha", "omicron", 1))
    before = contents(copied)
    done = lora_tune("verify", "plain", cwd=copied)
    assert done.returncode == 3
    assert (
        "lora-tune: rows.jsonl: the rows differ from those that plain was trained on" in done.stderr
    )
    assert "Traceback" not in done.stderr
    assert contents(copied) == before


@pytest.mark.parametrize(
    ("gone", "error", "words"),
    [("rows.jsonl", DataError, "rows.jsonl"), ("model", ModelError, "model")],
)
def test_rows_or_a_base_that_are_gone_are_named(copied, monkeypatch, gone, error, words) -> None:
    from lora_tune.verification.plain import train_plainly

    (copied / gone).unlink()
    monkeypatch.chdir(copied)
    task = verify_task(StudyFolder(Path("reports/plain")).snapshot(), None)
    with pytest.raises(error, match=words):
        train_plainly(task, num_seeds=0, emit=lambda event, values: None)


class Killer:
    """A view that kills the process that it hears of."""

    def step(self, *, run: int, step: int, end_step: int, loss: float) -> None:
        for child in psutil.Process().children():
            # Its last words may be read after its death, when it has no command line any more.
            with contextlib.suppress(psutil.NoSuchProcess):
                if "lora_tune.verification.plain" in child.cmdline():
                    child.kill()

    def end(self, *, run: int, loss: float) -> None:
        raise AssertionError("the run went on")


def test_a_process_that_is_killed_is_reported_as_such(finished) -> None:
    request = PlainRequest(folder=str(finished / "reports" / "plain"), trial=0, num_seeds=500)
    with pytest.raises(MachineError, match="ended by SIGKILL"):
        run_plainly(request, Killer())


# What can be refused without torch.

HEAVY = """
import sys
from lora_tune import cli
sys.argv = ["lora-tune", *sys.argv[1:]]
try:
    cli.main()
finally:
    print("loaded:", [name for name in ("torch", "peft", "transformers") if name in sys.modules])
"""


def refused(*arguments: str, cwd: Path) -> str:
    """Run the command, which must end with exit code 4 before anything heavy is loaded."""
    before = contents(cwd)
    done = subprocess.run(
        [sys.executable, "-c", HEAVY, "verify", *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 4, done.stderr
    assert done.stdout.splitlines() == ["loaded: []"]
    assert "Traceback" not in done.stderr
    assert contents(cwd) == before
    return done.stderr


def test_a_study_that_does_not_exist_is_refused(tmp_path) -> None:
    assert '"nothing" is no started study' in refused("nothing", cwd=tmp_path)


def test_a_trial_that_does_not_exist_is_refused(finished) -> None:
    text = refused("nf4", "--trial", "99", cwd=finished)
    assert (
        "--trial is 99, but there is no such trial. Trials with a finished rung: 0, 1, 2, 3."
        in text
    )


@pytest.mark.parametrize(
    ("state", "reason", "words"),
    [
        (
            TrialState.DIVERGED,
            "loss nan at step 3",
            "diverged before it was evaluated (loss nan at",
        ),
        (TrialState.INFEASIBLE, "out of memory", "did not fit the memory (out of memory)"),
        (TrialState.FAILED, "a bug", "failed before it was evaluated (a bug)"),
        (TrialState.RUNNING, "", "has not finished a rung yet"),
    ],
)
def test_a_trial_without_an_evaluation_has_nothing_to_compare(copied, state, reason, words) -> None:
    store = StudyFolder(copied / "reports" / "nf4")
    store.save_trial(replace(store.load_trials()[1], state=state, reason=reason, rungs=()))
    with pytest.raises(StoreError) as error:
        verify_task(store.snapshot(), 1)
    assert f"trial 1 {words}" in str(error.value)
    assert "nothing to compare. Trials with a finished rung: 0, 2, 3." in str(error.value)


def test_an_unfinished_study_has_no_winner_but_its_trials_can_be_named(copied) -> None:
    (copied / "reports/nf4/confirmation.json").unlink()
    text = refused("nf4", cwd=copied)
    assert "the study nf4 is not finished, so it has no winner" in text
    assert "lora-tune run nf4.toml, or name a trial with --trial" in text
    assert verify_task(StudyFolder(copied / "reports/nf4").snapshot(), 2).record.number == 2


def test_a_damaged_adapter_is_refused_by_name(copied) -> None:
    store = StudyFolder(copied / "reports" / "nf4")
    folder = store.trial_folder(winner_of(store).number) / "rung-1"
    path = folder / "adapter_model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))
    assert "rung-1: missing or damaged" in refused("nf4", cwd=copied)


# The path of steps, and where the study file's paths begin.


def test_the_path_of_a_promoted_trial_leaves_out_the_lower_cool_down(finished) -> None:
    store = StudyFolder(finished / "reports" / "nf4")
    task = verify_task(store.snapshot(), None)
    job = task.job()
    # cooldown_ratio 0.2 of 6 and of 12 steps, rounded: 1 and 2 steps
    assert (task.hold_step(0), task.hold_step(1)) == (5, 10)
    assert (job.start_step, job.hold_step, job.end_step) == (0, 10, WINNER_STEPS)
    assert [point.step for point in task.record.rungs[0].points] == [1, 2, 3, 4, 5, 6]
    assert [point.step for point in task.points()] == list(range(1, WINNER_STEPS + 1))
    pruned = next(r.number for r in store.load_trials() if len(r.rungs) == 1)
    assert [p.step for p in verify_task(store.snapshot(), pruned).points()] == [1, 2, 3, 4, 5, 6]


def test_the_cost_counts_the_whole_path_for_every_run(finished) -> None:
    task = verify_task(StudyFolder(finished / "reports" / "nf4").snapshot(), None)
    seconds = sum(rung.wall_s for rung in task.record.rungs)
    # the pack trained 6 steps, then 7 from the state at step 5; a plain run has 12
    assert task.plain_seconds(3) == pytest.approx(3 * seconds * 12 / 13)


def test_paths_begin_where_the_study_was_started(finished, tmp_path, monkeypatch) -> None:
    snapshot = StudyFolder(finished / "reports" / "nf4").snapshot()
    spec = spec_of(snapshot)
    monkeypatch.chdir(tmp_path)
    assert base_dir_of(snapshot, spec) == finished
    monkeypatch.chdir(finished / "reports")
    assert base_dir_of(StudyFolder(Path("nf4")).snapshot(), spec) == finished
    moved = replace(snapshot, lock=replace(snapshot.lock, study_file="/elsewhere/nf4.toml"))
    assert base_dir_of(moved, spec) == Path("/elsewhere")


# The rule of the verdict, on values.


def verification(**changes: object) -> Verification:
    values: dict[str, object] = {
        "study": "words",
        "folder": Path("reports/words"),
        "trial": 3,
        "rung": 1,
        "num_steps": 12,
        "most_lanes": 4,
        "quantization": "nf4",
        "compute_dtype": "float32",
        "device": "cpu",
        "training": (StepLosses(1, 4.0, 4.0), StepLosses(2, 3.0, 3.003), StepLosses(3, 2.5, 2.5)),
        "evaluation": LossPair(2.0, 2.00002),
        "standard_error": 1e-5,
        "largest_row_difference": 4e-5,
        "num_rows": 16,
        "adapter": LossPair(2.0, 2.0),
        "other_seed_losses": (2.06002, 1.94002),
        "other_versions": {},
    }
    return Verification(**{**values, **changes})  # type: ignore[arg-type]


def test_seed_noise_is_the_standard_deviation_of_all_plain_runs() -> None:
    assert verification().seed_noise == pytest.approx(0.06)  # of 0, 0.06 and -0.06 around 2.00002
    assert verification(other_seed_losses=()).seed_noise is None
    assert verification(other_seed_losses=(float("nan"),)).seed_noise is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {},
            "agrees: the difference 2e-05 is 0.00033 of the seed noise 0.06, within float32 rounding",
        ),
        (
            {"evaluation": LossPair(2.05, 2.00002)},
            "agrees: the difference -0.05 is 0.83 of the seed noise 0.06, though more than float32",
        ),
        (
            {"evaluation": LossPair(2.1, 2.00002)},
            "differs: the difference -0.1 is 1.7 of the seed noise 0.06, more than float32 rounding "
            "(up to 0.1 % of the loss) explains.",
        ),
        (
            {"evaluation": LossPair(2.1, 2.00002), "other_seed_losses": ()},
            "differs: the difference -0.1 is 0.048 of the loss, more than float32 rounding (up to 0.1 % of "
            "the loss) explains. Seed noise was not measured; --seeds 2 tells",
        ),
        (
            {"evaluation": LossPair(2.1, 2.00002), "other_versions": {"torch": ("2.9", "2.13")}},
            "explains. The study ran with torch 2.9 (now 2.13).",
        ),
        (
            {
                "evaluation": LossPair(2.01, 2.0),
                "compute_dtype": "bfloat16",
                "other_seed_losses": (),
            },
            "agrees: the difference -0.01 is 0.005 of the loss, within bfloat16 rounding (up to 1 %",
        ),
        (
            {"adapter": LossPair(2.0, 2.3)},
            "differs: the stored adapter gives 2.300 by PEFT, the record",
        ),
        ({"evaluation": LossPair(2.0, float("nan"))}, "differs: the difference nan is"),
    ],
)
def test_the_verdict_follows_rounding_seed_noise_and_the_stored_adapter(changes, words) -> None:
    found = verification(**changes)
    assert words in verdict(found)
    assert found.agrees == verdict(found).startswith("agrees")


def test_the_json_has_no_nan() -> None:
    nan = float("nan")
    found = verification(evaluation=LossPair(2.0, nan), training=(StepLosses(1, 4.0, nan),))
    json.dumps(verification_json(found), allow_nan=False)


def test_the_table_shows_both_sides_and_the_widest_step() -> None:
    out = io.StringIO()
    print_verification(verification(), Console(file=out, width=100))
    lines = [" ".join(line.split()) for line in out.getvalue().splitlines()]
    assert "evaluation after training 2.000 2.000 1e-05" in lines
    assert "stored adapter 2.000 2.000 0" in lines
    assert "training, step 1 4.000 4.000 0" in lines
    assert "training, step 2 (widest) 3.000 3.003 0.001" in lines
    assert "up to 4 lanes a pack" in lines[0]
    assert "bfloat16 rounds" not in out.getvalue()
    print_verification(verification(compute_dtype="bfloat16"), Console(file=out, width=200))
    assert "bfloat16 rounds" in out.getvalue()


def test_progress_is_a_line_now_and_then_where_there_is_no_terminal() -> None:
    out, now = io.StringIO(), [0.0]
    with VerifyView(2, Console(file=out, width=100), clock=lambda: now[0]) as view:
        for second in range(1, 25):
            now[0] = float(second)
            view.step(run=0, step=second, end_step=24, loss=3.0)
        view.end(run=0, loss=2.5)
    assert out.getvalue().splitlines() == [
        "plain run 1 of 2 (the trial's own seeds): step 10/24, loss 3.000",
        "plain run 1 of 2 (the trial's own seeds): step 20/24, loss 3.000",
        "plain run 1 of 2 (the trial's own seeds): evaluation loss 2.500",
    ]
