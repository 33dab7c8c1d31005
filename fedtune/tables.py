"""Tables for a terminal, of eighty columns or more."""

from collections.abc import Sequence

from rich.console import Group
from rich.table import Table
from rich.text import Text

from fedtune.privacy.forecast import Outlook
from fedtune.records import RoundRecord
from fedtune.report import LOWER_IS_BETTER, Result, Row, human_bytes, human_time

MOST_ROWS = 12  # of clients in a terminal; more are shown as best, median and worst


def titled(title: str, table: Table | Group) -> Group:
    """A table below its title; rich's own titles break at the table's width."""
    return Group(Text(f"\n{title}", style="bold"), table)


def shown_rows(rows: Sequence[Row], metric: str, most: int = MOST_ROWS) -> list[Row]:
    """All rows, or where many clients are alone, the best, the median and the worst of them."""
    alone = [row for row in rows if row.kind == "alone"]
    if len(alone) <= most:
        return list(rows)
    descending = metric not in LOWER_IS_BETTER
    ordered = sorted(alone, key=lambda row: row.numbers[metric], reverse=descending)
    places = {"best": 0, "median": len(ordered) // 2, "worst": len(ordered) - 1}
    chosen = [
        Row("alone", f"{ordered[k].name} ({word})", ordered[k].numbers, None, ordered[k].seconds)
        for word, k in places.items()
    ]
    first = next(i for i, row in enumerate(rows) if row.kind == "alone")
    others = [row for row in rows if row.kind != "alone"]
    return [*others[:first], *chosen, *others[first:]]


def of_result(result: Result) -> list[Group]:
    """The result for a terminal: pooled test rows, then each client's own."""
    main = Table(box=None, pad_edge=False, collapse_padding=True)
    main.add_column("model", no_wrap=True)
    for metric in result.metrics:
        main.add_column(metric.replace("_", " "), justify="right", no_wrap=True)
    main.add_column("moved", justify="right", no_wrap=True)
    main.add_column("time", justify="right", no_wrap=True)
    for row in shown_rows(result.rows, result.metrics[0]):
        moved = "-" if row.bytes_moved is None else human_bytes(row.bytes_moved)
        style = "bold" if row.kind == "federated" else ""
        cells = (f"{row.numbers[metric]:.3f}" for metric in result.metrics)
        main.add_row(row.name, *cells, moved, human_time(row.seconds), style=style)
    title = f"{result.name}: {result.test_rows:,} pooled test rows"
    if result.padding is not None:
        title += f", padding {result.padding:.0%}"
    shown = [titled(title, main)]
    if 1 < len(result.own) <= MOST_ROWS and any(len(own) > 1 for own in result.own.values()):
        models = [
            m for m in ("untuned", "alone", "federated") if any(m in o for o in result.own.values())
        ]
        title = f"{result.metrics[0].replace('_', ' ')} on each client's own test rows"
        own = Table(box=None, pad_edge=False)
        own.add_column("client", no_wrap=True)
        for model in models:
            own.add_column(model, justify="right")
        for client, values in result.own.items():
            cells = (f"{values[m]:.3f}" if m in values else "-" for m in models)
            own.add_row(client, *cells)
        shown.append(titled(title, own))
    return shown


AGGREGATION = {
    "relative_error": "error",
    "cosine": "cosine",
    "effective_rank": "effective rank",
    "drift": "drift",
    "update_cosine": "update cosine",
}


def of_aggregation(records: Sequence[RoundRecord]) -> list[Group]:
    """How far each round was from the mean of its clients' products; of many, some rounds."""
    measured = [record for record in records if record.aggregation]
    if not measured:
        return []
    count = min(len(measured), MOST_ROWS)
    places = [round(k * (len(measured) - 1) / max(1, count - 1)) for k in range(count)]
    table = Table(box=None, pad_edge=False)
    for heading in ("round", *AGGREGATION.values()):
        table.add_column(heading, justify="right", no_wrap=True)
    for record in (measured[place] for place in places):
        values = [record.aggregation.get(key) for key in AGGREGATION]
        cells = ("-" if value is None else f"{value:.3g}" for value in values)
        table.add_row(str(record.round), *cells)
    return [titled("Aggregation against the mean of the clients' products", table)]


def mix_table(mix: dict[str, dict[str, int]], widest: int = 12) -> Group:
    """Rows a client and label; of many, the commonest labels and the largest clients."""
    totals: dict[str, int] = {}
    for counts in mix.values():
        for label, count in counts.items():
            totals[label] = totals.get(label, 0) + count
    shown = sorted(totals, key=lambda label: -totals[label])[:widest]
    table = Table(box=None, pad_edge=False)
    table.add_column("label")
    clients = sorted(mix, key=lambda name: -sum(mix[name].values()))[:widest]
    for name in clients:
        table.add_column(name, justify="right")
    for label in shown:
        table.add_row(label, *(str(mix[name].get(label, 0)) for name in clients))
    if len(totals) > len(shown):
        others = [sum(mix[n].values()) - sum(mix[n].get(x, 0) for x in shown) for n in clients]
        table.add_row(f"{len(totals) - len(shown)} others", *map(str, others))
    table.add_row("all", *(str(sum(mix[name].values())) for name in clients), style="bold")
    return titled("Training rows a client and label", table)


def privacy_table(outlook: Outlook) -> Group:
    """Epsilon by round, and the noise beside the signal."""
    table = Table(box=None, pad_edge=False)
    for column in ("round", "epsilon", "to who sees the sampling"):
        table.add_column(column, justify="right")
    for round, alone, observed in outlook.rounds:
        table.add_row(str(round), f"{alone:.3f}", f"{observed:.3f}")
    whose = f", client '{outlook.client}' being the worst off" if outlook.client else ""
    share = outlook.noise_norm / outlook.signal_norm
    return titled(
        "privacy",
        Group(
            f"For each {outlook.unit} ({outlook.neighbouring}), delta = {outlook.delta:.3g}, "
            f"against {outlook.adversary}{whose}.",
            table,
            f"Noise z = {outlook.noise:.4g}: {outlook.noise_per_coordinate:.3g} in each of "
            f"{outlook.parameters:,} numbers of a mean, a norm of {outlook.noise_norm:.3g} where "
            f"the signal has {outlook.signal_norm:.3g} at most ({share:.3g} times as much).",
        ),
    )
