"""The house: every module imports from lower floors only, and the light commands stay light.

The floors are those of the design: a room may import what is below it, or its own modules.
"""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

import lora_tune
from lora_tune.records import TrialConfig

PACKAGE = Path(lora_tune.__file__).parent

FLOORS = {
    "__init__": 0.0,  # the version
    "errors": 0.0,
    "redaction": 0.0,
    "signals": 0.1,
    "units": 0.0,
    "files": 0.2,
    "catalog": 0.5,
    "hub": 1.0,
    "records": 2.0,
    "study": 2.0,
    "metrics": 2.5,
    "memory": 3.0,
    "stats": 3.0,
    "data": 4.0,
    "engine": 4.0,
    "search": 4.0,
    "store": 4.0,
    "executors": 5.0,
    "report": 5.0,
    "trace": 5.0,
    "export": 6.0,
    "planning": 6.0,
    "trackers": 6.0,
    "assembly": 6.5,
    "worker": 6.7,
    "tuner": 7.0,
    "verification": 7.0,
    "commands": 8.0,
    "cli": 9.0,
}

TENSORS = {"torch", "transformers", "peft", "bitsandbytes", "accelerate", "safetensors"}
# What a room must not import, at the top of a module or inside a function.
WALLS = {
    "engine": {"optuna", "sqlalchemy"},
    "executors": {"optuna", "sqlalchemy"},
    "trace": {"optuna", "sqlalchemy"},
    "verification": {"optuna", "sqlalchemy"},
    "search": TENSORS,
    "memory": TENSORS | {"optuna"},
    "metrics": TENSORS | {"optuna"},
    "stats": TENSORS | {"optuna", "pandas"},
    "report": TENSORS | {"optuna"},
    "store": TENSORS,
    "study": TENSORS | {"optuna"},
    "catalog": TENSORS | {"optuna"},
    "records": TENSORS | {"optuna"},
    "hub": TENSORS | {"optuna"},
    "errors": TENSORS | {"optuna"},
    "files": TENSORS | {"optuna"},
    "redaction": TENSORS | {"optuna"},
    "units": TENSORS | {"optuna"},
}


def room_of(path: Path) -> str:
    """Return the top-level module or folder of the package that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_modules(source: str) -> Iterator[tuple[int, str]]:
    """Yield line and full name of every module imported, wherever in the file."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in line {node.lineno}"
            assert node.module is not None
            if node.module == "lora_tune":  # from lora_tune import room
                names = [alias.name for alias in node.names]
                rooms = [name if name in FLOORS else "__init__" for name in names]
                yield from ((node.lineno, f"lora_tune.{room}") for room in rooms)
            else:
                yield node.lineno, node.module


def faults_of(room: str, source: str) -> list[str]:
    """Return what a module of ``room`` imports and must not."""
    faults = []
    for line, name in imported_modules(source):
        top, _, rest = name.partition(".")
        if top == "lora_tune":
            other = rest.partition(".")[0] or "__init__"
            if other != room and FLOORS[other] >= FLOORS[room]:
                faults.append(f"line {line}: {room} imports {other}, which is not below it")
        elif top in WALLS.get(room, ()):
            faults.append(f"line {line}: {room} imports {top}")
    return faults


MODULES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_imports_from_lower_floors_only(path: Path) -> None:
    assert faults_of(room_of(path), path.read_text(encoding="utf-8")) == []


def test_every_room_has_a_floor_and_every_floor_a_room() -> None:
    assert {room_of(path) for path in MODULES} == set(FLOORS)
    assert set(WALLS) <= set(FLOORS)


@pytest.mark.parametrize(
    ("room", "source"),
    [
        ("search", "from lora_tune.engine.pack import TrialPack"),
        ("search", "def late():\n    import torch.nn"),
        ("engine", "if True:\n    from optuna.trial import Trial"),
        ("report", "import lora_tune.tuner"),
        ("records", "from lora_tune import planning"),
        ("memory", "from lora_tune.search import gate"),
        ("data", "from lora_tune.store.folder import StudyFolder"),  # a neighbour on its floor
    ],
)
def test_a_planted_import_is_noticed(room: str, source: str) -> None:
    assert len(faults_of(room, source)) == 1


def test_what_is_allowed_is_not_noticed() -> None:
    source = "from lora_tune import __version__\nfrom lora_tune.search.space import describe\nimport optuna"
    assert faults_of("search", source) == []


# Light commands.

REPORT_LOADED = """
import sys
from lora_tune import cli
sys.argv = ["lora-tune", *sys.argv[1:]]
code = 0
try:
    cli.main()
except SystemExit as end:
    code = end.code or 0
heavy = [name for name in ("torch", "peft", "transformers") if name in sys.modules]
print("loaded:", ",".join(heavy), "exit:", code)
"""


def run_light(*arguments: str, folder: Path) -> tuple[str, str]:
    """Run a command; return its last line, which says what was loaded, and its error output."""
    done = subprocess.run(
        [sys.executable, "-c", REPORT_LOADED, *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    return done.stdout.splitlines()[-1], done.stderr


def test_help_loads_nothing_heavy(tmp_path: Path) -> None:
    assert run_light("--help", folder=tmp_path)[0] == "loaded:  exit: 0"
    assert run_light("run", "--help", folder=tmp_path)[0] == "loaded:  exit: 0"


def test_a_bad_study_file_is_refused_before_anything_heavy_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "bad.toml").write_text('[space]\nrank = ["32"]\n', encoding="utf-8")
    loaded, errors = run_light("run", "bad.toml", folder=tmp_path)
    assert loaded == "loaded:  exit: 3"
    assert errors.startswith("lora-tune: bad.toml: model.base is missing")
    assert 'space.rank[0] is "32" (text)' in errors
    assert list(tmp_path.iterdir()) == [tmp_path / "bad.toml"]


def test_a_study_that_does_not_exist_is_refused_before_anything_heavy_is_loaded(
    tmp_path: Path,
) -> None:
    loaded, errors = run_light("report", "nothing", folder=tmp_path)
    assert loaded == "loaded:  exit: 4"
    assert '"nothing" is no started study' in errors


def test_a_report_is_made_without_anything_heavy(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "reports" / "docstrings")
    loaded, errors = run_light("report", "docstrings", folder=tmp_path)
    assert loaded == "loaded:  exit: 0", errors
    assert (folder / "report.md").is_file()
    assert (folder / "trials.csv").is_file()


def write_study(folder: Path) -> Path:
    """Write the folder of a finished study of one trial."""
    from lora_tune.records import (
        Candidate,
        Confirmation,
        ConfirmationRun,
        DataFingerprint,
        EvalResult,
        LanePlan,
        ModelIdentity,
        RungResult,
        StudyLock,
        SuggestedParams,
        TargetSet,
        TrialRecord,
        TrialState,
    )
    from lora_tune.stats.selection import CandidateRuns, decide
    from lora_tune.store.folder import StudyFolder
    from lora_tune.study.loader import validate_study

    spec = validate_study(
        {"model": {"base": "m"}, "data": {"train": "rows.jsonl"}, "search": {"trials": 1}},
        source=Path("docstrings.toml"),
    )
    modules = ("model.layers.0.mlp.up_proj",)
    config = TrialConfig(
        rank=8,
        lora_alpha=16.0,
        lora_dropout=0.0,
        target_set="mlp",
        target_modules=modules,
        learning_rate=4e-4,
    )
    scored = EvalResult(
        split="selection",
        loss_sums=(6.0, 9.0, 3.0),
        label_counts=(3, 4, 2),
        compute_dtype="float32",
    )
    record = TrialRecord(
        number=0,
        state=TrialState.COMPLETE,
        origin="anchor A1",
        suggested=SuggestedParams(
            rank=8, alpha_ratio=2.0, lora_dropout=0.0, target_set="mlp", effective_step=2e-4
        ),
        config=config,
        predicted_bytes=2**30,
        trainable_parameters=4096,
        rungs=(
            RungResult(
                rung=0,
                steps=10,
                eval_loss=scored.mean_loss,
                evaluation=scored,
                points=(),
                wall_s=1.0,
                num_tokens=100,
                peak_bytes=2**30,
                pack_lanes=1,
            ),
        ),
    )
    lock = StudyLock(
        name="docstrings",
        created="2026-01-15T09:30:00+00:00",
        command="lora-tune run docstrings.toml",
        study_file="docstrings.toml",
        spec=spec.model_dump(mode="json"),
        spec_sha256="0" * 64,
        model=ModelIdentity(
            base="m",
            hub_id=None,
            revision=None,
            architecture="LlamaForCausalLM",
            model_type="llama",
            num_parameters=1_000_000,
            license=None,
            quantization="nf4",
        ),
        data=DataFingerprint(
            source="rows.jsonl",
            format="text",
            sha256="0" * 64,
            num_train=100,
            num_selection=3,
            num_confirmation=3,
            num_train_tokens=1000,
            num_train_labels=900,
            num_bad_rows=0,
            num_duplicates=0,
            num_unlabelled=0,
            num_truncated=0,
            max_tokens=32,
            chat_template="none",
        ),
        notes=(),
        versions={"lora-tune": lora_tune.__version__},
        hardware={"device": "cpu"},
        plan=LanePlan(
            compute_dtype="float32",
            device="cpu",
            lanes=1,
            micro_batch_size=4,
            gradient_checkpointing=False,
            budget_bytes=2**32,
        ),
        rungs=(10,),
        warmup_steps=1,
        target_sets=(
            TargetSet(name="mlp", modules=modules, max_rank=8, trainable_parameters_per_rank=512),
        ),
    )
    confirmed = replace(scored, split="confirmation")
    folder.mkdir(parents=True)
    store = StudyFolder(folder)
    store.save_lock(lock)
    store.save_trial(record)
    candidate = Candidate(
        name="trial 0",
        trial=0,
        config=record.config,
        steps=10,
        predicted_bytes=2**30,
        trainable_parameters=4096,
    )
    runs = [
        ConfirmationRun(
            candidate="trial 0", seed=seed, state=TrialState.COMPLETE, evaluation=confirmed
        )
        for seed in range(2)
    ]
    decision = decide(
        [
            CandidateRuns(
                name="trial 0",
                evaluations=(confirmed, confirmed),
                peak_bytes=2**30,
                step_s=0.5,
                rank=8,
                lora_dropout=0.0,
            )
        ],
        default=None,
        practical_margin=0.005,
    )
    store.save_confirmation(
        Confirmation(
            candidates=(candidate,),
            default=None,
            seeds=2,
            runs=tuple(runs),
            base_evaluation=replace(confirmed, loss_sums=(7.0, 9.5, 4.0)),
            base_selection_loss=2.3,
            decision=decision,
        )
    )
    return folder


def test_help_answers_within_half_a_second(tmp_path: Path) -> None:
    def seconds() -> float:
        # processor time, not the clock's: other work on the machine is not this command's fault
        before = os.times()
        command = [sys.executable, "-m", "lora_tune.cli", "--help"]
        subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, timeout=60)
        after = os.times()
        return (
            after.children_user
            + after.children_system
            - (before.children_user + before.children_system)
        )

    assert 0 < min(seconds() for _ in range(3)) < 0.5
