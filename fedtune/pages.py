"""What every page shares: the surroundings of its template, its colours, the blank of a plot.

A page is one file: plotly.js, style and script are inside and a policy forbids the browser to ask
for anything. Names come from data and recipes: jinja2 escapes them in the markup, `plain` in plots.
"""

import html
import importlib.metadata
import re
from dataclasses import dataclass
from typing import Any

import jinja2
import plotly.graph_objects as go
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from fedtune.page_style import SCRIPT, STYLE
from fedtune.report import human_bytes, human_time

# Okabe and Ito's palette, readable with every kind of colour vision; its two palest hues darkened,
# so that a line of each has a contrast of 3 on white and on the dark paper. The last one is grey.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#B07A00", "#3C96CC", "#7F7F7F")
MOST_TICKS = 8
PACKAGES = ("fedtune", "flwr", "torch", "transformers", "peft", "datasets", "numpy")
HEAD = """<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline';
  img-src data: blob:">
<style>{{ style | safe }}</style>
<script>{{ plotly_js | safe }}</script>
"""
PLOT = """{% macro plot(figure) -%}
<div class="plot" id="{{ figure.id }}" role="img"
  aria-label="{{ figure.title }}. {{ figure.note }}"></div>
<script type="application/json" id="{{ figure.id }}-data">{{ figure.json | in_script }}</script>
{%- endmacro %}"""
FOOT = """<p>{% for name, version in versions %}
{{ name }} {{ version }}{{ "" if loop.last else ", " }}
{%- endfor %}</p>"""


@dataclass(frozen=True)
class Drawn:
    """A plot that the page's script draws.

    Attributes:
        id: of its place in the page.
        title: above it.
        note: what it shows, for the eye and for a screen reader.
        json: plotly's.
        half: whether two may stand side by side.
    """

    id: str
    title: str
    note: str
    json: str
    half: bool = False


def rendered(template: str, **values: Any) -> str:
    """The page of a template that includes "head", "plot" (a macro) and "foot"."""
    parts = {"page": template, "head": HEAD, "plot": PLOT, "foot": FOOT}
    environment = jinja2.Environment(
        loader=jinja2.DictLoader(parts),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {
        "bytes": human_bytes,
        "time": human_time,
        "soft": soft,
        "words": words,
        "in_script": _in_script,
    }
    shared = {"style": STYLE, "script": SCRIPT, "plotly_js": get_plotlyjs(), "versions": versions()}
    return environment.get_template("page").render(**shared, **values)


def versions() -> list[tuple[str, str]]:
    """Name and version of the packages that decide what a run computes."""
    found = []
    for name in PACKAGES:
        try:
            found.append((name, importlib.metadata.version(name)))
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def blank(x: str, y: str, height: int = 340, rounds: int = 0) -> go.Figure:
    """A plot without data; the axis of rounds, if `x` is "round", has whole numbers."""
    figure = go.Figure()
    figure.update_layout(
        height=height,
        margin={"l": 60, "r": 20, "t": 10, "b": 50},
        template="plotly_white",
        font={"family": "system-ui, sans-serif", "size": 13},
        legend={"orientation": "h", "y": 0, "yref": "container", "yanchor": "bottom"},
        hovermode="x unified" if x == "round" else "closest",
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
    )
    figure.update_xaxes(title={"text": x, "standoff": 8}, automargin=True)
    if x == "round":
        figure.update_xaxes(tickformat="d", dtick=1 if 0 < rounds <= MOST_TICKS else None)
    figure.update_yaxes(title=y)
    return figure


def plain(text: str) -> str:
    """Text that plotly, which reads tags and entities in every label, shows as it is."""
    return html.escape(text, quote=False)


def soft(text: str) -> Markup:
    """Text that may be broken after the marks that join words in recipes."""
    return Markup(re.sub(r"((?<=\w)\(|[=.,](?=[A-Za-z]))", r"\1<wbr>", html.escape(text)))


def words(name: str) -> str:
    """A name of a metric as words."""
    return name.replace("_", " ")


def _in_script(json: str) -> Markup:
    """JSON that may stand in a script: no text in it can end the script."""
    return Markup(json.replace("<", "\\u003c").replace("&", "\\u0026"))
