"""A run's folder as numbers: quality, what it moved, and what federation bought.

Metrics in rounds.jsonl are sums, so the global model's result on the pooled test rows is the sum of
what each client measured on its own. A client alone is measured twice, and the two are never mixed:
on the pooled rows, where it can be compared with the federated model, and on its own.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fedtune.config import Experiment
from fedtune.errors import RecipeError, RunError
from fedtune.records import RoundRecord, Sums, merge, padding

CLASSIFICATION = ("accuracy", "macro_f1", "precision", "recall", "loss")
LANGUAGE_MODEL = ("loss", "perplexity", "token_accuracy")
LOWER_IS_BETTER = ("loss", "perplexity", "backdoor")
Z = 1.959963984540054  # of a 95 % interval


@dataclass(frozen=True)
class Run:
    """What a run's folder holds.

    Attributes:
        folder: where it is.
        experiment: its recipe, resolved.
        labels: the classes, () without any.
        clients: name, examples, test_examples and mix of each.
        records: one a round, from round 0.
        references: strategy -> the run of it that lies inside this one.
        samples: generated answers, with "client", "prompt", "answer" and "reference".
    """

    folder: Path
    experiment: Experiment
    labels: tuple[str, ...]
    clients: list[dict[str, Any]]
    records: list[RoundRecord]
    references: dict[str, "Run"] = field(default_factory=dict)
    samples: list[dict[str, str]] = field(default_factory=list)


def read(folder: str | Path) -> Run:
    """The run in `folder`, as far as it has come.

    Raises:
        RecipeError: there is no run.
        RunError: a file of it is damaged.
    """
    folder = Path(folder)
    if not (folder / "rounds.jsonl").exists():
        raise RecipeError(f"{folder} holds no run. Begin one with `fedtune run RECIPE`.")
    experiment = Experiment.load(folder / "experiment.toml")
    try:
        roster = json.loads((folder / "roster.json").read_text(encoding="utf-8"))
        lines = (folder / "rounds.jsonl").read_text(encoding="utf-8").split("\n")
        # A process that was killed may have left a part of a line at the end.
        records = [RoundRecord.from_json(line) for line in lines[:-1]]
        samples_file = folder / "samples.json"
        samples = json.loads(samples_file.read_text("utf-8")) if samples_file.exists() else []
        labels, clients = tuple(roster["labels"]), list(roster["clients"])
    except (OSError, ValueError, KeyError) as error:
        raise RunError(
            f"A file of {folder} is damaged or missing: {error}. `fedtune run RECIPE --resume` "
            "writes the reports of its rounds again; --overwrite starts over."
        ) from error
    references = {
        path.name: read(path)
        for path in sorted(folder.glob("references/*"))
        if (path / "rounds.jsonl").exists()
    }
    return Run(folder, experiment, labels, clients, records, references, samples)


def summarise(sums: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Ratios from sums.

    loss and accuracies are means. Macro-F1, precision and recall are unweighted means over the
    classes that occur among the labels or the predictions, a ratio without denominator being 0
    (the convention of scikit-learn with zero_division=0). perplexity = exp(loss) for a language
    model, whose loss is in nats a token.
    """
    numbers = {
        name: values[0] / values[1]
        for name, values in sums.items()
        if len(values) == 2 and values[1] and name not in ("predicted", "actual", "true_positive")
    }
    if "token_accuracy" in numbers:
        numbers["perplexity"] = math.exp(min(numbers["loss"], 700.0))
    if "true_positive" in sums:
        right, predicted, actual = (sums[k] for k in ("true_positive", "predicted", "actual"))
        seen = [k for k in range(len(actual)) if predicted[k] or actual[k]]
        count = max(1, len(seen))
        numbers["precision"] = sum(right[k] / predicted[k] for k in seen if predicted[k]) / count
        numbers["recall"] = sum(right[k] / actual[k] for k in seen if actual[k]) / count
        numbers["macro_f1"] = sum(2 * right[k] / (predicted[k] + actual[k]) for k in seen) / count
    return numbers


def metrics_of(sums: Mapping[str, object]) -> tuple[str, ...]:
    """The metrics that tables show for such sums, the first being what quality means."""
    return LANGUAGE_MODEL if "token_accuracy" in sums else CLASSIFICATION


def wilson(correct: float, rows: float) -> tuple[float, float]:
    """The 95 % interval of a proportion. Wilson 1927, JASA 22, 209-212."""
    if not rows:
        return 0.0, 1.0
    p, spread = correct / rows, Z * Z / rows
    middle = (p + spread / 2) / (1 + spread)
    half = Z / (1 + spread) * math.sqrt(p * (1 - p) / rows + spread / (4 * rows))
    return middle - half, middle + half


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        kind: untuned, alone, federated or reference.
        name: for a person.
        numbers: metric -> value, on the pooled test rows.
        bytes_moved: broadcast and sent for training; None where nothing was federated.
        seconds: of wall-clock time, evaluation included.
        interval: of the accuracy, 95 %, for the number of test rows; None for language models.
    """

    kind: str
    name: str
    numbers: dict[str, float]
    bytes_moved: int | None
    seconds: float
    interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class Result:
    """What a run showed.

    Attributes:
        name: of the run.
        metrics: the columns, the first being what quality means for the task.
        rows: untuned, each client alone, federated, other references.
        own: client -> model -> the first metric on the client's own test rows.
        test_rows: pooled.
        rejected: replies that were set aside.
        verdict: one or two sentences.
        padding: the share of padding among the tokens that the base was trained on, None where the
            clients do not tell.
    """

    name: str
    metrics: tuple[str, ...]
    rows: list[Row]
    own: dict[str, dict[str, float]]
    test_rows: int
    rejected: int
    verdict: str
    padding: float | None = None

    def to_json(self) -> dict[str, Any]:
        """For scripts."""
        return asdict(self)


def pooled(record: RoundRecord) -> Sums:
    """The metrics over all clients' own test rows, {} in a round without evaluation."""
    return merge(record.evaluation.get("own", {}).values())


def last_evaluated(run: Run) -> RoundRecord:
    """The last record with an evaluation; round 0 always has one."""
    evaluated = [record for record in run.records if record.evaluation.get("own")]
    if not evaluated:
        raise RunError(f"{run.folder} has no evaluation: no client has test rows.")
    return evaluated[-1]


def result(run: Run) -> Result:
    """The table of a run, finished or not.

    Raises:
        RunError: nothing was evaluated.
    """
    last = last_evaluated(run)
    final = pooled(last)
    metrics = metrics_of(final)
    rows = [_row("untuned", "untuned model", pooled(run.records[0]), 0, run.records[:1])]
    alone = run.references.get("local_only")
    if alone:
        for client, sums in sorted(alone.records[-1].evaluation.get("pooled", {}).items()):
            rows.append(
                _row("alone", f"{client} alone", sums, None, [], _seconds_of(alone, client))
            )
    strategy = run.experiment.strategy
    title = strategy if strategy in ("local_only", "centralized") else f"federated ({strategy})"
    rows.append(_row("federated", title, final, _moved(run), run.records[1:]))
    for name, reference in run.references.items():
        if name != "local_only":
            sums = pooled(last_evaluated(reference))
            moved = None if name == "centralized" else _moved(reference)
            rows.append(_row("reference", name, sums, moved, reference.records[1:]))
    test_rows = int(sum(client["test_examples"] or 0 for client in run.clients))
    rejected = sum(len(record.rejected) for record in run.records)
    own = _own(run, last, metrics[0])
    verdict = _verdict(rows, metrics[0], test_rows)
    tokens = [sum(counts) for counts in zip(*(r.tokens for r in run.records), strict=True)]
    return Result(
        run.experiment.name, metrics, rows, own, test_rows, rejected, verdict, padding(tokens)
    )


def _row(
    kind: str,
    name: str,
    sums: Sums,
    moved: int | None,
    records: Sequence[RoundRecord],
    seconds: float | None = None,
) -> Row:
    took = sum(record.seconds for record in records) if seconds is None else seconds
    interval = wilson(*sums["accuracy"]) if "accuracy" in sums else None
    return Row(kind, name, summarise(sums), moved, took, interval)


def _moved(run: Run) -> int:
    return sum(record.bytes_down + record.bytes_up for record in run.records)


def _seconds_of(alone: Run, client: str) -> float:
    """A client's share of the time that all of them took together, by its examples."""
    examples = {c["name"]: c["examples"] or 0 for c in alone.clients}
    total = sum(record.seconds for record in alone.records[1:])
    return total * examples[client] / max(1, sum(examples.values()))


def _own(run: Run, last: RoundRecord, metric: str) -> dict[str, dict[str, float]]:
    alone = run.references.get("local_only")
    theirs = alone.records[-1].evaluation.get("own", {}) if alone else {}
    models = {
        "untuned": run.records[0].evaluation.get("own", {}),
        "alone": theirs,
        "federated": last.evaluation.get("own", {}),
    }
    return {
        str(client["name"]): {
            model: summarise(sums[client["name"]])[metric]
            for model, sums in models.items()
            if client["name"] in sums
        }
        for client in run.clients
    }


def better(metric: str, first: float, second: float) -> bool:
    """Whether `first` is the better value of `metric`."""
    return first < second if metric in LOWER_IS_BETTER else first > second


def _verdict(rows: Sequence[Row], metric: str, test_rows: int) -> str:
    """What the numbers say, in words; it does not flatter."""
    federated = next(row for row in rows if row.kind == "federated")
    value, name = federated.numbers[metric], metric.replace("_", " ")
    sentence = f"{federated.name.capitalize()} training reaches {name} {value:.3f}"
    if federated.interval:
        low, high = federated.interval
        sentence += f" (95 % interval {low:.3f} to {high:.3f}"
        sentence += f") on {test_rows:,} pooled test rows"
    else:
        sentence += f" on {test_rows:,} pooled test rows"
    compared = []
    alone = [row for row in rows if row.kind == "alone"]
    if alone:
        lowest = metric in LOWER_IS_BETTER
        best = (min if lowest else max)(alone, key=lambda row: row.numbers[metric])
        client = best.name.removesuffix(" alone")
        who = f"the best client alone, {client}"
        compared.append(_compared(metric, value, best.numbers[metric], who))
    compared += [
        _compared(metric, value, row.numbers[metric], f"{row.name} training")
        for row in rows
        if row.kind == "reference"
    ]
    return f"{sentence}{': ' if compared else ''}{', and '.join(compared)}."


def _compared(metric: str, value: float, other: float, name: str) -> str:
    gap = abs(value - other)
    if gap < 5e-4:
        return f"the same as {name} (at {other:.3f})"
    word = "better" if better(metric, value, other) else "worse"
    return f"{gap:.3f} {word} than {name} (at {other:.3f})"


def human_bytes(count: float) -> str:
    """Decimal units, as networks have them."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def human_time(seconds: float) -> str:
    """Seconds, minutes or hours, whichever reads best."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
