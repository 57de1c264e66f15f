"""Secrets in texts, and a whole study around six of them: they are nowhere in its folder, output or reports.

What must not be taken for a secret is checked on the project's own files and on texts made by chance.
"""

import json
import sqlite3
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
import vl_convert
from hypothesis import given, settings
from hypothesis import strategies as st
from test_end_to_end import STUDY, copy_of
from test_end_to_end import workplace as workplace  # the fixture

import lora_tune
from lora_tune.errors import StudyFileError
from lora_tune.files import write_text
from lora_tune.redaction import (
    MASK,
    keys_with_secrets,
    mask_tokens,
    redact,
    redact_values,
    same_when_masked,
)
from lora_tune.study.loader import load_study, notes_on_credentials

ROOT = Path(lora_tune.__file__).parents[1]

# Written in two parts, so that no scanner takes this file for a leak.
HUB = "hf_" + "QmXw7RkTzLpN4vBcJdYs8HfGaEuK2iOo5x"
OPENAI = "sk-" + "proj-a8Fk3LmZq9Xc2Vb7Nn1Md4Rt6Yu0Pw5"
AWS_ID = "AKIA" + "Q3EGR7TZLV5MWXHB"
AWS_SECRET = "kT9/xWv+" + "Zq3LmNb8RcYd5HfGsJ2pKu7EoXiAw4Qt"
GITHUB = "ghp_" + "k7Xz2QwE9rTyU4iOpLmN6bVcX1sDfG3hJ5aZ"
WANDB = "0f9e8d7c6b5a4938" + "27160f1e2d3c4b5a69788796"  # hex digits, as a git revision has
PASSWORD = "Vn7" + "kq2Wd9"
KEY_LINES = (
    "-----BEGIN " + "RSA PRIVATE KEY-----",
    "MIIEowIBAAKCAQEA7Vn7kq2Wd9kT9xWvZq3LmNb8RcYd5HfGsJ2pKu7EoXiAw4Qt",
    "Q3EGR7TZLV5MWXHB+a8Fk3LmZq9Xc2Vb7Nn1Md4Rt6Yu0Pw5QmXw7RkTzLpN4vB/",
    "cJdYs8==",
    "-----END RSA " + "PRIVATE KEY-----",
)


@pytest.mark.parametrize("secret", [HUB, OPENAI, AWS_ID, GITHUB])
@pytest.mark.parametrize("text", ["{}", "a {} b", "('{}')", "https://x/{}?y", "name={},", '"{}"'])
def test_a_token_of_a_known_form_is_masked_wherever_it_stands(secret: str, text: str) -> None:
    assert redact(text.format(secret), {}) == text.format(MASK)
    assert mask_tokens(text.format(secret), {}) == text.format(MASK)


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        (f"aws_secret_access_key = {AWS_SECRET}", "aws_secret_access_key = ***"),
        (f'api_key = "{WANDB}"', 'api_key = "***"'),
        (f"{{'apiKey': '{WANDB}'}}", "{'apiKey': '***'}"),
        (f'{{"wandb_api_key": "{WANDB}", "rank": 8}}', '{"wandb_api_key": "***", "rank": 8}'),
        (f'{{\\"token\\": \\"{PASSWORD}\\"}}', '{\\"token\\": \\"***\\"}'),
        (f"lora-tune run a.toml --hf-token {WANDB}", "lora-tune run a.toml --hf-token ***"),
        (f"https://x/y?access_token={PASSWORD}&page=2", "https://x/y?access_token=***&page=2"),
        (f"# password: {PASSWORD}", "# password: ***"),
        (f"Authorization: Bearer {WANDB}", "Authorization: Bearer ***"),
        (f"postgres://me:{PASSWORD}@db.example/x", "postgres://me:***@db.example/x"),
        ("https://me:p@ss:w0rd@host/x", "https://me:***@host/x"),
        (str(Path(f"https://me:{PASSWORD}@host/x")), "https:/me:***@host/x"),
    ],
)
def test_what_stands_beside_a_secrets_name_or_in_an_address_is_masked(
    text: str, masked: str
) -> None:
    assert redact(text, {}) == masked


@pytest.mark.parametrize(
    "line_end", ["\n", "\r\n", "\n  ", "\n# ", "\\n", "\\r\\n", "\\\\n", " ", ""]
)
def test_a_private_key_is_masked_from_its_first_to_its_last_line(line_end: str) -> None:
    text = f'before "{line_end.join(KEY_LINES)}" after-wards'
    assert redact(text, {}) == f'before "{MASK}" after-wards'


def test_a_private_key_that_was_cut_short_takes_nothing_of_the_text_around_it() -> None:
    rows = [{"text": f"{KEY_LINES[0]} a"}, {"text": "b"}, {"text": "-"}]
    masked = redact("\n".join(map(json.dumps, rows)), {})
    assert [json.loads(line) for line in masked.splitlines()] == [{"text": "*** a"}, *rows[1:]]
    toml = f'# {KEY_LINES[0]}\n# {KEY_LINES[1]}\n[study]\nname = "x"\n[search]\ntrials = 3\n'
    assert redact(toml, {}) == '# ***\n[study]\nname = "x"\n[search]\ntrials = 3\n'
    two = json.dumps({"key": "\n".join(KEY_LINES[:3]), "other": "\n".join(KEY_LINES), "rank": 8})
    assert json.loads(redact(two, {})) == {"key": MASK, "other": MASK, "rank": 8}


def test_values_of_the_environment_are_masked_by_the_name_of_their_variable() -> None:
    environ = {"WANDB_API_KEY": WANDB, "DB_PASS": PASSWORD, "CI_COMMIT": "d41d8cd98f00b204"}
    text = f"{WANDB} {PASSWORD} d41d8cd98f00b204 x{PASSWORD}x"
    # a short one inside of a longer word is no match: that would take words apart
    assert redact(text, environ) == f"*** *** d41d8cd98f00b204 x{PASSWORD}x"


def test_a_value_of_the_environment_is_masked_as_an_address_has_it() -> None:
    assert redact("https://h/?q=a%2Fb%2B3c%3D%3D1", {"X_TOKEN": "a/b+3c==1"}) == "https://h/?q=***"


@pytest.mark.parametrize(
    "value",
    [
        "",
        "true",
        "1234567",
        "0.00012345",
        "transformers",
        "/root/.cache/x",
        "short1",
        "C:\\key\\f1",
    ],
)
def test_words_numbers_and_paths_in_the_environment_are_no_secrets(value: str) -> None:
    text = f"see {value} here"
    assert redact(text, {"MY_TOKEN": value, "SECRET": value}) == text


@pytest.mark.parametrize(
    "text",
    [
        "sha256 9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
        "revision 5f2a9c1e7b3d4860a1b2c3d4e5f60718293a4b5c",
        "HuggingFaceTB/SmolLM2-135M-Instruct and meta-llama/Llama-3.2-1B",
        "learning_rate = 1.1783762789425136e-02, max_new_tokens = 256, num_tokens: 10312000",
        "eos_token = '<|im_end|>', pad_token: </s>, bos_token=<s>",
        "C:\\Users\\me\\studies\\first.toml and /home/me/studies/first.toml",
        "the token: a word, the secret: none, password: required",
        "token = tokenizer.decode(ids2)[0]; api_key = os.environ['KEY2']",
        "http://localhost:8080/a@b ssh://git@github.com/x/y user@example.com",
        "task-specific-adapter-for-llama3-instruct-models and risk-0123456789abcdef01234567",
        "hf_transfer, hf_hub_download, gh_pages, skills-2024, AKIAKI",
    ],
)
def test_what_only_looks_like_a_secret_stays(text: str) -> None:
    assert redact(text, {}) == text


def test_no_file_of_the_project_would_be_changed() -> None:
    kinds = {".md", ".toml", ".json", ".csv", ".html", ".txt", ".jinja"}
    folders = [ROOT / name for name in ("docs", "studies", "reports", "tests/report", "lora_tune")]
    paths = [
        p for f in folders for p in f.rglob("*") if p.suffix in kinds and "golden" not in p.name
    ]
    assert len(paths) > 20
    for path in [*paths, ROOT / "README.md", ROOT / "CHANGELOG.md"]:
        text = path.read_text(encoding="utf-8")
        assert redact(text, {}) == text, path


def test_a_megabyte_of_javascript_is_neither_changed_nor_slow() -> None:
    bundle = vl_convert.javascript_bundle()
    assert len(bundle) > 500_000
    began = time.perf_counter()
    assert mask_tokens(bundle, {"WANDB_API_KEY": WANDB}) == bundle
    assert time.perf_counter() - began < 2  # 0.02 s when nobody else computes


def test_a_private_key_without_an_end_takes_no_time_to_look_for_it() -> None:
    began = time.perf_counter()
    for filling in (" ", "\n\\n", "A", "A" * 16 + "\n"):
        text = filling * (200_000 // len(filling))
        assert redact(f"{KEY_LINES[0]}{text}.", {}).startswith(MASK)
    assert time.perf_counter() - began < 2  # 0.2 s when nobody else computes


def test_files_are_written_without_tokens_whoever_writes_them(tmp_path: Path) -> None:
    write_text(tmp_path / "x.txt", f"one {HUB} two")
    assert (tmp_path / "x.txt").read_text() == f"one {MASK} two"


words = st.text(alphabet="abcdefgh XYZ019 ./_-:=,'\"\n", max_size=60)
secrets = st.sampled_from(
    [
        *(HUB, OPENAI, AWS_ID, GITHUB, f"api_key={WANDB}", f"x://u:{PASSWORD}@h"),
        *("\n".join(KEY_LINES[:count]) for count in (1, 2, 5)),
    ]
)
texts = st.lists(st.one_of(words, secrets), max_size=5).map(" ".join)
structures = st.recursive(
    st.one_of(texts, st.integers(), st.floats(allow_nan=False), st.booleans(), st.none()),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(texts, inner, max_size=4)),
    max_leaves=12,
)


@given(texts)
def test_redacting_again_changes_nothing(text: str) -> None:
    once = redact(text, {})
    assert redact(once, {}) == once
    assert not any(secret in once for secret in (HUB, OPENAI, AWS_ID, GITHUB, WANDB))


@given(st.text(alphabet="abcdefghijklmnopqrstuvwxyz .,\n", max_size=200))
def test_prose_is_never_changed(text: str) -> None:
    assert redact(text, {}) == text


@given(structures)
@settings(max_examples=60)
def test_a_structure_keeps_its_shape_its_keys_and_its_numbers(value: object) -> None:
    def shape(part: object) -> object:
        if isinstance(part, dict):
            return {key: shape(inner) for key, inner in part.items()}
        if isinstance(part, list):
            return [shape(inner) for inner in part]
        return "text" if isinstance(part, str) else part

    masked = redact_values(value, {})
    assert shape(masked) == shape(value)
    assert json.loads(json.dumps(masked)) == masked
    assert same_when_masked(masked, value)


@given(st.dictionaries(st.sampled_from(["rank", "api_key", "path"]), texts, max_size=3))
@settings(max_examples=60)
def test_json_text_stays_json_of_the_same_structure(value: dict[str, str]) -> None:
    found = json.loads(redact(json.dumps(value), {}))
    assert found.keys() == value.keys()


def test_a_masked_value_is_told_from_another_one() -> None:
    assert same_when_masked({"a": ["x-***"]}, {"a": [f"x-{HUB}"]})
    assert not same_when_masked({"a": ["x-***"]}, {"a": [f"y-{HUB}"]})
    assert not same_when_masked({"a": 1}, {"a": 2})
    assert not same_when_masked(["***"], ["p", "q"])


def test_the_keys_that_hold_secrets_are_named() -> None:
    values = {
        "model": {"base": f"https://me:{PASSWORD}@x/m", "revision": None},
        "space": {"rank": [4, 8]},
    }
    assert keys_with_secrets(values, {}) == ("model.base",)


# A whole study


CANARIES = (HUB, OPENAI, AWS_ID, AWS_SECRET, GITHUB, WANDB, PASSWORD)
DATA = f"rows-{HUB}.jsonl"
METRIC = f"""
def leaky(prompt, reference, prediction):
    raise ValueError("401 for Authorization: Bearer {GITHUB}, key {AWS_ID}/{AWS_SECRET}")
"""


def write_study(folder: Path) -> None:
    text = STUDY.format(quantization="none").replace("trials = 8", "trials = 3")
    text = text.replace("rows.jsonl", DATA).replace(
        "seeds = 2", 'seeds = 1\nmetrics = ["leaky:leaky"]\nmax_new_tokens = 2\nsamples = 1'
    )
    comment = f"# api_key = {WANDB}; openai {OPENAI}; db postgres://me:{PASSWORD}@host/x\n"
    (folder / "leak.toml").write_text(comment + text)
    (folder / "leaky.py").write_text(METRIC)
    (folder / DATA).write_bytes((folder / "rows.jsonl").read_bytes())


def run(folder: Path, *extra: str) -> subprocess.CompletedProcess[str]:
    environ = {
        **{"HF_TOKEN": HUB, "WANDB_API_KEY": WANDB, "OPENAI_API_KEY": OPENAI},
        **{
            "AWS_ACCESS_KEY_ID": AWS_ID,
            "AWS_SECRET_ACCESS_KEY": AWS_SECRET,
            "PGPASSWORD": PASSWORD,
        },
        **{"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"},
        **{"HOME": str(folder), "TERM": "dumb"},
    }
    command = [sys.executable, "-m", "lora_tune.cli", "run", "leak.toml", "--allow-code", *extra]
    return subprocess.run(
        command, cwd=folder, env=environ, capture_output=True, text=True, timeout=600, check=False
    )


@pytest.fixture(scope="module")
def leaking(
    workplace: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A finished study with secrets in its environment, file, data path and in the error of a metric."""
    folder = copy_of(workplace, tmp_path_factory.mktemp("leaking") / "run")
    write_study(folder)
    return folder, run(folder)


def leaks(data: bytes) -> list[str]:
    return [canary[:6] for canary in CANARIES if canary.encode() in data]


def test_no_secret_is_in_any_byte_of_the_study_folder(
    leaking: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    folder, ended = leaking
    assert ended.returncode == 0, ended.stderr[-2000:]
    study = folder / "reports" / "leak"
    files = [path for path in study.rglob("*") if path.is_file()]
    assert {"study.db", "report.md", "report.html", "study.toml", "README.md"} <= {
        p.name for p in files
    }
    assert {path.name: leaks(path.read_bytes()) for path in files if leaks(path.read_bytes())} == {}
    assert not any(leaks(str(path.relative_to(study)).encode()) for path in files)


def test_no_secret_is_in_what_the_study_says(
    leaking: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    _, ended = leaking
    assert leaks((ended.stdout + ended.stderr).replace("\n", "").encode()) == []
    assert leaks((ended.stdout + ended.stderr).encode()) == []


def test_the_error_of_the_metric_is_on_record_without_its_secrets(
    leaking: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    folder, _ = leaking
    text = (folder / "reports/leak/confirmation.json").read_text()
    assert "401 for Authorization: Bearer ***" in text


def test_one_warning_names_the_key(leaking: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    _, ended = leaking
    assert ended.stderr.count("looks like a credential") == 1
    assert "data.train holds what looks like a credential" in ended.stderr.replace("\n", " ")


def test_the_copy_of_the_study_file_and_the_database_are_sound(
    leaking: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    folder, _ = leaking
    study = folder / "reports" / "leak"
    copy = (study / "study.toml").read_text()
    assert tomllib.loads(copy)["data"]["train"] == "rows-***.jsonl"
    assert copy.startswith("# api_key = ***; openai ***; db postgres://me:***@host/x\n")
    with sqlite3.connect(study / "study.db") as database:
        assert database.execute("pragma integrity_check").fetchone() == ("ok",)


def test_the_same_command_goes_on_with_a_study_whose_records_are_masked(
    leaking: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    folder, _ = leaking
    toml = folder / "leak.toml"
    toml.write_text(toml.read_text().replace("trials = 3", "trials = 4"))
    ended = run(folder)
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert len(list((folder / "reports/leak/trials").iterdir())) == 4
    toml.write_text(toml.read_text().replace(DATA, "rows.jsonl"))
    refused = run(folder)
    assert refused.returncode == 3
    assert 'data.train: was "rows-***.jsonl", is "rows.jsonl"' in refused.stderr


def test_a_name_of_a_study_that_is_a_token_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "named.toml"
    file.write_text(f'[study]\nname = "{HUB}"\n[model]\nbase = "m"\n[data]\ntrain = "d"\n')
    with pytest.raises(StudyFileError, match=r"study\.name holds what looks like a credential"):
        load_study(file)


def test_a_credential_in_a_comment_is_noted_without_a_key(tmp_path: Path) -> None:
    file = tmp_path / "noted.toml"
    file.write_text(f'# {HUB}\n[model]\nbase = "m"\n[data]\ntrain = "d"\n')
    [note] = notes_on_credentials(load_study(file), file)
    assert "a comment holds what looks like a credential" in note
    assert HUB not in note
