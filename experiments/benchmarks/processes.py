"""One command and everything it starts, measured from outside."""

import os
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil

EVERY_SECONDS = 0.5
SHARE = 0.03  # of a core that counting memory may cost: shared pages are slow to count


@dataclass(frozen=True)
class Measured:
    """What a command cost.

    Attributes:
        started: seconds of the Unix epoch.
        seconds: from its start to its end.
        peak_bytes: most memory of all its processes at once; shared pages count once (PSS) where
            the system tells.
        cpu: (seconds of the Unix epoch, CPU seconds of all its processes until then), as sampled.
        code: its exit code, None where it ran too long and was ended.
    """

    started: float
    seconds: float
    peak_bytes: int
    cpu: tuple[tuple[float, float], ...]
    code: int | None

    def cpu_at(self, moment: float) -> float:
        """CPU seconds spent until a moment, between samples in proportion."""
        times, spent = zip(*self.cpu, strict=True)
        return float(np.interp(moment, times, spent))


class _Tree:
    """A process and its descendants, those too whose parent has ended since."""

    def __init__(self, root: int) -> None:
        self.seen: dict[int, psutil.Process] = {root: psutil.Process(root)}
        self.cpu: dict[int, float] = {}

    def look(self) -> float:
        """Find new descendants; returns the CPU seconds of all until now."""
        for process in list(self.seen.values()):
            try:
                for child in process.children(recursive=True):
                    self.seen.setdefault(child.pid, child)
            except psutil.Error:
                continue
        for pid, process in self.seen.items():
            try:
                times = process.cpu_times()
                self.cpu[pid] = times.user + times.system
            except psutil.Error:
                continue
        return sum(self.cpu.values())

    def memory(self) -> int:
        """Bytes that all of them hold now."""
        held = 0
        for process in self.seen.values():
            try:
                if process.status() != psutil.STATUS_ZOMBIE:
                    memory = process.memory_full_info()
                    held += getattr(memory, "pss", memory.rss)
            except psutil.Error:
                continue
        return held

    def end(self) -> None:
        """End what is left of it."""
        for process in reversed(list(self.seen.values())):
            try:
                if process.is_running():  # and still the same process, not another of its number
                    process.kill()
            except psutil.Error:
                continue


def measure(
    command: list[str], environment: dict[str, str], folder: Path, log: Path, limit: float
) -> Measured:
    """Run the command in `folder` to its end, and end whatever it leaves behind.

    Args:
        command: a program and its arguments.
        environment: all of it.
        folder: its working directory.
        log: where its output goes.
        limit: seconds after which it is ended.
    """
    with log.open("wb") as output:
        started, clock = time.time(), time.perf_counter()
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT
        )
        tree, peak, code = _Tree(process.pid), 0, None
        cpu, due = [(started, 0.0)], 0.0
        try:
            while code is None and time.perf_counter() - clock < limit:
                cpu.append((time.time(), tree.look()))
                if time.monotonic() >= due:
                    before = time.thread_time()
                    peak = max(peak, tree.memory())
                    due = time.monotonic() + (time.thread_time() - before) / SHARE
                try:
                    code = process.wait(timeout=EVERY_SECONDS)
                except subprocess.TimeoutExpired:
                    code = None
            seconds = time.perf_counter() - clock
        finally:
            tree.end()
            process.wait()
    return Measured(started, seconds, peak, tuple(cpu), code)


def environment(modules: Path) -> dict[str, str]:
    """This process's environment, one thread a process, no network, `modules` importable."""
    path = [str(modules), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path),
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        # By default Ray's actors yield to every other process, which nobody else here does.
        "RAY_worker_niceness": "0",
    }
