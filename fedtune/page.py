"""report.html: one self-contained file that a colleague who knows nothing of FedTune understands.

Everything is inside, plotly.js included; nothing is requested from anywhere. Names come from data
and recipes and are escaped.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import plotly.graph_objects as go

from fedtune import page_audits, report
from fedtune.audits import kept
from fedtune.page_template import TEMPLATE
from fedtune.pages import COLOURS, Drawn, blank, plain, rendered, words
from fedtune.privacy import certificate, verifying
from fedtune.privacy.ledger import LedgerError
from fedtune.records import RoundRecord
from fedtune.report import Result, Run, summarise

FEDERATED, UNTUNED = COLOURS[0], COLOURS[6]
MOST_LINES = 12
TALL = 26  # pixels a client in a horizontal chart


def write(run: Run, path: Path) -> None:
    """Write the page of a run, finished or not."""
    result = report.result(run)
    page = rendered(
        TEMPLATE,
        run=run,
        result=result,
        kinds={row.kind for row in result.rows},
        figures=_figures(run, result),
        recipe=run.experiment.text(),
        task=run.experiment.task,
        rejections=[(r.round, rejection) for r in run.records for rejection in r.rejected],
        sha256=_sha256(run.folder / "adapter" / "adapter_model.safetensors"),
        rounds=run.records[-1].round,
        partial=_partial(run),
        **_privacy(run),
        **page_audits.of(kept.read(run.folder).values()),
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


def _partial(run: Run) -> bool:
    """Whether some clients were asked in some rounds only."""
    return any(len(r.cohort) < len(run.clients) for r in run.records if r.round)


def _figures(run: Run, result: Result) -> list[Drawn]:
    """Each chart that has something to show."""
    metric = result.metrics[0]
    drawn: list[tuple[str, str, go.Figure | None]] = [
        (
            f"{words(metric).capitalize()} by round",
            "On the pooled test rows of all clients. Round 0 is the untuned model.",
            _curves(run, metric),
        ),
        (
            "Each client's own test rows, by round",
            f"{words(metric).capitalize()} of the model of the round.",
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
        Drawn(f"figure-{number}", title, note, chart.to_json())
        for number, (title, note, chart) in enumerate(drawn)
        if chart is not None
    ]


def _points(records: Sequence[RoundRecord], metric: str) -> tuple[list[int], list[float]]:
    """Rounds and pooled values."""
    measured = [(r.round, summarise(report.pooled(r))) for r in records]
    kept = [(round, numbers[metric]) for round, numbers in measured if metric in numbers]
    return [round for round, _ in kept], [value for _, value in kept]


def _line(
    figure: go.Figure, name: str, x: Sequence[int], y: Sequence[float], colour: str, **line: Any
) -> None:
    figure.add_scatter(
        x=list(x), y=list(y), name=plain(name), mode="lines+markers", line={"color": colour, **line}
    )


def _curves(run: Run, metric: str) -> go.Figure:
    figure = blank("round", words(metric), rounds=len(run.records))
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
    figure = blank("round", words(metric), rounds=len(run.records))
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
    figure = blank("label", "client", 120 + slanted + TALL * len(known))
    few = len(known) * len(labels) <= 200
    figure.add_heatmap(
        z=counts,
        x=[plain(label) for label in labels],
        y=[plain(client["name"]) for client in known],
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
    figure = blank("training rows", "", max(240, 100 + TALL * len(known)))
    figure.add_bar(
        x=[client["examples"] for client in known],
        y=[plain(client["name"]) for client in known],
        orientation="h",
        marker={"color": FEDERATED},
    )
    figure.update_yaxes(autorange="reversed", type="category", automargin=True)
    return figure


def _traffic(run: Run) -> go.Figure:
    figure = blank("round", "megabytes", rounds=len(run.records))
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
    figure = blank("round", "", rounds=len(run.records))
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
    figure = blank("round", "seconds", 280, len(run.records))
    figure.add_bar(
        x=[record.round for record in run.records],
        y=[record.seconds for record in run.records],
        marker={"color": FEDERATED},
    )
    return figure


def _participation(run: Run) -> go.Figure:
    names = [plain(client["name"]) for client in run.clients]
    figure = blank("round", "client", max(240, 120 + TALL * len(names)), len(run.records))
    asked = [(r.round, name) for r in run.records for name in r.cohort]
    aside = [(r.round, rejection.client) for r in run.records for rejection in r.rejected]
    for name, points, colour, symbol in (
        ("asked", asked, FEDERATED, "square"),
        ("set aside", aside, COLOURS[1], "x"),
    ):
        figure.add_scatter(
            x=[round for round, _ in points],
            y=[plain(client) for _, client in points],
            mode="markers",
            name=name,
            marker={"color": colour, "symbol": symbol, "size": 10},
        )
    figure.update_yaxes(type="category", categoryorder="array", categoryarray=names[::-1])
    return figure
