"""Adapters that are being published when the writer is killed: no half one is seen, no good one is lost.

The witness reads the adapter as any program would (safetensors and JSON) and knows from the values
which generation each part is of. PEFT's own ``save_pretrained`` goes through the same kills, which shows that
they strike.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from campaign_results import record

PROGRAM = Path(__file__).with_name("adapter_publisher.py")
CALLS = Path(__file__).with_name("counted_calls.c")

RANDOM = ("publish/fresh/random:8", "publish/over-good/random:8")
EVERY_CALL = (
    "publish/fresh/every-call",
    "publish/over-good/every-call",
    "publish/over-good/every-call/no-exchange",
    "peft/over-good/every-call",
)

Found = dict[str, dict[str, int]]


def results(folder: Path, *cases: str, **environ: str) -> Found:
    done = subprocess.run(
        [sys.executable, str(PROGRAM), str(folder), *cases],
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
        env=os.environ | environ,
    )
    assert done.returncode == 0, done.stderr
    found: Found = json.loads(done.stdout)
    return found


def counted_calls(folder: Path) -> str | None:
    """Return the library that kills before a call, built here; None without a compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        return None
    library = folder / "counted_calls.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, CALLS], check=True)
    return str(library)


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """What was found after all kills, by case: one program, since it imports PEFT for seconds."""
    folder = tmp_path_factory.mktemp("killed")
    library = counted_calls(folder)
    if library is None:
        return results(folder / "places", *RANDOM)
    return results(folder / "places", *RANDOM, *EVERY_CALL, LD_PRELOAD=library)


@pytest.mark.parametrize("case", RANDOM)
def test_a_writer_killed_at_random_moments_leaves_a_whole_adapter_or_none(
    killed: Found, case: str
) -> None:
    assert sum(killed[case].values()) == 8
    assert set(killed[case]) <= ({"whole", "none"} if "fresh" in case else {"whole"})


@pytest.mark.parametrize("case", EVERY_CALL)
def test_a_writer_killed_before_any_of_its_calls_leaves_a_whole_adapter_or_none(
    killed: Found, case: str
) -> None:
    if case not in killed:
        pytest.skip("no C compiler")
    found = killed[case]
    assert sum(found.values()) > 10
    if case.startswith("peft"):
        assert found["half"] > 0, "the kills strike nothing"
    elif "fresh" in case:
        assert set(found) == {"whole", "none"}
    elif "no-exchange" in case:  # there is one moment at which the adapter is only aside
        assert set(found) == {"whole", "whole after tidying"}
        assert found["whole after tidying"] < 4
    else:
        assert set(found) == {"whole"}


@pytest.mark.campaign
def test_of_two_hundred_kills_none_leaves_half_an_adapter_or_destroys_one(tmp_path: Path) -> None:
    cases = [f"{kind}/{start}/random:100" for kind in ("publish", "peft") for start in STARTS]
    found = results(tmp_path / "places", *cases)
    ours = {start: found[f"publish/{start}/random:100"] for start in STARTS}
    theirs = {start: found[f"peft/{start}/random:100"] for start in STARTS}
    record(
        "publishing-kills",
        kills=sum(sum(case.values()) for case in ours.values()),
        half_adapters=sum(case.get("half", 0) for case in ours.values()),
        destroyed_adapters=ours["over-good"].get("none", 0) + ours["over-good"].get("half", 0),
        peft_half_adapters=theirs["fresh"].get("half", 0),
        peft_destroyed_adapters=theirs["over-good"].get("half", 0),
    )
    assert sum(ours["fresh"].values()) == sum(ours["over-good"].values()) == 100
    assert set(ours["fresh"]) <= {"whole", "none"}
    assert set(ours["over-good"]) == {"whole"}


STARTS = ("fresh", "over-good")
