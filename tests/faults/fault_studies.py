"""Small real studies for the tests of faults, the commands that run them, and the checks on what they leave.

The base is a one-layer Llama with random weights, so a whole study trains in seconds and a run costs little
beside its imports. What a study has left is read with ``json`` and ``sqlite3`` alone, not with the code that
is tested.
"""

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

FAULTS = Path(__file__).parent
CHILD = "lora_tune.executors.child"
# Optuna's names of a trial's states in its database that are no end.
NO_END = ("RUNNING", "WAITING")
# What a clock or the machine decides.
CHANGING = ("span", "wall_s", "peak_bytes", "pack_lanes")

WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta"]
TEMPLATE = "{% for m in messages %}<{{ m.role }}> {{ m.content }} </s> {% endfor %}"

STUDY = """
[model]
base = "model"
quantization = "none"
compute_dtype = "float32"
[data]
train = "rows.jsonl"
max_length = 32
selection_rows = 8
confirmation_rows = 8
[train]
max_steps = {steps}
effective_batch_size = 2
[space]
rank = [2, 4]
alpha_ratio = [1.0]
lora_dropout = [0.0, 0.1]
target_modules = ["attention"]
learning_rate = [1e-4, 1e-3]
[search]
trials = {trials}
sampler = "random"
anchors = ["A1"]
rungs = [0.5, 1.0]
min_rung_steps = 2
[select]
seeds = 1
finalists = 1
samples = 0
metrics = {metrics}
[run]
executor = "{executor}"
workers = {workers}
lanes = {lanes}
device = "cpu"
checkpoint_every = {checkpoint_every}
"""

SLOW_METRIC = """
import pathlib
import time


def score(prompt: str, reference: str, prediction: str) -> float:
    pathlib.Path(__file__).with_name("scoring").touch()
    time.sleep(0.1)
    return float(len(prediction))
"""


def write_study(
    folder: Path,
    *,
    steps: int = 12,
    trials: int = 4,
    executor: str = "process",
    workers: int = 1,
    lanes: int = 2,
    checkpoint_every: float = 0.2,
    slow_metric: bool = False,
) -> Path:
    """Write a base model, rows and a study file into a folder; return the study file.

    With ``slow_metric`` the study also asks for a metric of the user's own, which makes a file ``scoring``
    and takes its time, so that a test knows when a child is evaluating.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "model").exists():
        _write_model(folder / "model")
    rows = [
        {
            "messages": [
                {
                    "role": "user",
                    "content": f"{WORDS[i % 8]} {WORDS[i // 8 % 8]} {WORDS[i * 3 % 7]}",
                },
                {"role": "assistant", "content": f"{WORDS[i // 8 % 8]} {WORDS[i % 8]}"},
            ]
        }
        for i in range(64)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = folder / "study.toml"
    path.write_text(
        STUDY.format(
            steps=steps,
            trials=trials,
            executor=executor,
            workers=workers,
            lanes=lanes,
            checkpoint_every=checkpoint_every,
            metrics='["slow:score"]\nmax_new_tokens = 2' if slow_metric else "[]",
        )
    )
    (folder / "slow.py").write_text(SLOW_METRIC)
    return path


def _write_model(folder: Path) -> None:
    import tokenizers
    import torch
    import transformers

    words = ["<unk>", "</s>", "<user>", "<assistant>", *WORDS]
    core = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    )
    core.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", eos_token="</s>", pad_token="</s>"
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        eos_token_id=1,
        initializer_range=0.1,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)


TOLERANCE = 1e-4  # of losses: a pack that was cut elsewhere sums in another order
LONG = {"steps": 240, "trials": 3}  # trains for some seconds


class RealStudies:
    """Real studies on one base model in a folder, and the same ones undisturbed, to compare with.

    Two of these on the same folder share what is in it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not (folder / "base").exists():
            write_study(folder / "base")

    def make(self, folder: Path, **keys: Any) -> Path:
        """Write a study named after its folder, on the base model; return the folder."""
        folder.mkdir(parents=True)
        (folder / "model").symlink_to(self.folder / "base" / "model")
        path = write_study(folder, **keys)
        path.write_text(f'study.name = "{folder.name}"\n' + path.read_text())
        return folder

    def reference(self, **keys: Any) -> Path:
        """Return the results of such a study that trained in one process and was left alone."""
        name = "-".join(["undisturbed", *(f"{key}-{value}" for key, value in keys.items())])
        folder = self.folder / name
        if not folder.exists():
            self.make(folder, **{**keys, "executor": "in-process"})
            code, said = finish(lora_tune_run(folder), within_s=300)
            assert code == 0, said
        return results_of(folder)

    def go_on(self, folder: Path, **keys: Any) -> Counter[str]:
        """Give the command of a study again; it has to end as one that was left alone."""
        code, said = finish(lora_tune_run(folder), within_s=300)
        assert code == 0, said
        reference = self.reference(**keys)
        return check_whole(results_of(folder), reference=reference, tolerance=TOLERANCE)


def results_of(folder: Path) -> Path:
    """Return where a real study's results are."""
    return folder / "reports" / folder.name


def trains(folder: Path) -> bool:
    """Return whether a lane of a real study has a state of its own, as it has while it trains."""
    return bool(lane_states(folder))


def wait_while_it_trains(folder: Path, *, at_most_s: float) -> None:
    """Wait, but no longer than until the first trial has a result: more training is then to come for sure."""
    records = (results_of(folder) / "trials").glob
    wait_until(
        lambda: any(json.loads(path.read_text())["rungs"] for path in records("*/trial.json")),
        within_s=at_most_s,
    )


def lane_states(folder: Path) -> list[Path]:
    """Return the states of lanes on their way."""
    return list((results_of(folder) / "trials").glob("*/state-*"))


def environment(**changes: str) -> dict[str, str]:
    """Return the environment of programs that tests start: no hub, one thread, the tests' modules."""
    path = f"{FAULTS}:{FAULTS.parent / 'search'}"
    own = {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return {**os.environ, **own, "PYTHON": sys.executable, **changes}


def start(*command: str | Path, cwd: Path) -> subprocess.Popen[str]:
    """Start a program in a session of its own, as a terminal or a batch system would."""
    return subprocess.Popen(
        [sys.executable, *map(str, command)],
        cwd=cwd,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def lora_tune_run(folder: Path) -> subprocess.Popen[str]:
    """Start ``lora-tune run study.toml`` in a folder."""
    return start("-m", "lora_tune.cli", "run", "study.toml", "--allow-code", "--quiet", cwd=folder)


def finish(process: subprocess.Popen[str], *, within_s: float = 120.0) -> tuple[int, str]:
    """Wait for a program; return its exit code and all that it said."""
    try:
        said, _ = process.communicate(timeout=within_s)
    except subprocess.TimeoutExpired:
        end_all(process)
        raise
    return process.returncode, said


def end_all(process: subprocess.Popen[str]) -> None:
    """Kill a program that a test started, and its children."""
    for member in [*family(process.pid), process.pid]:
        kill(member)
    process.communicate()


def kill(pid: int, number: int = signal.SIGKILL) -> None:
    """Send a signal, if the process is still there."""
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def family(pid: int) -> list[int]:
    """Return the processes below this one that are alive."""
    try:
        below = psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []
    return [process.pid for process in below if is_alive(process.pid)]


def workers_of(pid: int) -> list[int]:
    """Return the training children of a coordinator."""
    return [member for member in family(pid) if CHILD in _command_line(member)]


def _command_line(pid: int) -> list[str]:
    try:
        return psutil.Process(pid).cmdline()
    except psutil.Error:
        return []


def is_alive(pid: int) -> bool:
    """Return whether a process is there and not merely waiting to be asked how it ended."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_until(condition: Callable[[], object], *, within_s: float, every_s: float = 0.002) -> bool:
    """Return whether something became true in time."""
    deadline = time.monotonic() + within_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(every_s)
    return True


def trial_table(study: Path) -> list[dict[str, Any]]:
    """Return the study's trials as their files say, without what a clock or the machine decides."""
    paths = sorted((study / "trials").glob("*/trial.json"))
    return [_steady(json.loads(path.read_text())) for path in paths]


def _steady(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _steady(item) for key, item in value.items() if key not in CHANGING}
    return [_steady(item) for item in value] if isinstance(value, list) else value


def optuna_table(study: Path) -> list[tuple[Any, ...]]:
    """Return number, state, parameters and values of all trials in the study's database."""
    database = sqlite3.connect(f"file:{study / 'study.db'}?mode=ro", uri=True)
    try:
        trials = database.execute("SELECT trial_id, number, state FROM trials ORDER BY trial_id")
        return [
            (
                number,
                state,
                sorted(_rows_of(database, "param_name, param_value FROM trial_params", trial)),
                sorted(_rows_of(database, "value FROM trial_values", trial)),
            )
            for trial, number, state in trials.fetchall()
        ]
    finally:
        database.close()


def _rows_of(database: sqlite3.Connection, what: str, trial: int) -> list[tuple[Any, ...]]:
    return database.execute(f"SELECT {what} WHERE trial_id = ?", (trial,)).fetchall()


def leftovers(study: Path) -> list[str]:
    """Return what has no place in a study that has ended: unfinished files, and lane states."""
    return [
        str(path.relative_to(study))
        for path in study.rglob("*")
        if path.name.startswith((".", "state-")) or path.name.endswith(".state")
    ]


def check_whole(study: Path, *, reference: Path, tolerance: float = 0.0) -> Counter[str]:
    """Check that nothing is lost, doubled, left open or left over, and that the study is the reference's.

    Args:
        study: The folder of a study that was disturbed and then ended.
        reference: That of the same study, undisturbed.
        tolerance: Of losses, relative; 0: they are equal to the last bit.

    Returns:
        How many trials were lost, doubled and left running, for the campaign's table.
    """
    trials, expected = trial_table(study), trial_table(reference)
    told, expected_told = optuna_table(study), optuna_table(reference)
    found = _census(trials, expected)
    found.update(_census(told, expected_told))  # unlike a sum this keeps the zeros
    assert not +found, found
    left = leftovers(study)
    assert not left, left
    check_equal(trials, expected, tolerance)
    check_equal(told, expected_told, tolerance)
    return found


def _census(found: Sequence[Any], expected: Sequence[Any]) -> Counter[str]:
    """Count what happened to trials, of the records or of the database."""
    numbers = Counter(_number_and_state(trial)[0] for trial in found)
    wanted = {_number_and_state(trial)[0] for trial in expected}
    census = Counter(
        trials_lost=len(wanted - numbers.keys()),
        trials_doubled=numbers.total() - len(numbers),
        trials_left_running=sum(_number_and_state(t)[1].upper() in NO_END for t in found),
    )
    census["trials_too_many"] = len(numbers.keys() - wanted)
    return census


def _number_and_state(trial: Any) -> tuple[int, str]:
    return (trial["number"], trial["state"]) if isinstance(trial, dict) else (trial[0], trial[1])


def check_equal(found: Any, expected: Any, tolerance: float, place: str = "table") -> None:
    """Check that two trees of values are the same, numbers to a relative tolerance."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), place
        for key in expected:
            check_equal(found[key], expected[key], tolerance, f"{place}.{key}")
    elif isinstance(expected, Sequence) and not isinstance(expected, str):
        assert len(found) == len(expected), place
        for number, (one, other) in enumerate(zip(found, expected, strict=True)):
            check_equal(one, other, tolerance, f"{place}[{number}]")
    elif isinstance(expected, float) and tolerance:
        assert abs(found - expected) <= tolerance * max(1.0, abs(expected)), (
            f"{place}: {found} and {expected}"
        )
    else:
        assert found == expected, f"{place}: {found} and {expected}"
