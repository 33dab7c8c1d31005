"""What a competitor is asked to do, and what it answers: two JSON files.

Nothing heavy is imported here: importing torch is part of a competitor's own start-up.
"""

import dataclasses
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self


@dataclass(frozen=True)
class Job:
    """The same for all competitors of one measurement, but for `options`.

    Attributes:
        model: an installed model package or a folder.
        train: a file of JSON lines with text, label and client.
        test: another.
        rounds: federated rounds; a client goes once through its rows in each.
        batch_size: rows of an optimizer step.
        max_length: tokens kept of a row.
        learning_rate: of AdamW, constant.
        top_layers: how many upper layers have adapters; 0 is all.
        processes: how many may work at once, one torch thread each.
        folder: where a competitor may write.
        task: classification or causal_lm.
        dtype: of the frozen base.
        device: cpu or cuda.
        start: a file of the tensors that all begin with, see start.py; "" where there is none.
        options: what makes it this competitor.
    """

    model: str
    train: str
    test: str
    rounds: int
    batch_size: int
    max_length: int
    learning_rate: float
    top_layers: int
    processes: int
    folder: str
    task: str = "classification"
    dtype: str = "float32"
    device: str = "cpu"
    start: str = ""
    options: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """The job of a file that `write` wrote."""
        return cls(**json.loads(Path(path).read_text(encoding="utf-8")))

    def write(self, path: Path) -> None:
        """Write it."""
        path.write_text(json.dumps(dataclasses.asdict(self), indent=1), encoding="utf-8")


@dataclass(frozen=True)
class Result:
    """What a competitor measured itself; the rest is measured from outside.

    Attributes:
        began: seconds of the Unix epoch at which the first round began.
        rounds: seconds of each round.
        rows: rows trained in a round.
        train_loss: mean over the rows or batches of the last round.
        test_loss: of the trained model.
        test_accuracy: of the trained model.
        more: what only this competitor has.
    """

    began: float
    rounds: list[float]
    rows: int
    train_loss: float
    test_loss: float
    test_accuracy: float
    more: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> Self:
        """The result of a file that `write` wrote."""
        return cls(**json.loads(path.read_text(encoding="utf-8")))

    def write(self, path: Path) -> None:
        """Write it."""
        path.write_text(json.dumps(dataclasses.asdict(self), indent=1), encoding="utf-8")


class SkippedError(Exception):
    """This competitor cannot run here, and why."""


def main(compete: Callable[[Job], Result]) -> None:
    """The whole program of a competitor: the job's path and the result's on the command line."""
    source, target = sys.argv[1:3]
    try:
        answer = dataclasses.asdict(compete(Job.read(source)))
    except SkippedError as reason:
        answer = {"skipped": str(reason)}
    Path(target).write_text(json.dumps(answer, indent=1), encoding="utf-8")
