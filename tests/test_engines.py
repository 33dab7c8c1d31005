"""One definition, several engines: in this process, Flower's Ray simulation, a SuperLink with two
SuperNodes that each read their own file. All three give the same adapter."""

import json
from contextlib import ExitStack
from pathlib import Path

import pytest
from conftest import LABELS, classification_rows, write_jsonl
from safetensors.torch import load_file
from superlink import superlink, supernode
from torch.testing import assert_close

from fedtune import launch, parts
from fedtune.config import Experiment

pytestmark = pytest.mark.slow
SIZES = {"north": 24, "south": 17}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two institutions' files, and both in one for a simulation."""
    folder = tmp_path_factory.mktemp("engines")
    for split, seed in (("train", 0), ("test", 1)):
        rows = {name: classification_rows(n, seed, name) for name, n in SIZES.items()}
        for name, own in rows.items():
            write_jsonl(folder / f"{name}-{split}.jsonl", own)
        write_jsonl(folder / f"{split}.jsonl", [row for own in rows.values() for row in own])
    return folder


@pytest.fixture
def experiment(tiny: Experiment, shards: Path) -> Experiment:
    classes = ",".join(sorted(LABELS))
    return tiny.replace(
        rounds=2,
        task=f"classification(classes='{classes}')",
        data__source=f"jsonl(train='{shards}/train.jsonl', test='{shards}/test.jsonl')",
        coordinator__minimum_clients=2,
    )


def same(first: Experiment, second: Experiment) -> None:
    tensors = [
        load_file(parts.folder_of(e) / "adapter" / "adapter_model.safetensors")
        for e in (first, second)
    ]
    assert tensors[0].keys() == tensors[1].keys()
    for name in tensors[0]:
        assert_close(tensors[0][name], tensors[1][name], rtol=1e-5, atol=1e-6)
    records = [
        [
            json.loads(line)
            for line in (parts.folder_of(e) / "rounds.jsonl").read_text().splitlines()
        ]
        for e in (first, second)
    ]
    for one, other in zip(*records, strict=True):
        assert one["cohort"] == other["cohort"]
        assert (one["bytes_down"], one["bytes_up"]) == (other["bytes_down"], other["bytes_up"])
        assert other["rejected"] == []


def test_ray_gives_the_same_adapter(experiment: Experiment) -> None:
    pytest.importorskip("ray", reason="install fedtune[ray]")
    referenced = experiment.replace(references="local_only,centralized")
    launch.run(referenced)
    elsewhere = referenced.replace(name="ray")
    done = launch.run(elsewhere, engine="ray")
    same(referenced, elsewhere)
    assert set(done.references) == {"local_only", "centralized"}


def test_a_run_that_fails_on_ray_is_an_error_here(experiment: Experiment) -> None:
    pytest.importorskip("ray", reason="install fedtune[ray]")
    from fedtune.errors import RunError

    broken = experiment.replace(name="broken", adapter__target_modules="no_such_module")
    with pytest.raises(RunError, match="has no linear module 'no_such_module'"):
        launch.run(broken, engine="ray")


def test_two_supernodes_with_their_own_files_give_the_same_adapter(
    experiment: Experiment, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    launch.run(experiment)
    monkeypatch.setenv("FLWR_HOME", str(tmp_path / "cli"))
    elsewhere = experiment.replace(
        name="deployed", data__source="jsonl(train='read/by/nobody.jsonl')"
    )
    with ExitStack() as stack:
        port = stack.enter_context(superlink(tmp_path))
        for name in SIZES:
            own = {split: shards / f"{name}-{split}.jsonl" for split in ("train", "test")}
            kept = tmp_path / "kept"
            stack.enter_context(
                supernode(tmp_path, name, port, shard=own["train"], test=own["test"], state=kept)
            )
        launch.run(elsewhere, engine="loopback")
    same(experiment, elsewhere)
    roster = json.loads((parts.folder_of(elsewhere) / "roster.json").read_text())
    assert [(c["name"], c["examples"], c["mix"]) for c in roster["clients"]] == [
        ("north", 24, None),
        ("south", 17, None),
    ]
