"""The replay on published tables: its reading, its counting, and what the ladder reaches on the shared table.

Counting is checked on tables made here whose best cell is known; the numbers on the shared table are the
ones that the search has to reach, for the anchors alone, which no seed changes.
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import optuna
import pytest
from search_replay import (
    NOT_REACHED,
    TABLE,
    Table,
    can_teach,
    is_full_grid,
    ladder_cells,
    learned_anchors,
    optuna_cells,
    portfolio,
    read_tables,
    regrets_by_trial,
    space_of,
    summarize,
    trials_to,
)

from lora_tune.search.anchors import make_anchors

SCRIPT = Path(TABLE).parents[1] / "search_replay.py"
RANKS, RATES = (2, 8, 32), (1e-4, 3e-4, 1e-3, 3e-3)
HEADER = "model,lr,lora_rank,replicate,test_nll,train_nll,wall_min,status"


@pytest.fixture(autouse=True)
def _quiet() -> None:
    optuna.logging.set_verbosity(optuna.logging.WARNING)


def made_table(model: str = "a/m", best: tuple[int, float] = (32, 1e-3)) -> Table:
    """Return a table that diverges at the highest rate; each step away from the best costs 1 or 2 %."""
    cells: dict[tuple[int, float], float | None] = {}
    for rank in RANKS:
        for rate in RATES:
            away = abs(RANKS.index(rank) - RANKS.index(best[0]))
            away += 2 * abs(RATES.index(rate) - RATES.index(best[1]))
            cells[rank, rate] = None if rate == 3e-3 else 1.0 + 0.01 * away
    return Table(model=model, cells=cells)


def written(path: Path, *rows: str, header: str = HEADER) -> Path:
    path.write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    return path


# Reading.


def test_the_table_beside_the_benchmark_is_the_published_one() -> None:
    tables = read_tables(TABLE)
    full = [table for table in tables if is_full_grid(table)]
    assert (len(tables), len(full)) == (16, 9)
    assert len({table.vendor for table in tables}) == 5
    assert (TABLE.parent / "README.md").is_file()
    assert "Apache License" in (TABLE.parent / "LICENSE-Apache-2.0.txt").read_text(encoding="utf-8")
    nano = next(t for t in tables if "Nano" in t.model)
    assert len(nano.cells) == 22  # two cells of its grid are missing


def test_runs_of_a_cell_are_averaged_and_one_that_diverged_decides(tmp_path: Path) -> None:
    path = written(
        tmp_path / "t.csv",
        "x/m,3e-4,16,0,1.0,1.0,5,ok",
        "x/m,0.0003,16,1,1.2,1.0,5,ok",
        "x/m,1e-3,16,0,1.1,1.0,5,ok",
        "x/m,1e-3,16,1,,,,diverged",
    )
    [table] = read_tables(path)
    assert table.cells == {(16, 3e-4): pytest.approx(1.1), (16, 1e-3): None}
    assert (table.vendor, table.best) == ("x", pytest.approx(1.1))


@pytest.mark.parametrize(
    ("header", "row", "message"),
    [
        ("model,lr,test_nll,status", "x/m,1e-4,1.0,ok", "no column lora_rank"),
        (HEADER, "x/m,fast,16,0,1.0,1.0,5,ok", "line 2"),
    ],
)
def test_a_table_that_cannot_be_read_is_named_with_the_reason(
    tmp_path: Path, header: str, row: str, message: str
) -> None:
    with pytest.raises(SystemExit, match=message):
        read_tables(written(tmp_path / "t.csv", row, header=header))


def test_a_proposal_is_answered_by_the_nearest_cell_rank_first() -> None:
    table = Table(model="m", cells={(4, 1e-4): 1.0, (64, 1e-4): 1.1, (64, 1e-3): 1.2})
    assert table.snap(128, 8e-4) == (64, 1e-3)
    assert table.snap(4, 1e-3) == (4, 1e-4)  # the rank's only cell, though the rate is far
    assert table.snap(15, 2e-4) == (4, 1e-4)
    assert table.snap(17, 4e-4) == (64, 1e-3)


# Counting.


def test_repeats_are_free_and_a_diverged_cell_is_a_failure() -> None:
    table = made_table()
    tried = [(2, 3e-3), (2, 3e-3), (2, 1e-4), (2, 1e-4), (32, 1e-3)]
    reached = regrets_by_trial(table, iter(tried))
    assert reached == pytest.approx([1.0, 0.06, 0.0])
    assert trials_to(reached, 0.002) == 3
    assert trials_to(reached[:2], 0.002) == NOT_REACHED == 20


def test_a_summary_reads_trials_and_regrets_in_percent() -> None:
    found = summarize([[0.03, 0.004, 0.0], [1.0, 1.0]])
    assert found["trials to 0.5%"] == (2 + 20) / 2
    assert found["trials to 1.0%"] == (2 + 20) / 2
    assert found["trials to 0.2%"] == (3 + 20) / 2
    assert found["regret % after 2"] == pytest.approx(100 * (0.004 + 1.0) / 2)
    assert found["regret % after 8"] == pytest.approx(100 * (0.0 + 1.0) / 2)


# Strategies.


def first_cells(cells: Iterator[tuple[int, float]], count: int) -> list[tuple[int, float]]:
    return list(islice(cells, count))


def test_the_ladder_begins_with_the_anchors_that_the_table_can_express() -> None:
    table = made_table()
    anchors = make_anchors(space_of(table), effective_batch_size=128, num_train=100_000)
    assert [anchor.name for anchor in anchors] == ["A1", "A2", "A3", "A4"]
    wanted = [(32, 3e-4), (32, 1e-3), (32, 1e-4), (2, 3e-4)]
    assert first_cells(ladder_cells(table, 0), 4) == wanted


@pytest.mark.parametrize("best", [(32, 3e-4), (8, 1e-4), (2, 1e-3)])
def test_every_strategy_finds_the_best_cell_of_a_small_table(best: tuple[int, float]) -> None:
    table = made_table(best=best)
    for cells in (
        ladder_cells(table, 3),
        ladder_cells(table, 3, anchors=(), sampler="grid"),
        optuna_cells(table, 3, sampler=lambda seed: optuna.samplers.RandomSampler(seed=seed)),
        optuna_cells(table, 3, sampler=lambda seed: optuna.samplers.TPESampler(seed=seed)),
    ):
        assert regrets_by_trial(table, cells)[-1] == 0


def test_a_strategy_is_the_same_again_with_the_same_seed() -> None:
    table = made_table()
    first = first_cells(ladder_cells(table, 5), 15)
    assert first_cells(ladder_cells(table, 5), 15) == first
    assert first_cells(ladder_cells(table, 6), 15) != first


def test_a_portfolio_learns_from_other_tables_what_is_good_there() -> None:
    others = [
        made_table("b/1", (32, 1e-4)),
        made_table("b/2", (32, 1e-4)),
        made_table("c/1", (2, 1e-3)),
    ]
    first, second, *_ = portfolio(others)
    assert first == (0, 1e-4)  # best on two of three
    assert second == (2, 1e-3)  # two notches below the largest rank: best on the third
    names = [anchor.params for anchor in learned_anchors(made_table(), others)]
    assert (names[0].rank, names[0].effective_step) == (32, 1e-4)
    assert (names[1].rank, names[1].effective_step) == (2, 1e-3)


# What has to be reached.


@pytest.mark.parametrize("left_out", [False, True], ids=["anchors", "vendor-left-out"])
def test_on_the_shared_table_the_ladder_is_within_half_a_percent_in_two_trials(
    left_out: bool,
) -> None:
    tables = read_tables(TABLE)
    needed = []
    for table in filter(is_full_grid, tables):
        others = [t for t in tables if t.vendor != table.vendor and can_teach(t)]
        anchors = learned_anchors(table, others) if left_out else None
        reached = regrets_by_trial(table, ladder_cells(table, 0, anchors=anchors))
        assert trials_to(reached, 0.005) <= 2, table.model
        needed.append(trials_to(reached, 0.002))
    assert sum(needed) / len(needed) <= 1.5


def test_the_command_prints_every_strategy_and_writes_the_result(tmp_path: Path) -> None:
    rows = [
        f"{model},{lr},{rank},0,{1 + 0.01 * rank / 8 + lr},1,1,ok"
        for model in ("v/full", "w/full")
        for lr in (1e-4, 2e-4, 4e-4, 8e-4)
        for rank in (1, 2, 4, 8)
    ]
    path = written(tmp_path / "t.csv", *rows, "v/small,1e-4,4,0,1.0,1,1,ok")
    output = tmp_path / "out.json"
    done = subprocess.run(
        [sys.executable, SCRIPT, "--table", path, "--seeds", "1", "--output", output],
        capture_output=True,
        text=True,
        check=True,
    )
    for name in ("ladder", "ladder, vendor left out", "random", "plain TPE", "grid"):
        assert done.stdout.count(f"| {name} |") == 3  # two models and the mean
    assert "skipped: v/small, 1 cells of the 15 that a replay needs" in done.stdout
    result = json.loads(output.read_text(encoding="utf-8"))
    assert result["models"].keys() == {"v/full", "w/full"}
    assert result["table"]["file"] == "t.csv"
    assert result["skipped"] == {"v/small": 1}
