"""The benchmarks measure equal work, count what they say, and draw the right conclusions."""

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, BertModel

from fedtune import bases
from fedtune.config import ModelSettings

FOLDER = Path(__file__).parent.parent / "experiments" / "benchmarks"


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> dict[str, ModuleType]:
    """The benchmarks' own modules, importable as they are for the script."""
    monkeypatch.syspath_prepend(str(FOLDER))
    import throughput

    import processes
    import rows
    import spec
    import tables

    found = (processes, rows, spec, tables, throughput)
    return {module.__name__: module for module in found}


def a_run(**changes: Any) -> dict[str, Any]:
    """A measurement of FedTune with rounds of 9, 2, 3 and 7 seconds."""
    return {
        "workload": "fixed",
        "x": 0,
        "repetition": 0,
        "competitor": "fedtune-batched",
        "size": {"top_layers": 0, "tokens": 64, "clients": 20},
        "tokens": 51_200,
        "rounds": [9.0, 2.0, 3.0, 7.0],
        "startup": 5.0,
        "total": 26.0,
        "train_loss": 1.0,
        "more": {},
    } | changes


def test_a_steady_round_is_neither_the_first_nor_the_last(modules: dict[str, ModuleType]) -> None:
    """Of 9, 2, 3, 7 the middle ones, median 2.5; of two rounds the second."""
    assert modules["tables"].steady(a_run()) == 2.5
    assert modules["tables"].steady(a_run(rounds=[9.0, 4.0])) == 4.0


def test_ratios_stay_within_a_repetition(modules: dict[str, ModuleType]) -> None:
    """5 / 2.5 in the first repetition; 10 / 5 in the second, where everything took twice as long.

    Across repetitions it would have been 4 and 1.
    """
    rival = {"competitor": "peft"}
    runs = [
        a_run(),
        a_run(**rival, rounds=[5.0] * 3),
        a_run(repetition=1, rounds=[5.0] * 3),
        a_run(**rival, repetition=1, rounds=[10.0] * 3),
        a_run(**rival, repetition=2, rounds=[99.0] * 3),
    ]
    target = modules["spec"].Target("fixed", "peft", 1.4)
    assert modules["tables"].ratios({"runs": runs}, target) == [2.0, 2.0]
    slower = modules["spec"].Target("fixed", "peft", 1.4, "rate")
    assert modules["tables"].ratios({"runs": runs}, slower) == [2.0, 2.0]


def test_unequal_work_is_named(modules: dict[str, ModuleType]) -> None:
    runs = [a_run(), a_run(competitor="peft"), a_run(competitor="pfl", train_loss=1.1)]
    machine = {"cpu": "a", "cores": 2, "python": "3", "versions": {}}
    results = {"machine": machine, "options": {"quick": True}, "runs": runs, "skipped": []}
    for run in runs:
        run["size"] |= {"rounds": 4, "batch_size": 8}
        run |= {"cpu_rounds": run["rounds"], "peak_bytes": 1e9}
        run |= {"test_loss": 1.0, "test_accuracy": 1.0}
    text = modules["tables"].markdown(results)
    assert "loss of pfl (fixed) lies 10% from the median" in text
    assert text.count("from the median") == 1
    header, *others = [line.count("|") for line in text.splitlines() if line.startswith("|")]
    assert others == [header] * 4


@pytest.mark.parametrize("top", [0, 2])
def test_the_floor_counts_what_torch_counts(modules: dict[str, ModuleType], top: int) -> None:
    """Within 5 %: torch knows that the lowest adapted layer passes no gradient on."""
    from peft import LoraConfig, get_peft_model

    config = BertConfig(
        vocab_size=64,
        hidden_size=384,
        num_hidden_layers=6,
        num_attention_heads=12,
        intermediate_size=1536,
    )
    layers = list(range(6 - top, 6)) if top else None
    lora = LoraConfig(r=8, target_modules=["query", "value"], layers_to_transform=layers)
    config._attn_implementation = "eager"
    model = get_peft_model(BertModel(config, add_pooling_layer=False), lora)
    rows, tokens = 2, 64
    with FlopCounterMode(display=False) as counter:
        model(
            input_ids=torch.ones(rows, tokens, dtype=torch.long)
        ).last_hidden_state.sum().backward()
    run = a_run(size={"top_layers": top, "tokens": tokens})
    counted = counter.get_total_flops() / (rows * tokens)
    assert modules["tables"].flops(run) == pytest.approx(counted, rel=0.05)


def test_memory_and_cpu_of_descendants_are_seen(
    modules: dict[str, ModuleType], tmp_path: Path
) -> None:
    """A child holds 200 MB while its parent waits for it; neither holds it alone at the end."""
    child = "x = bytearray(200_000_000); import time; t = time.monotonic()\n"
    child += "while time.monotonic() - t < 1.5: pass"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    processes = modules["processes"]
    seen = processes.measure(
        [sys.executable, "-c", parent], processes.environment(FOLDER), tmp_path, tmp_path / "l", 60
    )
    assert seen.code == 0
    assert 200e6 < seen.peak_bytes < 300e6
    assert 0 < seen.cpu_at(seen.started + seen.seconds) <= seen.seconds * 2
    assert seen.cpu_at(seen.started) == 0


def test_a_command_that_takes_too_long_is_ended_with_its_children(
    modules: dict[str, ModuleType], tmp_path: Path
) -> None:
    import psutil

    marker = f"fedtune-test-{tmp_path.name}"
    child = f"import time; time.sleep(600)  # {marker}"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    processes = modules["processes"]
    command = [sys.executable, "-c", parent]
    seen = processes.measure(command, processes.environment(FOLDER), tmp_path, tmp_path / "l", 2)
    assert seen.code is None
    left = [
        process
        for process in psutil.process_iter(["cmdline"])
        if marker in " ".join(process.info["cmdline"] or [])
    ]
    psutil.wait_procs(left, timeout=10)
    assert not [process for process in left if process.is_running()]


def _throughput(output: Path, *arguments: str) -> list[dict[str, Any]]:
    command = [sys.executable, str(FOLDER / "throughput.py"), "--quick", "--output", str(output)]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    assert (output / "results.md").exists()
    runs: list[dict[str, Any]] = json.loads((output / "results.json").read_text())["runs"]
    return runs


def _require_encoder() -> None:
    name = ModelSettings().name
    if bases.resolve(name) == name:
        pytest.skip(f"{name} is not here")


@pytest.mark.slow
def test_every_competitor_does_the_same_work(tmp_path: Path) -> None:
    """One step a client, so that the order of rows means nothing: equal losses in every digit.

    Float tolerance over three rounds; unequal work (a step, a clip, a weight more) moves the second
    decimal.
    """
    _require_encoder()
    pytest.importorskip("pfl")
    pytest.importorskip("ray")
    names = "fedtune-batched,fedtune-sequential,peft,peft-1,pfl,flowertune,flowertune-plain"
    runs = _throughput(tmp_path, "--only", "light", "--competitors", names)
    assert [run["competitor"] for run in runs] == names.split(",")
    for key in ("train_loss", "test_loss"):
        assert [run[key] for run in runs] == pytest.approx([runs[0][key]] * len(runs), abs=1e-4)
    for run in runs:
        assert run["rows"] == 16
        assert len(run["rounds"]) == len(run["cpu_rounds"]) == 3
        assert 0 < run["startup"] < run["total"]
        assert run["peak_bytes"] > 200e6
    assert (tmp_path / "light.png").stat().st_size > 10_000


@pytest.mark.slow
@pytest.mark.parametrize(
    "workload", ["fixed", "banking77", "many", "microbatch", "memory", "prefix", "gpu-clients"]
)
def test_every_workload_runs(workload: str, tmp_path: Path) -> None:
    """The order of a client's rows differs, so losses agree less than above."""
    _require_encoder()
    causal = workload.startswith("gpu")
    others = {"fixed": ",centralized,floor", "banking77": ",fedtune-grouped"}.get(workload, "")
    names = f"fedtune-batched,{'peft-causal' if causal else 'peft'}{others}"
    runs = _throughput(tmp_path, "--only", workload, "--competitors", names)
    if not runs:
        pytest.skip("the data set is not here")
    assert {run["competitor"] for run in runs} == set(names.split(","))
    measured = [run for run in runs if "skipped" not in run]
    assert all(run["total"] > run["startup"] > 0 < run["peak_bytes"] for run in measured)
    for x in {run["x"] for run in measured}:
        losses = [run["train_loss"] for run in measured if run["rounds"] and run["x"] == x]
        assert losses == pytest.approx([losses[0]] * len(losses), rel=0.05)
