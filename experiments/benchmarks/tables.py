"""Results as Markdown: what each competitor took, the ratios, and targets beside measurements."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from spec import COMPETITORS, TARGETS, WORKLOADS, Target

Run = Mapping[str, Any]
AGREE = 0.05  # of the final training loss: how far equal work may lie apart


def steady(run: Run, measure: str = "rounds") -> float:
    """Median seconds of a round, without the first and, where there are three, the last.

    The first warms up; in the last one FedTune evaluates. With "cpu_rounds" CPU seconds of all
    processes, which other load on the machine changes less.
    """
    seconds = run[measure]
    kept: list[float] = seconds[1:-1] or seconds[1:] or seconds
    return statistics.median(kept) if kept else math.nan


def rate(run: Run) -> float:
    """Tokens a second, padding not counted."""
    told = run["more"].get("tokens_per_second")
    return float(max(told.values())) if told else float(run["tokens"]) / steady(run)


def flops(run: Run) -> float:
    """What a token of this run's rows costs at least: floating-point operations.

    With a frozen base 2 P forward and 2 P backward, P the encoder's multiplied parameters; the
    adapters' own gradients are a third pass over few parameters; attention multiplies each token
    with all others twice, and its backward costs twice as much.
    """
    layers, width, inner, rank = 6, 384, 1536, 8
    size = run["size"]
    adapted = size["top_layers"] or layers
    frozen = layers * (4 * width * width + 2 * width * inner)
    lora = adapted * 2 * rank * (width + width)
    attention = layers * 2 * 2 * size["tokens"] * width
    backward = adapted / layers
    return float(2 * frozen + attention + backward * 2 * (frozen + attention) + 6 * lora)


def line(run: Run) -> str:
    """One measurement, as it is told while the rest is going on."""
    name = f"{run['workload']} {run['x'] or ''} #{run['repetition'] + 1} {run['competitor']}"
    if "skipped" in run:
        return f"{name}: skipped: {run['skipped']}"
    if "failed" in run:
        return f"{name}: FAILED: {run['failed']}"
    if not run["rounds"]:
        return f"{name}: {_brief(run)}"
    return (
        f"{name}: {steady(run):.2f} s a round, start-up {run['startup']:.1f} s, "
        f"total {run['total']:.1f} s, CPU {run['cpu_seconds']:.0f} s, "
        f"{run['peak_bytes'] / 1e9:.2f} GB, loss {run['train_loss']:.3f}"
    )


def _brief(run: Run) -> str:
    more = run["more"]
    if "flops" in more:
        return f"{more['flops'] / 1e9:.0f} GFLOP/s"
    return f"{rate(run):.0f} tokens/s at batch size {more['best_batch_size']}"


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Median, and minimum and maximum where there are several."""
    if not values:
        return "-"
    middle = f"{statistics.median(values):.{digits}f}"
    if len(values) == 1:
        return middle
    return f"{middle} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def _done(results: Mapping[str, Any], workload: str, competitor: str, x: int = 0) -> list[Run]:
    return [
        run
        for run in results["runs"]
        if run["workload"] == workload
        and run["competitor"] == competitor
        and run["x"] == x
        and "startup" in run
    ]


def ratios(results: Mapping[str, Any], target: Target, seconds: str = "rounds") -> list[float]:
    """The target's measure in every repetition that has both sides; see `steady` for `seconds`."""
    own = {run["repetition"]: run for run in _done(results, target.workload, target.own)}
    rivals = {run["repetition"]: run for run in _done(results, target.workload, target.rival)}
    found = []
    for repetition in sorted(own.keys() & rivals.keys()):
        mine, other = own[repetition], rivals[repetition]
        if target.measure == "total":
            found.append(other["total"] / mine["total"])
        elif target.measure == "round":
            found.append(steady(other, seconds) / steady(mine, seconds))
        elif target.rival == "floor":
            found.append(rate(mine) * flops(mine) / other["more"]["flops"])
        else:
            found.append(rate(mine) / rate(other))
    return found


def markdown(results: Mapping[str, Any]) -> str:
    """The whole report."""
    machine = results["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    text = [
        f"{machine['cpu']}, {machine['cores']} cores, Python {machine['python']}; {versions}. "
        "Median (smallest-largest) over repetitions; ratios are within one repetition.",
        *_targets(results),
    ]
    for name, workload in WORKLOADS.items():
        runs = [run for run in results["runs"] if run["workload"] == name]
        if runs:
            text += _series(results, name) if workload.axis else _workload(results, name)
            text += _profiles(runs)
            text += _disagreements(runs)
    for run in results["runs"]:
        if "failed" in run or "skipped" in run:
            text.append(f"- {line(run).splitlines()[0]}")
    text += [f"- {told['workload']}: skipped: {told['reason']}" for told in results["skipped"]]
    return "\n".join(text) + "\n"


def _targets(results: Mapping[str, Any]) -> list[str]:
    words = {"round": "a steady round", "total": "the whole command", "rate": "tokens a second"}
    if results["options"]["quick"]:
        return ["", "Sizes this small say that everything runs, and nothing about targets."]
    rows = []
    for target in TARGETS:
        found = ratios(results, target)
        if found:
            met = "yes" if statistics.median(found) >= target.least else "no"
            own, rival = COMPETITORS[target.own].title, COMPETITORS[target.rival].title
            what = f"{own} against {rival}, {words[target.measure]}"
            cpu = ratios(results, target, "cpu_rounds") if target.measure == "round" else []
            rows.append(
                f"| {target.workload} | {what} | {target.least:g} | {spread(found)} | {met} "
                f"| {spread(cpu)} |"
            )
    rows += _flat(results)
    head = ["", "## Targets", "", "| workload | ratio | target | measured | met | in CPU |"]
    return [*head, "|---|---|---|---|---|---|", *rows] if rows else []


def _flat(results: Mapping[str, Any]) -> list[str]:
    """The promise of many clients: time a client and memory do not grow."""
    points = {x: _done(results, "many", "fedtune-batched", x) for x in WORKLOADS["many"].points}
    measured = {x: runs for x, runs in points.items() if runs}
    if len(measured) < 2:
        return []
    few, many = min(measured), max(measured)
    pairs = list(zip(measured[few], measured[many], strict=False))
    time = [(steady(b) / many) / (steady(a) / few) for a, b in pairs]
    memory = [b["peak_bytes"] / a["peak_bytes"] for a, b in pairs]
    met = ["yes" if statistics.median(values) <= 1.1 else "no" for values in (time, memory)]
    what = f"at {many} clients over at {few}"
    return [
        f"| many | seconds a client {what} | at most 1.1 | {spread(time)} | {met[0]} | - |",
        f"| many | peak memory {what} | at most 1.1 | {spread(memory)} | {met[1]} | - |",
    ]


def _workload(results: Mapping[str, Any], name: str) -> list[str]:
    workload = WORKLOADS[name]
    runs = [run for run in results["runs"] if run["workload"] == name]
    size = runs[0]["size"]
    text = [
        "",
        f"## {name}",
        "",
        f"{workload.question}. {size['clients']} clients, {size['rounds']} rounds, batches of "
        f"{size['batch_size']} rows, at most {size['tokens']} tokens a row, {runs[0]['tokens']:,} "
        "tokens a round.",
        "",
        "| competitor | round, s | CPU, s | first, s | start-up, s | command, s | memory, GB "
        "| tokens/s | train loss | test loss | accuracy |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for competitor in dict.fromkeys(run["competitor"] for run in runs):
        done = _done(results, name, competitor)
        if done:
            text.append(_row(competitor, done))
    return text


def _row(competitor: str, done: Sequence[Run]) -> str:
    title = COMPETITORS[competitor].title
    if "flops" in done[0]["more"]:
        rates = [run["more"]["flops"] / 1e9 for run in done]
        return f"| {title}: {spread(rates, 0)} GFLOP/s |" + " |" * 10
    federated = [run for run in done if run["rounds"]]
    return (
        "| "
        + " | ".join(
            [
                title,
                spread([steady(run) for run in federated]),
                spread([steady(run, "cpu_rounds") for run in federated]),
                spread([run["rounds"][0] for run in federated]),
                spread([run["startup"] for run in done], 1),
                spread([run["total"] for run in done], 1),
                spread([run["peak_bytes"] / 1e9 for run in done]),
                spread([rate(run) for run in done], 0),
                spread([run["train_loss"] for run in federated], 3),
                spread([run["test_loss"] for run in done], 3),
                spread([run["test_accuracy"] for run in done], 3),
            ]
        )
        + " |"
    )


def _series(results: Mapping[str, Any], name: str) -> list[str]:
    workload = WORKLOADS[name]
    runs = [run for run in results["runs"] if run["workload"] == name]
    text = [
        "",
        f"## {name}",
        "",
        f"{workload.question}.",
        "",
        f"| competitor | {workload.axis} | round, s | s a client | tokens/s | memory, GB "
        "| train loss |",
        "|---|---|---|---|---|---|---|",
    ]
    for competitor in dict.fromkeys(run["competitor"] for run in runs):
        for x in dict.fromkeys(run["x"] for run in runs):
            done = [run for run in _done(results, name, competitor, x) if run["rounds"]]
            if done:
                clients = done[0]["size"]["clients"]
                cells = [
                    COMPETITORS[competitor].title,
                    str(x),
                    spread([steady(run) for run in done]),
                    spread([steady(run) / clients for run in done], 3),
                    spread([rate(run) for run in done], 0),
                    spread([run["peak_bytes"] / 1e9 for run in done]),
                    spread([run["train_loss"] for run in done], 3),
                ]
                text.append("| " + " | ".join(cells) + " |")
    return text


def _profiles(runs: Sequence[Run]) -> list[str]:
    text = []
    for run in runs:
        found = run.get("more", {}).get("profile")
        if found:
            text += ["", f"A round of FedTune, one process, {found['seconds']:.2f} s:"]
            for part in ("forward", "backward", "optimizer", "outside"):
                goal = " (target: at most 3 %)" if part == "outside" else ""
                text.append(f"- {part}: {found[part] / found['seconds']:.1%}{goal}")
            text += [
                f"    - {own} in {calls} calls: `{place}`" for own, calls, place in found["lines"]
            ]
    return text


def _disagreements(runs: Sequence[Run]) -> list[str]:
    """Federated competitors whose training loss is not that of the others: unequal work."""
    federated = [run for run in runs if run.get("rounds")]
    text: list[str] = []
    for x in dict.fromkeys(run["x"] for run in federated):
        same = [run for run in federated if run["x"] == x]
        middle = statistics.median(run["train_loss"] for run in same)
        for run in same:
            apart = abs(run["train_loss"] - middle) / middle
            if apart > AGREE:
                where = f"{run['workload']}{f' at {x}' if x else ''}"
                text.append(
                    f"\nThe training loss of {run['competitor']} ({where}) lies {apart:.0%} from "
                    "the median."
                )
    return text
