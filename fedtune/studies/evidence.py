"""What the finished cells of an arm show, before anything is made of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from fedtune import parts, report
from fedtune.config import Experiment
from fedtune.errors import RunError
from fedtune.records import RoundRecord, Sums, merge
from fedtune.report import Run
from fedtune.strategies import STRATEGIES, Strategy
from fedtune.studies import statistics
from fedtune.studies.comparison import GLOBAL, PERSONAL, UNTUNED
from fedtune.studies.statistics import Sample

Own = Mapping[str, Sums]  # client -> metrics on its own test rows


@dataclass(frozen=True, eq=False)
class Evidence:
    """What an arm's finished cells show.

    Attributes:
        name: of the arm.
        role: "strategy" or "reference".
        kind: "global" or "personal".
        runs: seed -> cell, ascending.
        untuned: whether round 0 counts in place of the last.
    """

    name: str
    role: str
    kind: str
    runs: dict[int, Run]
    untuned: bool = False
    _samples: dict[tuple[int, bool], Sample] = field(default_factory=dict)

    @property
    def pools(self) -> bool:
        """Whether one client held the rows of all."""
        return not self.untuned and _class_of(self.name).pools

    @property
    def federated(self) -> bool:
        """Whether anything was learnt from others, so that bytes mean something."""
        return not self.untuned and _class_of(self.name).joins

    def records(self, seed: int) -> Sequence[RoundRecord]:
        """A cell's rounds, of the untuned model the first."""
        records = self.runs[seed].records
        return records[:1] if self.untuned else records

    def own(self, seed: int) -> Own:
        """A cell's last evaluation, by client."""
        return self.records(seed)[-1].evaluation["own"]

    def sample(self, seed: int, whole: bool) -> Sample:
        """A cell's last sums as arrays (clients, numbers); one row for all clients if `whole`."""
        if (seed, whole) not in self._samples:
            own = [sums for _, sums in sorted(self.own(seed).items())]
            arrays = {name: np.array([sums[name] for sums in own]) for name in own[0]}
            if whole:
                arrays = {name: values.sum(0, keepdims=True) for name, values in arrays.items()}
            self._samples[seed, whole] = arrays
        return self._samples[seed, whole]

    def measures(self, metric: str) -> bool:
        """Whether its cells have the metric."""
        return metric in report.summarise(merge(self.own(next(iter(self.runs))).values()))

    def value(self, seed: int, metric: str) -> float:
        """The metric over all test rows after a cell's last round."""
        return float(statistics.metric_of(metric, self.sample(seed, whole=True))[0])


def _class_of(arm: str) -> type[Strategy]:
    return STRATEGIES[arm.partition("(")[0].strip()]


def kind_of(experiment: Experiment) -> str:
    """Whether the result of an experiment is one model or one a client."""
    return PERSONAL if parts.resolve(experiment).strategy.personal else GLOBAL


def read(cell: Experiment) -> Run:
    """A finished cell.

    Raises:
        RunError: it is damaged, or its last evaluation lacks a client, as when training diverged.
    """
    run = report.read(parts.folder_of(cell))
    last = run.records[-1]
    tested = {str(c["name"]) for c in run.clients if c["test_examples"]}
    if missing := sorted(tested - last.evaluation.get("own", {}).keys()):
        reasons = [r.reason for r in last.rejected if r.client == missing[0]]
        raise RunError(
            f"The last evaluation has no result of {', '.join(missing[:3])}"
            f"{': ' + reasons[0] if reasons else ''}. {run.folder} holds the cell."
        )
    return run


def has(evidence: Evidence, protocol: str, baseline: str) -> bool:
    """Whether an arm stands in a protocol's table; see comparison.py."""
    if protocol == GLOBAL:
        return evidence.kind == GLOBAL
    yardstick = evidence.name == baseline or evidence.role == "reference"
    return evidence.kind == PERSONAL or yardstick


def untuned(cells: Mapping[str, Evidence]) -> Evidence | None:
    """The model before round 1, the same for all arms of a seed: from whichever has the seed."""
    runs: dict[int, Run] = {}
    for evidence in cells.values():
        if not evidence.pools:
            runs = {**evidence.runs, **runs}
    return (
        Evidence(UNTUNED, "reference", GLOBAL, dict(sorted(runs.items())), True) if runs else None
    )
