"""``lora-tune estimate --study``: the frontier is that of the study's own gate, without torch or data."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lora_tune.catalog.models import find_catalog_model
from lora_tune.commands.estimate_study import StudyQuestion, estimate_study, find_frontier
from lora_tune.errors import InfeasibleError, MachineError, StudyFileError
from lora_tune.memory.estimate import estimate_memory
from lora_tune.memory.request import LaneShape, MemoryRequest
from lora_tune.memory.shape import ModelShape
from lora_tune.memory.verdict import find_device
from lora_tune.report.estimate_study import FrontierRow

STUDY = """
[model]
base = "llama-3.1-8b"
[data]
train = "rows.jsonl"
max_length = 2048
[space]
rank = [8, 32, 128, 512]
lora_dropout = [0.0]
target_modules = ["attention", "all-linear", ["q_proj", "v_proj"]]
[memory]
gpu = "RTX 4090"
safety = 0.9
"""
QUESTION = StudyQuestion(gpus=(), all_gpus=False, tokens=None, prices=())


@pytest.fixture
def study(tmp_path: Path) -> Path:
    path = tmp_path / "first.toml"
    path.write_text(STUDY, encoding="utf-8")
    return path


def question(*gpus: str, **given: object) -> StudyQuestion:
    values: dict[str, object] = {"all_gpus": False, "tokens": None, "prices": (), **given}
    return StudyQuestion(gpus=gpus, **values)  # type: ignore[arg-type]


def lone_peak(row: FrontierRow, rank: int) -> int:
    found = find_catalog_model("llama-3.1-8b")
    assert found is not None
    request = MemoryRequest(
        quantization="nf4",
        compute_dtype="bfloat16",
        lanes=(LaneShape(rank=rank, targets=row.modules, lora_dropout=0.0),),
        micro_batch_size=1,
        max_length=2048,
        gradient_checkpointing=True,
        gradient_accumulation=True,
        group_rank=128,
        compute_capability="8.9",
    )
    shape = ModelShape.from_config(found.model.config)
    return estimate_memory(shape, request).peak_allocated_bytes


def test_the_largest_rank_of_each_set_fits_the_budget_and_the_next_does_not(study: Path) -> None:
    (gpu,) = find_frontier(str(study), question("RTX 4070 Ti SUPER")).gpus
    budget = int(gpu.device.usable_bytes * 0.9)
    ranks = (8, 32, 128, 512, 10**9)
    assert [row.target_set for row in gpu.rows] == ["attention", "all-linear", "q_proj+v_proj"]
    for row in gpu.rows:
        above = ranks[ranks.index(row.max_rank) + 1]
        assert lone_peak(row, row.max_rank) <= budget
        assert above == 10**9 or lone_peak(row, above) > budget
        assert row.plan is not None
        assert row.plan.most_lanes >= 1
    assert gpu.rows[1].max_rank < gpu.rows[0].max_rank


def test_without_a_gpu_it_is_the_studys_own(study: Path) -> None:
    frontier = find_frontier(str(study), QUESTION)
    assert [gpu.device for gpu in frontier.gpus] == [find_device("RTX 4090", key="--gpu")]
    assert frontier.tokens is None
    assert any("train.max_steps is not set" in note for note in frontier.notes)


def test_a_study_on_auto_needs_a_gpu_here(study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study.write_text(STUDY.replace('gpu = "RTX 4090"', ""), encoding="utf-8")
    monkeypatch.setenv("PATH", str(study.parent))
    with pytest.raises(MachineError, match=r'memory\.gpu is "auto"'):
        find_frontier(str(study), QUESTION)


def test_a_gpu_on_which_nothing_fits_says_why_and_the_others_stand(
    study: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = question("4GiB", "RTX 4090")
    estimate_study(str(study), asked, as_json=True, require_fit=False, given={"study", "gpu"})
    small, large = json.loads(capsys.readouterr().out)["gpus"]
    assert small["problem"].startswith(
        "no trial fits: the smallest configuration (rank 8, q_proj+v_"
    )
    assert 'memory.gpu "4GiB", 90%' in small["problem"]
    assert (small["target_sets"], small["lanes"]) == ([], 0)
    assert large["problem"] is None
    assert [row["name"] for row in large["target_sets"]] == [
        "attention",
        "all-linear",
        "q_proj+v_proj",
    ]
    with pytest.raises(InfeasibleError, match="nothing of the space fits 4GiB"):
        estimate_study(str(study), asked, as_json=True, require_fit=True, given=set())


def test_hours_and_cost_of_a_whole_study_order_the_gpus(study: Path) -> None:
    asked = question("T4", "RTX 4090", tokens=10**7, prices=("t4=0.3", "rtx-4090=0.4"))
    first, second = find_frontier(str(study), asked).gpus
    assert (first.device.name, second.device.name) == ("RTX 4090", "T4")
    assert first.time is not None
    assert second.time is not None
    assert first.time.cost == pytest.approx(0.4 * first.time.hours)
    with pytest.raises(StudyFileError, match="--price names L4"):
        find_frontier(str(study), question("T4", tokens=10**7, prices=("l4=1",)))
    with pytest.raises(StudyFileError, match="the length of the study is not known"):
        find_frontier(str(study), question("T4", prices=("t4=1",)))


def test_a_study_of_given_steps_has_hours_by_itself(study: Path) -> None:
    study.write_text(STUDY + "[train]\nmax_steps = 100\n", encoding="utf-8")
    frontier = find_frontier(str(study), QUESTION)
    assert frontier.tokens is not None
    assert frontier.gpus[0].time is not None


def test_people_read_a_table_for_each_gpu(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = question("4GiB", "RTX 4090")
    estimate_study(str(study), asked, as_json=False, require_fit=False, given=set())
    text = capsys.readouterr().out
    assert "first: what of its space fits on llama-3.1-8b" in text
    assert "no trial fits" in text
    assert "q_proj+v_proj" in text


def test_the_frontier_loads_no_torch(study: Path) -> None:
    code = (
        "import sys; from lora_tune import cli; sys.argv = ['lora-tune', *sys.argv[1:]]\n"
        "try: cli.main()\n"
        "except SystemExit as end: print('exit:', end.code or 0)\n"
        "print([m for m in ('torch', 'peft', 'transformers', 'optuna') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "estimate", "--study", str(study), "--json"],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert done.stdout.splitlines()[-1] == "[]", done.stderr
