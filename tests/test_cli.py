"""The command line as a user or a script meets it."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fedtune import cli, parts
from fedtune.config import Experiment
from fedtune.privacy.identity import Identity

ROOT = Path(__file__).parent.parent


def write_recipe(experiment: Experiment, folder: Path) -> Path:
    path = folder / f"{experiment.name}.toml"
    path.write_text(experiment.text(), encoding="utf-8")
    return path


def call(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: object
) -> tuple[int, str, str]:
    """(exit code, standard output, standard error) of `fedtune ARGUMENTS`."""
    monkeypatch.setattr(sys, "argv", ["fedtune", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    printed = capsys.readouterr()
    return int(stop.value.code or 0), printed.out, printed.err


@pytest.fixture
def fedtune(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):  # type: ignore
    return lambda *arguments: call(capsys, monkeypatch, *arguments)


def test_run_report_and_export(tiny: Experiment, tmp_path: Path, fedtune) -> None:  # type: ignore
    recipe = write_recipe(tiny, tmp_path)
    code, out, err = fedtune("run", recipe, "references=local_only", "name=cli")
    assert (code, err) == (0, "")
    assert "untuned" in out
    assert "federated" in out
    folder = tmp_path / "runs" / "cli"
    html = (folder / "report.html").read_text(encoding="utf-8")
    (folder / "report.html").unlink()
    code, _, _ = fedtune("report", folder)
    assert code == 0
    again = (folder / "report.html").read_text(encoding="utf-8")
    assert strip_ids(again) == strip_ids(html)

    code, out, _ = fedtune("report", folder, "--json")
    assert code == 0
    assert json.loads(out)["folder"] == str(folder)

    assert fedtune("export", folder, tmp_path / "peft")[0] == 0
    assert (tmp_path / "peft" / "adapter_config.json").exists()
    assert fedtune("export", folder, tmp_path / "whole", "--merge")[0] == 0
    assert (tmp_path / "whole" / "model.safetensors").exists()
    code, _, err = fedtune("export", folder, tmp_path / "peft")
    assert (code, "is not empty" in err) == (2, True)


def strip_ids(html: str) -> str:
    """Plots get random ids; everything else must be the same."""
    return re.sub(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f-]+", "", html)


def test_run_as_a_script_reads_it(tiny: Experiment, tmp_path: Path, fedtune) -> None:  # type: ignore
    code, out, _ = fedtune("run", write_recipe(tiny, tmp_path), "--json")
    assert code == 0
    assert json.loads(out)["folder"].endswith("runs/tiny")


def test_every_round_prints_its_aggregation_error(
    tiny: Experiment,
    tmp_path: Path,
    fedtune,  # type: ignore
) -> None:
    """The one that rounds.jsonl has; FedIT's mean of factors errs once clients differ in both."""
    code, out, _ = fedtune("run", write_recipe(tiny, tmp_path))
    assert code == 0
    lines = (parts.folder_of(tiny) / "rounds.jsonl").read_text().splitlines()[1:]
    errors = [json.loads(line)["aggregation"]["relative_error"] for line in lines]
    assert len(errors) == 3
    assert all(0 < error < 1 for error in errors)
    printed = [line for line in out.splitlines() if ": round " in line]
    for line, error in zip(printed, errors, strict=True):
        assert f"aggregation error {error:.2g}" in line
    assert "Aggregation against the mean of the clients' products" in out


def test_plan_counts_what_run_sends(tiny: Experiment, tmp_path: Path, fedtune) -> None:  # type: ignore
    recipe = write_recipe(tiny, tmp_path)
    code, out, _ = fedtune("plan", recipe, "--json")
    plan = json.loads(out)
    assert code == 0
    assert (plan["clients"], plan["examples"], plan["test_examples"]) == (3, 50, 24)
    assert fedtune("run", recipe)[0] == 0
    lines = (parts.folder_of(tiny) / "rounds.jsonl").read_text().splitlines()[1:]
    sent = sum(json.loads(line)[key] for line in lines for key in ("bytes_down", "bytes_up"))
    tensors = 26 * 2 * 3 * 3  # of adapter and head, down and up, 3 clients, 3 rounds
    assert plan["bytes_total"] < sent <= plan["bytes_total"] + 256 * tensors

    code, out, _ = fedtune("plan", recipe)
    assert code == 0
    assert "trainable parameters" in out
    assert "north" in out


def test_plan_loads_no_weights(tiny: Experiment, tiny_bert: Path, tmp_path: Path, fedtune) -> None:  # type: ignore
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in tiny_bert.iterdir():
        if file.suffix != ".safetensors":
            (bare / file.name).write_bytes(file.read_bytes())
    recipe = write_recipe(tiny.replace(model__name=str(bare)), tmp_path)
    assert fedtune("plan", recipe)[0] == 0


def test_list_shows_one_kind(fedtune) -> None:  # type: ignore
    for kind, name in (("strategies", "fedit"), ("combine", "krum"), ("cohorts", "poisson")):
        code, out, _ = fedtune("list", kind, "--json")
        (listed,) = json.loads(out).values()
        assert code == 0
        assert name in listed
    code, _, err = fedtune("list", "colours")
    assert code == 2
    assert "Nothing is called 'colours'" in err


def test_list_knows_every_part(fedtune) -> None:  # type: ignore
    code, out, _ = fedtune("list", "--json")
    listed = json.loads(out)
    assert code == 0
    assert {k: set(v) for k, v in listed.items()} == {
        kind: set(registry) for kind, registry in parts.REGISTRIES.items()
    }
    assert all(about["about"] for registry in listed.values() for about in registry.values())
    code, out, _ = fedtune("list")
    assert code == 0
    assert "ffa_lora" in out


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("adapter.rnak=4", "error: Unknown key 'adapter.rnak'. Did you mean 'adapter.rank'?"),
        ("rounds=many", "error: rounds must be of type int, not str 'many'."),
        ("strategy=fedti", "error: strategy 'fedti' is unknown. Did you mean 'fedit'?"),
        ("references=centralised", "Did you mean 'centralized'?"),
        ("model.name=no/such-model", "error: model.name = 'no/such-model'"),
        (
            "adapter.target_modules=q_proj",
            "has no linear module 'q_proj'. It has dense, key, query",
        ),
        ("data.source=jsonl(train='none.jsonl')", "none.jsonl"),
        ("evaluation.samples=2", "needs a task that generates"),
        ("coordinator.minimum_replies=4", "but a round asks 3 clients at most"),
        ("train.proximal=inf", "at least 0 and finite"),
        ("model.max_length=129", "knows 128 positions"),
        ("references=local_only,local_only", "names 'local_only' twice"),
        ("references=fedit", "names 'fedit' which is the recipe's own strategy"),
        ("task=classification(classes='late,late')", "two or more different names"),
        ("task=classification(classes='hours,status')", "Row "),
        ("task=causal_lm", "has no EOS token"),
        ("output=/proc/nowhere", "cannot be made"),
        ("data.clients=4", "data.clients = 4 must be 0"),
    ],
)
def test_a_wrong_recipe_is_one_line_and_exit_code_2(
    tiny: Experiment,
    tmp_path: Path,
    override: str,
    message: str,
    fedtune,  # type: ignore
) -> None:
    code, _, err = fedtune("run", write_recipe(tiny, tmp_path), override)
    assert code == 2
    assert message in err
    assert err.startswith("error: ")
    assert "Traceback" not in err


def test_workers_are_refused_where_there_are_none(
    tiny: Experiment, tmp_path: Path, fedtune
) -> None:  # type: ignore
    recipe = write_recipe(tiny, tmp_path)
    code, _, err = fedtune("run", recipe, "--engine", "sequential", "--workers", "2")
    assert (code, "'sequential' has no workers here" in err) == (2, True)


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fedtune.cli", "run", "none.toml", "--debug"],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 1
    assert "Traceback" in done.stderr


def test_a_run_survives_real_kills_at_random_moments(tiny: Experiment, tmp_path: Path) -> None:
    """kill -9 three times, with references beside it; the bytes are those of a run left alone."""
    chance = random.Random(0)
    long = tiny.replace(rounds=8, train__epochs=2, references="local_only,centralized")
    recipe = write_recipe(long, tmp_path)
    command = [sys.executable, "-m", "fedtune.cli", "run", str(recipe), "--resume"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    rounds = tmp_path / "runs" / "tiny" / "rounds.jsonl"
    for committed in (1, 4, 6):
        running = subprocess.Popen(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        deadline = time.monotonic() + 120
        while running.poll() is None and time.monotonic() < deadline:
            if rounds.exists() and len(rounds.read_text().splitlines()) >= committed:
                time.sleep(chance.uniform(0, 0.15))
                break
            time.sleep(0.005)
        running.send_signal(signal.SIGKILL)
        assert running.wait() == -signal.SIGKILL
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    alone = long.replace(name="alone")
    command[4] = str(write_recipe(alone, tmp_path))
    assert (
        subprocess.run(command, env=environment, capture_output=True, check=False).returncode == 0
    )
    for arm in ("", "references/centralized/"):
        adapters = [
            (tmp_path / "runs" / name / arm / "adapter" / "adapter_model.safetensors").read_bytes()
            for name in ("tiny", "alone")
        ]
        assert adapters[0] == adapters[1]
    kept = [
        {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*.safetensors"))}
        for root in (
            tmp_path / "runs" / n / "references" / "local_only" / "clients"
            for n in ("tiny", "alone")
        )
    ]
    assert kept[0] == kept[1]
    assert len(kept[0]) == 18


def test_a_key_is_made_once_and_shown_as_its_line_in_a_roster(tmp_path: Path, fedtune) -> None:  # type: ignore
    code, line, _ = fedtune("keys", "new", tmp_path / "north.key")
    assert code == 0
    assert fedtune("keys", "show", tmp_path / "north.key")[:2] == (0, line)
    (tmp_path / "roster.toml").write_text(f'run = "a"\n[keys]\n{line}')
    identity = Identity.load("north", tmp_path / "north.key", tmp_path / "roster.toml")
    assert identity.manifest.keys == {"north": identity.public}
    code, _, error = fedtune("keys", "new", tmp_path / "north.key")
    assert code == 2
    assert "File exists" in error
