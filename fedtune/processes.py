"""What processes that work for this one have in common: devices, logging, and how they end."""

import contextlib
import logging
import logging.handlers
import multiprocessing
import os
import queue
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import connection

import torch


def can_fork(threads: int) -> bool:
    """Whether a forked worker can compute.

    A fork of a process that has seen CUDA can use neither it nor autograd. OpenMP's threads do not
    survive a fork: a worker that wants several of them waits forever.
    """
    return sys.platform == "linux" and threads == 1 and not torch.cuda.is_available()


def how(code: int | None) -> str:
    """How a process ended, for a sentence: "a worker ended by SIGKILL"."""
    if code is None or code >= 0:
        return f"with exit code {code}"
    name = signal.Signals(-code).name
    return f"by {name}" + (", perhaps for want of memory" if name == "SIGKILL" else "")


@contextlib.contextmanager
def visible(devices: Sequence[str], number: int) -> Iterator[None]:
    """Show CUDA one of the devices to a process that is started meanwhile."""
    key, before = "CUDA_VISIBLE_DEVICES", os.environ.get("CUDA_VISIBLE_DEVICES")
    if devices:
        os.environ[key] = devices[number % len(devices)]
    try:
        yield
    finally:
        if devices:
            os.environ.pop(key)
            os.environ.update({} if before is None else {key: before})


class _ToParent(logging.handlers.QueueHandler):
    """Sends log records through the pipe."""

    def __init__(self, send: Callable[[object], None]) -> None:
        super().__init__(queue.SimpleQueue())
        self.send = send

    def enqueue(self, record: logging.LogRecord) -> None:
        self.send(record)


def log_to(send: Callable[[object], None], level: int) -> None:
    """Leave the parent's handlers alone, and the console with them."""
    loggers = [logging.getLogger(name) for name in logging.root.manager.loggerDict]
    for logger in [logging.root, *loggers]:
        logger.handlers.clear()
        logger.propagate = True
    logging.root.addHandler(_ToParent(send))
    logging.captureWarnings(True)
    logging.getLogger("fedtune").setLevel(level)


def end_with_parent() -> None:
    """Wait for the parent's end and end this process too; for a thread of its own."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)
