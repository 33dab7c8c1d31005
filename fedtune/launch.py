"""Start a run on an engine and wait for its true end.

batched     on this machine: worker processes, each training some clients of a round together; the
            recipe's strategy and its references run at the same time
sequential  this process, one client after another, one strategy after another: the same to rounding
ray         Flower's Ray simulation, on a SuperLink that is started here and stopped again
NAME        a SuperLink of the user's, by the name it has in Flower's configuration

All of them run the same ServerApp and ClientApp. What happens is told through the logger "fedtune":
each record is a line to read, and its `event` attribute the same as data.
"""

import importlib
import logging
import os
import queue
import shutil
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from fedtune import allocator, bases, page, parts, report
from fedtune.config import Experiment
from fedtune.errors import RecipeError
from fedtune.processes import can_fork
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
    engine: str = "batched",
    resume: bool = False,
    overwrite: bool = False,
    workers: int = 0,
    threads: int = 1,
) -> Run:
    """Run an experiment to its end, from its last committed round if it was interrupted.

    Args:
        experiment: an experiment or a recipe's path.
        overrides: `key=value`, for a recipe's path.
        engine: batched, sequential, ray, or the name of a SuperLink connection.
        resume: take a finished run as it is instead of refusing it.
        overwrite: delete the run's folder first.
        workers: processes of the batched and ray engines, 0 for as many as there are cores or GPUs;
            another number may change the last bits. With 1 it is this process. Outside Linux and
            on several GPUs a script that calls this needs Python's `if __name__ == "__main__":`.
        threads: torch threads of each process; another number may change the last bits.

    Raises:
        RecipeError: the recipe, its data or its folder do not fit.
        RunError: the run could not go on; what was committed is intact.
    """
    if not isinstance(experiment, Experiment):
        experiment = Experiment.load(experiment, overrides)
    if workers and engine not in ("batched", "ray"):
        raise RecipeError(
            f"--workers {workers} is for --engine batched or ray; '{engine}' has no workers here."
        )
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
        _here(experiment, engine, workers, threads)
    else:
        from fedtune import flower

        count = processes_for(experiment, workers, threads)
        flower.run(experiment, engine, _follow(experiment), count)
    result = report.read(folder)
    page.write(result, folder / "report.html")
    return result


def alone(experiment: Experiment, threads: int = 1) -> None:
    """Run the recipe's own strategy in this process, without references and without a report.

    It goes on from the last committed round. Results depend on nothing that runs beside it.

    Raises:
        RecipeError: the recipe, its data or its folder do not fit.
        RunError: the run could not go on; what was committed is intact.
    """
    parts.resolve(experiment)
    _require_run_folder(parts.folder_of(experiment))
    prepare(experiment, threads)
    in_turn(experiment, [""], together=0)


def prepare(experiment: Experiment, threads: int) -> None:
    """Set this process up for runs of such a model; what it imports here, its forks need not."""
    for key, value in ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    for module in ("clients.app", "clients.cohort", "server.app"):
        importlib.import_module(module)
    if bases.device_of(experiment.model.device).type == "cpu":
        allocator.keep_pages()
    torch.set_num_threads(threads)


def complete(experiment: Experiment) -> bool:
    """Whether the recipe's own strategy has committed its last round."""
    return _head(parts.folder_of(experiment)) == experiment.rounds


def finished(experiment: Experiment) -> bool:
    """Whether every arm has committed its last round and the report is written."""
    folder = parts.folder_of(experiment)
    arms = [experiment]
    arms += [parts.reference(experiment, name) for name in parts.reference_names(experiment)]
    return (folder / "report.html").exists() and all(complete(arm) for arm in arms)


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


def _cores(threads: int) -> int:
    """Processes of so many threads that this one may keep busy."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, (cores or 1) // threads)


def _here(experiment: Experiment, engine: str, workers: int, threads: int) -> None:
    """Run every arm on this machine."""
    device = bases.device_of(experiment.model.device)
    if device.type == "cpu":
        allocator.keep_pages()
    torch.set_num_threads(threads)
    gpus = gpus_for(experiment)
    count = processes_for(experiment, workers, threads)
    arms = ["", *parts.reference_names(experiment)]
    if engine == "sequential" or count == 1:
        in_turn(experiment, arms, together=1 if engine == "sequential" else 0)
    else:
        _in_workers(experiment, arms, count, threads, gpus if len(gpus) > 1 else ())


def processes_for(experiment: Experiment, asked: int, threads: int) -> int:
    """How many processes: as asked, else one a core, or one a GPU where there are some."""
    device = bases.device_of(experiment.model.device)
    if asked or device.type == "cpu":
        return asked or _cores(threads)
    return max(1, len(gpus_for(experiment)))


def gpus_for(experiment: Experiment) -> tuple[str, ...]:
    """CUDA's names of the GPUs that processes may take in turn, () for the recipe's own device."""
    device = bases.device_of(experiment.model.device)
    if device.type != "cuda" or device.index is not None:
        return ()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    numbers = map(str, range(torch.cuda.device_count()))
    return tuple(visible.split(",")) if visible else tuple(numbers)


def in_turn(experiment: Experiment, arms: Sequence[str], together: int) -> None:
    """Run arms one after another in this process.

    Args:
        experiment: the recipe.
        arms: "" for its own strategy, or names of references.
        together: clients that train at once, 0 for as many as fit.
    """
    from clients.app import app as client_app
    from clients.cohort import CohortGrid
    from server.app import app as server_app

    grid = CohortGrid(client_app, experiment.flat(), together=together)
    server_app(grid, grid.server_context({"arms": ",".join(arms)}))


def _in_workers(
    experiment: Experiment, arms: Sequence[str], workers: int, threads: int, gpus: tuple[str, ...]
) -> None:
    """Run all arms at the same time, their clients in worker processes that they share.

    The first arm that fails stops the others; all of them can be resumed.
    """
    from clients import client, pool
    from clients.app import answer
    from server.app import app as server_app

    job = pool.Job(answer, experiment.flat(), workers, threads, gpus, log.level)
    fork = can_fork(threads)
    if fork:
        client.warm(experiment, arms)
    ends: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()

    def run_arm(arm: str, grid: pool.PoolGrid) -> None:
        torch.set_num_threads(threads)  # a new thread begins with OpenMP's default
        try:
            server_app(grid, grid.server_context({"arms": arm}))
            ends.put(None)
        except BaseException as error:
            ends.put(error)

    running: list[threading.Thread] = []
    try:
        with pool.Pool(job, fork=fork) as workers_:
            for arm in arms:
                grid = pool.PoolGrid(workers_, _urgency(experiment, arm))
                running.append(threading.Thread(target=run_arm, args=(arm, grid), daemon=True))
                running[-1].start()
            for _ in arms:
                if error := ends.get():
                    raise error
    finally:
        for thread in running:
            thread.join()


def _urgency(experiment: Experiment, arm: str) -> int:
    """0 for an arm that pools the rows, one client after all: the run cannot end before it does."""
    arm_parts = parts.resolve(parts.reference(experiment, arm) if arm else experiment)
    return 0 if arm_parts.strategy.pools else 1


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
