"""Plots of results: seconds a round beside each other, and curves where something varies."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

import tables
from spec import COMPETITORS, WORKLOADS

mpl.use("Agg")
import matplotlib.pyplot as plt

OWN, OTHERS = "#1b6ca8", ["#b35c1e", "#5f7f3a", "#7a4d8f", "#777777"]
Run = Mapping[str, Any]


def draw(results: Mapping[str, Any], folder: Path) -> list[Path]:
    """One PNG a workload; returns their paths."""
    paths = []
    for name, workload in WORKLOADS.items():
        runs = [run for run in results["runs"] if run["workload"] == name and run.get("rounds")]
        if not runs:
            continue
        figure = _curves(name, runs) if workload.axis else _bars(name, runs, workload.whole)
        path = folder / f"{name}.png"
        figure.savefig(path, dpi=150, facecolor="white", bbox_inches="tight")
        plt.close(figure)
        paths.append(path)
    return paths


def _bars(name: str, runs: Sequence[Run], whole: bool) -> Any:
    """Median and range of each competitor, the fastest on top."""
    values: dict[str, list[float]] = {}
    for run in runs:
        seconds = run["total"] if whole else tables.steady(run)
        values.setdefault(run["competitor"], []).append(seconds)
    order = sorted(values, key=lambda key: -statistics.median(values[key]))
    middle = [statistics.median(values[key]) for key in order]
    reach = [
        [m - min(values[key]) for key, m in zip(order, middle, strict=True)],
        [max(values[key]) - m for key, m in zip(order, middle, strict=True)],
    ]
    figure, axes = plt.subplots(figsize=(8, 0.6 * len(order) + 1.4))
    colors = [OWN if key.startswith("fedtune") else "#b8b8b8" for key in order]
    axes.barh([COMPETITORS[key].title for key in order], middle, xerr=reach, color=colors)
    for place, m in enumerate(middle):
        axes.text(m + reach[1][place], place, f"  {m:.3g} s", va="center")
    axes.set_xlim(0, 1.15 * max(m + r for m, r in zip(middle, reach[1], strict=True)))
    axes.set_xlabel("seconds of the whole command" if whole else "seconds a steady round")
    axes.set_title(f"{name}: {WORKLOADS[name].question}")
    axes.spines[["top", "right"]].set_visible(False)
    return figure


MEASURES: dict[str, tuple[str, Callable[[Run], float]]] = {
    "many": ("seconds a client", lambda run: tables.steady(run) / run["size"]["clients"]),
    "microbatch": ("tokens a second", tables.rate),
    "memory": ("peak memory, GB", lambda run: run["peak_bytes"] / 1e9),
}


def _curves(name: str, runs: Sequence[Run]) -> Any:
    """The workload's measure against what varies; many clients have their memory beside it."""
    measures = [MEASURES.get(name, MEASURES["microbatch"])]
    if name == "many":
        measures.append(MEASURES["memory"])
    figure, panels = plt.subplots(1, len(measures), figsize=(6 * len(measures), 4), squeeze=False)
    for axes, (label, measure) in zip(panels[0], measures, strict=True):
        _curve(axes, runs, measure)
        axes.set_xscale("log", base=2 if name != "many" else 10)
        ticks = sorted({run["x"] for run in runs})
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.minorticks_off()
        axes.set_ylim(0, 1.1 * axes.get_ylim()[1])
        axes.set_xlabel(WORKLOADS[name].axis)
        axes.set_ylabel(label)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0][0].legend(frameon=False, loc="lower center")
    figure.suptitle(f"{name}: {WORKLOADS[name].question}")
    return figure


def _curve(axes: Any, runs: Sequence[Run], measure: Callable[[Run], float]) -> None:
    others = iter(OTHERS * 3)
    for competitor in dict.fromkeys(run["competitor"] for run in runs):
        points: dict[int, list[float]] = {}
        for run in runs:
            if run["competitor"] == competitor:
                points.setdefault(run["x"], []).append(measure(run))
        xs = sorted(points)
        color = OWN if competitor == "fedtune-batched" else next(others)
        middle = [statistics.median(points[x]) for x in xs]
        axes.plot(xs, middle, marker="o", color=color, label=COMPETITORS[competitor].title)
        low, high = [min(points[x]) for x in xs], [max(points[x]) for x in xs]
        axes.fill_between(xs, low, high, color=color, alpha=0.2, linewidth=0)
