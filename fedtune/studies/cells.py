"""Run a study's cells, several at a time where there is room.

Each cell has a process to itself and trains there as it would alone, so its result does not depend
on how many run beside it; audits of it follow in the same process. A cell that is finished is not
run again, one that was interrupted goes on from its last round, and one that fails, even by taking
its process along, is told with its reason while the others go on.
"""

import logging
import multiprocessing
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from multiprocessing import connection
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Protocol

from fedtune import launch, parts
from fedtune.audits import auditing, kept
from fedtune.audits.audited import open_run
from fedtune.config import Experiment
from fedtune.errors import FedTuneError
from fedtune.processes import Pipe, attend, can_fork, how, visible
from fedtune.records import RoundRecord

log = logging.getLogger("fedtune")


class View(Protocol):
    """Whoever is told what happens.

    Attributes:
        title: of what is planned next, "cells".
        labels: what a person calls the cells, by key.
    """

    title: str
    labels: dict[str, str]

    def planned(self, cells: Mapping[str, Experiment], complete: set[str]) -> None:
        """These cells are wanted, by key; some are finished already."""

    def started(self, key: str) -> None:
        """A cell has begun, or goes on."""

    def committed(self, key: str, record: RoundRecord) -> None:
        """One of its rounds is done."""

    def ended(self, key: str, reason: str) -> None:
        """It is over; `reason` says why it failed, "" if it did not."""

    def warned(self, key: str, text: str) -> None:
        """It goes on, but somebody should know this."""


@dataclass(frozen=True)
class Ended:
    """What a worker says of a cell that is over."""

    reason: str


@dataclass
class _Worker:
    """A process, the way to it, and the key of the cell that it runs, "" for none."""

    process: BaseProcess
    pipe: Pipe
    key: str = ""


class Runner:
    """Runs cells; use it as a context manager, its processes end with it.

    Args:
        view: is told what happens.
        workers: cells at a time. One runs in this process.
        gpus: CUDA's names of those that the processes take in turn, () for the recipe's device.
    """

    def __init__(self, view: View, workers: int, gpus: tuple[str, ...] = ()) -> None:
        self.view, self.count, self.gpus = view, workers, gpus
        self.audits: tuple[str, ...] = ()
        self.workers: list[_Worker] = []

    def __enter__(self) -> "Runner":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for worker in self.workers:
            worker.process.kill()
        for worker in self.workers:
            worker.process.join()

    def run(
        self, experiments: Iterable[Experiment], audits: tuple[str, ...] = ()
    ) -> dict[str, str]:
        """Finish every cell; returns key -> reason of those that failed.

        Args:
            experiments: named by their keys; one that is there twice is run once.
            audits: of each finished cell; those that it has are not made again.
        """
        self.audits = audits
        cells = {experiment.name: experiment for experiment in experiments}
        complete = {key for key, cell in cells.items() if _complete(cell, audits)}
        self.view.planned(cells, complete)
        waiting = deque(cell for key, cell in cells.items() if key not in complete)
        if not waiting:
            return {}
        launch.prepare(waiting[0], threads=1)
        return self._in_turn(waiting) if self.count == 1 else self._in_workers(waiting)

    def _in_turn(self, waiting: Iterable[Experiment]) -> dict[str, str]:
        failed: dict[str, str] = {}
        for cell in waiting:
            self.view.started(cell.name)
            handler = _Listener(self.view, cell.name)
            level = log.level
            log.setLevel(logging.INFO)
            log.addHandler(handler)
            try:
                reason = _outcome(cell, self.audits)
            finally:
                log.removeHandler(handler)
                log.setLevel(level)
            failed |= {cell.name: reason} if reason else {}
            self.view.ended(cell.name, reason)
        return failed

    def _in_workers(self, waiting: deque[Experiment]) -> dict[str, str]:
        failed: dict[str, str] = {}
        while len(self.workers) < min(self.count, len(waiting)):
            self.workers.append(self._started(len(self.workers)))
        while waiting or any(worker.key for worker in self.workers):
            for number, worker in enumerate(self.workers):
                if waiting and not worker.key:
                    self._give(number, waiting.popleft())
            ways = {w.pipe: n for n, w in enumerate(self.workers) if w.key}
            for pipe in connection.wait(list(ways)):
                assert isinstance(pipe, Connection)
                number = ways[pipe]
                key = self.workers[number].key
                reason = self._heard(number)
                if reason is not None:
                    failed |= {key: reason} if reason else {}
                    self.view.ended(key, reason)
        return failed

    def _give(self, number: int, cell: Experiment) -> None:
        try:
            self.workers[number].pipe.send((cell, self.audits))
        except OSError:  # it has died since its last cell
            self.workers[number] = self._started(number)
            self.workers[number].pipe.send((cell, self.audits))
        self.workers[number].key = cell.name
        self.view.started(cell.name)

    def _heard(self, number: int) -> str | None:
        """One message of a worker: None while its cell goes on, else why it failed, or ""."""
        worker = self.workers[number]
        try:
            received = worker.pipe.recv()
        except (EOFError, OSError):
            worker.process.join()
            self.workers[number] = self._started(number)
            return f"RunError: its process ended {how(worker.process.exitcode)}"
        if isinstance(received, Ended):
            worker.key = ""
            return received.reason
        assert isinstance(received, logging.LogRecord)
        _Listener(self.view, worker.key).emit(received)
        return None

    def _started(self, number: int) -> _Worker:
        context = multiprocessing.get_context("fork" if can_fork(threads=1) else "spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_work, args=(theirs,), daemon=True)  # type: ignore[attr-defined]
        with visible(self.gpus, number):
            process.start()
        theirs.close()  # so that the worker's end is the end of the pipe
        return _Worker(process, ours)


class _Listener(logging.Handler):
    """Tells a view what a cell logs."""

    def __init__(self, view: View, key: str) -> None:
        super().__init__(logging.INFO)
        self.view, self.key = view, key

    def emit(self, record: logging.LogRecord) -> None:
        event = getattr(record, "event", {})
        if event.get("event") == "committed":
            self.view.committed(self.key, event["record"])
        elif record.levelno >= logging.WARNING:
            self.view.warned(self.key, record.getMessage())


def _complete(cell: Experiment, audits: Iterable[str]) -> bool:
    return launch.complete(cell) and not kept.missing(parts.folder_of(cell), audits)


def _outcome(cell: Experiment, audits: Iterable[str]) -> str:
    """Run a cell and audit it; "" or why it failed."""
    folder = parts.folder_of(cell)
    try:
        # The last round is committed before the adapter, which audits read, is written.
        if not (launch.complete(cell) and (folder / "adapter").exists()):
            launch.alone(cell)
        if due := kept.missing(folder, audits):
            launch.prepare(cell, threads=1)
            for found in auditing.audit(open_run(folder), due):
                log.debug("cell %s: %s %s", cell.name, found.audit, found.verdict)
    except FedTuneError as error:
        return f"{type(error).__name__}: {error}"
    except Exception as error:  # a defect of ours or of a library costs this cell only
        log.debug("cell %s", cell.name, exc_info=True)
        return f"{type(error).__name__}: {error}"
    return ""


def _work(pipe: Pipe) -> None:
    """A worker: runs cells until it is killed."""
    send = attend(pipe, logging.INFO)
    while True:
        cell, audits = pipe.recv()
        assert isinstance(cell, Experiment)
        send(Ended(_outcome(cell, audits)))
