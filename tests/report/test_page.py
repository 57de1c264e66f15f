"""report.html as text: its policy, its structure, what it says, its size.

What a browser makes of it is tested in ``tests/browser``.
"""

import base64
import hashlib
import json
import re
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from functools import cache
from html.parser import HTMLParser

import pytest
from hostile_studies import HARMLESS, PAYLOADS, hostile_study, studies_of_hostile_trials
from report_studies import (
    confirmed_study,
    finished_study,
    fruitless_study,
    half_confirmed_study,
    single_trial_study,
    unfinished_study,
)
from test_report_memory import reading
from test_report_memory import study as measured_study

from lora_tune.records import Behaviour, StudySnapshot, TrialState
from lora_tune.report import sections, wording
from lora_tune.report.charts import study_charts
from lora_tune.report.formatting import visible_text
from lora_tune.report.page import render_page
from lora_tune.report.page_facts import use_command
from lora_tune.report.page_trials import SORT_KEYS
from lora_tune.report.study_page import render_html
from lora_tune.report.summary import summarize
from lora_tune.report.tables import TRIAL_COLUMNS

STUDIES = {
    "finished": finished_study,
    "unfinished": unfinished_study,
    "half-confirmed": half_confirmed_study,
    "fruitless": fruitless_study,
    "single": single_trial_study,
}
VOID = {"meta", "link", "input", "br", "hr", "img"}


class Parsed(HTMLParser):
    """A page's elements with their attributes, and the text outside of scripts and styles."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.raw: dict[str, list[str]] = {"script": [], "style": []}
        self.words: list[str] = []
        self._open: list[str] = []
        self.feed(page)
        self.close()
        self.left_open = self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] in self.raw:
            self.raw[self._open[-1]].append(data)
        else:
            self.words.append(data)

    @property
    def text(self) -> str:
        """The words of the page, white space as one blank."""
        return " ".join(" ".join(self.words).split())

    def ids(self) -> list[str]:
        return [found["id"] or "" for _, found in self.elements if "id" in found]


@pytest.fixture(scope="module")
def parsed() -> dict[str, Parsed]:
    """The pages of all studies."""
    return {name: Parsed(render_html(make())) for name, make in STUDIES.items()}


def said(text: str) -> str:
    """Return a sentence as ``Parsed.text`` has it: where quantities are kept whole, blanks are the same."""
    return " ".join(text.split())


@pytest.mark.parametrize("name", STUDIES)
def test_the_policy_names_the_hash_of_each_script_and_style_and_nothing_else(parsed, name):
    page = parsed[name]
    meta = next(a for tag, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    rules = dict(rule.split(" ", 1) for rule in (meta["content"] or "").split("; "))
    assert rules.pop("default-src") == "'none'"
    assert rules.pop("img-src") == "data:"
    assert rules.pop("base-uri") == rules.pop("form-action") == "'none'"

    types = [a.get("type") for tag, a in page.elements if tag == "script"]
    running = [t for t, kind in zip(page.raw["script"], types, strict=True) if kind is None]
    assert set(types) <= {None, "application/json"}
    for rule, texts in (("script-src", running), ("style-src", page.raw["style"])):
        digests = [hashlib.sha256(text.encode()).digest() for text in texts]
        wanted = [f"'sha256-{base64.b64encode(d).decode()}'" for d in digests]
        assert rules.pop(rule).split() == wanted
    assert rules == {}


@pytest.mark.parametrize("name", STUDIES)
def test_no_attribute_runs_code_or_leads_out_of_the_file(parsed, name):
    for tag, attributes in parsed[name].elements:
        assert not any(key.startswith("on") or key == "style" for key in attributes), tag
        assert tag not in ("form", "iframe", "object", "embed", "base", "img")
        for key in ("href", "src", "action", "srcset"):
            assert (attributes.get(key) or "#").startswith(("#", "data:,"))


@pytest.mark.parametrize("name", STUDIES)
def test_elements_close_in_order_and_references_lead_somewhere(parsed, name):
    page = parsed[name]
    assert page.left_open == []
    ids = page.ids()
    assert len(ids) == len(set(ids))
    for tag, attributes in page.elements:
        for key in ("aria-labelledby", "aria-describedby", "aria-controls", "for"):
            assert set((attributes.get(key) or "").split()) <= set(ids), (tag, key)
        link = attributes.get("href") or ""
        assert not link.startswith("#") or link[1:] in ids


@pytest.mark.parametrize("name", STUDIES)
def test_headings_come_in_order_under_one_title(parsed, name):
    levels = [int(tag[1]) for tag, _ in parsed[name].elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in zip(levels, levels[1:], strict=False))


@pytest.mark.parametrize("name", STUDIES)
def test_every_section_is_in_the_contents_and_language_and_width_are_said(parsed, name):
    page = parsed[name]
    kinds = [tag for tag, _ in page.elements]
    sections_there = [f"#{a['id']}" for tag, a in page.elements if tag == "section"]
    nav = page.elements[kinds.index("nav") : kinds.index("main")]
    assert [a["href"] for tag, a in nav if tag == "a"] == sections_there
    assert ("html", {"lang": "en"}) in page.elements
    assert kinds.count("main") == kinds.count("nav") == 1
    assert any(a.get("name") == "viewport" for _, a in page.elements)


def test_the_page_says_what_report_md_says(parsed):
    study = finished_study()
    summary = summarize(study)
    text = parsed["finished"].text
    sentences = [
        wording.headline(summary),
        *wording.conclusions(summary),
        wording.cost_sentence(summary),
        wording.sizes_sentence(study),
        *wording.certainty(summary),
        *sections.metric_reasons(summary),
        sections.trials_caption(study, summary),
        sections.rungs_caption(summary),
        sections.probe_caption(study),
        sections.plan_sentence(study),
        sections.SCORES_CAPTION,
    ]
    squeezed = text.replace(" ", "")
    for sentence in sentences:
        assert sentence.replace(" ", "") in squeezed
    for table in (
        sections.settings_table(study, summary),
        sections.scores_table(summary),
        sections.candidates_table(summary),
        sections.metrics_table(summary),
        sections.trials_table(study),
        sections.rungs_table(summary),
        sections.memory_table(study, summary),
        sections.probe_table(study),
        sections.target_sets_table(study),
        sections.cost_table(summary),
        sections.data_table(study),
        sections.environment_table(study),
    ):
        assert table is not None
        for row in table.rows:
            assert said(" ".join(row)).replace(" ", "") in squeezed


def test_answers_sizes_and_forgetting_are_on_the_page(parsed):
    study = finished_study()
    assert isinstance(study.behaviour, Behaviour)
    text = parsed["finished"].text
    assert len(study.behaviour.samples) >= 5
    for sample in study.behaviour.samples:
        for found in (sample.prompt, sample.reference, *(a.text for a in sample.answers)):
            assert said(found) in text
    assert f"{study.adapter_bytes:,} bytes" in text
    assert f"{study.lock.model.base_bytes:,} bytes" in text
    assert "3.412" in text
    assert "3.446" in text
    assert "cut at 48 tokens" in text


def test_a_study_of_an_older_version_shows_neither_answers_nor_sizes():
    study = finished_study()
    lock = replace(study.lock, model=replace(study.lock.model, base_bytes=0))
    page = Parsed(render_html(replace(study, behaviour=None, adapter_bytes=0, lock=lock)))
    assert "What it answers" not in page.text
    assert "Sizes" not in page.text
    assert "Confirmed loss of trial 3" in page.text


def test_collapsed_answers_are_a_warning_on_the_first_screen():
    study = finished_study()
    assert study.behaviour is not None
    samples = tuple(
        replace(
            sample,
            answers=tuple(
                replace(a, text="the the the " * 30) if a.subject == "trial 3" else a
                for a in sample.answers
            ),
        )
        for sample in study.behaviour.samples
    )
    collapsed = replace(study.behaviour, samples=samples)
    page = render_html(replace(study, behaviour=collapsed), charts=())
    first_screen = page.split("</header>")[0].split("<header")[1]
    assert "Collapsed output of trial 3" in first_screen
    assert "Collapsed output" not in render_html(study, charts=()).split("</header>")[0]


def test_an_unfinished_study_is_marked_and_names_the_command_that_goes_on(parsed):
    page = parsed["unfinished"]
    assert "LoRA study docstrings (unfinished)" in page.text
    assert "Unfinished (7 of 12 trials" in page.text
    assert "lora-tune run studies/docstrings.toml" in page.text
    assert "lora-tune export" not in page.text
    assert "Load the adapter" not in page.text


def test_a_fruitless_study_shows_every_reason_and_nothing_to_use(parsed):
    page = parsed["fruitless"]
    assert "nothing succeeded" in page.text
    assert page.text.count("see log") == 12
    assert "lora-tune export" not in page.text
    assert "settings" not in page.ids()


def test_measured_packs_are_shown_beside_their_estimates():
    study = measured_study(reading(0.02), reading(0.05, trials=(2,)))
    page = Parsed(render_html(study, charts=()))
    table = sections.packs_table(study)
    assert table is not None
    for row in table.rows:
        assert "".join(row).replace(" ", "") in page.text.replace(" ", "")
    assert "Predicted and measured" in page.text


def test_a_default_that_was_chosen_and_was_no_trial_is_reported():
    study = confirmed_study({"default": (2.3, 2.31), "trial 3": (2.5, 2.52)}, default="default")
    page = Parsed(render_html(study, charts=()))
    assert "Use the default" in page.text
    assert not any(a.get("class") == "chosen" for tag, a in page.elements if tag == "tr")


def test_every_column_of_numbers_sorts_by_its_unrounded_value():
    assert {c.header for c in TRIAL_COLUMNS if c.numeric} == set(SORT_KEYS)
    study = finished_study()
    page = Parsed(render_html(study, charts=()))
    values = Counter(a["data-value"] for _, a in page.elements if "data-value" in a)
    for trial in study.trials:
        assert values[str(trial.config.learning_rate)] >= 1
        assert values[str(trial.predicted_bytes)] >= 1


def test_a_loss_that_is_not_finite_sorts_as_missing():
    study = finished_study()
    trial = study.trials[0]
    rungs = tuple(replace(r, eval_loss=float("nan")) for r in trial.rungs)
    broken = replace(trial, rungs=rungs, state=TrialState.DIVERGED)
    page = Parsed(render_html(replace(study, trials=(broken, *study.trials[1:])), charts=()))
    assert {"nan", "inf"}.isdisjoint(a.get("data-value") for _, a in page.elements)


@cache
def kinds(text: str) -> Counter[str]:
    """Return the elements of a page with a text everywhere, plots left out."""
    found = Parsed(render_html(hostile_study(text), charts=()))
    return Counter(f"{tag} {sorted(a)}" for tag, a in found.elements if a.get("class") != "whole")


@pytest.mark.parametrize("payload", PAYLOADS, ids=range(len(PAYLOADS)))
def test_hostile_text_leaves_the_elements_as_they_are(payload):
    assert kinds(payload) == kinds(HARMLESS)
    page = render_html(hostile_study(payload), charts=())
    assert page.count("<script") == page.count("</script>") == 1
    assert said(visible_text(payload)) in Parsed(page).text


def test_no_markup_can_begin_in_the_data_of_a_plot():
    for study in studies_of_hostile_trials():
        page = render_html(study)
        specs = re.findall('<script type="application/json"[^>]*>([^<]*)</script>', page)
        assert len(specs) == len(study_charts(study)) + 1  # and the colours
        for spec in specs:
            assert spec.isascii()
            assert not set("<>&") & set(spec)
            json.loads(spec)


def test_a_page_without_charts_carries_no_bundle():
    study = fruitless_study()
    assert len(render_html(study, charts=())) < 100_000
    assert len(render_html(finished_study())) > 900_000
    assert 'id="spec-' not in render_html(study, charts=())


def test_plots_that_could_not_be_made_are_named():
    problem = "The plots could not be made (ImportError: no <altair>)."
    page = Parsed(render_html(finished_study(), charts=(), problems=[problem]))
    assert problem in page.text
    assert "plots" not in page.ids()


def test_the_adapters_place_can_be_another():
    page = Parsed(render_html(finished_study(), charts=(), adapter="../docstrings/adapter"))
    assert 'PeftModel.from_pretrained(base, "../docstrings/adapter")' in page.text


def test_the_notes_on_loading_keep_their_code_and_a_gguf_name_is_text():
    study = finished_study()
    model = replace(study.lock.model, base="/m/`a`<b>.gguf", hub_id=None, revision=None)
    page = Parsed(render_html(replace(study, lock=replace(study.lock, model=model)), charts=()))
    assert "read the base from the file `a`<b>.gguf; put the folder" in page.text
    assert sum(tag == "b" for tag, _ in page.elements) == 0
    assert "module.support_avx512bf16_for_cpu = False on every" in page.text.replace(" .", ".")


@pytest.mark.parametrize(
    ("folder", "wanted"),
    [
        ("reports/docstrings", "docstrings"),
        ("/data/elsewhere/docstrings", "/data/elsewhere/docstrings"),
        ("runs/my study", "'runs/my study'"),
        ("runs/$(reboot)", "'runs/$(reboot)'"),
    ],
)
def test_the_command_names_the_study_so_that_a_shell_takes_it(folder, wanted):
    study = replace(finished_study(), folder=type(finished_study().folder)(folder))
    assert use_command(study.folder) == f"lora-tune export {wanted} --to vllm"


def test_a_template_needs_every_value_that_it_names():
    from jinja2 import UndefinedError

    with pytest.raises(UndefinedError):
        render_page("study.html.jinja", title="x")


def large_study(count: int) -> StudySnapshot:
    """Return the finished study with so many trials, each with a loss and a rate of its own."""
    study = finished_study()
    trials = list(study.trials)
    for number in range(len(trials), count):
        model = study.trials[number % 12]
        rate = model.config.learning_rate * (1 + number / 1000)
        rungs = tuple(replace(r, eval_loss=r.eval_loss + number / 5000) for r in model.rungs)
        config = replace(model.config, learning_rate=rate)
        trials.append(replace(model, number=number, origin="tpe", config=config, rungs=rungs))
    return replace(study, trials=tuple(trials))


def test_five_hundred_trials_stay_below_three_megabytes_and_are_made_in_a_second():
    study = large_study(500)
    charts = study_charts(study)
    render_html(finished_study())  # templates and the bundle are read once a process
    began = time.process_time()
    page = render_html(study, charts=charts)
    assert time.process_time() - began < 1.0
    assert len(page.encode("utf-8")) < 3_000_000
    assert page.count("data-state=") == 500


def test_the_page_is_made_without_torch_and_without_a_search():
    code = (
        "import sys; sys.path.insert(0, 'tests/report')\n"
        "from report_studies import finished_study\n"
        "from lora_tune.report.study_page import render_html\n"
        "assert '<!doctype html>' in render_html(finished_study())\n"
        "print([n for n in ('torch', 'peft', 'transformers', 'accelerate') if n in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.strip() == "[]"
