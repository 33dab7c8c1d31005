"""The pattern of the FlowerTune examples on Flower's Ray simulation: see flowertune_app.py.

This is the starter: an own SuperLink on a free port in a neutral folder, the app submitted to it,
and its true status asked for, since `flwr run` succeeds when the run does not.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from competitors.job import Job, Result, SkippedError, main

START_SECONDS = 120
POLL_SECONDS = 1.0

APP = """[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "flowertune"
version = "0.1.0"
description = "A benchmark"
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "benchmark"

[tool.flwr.app.components]
serverapp = "competitors.flowertune_app:server"
clientapp = "competitors.flowertune_app:client"

[tool.flwr.app.config]
job = "{job}"
"""

CONNECTION = """[superlink]
default = "sim"
[superlink.sim]
address = "127.0.0.1:{port}"
insecure = true
"""


def _program(name: str) -> str:
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.exists() else shutil.which(name)
    if not found:
        raise SkippedError(f"the program {name} is missing: pip install 'fedtune[bench]'")
    return found


def _start(work: Path, environment: dict[str, str], port: int) -> "subprocess.Popen[bytes]":
    empty = work / "empty"
    empty.mkdir()
    command = [_program("flower-superlink"), "--insecure", "--simulation"]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    log = (work / "superlink.log").open("wb")
    process = subprocess.Popen(
        command, cwd=empty, env=environment, stdout=log, stderr=subprocess.STDOUT
    )
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                return process
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    process.terminate()
    raise RuntimeError((work / "superlink.log").read_text(errors="replace")[-3000:])


def _flwr(environment: dict[str, str], *arguments: str) -> str:
    done = subprocess.run(
        [_program("flwr"), *arguments], env=environment, capture_output=True, text=True, check=False
    )
    return done.stdout + (done.stderr if done.returncode else "")


def _run(work: Path, environment: dict[str, str], job: Job, clients: int) -> None:
    settings = f"num-supernodes={clients} client-resources-num-cpus=1"
    settings += f" init-args-num-cpus={job.processes}"
    arguments = ["run", str(work / "app"), "sim", "--format", "json"]
    answer = _flwr(environment, *arguments, "--federation-config", settings)
    try:
        number = str(json.loads(answer)["run-id"])
    except (ValueError, KeyError) as error:
        raise RuntimeError(f"Flower refused the run: {answer}") from error
    # Asking costs a process of its own each time: not before the app says that it is done.
    while True:
        told = _flwr(environment, "list", "sim", "--run-id", number, "--format", "json")
        status = str(json.loads(told)["runs"][0]["status"])
        if status.startswith("finished"):
            break
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not (work / "result.json").exists():
            time.sleep(POLL_SECONDS)
    if status != "finished:completed":
        log = _flwr(environment, "log", number, "sim", "--show")
        raise RuntimeError(f"{status}: {log[-4000:]}")


def compete(job: Job) -> Result:
    """Run all rounds on Ray."""
    work = Path(job.folder, "flower")
    (work / "app").mkdir(parents=True)
    (work / "flwr").mkdir()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    job.write(work / "job.json")
    text = APP.format(job=str(work / "job.json"))
    (work / "app" / "pyproject.toml").write_text(text, encoding="utf-8")
    (work / "flwr" / "config.toml").write_text(CONNECTION.format(port=port), encoding="utf-8")
    lines = Path(job.train).read_text(encoding="utf-8").splitlines()
    clients = len({json.loads(line)["client"] for line in lines})
    beside = str(Path(sys.executable).parent)
    environment = {
        **os.environ,
        "PATH": os.pathsep.join([beside, os.environ.get("PATH", os.defpath)]),
        "FLWR_HOME": str(work / "flwr"),
    }
    process = _start(work, environment, port)
    try:
        _run(work, environment, job, clients)
    finally:
        process.terminate()
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    return Result.read(work / "result.json")


if __name__ == "__main__":
    main(compete)
