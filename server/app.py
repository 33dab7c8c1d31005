"""The ServerApp: reads the run-config, builds a Coordinator, runs it."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedtune import page, parts, report
from fedtune.config import Experiment
from fedtune.errors import RecipeError
from server.coordinator import Coordinator

app = ServerApp()
LOCK_SECONDS = 3.0


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep other processes out of a run's folder; a process that is just ending may hold it yet."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RecipeError(
            f"The run's folder {folder} cannot be made: {error.strerror}. Set output to a folder "
            "that can be written to."
        ) from error
    lock = FileLock(folder / ".lock", timeout=LOCK_SECONDS)
    try:
        lock.acquire()
    except Timeout as error:
        raise RecipeError(f"{folder} is in use by another process; wait for its end.") from error
    try:
        yield
    finally:
        lock.release()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the recipe's strategy and its references, then write the report.

    The launcher may name other arms in the ServerApp's own node-config ("arms"), when it runs them
    in several processes; "" is the recipe's own strategy.
    """
    experiment = Experiment.from_flat(context.run_config)
    if not experiment.name:
        experiment = experiment.replace(name=f"run-{context.run_id}")
    everything = ["", *parts.reference_names(experiment)]
    chosen = context.node_config.get("arms")
    for arm in everything if chosen is None else str(chosen).split(","):
        coordinator = Coordinator(experiment, arm, grid)
        with _locked(coordinator.folder):
            coordinator.run()
    if chosen is None:
        folder = parts.folder_of(experiment)
        page.write(report.read(folder), folder / "report.html")
