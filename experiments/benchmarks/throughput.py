"""FedTune beside what else there is, on the same federated rounds: `make bench`.

Every competitor is a process of its own that reads a job and writes a result (competitors/), and
the competitors take turns over the repetitions, A B C A B C, so that a busy minute meets them all.
What is reported is the ratio within one repetition, with its spread. Tables are printed and
written beside the raw results and the plots.
"""

import argparse
import contextlib
import dataclasses
import importlib.metadata
import itertools
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

import llama
import plots
import processes
import rows
import spec
import tables
from competitors import encoder
from competitors.job import Job
from spec import COMPETITORS, WORKLOADS, Size

HERE = Path(__file__).resolve().parent
PACKAGES = ("fedtune", "flwr", "ray", "torch", "transformers", "peft", "pfl", "numpy")


@dataclass(frozen=True)
class Options:
    """What the command line says.

    Attributes:
        only: workloads.
        competitors: who is measured; empty for each workload's own.
        repeat: how often.
        rounds: instead of each workload's own number; 0 leaves it.
        quick: as small as it can be.
        profile: FedTune's second round of each workload under cProfile, and nothing else.
        output: the folder.
        limit: seconds of one competitor.
        cores: processes that may work at once.
    """

    only: tuple[str, ...]
    competitors: tuple[str, ...]
    repeat: int
    rounds: int
    quick: bool
    profile: bool
    output: Path
    limit: float
    cores: int


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    model = platform.processor()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next((x.split(":", 1)[1].strip() for x in lines if "model name" in x), model)
    versions = {}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {
        "cpu": model or platform.machine(),
        "cores": os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": versions,
    }


def _planned(options: Options) -> Iterator[tuple[str, int, Size, tuple[str, ...]]]:
    """(workload, what varies, size, competitors) of every measurement."""
    for name in options.only:
        workload = WORKLOADS[name]
        chosen = options.competitors or workload.competitors
        for x, size in list(workload.points.items())[: 2 if options.quick else None]:
            size = spec.quick(size) if options.quick else size
            if options.rounds:
                size = dataclasses.replace(size, rounds=options.rounds)
            yield name, x, size, chosen


def _job(size: Size, inputs: Path, folder: Path, cores: int) -> Job:
    """The work of a size on the rows, and from the start, that lie in `inputs`."""
    start = inputs / "start.safetensors"
    causal = size.device != "cpu"
    return Job(
        model=str(inputs / "model") if causal else spec.ENCODER,
        train=str(inputs / "train.jsonl"),
        test=str(inputs / "test.jsonl"),
        rounds=size.rounds,
        batch_size=size.batch_size,
        max_length=size.tokens,
        learning_rate=size.learning_rate,
        top_layers=size.top_layers,
        # No more than clients: a process of pfl-research without a user fails.
        processes=min(cores, size.clients),
        folder=str(folder),
        task="causal_lm" if causal else "classification",
        dtype="bfloat16" if causal else "float32",
        # Without a GPU only --quick gets this far, to see that the code runs.
        device=size.device if torch.cuda.is_available() else "cpu",
        start=str(start) if start.exists() else "",
    )


def _prepare(inputs: Path, size: Size, chosen: Sequence[str], tiny: bool) -> tuple[int, int]:
    """Write rows, a random model, and what all begin with; returns (training rows, their tokens).

    Raises:
        MissingError: the data set or the device is not here.
    """
    path = encoder.folder_of(spec.ENCODER)
    if size.device != "cpu":
        if not (torch.cuda.is_available() or tiny):
            raise rows.MissingError("it needs a CUDA device")
        path = str(inputs / "model")
        llama.write(inputs / "model", tiny)
    counted = rows.write(inputs, size, AutoTokenizer.from_pretrained(path))
    if any(COMPETITORS[name].starts_anywhere for name in chosen):
        _start(inputs, size)
    return counted


def _start(inputs: Path, size: Size) -> None:
    """Write the tensors that all begin with, where this FedTune can make them."""
    _job(size, inputs, inputs, 1).write(inputs / "start.json")
    command = [sys.executable, "-m", "competitors.start", str(inputs / "start.json")]
    done = subprocess.run(
        [*command, str(inputs / "start.safetensors")],
        env=processes.environment(HERE),
        cwd=inputs,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode and "SkippedError" not in done.stderr:
        raise RuntimeError(f"FedTune's initial tensors could not be had: {done.stderr[-3000:]}")


def _measured(name: str, size: Size, inputs: Path, options: Options) -> dict[str, Any]:
    """One competitor at one size: its own result and what was seen from outside."""
    competitor = COMPETITORS[name]
    with tempfile.TemporaryDirectory(prefix="bench-") as text:
        folder = Path(text)
        alone = competitor.alone or size.device != "cpu"
        job = _job(size, inputs, folder, 1 if alone else options.cores)
        told = {**competitor.options, "profile": options.profile}
        job = dataclasses.replace(job, options=told)
        job.write(folder / "job.json")
        command = [sys.executable, "-m", f"competitors.{competitor.module}"]
        seen = processes.measure(
            [*command, str(folder / "job.json"), str(folder / "answer.json")],
            processes.environment(HERE),
            folder,
            folder / "log",
            options.limit,
        )
        log = (folder / "log").read_text(encoding="utf-8", errors="replace")
        if seen.code is None:
            return {"failed": f"ended after {options.limit:.0f} s: {log[-2000:]}"}
        if seen.code or not (folder / "answer.json").exists():
            return {"failed": f"exit code {seen.code}: {log[-4000:]}"}
        answer: dict[str, Any] = json.loads((folder / "answer.json").read_text(encoding="utf-8"))
    if "skipped" in answer:
        return answer
    began = answer.pop("began")
    ends = [began + offset for offset in itertools.accumulate(answer["rounds"], initial=0.0)]
    spent = [seen.cpu_at(moment) for moment in ends]
    return {
        **answer,
        "startup": began - seen.started,
        "total": seen.seconds,
        "peak_bytes": seen.peak_bytes,
        "cpu_seconds": seen.cpu[-1][1],
        "cpu_rounds": [after - before for before, after in itertools.pairwise(spent)],
        "processes": job.processes,
    }


def run(options: Options) -> dict[str, Any]:
    """All measurements; the results file is rewritten after each."""
    chosen = {key: str(v) if isinstance(v, Path) else v for key, v in vars(options).items()}
    results: dict[str, Any] = {"machine": machine(), "options": chosen, "runs": [], "skipped": []}
    planned = []
    with tempfile.TemporaryDirectory(prefix="bench-rows-") as text:
        for number, (name, x, size, competitors) in enumerate(_planned(options)):
            folder = Path(text, str(number))
            try:
                count, tokens = _prepare(folder, size, competitors, options.quick)
            except rows.MissingError as error:
                _say(f"{name} {x or ''}: skipped: {error}")
                results["skipped"].append({"workload": name, "x": x, "reason": str(error)})
                continue
            planned.append((name, x, size, competitors, folder, count, tokens))
        _write(options.output, results)
        for repetition in range(options.repeat):
            for name, x, size, competitors, folder, count, tokens in planned:
                for competitor in competitors:
                    about = {
                        "workload": name,
                        "x": x,
                        "repetition": repetition,
                        "competitor": competitor,
                        "size": dataclasses.asdict(size),
                        "tokens": tokens,
                    }
                    told = _measured(competitor, size, folder, options)
                    if told.get("rows") not in (None, 0, count):
                        told = {"failed": f"{told['rows']} of {count} rows were trained"}
                    results["runs"].append(about | told)
                    _say(tables.line(about | told))
                    _write(options.output, results)
    return results


def _say(text: str) -> None:
    print(text, flush=True)


def _write(folder: Path, results: Mapping[str, Any]) -> None:
    text = json.dumps(results, indent=1)
    part = folder / "results.json.part"
    part.write_text(text, encoding="utf-8")
    shutil.move(part, folder / "results.json")


def report(folder: Path) -> None:
    """Tables and plots of the results in a folder."""
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    text = tables.markdown(results)
    (folder / "results.md").write_text(text, encoding="utf-8")
    _say(text)
    for path in plots.draw(results, folder):
        _say(f"plot: {path}")


def parse(arguments: Sequence[str]) -> Options:
    """The options of a command line."""
    parser = argparse.ArgumentParser(prog="throughput.py", description=__doc__)
    words = {"only": ",".join(WORKLOADS), "competitors": ",".join(COMPETITORS)}
    parser.add_argument("--only", default=",".join(spec.DEFAULT), help=words["only"])
    parser.add_argument("--competitors", default="", help=words["competitors"])
    parser.add_argument("--repeat", type=int, default=1, help="repetitions")
    parser.add_argument("--rounds", type=int, default=0, help="for every competitor alike")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does everything run?")
    parser.add_argument("--profile", action="store_true", help="profile a round of FedTune")
    parser.add_argument("--output", type=Path, default=Path("runs/bench"), help="a folder")
    parser.add_argument("--limit", type=float, default=3600.0, help="seconds of one competitor")
    parser.add_argument("--cores", type=int, default=os.cpu_count() or 1, help="processes")
    parser.add_argument("--report", action="store_true", help="only draw what was measured")
    given = vars(parser.parse_args(arguments))
    for key, known in (("only", WORKLOADS), ("competitors", COMPETITORS)):
        given[key] = tuple(word for word in given[key].split(",") if word)
        unknown = [word for word in given[key] if word not in known]
        if unknown:
            parser.error(f"--{key}: {', '.join(unknown)} unknown; there are {', '.join(known)}")
    if given["profile"]:
        given["competitors"] = ("fedtune-batched",)
    given["output"] = given["output"].absolute()
    if given.pop("report"):
        report(given["output"])
        sys.exit(0)
    return Options(**given)


def main() -> None:
    """The command."""
    options = parse(sys.argv[1:])
    options.output.mkdir(parents=True, exist_ok=True)
    os.environ.update(processes.environment(HERE))
    results = run(options)
    report(options.output)
    failed = [run for run in results["runs"] if "failed" in run]
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
