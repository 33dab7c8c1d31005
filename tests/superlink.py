"""A SuperLink and its SuperNodes on loopback, processes of Flower's own that end with a block."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fedtune import flower, launch

BIN = Path(sys.executable).parent


def kill(started: "subprocess.Popen[bytes]", how: int = signal.SIGKILL) -> None:
    """Signal a process and all that it has started."""
    with suppress(ProcessLookupError):
        os.killpg(started.pid, how)


@contextmanager
def _process(home: Path, *command: str) -> Iterator["subprocess.Popen[bytes]"]:
    """A process in a group of its own, with its own FLWR_HOME and its output in a file beside."""
    home.mkdir(exist_ok=True)
    environment = {
        **flower.programs(),
        **launch.ENVIRONMENT,
        "FLWR_HOME": str(home),
        "OMP_NUM_THREADS": "1",
    }
    with home.with_suffix(".log").open("wb") as output:
        started = subprocess.Popen(
            [str(BIN / command[0]), *command[1:]],
            cwd=home,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            yield started
        finally:
            kill(started, signal.SIGTERM)
            try:
                started.wait(timeout=30)
            finally:
                kill(started)
                started.wait()


@contextmanager
def superlink(folder: Path) -> Iterator[int]:
    """A SuperLink that answers, and the configuration that calls it "loopback".

    Yields:
        Its port. `folder / "cli"` is the FLWR_HOME of whoever starts runs there.
    """
    port, home = _free_port(), folder / "cli"
    home.mkdir()
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "loopback"\n[superlink.loopback]\naddress = "127.0.0.1:{port}"\n'
        "insecure = true\n"
    )
    address = ["--host", "127.0.0.1", "--port", str(port)]
    with _process(folder / "server", "flower-superlink", "--insecure", *address):
        _wait_until_healthy(port)
        yield port


@contextmanager
def supernode(
    folder: Path, name: str, port: int, **config: Path | str
) -> Iterator["subprocess.Popen[bytes]"]:
    """A SuperNode of the SuperLink at `port` that hosts client `name`; see `kill`."""
    settings = " ".join(f'{key}="{value}"' for key, value in {"client": name, **config}.items())
    with _process(
        folder / name,
        *("flower-supernode", "--insecure", "--superlink", f"127.0.0.1:{port}"),
        *("--host", "127.0.0.1", "--port", str(_free_port()), "--node-config", settings),
    ) as started:
        yield started


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def _wait_until_healthy(port: int) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise AssertionError("the SuperLink did not start")
