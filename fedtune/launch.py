"""Start a run on an engine and wait for its true end.

sequential  this process, one client after another; the references in a second process where there
            is a core for it
batched     the same, a few clients of a round trained together: the same computation
ray         Flower's Ray simulation, on a SuperLink that is started here and stopped again
NAME        a SuperLink of the user's, by the name it has in Flower's configuration

All of them run the same ServerApp and ClientApp. What happens is told through the logger "fedtune":
each record is a line to read, and its `event` attribute the same as data.
"""

import json
import logging
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from fedtune import page, parts, report
from fedtune.config import Experiment
from fedtune.errors import FedTuneError, RecipeError, RunError
from fedtune.records import RoundRecord
from fedtune.report import Run
from server import checkpoint

log = logging.getLogger("fedtune")
ENVIRONMENT = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "TOKENIZERS_PARALLELISM": "false",
}


def run(
    experiment: Experiment | str | Path,
    *overrides: str,
    engine: str = "sequential",
    resume: bool = False,
    overwrite: bool = False,
    threads: int = 1,
) -> Run:
    """Run an experiment to its end, from its last committed round if it was interrupted.

    Args:
        experiment: an experiment or a recipe's path.
        overrides: `key=value`, for a recipe's path.
        engine: sequential, batched, ray, or the name of a SuperLink connection.
        resume: take a finished run as it is instead of refusing it.
        overwrite: delete the run's folder first.
        threads: torch threads of each process; another number may change the last bits.

    Raises:
        RecipeError: the recipe, its data or its folder do not fit.
        RunError: the run could not go on; what was committed is intact.
    """
    if not isinstance(experiment, Experiment):
        experiment = Experiment.load(experiment, overrides)
    parts.resolve(experiment)
    experiment = experiment.replace(output=str(Path(experiment.output).absolute()))
    folder = parts.folder_of(experiment)
    if overwrite:
        clear(folder)
    elif finished(experiment):
        if not resume:
            raise RecipeError(
                f"{folder} holds a finished run, which is never overwritten unasked. See it with "
                f"`fedtune report {folder}`, give this one another name (name=second), or start "
                "over with --overwrite."
            )
        checkpoint.latest(folder / "checkpoint", experiment)
        return report.read(folder)
    _require_run_folder(folder)
    for key, value in ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    if engine in ("sequential", "batched"):
        _in_process(experiment, threads, engine == "batched")
    else:
        from fedtune import flower

        flower.run(experiment, engine, _follow(experiment))
    result = report.read(folder)
    page.write(result, folder / "report.html")
    return result


def finished(experiment: Experiment) -> bool:
    """Whether every arm has committed its last round and the report is written."""
    folder = parts.folder_of(experiment)
    arms = [experiment]
    arms += [parts.reference(experiment, name) for name in parts.reference_names(experiment)]
    return (folder / "report.html").exists() and all(
        _head(parts.folder_of(arm)) == arm.rounds for arm in arms
    )


def _head(folder: Path) -> int:
    try:
        return int((folder / "checkpoint" / "HEAD").read_text())
    except (OSError, ValueError):
        return -1


def _require_run_folder(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise RecipeError(f"{folder} is a file; a run needs a folder of that name.")
    if folder.is_dir() and not (folder / "experiment.toml").exists():
        strangers = [
            path.name for path in folder.iterdir() if path.name not in (".lock", "references")
        ]
        if strangers:
            raise RecipeError(
                f"{folder} is no run of FedTune (it holds {', '.join(sorted(strangers)[:3])}). "
                "Give this run another name (name=second) or another output folder."
            )


def clear(folder: Path) -> None:
    """Delete a run, unless a process is working on it or it is none.

    Raises:
        RecipeError: it is in use, or the folder holds something else than a run.
    """
    if not folder.exists():
        return
    _require_run_folder(folder)
    try:
        with FileLock(folder / ".lock", timeout=0):
            for path in folder.iterdir():
                if path.name == ".lock":
                    continue
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink()
    except Timeout as error:
        raise RecipeError(f"{folder} is in use by another process.") from error


def _in_process(experiment: Experiment, threads: int, batched: bool) -> None:
    references = parts.reference_names(experiment)
    second = None
    if references and (os.cpu_count() or 1) > 1 and not torch.cuda.is_available():
        second = _Worker(experiment, references, threads, batched)
        references = []
    try:
        execute(experiment, ["", *references], threads, batched)
        if second:
            second.wait()
    finally:
        if second:
            second.stop()


def execute(experiment: Experiment, arms: Sequence[str], threads: int, batched: bool) -> None:
    """Run arms of an experiment one after another in this process."""
    from clients.app import app as client_app
    from clients.cohort import CohortGrid
    from server.app import app as server_app

    torch.set_num_threads(threads)
    grid = CohortGrid(client_app, experiment.flat(), batched=batched)
    server_app(grid, grid.server_context({"arms": ",".join(arms)}))


class _Worker:
    """A second process that runs the references; it dies with this one."""

    def __init__(
        self, experiment: Experiment, arms: Sequence[str], threads: int, batched: bool
    ) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "fedtune.launch"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        order = {
            "experiment": experiment.flat(),
            "arms": list(arms),
            "threads": threads,
            "batched": batched,
        }
        assert self.process.stdin
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        self.failure: dict[str, Any] = {}
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            told = json.loads(line)
            if "failure" in told:
                self.failure = told
                continue
            event = told["event"]
            if "record" in event:
                event["record"] = RoundRecord.from_json(event["record"])
            log.log(told["level"], "%s", told["text"], extra={"event": event})

    def wait(self) -> None:
        """Wait for its end and raise its error here."""
        code = self.process.wait()
        self.reader.join()
        if self.failure:
            kind = RecipeError if self.failure["kind"] == "RecipeError" else RunError
            raise kind(self.failure["failure"])
        if code:
            raise RunError(f"The references' process ended with exit code {code}; see above.")

    def stop(self) -> None:
        """End it, if it has not ended."""
        if self.process.poll() is None:
            self.process.terminate()
        self.process.wait()
        self.reader.join()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe:
                pipe.close()


class _JsonHandler(logging.Handler):
    """Tells the parent process what happens, a JSON object a line."""

    def emit(self, record: logging.LogRecord) -> None:
        event = dict(getattr(record, "event", {}))
        if "record" in event:
            event["record"] = event["record"].to_json()
        told = {"level": record.levelno, "text": record.getMessage(), "event": event}
        sys.stdout.write(json.dumps(told) + "\n")
        sys.stdout.flush()


def _work() -> None:
    """The second process: the order on stdin, events on stdout, and an end when stdin closes."""
    order = json.loads(sys.stdin.readline())
    threading.Thread(target=lambda: (sys.stdin.read(), os._exit(1)), daemon=True).start()
    log.setLevel(logging.INFO)
    log.addHandler(_JsonHandler())
    log.propagate = False
    try:
        experiment = Experiment.from_flat(order["experiment"])
        execute(experiment, order["arms"], order["threads"], order["batched"])
    except FedTuneError as error:
        failure = {"failure": str(error), "kind": type(error).__name__}
        sys.stdout.write(json.dumps(failure) + "\n")
        sys.stdout.flush()
        sys.exit(error.exit_code)


def _follow(experiment: Experiment) -> Callable[[], None]:
    """A function that logs what was committed since it was last called, for runs elsewhere."""
    arms = {"": experiment}
    arms |= {name: parts.reference(experiment, name) for name in parts.reference_names(experiment)}
    seen = dict.fromkeys(arms, 0)

    def follow() -> None:
        for arm, its in arms.items():
            path = parts.folder_of(its) / "rounds.jsonl"
            lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
            for line in lines[seen[arm] :]:
                record = RoundRecord.from_json(line)
                event = {"event": "committed", "arm": arm, "record": record}
                text = f"round {record.round} committed"
                log.info("%s%s", f"[{arm}] " if arm else "", text, extra={"event": event})
            seen[arm] = len(lines)

    return follow


if __name__ == "__main__":
    _work()
