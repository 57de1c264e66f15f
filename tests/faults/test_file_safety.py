"""What a study file, a model's or a study's folder can not do: run code, write elsewhere, leak a token.

The bombs are real: pickles and modules that make a file when they are loaded. The static half reads the
program's own source, so that no new call slips in.
"""

import ast
import json
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from fault_studies import write_study
from forked_commands import Done, commands

import lora_tune
from lora_tune.errors import StudyFileError
from lora_tune.files import MANIFEST, is_complete, publish_folder, published_digests
from lora_tune.metrics import check_metrics, resolve_metrics
from lora_tune.study.loader import validate_study

PACKAGE = Path(lora_tune.__file__).parent
SOURCES = sorted(PACKAGE.rglob("*.py"))

# What the program says.


class Call(NamedTuple):
    """A call in the source: ``transformers.AutoConfig.from_pretrained``, and its keywords."""

    where: str
    name: str
    keywords: dict[str, object]


def calls() -> Iterator[Call]:
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                given = {k.arg: getattr(k.value, "value", ...) for k in node.keywords if k.arg}
                yield Call(str(path.relative_to(PACKAGE)), ast.unparse(node.func), given)


ALL_CALLS = tuple(calls())

LOADS_CODE = (
    {"eval", "exec", "compile", "__import__", "runpy.run_path", "runpy.run_module"}
    | {"torch.load", "pickle.load", "pickle.Unpickler", "joblib.load", "np.load", "numpy.load"}
    | {"marshal.loads", "marshal.load", "shelve.open", "dill.loads", "cloudpickle.loads"}
    | {"yaml.load", "yaml.unsafe_load", "pd.read_pickle", "pandas.read_pickle"}
)
UNPACKS = {"tarfile.open", "zipfile.ZipFile", "shutil.unpack_archive", "tarfile.TarFile"}
# The pipe between a study and its training children, which nobody else has.
PRIVATE_PIPE = {"executors/child.py", "worker.py"}


def test_nothing_that_runs_code_from_a_file_is_called() -> None:
    assert [call for call in ALL_CALLS if call.name in LOADS_CODE] == []


def test_only_the_private_pipe_is_unpickled() -> None:
    assert {call.where for call in ALL_CALLS if call.name == "pickle.loads"} <= PRIVATE_PIPE
    receivers = {call.where for call in ALL_CALLS if call.name.endswith(".recv")}
    assert receivers <= {"executors/child.py", "executors/process.py"}


def test_no_archive_is_unpacked() -> None:
    assert [call for call in ALL_CALLS if call.name in UNPACKS] == []


def test_code_of_a_model_is_allowed_nowhere() -> None:
    loading = [
        call
        for call in ALL_CALLS
        if call.name.rpartition(".")[2] in ("from_pretrained", "from_config")
        and "Auto" in call.name
    ]
    assert len(loading) >= 8
    for call in loading:
        assert call.keywords.get("trust_remote_code") is False, call
    for call in loading:
        weights = call.name.endswith("AutoModelForCausalLM.from_pretrained")
        if weights and "gguf_file" not in call.keywords:
            assert call.keywords.get("use_safetensors") is True, call


def test_modules_are_imported_by_a_computed_name_in_known_places_only() -> None:
    found = {call.where for call in ALL_CALLS if call.name.endswith("import_module")}
    # Our own tables; the modules that a coordinator names to its child; a function of the user, if allowed.
    own = {"commands/export.py", "data/__init__.py", "report/__init__.py"}
    assert found <= own | {"executors/child.py", "metrics.py"}


# Models.


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch '{self.mark}'",)


MARK = "exploded"
MODULE = """
open({mark!r}, "w").close()
from transformers import LlamaConfig as OtherConfig, LlamaForCausalLM as OtherModel
from transformers import PreTrainedTokenizerFast as OtherTokenizer
"""
AUTO_MAP = {
    "AutoConfig": "modeling.OtherConfig",
    "AutoModelForCausalLM": "modeling.OtherModel",
    "AutoTokenizer": [None, "modeling.OtherTokenizer"],
}


def change_json(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def bring_code(model: Path) -> None:
    (model / "modeling.py").write_text(MODULE.format(mark=str(model.parent / MARK)))


def a_model_of_its_own_code(model: Path) -> None:
    bring_code(model)
    change_json(model / "config.json", model_type="other", auto_map=AUTO_MAP)


def a_tokenizer_of_its_own_code(model: Path) -> None:
    bring_code(model)
    change_json(
        model / "tokenizer_config.json",
        tokenizer_class="OtherTokenizer",
        auto_map={"AutoTokenizer": ["modeling.OtherTokenizer", "modeling.OtherTokenizer"]},
    )


def pickled_weights_alone(model: Path) -> None:
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(model.parent / MARK)))


def a_pickle_called_safetensors(model: Path) -> None:
    (model / "model.safetensors").write_bytes(pickle.dumps(Bomb(model.parent / MARK)))


def weights_cut_short(model: Path) -> None:
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def an_adapter_in_the_base(model: Path) -> None:
    fields = {
        "peft_type": "LORA",
        "base_model_name_or_path": "/",
        "r": 2,
        "target_modules": ["q_proj"],
    }
    (model / "adapter_config.json").write_text(json.dumps(fields))
    (model / "adapter_model.bin").write_bytes(pickle.dumps(Bomb(model.parent / MARK)))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (a_model_of_its_own_code, "code that comes with it"),
        (a_tokenizer_of_its_own_code, "code that comes with it"),
        (pickled_weights_alone, "Pickled weights are not loaded"),
        (a_pickle_called_safetensors, "is damaged, or no safetensors file"),
        (weights_cut_short, "is damaged, or no safetensors file"),
        (an_adapter_in_the_base, "holds an adapter beside a base model"),
    ],
)
def test_a_model_that_could_run_code_is_refused_in_one_message(
    tmp_path: Path, spoil: Callable[[Path], None], words: str
) -> None:
    write_study(tmp_path, executor="in-process")
    spoil(tmp_path / "model")
    done = commands().run("run", "study.toml", cwd=tmp_path)
    check_refused(done, 8, words)
    assert not (tmp_path / MARK).exists()
    assert not (tmp_path / "reports").exists()


def test_check_and_estimate_refuse_a_model_of_its_own_code_as_well(tmp_path: Path) -> None:
    write_study(tmp_path)
    a_model_of_its_own_code(tmp_path / "model")
    for arguments in (["check", "study.toml"], ["estimate", "./model", "--exact"]):
        done = commands().run(*arguments, cwd=tmp_path)
        check_refused(done, 8, "code that comes with it")
    assert not (tmp_path / MARK).exists()


def check_refused(done: Done, code: int, words: str) -> None:
    assert done.code == code, done.err
    assert words in done.err
    assert "Traceback" not in done.err
    messages = [line for line in done.err.splitlines() if line.startswith("lora-tune: ")]
    assert len(messages) == 1, done.err


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study that ran to its end, of a model with bombs that need not be touched."""
    place = tmp_path_factory.mktemp("finished")
    write_study(place, executor="in-process", trials=2)
    model = place / "model"
    bring_code(model)
    change_json(model / "config.json", auto_map=AUTO_MAP)
    (model / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(place / MARK)))
    done = commands().run("run", "study.toml", cwd=place)
    assert done.code == 0, done.err
    return place


def test_pickles_and_code_beside_a_known_model_are_not_touched(finished: Path) -> None:
    assert not (finished / MARK).exists()


def test_the_bombs_work(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Bomb(tmp_path / MARK)))
    assert (tmp_path / MARK).exists()


# Names.

ESCAPES = (
    *(
        "..",
        ".",
        "../up",
        "a/../../b",
        "/etc",
        "/",
        "a/b",
        "a\\b",
        "~",
        "~root",
        "-rf",
        "--help",
        " ",
        "a b",
    ),
    *(
        "nul\x00byte",
        "line\nbreak",
        "\x1b[31m",
        ".hidden",
        "n" * 256,
        "a:b",
        "$HOME",
        "*",
        "con/",
    ),
)


@pytest.mark.parametrize("name", ESCAPES)
def test_a_name_that_is_no_plain_folder_is_refused(name: str) -> None:
    values = {"study": {"name": name}, "model": {"base": "m"}, "data": {"train": "rows.jsonl"}}
    with pytest.raises(StudyFileError, match=r"study\.name"):
        validate_study(values, source=Path("study.toml"))


HOSTILE_METRICS = (
    *("os:system", "subprocess:run", "builtins:eval", "bomb:score", "bomb:__class__"),
    *("../bomb:score", "/tmp/bomb:score", "bomb.py", "__import__('os')", "bomb:score; import os"),
)


@pytest.mark.parametrize("name", HOSTILE_METRICS)
def test_a_metric_loads_no_code_that_the_command_line_did_not_allow(
    tmp_path: Path, name: str
) -> None:
    (tmp_path / "bomb.py").write_text(f"open({str(tmp_path / MARK)!r}, 'w').close()")
    for check in (
        lambda: check_metrics([name], allow_code=False),
        lambda: resolve_metrics([name], allow_code=False, base_dir=tmp_path),
    ):
        with pytest.raises(StudyFileError, match=r"select\.metrics\[0\]"):
            check()
    assert not (tmp_path / MARK).exists()


# Links and manifests in a study's folder.


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize(
    "name",
    [
        *("adapter", "trials", "trials/0001", "trials/0001/rung-0", "trials/0001/trial.json"),
        *("study.db", "owner.lock", "report.html", "plots", "confirmation", "export"),
        *("trials/0001/state-1", "confirmation/default-seed-0.state", "study.lock.json"),
    ],
)
def test_a_link_in_a_study_s_folder_is_not_followed_out_of_it(
    finished: Path, tmp_path: Path, name: str
) -> None:
    for part in ("model", "rows.jsonl", "study.toml"):
        (tmp_path / part).symlink_to(finished / part)
    shutil.copytree(finished / "reports", tmp_path / "reports")
    outside, link = tmp_path / "outside", tmp_path / "reports/study" / name
    if link.is_dir():
        shutil.move(link, outside)
    else:
        outside.mkdir()
        (outside / "mine").write_text("mine")
        if link.exists():
            shutil.move(link, outside / "file")
    target = outside / "file" if (outside / "file").exists() else outside
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(target)
    before = contents(outside)
    for command in (
        ["run", "study.toml"],
        ["report", "study"],
        ["export", "study", "--to", "adapter"],
    ):
        done = commands().run(*command, cwd=tmp_path)
        check_refused(done, 4, "link")
        assert contents(outside) == before
    done = commands().run("doctor", "study", "--fix", cwd=tmp_path)
    assert done.code == 4, done.err
    assert contents(outside) == before


@pytest.mark.parametrize(
    "name", [".adapter.a1b2c3d4", ".adapter.old.a1b2c3d4", "trials/.0000.a1b2c3d4"]
)
def test_removing_leftovers_removes_a_link_and_not_what_it_leads_to(
    finished: Path, tmp_path: Path, name: str
) -> None:
    shutil.copytree(finished / "reports", tmp_path / "reports")
    (tmp_path / "outside" / "adapter").mkdir(parents=True)
    (tmp_path / "outside" / "adapter" / "mine").write_text("mine")
    before = contents(tmp_path / "outside")
    (tmp_path / "reports/study" / name).symlink_to(tmp_path / "outside")
    commands().run("doctor", "study", "--fix", cwd=tmp_path)
    assert contents(tmp_path / "outside") == before


def test_publishing_over_a_link_replaces_the_link(tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "mine").write_text("mine")
    (tmp_path / "adapter").symlink_to(tmp_path / "outside")
    with publish_folder(tmp_path / "adapter") as folder:
        (folder / "weights").write_text("x")
    assert not (tmp_path / "adapter").is_symlink()
    assert contents(tmp_path / "outside") == {"mine": b"mine"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "outside"]


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/../../secret", "..", "x\x00"])
def test_a_manifest_that_names_files_elsewhere_is_none(tmp_path: Path, name: str) -> None:
    with publish_folder(tmp_path / "adapter") as folder:
        (folder / "weights").write_text("x")
    (tmp_path / "secret").write_text("s")
    change_json(tmp_path / "adapter" / MANIFEST, sha256={name: "0" * 64})
    assert published_digests(tmp_path / "adapter") is None
    assert not is_complete(tmp_path / "adapter")


def test_a_link_or_a_pipe_in_a_published_folder_is_not_read(tmp_path: Path) -> None:
    with publish_folder(tmp_path / "adapter") as folder:
        (folder / "weights").write_text("x")
    path = tmp_path / "adapter" / "weights"
    shutil.move(path, tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    assert not is_complete(tmp_path / "adapter")
    path.unlink()
    os.mkfifo(path)  # reading one waits for ever
    assert not is_complete(tmp_path / "adapter")


# Tokens.

# Written in two parts, so that no scanner takes this file for a leak.
HUB = "hf_" + "QmXw7RkTzLpN4vBcJdYs8HfGaEuK2iOo5x"
IN_PATH = "hf_" + "Zt4Rw8QkLmXv2NpB6cJdYs9HfGaEuT3iOo"
IN_METRIC = "ghp_" + "k7Xz2QwE9rTyU4iOpLmN6bVcX1sDfG3hJ5aZ"
WANDB = "0f9e8d7c6b5a4938" + "27160f1e2d3c4b5a69788796"
IN_STORAGE = "Vn7" + "kq2Wd9Rt"
IN_ADDRESS = "Pw8" + "zt5Xc3Lm"
CANARIES = (HUB, IN_PATH, IN_METRIC, WANDB, IN_STORAGE, IN_ADDRESS)
ENVIRON = {"HF_TOKEN": HUB, "WANDB_API_KEY": WANDB}

FAILING = {
    "rows that are missing": ('train = "rows.jsonl"', f'train = "{IN_PATH}/rows.jsonl"'),
    "rows at an address": (
        'train = "rows.jsonl"',
        f'train = "https://me:{IN_ADDRESS}@data.invalid/rows.jsonl"',
    ),
    "a metric that is none": ("metrics = []", f'metrics = ["{IN_METRIC}"]'),
    "code that is not allowed": ("metrics = []", f'metrics = ["{IN_METRIC}:score"]'),
    "a database that is away": (
        "[run]",
        f'[run]\nstorage = "postgresql://me:{IN_STORAGE}@127.0.0.1:1/studies"',
    ),
    "a model that is nowhere": ('base = "model"', f'base = "./{IN_PATH}"'),
    "an unknown key": ("[run]", f'[run]\n{IN_METRIC} = "{HUB}"'),
    "no TOML": ("[run]", f"[run\n{HUB} {WANDB}"),
}


def leaks(place: Path, done: Done) -> list[str]:
    texts = [done.out.encode(), done.err.encode()]
    reports = place / "reports"
    texts += [path.read_bytes() for path in reports.rglob("*") if path.is_file()]
    texts += [str(path).encode() for path in reports.rglob("*")]
    return [canary[:6] for canary in CANARIES if any(canary.encode() in text for text in texts)]


@pytest.mark.parametrize("fault", FAILING)
def test_no_token_is_in_what_a_failing_study_says_or_leaves(tmp_path: Path, fault: str) -> None:
    study = write_study(tmp_path, executor="in-process")
    old, new = FAILING[fault]
    text = study.read_text()
    assert old in text
    study.write_text(text.replace(old, new))
    for arguments in (["run", "study.toml", "--json"], ["check", "study.toml", "--json"]):
        done = commands().run(*arguments, cwd=tmp_path, environ=ENVIRON)
        if arguments[0] == "run":
            assert done.code != 0
            assert "Traceback" not in done.err, done.err
        assert leaks(tmp_path, done) == []


def test_no_token_is_in_what_other_commands_say_of_a_finished_study(
    finished: Path, tmp_path: Path
) -> None:
    place = tmp_path / "place"
    shutil.copytree(finished, place)
    record = place / "reports/study/trials/0000/trial.json"
    change_json(record, reason=f"401 for {IN_METRIC}, Bearer {HUB}")
    for command in ("report", "best", "doctor"):
        for options in ([], ["--json"]):
            done = commands().run(command, "study", *options, cwd=place, environ=ENVIRON)
            said = [c[:6] for c in CANARIES if c in done.out + done.err]
            assert said == [], (command, done.out, done.err)
