"""Charts as pictures and as a script: nothing foreign runs or is fetched, same input gives same bytes."""

import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from charts_studies import gpu_study, searched_study
from report_studies import finished_study

from lora_tune.records import StudySnapshot
from lora_tune.report.charts import (
    DARK_CONFIG,
    LIGHT_CONFIG,
    begin_bundle,
    chart_bundle,
    chart_svg,
    comparison_charts,
    study_charts,
)

SVG = "{http://www.w3.org/2000/svg}"
PAYLOADS = (
    "</script><script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    '"]; alert(1); ["',
    "datum['t'] + 1",
    "{{7*7}} ${7*7}",
    "]]><svg onload=alert(1)>",
    "javascript:alert(1)",
    "a\x00b\ufffe\ud800 \x1b[31m",
)


def poisoned(payload: str) -> StudySnapshot:
    """Return a study in which every text of a user is the payload."""
    study = gpu_study()
    trials = tuple(
        replace(t, reason=payload, origin=payload, config=replace(t.config, target_set=payload))
        if t.number % 2
        else t
        for t in study.trials
    )
    found = study.confirmation
    names = {candidate.name: f"{payload} {i}" for i, candidate in enumerate(found.candidates)}
    candidates = tuple(
        replace(c, name=names[c.name], config=replace(c.config, target_set=payload))
        for c in found.candidates
    )
    runs = tuple(replace(run, candidate=names[run.candidate]) for run in found.runs)
    decision = found.decision
    scores = tuple(replace(s, candidate=names[s.candidate]) for s in decision.scores)
    front = replace(decision.front, members=tuple(names[m] for m in decision.front.members))
    decision = replace(
        decision,
        scores=scores,
        best=names[decision.best],
        chosen=names[decision.chosen],
        default=names[decision.default],
        tied=tuple(names[name] for name in decision.tied),
        front=front,
    )
    return replace(
        study,
        lock=replace(study.lock, name=payload),
        trials=trials,
        confirmation=replace(
            found, candidates=candidates, runs=runs, decision=decision, default=decision.default
        ),
    )


def strings_in(value: object, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yield every text of a specification with the keys that lead to it."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from strings_in(item, (*path, key))
    elif isinstance(value, list):
        for item in value:
            yield from strings_in(item, path)
    elif isinstance(value, str):
        yield path, value


@pytest.mark.parametrize("payload", PAYLOADS)
def test_what_users_wrote_is_data_in_a_specification_and_text_in_a_picture(payload: str) -> None:
    study = poisoned(payload)
    other = replace(study, folder=study.folder / "b")
    charts = [*study_charts(study), *comparison_charts([study, other])]
    assert len(charts) == 9
    # a part that no filter changes: enough to find the payload again
    core = max(re.findall(r"[!-~]+", payload), key=len)[:12]
    found = 0
    for chart in charts:
        for path, text in strings_in(chart.spec):
            if core in text:
                found += 1
                is_row = path[0] == "datasets"
                is_domain = path[-1] in ("domain", "sort")
                assert is_row or is_domain or path == ("description",), path
        json.dumps(chart.spec, ensure_ascii=False).encode("utf-8")  # no lone surrogates
        root = ElementTree.fromstring(chart_svg(chart))
        tags = {element.tag.removeprefix(SVG) for element in root.iter()}
        assert tags <= {
            "svg",
            "g",
            "path",
            "text",
            "tspan",
            "line",
            "rect",
            "defs",
            "clipPath",
            "title",
        }
        for element in root.iter():
            assert not [name for name in element.attrib if name.startswith("on")]
    assert found > 20


def test_pictures_refer_to_nothing_outside() -> None:
    for chart in study_charts(gpu_study()):
        svg = chart_svg(chart)
        addresses = set(re.findall(r"[a-z]+://[^\"' )<]+", svg))
        assert addresses <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
        assert not re.search(r"(href|src)=|@import|@font-face|url\((?!#)", svg)


def test_a_picture_is_drawn_with_its_title_marks_and_axis_titles() -> None:
    chart = next(c for c in study_charts(finished_study()) if c.name == "learning-rate")
    root = ElementTree.fromstring(chart_svg(chart))
    texts = ["".join(element.itertext()) for element in root.iter(f"{SVG}text")]
    drawn = " ".join(texts)
    assert drawn.startswith("1e-4") or chart.title[:40] in drawn
    for text in ("learning rate", "loss at the first rung (nats per target token)", "trial 3"):
        assert text in texts
    labels = [element.get("aria-label", "") for element in root.iter()]
    assert sum("trial: trial " in label for label in labels) >= 9, "every trial has its mark"


def test_the_title_is_broken_into_lines_that_fit() -> None:
    chart = study_charts(finished_study())[1]
    long = replace(chart, title="word " * 60)
    root = ElementTree.fromstring(chart_svg(long))
    lines = ["".join(t.itertext()) for t in root.iter() if t.tag in (f"{SVG}text", f"{SVG}tspan")]
    assert max(len(line) for line in lines if line.startswith("word") and "\n" not in line) > 40
    assert float(root.attrib["width"]) < 720


SAME_BYTES = """
import hashlib, sys
sys.path.insert(0, "tests/report")
from report_studies import finished_study
from lora_tune.report.charts import chart_svg, study_charts
for chart in study_charts(finished_study()):
    print(chart.name, hashlib.sha256(chart_svg(chart).encode()).hexdigest())
"""


def test_another_process_draws_the_same_bytes() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SAME_BYTES],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "PYTHONHASHSEED": "7"},
    )
    own = [
        f"{chart.name} {hashlib.sha256(chart_svg(chart).encode()).hexdigest()}"
        for chart in study_charts(finished_study())
    ]
    assert done.stdout.splitlines() == own


def test_the_bundle_can_stand_in_a_script_element_and_is_made_once() -> None:
    begin_bundle()
    bundle = chart_bundle()
    assert chart_bundle() is bundle
    assert 500_000 < len(bundle) < 1_500_000
    assert not re.search(r"</script|<!--", bundle, re.IGNORECASE)
    assert bundle.startswith("(() => {")
    assert bundle.endswith("})();")
    assert "window.vegaEmbed" in bundle


def luminance(colour: str) -> float:
    """Return the relative luminance of WCAG 2.2."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(first: str, second: str) -> float:
    light, dark = sorted((luminance(first), luminance(second)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize(("config", "page"), [(LIGHT_CONFIG, "#ffffff"), (DARK_CONFIG, "#0d1117")])
def test_colours_stand_out_from_the_page(config: dict[str, Any], page: str) -> None:
    """WCAG 2.2 asks for 3 to 1 of graphics (1.4.11) and 4.5 to 1 of text (1.4.3)."""
    for colour in (*config["range"]["category"], "#808080", "#d55e00"):
        assert contrast(colour, page) >= 3, colour
    assert contrast(config["axis"]["labelColor"], page) >= 4.5
    assert contrast(config["range"]["ramp"][0], page) >= 7, "the best trials have the strong colour"


def test_pictures_of_500_trials_are_of_moderate_size() -> None:
    sizes = {chart.name: len(chart_svg(chart)) for chart in study_charts(searched_study(500))}
    assert sum(sizes.values()) < 3_000_000, sizes
