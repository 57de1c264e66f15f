"""Texts that would be markup or code, wherever a study may have them: the browser shows them as text."""

from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from chromium_pages import OpenPage, chromium, opened
from hostile_studies import HARMLESS, PAYLOADS, hostile_study, studies_of_hostile_trials
from playwright.sync_api import Browser

from lora_tune.report.formatting import visible_text
from lora_tune.report.study_page import render_html

# What stands in a plot is laid out by the length of its texts; its elements are looked at by their kind.
ELEMENTS = """() => [...document.querySelectorAll("*")]
  .filter((e) => !e.closest(".plot svg") && !e.matches("span.whole"))
  .map((e) => e.tagName + " " + e.getAttributeNames().sort().join(" "))"""
PLOT_ELEMENTS = """() => [...new Set([...document.querySelectorAll(".plot svg, .plot svg *")]
  .map((e) => e.tagName))]"""
SHAPES = {
    "svg",
    "g",
    "path",
    "text",
    "tspan",
    "line",
    "rect",
    "defs",
    "clipPath",
    "linearGradient",
    "stop",
}
LINKS = """() => [...document.querySelectorAll("[href], [src]")]
  .map((e) => e.getAttribute("href") ?? e.getAttribute("src")).filter((url) => !url.startsWith("#"))"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as found:
        yield found


def show(browser: Browser, folder: Path, text: str) -> AbstractContextManager[OpenPage]:
    """Open the page of a study with a text everywhere, plots left out."""
    path = folder / "report.html"
    path.write_text(render_html(hostile_study(text), charts=()), encoding="utf-8")
    return opened(browser, path)


@pytest.fixture(scope="module")
def harmless(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> Counter[str]:
    """The elements of a page whose foreign texts are plain words."""
    with show(browser, tmp_path_factory.mktemp("harmless"), HARMLESS) as found:
        return Counter(found.page.evaluate(ELEMENTS))


@pytest.mark.parametrize("payload", PAYLOADS, ids=range(len(PAYLOADS)))
def test_a_hostile_text_is_shown_and_does_nothing(browser, tmp_path, harmless, payload):
    with show(browser, tmp_path, payload) as found:
        page = found.page
        assert found.messages == []
        assert found.violations == []
        assert found.requests == [page.url]
        assert Counter(page.evaluate(ELEMENTS)) == harmless
        assert page.evaluate(LINKS) == ["data:,"]
        assert page.evaluate("document.querySelector('.sample .text').textContent") == visible_text(
            payload
        )
        assert page.is_visible("h1")


@pytest.mark.parametrize("study", studies_of_hostile_trials(), ids=["first", "second", "third"])
def test_plots_of_trials_with_hostile_names_are_drawn_and_do_nothing(browser, tmp_path, study):
    path = tmp_path / "report.html"
    path.write_text(render_html(study), encoding="utf-8")
    with opened(browser, path) as found:
        found.wait_for_charts("light")
        assert found.messages == []
        assert found.violations == []
        assert found.requests == [found.page.url]
        assert set(found.page.evaluate(PLOT_ELEMENTS)) <= SHAPES
        assert found.page.evaluate(LINKS) == ["data:,"]


def test_a_tooltip_shows_a_hostile_name_as_text(browser, tmp_path):
    path = tmp_path / "report.html"
    path.write_text(render_html(hostile_study("<img src=x onerror=alert(1)>")), encoding="utf-8")
    with opened(browser, path) as found:
        found.wait_for_charts("light")
        page = found.page
        page.locator("#chart-loss-memory").scroll_into_view_if_needed()
        page.locator("#chart-loss-memory svg .role-mark.mark-symbol > *").last.hover(force=True)
        page.wait_for_selector("#vg-tooltip-element.visible")
        assert "<img src=x" in page.inner_text("#vg-tooltip-element")
        assert page.locator("#vg-tooltip-element img").count() == 0
        assert found.messages == []


@pytest.mark.parametrize("payload", ["long " + "x" * 4000, "\u0645\u0631\u062d\u0628\u0627 " * 300])
def test_a_long_text_does_not_widen_a_phone(browser, tmp_path, payload):
    path = tmp_path / "report.html"
    path.write_text(render_html(hostile_study(payload)), encoding="utf-8")
    with opened(browser, path, width=360, height=740) as found:
        found.wait_for_charts("light")
        assert found.page.evaluate("document.documentElement.scrollWidth") == 360
