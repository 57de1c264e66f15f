"""Merging: PEFT's unmerged forward pass is the witness, and a fresh process of plain transformers."""

import json
from dataclasses import replace
from pathlib import Path

import peft
import psutil
import pytest
import torch
import transformers
from finished_studies import finished_study
from safetensors.torch import load_file
from test_adapter_export import python, recorded_loss
from test_end_to_end import workplace as workplace  # the fixture

from lora_tune.errors import MachineError
from lora_tune.export.job import ExportJob, ExportResult
from lora_tune.export.merged import check_room, export, merge, merged_dtype
from lora_tune.records import EvalResult, StudySnapshot
from lora_tune.report.card import merged_card
from lora_tune.report.merging import MergeReport, MergeScores, merge_sentences
from lora_tune.stats.paired import paired_difference

SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 131}
CONFIGS = {
    "llama": transformers.LlamaConfig(
        **SIZES, intermediate_size=96, num_key_value_heads=2, initializer_range=0.2
    ),
    "llama with tied embeddings": transformers.LlamaConfig(
        **SIZES, intermediate_size=96, tie_word_embeddings=True, initializer_range=0.2
    ),
    "qwen2, which has biases": transformers.Qwen2Config(
        **SIZES, intermediate_size=96, num_key_value_heads=2, initializer_range=0.2
    ),
    "gpt2, whose layers are transposed": transformers.GPT2Config(
        n_embd=64, n_layer=2, n_head=4, vocab_size=131, n_positions=64, initializer_range=0.2
    ),
}
TARGETS = {"gpt2": ["c_attn", "c_fc"]}
IDS = torch.arange(3, 35)[None]


def base_and_adapter(config: transformers.PretrainedConfig, folder: Path) -> tuple[Path, Path]:
    """Write a random model in bfloat16 and a random adapter that changes it much."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    model.save_pretrained(folder / "base")
    targets = TARGETS.get(config.model_type, ["q_proj", "v_proj", "down_proj"])
    tuned = peft.get_peft_model(
        model,
        peft.LoraConfig(
            r=4,
            lora_alpha=8,
            target_modules=targets,
            task_type="CAUSAL_LM",
            fan_in_fan_out=config.model_type == "gpt2",
        ),
    )
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    tuned.save_pretrained(folder / "adapter")
    return folder / "base", folder / "adapter"


@torch.no_grad()
def logits_of(folder: Path, adapter: Path | None = None) -> torch.Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if adapter is not None:
        model = peft.PeftModel.from_pretrained(model, adapter)
    return model.eval()(input_ids=IDS).logits


def distance(first: torch.Tensor, second: torch.Tensor) -> float:
    return float((first - second).norm() / second.norm())


@pytest.mark.filterwarnings("ignore:fan_in_fan_out:UserWarning")
@pytest.mark.parametrize("name", CONFIGS)
def test_merged_logits_are_those_of_base_and_adapter(name, tmp_path):
    base, adapter = base_and_adapter(CONFIGS[name], tmp_path)
    wanted, bare = logits_of(base, adapter), logits_of(base)
    assert distance(wanted, bare) > 0.1  # the adapter does something
    for dtype, tolerance in {"float32": 1e-5, "bfloat16": 2e-2, "float16": 3e-3}.items():
        # Rounding a weight to 8 bits moves it by up to 0.4 %, to 11 bits by up to 0.05 %.
        out = tmp_path / dtype
        out.mkdir()
        merge(base, adapter, out, dtype=dtype)
        assert distance(logits_of(out), wanted) < tolerance, dtype
        assert distance(logits_of(out), wanted) < distance(wanted, bare) / 5


def test_tied_embeddings_stay_tied_and_only_targets_change(tmp_path):
    base, adapter = base_and_adapter(CONFIGS["llama with tied embeddings"], tmp_path)
    out = tmp_path / "out"
    out.mkdir()
    merge(base, adapter, out, dtype="bfloat16")
    before, after = load_file(base / "model.safetensors"), load_file(out / "model.safetensors")
    assert set(before) == set(after)
    assert "lm_head.weight" not in after
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name.split(".")[-2] for name in changed} == {"q_proj", "v_proj", "down_proj"}
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert model.lm_head.weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()


# A study's winner.


@pytest.fixture(scope="module")
def study(workplace: Path) -> StudySnapshot:
    return finished_study(workplace, "nf4")


@pytest.fixture(scope="module")
def merged(
    study: StudySnapshot, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, ExportResult, list[str]]:
    folder = tmp_path_factory.mktemp("merged")
    said: list[str] = []
    job = ExportJob(snapshot=study, folder=folder, gpu=None, note=said.append)
    return folder, export(job), said


def test_the_readme_shows_the_loss_before_and_after_with_its_interval(study, merged):
    folder, result, said = merged
    text = (folder / "README.md").read_text()
    before = f"{recorded_loss(study):#.4g}"  # computed anew, the same
    [row] = [line for line in text.splitlines() if line.startswith("| before")]
    assert "adapter on the NF4 base, as trained" in row
    assert f"| {before} (95 % interval" in row
    assert "merged less as trained, paired by row" in text
    assert any("trained on the NF4 base" in note for note in result.notes)
    assert any("Merging moved the loss on 16 confirmation rows" in note for note in result.notes)
    assert [text.split()[0] for text in said] == ["scoring", "merging", "scoring"]


LOSS_OF_MODEL = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
total, count = 0.0, 0
with torch.no_grad():
    for ids, labels in json.load(open(sys.argv[2])):
        logits = model(input_ids=torch.tensor([ids])).logits[0, :-1]
        target = torch.tensor(labels[1:])
        total += torch.nn.functional.cross_entropy(logits, target, ignore_index=-100, reduction="sum").item()
        count += int((target != -100).sum())
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "alpha beta"}], add_generation_prompt=True, return_tensors="pt")
    written = model.generate(**chat, max_new_tokens=4, do_sample=False)
print(repr(total / count), written.shape[1] - chat["input_ids"].shape[1])
"""


def test_the_merged_model_has_the_stated_loss_in_a_fresh_process(study, merged, tmp_path):
    from test_adapter_export import rows_file

    folder, _, _ = merged
    rows = rows_file(study, tmp_path / "rows.json")
    loss, written = python(LOSS_OF_MODEL, folder, rows, cwd=tmp_path).split()
    stated = (
        (folder / "README.md").read_text().split("    - type: loss\n      value: ")[1].split()[0]
    )
    assert float(loss) == pytest.approx(float(stated), rel=1e-5)
    assert 1 <= int(written) <= 4


def test_the_files_of_the_base_go_along(study, merged):
    folder, result, _ = merged
    base = study.folder.parents[1] / "model"
    assert (folder / "chat_template.jinja").read_text() == (
        base / "chat_template.jinja"
    ).read_text()
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    generation = "generation_config.json"
    assert (folder / generation).read_bytes() == (base / generation).read_bytes()
    assert set(result.files) == set(folder.iterdir())
    assert (folder / "model.safetensors").stat().st_mode & 0o044


def test_without_the_rows_it_is_merged_and_says_that_it_was_not_scored(study, tmp_path):
    data = replace(study.lock.data, sha256="0" * 64)
    other = replace(study, lock=replace(study.lock, data=data))
    tmp_path.joinpath("out").mkdir()
    job = ExportJob(snapshot=other, folder=tmp_path / "out", gpu=None, note=lambda text: None)
    notes = export(job).notes
    assert any("Its loss was not measured: rows.jsonl: the rows differ" in note for note in notes)
    text = (tmp_path / "out" / "README.md").read_text()
    assert "model-index" not in text
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_a_study_of_a_gpu_is_not_scored_on_a_cpu(study, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    plan = replace(study.lock.plan, device="cuda", compute_dtype="float16")
    other = replace(study, lock=replace(study.lock, plan=plan))
    assert merged_dtype(other) == "float16"
    tmp_path.joinpath("out").mkdir()
    job = ExportJob(snapshot=other, folder=tmp_path / "out", gpu=None, note=lambda text: None)
    notes = export(job).notes
    assert any("the study ran on cuda, and torch can use no GPU here" in note for note in notes)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}


@pytest.mark.parametrize(
    ("scored", "reason"),
    [
        ("base", "the base and its adapter do not fit the memory for scoring."),
        ("merged", "the merged model does not fit the memory for scoring."),
    ],
)
def test_a_merge_is_kept_when_scoring_runs_out_of_memory(
    study, tmp_path, monkeypatch, scored, reason
):
    out = tmp_path / "out"
    out.mkdir()
    load = transformers.AutoModelForCausalLM.from_pretrained

    def load_or_run_out(folder, **settings):
        for_scoring = settings["dtype"] is torch.float32
        if for_scoring and (Path(folder) == out) == (scored == "merged"):
            torch.empty(1 << 60)  # torch's own error
        return load(folder, **settings)

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", load_or_run_out)
    result = export(ExportJob(snapshot=study, folder=out, gpu=None, note=lambda text: None))
    assert f"Its loss was not measured: {reason}" in result.notes
    assert "model-index" not in (out / "README.md").read_text()
    assert (out / "model.safetensors").exists()


def test_another_fault_of_scoring_is_no_lack_of_memory(study, tmp_path, monkeypatch):
    def fail(folder, **settings):
        raise RuntimeError("shape mismatch")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", fail)
    job = ExportJob(snapshot=study, folder=tmp_path, gpu=None, note=lambda text: None)
    with pytest.raises(RuntimeError, match="shape mismatch"):
        export(job)


def test_memory_for_16_bit_alone_merges_without_scoring_in_32(study, tmp_path, monkeypatch):
    available = 3 * study.lock.model.num_parameters  # bytes; 2 are merged, 4 are scored
    memory = psutil.virtual_memory()._replace(available=available)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    job = ExportJob(snapshot=study, folder=tmp_path, gpu=None, note=lambda text: None)
    notes = export(job).notes
    assert any(
        "Its loss was not measured: the merged model does not fit the memory for scoring, which takes"
        in note
        for note in notes
    )
    assert (tmp_path / "model.safetensors").exists()


def test_a_model_too_large_for_the_machine_is_refused_before_it_is_loaded(study, tmp_path):
    model = replace(study.lock.model, num_parameters=10**15)
    with pytest.raises(MachineError, match=r"the merged model needs .* of memory"):
        check_room(replace(study, lock=replace(study.lock, model=model)), tmp_path)


def test_a_study_without_quantization_is_not_warned_about_it(workplace, tmp_path):
    study = finished_study(workplace, "none")
    tmp_path.joinpath("out").mkdir()
    job = ExportJob(snapshot=study, folder=tmp_path / "out", gpu=None, note=lambda text: None)
    result = export(job)
    assert not any("NF4" in note for note in result.notes)
    assert "before: adapter on the base, as trained" in (tmp_path / "out/README.md").read_text()


def test_what_is_special_about_rows_and_base_is_said():
    evaluation = EvalResult(
        split="confirmation", loss_sums=(2.0, 3.0), label_counts=(2, 2), compute_dtype="float32"
    )
    scores = MergeScores(
        as_trained=evaluation,
        merged=evaluation,
        difference=paired_difference(evaluation, evaluation),
    )
    plain = MergeReport(dtype="bfloat16", quantization="none", scores=scores)
    assert "no difference that these rows could show" in merge_sentences(plain)[-1]
    special = merge_sentences(replace(plain, refit=True, from_gguf=True))
    assert "trained on these rows too" in special[-1]
    assert any("quantized once already" in sentence for sentence in special)


def test_the_card_of_a_merged_refit_claims_no_loss(study):
    confirmation = study.confirmation
    assert confirmation is not None
    report = MergeReport(dtype="bfloat16", quantization="nf4", scores=None, reason="no rows.")
    refit = replace(study, confirmation=replace(confirmation, refit=True))
    assert "model-index" not in merged_card(refit, base_model="org/base", merge=report)
