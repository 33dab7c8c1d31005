"""report.html: one self-contained file that a colleague who knows nothing of FedTune understands.

Everything is inside, plotly.js included; nothing is requested from anywhere. Names come from data
and recipes and are escaped.
"""

import hashlib
import importlib.metadata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import plotly.graph_objects as go
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from fedtune import report
from fedtune.page_template import TEMPLATE
from fedtune.privacy import certificate, verifying
from fedtune.privacy.ledger import LedgerError
from fedtune.records import RoundRecord
from fedtune.report import Result, Run, human_bytes, human_time, summarise

# Okabe and Ito's palette, readable with every kind of colour vision.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F")
FEDERATED, UNTUNED = COLOURS[0], COLOURS[6]
MOST_LINES = 12
MOST_TICKS = 20
TALL = 26  # pixels a client in a horizontal chart
PACKAGES = ("fedtune", "flwr", "torch", "transformers", "peft", "datasets", "numpy")


def write(run: Run, path: Path) -> None:
    """Write the page of a run, finished or not."""
    result = report.result(run)
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {
        "bytes": human_bytes,
        "time": human_time,
        "words": _words,
        "in_script": _in_script,
    }
    template = environment.from_string(TEMPLATE)
    page = template.render(
        run=run,
        result=result,
        kinds={row.kind for row in result.rows},
        figures=_figures(run, result),
        plotly_js=get_plotlyjs(),
        recipe=run.experiment.text(),
        task=run.experiment.task,
        rejections=[(r.round, rejection) for r in run.records for rejection in r.rejected],
        sha256=_sha256(run.folder / "adapter" / "adapter_model.safetensors"),
        versions=_versions(),
        rounds=run.records[-1].round,
        partial=_partial(run),
        **_privacy(run),
        aggregation=[(r.round, r.aggregation) for r in run.records if r.aggregation],
    )
    path.write_text(page, encoding="utf-8")


def _privacy(run: Run) -> dict[str, Any]:
    """The certificate of a run that promises something, or why it has none."""
    if run.experiment.privacy.mode == "none":
        return {"certificate": None, "broken": ""}
    try:
        made = certificate.of(run.folder, verifying.verify(run.folder))
    except LedgerError as error:
        return {"certificate": None, "broken": str(error)}
    return {"certificate": made, "broken": ""}


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.exists() else ""


def _versions() -> list[tuple[str, str]]:
    found = []
    for name in PACKAGES:
        try:
            found.append((name, importlib.metadata.version(name)))
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _partial(run: Run) -> bool:
    """Whether some clients were asked in some rounds only."""
    return any(len(r.cohort) < len(run.clients) for r in run.records if r.round)


def _figures(run: Run, result: Result) -> list[dict[str, Any]]:
    """Title, note and plot of each chart, as JSON that the page draws."""
    metric = result.metrics[0]
    drawn: list[tuple[str, str, go.Figure | None]] = [
        (
            f"{_words(metric).capitalize()} by round",
            "On the pooled test rows of all clients. Round 0 is the untuned model.",
            _curves(run, metric),
        ),
        (
            "Each client's own test rows, by round",
            f"{_words(metric).capitalize()} of the model of the round.",
            _client_curves(run, metric),
        ),
        (
            "What each client holds",
            "Training rows by label. A mix that an institution withholds is not shown.",
            _mix(run),
        ),
        ("Training rows", "How many rows each client trains on.", _sizes(run)),
        (
            "Traffic by round",
            "Arrays as serialised: broadcast to the cohort and sent back. Evaluation apart.",
            _traffic(run),
        ),
        (
            "Aggregation error by round",
            "Distance of the new model from the mean of the clients' products, over that mean's "
            "norm; and how far apart clients are, over the length of their mean change.",
            _aggregation(run),
        ),
        ("Time by round", "Wall-clock seconds, evaluation included.", _seconds(run)),
        (
            "Who took part",
            "Clients that were asked to train, and those whose reply was set aside.",
            _participation(run) if _partial(run) or result.rejected else None,
        ),
    ]
    return [
        {"title": title, "note": note, "json": figure.to_json(), "id": f"figure-{number}"}
        for number, (title, note, figure) in enumerate(drawn)
        if figure is not None
    ]


def _in_script(json: str) -> Markup:
    """JSON that may stand in a script: no text in it can end the script."""
    return Markup(json.replace("<", "\\u003c").replace("&", "\\u0026"))


def _words(name: str) -> str:
    return name.replace("_", " ")


def _figure(x: str, y: str, height: int = 340, rounds: int = 0) -> go.Figure:
    figure = go.Figure()
    figure.update_layout(
        height=height,
        margin={"l": 60, "r": 20, "t": 10, "b": 50},
        template="plotly_white",
        font={"family": "system-ui, sans-serif", "size": 13},
        legend={"orientation": "h", "y": -0.25},
        hovermode="x unified" if x == "round" else "closest",
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
    )
    figure.update_xaxes(title=x)
    if x == "round":
        figure.update_xaxes(tickformat="d", dtick=1 if rounds <= MOST_TICKS else None)
    figure.update_yaxes(title=y)
    return figure


def _points(records: Sequence[RoundRecord], metric: str) -> tuple[list[int], list[float]]:
    """Rounds and pooled values."""
    measured = [(r.round, summarise(report.pooled(r))) for r in records]
    kept = [(round, numbers[metric]) for round, numbers in measured if metric in numbers]
    return [round for round, _ in kept], [value for _, value in kept]


def _line(
    figure: go.Figure, name: str, x: Sequence[int], y: Sequence[float], colour: str, **line: Any
) -> None:
    figure.add_scatter(
        x=list(x), y=list(y), name=name, mode="lines+markers", line={"color": colour, **line}
    )


def _curves(run: Run, metric: str) -> go.Figure:
    figure = _figure("round", _words(metric), rounds=len(run.records))
    alone = run.references.get("local_only")
    if alone:
        last = alone.records[-1]
        values = [
            summarise(sums)[metric]
            for sums in last.evaluation.get("pooled", {}).values()
            if metric in summarise(sums)
        ]
        if values:
            best = min(values) if metric in report.LOWER_IS_BETTER else max(values)
            text = f"best client alone ({best:.3f})"
            figure.add_hline(
                y=best,
                line={"color": COLOURS[1], "dash": "dash"},
                annotation={"text": text, "font": {"color": COLOURS[1]}},
                annotation_position="bottom right",
            )
    _line(figure, run.experiment.strategy, *_points(run.records, metric), FEDERATED, width=3)
    others = [(k, v) for k, v in run.references.items() if k != "local_only"]
    for number, (name, reference) in enumerate(others):
        colour = COLOURS[2 + number % 4]
        _line(figure, name, *_points(reference.records, metric), colour, dash="dot")
    return figure


def _client_curves(run: Run, metric: str) -> go.Figure | None:
    """One line a client; of many, the ten with most test rows."""
    names = [c["name"] for c in sorted(run.clients, key=lambda c: -(c["test_examples"] or 0))]
    figure = _figure("round", _words(metric), rounds=len(run.records))
    for number, name in enumerate(names[:MOST_LINES]):
        measured = [
            (r.round, summarise(r.evaluation["own"][name])[metric])
            for r in run.records
            if name in r.evaluation.get("own", {})
        ]
        if measured:
            colour = COLOURS[number % len(COLOURS)]
            dash = ("solid", "dot", "dash")[number // len(COLOURS) % 3]
            rounds, values = [round for round, _ in measured], [value for _, value in measured]
            _line(figure, name, rounds, values, colour, dash=dash)
    return figure if figure.data else None


def _mix(run: Run) -> go.Figure | None:
    """A heat map of clients and labels."""
    known = [client for client in run.clients if client["mix"]]
    if not known:
        return None
    labels = list(run.labels) or sorted({label for c in known for label in c["mix"]})
    counts = [[client["mix"].get(label, 0) for label in labels] for client in known]
    slanted = 5 * max(map(len, labels))  # the room that the labels below take
    figure = _figure("label", "client", 120 + slanted + TALL * len(known))
    few = len(known) * len(labels) <= 200
    figure.add_heatmap(
        z=counts,
        x=labels,
        y=[client["name"] for client in known],
        colorscale="Blues",
        zmin=0,
        colorbar={"title": "rows"},
        text=[[str(count) if count else "" for count in row] for row in counts] if few else None,
        texttemplate="%{text}" if few else None,
        hovertemplate="%{y}<br>%{x}: %{z} rows<extra></extra>",
    )
    figure.update_yaxes(autorange="reversed", type="category")
    figure.update_xaxes(type="category", tickangle=-40, automargin=True)
    return figure


def _sizes(run: Run) -> go.Figure | None:
    known = [client for client in run.clients if client["examples"]]
    if any(client["mix"] for client in run.clients) or not known:
        return None
    figure = _figure("training rows", "", max(240, 100 + TALL * len(known)))
    figure.add_bar(
        x=[client["examples"] for client in known],
        y=[client["name"] for client in known],
        orientation="h",
        marker={"color": FEDERATED},
    )
    figure.update_yaxes(autorange="reversed", type="category", automargin=True)
    return figure


def _traffic(run: Run) -> go.Figure:
    figure = _figure("round", "megabytes", rounds=len(run.records))
    figure.update_layout(barmode="stack")
    for name, colour, counts in (
        ("broadcast", COLOURS[0], [r.bytes_down for r in run.records]),
        ("sent by clients", COLOURS[1], [r.bytes_up for r in run.records]),
        ("broadcast for evaluation", COLOURS[6], [r.bytes_evaluation for r in run.records]),
    ):
        rounds = [record.round for record in run.records]
        values = [count / 1e6 for count in counts]
        figure.add_bar(x=rounds, y=values, name=name, marker={"color": colour})
    return figure


def _aggregation(run: Run) -> go.Figure | None:
    measured = [record for record in run.records if record.aggregation]
    figure = _figure("round", "", rounds=len(run.records))
    for key, name, colour in (
        ("relative_error", "aggregation error", FEDERATED),
        ("drift", "drift of clients", COLOURS[1]),
    ):
        values = [(r.round, r.aggregation[key]) for r in measured if r.aggregation.get(key)]
        if values:
            _line(figure, name, [x for x, _ in values], [y for _, y in values], colour)
    figure.update_yaxes(type="log", exponentformat="power")
    return figure if figure.data else None


def _seconds(run: Run) -> go.Figure:
    figure = _figure("round", "seconds", 280, len(run.records))
    figure.add_bar(
        x=[record.round for record in run.records],
        y=[record.seconds for record in run.records],
        marker={"color": FEDERATED},
    )
    return figure


def _participation(run: Run) -> go.Figure:
    names = [client["name"] for client in run.clients]
    figure = _figure("round", "client", max(240, 120 + TALL * len(names)), len(run.records))
    asked = [(r.round, name) for r in run.records for name in r.cohort]
    aside = [(r.round, rejection.client) for r in run.records for rejection in r.rejected]
    for name, points, colour, symbol in (
        ("asked", asked, FEDERATED, "square"),
        ("set aside", aside, COLOURS[1], "x"),
    ):
        figure.add_scatter(
            x=[round for round, _ in points],
            y=[client for _, client in points],
            mode="markers",
            name=name,
            marker={"color": colour, "symbol": symbol, "size": 10},
        )
    figure.update_yaxes(type="category", categoryorder="array", categoryarray=names[::-1])
    return figure
