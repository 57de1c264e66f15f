"""Hostile texts in the forms of the report beside the page: Markdown, model card, console, pictures.

Markdown is judged by what an independent CommonMark renderer makes of it, pictures by an XML parser.
"""

import re
import unicodedata
from collections import Counter
from functools import cache
from html.parser import HTMLParser
from io import StringIO
from xml.etree import ElementTree

import pytest
import yaml
from hostile_studies import HARMLESS, PAYLOADS, hostile_study, studies_of_hostile_trials
from markdown_it import MarkdownIt
from rich.console import Console

from lora_tune.report import model_card, print_report, render_markdown
from lora_tune.report.charts import chart_svg, study_charts

IDS = range(len(PAYLOADS))


class Elements(HTMLParser):
    """The elements of a text of HTML with the names of their attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()
        self.links: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found[f"{tag} {sorted(name for name, _ in attrs)}"] += 1
        self.links += [value or "" for name, value in attrs if name in ("href", "src")]


def rendered(markdown: str) -> Elements:
    """Return what a reader of the Markdown gets; HTML in it is let through, as a lax reader would."""
    return Elements(MarkdownIt("commonmark").enable(["table", "strikethrough"]).render(markdown))


def body(text: str) -> str:
    """Return a card without its front matter."""
    return text.split("\n---\n", 1)[1]


def front(text: str) -> dict[str, object]:
    """Return a card's front matter."""
    return yaml.safe_load(text.split("\n---\n")[0].removeprefix("---\n"))


@cache
def report_md(text: str) -> Elements:
    """Return report.md with a text everywhere, rendered."""
    return rendered(render_markdown(hostile_study(text)))


@cache
def card(text: str) -> str:
    """Return the model card with a text everywhere."""
    return model_card(hostile_study(text), base_model=text)


@cache
def printed(text: str, *, terminal: bool) -> str:
    """Return the console's report with a text everywhere."""
    console = Console(file=StringIO(), width=200, force_terminal=terminal, color_system="standard")
    print_report(hostile_study(text), console)
    return console.file.getvalue()


@pytest.mark.parametrize("payload", PAYLOADS, ids=IDS)
def test_report_md_renders_to_the_same_elements_and_has_no_link(payload):
    assert report_md(payload).found == report_md(HARMLESS).found
    assert report_md(payload).links == []


@pytest.mark.parametrize("payload", PAYLOADS, ids=IDS)
def test_the_model_card_renders_to_the_same_elements_and_keeps_its_front_matter(payload):
    found = rendered(body(card(payload)))
    assert found.found == rendered(body(card(HARMLESS))).found
    assert found.links == []
    assert front(card(payload)).keys() == front(card(HARMLESS)).keys()
    assert front(card(payload))["library_name"] == "peft"


def test_a_link_and_an_element_would_be_noticed():
    assert rendered("[x](javascript:1) <https://example.org>").links == ["https://example.org"]
    assert rendered("a <b>bold</b>").found != rendered("a bold").found


@pytest.mark.parametrize("payload", PAYLOADS, ids=IDS)
@pytest.mark.parametrize("terminal", [False, True])
def test_a_console_gets_no_command_and_no_style_from_a_text(payload, terminal):
    def styles(text: str) -> Counter[str]:
        return Counter(re.findall(r"\x1b\[([0-9;]*)m", text))

    shown = printed(payload, terminal=terminal)
    assert styles(shown).keys() <= styles(printed(HARMLESS, terminal=terminal)).keys()
    rest = re.sub(r"\x1b\[[0-9;]*m", "", shown)
    marks = {c for c in rest if unicodedata.category(c) in ("Cc", "Cs")} - {"\n"}
    assert marks == set()
    assert not any(unicodedata.bidirectional(c) in ("RLO", "RLI", "PDI", "PDF") for c in rest)
    if payload.startswith("[bold"):
        assert "[bold red]" in rest


@pytest.mark.parametrize("study", studies_of_hostile_trials(), ids=["first", "second", "third"])
def test_pictures_are_xml_without_scripts_links_or_entities(study):
    for chart in study_charts(study):
        picture = chart_svg(chart)
        assert "<!DOCTYPE" not in picture
        root = ElementTree.fromstring(picture)
        for element in root.iter():
            name = element.tag.rpartition("}")[2]
            assert name in {"svg", "g", "path", "text", "tspan", "rect", "line", "circle", "defs",
                            "clipPath", "linearGradient", "stop"}, name  # fmt: skip
            for key, value in element.attrib.items():
                assert not key.lower().startswith("on")
                assert key.rpartition("}")[2] not in ("href", "src")
                assert not re.search(r"url\((?!#)", value.replace("'", ""))
