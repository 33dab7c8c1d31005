"""A real Chromium for the tests of the reports, and what a person with its console open would see.

The browser is the system's own and nothing is downloaded. Where none is installed the tests that
need one are skipped, saying so, unless FEDTUNE_BROWSER=required, as in continuous integration.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome")
QUIET = (
    "--no-sandbox",  # a container's root cannot have one; only files of these tests are opened
    "--disable-gpu",
    "--disable-quic",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
)
PHONE, DESK = 375, 1280
PATIENCE = 120_000  # milliseconds, for a machine that is busy with other tests
# Every element that reaches beyond the viewport without lying in a part that scrolls by itself.
TOO_WIDE = """() => {
  const wide = document.documentElement.clientWidth;
  return [...document.querySelectorAll("body *")].filter(e => {
    for (let p = e; p !== document.body; p = p.parentElement)
      if (getComputedStyle(p).overflowX !== "visible") return false;
    return e.getBoundingClientRect().right > wide + 1;
  }).map(e => e.tagName + "." + e.className).concat(
    document.documentElement.scrollWidth > wide ? ["the page itself scrolls"] : []);
}"""
# What plotly drew in each place that asks for a plot: the number of marks and the size.
DRAWN = """() => [...document.querySelectorAll(".plot")].map(place => {
  const svg = place.querySelector("svg.main-svg");
  const box = svg ? svg.getBoundingClientRect() : {width: 0, height: 0};
  const marks = place.querySelectorAll(
    ".trace path, .trace .point, .points path, .box, .hm image, .shapelayer path").length;
  return {id: place.id, width: box.width, height: box.height, marks};
})"""


@dataclass
class Visit:
    """A page that is open, what its console complained of, and what it asked for."""

    page: Page
    complaints: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def too_wide(self, width: int) -> list[str]:
        """What overflows at so many pixels."""
        self.page.set_viewport_size({"width": width, "height": 900})
        self.settle()
        found: list[str] = self.page.evaluate(TOO_WIDE)
        return found

    def drawn(self) -> list[dict[str, float | str]]:
        """Id, size and number of marks of every place for a plot."""
        found: list[dict[str, float | str]] = self.page.evaluate(DRAWN)
        return found

    def settle(self) -> None:
        """Wait until every plot is as wide as its place; plotly redraws on the next frames."""
        self.page.wait_for_function(
            """() => [...document.querySelectorAll(".plot")].every(place => {
              const svg = place.querySelector("svg.main-svg");
              return svg && Math.abs(svg.clientWidth - place.clientWidth) < 2;
            })"""
        )


def installed() -> str:
    """The path of a Chromium; skips the test, or fails where one is required."""
    found = next(filter(None, map(shutil.which, NAMES)), "")
    if not found:
        message = f"no Chromium is installed (looked for {', '.join(NAMES)})"
        if os.environ.get("FEDTUNE_BROWSER") == "required":
            pytest.fail(f"{message}, and FEDTUNE_BROWSER=required")
        pytest.skip(message)
    return found


@contextmanager
def launched() -> Iterator[Browser]:
    """A headless browser, closed in the end."""
    path = installed()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=list(QUIET))
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def visit(
    browser: Browser,
    file: Path,
    *,
    width: int = DESK,
    scheme: Literal["light", "dark"] = "light",
    scripts: bool = True,
) -> Iterator[Visit]:
    """The file, opened as a double click would."""
    context = browser.new_context(
        viewport={"width": width, "height": 900}, color_scheme=scheme, java_script_enabled=scripts
    )
    context.set_default_timeout(PATIENCE)
    page = context.new_page()
    seen = Visit(page)
    page.on(
        "console",
        lambda m: seen.complaints.append(m.text) if m.type in ("error", "warning") else None,
    )
    page.on("pageerror", lambda error: seen.complaints.append(str(error)))
    page.on("request", lambda request: seen.requests.append(request.url))
    page.goto(file.as_uri())
    try:
        yield seen
    finally:
        context.close()
