"""A whole study, watched: the confirmation split is read by nothing before the search has ended."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from test_end_to_end import copy_of
from test_end_to_end import workplace as workplace  # the fixture
from test_going_on import run

from lora_tune.engine.pack import TrialPack
from lora_tune.executors.in_process import InProcessExecutor
from lora_tune.executors.scorer import MetricScorer
from lora_tune.records import LaneJob, StudySnapshot, TokenizedRow

Rows = frozenset[tuple[int, ...]]


class Watched:
    """What a study did, in order: its jobs, and the rows that were trained, evaluated and answered."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.jobs: list[LaneJob] = []
        self.packs: list[tuple[int, Rows]] = []  # jobs so far, rows to train on
        self.read: list[tuple[str, int, Rows]] = []  # by whom, jobs so far, rows
        submit, make = InProcessExecutor.submit, TrialPack.__init__
        evaluate, score = TrialPack.evaluate, MetricScorer.score

        def watched_submit(executor: InProcessExecutor, job: LaneJob) -> None:
            self.jobs.append(job)
            submit(executor, job)

        def watched_make(pack: TrialPack, base: Any, rows: Any, *rest: Any, **named: Any) -> None:
            self.packs.append((len(self.jobs), ids_of(rows)))
            make(pack, base, rows, *rest, **named)

        def watched_evaluate(pack: TrialPack, lanes: Any, rows: Any, **named: Any) -> Any:
            self.read.append(("evaluation", len(self.jobs), ids_of(rows)))
            return evaluate(pack, lanes, rows, **named)

        def watched_score(scorer: MetricScorer, adapter: Any, rows: Any, names: Any) -> Any:
            self.read.append(("metrics", len(self.jobs), ids_of(rows)))
            return score(scorer, adapter, rows, names)

        patch.setattr(InProcessExecutor, "submit", watched_submit)
        patch.setattr(TrialPack, "__init__", watched_make)
        patch.setattr(TrialPack, "evaluate", watched_evaluate)
        patch.setattr(MetricScorer, "score", watched_score)


def ids_of(rows: Sequence[TokenizedRow]) -> Rows:
    return frozenset(row.input_ids for row in rows)


@pytest.fixture(scope="module")
def watched(
    workplace: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Watched, StudySnapshot, Rows]:
    """A study with metrics and a refit; its confirmation rows as the data module gives them."""
    import contextlib

    import transformers

    from lora_tune.data import prepare_data
    from lora_tune.study.loader import load_study

    folder = copy_of(workplace, tmp_path_factory.mktemp("watched") / "run")
    more = '2\nrefit = "all-rows"\nmetrics = ["exact-match"]\nmax_new_tokens = 4'
    with pytest.MonkeyPatch.context() as patch:
        seen = Watched(patch)
        snapshot = run(folder, trials="4", seeds=more)
    with contextlib.chdir(folder):
        spec = load_study(Path("going.toml"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "model")
    data = prepare_data(spec.data, tokenizer=tokenizer, seed=spec.study.seed, base_dir=folder)
    return seen, snapshot, ids_of(data.confirmation)


def test_the_search_reads_no_confirmation_row(watched) -> None:
    seen, snapshot, held_out = watched
    assert len(held_out) == 16
    of_search = [number for number, job in enumerate(seen.jobs, start=1) if job.trial >= 0]
    assert of_search == list(
        range(1, len(of_search) + 1)
    )  # all before the first of the confirmation
    assert {job.eval_split for job in seen.jobs[: len(of_search)]} == {"selection"}
    before = [rows for _, number, rows in seen.read if number <= len(of_search)]
    assert before
    assert not any(rows & held_out for rows in before)
    assert any(rows & held_out for _, number, rows in seen.read if number > len(of_search))
    assert len(snapshot.trials) == 4


def test_nothing_but_the_refit_trains_on_confirmation_rows(watched) -> None:
    seen, snapshot, held_out = watched
    with_them = [number for number, rows in seen.packs if rows & held_out]
    assert with_them == [len(seen.jobs) - 1]  # made after all jobs but the last, the refit's
    assert len(seen.packs) > len(with_them)
    assert snapshot.confirmation is not None
    assert snapshot.confirmation.refit
    refit = seen.jobs[-1]
    assert (refit.eval_split, refit.metrics) == ("selection", ())


def test_metrics_are_measured_when_the_decision_is_made(watched) -> None:
    seen, snapshot, _ = watched
    last_run = max(
        number
        for number, job in enumerate(seen.jobs[:-1], start=1)
        if job.trial < 0 and job.end_step > job.start_step
    )
    answered = [number for who, number, _ in seen.read if who == "metrics"]
    assert answered
    assert min(answered) > last_run
    confirmation = snapshot.confirmation
    assert confirmation is not None
    assert confirmation.decision is not None
    assert confirmation.base_metrics
    for score in confirmation.decision.scores:
        measured = [run.seed for run in confirmation.runs_of(score.candidate) if run.metrics]
        assert measured == [score.median_seed]


def test_fresh_seeds_are_those_of_no_trial_and_the_same_for_every_candidate(watched) -> None:
    seen, snapshot, _ = watched
    of_search = {seeds_of(job) for job in seen.jobs if job.trial >= 0}
    of_candidates: dict[tuple[object, ...], list[tuple[int, ...]]] = {}
    for job in seen.jobs[:-1]:
        if job.trial < 0 and job.end_step > job.start_step:
            assert job.config is not None
            key = (job.config.rank, job.config.target_set, job.config.learning_rate)
            of_candidates.setdefault(key, []).append(seeds_of(job))
    assert snapshot.confirmation is not None
    assert len(of_candidates) == len(snapshot.confirmation.candidates)
    [fresh] = {tuple(sorted(found)) for found in of_candidates.values()}
    assert len(set(fresh)) == 2
    assert not {seed for seeds in fresh for seed in seeds} & {
        seed for seeds in of_search for seed in seeds
    }


def seeds_of(job: LaneJob) -> tuple[int, ...]:
    assert job.config is not None
    return job.config.init_seed, job.config.dropout_seed, job.config.data_seed
