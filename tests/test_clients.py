"""What a client keeps to itself, and what an institution lets out."""

import json
from pathlib import Path

import pytest
import torch
from flwr.app import ConfigRecord, Context, Message, RecordDict

from clients import personal
from clients.app import app
from clients.client import institution
from clients.local import identified, identify
from clients.policy import Policy
from fedtune import parts, wire
from fedtune.adapter import State
from fedtune.config import Experiment
from fedtune.errors import FedTuneError, RecipeError, RunError
from fedtune.privacy.identity import line_of, new_key
from fedtune.wire import Address

Node = dict[str, bool | int | float | str]


def state(value: float) -> State:
    return {"adapter": {"a": torch.full((2, 3), value)}, "head": {"w": torch.full((3,), -value)}}


def test_exactly_the_asked_round_is_read(tmp_path: Path) -> None:
    for round in (1, 2, 5):
        personal.save(tmp_path, round, state(float(round)))
    for round in (1, 2, 5):
        kept = personal.load(tmp_path, round)
        assert kept.keys() == {"adapter", "head"}
        assert torch.equal(kept["adapter"]["a"], state(float(round))["adapter"]["a"])
    assert personal.load(tmp_path, 0) == personal.load(tmp_path, 3) == {}


def test_a_repeated_round_replaces_its_first_try(tmp_path: Path) -> None:
    personal.save(tmp_path, 4, state(1.0))
    personal.save(tmp_path, 4, {"adapter": {"a": torch.zeros(1)}})
    assert personal.load(tmp_path, 4).keys() == {"adapter"}


def test_a_crash_in_the_middle_of_saving_leaves_the_round_before(tmp_path: Path) -> None:
    personal.save(tmp_path, 1, state(1.0))
    half = tmp_path / "round-000002.tmp"
    half.mkdir()
    (half / "adapter.safetensors").write_bytes(b"half")
    assert personal.load(tmp_path, 2) == {}
    personal.save(tmp_path, 2, state(2.0))
    assert float(personal.load(tmp_path, 2)["adapter"]["a"][0, 0]) == 2.0


def test_only_the_last_rounds_are_kept(tmp_path: Path) -> None:
    for round in range(1, 9):
        personal.save(tmp_path, round, state(float(round)))
    assert len(list(tmp_path.iterdir())) == personal.KEPT
    assert personal.load(tmp_path, 8)


def test_damaged_personal_state_is_an_error_and_not_a_new_start(tmp_path: Path) -> None:
    personal.save(tmp_path, 1, state(1.0))
    file = tmp_path / "round-000001" / "adapter.safetensors"
    file.write_bytes(file.read_bytes()[:20])
    with pytest.raises(RunError, match="cannot be read"):
        personal.load(tmp_path, 1)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"client": "a", "shard": "a.jsonl", "label_count": True}, "Did you mean 'label_counts'"),
        ({"client": "a", "shard": "a.jsonl", "samples": 1}, "samples = 1 must be of type bool"),
        ({"client": "a", "shard": "a.jsonl", "samples": "true"}, "must be of type bool"),
        ({"shard": "a.jsonl"}, "needs a client's name"),
        ({"client": "a", "shard": ""}, "needs a client's name"),
    ],
)
def test_a_mistyped_policy_is_refused(config: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Policy.of(config)


def test_nothing_is_let_out_by_default() -> None:
    assert Policy.of({"client": "a", "shard": "a.jsonl"}) == Policy(False, False)


def told(experiment: Experiment, node: Node, content: RecordDict, kind: str) -> Message:
    """The reply of a node with this node-config to a message of this kind."""
    identify()
    context = Context(1, 7, node, RecordDict(), dict(experiment.flat()))
    return app(identified(Message(content, 7, kind)), context)


def asked(experiment: Experiment, node: Node) -> Message:
    """The reply of a node with this node-config to the roster's question."""
    content = RecordDict({wire.CONFIG: ConfigRecord({"arm": ""})})
    return told(experiment, node, content, "query.describe")


@pytest.fixture
def hospital(tiny: Experiment, three_clients: Path) -> tuple[Experiment, Node]:
    classes = "classification(classes='cancel,hours,status')"
    node: Node = {
        "client": "hospital",
        "shard": str(three_clients / "train.jsonl"),
        "test": str(three_clients / "test.jsonl"),
    }
    return tiny.replace(task=classes), node


def test_label_counts_leave_an_institution_only_if_it_says_so(
    hospital: tuple[Experiment, Node],
) -> None:
    experiment, node = hospital
    for allowed in (False, True):
        reply = asked(experiment, {**node, "label_counts": allowed})
        (about,) = json.loads(str(reply.content[wire.CONFIG]["clients"]))
        assert about["name"] == "hospital"
        assert about["examples"] == 50
        assert (about["mix"] is not None) == allowed


def test_two_runs_at_one_institution_do_not_share_what_it_keeps(
    hospital: tuple[Experiment, Node],
) -> None:
    """References have the same name in every run; their personal adapters must not meet."""
    experiment, node = hospital
    config = tuple(sorted(node.items()))
    folders = []
    for run in (experiment, experiment.replace(seed=1), experiment.replace(output="elsewhere")):
        arm = parts.reference(run, "local_only")
        folders.append(institution(arm, run.run_id, config).state)
    assert folders[0] != folders[1]
    assert folders[0] == folders[2]  # where the coordinator writes does not matter


def test_an_institutions_errors_do_not_tell_what_stood_in_a_row(
    hospital: tuple[Experiment, Node], tmp_path: Path
) -> None:
    experiment, node = hospital
    secret = "patient 4711 has the flu"
    shard = tmp_path / "rows.jsonl"
    rows = [{"text": secret, "label": "status"}] * 3 + [{"text": secret, "label": secret}]
    shard.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    with pytest.raises(RecipeError, match="Row 4: its label does not occur") as caught:
        asked(experiment, {**node, "shard": str(shard)})
    assert "4711" not in str(caught.value)


def test_an_institution_takes_its_own_turn_only(hospital: tuple[Experiment, Node]) -> None:
    """It wants one client a message; a bundle of several is refused, a stranger's turn too."""
    experiment, node = hospital
    assert asked(experiment, node).content[wire.CONFIG]["together"] == 1
    turns = [
        RecordDict({wire.CONFIG: Address(experiment.run_id, "", 1, name).record()})
        for name in ("hospital", "bank")
    ]
    for kind in ("train.cohort", "evaluate.cohort"):
        with pytest.raises(RecipeError, match="A message for 2 clients; an institution is one"):
            told(experiment, node, wire.bundle(turns), kind)
        (reply,) = wire.unbundle(told(experiment, node, wire.bundle(turns[1:]), kind).content)
        assert "Client 'bank' is not here; here are hospital." in str(wire.fault_of(reply))


def test_a_fault_in_a_bundle_does_not_tell_what_stood_in_a_row(
    hospital: tuple[Experiment, Node], monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment, node = hospital

    def failing(*_: object) -> None:
        raise KeyError("patient 4711 has the flu")

    monkeypatch.setattr("clients.personal.load", failing)
    for node_config, hidden in ((node, True), ({"partition-id": 0, "num-partitions": 1}, False)):
        name = "hospital" if hidden else "north"
        turn = RecordDict({wire.CONFIG: Address(experiment.run_id, "", 1, name).record()})
        content = told(experiment, node_config, wire.bundle([turn]), "train.cohort").content
        (reply,) = wire.unbundle(content)
        fault = str(wire.fault_of(reply))
        assert ("4711" in fault) != hidden
        assert "KeyError" in fault


@pytest.fixture
def masking(hospital: tuple[Experiment, Node], tmp_path: Path) -> tuple[Experiment, Node]:
    """The hospital with a key, and a roster of itself and two others."""
    experiment, node = hospital
    names = ("hospital", "bank", "shop")
    lines = [line_of(name, new_key(tmp_path / f"{name}.key")) for name in names]
    experiment = experiment.replace(secure_aggregation="masked")
    head = f'run = "{experiment.run_id}"'
    (tmp_path / "roster.toml").write_text("\n".join([head, "[keys]", *lines]) + "\n")
    files: Node = {
        "identity": str(tmp_path / "hospital.key"),
        "roster": str(tmp_path / "roster.toml"),
        "state": str(tmp_path / "kept"),
    }
    return experiment, {**node, **files}


def test_who_masks_tells_its_key_and_not_its_rows(masking: tuple[Experiment, Node]) -> None:
    (about,) = json.loads(str(asked(*masking).content[wire.CONFIG]["clients"]))
    assert (about["examples"], about["mix"]) == (0, None)
    assert len(bytes.fromhex(about["identity"])) == len(bytes.fromhex(about["manifest"])) == 32


def test_who_has_a_roster_lets_no_update_out_in_clear(masking: tuple[Experiment, Node]) -> None:
    """Whatever recipe the coordinator sends, and whatever it asks for within a masked one."""
    experiment, node = masking
    with pytest.raises(RecipeError, match="lets out masked updates only"):
        asked(experiment.replace(secure_aggregation="none"), node)
    content = RecordDict({wire.CONFIG: Address(experiment.run_id, "", 1, "hospital").record()})
    with pytest.raises(RecipeError, match="sends masked updates only"):
        told(experiment, node, content, "train")


def test_a_key_and_a_roster_belong_together(masking: tuple[Experiment, Node]) -> None:
    experiment, node = masking
    bare = {key: value for key, value in node.items() if key not in ("identity", "roster")}
    with pytest.raises(RecipeError, match="needs the client's own key and the roster of all"):
        asked(experiment, bare)
    with pytest.raises(RecipeError, match="belong together"):
        asked(experiment, {**bare, "roster": node["roster"]})
    with pytest.raises(RecipeError, match="has not the key of"):
        asked(experiment, {**node, "client": "bank"})


def test_a_roster_is_for_one_run(masking: tuple[Experiment, Node]) -> None:
    """The same recipe under another name, over another cohort, would be a second sum of it."""
    experiment, node = masking
    reason = f"is for the run {experiment.run_id}; this one is second-"
    with pytest.raises(RecipeError, match=reason):
        asked(experiment.replace(name="second"), node)


def test_a_letter_that_nobody_expects_is_refused(
    masking: tuple[Experiment, Node], hospital: tuple[Experiment, Node]
) -> None:
    for (experiment, node), reason in (
        (masking, "no letter of the form Opening"),
        (hospital, "there is no letter to answer"),
    ):
        address = Address(experiment.run_id, "", 1, "hospital").record()
        content = RecordDict({wire.CONFIG: address, wire.LETTER: wire.letter_record(b"hello")})
        with pytest.raises(FedTuneError, match=reason):
            told(experiment, node, content, "train.keys")
