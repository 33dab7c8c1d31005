"""Attacks of a simulation: what each does, to whom, and what it may never touch."""

from collections.abc import Sequence

import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from fedtune.adapter import Adapter, State, add, digest, norm, subtract
from fedtune.attacks import ATTACKS, Attack, colluded, poisoned, triggered
from fedtune.attacks.attack import Labelled
from fedtune.attacks.replies import Alie, Gauge, InnerProduct, ScaledUpdate, SignFlip
from fedtune.attacks.rows import Backdoor, LabelFlip
from fedtune.components import build
from fedtune.errors import RecipeError
from fedtune.lowrank import products
from fedtune.shards import Shard
from fedtune.strategies.strategy import Update
from fedtune.tasks import TASKS

COUNT = 8
NAMES = ["east", "north", "south", "west"]
WHERE = Labelled("text", "label", ("a", "b", "c"))


def adapter_of(seed: int, rank: int = 3) -> Adapter:
    draws, made = torch.Generator().manual_seed(seed), {}
    for module, (d_out, d_in) in {"q": (5, 4), "v": (4, 6)}.items():
        for key, shape in (("A", (rank, d_in)), ("B", (d_out, rank))):
            tensor = torch.randn(shape, generator=draws, dtype=torch.float64)
            made[f"{module}.lora_{key}.weight"] = tensor
    return made


def updates_of(seeds: Sequence[int]) -> list[Update]:
    return [
        Update(name, 1.0, {"delta": adapter_of(seed), "head": {"w": adapter_of(seed + 1)[KEY]}})
        for name, seed in zip(NAMES, seeds, strict=True)
    ]


KEY = "q.lora_A.weight"


def all_of(kind: type[Attack], clients: int = 1) -> Attack:
    """An attack with its defaults."""
    if kind is Backdoor:
        return Backdoor(trigger="my card", target="b", clients=clients)
    return kind(clients=clients) if kind is not ATTACKS["none"] else kind()  # type: ignore[call-arg]


def rows_of(labels: Sequence[str | int]) -> Dataset:
    texts = [f"row {number}" for number in range(len(labels))]
    return Dataset.from_dict({"text": texts, "label": list(labels), "client": ["x"] * len(labels)})


def test_the_registry_is_as_large_as_this_file_knows() -> None:
    assert len(ATTACKS) == COUNT


@pytest.mark.parametrize("name", sorted(ATTACKS))
@given(clients=st.integers(1, 3), order=st.permutations(NAMES))
def test_the_last_by_name_are_malicious(name: str, clients: int, order: list[str]) -> None:
    attack = all_of(ATTACKS[name], clients)
    expected = set() if name == "none" else set(NAMES[-clients:])
    assert attack.malicious(order) == expected
    assert attack.shortage(order) == ""
    assert bool(attack.shortage(order[:clients])) == (name != "none")


@pytest.mark.parametrize("name", sorted(ATTACKS))
def test_each_attacks_in_one_place_or_says_so(name: str) -> None:
    """Rows, what was trained, or the others' replies; and none changes what it is given."""
    attack = all_of(ATTACKS[name])
    start, trained = {"adapter": adapter_of(0)}, {"adapter": adapter_of(1)}
    rows = rows_of(["a", "b", "c"] * 20)
    honest = [update.state for update in updates_of((1, 2, 3, 4))]
    before = digest(start), digest(trained), [digest(state) for state in honest], list(rows)
    places = {
        "rows": list(attack.rows(rows, WHERE, (0, "x"))) != list(rows),
        "trained": digest(attack.trained(start, trained, (0, 1, "x"))) != digest(trained),
        "forged": attack.forged(honest) is not None,
    }
    expected = {
        "label_flip": {"rows"},
        "backdoor": {"rows"},
        "sign_flip": {"trained"},
        "scaled_update": {"trained"},
        "gauge": {"trained"},
        "alie": {"forged"},
        "inner_product": {"forged"},
        "none": set(),
    }[name]
    assert {place for place, changed in places.items() if changed} == expected
    assert attack.forges == ("forged" in expected)
    assert attack.needs_labels == ("rows" in expected)
    after = digest(start), digest(trained), [digest(state) for state in honest], list(rows)
    assert after == before


@given(seed=st.integers(0, 10**6), factor=st.floats(0.1, 100))
def test_changes_are_scaled_or_turned_round(seed: int, factor: float) -> None:
    start, change = adapter_of(seed), adapter_of(seed + 1)
    trained: State = {"adapter": add(start, change)}
    for attack, times in ((ScaledUpdate(factor=factor), factor), (SignFlip(scale=factor), -factor)):
        got = attack.trained({"adapter": start}, trained, (0,))["adapter"]
        expected = {n: t * times for n, t in change.items()}
        assert norm(subtract(subtract(got, start), expected)) < 1e-10 * (1 + factor)


def test_what_was_not_trained_stays_bit_for_bit() -> None:
    """A frozen factor comes back as it was sent."""
    start, moved = adapter_of(0), adapter_of(1)
    trained = {n: moved[n] if "lora_B" in n else t for n, t in start.items()}
    got = SignFlip().trained({"adapter": start}, {"adapter": trained}, (0,))["adapter"]
    assert all(torch.equal(got[n], t) for n, t in start.items() if "lora_A" in n)


@given(seed=st.integers(0, 10**6), condition=st.floats(1, 1e4))
def test_a_gauge_is_the_same_model_in_other_factors(seed: int, condition: float) -> None:
    trained: State = {"adapter": adapter_of(seed)}
    got = Gauge(condition=condition).trained({}, trained, (seed, 1, "x"))
    assert norm(subtract(got["adapter"], trained["adapter"])) > 0.1
    for module, product in products(trained["adapter"]):
        other = dict(products(got["adapter"]))[module]
        torch.testing.assert_close(other.dense(), product.dense(), rtol=1e-9, atol=1e-9)
        R = torch.linalg.lstsq(product.B, other.B).solution
        assert float(torch.linalg.cond(R)) == pytest.approx(condition, rel=1e-6)
    again = Gauge(condition=condition).trained({}, trained, (seed, 1, "x"))
    assert digest(again) == digest(got)
    assert digest(Gauge(condition=condition).trained({}, trained, (seed, 2, "x"))) != digest(got)


@given(z=st.floats(-3, 3), clients=st.integers(1, 3))
def test_alie_is_the_mean_less_deviations_of_the_honest(z: float, clients: int) -> None:
    updates = updates_of((1, 2, 3, 4))
    after = colluded(updates, Alie(z=z, clients=clients), NAMES)
    honest = updates[: 4 - clients]
    assert after[: 4 - clients] == honest
    values = torch.stack([update.state["delta"][KEY] for update in honest])
    expected = values.mean(0) - z * (values - values.mean(0)).square().mean(0).sqrt()
    for update in after[4 - clients :]:
        torch.testing.assert_close(update.state["delta"][KEY], expected, rtol=1e-10, atol=1e-12)
        assert update.state["head"].keys() == honest[0].state["head"].keys()
        assert update.weight == 1.0


@given(scale=st.floats(0.1, 10))
def test_inner_products_with_the_honest_mean_are_negative(scale: float) -> None:
    updates = updates_of((1, 2, 3, 4))
    forged = colluded(updates, InnerProduct(scale=scale), NAMES)[3].state["delta"]
    for name, tensor in forged.items():
        mean = torch.stack([update.state["delta"][name] for update in updates[:3]]).mean(0)
        torch.testing.assert_close(tensor, -scale * mean, rtol=1e-10, atol=1e-12)


def test_where_nobody_honest_answered_nothing_is_forged() -> None:
    updates = updates_of((1, 2, 3, 4))[3:]
    assert colluded(updates, Alie(), NAMES) == updates
    honest = updates_of((1, 2, 3, 4))[:2]
    assert colluded(honest, Alie(), NAMES) == honest


def test_labels_are_flipped_by_hand() -> None:
    """Of a, b, c: a to c, b stays, c to a; whole numbers are labels by their text."""
    got = LabelFlip().rows(rows_of(["a", "b", "c", "a"]), WHERE, (0,))
    assert list(got["label"]) == ["c", "b", "a", "c"]
    assert list(got["text"]) == ["row 0", "row 1", "row 2", "row 3"]
    numbers = LabelFlip().rows(rows_of([0, 1]), Labelled("text", "label", ("0", "1")), (0,))
    assert list(numbers["label"]) == ["1", "0"]


@given(share=st.floats(0.01, 1), seed=st.integers(0, 10**6))
def test_a_backdoor_changes_its_share_of_rows_and_no_other(share: float, seed: int) -> None:
    """Within five standard deviations of the share."""
    rows = rows_of(["a", "c"] * 200)
    got = Backdoor(trigger="zq", target="b", share=share).rows(rows, WHERE, (seed, "x"))
    changed = 0
    for before, after in zip(rows, got, strict=True):
        if after == before:
            continue
        changed += 1
        assert after["text"] == f"zq {before['text']}"
        assert after["label"] == "b"
    assert abs(changed - 400 * share) <= 5 * (400 * share * (1 - share)) ** 0.5 + 1e-9


def test_triggered_rows_are_those_of_other_labels() -> None:
    attack = Backdoor(trigger="zq", target="b")
    got = attack.triggered(rows_of(["a", "b", "c"]), WHERE)
    assert list(got["text"]) == ["zq row 0", "zq row 2"]
    assert list(got["label"]) == ["b", "b"]
    assert len(attack.triggered(rows_of(["b"]), WHERE)) == 0
    assert attack.measured({"accuracy": [1.0, 2.0], "loss": [9.0, 2.0]}) == {"backdoor": [1.0, 2.0]}
    assert attack.measured({}) == {"backdoor": [0.0, 0.0]}


def test_only_malicious_clients_rows_are_poisoned_and_no_test_row() -> None:
    task = TASKS["classification"]()
    rows = rows_of(["a", "b", "c"] * 10)
    shards = [Shard(name, rows, rows) for name in NAMES]
    for attack in (LabelFlip(clients=2), Backdoor(trigger="zq", target="b", clients=2)):
        got = poisoned(attack, shards, task, WHERE.labels, 0)
        same = [list(s.train) == list(rows) for s in got]
        assert same == [True, True, False, False]
        assert all(list(s.test) == list(rows) for s in got)
    aimed = triggered(Backdoor(trigger="zq", target="b"), shards, task, WHERE.labels)
    assert [len(shard.test) for shard in aimed] == [20] * 4
    with pytest.raises(RecipeError, match=r"4 of 4 clients would be malicious.*Lower"):
        poisoned(LabelFlip(clients=4), shards, task, WHERE.labels, 0)
    with pytest.raises(RecipeError, match=r"target 'z' is no label\. Labels: a, b, c"):
        poisoned(Backdoor(trigger="zq", target="z"), shards, task, WHERE.labels, 0)


@pytest.mark.parametrize(
    "text",
    [
        "sign_flip(clients=0)",
        "sign_flip(scale=0.0)",
        "scaled_update(factor=-1.0)",
        "gauge(condition=0.5)",
        "alie(z=1e999)",
        "inner_product(scale=0.0)",
        "backdoor(trigger=' ', target='a')",
        "backdoor(trigger='x', target='a', share=0.0)",
        "backdoor(trigger='x')",
        "none(clients=1)",
        "sybil",
    ],
)
def test_values_without_meaning_are_refused(text: str) -> None:
    with pytest.raises(RecipeError, match="attack '"):
        build(text, ATTACKS, "attack")
