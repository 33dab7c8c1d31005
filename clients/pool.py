"""Worker processes that play clients, and the Grid in front of them.

Each worker answers one message at a time with the unmodified ClientApp; a free one takes the most
urgent message, of equal ones the oldest. On Linux without a GPU they are forked once the model is
loaded and the rows are encoded, so that all share one copy of both; elsewhere each loads its own.
A worker that dies answers its message with an error and is replaced. Results do not depend on
which worker answers, or when.
"""

import itertools
import logging
import logging.handlers
import multiprocessing
import queue
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import TypeAlias

import torch
from flwr.app import Message

from clients.local import (
    NODE,
    Answer,
    Config,
    LocalGrid,
    answered,
    failed,
    identify,
    node_context,
)
from fedtune import allocator
from fedtune.errors import RunError
from fedtune.processes import Pipe, attend, how, visible

LAST = sys.maxsize
Replies: TypeAlias = "queue.SimpleQueue[Message]"


class StoppedError(RunError):
    """The pool was closed while an answer was awaited."""


@dataclass(frozen=True)
class Job:
    """What the workers are; it is pickled where they are spawned.

    Attributes:
        client_app: the ClientApp, or a function that calls it.
        run_config: the flat recipe.
        workers: how many.
        threads: torch threads of each.
        devices: CUDA's names of the GPUs that they take in turn, () for the recipe's own device.
        level: of the logger "fedtune".
    """

    client_app: Answer
    run_config: Config
    workers: int
    threads: int = 1
    devices: tuple[str, ...] = ()
    level: int = logging.INFO


@dataclass(order=True)
class _Task:
    """A message in the queue, in the order of answering; without a message, the end."""

    urgency: int
    number: int
    message: Message | None = field(compare=False)
    replies: Replies = field(compare=False)


class Pool:
    """Worker processes, used as a context manager; they end with it, and with this process.

    Args:
        job: what they are.
        fork: whether to fork them, with all that this process has loaded; else they are spawned.
    """

    def __init__(self, job: Job, *, fork: bool) -> None:
        self.job, self.closed = job, False
        self._fork = fork
        self._tasks: queue.PriorityQueue[_Task] = queue.PriorityQueue()
        self._numbers = itertools.count()
        self._lock = threading.Lock()
        self._workers: list[tuple[BaseProcess, Pipe]] = []
        self._told: set[str] = set()

    def __enter__(self) -> "Pool":
        self._workers = [self._started(number) for number in range(self.job.workers)]
        for number in range(self.job.workers):
            threading.Thread(target=self._serve, args=(number,), daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the workers at once; whoever awaits an answer gets a `StoppedError`."""
        with self._lock:
            if self.closed:
                return
            self.closed = True
            for process, _ in self._workers:
                process.kill()
                self._tasks.put(_Task(LAST, next(self._numbers), None, queue.SimpleQueue()))
        for process, _ in self._workers:
            process.join()

    def ask(self, messages: Sequence[Message], urgency: int) -> Iterator[Message]:
        """Replies as they come; the smallest `urgency` is answered first.

        Raises:
            StoppedError: the pool was closed.
        """
        replies: Replies = queue.SimpleQueue()
        with self._lock:
            for message in messages:
                self._tasks.put(_Task(urgency, next(self._numbers), message, replies))
            if self.closed:
                raise StoppedError("The worker processes have been stopped.")
        for _ in messages:
            reply = replies.get()
            if self.closed:  # the reply may only say that its worker was ended
                raise StoppedError("The worker processes have been stopped.")
            yield reply

    def _started(self, number: int) -> tuple[BaseProcess, Pipe]:
        context = multiprocessing.get_context("fork" if self._fork else "spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_work, args=(self.job, theirs), daemon=True)  # type: ignore[attr-defined]
        with visible(self.job.devices, number):
            process.start()
        theirs.close()
        return process, ours

    def _serve(self, number: int) -> None:
        """Hand messages to one worker until the pool is closed."""
        while (task := self._tasks.get()).message is not None:
            task.replies.put(self._asked(number, task.message))

    def _asked(self, number: int, message: Message) -> Message:
        process, pipe = self._workers[number]
        try:
            pipe.send(message)
            while pipe in connection.wait([pipe, process.sentinel]):
                received = pipe.recv()
                if isinstance(received, Message):
                    return received
                assert isinstance(received, logging.LogRecord)
                self._log(received)
        except (EOFError, OSError):
            pass  # it has died, as below
        with self._lock:
            if not self.closed:
                process.join()
                self._workers[number] = self._started(number)
        return failed(message, f"RunError: a worker process ended {how(process.exitcode)}")

    def _log(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if record.levelno >= logging.WARNING:
            # Every worker meets the same; it is told once.
            if text in self._told:
                return
            self._told.add(text)
        logging.getLogger(record.name).handle(record)


def _work(job: Job, pipe: Pipe) -> None:
    """A worker: answers messages until it is killed."""
    send = attend(pipe, job.level)
    identify()
    allocator.keep_pages()
    torch.set_num_threads(job.threads)
    while True:
        message = pipe.recv()
        assert isinstance(message, Message)
        number = message.metadata.dst_node_id - NODE
        context = node_context(job.run_config, number, job.workers, 0)
        send(answered(job.client_app, message, context))


class PoolGrid(LocalGrid):
    """As many nodes as the pool has workers; any worker answers for any node.

    Args:
        pool: of workers.
        urgency: of this grid's messages, the smallest first.
    """

    def __init__(self, pool: Pool, urgency: int) -> None:
        super().__init__(pool.job.run_config, pool.job.workers)
        self._pool, self._urgency = pool, urgency

    def answers(self, messages: Sequence[Message]) -> Iterator[Message]:
        yield from self._pool.ask(messages, self._urgency)
