"""report.html in a real browser, opened from disk without a network: plots, tables, schemes, print."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from chromium_pages import OpenPage, chromium, opened
from playwright.sync_api import Browser
from report_studies import (
    finished_study,
    fruitless_study,
    half_confirmed_study,
    single_trial_study,
    unfinished_study,
)

from lora_tune.report.charts import study_charts
from lora_tune.report.study_page import render_html

STUDIES = {
    "finished": finished_study,
    "unfinished": unfinished_study,
    "half-confirmed": half_confirmed_study,
    "fruitless": fruitless_study,
    "single": single_trial_study,
}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The reports of all studies as files."""
    folder = tmp_path_factory.mktemp("pages")
    for name, make in STUDIES.items():
        (folder / f"{name}.html").write_text(render_html(make()), encoding="utf-8")
    return {name: folder / f"{name}.html" for name in STUDIES}


@pytest.fixture
def report(browser: Browser, pages: dict[str, Path]) -> Iterator[OpenPage]:
    """The finished study's report, opened."""
    with opened(browser, pages["finished"]) as page:
        page.wait_for_charts("light")
        yield page


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", STUDIES)
def test_a_page_draws_its_plots_and_asks_for_nothing_but_itself(browser, pages, name, scheme):
    charts = study_charts(STUDIES[name]())
    with opened(browser, pages[name], scheme=scheme) as found:
        if charts:
            found.wait_for_charts(scheme)
        assert found.requests == [pages[name].as_uri()]
        assert found.violations == []
        assert found.messages == []
        drawn = found.page.eval_on_selector_all(
            ".plot",
            "(plots) => plots.map((p) => [p.dataset.chart,"
            " p.querySelectorAll('svg .role-mark > *').length])",
        )
        assert [chart for chart, _ in drawn] == [chart.name for chart in charts]
        assert all(marks > 0 for _, marks in drawn), drawn


def test_the_policy_blocks_what_is_not_of_the_page(browser, pages, tmp_path):
    """The witness of the tests above: what they look for is seen when it is there."""
    planted = (
        "<script>window.planted = 1</script><img src='https://example.org/x.png'>"
        "<img src=x onerror='window.planted = 2'><style>body { color: red }</style>"
    )
    text = pages["fruitless"].read_text(encoding="utf-8").replace("</main>", f"{planted}</main>")
    (tmp_path / "planted.html").write_text(text, encoding="utf-8")
    with opened(browser, tmp_path / "planted.html") as found:
        assert found.page.evaluate("window.planted") is None
        blocked = {violation.split()[0] for violation in found.violations}
        assert {"script-src-elem", "img-src", "style-src-elem"} <= blocked
        assert any(message.startswith("error: ") for message in found.messages)


def test_plots_are_drawn_again_when_the_scheme_changes(report):
    colour = "() => document.querySelector('.plot svg text').getAttribute('fill')"
    light = report.page.evaluate(colour)
    report.page.emulate_media(color_scheme="dark")
    report.wait_for_charts("dark")
    assert report.page.evaluate(colour) != light
    assert report.page.locator(".plot[data-scheme=light]").count() == 0
    assert report.messages == []


def test_hovering_a_mark_names_the_trial(report):
    page = report.page
    page.locator("#chart-loss-memory").scroll_into_view_if_needed()
    marks = page.locator("#chart-loss-memory svg .role-mark.mark-symbol > *")
    marks.last.hover(force=True)
    page.wait_for_selector("#vg-tooltip-element.visible")
    assert "trial" in page.inner_text("#vg-tooltip-element")
    assert report.violations == []


def column(found: OpenPage, header: str) -> list[str]:
    """Return a column of the trials that are shown, from the top."""
    return found.page.evaluate(
        """(header) => {
          const table = document.querySelector("table.trials");
          const at = [...table.tHead.rows[0].cells].findIndex((c) => c.textContent === header);
          return [...table.tBodies[0].rows].filter((row) => row.checkVisibility())
            .map((row) => row.cells[at].textContent);
        }""",
        header,
    )


def sort_by(found: OpenPage, header: str) -> str | None:
    """Press a header; return what it then says of the order."""
    button = found.page.get_by_role("button", name=header, exact=True)
    button.click()
    return found.page.evaluate(
        "(b) => b.closest('th').getAttribute('aria-sort')", button.element_handle()
    )


NUMBERS = {
    "trial": lambda t: t.number,
    "rank": lambda t: t.config.rank,
    "alpha": lambda t: t.config.lora_alpha,
    "ratio": lambda t: t.config.lora_alpha / t.config.rank,
    "dropout": lambda t: t.config.lora_dropout,
    "lr": lambda t: t.config.learning_rate,
    "loss": lambda t: t.kept and t.kept.eval_loss,
    "predicted": lambda t: t.predicted_bytes,
}
WORDS = {
    "origin": lambda t: t.origin,
    "state": lambda t: t.state.value,
    "targets": lambda t: t.config.target_set,
}


@pytest.mark.parametrize("header", [*NUMBERS, *WORDS])
def test_a_column_sorts_up_and_down_with_missing_values_last(report, header):
    trials = finished_study().trials
    best_first = column(report, "trial")
    value = (NUMBERS | WORDS)[header]
    values = {str(t.number): value(t) for t in trials}

    assert sort_by(report, header) == "ascending"
    up = [values[number] for number in column(report, "trial")]
    assert sort_by(report, header) == "descending"
    down = [values[number] for number in column(report, "trial")]

    known = sorted(v for v in values.values() if v is not None)
    missing = [None] * (len(values) - len(known))
    assert up == known + missing
    assert down == known[::-1] + missing
    assert sort_by(report, header) is None
    assert column(report, "trial") == best_first


def test_numbers_with_units_sort_by_size_and_not_by_their_letters(report):
    sort_by(report, "tokens/s")
    shown = [float(text) for text in column(report, "tokens/s") if text != "-"]
    assert shown == sorted(shown)
    sort_by(report, "steps")
    steps = [int(text.split()[0]) for text in column(report, "steps") if text != "-"]
    assert steps == sorted(steps)
    assert column(report, "steps")[-1] == "-"


def test_only_one_column_says_that_it_is_sorted_and_the_keyboard_reaches_it(report):
    page = report.page
    page.get_by_role("button", name="rank", exact=True).focus()
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    page.keyboard.press("Space")
    sorted_heads = page.eval_on_selector_all("th[aria-sort]", "(h) => h.map((x) => x.textContent)")
    assert sorted_heads == ["alpha"]


def test_trials_are_found_by_words_and_by_state(report):
    page = report.page
    assert page.inner_text(".tools output") == "13 of 13 trials"
    page.fill(".tools input", "anchor all-linear")
    assert sorted(column(report, "trial"), key=int) == ["0", "1", "2", "3"]
    page.select_option(".tools select", "complete")
    assert sorted(column(report, "trial"), key=int) == ["0", "3"]
    assert page.inner_text(".tools output") == "2 of 13 trials"
    page.fill(".tools input", "")
    assert sorted(column(report, "trial"), key=int) == ["0", "3", "7"]
    page.select_option(".tools select", "")
    page.fill(".tools input", "SIGNAL 9")
    assert column(report, "state") == ["failed"]
    page.press(".tools input", "Enter")
    assert report.requests == [page.url]


def test_every_state_can_be_chosen_and_shows_its_reasons(report):
    options = report.page.eval_on_selector_all(
        ".tools option", "(options) => options.map((o) => o.value)"
    )
    assert set(options) == {"", *(t.state.value for t in finished_study().trials)}
    for number, reason in ((1, "loss 9.81 at step 14"), (8, "peak 4.31 GiB alone")):
        report.page.fill(".tools input", reason)
        assert column(report, "trial") == [str(number)]


def test_the_command_is_copied_as_it_stands(report):
    page = report.page
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.locator(".decision [data-copy] button").click()
    page.get_by_role("button", name="Copied").wait_for()
    assert page.evaluate("navigator.clipboard.readText()") == (
        "lora-tune export docstrings --to vllm"
    )


@pytest.mark.parametrize("name", STUDIES)
def test_a_phone_never_scrolls_the_page_sideways(browser, pages, name):
    with opened(browser, pages[name], width=360, height=740, scheme="dark") as found:
        found.page.wait_for_timeout(300)
        assert found.page.evaluate("document.documentElement.scrollWidth") == 360
        wide = found.page.evaluate(
            """() => [...document.querySelectorAll("main *")]
              .filter((e) => e.getBoundingClientRect().right > 361
                && !e.closest(".scroll, pre, .plot, .text")).map((e) => e.outerHTML.slice(0, 90))"""
        )
        assert wide == []


def test_a_phone_shows_answers_below_each_other_and_a_wide_page_side_by_side(browser, pages):
    tops = "() => [...document.querySelectorAll('.answers')[0].children].map((e) => e.offsetTop)"
    with opened(browser, pages["finished"]) as wide:
        assert len(set(wide.page.evaluate(tops))) == 1
    with opened(browser, pages["finished"], width=360) as narrow:
        assert len(set(narrow.page.evaluate(tops))) == 3


def test_the_first_screen_holds_the_decision(browser, pages):
    with opened(browser, pages["finished"], width=1280, height=800) as found:
        shown = found.page.evaluate(
            """() => {
              const low = (e) => e.getBoundingClientRect().bottom;
              return [...document.querySelectorAll(".decision > *, .facts > div")].filter(
                (e) => low(e) <= innerHeight).map((e) => e.innerText).join("\\n");
            }"""
        )
        for text in (
            "Use trial 3: rank 16",
            "2.335",
            "95 % interval 2.236 to 2.434",
            "Better than the default",
            "3.34 GiB",
            "4 min 0 s",
            "adapter",
            "lora-tune export docstrings --to vllm",
        ):
            assert text in shown


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_print_shows_everything_in_black_on_white(browser, pages, scheme):
    with opened(browser, pages["finished"], scheme=scheme) as found:
        found.wait_for_charts(scheme)
        page = found.page
        page.emulate_media(media="print", color_scheme=scheme)
        assert (
            page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        )
        assert page.evaluate("getComputedStyle(document.body).color") == "rgb(0, 0, 0)"
        for selector in ("main section", "table.trials tbody tr", ".plot svg", ".words", "pre"):
            hidden = page.eval_on_selector_all(
                selector, "(all) => all.filter((e) => !e.checkVisibility()).length"
            )
            assert hidden == 0, selector
        assert not page.is_visible("nav")
        assert not page.is_visible(".tools")
        clipped = page.eval_on_selector_all(
            ".scroll, pre, .text, .plot",
            "(all) => all.filter((e) => getComputedStyle(e).overflowX !== 'visible').length",
        )
        assert clipped == 0
        assert page.pdf(format="A4").startswith(b"%PDF")


def test_without_scripts_the_page_is_complete_and_plots_are_told_in_words(browser, pages):
    charts = study_charts(finished_study())
    with opened(browser, pages["finished"], scripts=False) as found:
        page = found.page
        assert page.locator("table.trials tbody tr").count() == 13
        assert not page.is_visible(".tools")
        for chart in charts:
            assert page.locator(f"#chart-{chart.name} h3").inner_text() == chart.title
            assert page.is_visible(f"#chart-{chart.name}-text")


# Colours of every visible text and of what is behind it, as "text | ratio" where it is below 4.5.
LOW_CONTRASTS = """() => {
  const parse = (c) => c.match(/[\\d.]+/g).map(Number);
  const channel = (v) => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const light = (c) => 0.2126 * channel(c[0]) + 0.7152 * channel(c[1]) + 0.0722 * channel(c[2]);
  const ground = (e) => {
    for (; e; e = e.parentElement) {
      const c = parse(getComputedStyle(e).backgroundColor);
      if (c.length === 3 || c[3] > 0) return c;
    }
  };
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const e = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || !e.checkVisibility() || e.closest("svg")) continue;
    const [a, b] = [light(parse(getComputedStyle(e).color)), light(ground(e))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) found.push(walker.currentNode.data.trim().slice(0, 40) + " | " + ratio);
  }
  return found;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["finished", "unfinished"])
def test_every_text_has_a_contrast_of_at_least_four_and_a_half(browser, pages, name, scheme):
    with opened(browser, pages[name], scheme=scheme) as found:
        assert found.page.evaluate(LOW_CONTRASTS) == []


def test_a_grey_text_would_be_noticed(browser, pages):
    with opened(browser, pages["unfinished"]) as found:
        found.page.evaluate("document.querySelector('h1').style.color = '#999'")
        assert len(found.page.evaluate(LOW_CONTRASTS)) == 1


def test_the_focus_is_visible_and_begins_with_the_skip_link(report):
    report.page.keyboard.press("Tab")
    focused = "(() => { const e = document.activeElement; return [e.className, %s] })()"
    name, left = report.page.evaluate(focused % "e.getBoundingClientRect().left")
    assert name == "skip"
    assert left >= 0
    report.page.keyboard.press("Tab")
    assert report.page.evaluate(focused % "getComputedStyle(e).outlineStyle")[1] == "solid"
