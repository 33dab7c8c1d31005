"""Live progress of a study: cells done, running and left, and the time that is left.

On a terminal a bar and a line for each running cell; elsewhere a line for each that is over.
"""

import time
from collections.abc import Mapping
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Column

from fedtune.config import Experiment
from fedtune.records import RoundRecord, merge
from fedtune.report import human_time, summarise


class StudyProgress:
    """Use as a context manager around a study; it is the `View` of its cells.

    Args:
        console: where to draw.
        title: what is done, "cells" or "tuning"; it may be set anew before each plan.
    """

    def __init__(self, console: Console, title: str = "cells") -> None:
        self.console, self.title = console, title
        self.labels: dict[str, str] = {}
        self.cells: Mapping[str, Experiment] = {}
        self.done = self.failed = 0
        self.rounds, self.rounds_done, self.began = 0, 0, 0.0
        self.running: dict[str, TaskID] = {}
        self.last: dict[str, str] = {}
        self.seconds: dict[str, float] = {}
        columns = [
            TextColumn(f"{{task.{text}}}", table_column=Column(no_wrap=True))
            for text in ("description", "fields[state]")
        ]
        self.progress = Progress(columns[0], BarColumn(bar_width=20), columns[1], console=console)
        self.bar: TaskID | None = None

    def __enter__(self) -> "StudyProgress":
        if self.console.is_terminal:
            self.progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.console.is_terminal:
            self.progress.stop()

    def planned(self, cells: Mapping[str, Experiment], complete: set[str]) -> None:
        self.cells, self.done, self.failed = cells, len(complete), 0
        self.rounds = sum(cell.rounds for key, cell in cells.items() if key not in complete)
        self.rounds_done, self.began = 0, time.monotonic()
        if self.bar is not None:
            self.progress.remove_task(self.bar)
        self.bar = self.progress.add_task(self.title, total=max(1, self.rounds), state="")
        self._draw()
        if not self.console.is_terminal:
            self._print(f"{self.title}: {len(cells)}, of which {len(complete)} are finished")

    def started(self, key: str) -> None:
        self.seconds[key] = time.monotonic()
        cell = self.cells[key]
        label = self.labels.get(key, key)
        self.running[key] = self.progress.add_task(f"  {label}", total=cell.rounds, state="")
        self._draw()

    def committed(self, key: str, record: RoundRecord) -> None:
        numbers = summarise(merge(record.evaluation.get("own", {}).values()))
        shown = [f"{name} {numbers[name]:.3f}" for name in ("accuracy", "loss") if name in numbers]
        self.last[key] = ", ".join(shown) or self.last.get(key, "")
        self.rounds_done += record.round > 0
        state = f"round {record.round}/{self.cells[key].rounds}  {self.last[key]}"
        self.progress.update(self.running[key], completed=record.round, state=state)
        self._draw()

    def ended(self, key: str, reason: str) -> None:
        self.done += not reason
        self.failed += bool(reason)
        self.progress.remove_task(self.running.pop(key))
        self._draw()
        label = self.labels.get(key, key)
        if reason:
            self._print(f"failed: {label}: {reason}")
        elif not self.console.is_terminal:
            took = human_time(time.monotonic() - self.seconds[key])
            over = f"{self.done + self.failed}/{len(self.cells)}"
            self._print(f"{over} {label}: {self.last.get(key, '')}, {took}{self._left()}")

    def warned(self, key: str, text: str) -> None:
        self._print(f"warning: {self.labels.get(key, key)}: {text}")

    def _print(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _left(self) -> str:
        """The time for the rounds that are left, at the rate of those that are done."""
        if not self.rounds_done:
            return ""
        elapsed = time.monotonic() - self.began
        left = elapsed / self.rounds_done * max(0, self.rounds - self.rounds_done)
        return f", about {human_time(left)} left" if left else ""

    def _draw(self) -> None:
        waiting = len(self.cells) - self.done - self.failed - len(self.running)
        state = f"{self.done} done, {len(self.running)} running, {waiting} waiting"
        state += f", {self.failed} failed" if self.failed else ""
        assert self.bar is not None
        self.progress.update(self.bar, completed=self.rounds_done, state=state + self._left())
