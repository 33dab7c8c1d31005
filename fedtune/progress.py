"""Live progress: a handler for the logger "fedtune" that draws what a run tells.

On a terminal, one line an arm: rounds, the clients that have answered, loss and quality on the test
rows, bytes moved and the time left. Elsewhere, one line a round.
"""

import logging
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TaskID, TextColumn
from rich.progress import TimeRemainingColumn as TimeLeft
from rich.table import Column

from fedtune.records import RoundRecord, merge, padding
from fedtune.report import human_bytes, summarise

QUALITY = ("accuracy", "perplexity")
WIDE = 96  # columns that leave room for a bar
WIDER = 128  # and for the aggregation error


class ProgressHandler(logging.Handler):
    """Use as a context manager around a run.

    Args:
        console: where to draw.
        title: how the recipe's own strategy is called.
    """

    def __init__(self, console: Console, title: str) -> None:
        super().__init__(logging.INFO)
        self.console = console
        self.title = title
        self.tasks: dict[str, TaskID] = {}
        self.cohort: dict[str, int] = {}
        self.answered: dict[str, int] = {}
        self.rounds: dict[str, int] = {}
        self.bytes: dict[str, int] = {}
        columns: list[ProgressColumn] = [
            TextColumn(f"{{task.{text}}}", table_column=Column(no_wrap=True))
            for text in ("description", "fields[round]", "fields[clients]", "fields[numbers]")
        ]
        if console.width >= WIDE:
            columns.insert(1, BarColumn(bar_width=10))
        columns += [TimeLeft(compact=True, table_column=Column(no_wrap=True)), TextColumn("left")]
        self.progress = Progress(*columns, console=console, transient=True)

    def __enter__(self) -> "ProgressHandler":
        log = logging.getLogger("fedtune")
        log.setLevel(logging.INFO)
        log.addHandler(self)
        if self.console.is_terminal:
            self.progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        logging.getLogger("fedtune").removeHandler(self)
        if self.console.is_terminal:
            self.progress.stop()

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.WARNING:
            self.console.print(f"warning: {record.getMessage()}", markup=False, highlight=False)
        event = getattr(record, "event", None)
        if event is None:
            return
        arm = str(event["arm"])
        if arm not in self.tasks:
            description: str = arm or self.title
            self.tasks[arm] = self.progress.add_task(
                description, total=None, round="", clients="", numbers=""
            )
            self.rounds[arm], self.cohort[arm], self.bytes[arm] = 0, 1, 0
        if event["event"] == "roster":
            self.rounds[arm] = int(event["rounds"])
            self.progress.update(self.tasks[arm], total=float(event["rounds"]))
        elif event["event"] == "round":
            self.cohort[arm], self.answered[arm] = max(1, len(event["cohort"])), 0
            shown = f"round {event['round']}/{self.rounds[arm]}"
            completed = event["round"] - 1
            self.progress.update(self.tasks[arm], round=shown, completed=completed)
            self._clients(arm)
        elif event["event"] == "reply" and event["kind"] == "train":
            self.answered[arm] += 1
            # The evaluation that follows is the last tenth of a round.
            self.progress.advance(self.tasks[arm], 0.9 / self.cohort[arm])
            self._clients(arm)
        elif event["event"] == "committed":
            self._committed(arm, event["record"])

    def _clients(self, arm: str) -> None:
        shown = f"{self.answered[arm]}/{self.cohort[arm]} clients"
        self.progress.update(self.tasks[arm], clients=shown)

    def _committed(self, arm: str, record: RoundRecord) -> None:
        self.bytes[arm] += record.bytes_down + record.bytes_up
        numbers = summarise(merge(record.evaluation.get("own", {}).values()))
        shown = [f"loss {numbers['loss']:.3f}"] if "loss" in numbers else []
        shown += [
            f"{key.replace('_', ' ')} {numbers[key]:.3f}" for key in QUALITY if key in numbers
        ]
        room = not self.console.is_terminal or self.console.width >= WIDER
        if room and "relative_error" in record.aggregation:
            shown.append(f"aggregation error {record.aggregation['relative_error']:.2g}")
        shown.append(human_bytes(self.bytes[arm]))
        text = "  ".join(shown)
        self.progress.update(self.tasks[arm], completed=float(record.round), numbers=text)
        if not self.console.is_terminal:
            label = f"round {record.round}" if record.round else "untuned"
            share = padding(record.tokens)
            text += "" if share is None else f"  padding {share:.0%}"
            line = f"{arm or self.title}: {label}: {text}  {record.seconds:.1f} s"
            self.console.print(line, markup=False, highlight=False, soft_wrap=True)
