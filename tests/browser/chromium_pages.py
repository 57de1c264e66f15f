"""A real Chromium for the tests: opens files from disk, cut off from any network, and notes all it says."""

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

# The studies that the tests of the report share; pytest puts only a test's own folder on the path.
sys.path.append(str(Path(__file__).parents[1] / "report"))

NOTE_VIOLATIONS = """
window.violations = [];
document.addEventListener("securitypolicyviolation", (event) =>
  window.violations.push(event.violatedDirective + " " + event.blockedURI));
"""


@dataclass
class OpenPage:
    """A page with what it said and asked for so far."""

    page: Page
    messages: list[str] = field(default_factory=list)  # errors, warnings, dialogs
    requests: list[str] = field(default_factory=list)

    @property
    def violations(self) -> list[str]:
        """What the page's content security policy has blocked."""
        found: list[str] = self.page.evaluate("window.violations")
        return found

    def wait_for_charts(self, scheme: str) -> None:
        """Wait until all plots are drawn for this colour scheme."""
        self.page.wait_for_selector(f"html[data-charts={scheme}]", timeout=60_000)


@contextmanager
def chromium() -> Iterator[Browser]:
    """Start a headless Chromium; without one the tests are skipped, or fail where it is required."""
    path = shutil.which("chromium")
    if path is None:
        if "chromium" in os.environ.get("LORA_TUNE_TESTS_REQUIRE", "").split(","):
            pytest.fail("chromium is required here and not installed")
        pytest.skip("chromium is not installed")
    root = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=root)
        yield browser
        browser.close()


@contextmanager
def opened(
    browser: Browser,
    path: Path,
    *,
    scheme: str = "light",
    width: int = 1280,
    height: int = 860,
    scripts: bool = True,
) -> Iterator[OpenPage]:
    """Open a file with the network cut, and note everything from the first byte on."""
    context = browser.new_context(
        offline=True,
        color_scheme=scheme,
        viewport={"width": width, "height": height},
        java_script_enabled=scripts,
    )
    context.set_default_timeout(10_000)
    context.add_init_script(NOTE_VIOLATIONS)
    found = OpenPage(context.new_page())
    page = found.page
    page.on("console", lambda m: found.messages.append(f"{m.type}: {m.text}"))
    page.on("pageerror", lambda error: found.messages.append(f"error: {error}"))
    page.on("dialog", lambda dialog: (found.messages.append("dialog"), dialog.dismiss()))
    page.on("request", lambda request: found.requests.append(request.url))
    page.on("popup", lambda _: found.messages.append("popup"))
    page.goto(path.as_uri())
    try:
        yield found
    finally:
        context.close()
