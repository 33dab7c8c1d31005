"""The figures of a round against dense matrices, and what is known of them for each strategy."""

import math
from collections.abc import Iterable, Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedtune import aggregation
from fedtune.adapter import Adapter, State, at_rank
from fedtune.combine import Mean
from fedtune.lowrank import mean_product, products
from fedtune.records import RoundRecord
from fedtune.strategies import STRATEGIES
from fedtune.strategies.strategy import ClientInfo, Plan, Strategy, Turn, Update

# Narrow and wide, so that both forms of the mathematics are met: factors and whole matrices.
SHAPES = {"q": (40, 31), "v": (5, 60), "k": (3, 4)}
NAMES = ("relative_error", "cosine", "effective_rank", "drift", "update_cosine")


def adapter_of(seed: int, rank: int, scale: float = 1.0) -> Adapter:
    draws, adapter = torch.Generator().manual_seed(seed), {}
    for module, (d_out, d_in) in SHAPES.items():
        for key, shape in (("A", (rank, d_in)), ("B", (d_out, rank))):
            drawn = torch.randn(shape, generator=draws, dtype=torch.float64)
            adapter[f"{module}.lora_{key}.weight"] = scale * drawn
    return adapter


def moved(adapter: Adapter, seed: int, by: float, rank: int = 0) -> Adapter:
    own = at_rank(adapter, rank)
    size = len(own["q.lora_A.weight"])
    return {name: own[name] + t for name, t in adapter_of(seed, size, by).items()}


def dense(adapter: Adapter) -> dict[str, Tensor]:
    return {module: product.dense() for module, product in products(adapter)}


def flat(matrices: dict[str, Tensor]) -> Tensor:
    return torch.cat([matrices[module].reshape(-1) for module in SHAPES])


def ranks(matrices: dict[str, Tensor]) -> tuple[float, float]:
    """(effective, stable), means over modules, from the definitions."""
    effective, stable = [], []
    for matrix in matrices.values():
        sigma = torch.linalg.svdvals(matrix)
        q = sigma**2 / (sigma**2).sum()
        effective.append(math.exp(-sum(float(x) * math.log(float(x)) for x in q if x > 0)))
        stable.append(float((sigma**2).sum() / sigma.max() ** 2))
    return sum(effective) / len(effective), sum(stable) / len(stable)


def oracle(
    clients: Sequence[Adapter], weights: Sequence[float], before: State, after: State
) -> dict[str, float]:
    """Every figure from dense matrices, as its definition has it."""
    p = [w / sum(weights) for w in weights]
    x = [dense(client) for client in clients]
    ideal = {m: sum((p[i] * x[i][m] for i in range(len(x))), torch.zeros(())) for m in SHAPES}
    base = [
        dense(s["base"]) if s.get("base") else dict.fromkeys(SHAPES, 0.0) for s in (before, after)
    ]
    start, end = dense(before["adapter"]), dense(after["adapter"])
    real = {m: base[1][m] - base[0][m] + end[m] for m in SHAPES}
    a, b = flat(ideal), flat(real)
    u = [flat(one) - flat(start) for one in x]
    change = (a - flat(start)).norm()
    square = sum(p[i] * float((flat(x[i]) - a).norm()) ** 2 for i in range(len(x)))
    found = {
        "error": float((a - b).norm()),
        "ideal": float(a.norm()),
        "relative_error": float((a - b).norm() / a.norm()),
        "cosine": float(a @ b / a.norm() / b.norm()),
        "change": float(change),
        "drift": math.sqrt(square) / float(change),
    }
    found["effective_rank"], found["stable_rank"] = ranks(ideal)
    total = {m: base[1][m] + end[m] for m in SHAPES}
    found["accumulated_effective_rank"], found["accumulated_stable_rank"] = ranks(total)
    pairs = [(i, j) for i in range(len(u)) for j in range(i)]
    if pairs:
        lengths = [p[i] * float(u[i].norm()) for i in range(len(u))]
        share = [lengths[i] * lengths[j] for i, j in pairs]
        cosines = [float(u[i] @ u[j] / u[i].norm() / u[j].norm()) for i, j in pairs]
        products_ = [s * c for s, c in zip(share, cosines, strict=True)]
        found["update_cosine"] = sum(products_) / sum(share)
    for key in ("A", "B"):
        found[f"moved_{key}"] = sum(
            p[i] * math.sqrt(sum(_distance(client, before["adapter"], key, m) for m in SHAPES))
            for i, client in enumerate(clients)
        )
    return found


def _distance(client: Adapter, start: Adapter, key: str, module: str) -> float:
    name = f"{module}.lora_{key}.weight"
    rank = len(client[f"{module}.lora_A.weight"])
    return float((client[name] - at_rank(start, rank)[name]).square().sum())


DRAWN = st.lists(st.tuples(st.integers(1, 4), st.floats(0.1, 10)), min_size=1, max_size=5)


@given(DRAWN, st.booleans(), st.sampled_from([1.0, 1e-3]), st.integers(0, 2**20))
def test_every_figure_is_that_of_dense_matrices(
    drawn: list[tuple[int, float]], grown: bool, by: float, seed: int
) -> None:
    """Ranks 1 to 4 beside the server's 3, with and without a base, large and small changes."""
    before: State = {"adapter": adapter_of(seed, 3)}
    after: State = {"adapter": moved(before["adapter"], seed + 1, by)}
    if grown:
        before["base"], after["base"] = adapter_of(seed + 2, 2), adapter_of(seed + 3, 4)
    clients = [
        moved(before["adapter"], seed + 4 + i, by * (1 + i), rank)
        for i, (rank, _) in enumerate(drawn)
    ]
    weights = [weight for _, weight in drawn]
    found = aggregation.measure(clients, weights, before, after)
    expected = oracle(clients, weights, before, after)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        # drift and cosine come from differences of squares: half the digits of the change.
        assert found[name] == pytest.approx(value, rel=1e-6, abs=1e-6), name
    for name in ("error", "ideal", "relative_error", "cosine", "change", "moved_A", "moved_B"):
        assert found[name] == pytest.approx(expected[name], rel=1e-9, abs=1e-11), name


def trained_by(plan: Plan, seed: int, by: float) -> State:
    """The plan's start, its trainable tensors moved by what the seed draws."""
    draws = torch.Generator().manual_seed(seed)
    return {
        group: {
            name: tensor + by * torch.randn(tensor.shape, generator=draws, dtype=torch.float64)
            if name in plan.trainable
            else tensor
            for name, tensor in adapter.items()
        }
        for group, adapter in plan.start.items()
    }


def played(
    strategy: Strategy,
    seeds: Sequence[int],
    weights: Sequence[float],
    rounds: int = 1,
    by: float = 0.3,
) -> list[dict[str, float]]:
    """The figures of whole rounds in which each client moves by what its seed draws."""
    server = strategy.start(adapter_of(0, 2))
    personal: list[State] = [{} for _ in seeds]
    figures = []
    for round in range(1, rounds + 1):
        updates = []
        for i, (seed, weight) in enumerate(zip(seeds, weights, strict=True)):
            info = ClientInfo(f"c{i}", 9, round - 1)
            turn = Turn(round, strategy.broadcast(server, info, round), personal[i])
            plan = strategy.plan(turn)
            sent, personal[i] = strategy.reply(turn, plan, trained_by(plan, seed + round, by))
            updates.append(Update(f"c{i}", weight, sent))
        after = strategy.aggregate(server, updates, Mean(), round)
        figures.append(aggregation.of_round(strategy, server, updates, after, round))
        server = after
    return figures


EXACT = ("fed_sb", "fedex_lora", "fedsvd", "ffa_lora", "flora", "oracle", "ravan", "rolora")


@pytest.mark.parametrize("name", EXACT)
def test_an_exact_strategy_has_no_error(name: str) -> None:
    for figures in played(STRATEGIES[name](), [1, 2, 3], [1.0, 2.0, 5.0], rounds=4):
        assert figures["relative_error"] < 1e-10
        assert figures["cosine"] == pytest.approx(1.0, abs=1e-12)


@given(st.lists(st.floats(0.1, 10), min_size=2, max_size=5))
def test_fedit_errs_by_its_residual(weights: list[float]) -> None:
    """|sum_i p_i (B_i - B-bar)(A_i - A-bar)|_F over all modules (identity fedit.3)."""
    seeds = range(1, len(weights) + 1)
    (figures,) = played(STRATEGIES["fedit"](), list(seeds), weights)
    p = torch.tensor(weights, dtype=torch.float64) / sum(weights)
    square = 0.0
    for a, b in factors(fedit_clients(seeds, 0.3)):
        a, b = a - torch.einsum("k,kri->ri", p, a), b - torch.einsum("k,kor->or", p, b)
        square += float(torch.einsum("k,kor,kri->oi", p, b, a).square().sum())
    assert figures["error"] == pytest.approx(math.sqrt(square), rel=1e-9)
    assert figures["error"] > 1e-2


def fedit_clients(seeds: Iterable[int], by: float) -> list[Adapter]:
    """What `played` has FedIT's clients end their first round with."""
    start = adapter_of(0, 2)
    plan = STRATEGIES["fedit"]().plan(Turn(1, {"adapter": start}, {}))
    return [trained_by(plan, seed + 1, by)["adapter"] for seed in seeds]


def factors(clients: Sequence[Adapter]) -> list[tuple[Tensor, Tensor]]:
    """A (clients, rank, d_in) and B (clients, d_out, rank) of every module."""
    stacks = {
        key: [torch.stack([c[f"{module}.lora_{key}.weight"] for c in clients]) for module in SHAPES]
        for key in "AB"
    }
    return list(zip(stacks["A"], stacks["B"], strict=True))


def test_flexlora_errs_least_of_its_rank() -> None:
    flex, fedit = (played(STRATEGIES[n](), [1, 2, 3], [1.0] * 3)[0] for n in ("flexlora", "fedit"))
    assert 0 < flex["error"] < fedit["error"]
    assert flex["ideal"] == pytest.approx(fedit["ideal"])


@pytest.mark.parametrize("name", sorted(STRATEGIES))
def test_one_client_and_equal_clients_neither_err_nor_differ(name: str) -> None:
    strategy = STRATEGIES[name]()
    alone = played(strategy, [1], [3.0], rounds=2)
    together = played(strategy, [1, 1, 1], [3.0, 1.0, 0.5], rounds=2)
    if strategy.personal:
        assert alone == together == [{}, {}]
        return
    for figures in [*alone, *together]:
        assert figures["relative_error"] < 1e-10
        assert figures["drift"] == 0.0
    assert all("update_cosine" not in figures for figures in alone)
    assert all(figures["update_cosine"] == pytest.approx(1.0) for figures in together)


def test_a_small_error_beside_a_large_model_keeps_its_digits() -> None:
    """The clients' changes are 1e-6 of the model, so FedIT errs by about 1e-12 of it."""
    (figures,) = played(STRATEGIES["fedit"](), [1, 2], [1.0, 1.0], by=1e-6)
    square = 0.0
    for a, b in factors(fedit_clients((1, 2), 1e-6)):
        square += float(((b[0] - b[1]) @ (a[0] - a[1]) / 4).square().sum())
    assert 1e-13 < figures["relative_error"] < 1e-11
    assert figures["error"] == pytest.approx(math.sqrt(square), rel=1e-2)


def test_opposite_clients_and_a_model_at_rest() -> None:
    """Two clients that move B by D and -D: cosine -1, no mean change, so no drift over it."""
    start = adapter_of(0, 2)
    turn = adapter_of(1, 2)
    clients = [
        {name: t + sign * turn[name] if "lora_B" in name else t for name, t in start.items()}
        for sign in (1.0, -1.0)
    ]
    figures = aggregation.measure(clients, [1.0, 1.0], {"adapter": start}, {"adapter": start})
    assert figures["update_cosine"] == pytest.approx(-1.0)
    assert figures["change"] < 1e-12
    assert figures["relative_error"] < 1e-12
    assert figures["moved_A"] == 0.0
    zeros = {name: torch.zeros_like(t) for name, t in start.items()}
    nothing = aggregation.measure([zeros], [1.0], {"adapter": zeros}, {"adapter": zeros})
    assert nothing == {"error": 0, "ideal": 0, "change": 0, "moved_A": 0, "moved_B": 0}


def test_a_base_that_only_grows_counts_by_what_was_added() -> None:
    """The same figures where the server holds a base of rank 20 from earlier rounds."""
    start, fresh = adapter_of(0, 2), adapter_of(5, 2)
    clients = [moved(start, seed, 0.3) for seed in (1, 2)]
    mean, old = mean_product(clients, [1.0, 3.0]), adapter_of(7, 20)
    grown = {
        name: torch.cat([old[name], t], dim=0 if "lora_A" in name else 1)
        for name, t in mean.items()
    }
    zero = {name: torch.zeros_like(t) if "lora_B" in name else t for name, t in fresh.items()}
    late = aggregation.measure(
        clients, [1.0, 3.0], {"adapter": start, "base": old}, {"adapter": zero, "base": grown}
    )
    early = aggregation.measure(
        clients, [1.0, 3.0], {"adapter": start}, {"adapter": zero, "base": mean}
    )
    assert late["relative_error"] < 1e-13 > early["relative_error"]
    for name in NAMES:
        assert late[name] == pytest.approx(early[name], abs=1e-10)
    assert late["accumulated_effective_rank"] > early["accumulated_effective_rank"]


def test_of_many_large_modules_some_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three modules; the cost of all is the product of the matrices' sides and their smaller one.

    A budget of half the second module's leaves it out and changes nothing else.
    """
    start = adapter_of(0, 4)
    clients = [moved(start, seed, 0.3) for seed in (1, 2)]
    arguments = (clients, [1.0, 2.0], {"adapter": start}, {"adapter": start})
    whole = aggregation.measure(*arguments)
    # In 12 ranks, of B0, B_i - B0 and the result's 4: q 16 x 16, v 5 x 16, k 3 x 4.
    monkeypatch.setattr(aggregation, "SVD_BUDGET", 3 * 5 * 5 * 16 / 2)
    some = aggregation.measure(*arguments)
    mean = dense(mean_product(clients, [1.0, 2.0]))
    left = {module: mean[module] for module in ("q", "k")}
    assert some["effective_rank"] == pytest.approx(ranks(left)[0])
    assert some["stable_rank"] == pytest.approx(ranks(left)[1])
    for name in whole.keys() - {"effective_rank", "stable_rank"}:
        assert some[name] == whole[name]


def test_records_of_rounds_written_before_there_were_figures_are_read() -> None:
    record = RoundRecord(1, ["a"], 2.0, 10, 5, aggregation={"error": 0.5})
    assert RoundRecord.from_json(record.to_json()) == record
    line = record.to_json().replace(', "aggregation": {"error": 0.5}', "")
    assert RoundRecord.from_json(line).aggregation == {}
