"""The page of a comparison, opened in a real browser."""

import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from browser import DESK, PHONE, Visit, visit
from made_comparison import example
from playwright.sync_api import Browser

from fedtune.pages import COLOURS
from fedtune.studies import page
from fedtune.studies.comparison import GLOBAL, Arm, Comparison, Score
from fedtune.studies.marks import DASHES, SYMBOLS, label, looks

EVIL = "fed_<b>&_%$#(scale=0.5)"
PAPERS = ("#ffffff", "#15191d")  # of the light and the dark page


def measured(comparison: Comparison) -> Comparison:
    """The example with all that a real run tells of its aggregation."""

    def arm(one: Arm) -> Arm:
        if one.role == "reference":
            return one
        curves = [
            replace(
                curve,
                aggregation={
                    "relative_error": [None, *(10.0 ** -(4 * r) for r in curve.rounds[1:])],
                    "effective_rank": [None, *(2.0 + r for r in curve.rounds[1:])],
                    "drift": [None, *(1.0 / r for r in curve.rounds[1:])],
                    "update_cosine": [None, *(0.5 - 0.2 * r for r in curve.rounds[1:])],
                },
            )
            for curve in one.curves
        ]
        told = {"relative_error": 1e-4, "effective_rank": 4.5, "drift": 0.5, "update_cosine": 0.0}
        return replace(one, curves=curves, aggregation=told | {"moved_A": 0.25})

    conditions = [replace(c, arms=list(map(arm, c.arms))) for c in comparison.conditions]
    return replace(comparison, conditions=conditions)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "comparison.html"
    page.write(measured(example(2, 10)), path)
    return path


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of one condition, which is drawn sooner."""
    path = tmp_path_factory.mktemp("page") / "comparison.html"
    page.write(example(1), path)
    return path


@pytest.fixture(scope="module")
def opened(browser: Browser, file: Path) -> Iterator[Visit]:
    with visit(browser, file) as seen:
        seen.settle()
        yield seen


def column(opened: Visit, table: int, number: int) -> list[list[str | None]]:
    """What a column sorts by, body by body."""
    found: list[list[str | None]] = (
        opened.page.locator("table")
        .nth(table)
        .evaluate(
            """(table, number) => [...table.tBodies].map(body => [...body.rows]
          .filter(row => !row.classList.contains("group"))
          .map(row => row.cells[number].getAttribute("data-value")))""",
            number,
        )
    )
    return found


def test_the_tables_are_there(opened: Visit) -> None:
    """In each condition quality and other metrics twice, audits, cost, aggregation twice."""
    assert opened.page.locator("table").count() == 2 * (5 + 3) + 3
    first = opened.page.locator("table").first
    assert first.locator("tbody").count() == 2
    assert first.locator("tbody tr:not(.group)").count() == 5
    for name in ("untuned", "centralized"):
        assert first.locator(f"tbody tr.references th:text-is('{name}')").count() == 1


def test_every_plot_is_drawn(opened: Visit) -> None:
    """Differences, ranking (of global models only), bytes, curves, clients; four diagnostics."""
    drawn = opened.drawn()
    assert len(drawn) == 2 * (5 + 4 + 4) + 1
    for plot in drawn:
        assert float(plot["width"]) > 200, plot
        assert float(plot["height"]) > 100, plot
        assert float(plot["marks"]) > 0, plot
    # Nothing is drawn that no heading announces.
    assert opened.page.locator("figure > figcaption h4").count() == len(drawn)


def test_the_console_is_empty_and_nobody_is_asked(opened: Visit, file: Path) -> None:
    assert opened.complaints == []
    assert opened.requests == [file.as_uri()]


@pytest.mark.parametrize("width", [PHONE, DESK])
def test_nothing_is_wider_than_the_screen(opened: Visit, width: int) -> None:
    assert opened.too_wide(width) == []
    opened.too_wide(DESK)


def test_a_click_sorts_and_references_stay_apart(opened: Visit) -> None:
    """The page opens with the best mean first; p is missing for the baseline and stays last."""
    means = [[float(v) for v in body if v] for body in column(opened, 0, 1)]
    assert means == [sorted(body, reverse=True) for body in means]
    heads = opened.page.locator("table").first.locator("thead th")
    assert heads.nth(1).get_attribute("aria-sort") == "descending"
    heads.nth(1).get_by_role("button").click()
    assert heads.nth(1).get_attribute("aria-sort") == "ascending"
    assert [[float(v) for v in body if v] for body in column(opened, 0, 1)] == [
        sorted(body) for body in means
    ]
    heads.nth(4).get_by_role("button").click()
    heads.nth(4).get_by_role("button").click()
    assert heads.nth(1).get_attribute("aria-sort") is None
    assert column(opened, 0, 4)[0][-1] == ""
    names = opened.page.locator("table").first.locator("tbody tr.references th").all_inner_texts()
    assert sorted(names) == ["centralized", "untuned"]


def test_names_from_data_are_shown_and_never_obeyed(opened: Visit) -> None:
    title = opened.page.locator("h1").text_content()
    assert title == "Which aggregation is best under label skew? <script>alert('no')</script>"
    assert opened.page.locator("main b").count() == 0
    ticks = opened.page.locator("#c0-global-0 .ytick text").all_text_contents()
    assert EVIL in ticks
    assert opened.page.locator("#c0-global-3 .legendtext", has_text=EVIL).count() == 1


def test_dark_and_light_follow_the_reader(browser: Browser, small: Path) -> None:
    def inks(seen: Visit) -> tuple[str, str]:
        """The colour of the words and of a plot's labels."""
        found: list[str] = seen.page.evaluate(
            """() => [document.body, document.querySelector(".xtick text")]
              .map((e, k) => getComputedStyle(e)[k ? "fill" : "color"])"""
        )
        return found[0], found[1]

    with visit(browser, small, scheme="dark") as seen:
        seen.settle()
        assert inks(seen) == ("rgb(232, 235, 238)", "rgb(232, 235, 238)")
        seen.page.emulate_media(color_scheme="light")
        seen.page.wait_for_function(
            """() => getComputedStyle(document.querySelector(".xtick text")).fill ==
              "rgb(29, 35, 41)" """
        )
        assert inks(seen) == ("rgb(29, 35, 41)", "rgb(29, 35, 41)")


def test_a_print_is_black_on_white_and_fits_the_paper(browser: Browser, small: Path) -> None:
    with visit(browser, small, scheme="dark") as seen:
        seen.settle()
        seen.page.evaluate(
            """() => window.addEventListener("beforeprint", () => {
              const svgs = [...document.querySelectorAll("svg.main-svg")];
              window.printed = [Math.max(...svgs.map(s => s.getAttribute("width"))),
                getComputedStyle(document.querySelector(".xtick text")).fill];
            })"""
        )
        seen.page.pdf(format="A4")
        assert seen.page.evaluate("window.printed") == [680, "rgb(29, 35, 41)"]
        seen.settle()
        assert seen.complaints == []


def test_without_scripts_the_tables_are_whole(browser: Browser, file: Path) -> None:
    with visit(browser, file, scripts=False) as seen:
        assert seen.page.locator("table").count() == 19
        told = seen.page.locator(".plot").first.evaluate(
            "place => getComputedStyle(place, '::before').content"
        )
        assert "This plot needs JavaScript" in told
        assert "0.8" in seen.page.locator("tr.baseline td").first.inner_text()


def test_the_page_can_be_read_aloud(opened: Visit) -> None:
    """Plots and tables that scroll have names, every header a scope, every id one owner."""
    page = opened.page
    for found in (page.locator("[role=img]"), page.locator("[role=region]")):
        names = [one.get_attribute("aria-label") for one in found.all()]
        assert names
        assert all(names)
    assert page.locator("th:not([scope])").count() == 0
    ids: list[str] = page.evaluate("[...document.querySelectorAll('main [id]')].map(e => e.id)")
    own = [name for name in ids if name.startswith(("c0-", "c1-", "condition-", "tuning"))]
    assert len(own) == len(set(own))
    levels = [
        int(t[1])
        for t in page.evaluate("[...document.querySelectorAll('h1,h2,h3,h4')].map(e => e.tagName)")
    ]
    assert all(after <= before + 2 for before, after in itertools.pairwise(levels))


def least(comparison: Comparison) -> Comparison:
    """One seed, one condition, nothing tuned, nothing failed, no target: no interval anywhere."""

    def score(one: Score) -> Score:
        gap = one.difference
        if gap:
            gap = replace(
                gap,
                seeds=[0],
                values=[gap.mean],
                interval=None,
                bootstrap=None,
                p=None,
                p_holm=None,
            )
        return replace(
            one, seeds=[0], values=one.values[:1], interval=None, bootstrap=None, difference=gap
        )

    def arm(one: Arm) -> Arm:
        cost = replace(one.cost, rounds_to_target=[], bytes_to_target=[], seconds_to_target=[])
        scores = [score(s) for s in one.scores if s.protocol == GLOBAL]
        return replace(
            one, scores=scores, cost=cost, curves=one.curves[:1], clients=[], aggregation={}
        )

    [condition] = comparison.conditions
    bare = replace(condition, arms=[arm(a) for a in condition.arms], rankings=[])
    return replace(
        comparison, seeds=[0], target=None, conditions=[bare], tuning=[], failures=[], question=""
    )


def test_the_least_comparison_has_a_page_too(browser: Browser, tmp_path: Path) -> None:
    page.write(least(example(1)), tmp_path / "comparison.html")
    with visit(browser, tmp_path / "comparison.html") as seen:
        seen.settle()
        assert seen.complaints == []
        assert seen.page.locator("h1").text_content() == "example"
        assert seen.page.locator("table").count() == 4
        assert "One seed shows no spread" in (seen.page.locator(".verdict").text_content() or "")
        assert seen.page.locator("td:text-is('not tested')").count() == 2
        assert all(float(plot["marks"]) > 0 for plot in seen.drawn())


def luminance(colour: str) -> float:
    """Relative luminance of WCAG 2.2."""
    parts = [int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return sum(w * p for w, p in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("colour", COLOURS)
@pytest.mark.parametrize("paper", PAPERS)
def test_every_line_stands_out(colour: str, paper: str) -> None:
    """WCAG 2.2, 1.4.11: graphical objects have a contrast of 3 to 1."""
    low, high = sorted((luminance(colour), luminance(paper)))
    assert (high + 0.05) / (low + 0.05) >= 3


def test_no_two_strategies_look_alike() -> None:
    """Up to the 24 strategies there may be, none shares colour and symbol with another."""
    made = example(1)
    arms = [replace(made.conditions[0].arms[3], name=f"strategy-{k}") for k in range(24)]
    shown = looks(replace(made, conditions=[replace(made.conditions[0], arms=arms)], tuning=[]))
    assert len({(look.colour, look.symbol) for look in shown.values()}) == 24
    assert len({(look.colour, look.dash) for look in shown.values()}) == 24
    assert len(SYMBOLS) == 8
    assert len(DASHES) == 4


def test_a_long_name_is_broken_where_it_may_be() -> None:
    assert label("fedit") == "fedit"
    assert label("hetlora(keep=0.95, penalty=0.001)") == "hetlora(keep=0.95,<br>penalty=0.001)"
    assert label("a<b>(c=1)") == "a&lt;b&gt;(c=1)"
