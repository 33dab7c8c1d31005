"""What processes that work for this one have in common: devices, logging, and how they end."""

import contextlib
import gc
import logging
import logging.handlers
import multiprocessing
import os
import queue
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import connection
from multiprocessing.connection import Connection
from typing import TypeAlias

import torch

Pipe: TypeAlias = "Connection[object, object]"


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


def attend(pipe: Pipe, level: int) -> Callable[[object], None]:
    """Make this process a worker that answers through `pipe` and ends with its parent.

    Returns:
        How to send, from any thread; log records of `level` and above go the same way.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    threading.Thread(target=_end_with_parent, daemon=True).start()
    gc.freeze()  # a collection would copy every page that is shared with the parent
    sending = threading.Lock()

    def send(item: object) -> None:
        with sending:
            pipe.send(item)

    _log_to(send, level)
    return send


def _log_to(send: Callable[[object], None], level: int) -> None:
    """Leave the parent's handlers alone, and the console with them."""
    loggers = [logging.getLogger(name) for name in logging.root.manager.loggerDict]
    for logger in [logging.root, *loggers]:
        logger.handlers.clear()
        logger.propagate = True
    logging.root.addHandler(_ToParent(send))
    logging.captureWarnings(True)
    logging.getLogger("fedtune").setLevel(level)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)
