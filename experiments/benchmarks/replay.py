"""One round's saved client updates through every strategy's aggregate: only the operator varies.

Real clients train for a few rounds (`recording.py`); the updates of the last one are kept, and
every strategy of the registry joins the same ones (`operators.py`). Beside them stand formulas
found wrong in public code (`defects.py`). Tables and plots are written beside the raw results; what
was recorded is replayed again with --replay.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

import defects
import operators
import recording
from fedtune import aggregation
from fedtune.adapter import State
from fedtune.components import build
from fedtune.config import Experiment
from fedtune.report import human_bytes
from fedtune.strategies import STRATEGIES
from fedtune.tasks import TASKS
from recording import Recorded

mpl.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).resolve().parent
VARIANTS = ("flora(energy=0.9)", "fedex_lora(rank=8)")  # beside every strategy as it is by default
MIXED = "4,8,16"
FLOOR = 1e-4  # where a plot on a logarithmic axis puts what is exact
EXACT = 1e-10
COLOURS = ("#1b6ca8", "#b35c1e", "#5f7f3a", "#7a4d8f", "#777777", "#c2557a", "#3b3b3b")


def experiment_of(recipe: Path, clients: int, ranks: str, count: int, steps: int) -> Experiment:
    """The recipe with so many clients of skewed labels, for a few rounds."""
    e = Experiment.load(recipe)
    column = getattr(build(e.task, TASKS, "task"), "label", "label")
    rank = max(map(int, ranks.split(","))) if ranks else e.adapter.rank
    scaling = e.adapter.alpha / e.adapter.rank
    return e.replace(
        rounds=count,
        combine="mean",
        cohort="all",
        data__partition=f"dirichlet(alpha=0.3, column='{column}')",
        data__clients=clients,
        adapter__rank=rank,
        adapter__ranks=ranks,
        adapter__alpha=scaling * rank,
        train__schedule="constant",
        train__steps=steps,
        evaluation__every=count,
        evaluation__samples=0,
    )


def settings(options: argparse.Namespace) -> dict[str, tuple[int, str]]:
    """Name -> (clients, ranks) of every recording."""
    counts = [int(word) for word in options.clients.split(",")]
    found = {f"{count} clients": (count, "") for count in counts}
    if options.ranks:
        middle = sorted(counts)[len(counts) // 2]
        found[f"{middle} clients of ranks {options.ranks}"] = (middle, options.ranks)
    return found


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Record what is not there yet, and replay everything."""
    recorded: dict[str, Recorded] = {}
    for number, (setting, (clients, ranks)) in enumerate(settings(options).items()):
        folder = options.output / "rounds" / str(number)
        if not options.replay:
            _say(f"training {setting} for {options.rounds} rounds")
            e = experiment_of(options.recipe, clients, ranks, options.rounds, options.steps)
            recording.record(e, folder)
        recorded[setting] = recording.read(folder)
    texts = options.strategies.split(";") if options.strategies else _every()
    lines = operators.all_of(texts, recorded)
    told = {key: str(value) for key, value in vars(options).items()}
    return {
        "options": told,
        "settings": {
            setting: {"clients": len(r.clients), "round": r.round, "ideal": _ideal(r)}
            for setting, r in recorded.items()
        },
        "lines": lines,
        "defects": defects.table(_plain(recorded)),
    }


def _every() -> list[str]:
    """All strategies as they are by default, and some variants of those that are there."""
    variants = [text for text in VARIANTS if text.split("(")[0] in STRATEGIES]
    return sorted([*STRATEGIES, *variants])


def _plain(recorded: Mapping[str, Recorded]) -> Recorded:
    """The recording in the middle of those with one rank."""
    plain = sorted((r for r in recorded.values() if not r.ranks), key=lambda r: len(r.clients))
    return plain[len(plain) // 2]


def _ideal(recorded: Recorded) -> dict[str, float]:
    """What the clients are like: ranks of their mean product, drift, cosine."""
    before: State = {"adapter": recorded.before}
    ended = [client.ended for client in recorded.clients]
    weights = [client.weight for client in recorded.clients]
    return aggregation.measure(ended, weights, before, before)


def markdown(results: Mapping[str, Any]) -> str:
    """The whole report."""
    names = list(results["settings"])
    middle = _middle(results)
    text = [*_clients(results), "", "## Error against the oracle", ""]
    text += ["| strategy | keeps of a client | error for these | " + " | ".join(names) + " |"]
    text += ["|---" * (3 + len(names)) + "|"]
    for strategy, lines in _by_strategy(results).items():
        known = [line for line in lines.values() if "error" in line]
        if known:
            cells = [_shown(lines[name].get("oracle_error")) for name in names]
            worst = _shown(max(line["error"] for line in known))
            text.append(f"| {strategy} | {known[0]['trained']} | {worst} | {' | '.join(cells)} |")
    text += ["", f"## {middle}: rank, traffic and time", ""]
    text += [
        "| strategy | effective rank | up | down | aggregate, CPU s |",
        "|---|---|---|---|---|",
    ]
    for strategy, lines in _by_strategy(results).items():
        line = lines[middle]
        if "error" in line:
            up, down = human_bytes(line["bytes_up"]), human_bytes(line["bytes_down"])
            text.append(
                f"| {strategy} | {line['effective_rank']:.1f} | {up} | {down} "
                f"| {line['seconds']:.3f} |"
            )
    return "\n".join([*text, *_reasons(results), *_defects(results)]) + "\n"


def _middle(results: Mapping[str, Any]) -> str:
    """The setting of one rank with a middling number of clients."""
    plain = [name for name in results["settings"] if "ranks" not in name]
    return plain[len(plain) // 2]


def _by_strategy(results: Mapping[str, Any]) -> dict[str, dict[str, dict[str, Any]]]:
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for line in results["lines"]:
        found.setdefault(line["strategy"], {})[line["setting"]] = line
    return found


def _clients(results: Mapping[str, Any]) -> list[str]:
    text = ["| clients | effective rank of the mean | drift | update cosine |", "|---|---|---|---|"]
    for name, told in results["settings"].items():
        i = told["ideal"]
        cosine = f"{i['update_cosine']:.2f}" if "update_cosine" in i else "-"
        text.append(f"| {name} | {i['effective_rank']:.1f} | {i['drift']:.2f} | {cosine} |")
    return text


def _shown(error: float | None) -> str:
    if error is None:
        return "-"
    if error < EXACT:
        return "exact"
    return f"{error:.3f}" if error >= 1e-3 else f"{error:.1e}"


def _reasons(results: Mapping[str, Any]) -> list[str]:
    """Why a strategy has no number, once each."""
    told: dict[tuple[str, str], list[str]] = {}
    for line in results["lines"]:
        if "reason" in line:
            told.setdefault((line["strategy"], line["reason"]), []).append(line["setting"])
    everywhere = len(results["settings"])
    lines = []
    for (strategy, reason), where in told.items():
        some = "" if len(where) == everywhere else f" ({', '.join(where)})"
        lines.append(f"- {strategy}{some}: {reason}.")
    return ["", "Not applicable:", "", *lines] if lines else []


def _defects(results: Mapping[str, Any]) -> list[str]:
    text = ["", "## Formulas found in public code", ""]
    text += [
        "| where | formula | drawn: right | drawn: found | recorded: right | recorded: found |",
        "|---|---|---|---|---|---|",
    ]
    for line in results["defects"]:
        cells = [_shown(line.get(key)) for key in ("drawn_ours", "drawn_theirs", "ours", "theirs")]
        text.append(f"| {line['where']} | {line['what']} | {' | '.join(cells)} |")
    return text


def draw(results: Mapping[str, Any], folder: Path) -> list[Path]:
    """Errors, and bytes of one client, strategy by strategy; as PNG and SVG."""
    middle, found = _middle(results), _by_strategy(results)
    shown = {k: lines for k, lines in found.items() if "error" in lines[middle]}
    order = sorted(shown, key=lambda k: (-shown[k][middle]["oracle_error"], k))
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(11, 0.34 * len(order) + 1.8), sharey=True, layout="constrained"
    )
    for (name, marker), colour in zip(
        zip(results["settings"], "osD^v<>", strict=False), COLOURS, strict=False
    ):
        points = [
            (max(FLOOR, shown[k][name]["oracle_error"]), y)
            for y, k in enumerate(order)
            if "error" in shown[k][name]
        ]
        left.plot(*zip(*points, strict=True), marker, color=colour, label=name, alpha=0.8)
    left.set_xscale("log")
    left.set_xticks([FLOOR, 1e-3, 1e-2, 0.1, 1], ["exact", "0.001", "0.01", "0.1", "1"])
    left.set_yticks(range(len(order)), order)
    left.set_xlabel("distance from the mean of the clients' products, relative")
    left.grid(axis="x", color="#dddddd")
    left.legend(fontsize=8)
    for key, offset, colour in (("bytes_down", 0.2, COLOURS[0]), ("bytes_up", -0.2, COLOURS[1])):
        values = [shown[k][middle][key] / 1e6 for k in order]
        places = [y + offset for y in range(len(order))]
        right.barh(places, values, 0.38, color=colour, label=key.removeprefix("bytes_"))
    right.set_xlabel(f"MB a client and round, {middle}")
    right.legend(fontsize=8)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    paths = [folder / f"replay.{kind}" for kind in ("png", "svg")]
    for path in paths:
        figure.savefig(path, dpi=150, facecolor="white")
    plt.close(figure)
    return paths


def _say(text: str) -> None:
    print(text, flush=True)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options of a command line."""
    parser = argparse.ArgumentParser(prog="replay.py", description=__doc__)
    recipe = HERE.parent / "quickstart.toml"
    parser.add_argument("--recipe", type=Path, default=recipe, help="a classification recipe")
    parser.add_argument("--clients", default="3,10,50", help="how many, one recording each")
    parser.add_argument("--ranks", default=MIXED, help="of one more recording; '' for none")
    parser.add_argument("--rounds", type=int, default=3, help="the last one is kept")
    parser.add_argument("--steps", type=int, default=5, help="of a client in a round")
    parser.add_argument("--strategies", default="", help="as in recipes, with ';' between them")
    parser.add_argument("--output", type=Path, default=Path("runs/bench/replay"), help="a folder")
    parser.add_argument("--replay", action="store_true", help="what was recorded, again")
    options = parser.parse_args(arguments)
    options.recipe, options.output = options.recipe.absolute(), options.output.absolute()
    return options


def main() -> None:
    """The command."""
    options = parse(sys.argv[1:])
    options.output.mkdir(parents=True, exist_ok=True)
    results = measure(options)
    (options.output / "results.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
    text = markdown(results)
    (options.output / "results.md").write_text(text, encoding="utf-8")
    _say(text)
    for path in draw(results, options.output):
        _say(f"plot: {path}")


if __name__ == "__main__":
    main()
