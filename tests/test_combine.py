"""Combine rules: limits, bounds, equivariance, and the product space against dense matrices."""

import itertools
import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedtune import adapter, lowrank
from fedtune.adapter import Adapter, State, add, digest, norm, subtract, weighted_mean
from fedtune.combine import COMBINES, Combine
from fedtune.combine.combine import Mean
from fedtune.combine.coordinates import Bulyan, Median, TrimmedMean
from fedtune.combine.distances import (
    CenteredClipping,
    DnC,
    FLTrust,
    GeometricMedian,
    Krum,
    MultiKrum,
    NormBounded,
)
from fedtune.strategies import STRATEGIES
from fedtune.strategies.strategy import Update

COUNT = 11
ROOT = "c00"
# Every rule with the fewest malicious clients that it is told of, for cohorts of seven and more.
RULES: dict[str, Combine] = {
    "mean": Mean(),
    "median": Median(),
    "trimmed_mean": TrimmedMean(fraction=0.2),
    "krum": Krum(malicious=1),
    "multi_krum": MultiKrum(malicious=1, chosen=3),
    "bulyan": Bulyan(malicious=1),
    "geometric_median": GeometricMedian(),
    "norm_bounded": NormBounded(norm=3.0),
    "centered_clipping": CenteredClipping(norm=3.0),
    "dnc": DnC(malicious=1),
    "fltrust": FLTrust(root=ROOT),
}
rules = pytest.mark.parametrize("name", sorted(RULES))
cohorts = st.tuples(st.integers(7, 11), st.integers(0, 10**6))


def drawn(clients: int, seed: int, spread: float = 1.0) -> list[Adapter]:
    """Changes of two tensors around a common one, float64."""
    draws = torch.Generator().manual_seed(seed)
    shapes = {"q": (3, 4), "v": (5,)}
    common = {n: torch.randn(s, generator=draws, dtype=torch.float64) for n, s in shapes.items()}
    return [
        {
            n: t + spread * torch.randn(t.shape, generator=draws, dtype=torch.float64)
            for n, t in common.items()
        }
        for _ in range(clients)
    ]


def names_of(clients: int) -> list[str]:
    return [f"c{number:02d}" for number in range(clients)]


def joined(
    rule: Combine, changes: Sequence[Adapter], weights: Sequence[float] | None = None
) -> Adapter:
    """What the rule makes of changes whose coordinates mean something."""
    decided = rule.decided(lambda: adapter.gram(changes), names_of(len(changes)))
    return decided(changes, weights or [1.0] * len(changes))


def away(first: Adapter, second: Adapter) -> float:
    return norm(subtract(first, second))


def spread_of(changes: Sequence[Adapter], point: Adapter) -> float:
    """The sum of distances to a point."""
    return sum(away(change, point) for change in changes)


def test_every_rule_is_tested_here() -> None:
    assert COMBINES.keys() == RULES.keys()
    assert len(COMBINES) == COUNT


@rules
@given(cohort=cohorts)
def test_equal_changes_are_returned(name: str, cohort: tuple[int, int]) -> None:
    """FLTrust with all x_i = g0 gives g0; the clipping rules too, below their norm."""
    (change,) = drawn(1, cohort[1])
    change = {n: t * (2.0 / norm(change)) for n, t in change.items()}
    assert away(joined(RULES[name], [change] * cohort[0]), change) < 1e-10


@rules
@given(cohort=cohorts, shuffle=st.randoms(use_true_random=False))
def test_the_order_does_not_matter(name: str, cohort: tuple[int, int], shuffle: object) -> None:
    """Of all clients but the root, which has its name."""
    changes = drawn(*cohort)
    order = list(range(1, len(changes)))
    shuffle.shuffle(order)  # type: ignore[attr-defined]
    permuted = [changes[0], *(changes[i] for i in order)]
    assert away(joined(RULES[name], permuted), joined(RULES[name], changes)) < 1e-10


@pytest.mark.parametrize("name", sorted(RULES.keys() - {"mean"}))
@given(cohort=cohorts, weight=st.floats(1e-3, 1e9))
def test_robust_rules_ignore_the_weights(name: str, cohort: tuple[int, int], weight: float) -> None:
    """A client that claims a billion rows has one vote."""
    changes = drawn(*cohort)
    weights = [1.0] * (len(changes) - 1) + [weight]
    assert digest({"x": joined(RULES[name], changes, weights)}) == digest(
        {"x": joined(RULES[name], changes)}
    )


@pytest.mark.parametrize("name", sorted(RULES.keys() - {"mean"}))
@given(cohort=cohorts, direction=st.integers(0, 10**6))
def test_one_outlier_is_bounded(name: str, cohort: tuple[int, int], direction: int) -> None:
    """A change of length 1e6 moves the result by no more than the honest ones' own lengths."""
    changes = drawn(*cohort)
    (far,) = drawn(1, direction)
    changes[-1] = {n: t * (1e6 / norm(far)) for n, t in far.items()}
    longest = max(norm(change) for change in changes[:-1])
    assert norm(joined(RULES[name], changes)) <= 2 * longest + 3.0


@given(cohorts)
def test_the_mean_is_not_robust(cohort: tuple[int, int]) -> None:
    changes = drawn(*cohort)
    changes[-1] = {n: t + 1e6 for n, t in changes[-1].items()}
    assert norm(joined(Mean(), changes)) > 1e4


@pytest.mark.parametrize(
    ("rule", "clients"),
    [
        (Median(), 7),
        (TrimmedMean(fraction=0.43), 7),
        (Krum(malicious=3), 9),
        (MultiKrum(malicious=3, chosen=2), 9),
        (Bulyan(malicious=2), 11),
        (GeometricMedian(iterations=100), 7),
        (DnC(malicious=3), 7),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Combine) else str(value),
)
@given(seed=st.integers(0, 10**6), alike=st.booleans())
def test_breakdown_is_at_f(rule: Combine, clients: int, seed: int, alike: bool) -> None:
    """As many far clients as the rule is told of do nothing, one more than it bears does it.

    Three of seven for the median; with four of seven in one place it goes there.
    """
    told = getattr(rule, "malicious", 3)
    honest = drawn(clients, seed)
    far = drawn(clients, seed + 1, spread=0.0 if alike else 1.0)
    bad = [{n: t + 1e6 for n, t in change.items()} for change in far]
    mixed = [*honest[: clients - told], *bad[:told]]
    assert norm(joined(rule, mixed)) < 100
    most = clients // 2 + 1
    overrun = [*honest[: clients - most], *bad[:1] * most]
    if not isinstance(rule, DnC):  # it drops the largest projections, whoever they are
        assert norm(joined(rule, overrun)) > 1e5


@pytest.mark.parametrize(
    "name",
    ["mean", "median", "trimmed_mean", "krum", "multi_krum", "bulyan", "geometric_median", "dnc"],
)
@given(cohort=cohorts, by=st.integers(0, 10**6))
def test_translation_moves_the_result(name: str, cohort: tuple[int, int], by: int) -> None:
    """rule(x_i + t) = rule(x_i) + t. What clips or turns about 0 cannot have it."""
    changes, (step,) = drawn(*cohort), drawn(1, by)
    moved = joined(RULES[name], [add(change, step) for change in changes])
    assert away(moved, add(joined(RULES[name], changes), step)) < 1e-10


@given(cohort=cohorts)
def test_limits_are_the_mean(cohort: tuple[int, int]) -> None:
    changes = drawn(*cohort)
    clients = len(changes)
    mean = weighted_mean(changes, [1.0] * clients)
    for rule in (
        TrimmedMean(fraction=0.0),
        MultiKrum(malicious=1, chosen=clients),
        Bulyan(malicious=0),
        DnC(malicious=0),
        NormBounded(norm=1e3),
        CenteredClipping(norm=1e3, iterations=1),
        GeometricMedian(smoothing=1e3),
    ):
        assert away(joined(rule, changes), mean) < 1e-10, rule


@given(cohort=cohorts)
def test_one_step_of_centered_clipping_is_norm_bounding(cohort: tuple[int, int]) -> None:
    changes = drawn(*cohort)
    first = joined(CenteredClipping(norm=1.5, iterations=1), changes)
    assert away(first, joined(NormBounded(norm=1.5), changes)) < 1e-12
    assert norm(first) <= 1.5


@given(cohort=cohorts, malicious=st.integers(0, 2))
def test_krum_returns_an_input_and_the_definition_s(
    cohort: tuple[int, int], malicious: int
) -> None:
    """Against loops over subtracted tensors, bit for bit."""
    changes = drawn(*cohort)
    scores = []
    for i, change in enumerate(changes):
        squares = sorted(away(change, other) ** 2 for j, other in enumerate(changes) if j != i)
        scores.append(sum(squares[: len(changes) - malicious - 2]))
    best = scores.index(min(scores))
    got = joined(Krum(malicious=malicious), changes)
    assert digest({"x": got}) == digest({"x": changes[best]})
    chosen = sorted(range(len(changes)), key=scores.__getitem__)[:3]
    several = joined(MultiKrum(malicious=malicious, chosen=3), changes)
    assert away(several, weighted_mean([changes[i] for i in chosen], [1.0] * 3)) < 1e-10


@given(seed=st.integers(0, 10**6))
def test_bulyan_is_the_definition_s(seed: int) -> None:
    """Seven clients, f = 1: five chosen one by one; of each coordinate the three by the median."""
    changes, left, chosen = drawn(7, seed), list(range(7)), []
    while len(chosen) < 5:
        near = max(1, len(left) - 3)
        score = {
            i: sum(sorted(away(changes[i], changes[j]) ** 2 for j in left if j != i)[:near])
            for i in left
        }
        others = {i: sorted(away(changes[i], changes[j]) for j in left if j != i) for i in left}
        chosen.append(min(left, key=lambda i: (score[i], others[i])))
        left.remove(chosen[-1])
    got = joined(Bulyan(malicious=1), changes)
    for name, tensor in got.items():
        values = torch.stack([changes[i][name].flatten() for i in chosen])
        for column, value in enumerate(tensor.flatten()):
            entries = values[:, column].tolist()
            middle = sorted(entries)[2]
            near_middle = sorted(entries, key=lambda x: abs(x - middle))[:3]
            assert math.isclose(float(value), sum(near_middle) / 3, abs_tol=1e-10)


def test_coordinates_by_hand() -> None:
    """Of 1, 2, 4, 8, 100: the median is 4; without a fifth at each end, (2 + 4 + 8) / 3.

    Of 1, 2, 4, 8 it is 3.
    """
    changes = [{"x": torch.tensor([value])} for value in (100.0, 2.0, 8.0, 1.0, 4.0)]
    assert float(joined(Median(), changes)["x"]) == 4.0
    trimmed = float(joined(TrimmedMean(fraction=0.2), changes)["x"])
    assert trimmed == pytest.approx(14 / 3, rel=1e-7)
    assert float(joined(Median(), changes[1:])["x"]) == 3.0


@given(cohort=cohorts, steps=st.integers(1, 10), smoothing=st.floats(1e-9, 1e-2))
def test_the_geometric_median_s_distances_are_no_more_than_the_mean_s(
    cohort: tuple[int, int], steps: int, smoothing: float
) -> None:
    """Up to nu / 2 a client, by which a smoothed distance may exceed the true one."""
    changes = drawn(*cohort)
    mean = weighted_mean(changes, [1.0] * len(changes))
    point = joined(GeometricMedian(iterations=steps, smoothing=smoothing), changes)
    slack = len(changes) * smoothing / 2 + 1e-10
    assert spread_of(changes, point) <= spread_of(changes, mean) + slack


def test_the_geometric_median_of_a_line_is_its_median() -> None:
    """0, 1 and 10 on a line: the least sum of distances is at 1."""
    changes = [{"x": torch.tensor([v], dtype=torch.float64)} for v in (0.0, 1.0, 10.0)]
    assert float(joined(GeometricMedian(iterations=200), changes)["x"]) == pytest.approx(
        1, abs=1e-3
    )


@given(cohort=cohorts)
def test_fltrust_is_the_definition_s(cohort: tuple[int, int]) -> None:
    """sum ReLU(cos) |g0| / |x_i| x_i / sum ReLU(cos), over the others."""
    changes = drawn(*cohort, spread=3.0)
    flat = torch.stack([torch.cat([t.flatten() for t in c.values()]) for c in changes])
    cosines = torch.nn.functional.cosine_similarity(flat, flat[:1]).clamp(min=0)[1:]
    rescaled = flat[1:] * flat[0].norm() / flat[1:].norm(dim=1, keepdim=True)
    expected = (
        (cosines[:, None] * rescaled).sum(0) / cosines.sum() if cosines.sum() else 0 * flat[0]
    )
    got = torch.cat([t.flatten() for t in joined(FLTrust(root=ROOT), changes).values()])
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


def test_fltrust_does_not_move_where_nobody_agrees() -> None:
    (change,) = drawn(1, 0)
    opposite = {n: -t for n, t in change.items()}
    assert norm(joined(FLTrust(root=ROOT), [change, opposite, opposite])) == 0.0


@given(cohort=cohorts, dropped=st.integers(1, 3))
def test_dnc_drops_the_largest_projections(cohort: tuple[int, int], dropped: int) -> None:
    """Against the singular vectors of the centred matrix of changes."""
    changes = drawn(*cohort)
    flat = torch.stack([torch.cat([t.flatten() for t in c.values()]) for c in changes])
    centred = flat - flat.mean(0)
    _, values, rows = torch.linalg.svd(centred, full_matrices=False)
    projections = (centred @ rows[0]).abs()
    order = projections.argsort().tolist()
    gap = projections[order[-dropped]] - projections[order[-dropped - 1]]
    if values[0] - values[1] < 1e-3 or gap < 1e-6:
        return  # who is dropped hangs on the last bits
    kept = [changes[i] for i in sorted(order[:-dropped])]
    expected = weighted_mean(kept, [1.0] * len(kept))
    assert away(joined(DnC(malicious=dropped), changes), expected) < 1e-10


@pytest.mark.parametrize(
    ("rule", "clients", "reason"),
    [
        (Krum(malicious=2), 6, "needs 7 clients in every round, and here are 6"),
        (MultiKrum(malicious=0, chosen=5), 4, "needs 5 clients"),
        (Bulyan(malicious=1), 6, "needs 7 clients"),
        (DnC(malicious=2), 4, "needs 5 clients"),
        (FLTrust(root="north"), 3, "trusts client 'north', who is not among c00, c01, c02"),
    ],
)
def test_too_few_clients_are_refused(rule: Combine, clients: int, reason: str) -> None:
    changes = drawn(clients, 0)
    with pytest.raises(ValueError, match=reason):
        joined(rule, changes)


# The product space.


def factors_of(seed: int, rank: int = 2, scale: float = 1.0) -> Adapter:
    """Two modules, not square, and a tensor beside them."""
    draws, made = torch.Generator().manual_seed(seed), {}
    for module, (d_out, d_in) in {"q": (5, 3), "v": (4, 6)}.items():
        for key, shape in (("A", (rank, d_in)), ("B", (d_out, rank))):
            tensor = torch.randn(shape, generator=draws, dtype=torch.float64)
            made[f"{module}.lora_{key}.weight"] = scale * tensor
    made["norm"] = scale * torch.randn(3, generator=draws, dtype=torch.float64)
    return made


def dense(made: Adapter) -> torch.Tensor:
    """All weights that an adapter changes, as one vector."""
    matrices = [made[f"{m}.lora_B.weight"] @ made[f"{m}.lora_A.weight"] for m in ("q", "v")]
    return torch.cat([*(m.flatten() for m in matrices), made["norm"].flatten()])


def updates_of(server: Adapter, trained: Sequence[Adapter]) -> list[Update]:
    return [
        Update(name, 1.0, {"delta": subtract(t, server)})
        for name, t in zip(names_of(len(trained)), trained, strict=True)
    ]


seeds = st.lists(st.integers(1, 10**6), min_size=7, max_size=9, unique=True)


@given(drawn=seeds, scale=st.floats(1e-4, 10))
def test_fedit_s_gram_is_the_dense_one(drawn: list[int], scale: float) -> None:
    """<(B+dB)(A+dA) - BA, ...> to 1e-10 of the norms, without a dense matrix."""
    server = factors_of(0)
    trained = [add(server, factors_of(seed, scale=scale)) for seed in drawn]
    got = STRATEGIES["fedit"]().gram({"adapter": server}, updates_of(server, trained), 1)
    changes = torch.stack([dense(t) - dense(server) for t in trained])
    expected = changes @ changes.T
    # The dense oracle itself subtracts products: 1e-15 of the weights at most.
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12 * (1 + float(expected.max())))


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 10**6)), min_size=1, max_size=6))
def test_the_gram_of_mixed_ranks_is_the_dense_one(drawn: list[tuple[int, int]]) -> None:
    terms = [dict(lowrank.products(factors_of(seed, rank))) for rank, seed in drawn]
    flat = torch.stack([torch.cat([t[m].dense().flatten() for m in ("q", "v")]) for t in terms])
    torch.testing.assert_close(lowrank.gram(terms), flat @ flat.T, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", sorted(n for n, r in RULES.items() if r.family == "distances"))
@given(drawn=seeds, which=st.integers(0, 6), gauge=st.integers(0, 10**6))
def test_product_space_rules_do_not_see_a_gauge(
    name: str, drawn: list[int], which: int, gauge: int
) -> None:
    """A client that writes (B R, R^-1 A) gets the coefficient that it had; so do the others."""
    server, fedit = factors_of(0), STRATEGIES["fedit"]()
    trained = [add(server, factors_of(seed, scale=0.5)) for seed in drawn]
    draws = torch.Generator().manual_seed(gauge)
    left, right = torch.linalg.qr(torch.randn(2, 2, 2, generator=draws, dtype=torch.float64))[0]
    R = left @ torch.diag(torch.tensor([3.0, 0.5], dtype=torch.float64)) @ right
    turned = [dict(t) for t in trained]
    for module in ("q", "v"):
        a, b = f"{module}.lora_A.weight", f"{module}.lora_B.weight"
        turned[which][a] = torch.linalg.solve(R, trained[which][a])
        turned[which][b] = trained[which][b] @ R
    found = [
        fedit.decide({"adapter": server}, updates_of(server, some), RULES[name], 1)
        for some in (trained, turned)
    ]
    first, second = (torch.tensor(rule.coefficients) for rule in found)  # type: ignore[attr-defined]
    torch.testing.assert_close(first, second, rtol=1e-9, atol=1e-10)


def test_a_factor_space_rule_would_see_it() -> None:
    """Why FedIT refuses the median: of three clients with one model, one is written otherwise."""
    server = factors_of(0)
    trained = add(server, factors_of(1))
    turned = {
        n: t * (2.0 if "lora_B" in n else 0.5 if "lora_A" in n else 1.0) for n, t in trained.items()
    }
    torch.testing.assert_close(dense(turned), dense(trained))
    mixed = [subtract(t, server) for t in (trained, turned, turned)]
    product = add(server, joined(Median(), mixed))
    torch.testing.assert_close(dense(product), dense(trained))
    halves = add(server, joined(Median(), [mixed[0], mixed[1]]))
    assert (dense(halves) - dense(trained)).norm() > 0.1


@pytest.mark.parametrize("name", ["ffa_lora", "rolora", "fedsvd", "fedsa_lora"])
def test_with_one_factor_sent_coordinates_count(name: str) -> None:
    strategy, server = STRATEGIES[name](), factors_of(0)
    for round in (1, 2):
        sent = [
            {n: t for n, t in factors_of(s).items() if strategy.shares(n, round)} for s in (1, 2, 3)
        ]
        updates = [Update(f"c{i}", 1.0, {"delta": delta}) for i, delta in enumerate(sent)]
        got = strategy.gram({"adapter": server}, updates, round)
        torch.testing.assert_close(got, adapter.gram(sent), rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", ["krum", "multi_krum", "dnc", "bulyan"])
def test_the_head_is_joined_by_the_same_decision(name: str) -> None:
    """A client whose head alone is poisoned is left out of the adapter too."""
    strategy, server = STRATEGIES["ffa_lora"](), {"adapter": factors_of(0)}
    updates = []
    for number, client in enumerate(names_of(7)):
        b = {n: t for n, t in factors_of(number + 1).items() if strategy.shares(n, 1)}
        head = {"w": torch.full((2,), 1e3 if number == 6 else 0.1 * number, dtype=torch.float64)}
        updates.append(Update(client, 1.0, {"delta": b, "head": head}))
    rule = strategy.decide(server, updates, RULES[name], 1)
    heads = [update.state["head"] for update in updates]
    assert float(rule(heads, [1.0] * 7)["w"].max()) < 1
    after = strategy.aggregate(server, updates, rule, 1)
    poisoned = [
        *updates[:6],
        Update(
            "c06",
            1.0,
            {
                **updates[6].state,
                "delta": {n: t * 1e6 for n, t in updates[6].state["delta"].items()},
            },
        ),
    ]
    again = strategy.aggregate(
        server, poisoned, strategy.decide(server, poisoned, RULES[name], 1), 1
    )
    assert digest(after) == digest(again)


def test_the_mean_asks_for_no_gram() -> None:
    """The matrix of a thousand clients is not computed for nothing."""

    def never() -> torch.Tensor:
        raise AssertionError("computed")

    assert Mean().decided(never, ["a"]) == Mean()
    assert Median().decided(never, ["a", "b"]) == Median()


def test_coordinate_rules_leave_dtypes_as_they_are() -> None:
    changes = [{"x": torch.randn(3)} for _ in range(9)]
    kinds = {joined(rule, changes)["x"].dtype for rule in RULES.values()}
    assert kinds == {torch.float32}


def test_every_pair_of_rules_differs() -> None:
    """No rule is another by mistake."""
    changes = drawn(9, 5, spread=2.0)
    results = {name: joined(rule, changes) for name, rule in RULES.items()}
    for first, second in itertools.combinations(sorted(results), 2):
        assert away(results[first], results[second]) > 1e-3, (first, second)


def test_a_state_of_a_strategy_is_not_changed_by_a_rule() -> None:
    server: State = {"adapter": factors_of(0)}
    before = digest(server)
    updates = updates_of(server["adapter"], [factors_of(s) for s in range(1, 8)])
    fedit = STRATEGIES["fedit"]()
    fedit.aggregate(server, updates, fedit.decide(server, updates, Krum(), 1), 1)
    assert digest(server) == before
