"""Runs on Flower's own engines: its Ray simulation, or a SuperLink of the user's.

Everything goes through Flower's command line. Its exit codes do not tell how a run ended (`flwr
run` returns 0 for a run that failed), so the run's status is asked for until it is final. The app
that is submitted is a folder with nothing but a pyproject.toml: the modules are those of the
installed package.
"""

import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from fedtune.config import Experiment
from fedtune.errors import RecipeError, RunError

POLL_SECONDS = 1.0
START_SECONDS = 120.0

APP = """[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "fedtune-app"
version = "0.1.0"
description = "The installed FedTune as a Flower app"
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "fedtune"

[tool.flwr.app.components]
serverapp = "server.app:app"
clientapp = "clients.app:app"

[tool.flwr.app.config]
"""


def run(experiment: Experiment, engine: str, follow: Callable[[], None], workers: int) -> None:
    """Submit the experiment and wait until it has ended.

    Args:
        experiment: its `output` must be absolute.
        engine: "ray", or the name of a connection in Flower's configuration.
        follow: called once a second, to show what has been committed.
        workers: nodes of a simulation; a SuperLink of the user's has its own.

    Raises:
        RecipeError: Ray is not installed, or Flower knows no such connection.
        RunError: the run failed or was stopped; Flower's log is in the message.
    """
    with tempfile.TemporaryDirectory(prefix="fedtune-") as text:
        work = Path(text)
        app = work / "app"
        app.mkdir()
        (app / "pyproject.toml").write_text(APP + _as_app_config(Experiment()), encoding="utf-8")
        recipe = work / "recipe.toml"
        recipe.write_text(experiment.text(), encoding="utf-8")
        if engine == "ray":
            with _simulation(work) as environment:
                _submit(app, "sim", recipe, environment, follow, work / "superlink.log", workers)
        else:
            _submit(app, engine, recipe, programs(), follow, None)


def _as_app_config(experiment: Experiment) -> str:
    return experiment.text().replace("\n[", "\n[tool.flwr.app.config.")


def programs() -> dict[str, str]:
    """This process's environment with the programs beside its interpreter on the PATH.

    Flower's programs start each other by name, in a virtual environment that nobody activated too.
    """
    beside = str(Path(sys.executable).parent)
    return {**os.environ, "PATH": os.pathsep.join([beside, os.environ.get("PATH", os.defpath)])}


def _program(name: str) -> str:
    """A program of Flower's, beside this interpreter or on the PATH."""
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.exists() else shutil.which(name)
    if not found:
        raise RecipeError(f"The program {name} is missing; install FedTune with its dependencies.")
    return found


@contextmanager
def _simulation(work: Path) -> Iterator[dict[str, str]]:
    """A SuperLink for simulations on a free port of this machine; yields its environment."""
    if importlib.util.find_spec("ray") is None:
        raise RecipeError("--engine ray needs Ray: pip install 'fedtune[ray]'.")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    # Ray's workers put the working directory before the app: start in an empty one.
    environment = {
        **programs(),
        "FLWR_HOME": str(work / "flwr"),
        "FEDTUNE_FOLDER": os.environ.get("FEDTUNE_FOLDER", str(Path.cwd())),
        "OMP_NUM_THREADS": "1",
    }
    (work / "flwr").mkdir()
    (work / "flwr" / "config.toml").write_text(
        f'[superlink]\ndefault = "sim"\n[superlink.sim]\naddress = "127.0.0.1:{port}"\n'
        "insecure = true\n"
    )
    empty = work / "empty"
    empty.mkdir()
    command = [_program("flower-superlink"), "--insecure", "--simulation"]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    with (work / "superlink.log").open("wb") as output:
        process = subprocess.Popen(
            command, cwd=empty, env=environment, stdout=output, stderr=subprocess.STDOUT
        )
    try:
        _until_healthy(process, port, work / "superlink.log")
        yield environment
    finally:
        process.terminate()
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _until_healthy(process: "subprocess.Popen[bytes]", port: int, output: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.3)
    raise RunError(f"Flower's SuperLink did not start: {_tail(output)}")


def _flwr(environment: dict[str, str], *arguments: str) -> str:
    done = subprocess.run(
        [_program("flwr"), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout + (done.stderr if done.returncode else "")


def _submit(
    app: Path,
    connection: str,
    recipe: Path,
    environment: dict[str, str],
    follow: Callable[[], None],
    output: Path | None,
    workers: int = 0,
) -> None:
    arguments = ["run", str(app), connection, "--format", "json", "--run-config", str(recipe)]
    if workers:
        # Where there are GPUs, the nodes share them evenly: half a one each, or two.
        gpus = torch.cuda.device_count() / workers if torch.cuda.is_available() else 0.0
        settings = f"num-supernodes={workers} client-resources-num-cpus=1"
        settings += f" client-resources-num-gpus={gpus}"
        arguments += ["--federation-config", settings]
    answer = _flwr(environment, *arguments)
    try:
        run_id = str(json.loads(answer)["run-id"])
    except (ValueError, KeyError) as error:
        raise RecipeError(f"Flower refused the run on '{connection}': {answer.strip()}") from error
    try:
        status = _await(run_id, connection, environment, follow)
    except KeyboardInterrupt:
        _flwr(environment, "stop", run_id, connection)
        raise
    follow()
    if status != "finished:completed":
        told = _flwr(environment, "log", run_id, connection, "--show")
        text = told if told.strip() else _tail(output) if output else ""
        raise RunError(f"Flower's run {run_id} ended as {status}:\n{text[-4000:]}")


def _await(
    run_id: str, connection: str, environment: dict[str, str], follow: Callable[[], None]
) -> str:
    while True:
        answer = _flwr(environment, "list", connection, "--run-id", run_id, "--format", "json")
        try:
            status = str(json.loads(answer)["runs"][0]["status"])
        except (ValueError, KeyError, IndexError) as error:
            raise RunError(f"Flower does not tell how run {run_id} is: {answer}") from error
        if status.startswith("finished"):
            return status
        follow()
        time.sleep(POLL_SECONDS)


def _tail(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")[-2000:] if path.exists() else ""
