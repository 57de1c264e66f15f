"""Running out of memory in every form in which libraries say it, in every place where it can happen.

A hook on a layer of a real tiny Llama raises the error in the middle of a pass, while tensors of the
pass are alive. Forms that a CPU can be made to raise are raised by torch, Python or the kernel themselves.
The witness of most tests is the same job in an executor that has all the memory it wants; the executor's
own guard compares the tensors that are left after every trial.
"""

import errno
import gc
import mmap
import os
import resource
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import tokenizers
import torch
import transformers
from safetensors import SafetensorError

from lora_tune.engine.base import BaseModel, load_base_model
from lora_tune.engine.memory_errors import is_out_of_memory
from lora_tune.engine.memory_reading import HostMeter
from lora_tune.engine.pack import PackSettings, TrialPack
from lora_tune.engine.probe import Probe, ProbeOptions
from lora_tune.errors import AllTrialsFailedError, MachineError
from lora_tune.executors.behaviour import BehaviourObserver, BehaviourPlan, Subject
from lora_tune.executors.in_process import InProcessExecutor
from lora_tune.executors.scorer import MetricScorer
from lora_tune.metrics import METRICS
from lora_tune.records import (
    UNTUNED,
    LaneJob,
    LaneOutcome,
    TargetSet,
    TokenizedRow,
    TrialConfig,
    TrialState,
)
from lora_tune.search.space import SearchSpace
from lora_tune.study.spec import SpaceSection

sys.path.append(str(Path(__file__).parents[1] / "search"))

from table_study import SEED, Disk, drive, make_ladder, new_study

SETTINGS = PackSettings(
    effective_batch_size=4, micro_batch_size=2, max_grad_norm=1.0, weight_decay=0.0, group_rank=64
)
MODULES = tuple(
    f"model.layers.{n}.self_attn.{name}" for n in (0, 1) for name in ("q_proj", "v_proj")
)


class KilledRows(torch.utils.data.Dataset):
    """Rows that kill the process which reads them, as the kernel does when the host's memory is gone."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, number: int) -> int:
        os.kill(os.getpid(), signal.SIGKILL)
        return number


def raised(error: BaseException) -> Callable[[], None]:
    """Return what raises an error of these words: a CPU cannot be made to say them by itself."""

    def fail() -> None:
        raise type(error)(*error.args)

    return fail


def torch_asks_for_too_much() -> None:
    torch.empty(1 << 58)


def python_asks_for_too_much() -> None:
    bytearray(1 << 60)


def a_data_loader_worker_is_killed() -> None:
    next(iter(torch.utils.data.DataLoader(KilledRows(), num_workers=1)))


# The twelve forms, as they were seen from torch on CUDA, ROCm and a CPU.
FORMS: dict[str, Callable[[], None]] = {
    "1 torch.OutOfMemoryError": raised(
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total")
    ),
    "2 CUDA out of memory": raised(RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB")),
    "3 CUDA error": raised(RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be")),
    "4 CUDA driver error": raised(RuntimeError("CUDA driver error: out of memory")),
    "5 torch.AcceleratorError": raised(torch.AcceleratorError("CUDA error: out of memory")),
    "6 CUBLAS_STATUS_ALLOC_FAILED": raised(
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
    ),
    "7 CUDNN_STATUS_ALLOC_FAILED": raised(
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED")
    ),
    "8 CUDNN_STATUS_NOT_SUPPORTED": raised(
        RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. This error may appear if you passed")
    ),
    "9 HIP out of memory": raised(RuntimeError("HIP out of memory. Tried to allocate 1.00 GiB")),
    "10 DefaultCPUAllocator": torch_asks_for_too_much,
    "11 MemoryError": python_asks_for_too_much,
    "12 data-loader worker killed": a_data_loader_worker_is_killed,
}  # fmt: skip

SOME_FORMS = tuple(FORMS)[::5]  # where all forms meet the same handler as in a step


def error_of(fail: Callable[[], None]) -> Exception:
    try:
        fail()
    except Exception as error:
        return error
    raise AssertionError("nothing failed")


def explicit(error: Exception, cause: BaseException) -> Exception:
    """Return an error as ``raise error from cause`` leaves it."""
    error.__cause__ = cause
    return error


# Recognised, and not.


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_recognised(form: str) -> None:
    assert is_out_of_memory(error_of(FORMS[form]))


def test_the_words_that_a_cpu_says_by_itself_are_those_of_the_list() -> None:
    assert "DefaultCPUAllocator: can't allocate memory" in str(error_of(torch_asks_for_too_much))
    assert type(error_of(python_asks_for_too_much)) is MemoryError
    killed = error_of(a_data_loader_worker_is_killed)
    texts = f"{killed} {killed.__cause__}"
    assert "is killed by signal: Killed" in texts


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[enforce fail] out of memory: C10 Out of Memory. Trying to allocate 8 bytes"),
        RuntimeError("XPU out of memory. Tried to allocate 1.00 GiB"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        RuntimeError("std::bad_alloc"),
        SafetensorError("I/O error: Cannot allocate memory (os error 12)"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
    ],
    ids=str,
)
def test_further_words_for_it_are_known_too(error: Exception) -> None:
    assert is_out_of_memory(error)


def test_the_kernel_s_refusal_to_map_memory_counts() -> None:
    assert is_out_of_memory(error_of(lambda: mmap.mmap(-1, 1 << 60)))


NOT_MEMORY = [
    RuntimeError("mat1 and mat2 shapes cannot be multiplied (3x2 and 3x2)"),
    RuntimeError("CUDA error: device-side assert triggered\nCUDA kernel errors might be reported"),
    torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
    torch.AcceleratorError("CUDA error: unspecified launch failure"),
    RuntimeError("CUDA error: no kernel image is available for execution on the device"),
    RuntimeError("out of resource: shared memory, Required: 114688, Hardware limit: 101376."),
    RuntimeError("DataLoader worker (pid 4711) is killed by signal: Segmentation fault. "),
    RuntimeError("DataLoader worker (pid 4711) is killed by signal: Bus error. "),
    OSError(errno.ENOSPC, "No space left on device"),
    ValueError("array is too big; the story of a man who ran out of memory"),
    AllTrialsFailedError("none of the 3 trials can be recommended. Reasons: out of memory as the only lane"),
    MachineError("the base and its adapter do not fit: out of memory"),
]  # fmt: skip


@pytest.mark.parametrize("error", NOT_MEMORY, ids=lambda error: str(error)[:60])
def test_other_errors_are_not_about_memory(error: Exception) -> None:
    assert not is_out_of_memory(error)


@pytest.mark.parametrize("text", ["CUDNN_STATUS_NOT_SUPPORTED", "CUBLAS_STATUS_NOT_INITIALIZED"])
def test_words_with_two_meanings_count_only_on_a_device_that_is_nearly_full(text: str) -> None:
    error = RuntimeError(f"cuDNN error: {text}. This error may appear if you passed in")
    assert is_out_of_memory(error, free=lambda: 0.01)
    assert not is_out_of_memory(error, free=lambda: 0.6)
    assert is_out_of_memory(RuntimeError("CUDA error: out of memory"), free=lambda: 0.6)


@pytest.mark.parametrize("form", FORMS)
def test_the_error_that_another_was_raised_from_counts(form: str) -> None:
    cause = error_of(FORMS[form])
    assert is_out_of_memory(explicit(RuntimeError("the step failed"), cause))
    assert is_out_of_memory(explicit(KeyError("k"), explicit(RuntimeError("inner"), cause)))


def test_an_error_that_happened_while_memory_was_being_freed_is_its_own() -> None:
    def fail() -> None:
        try:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        except torch.OutOfMemoryError:
            raise KeyError("a bug in the handler")  # noqa: B904

    error = error_of(fail)
    assert isinstance(error.__context__, torch.OutOfMemoryError)
    assert not is_out_of_memory(error)


def test_a_group_counts_when_all_of_it_is_about_memory() -> None:
    memory, bug = MemoryError(), ValueError("bug")
    assert is_out_of_memory(ExceptionGroup("tasks", [memory, torch.OutOfMemoryError("CUDA")]))
    assert is_out_of_memory(ExceptionGroup("tasks", [ExceptionGroup("inner", [memory])]))
    assert not is_out_of_memory(ExceptionGroup("tasks", [memory, bug]))


def test_a_message_for_the_user_that_was_made_of_it_stays_one() -> None:
    assert not is_out_of_memory(explicit(MachineError("the base does not fit"), MemoryError()))


# Handled by the executor, on a model whose layer runs out of memory in the middle of a pass.


@pytest.fixture(scope="module")
def small_collections() -> Iterator[None]:
    """Let the collector, which the executor runs after every failure, look at what these tests make alone."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def base(tiny_llama: Path, small_collections: None) -> BaseModel:
    return load_base_model(tiny_llama, quantization="none", compute_dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def splits(make_rows: Callable[..., tuple[TokenizedRow, ...]]) -> dict[str, Any]:
    return {
        "train": make_rows(16, seed=1),
        "selection": make_rows(5, seed=2),
        "confirmation": make_rows(5, seed=3),
    }


@contextmanager
def full_device(
    base: BaseModel, fails: Callable[[], bool], error: Callable[[], None]
) -> Iterator[list[int]]:
    """Let the second layer run out of memory in passes of which ``fails`` says so; yield their lanes."""
    seen: list[int] = []

    def hook(*_: object) -> None:
        if fails():
            seen.append(len(base.layout.adapters))
            error()

    handle = base.model.get_submodule("model.layers.1").register_forward_pre_hook(hook)
    try:
        yield seen
    finally:
        handle.remove()


def more_than(most: int, base: BaseModel, *, training: bool = True) -> Callable[[], bool]:
    layout = base.layout
    return lambda: layout.training is training and len(layout.adapters) > most


def make_job(trial: int, *, rank: int = 4, steps: int = 2, **changes: Any) -> LaneJob:
    config = TrialConfig(
        rank=rank,
        lora_alpha=8.0,
        lora_dropout=0.1 * (trial % 2),
        target_set="attention-qv",
        target_modules=MODULES,
        learning_rate=1e-3 * (1 + trial),
        init_seed=trial,
        dropout_seed=trial,
        data_seed=7,
    )
    job = LaneJob(
        trial=trial,
        rung=0,
        config=config,
        start_step=0,
        hold_step=1,
        end_step=steps,
        warmup_steps=1,
        eval_split="selection",
        eval_dtype="train",
        start_folder=None,
        result_folder=None,
    )
    return replace(job, **changes)


def make_executor(
    base: BaseModel, splits: dict[str, Any], lanes: int, **keys: Any
) -> InProcessExecutor:
    pack = TrialPack(base, splits["train"], SETTINGS)
    return InProcessExecutor(pack, splits, lanes=lanes, base_model=None, meter=HostMeter(), **keys)


def finish(executor: InProcessExecutor, jobs: Sequence[LaneJob]) -> dict[int, LaneOutcome]:
    for job in jobs:
        executor.submit(job)
    found = {}
    while executor.busy:
        found |= {outcome.trial: outcome for outcome in executor.wait()}
    return found


JOBS = [make_job(number) for number in range(4)]


@pytest.fixture(scope="module")
def undisturbed(base: BaseModel, splits: dict[str, Any]) -> dict[int, LaneOutcome]:
    return {job.trial: finish(make_executor(base, splits, 1), [job])[job.trial] for job in JOBS}


def assert_same_losses(found: LaneOutcome, wanted: LaneOutcome) -> None:
    assert found.state is wanted.state is TrialState.COMPLETE
    losses, expected = ([p.train_loss for p in o.points] for o in (found, wanted))
    # products of other heights round otherwise
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    assert found.evaluation is not None
    assert wanted.evaluation is not None
    np.testing.assert_allclose(found.evaluation.loss_sums, wanted.evaluation.loss_sums, rtol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_a_pack_is_halved_and_every_lane_ends_as_if_it_had_been_alone(
    base, splits, undisturbed, form: str
) -> None:
    executor = make_executor(base, splits, 4)
    with full_device(base, more_than(1, base), FORMS[form]) as lanes_of_failures:
        found = finish(executor, JOBS)
    assert lanes_of_failures == [4, 2]
    assert executor.max_lanes == 1
    assert sorted(found) == [0, 1, 2, 3]
    for job in JOBS:
        assert_same_losses(found[job.trial], undisturbed[job.trial])


@pytest.mark.parametrize("form", FORMS)
def test_a_lane_that_does_not_fit_alone_is_infeasible_and_the_others_end_well(
    base, splits, undisturbed, form: str
) -> None:
    large = make_job(9, rank=32)
    layout = base.layout

    def holds_the_large_one() -> bool:
        return any(a is not None and a.config.rank == 32 for a in layout.adapters)

    executor = make_executor(base, splits, 2)
    with full_device(base, holds_the_large_one, FORMS[form]):
        found = finish(executor, [JOBS[0], large, JOBS[1]])
    assert found[9].state is TrialState.INFEASIBLE
    assert found[9].reason == "out of memory as the only lane, at step 0"
    assert found[9].peak_bytes > 0
    assert found[9].evaluation is None
    for number in (0, 1):
        assert_same_losses(found[number], undisturbed[number])


@pytest.mark.parametrize("form", SOME_FORMS)
def test_an_evaluation_that_does_not_fit_is_done_with_fewer_lanes(
    base, splits, undisturbed, form: str
) -> None:
    executor = make_executor(base, splits, 2)
    with full_device(base, more_than(1, base, training=False), FORMS[form]) as lanes_of_failures:
        found = finish(executor, JOBS[:2])
    assert lanes_of_failures == [2]
    for number in (0, 1):
        assert_same_losses(found[number], undisturbed[number])


def test_an_untuned_base_that_cannot_be_evaluated_says_why(base, splits) -> None:
    job = make_job(-1, config=None, end_step=0, hold_step=0)
    with full_device(base, lambda: True, FORMS["10 DefaultCPUAllocator"]):
        [outcome] = finish(make_executor(base, splits, 2), [job]).values()
    assert outcome.state is TrialState.INFEASIBLE
    assert outcome.reason == "out of memory as the only lane, at step 0"


@pytest.mark.parametrize("error", NOT_MEMORY, ids=lambda error: str(error)[:60])
def test_an_error_that_is_not_about_memory_ends_the_executor_with_its_own_words(
    base, splits, error: Exception
) -> None:
    with full_device(base, lambda: True, raised(error)), pytest.raises(type(error)) as found:
        finish(make_executor(base, splits, 2), JOBS[:2])
    assert str(found.value) == str(error)
    base.layout.clear()


def test_a_search_that_runs_out_of_memory_again_and_again_comes_to_its_end(
    base, splits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real ladder, real Optuna, real lanes; twelve forms in turn, and rank 16 never fits."""
    monkeypatch.chdir(tmp_path)
    names = {"attention-qv": MODULES, "attention-q": MODULES[::2]}
    sets = tuple(
        TargetSet(name=name, modules=modules, max_rank=16, trainable_parameters_per_rank=128)
        for name, modules in names.items()
    )
    section = SpaceSection.model_validate(
        {"rank": (4, 8, 16), "target_modules": list(names), "learning_rate": (1e-4, 2e-3)}
    )
    layout, forms = base.layout, cycle(FORMS.values())

    def does_not_fit() -> bool:
        adapters = [a for a in layout.adapters if a is not None]
        return len(adapters) > 2 or any(a.config.rank == 16 for a in adapters)

    study, disk = new_study(), Disk()
    ladder = make_ladder(
        study,
        disk,
        num_trials=10,
        seed=5,
        rungs=(2, 4),
        window=4,
        num_anchors=0,
        anchors=[],
        space=SearchSpace(section, sets, seed=SEED),
    )
    executor = make_executor(base, splits, 4)
    with full_device(base, does_not_fit, lambda: next(forms)()) as lanes_of_failures:
        assert drive(ladder, executor)  # type: ignore[arg-type]
    finalists = ladder.finalists(2)
    assert len(lanes_of_failures) >= 3
    states = {record.number: record.state for record in disk.records.values()}
    assert len(states) >= 8
    large = [n for n, record in disk.records.items() if record.config.rank == 16]
    assert large
    told = study.get_trials()
    for number, record in disk.records.items():
        if number in large:
            assert states[number] in (TrialState.INFEASIBLE, TrialState.CACHED)
            assert told[number].state is optuna.trial.TrialState.PRUNED
            assert told[number].constraints["vram_excess_bytes"] > 0
            assert record.penalty is not None
            assert np.isfinite(record.penalty)
        else:
            assert states[number] not in (TrialState.INFEASIBLE, TrialState.RUNNING)
    assert {record.config.rank for record in finalists} <= {4, 8}


# Elsewhere: answers, the probe, the look at the winner, and loading the base.


@pytest.fixture(scope="module")
def tokenizer() -> transformers.PreTrainedTokenizerFast:
    vocab = {f"w{number}": number for number in range(131)}
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="w0"))
    core.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="w0", eos_token="w2"
    )


@contextmanager
def small_cache(base: BaseModel, most: int, error: Callable[[], None]) -> Iterator[list[int]]:
    """Let the second layer run out of memory with more than ``most`` rows, while answers are written."""
    seen: list[int] = []

    def hook(_: object, args: tuple[torch.Tensor, ...]) -> None:
        if len(args[0]) > most:
            seen.append(len(args[0]))
            error()

    handle = base.model.get_submodule("model.layers.1").register_forward_pre_hook(hook)
    try:
        yield seen
    finally:
        handle.remove()


@pytest.mark.parametrize("form", SOME_FORMS)
def test_answers_are_written_in_smaller_batches(base, splits, tokenizer, form: str) -> None:
    rows = splits["confirmation"]
    wanted = MetricScorer(base, tokenizer, METRICS, max_new_tokens=3).answers(None, rows)
    scorer = MetricScorer(base, tokenizer, METRICS, max_new_tokens=3)
    with small_cache(base, 2, FORMS[form]) as rows_of_failures:
        assert scorer.answers(None, rows) == wanted
    assert rows_of_failures == [5]
    assert scorer.writer.batch_rows == 2
    with small_cache(base, 0, FORMS[form]):
        [result] = scorer.score(None, rows, ["rouge-l"])
    assert (result.values, result.mean) == ((), None)
    assert result.reason == "out of memory while writing the answer to a single row"


@pytest.mark.parametrize("form", SOME_FORMS)
def test_the_probe_keeps_what_fits(base, splits, form: str) -> None:
    config = make_job(0).config
    assert config is not None
    options = ProbeOptions(
        micro_batch_sizes=(2,),
        most_lanes=lambda _: 4,
        compute_dtypes=("float32",),
        study_tokens=1e12,
    )
    before = HostMeter().allocated_beside([])
    with full_device(base, more_than(1, base), FORMS[form]):
        found = Probe(base, splits["train"], SETTINGS, config, options).run()
    assert (found.lanes, found.micro_batch_size) == (1, 2)
    assert [(r.lanes, r.out_of_memory) for r in found.readings] == [(1, False), (2, True)]
    with full_device(base, lambda: True, FORMS[form]):
        nothing = Probe(base, splits["train"], SETTINGS, config, options).run()
    assert (nothing.lanes, [r.out_of_memory for r in nothing.readings]) == (1, [True])
    gc.collect()
    assert HostMeter().allocated_beside([]) <= before


@pytest.mark.parametrize("form", SOME_FORMS)
def test_the_look_at_the_winner_gives_a_reason_and_leaves_the_base_whole(
    base, splits, tokenizer, form: str
) -> None:
    rows = splits["confirmation"]
    pack = TrialPack(base, splits["train"], SETTINGS)
    [before] = pack.evaluate([None], rows, split="confirmation")
    observer = BehaviourObserver(
        pack, tokenizer, BehaviourPlan(num_samples=1, max_length=32, seed=0)
    )
    with full_device(base, lambda: True, FORMS[form]):
        found = observer.observe(
            [Subject(UNTUNED, None, None)], rows, chosen="trial 1", default=None
        )
    assert (found.samples, found.general_losses) == ((), ())
    assert found.reason.count("out of memory") == 2
    assert pack.evaluate([None], rows, split="confirmation") == [before]


@contextmanager
def address_space(more_bytes: int) -> Iterator[None]:
    """Let this process map so much more, as ``ulimit -v`` does, and no more."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + more_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def test_a_base_that_does_not_fit_the_machine_is_one_message(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(
        vocab_size=60_000,
        hidden_size=512,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    gc.collect()
    with address_space(64 * 1024**2), pytest.raises(MachineError) as found:
        load_base_model(tmp_path, quantization="none", compute_dtype="float32", device="cpu")
    assert str(found.value).startswith(f"{tmp_path}: this machine's memory ran out while the base")
    assert 'model.quantization = "nf4"' in str(found.value)
    assert "\n" not in str(found.value)
    assert found.value.__cause__ is not None
