"""Rules that join factors: where they agree with each other, and by what they err."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from rounds import (
    EXACT,
    Cohort,
    cohorts,
    dense,
    effective,
    error,
    ideal,
    rotation,
    rounds,
    strategy_of,
    turn_of,
    turned,
)

from fedtune.adapter import Adapter, State, digest, nbytes, subtract, weighted_mean
from fedtune.combine import Mean
from fedtune.lowrank import products, residual
from fedtune.seeds import generator
from fedtune.strategies.scaffold import Scaffold
from fedtune.strategies.strategy import ClientInfo, Plan, Turn, Update


def only(adapter: Adapter, factor: str) -> State:
    return {"x": {name: tensor for name, tensor in adapter.items() if factor in name}}


@given(cohort=cohorts())
def test_fedit_averages_each_factor(cohort: Cohort) -> None:
    """fedit.1-3: against the plain mean; exact for one client, or where all A or all B agree."""
    for played in rounds(strategy_of("fedit"), cohort):
        mean = weighted_mean(played.trained, cohort.weights)
        away = subtract(played.after["adapter"], mean)
        assert max(float(tensor.norm()) for tensor in away.values()) < EXACT
        if len(cohort.weights) == 1:
            assert error(effective(played.after), dense(played.trained[0])) < EXACT


@pytest.mark.parametrize("frozen", ["lora_A", "lora_B"])
@given(cohort=cohorts())
def test_fedit_is_exact_where_one_factor_is_everybodys(frozen: str, cohort: Cohort) -> None:
    """fedit.3 as the coordinator sees it: deltas of one factor only."""
    strategy = strategy_of("fedit")
    (played,) = rounds(strategy, cohort, 1)
    start = played.before["adapter"]
    ends, updates = [], []
    for update in played.updates:
        delta = {
            name: torch.zeros_like(t) if frozen in name else t
            for name, t in update.state["delta"].items()
        }
        updates.append(replace(update, state={"delta": delta}))
        ends.append({name: start[name] + delta[name] for name in start})
    after = strategy.aggregate(played.before, updates, Mean(), 1)
    assert error(effective(after), ideal(replace(played, trained=ends), cohort)) < EXACT


@given(cohort=cohorts())
def test_ffa_lora_never_moves_a_and_is_rolora_without_its_even_rounds(cohort: Cohort) -> None:
    """ffa.2, ffa.3: A is the first one bit for bit; RoLoRA in a round that trains B does the same.

    FedSVD's first round has the same product: it only turns it.
    """
    ffa, rolora = strategy_of("ffa_lora"), strategy_of("rolora")
    for played in rounds(ffa, cohort, 3):
        assert digest(only(played.after["adapter"], "lora_A")) == digest(
            only(cohort.adapter("start"), "lora_A")
        )
        updates = []
        for client, end in enumerate(played.trained):
            turn = turn_of(rolora, played.before, cohort, client, 1, 0, {})
            sent, _ = rolora.reply(turn, rolora.plan(turn), {"adapter": end})
            updates.append(Update(f"c{client}", cohort.weights[client], sent))
        after = rolora.aggregate(played.before, updates, Mean(), 1)
        assert digest(after) == digest(played.after)
    (first,), (svd,) = (rounds(s, cohort, 1) for s in (ffa, strategy_of("fedsvd")))
    assert error(effective(svd.after), effective(first.after)) < EXACT


@given(cohort=cohorts())
def test_rolora_begins_with_b_and_keeps_the_other_factor(cohort: Cohort) -> None:
    """rolora.2, rolora.3, catalogue 8: the frozen factor is bitwise the same for all."""
    for played in rounds(strategy_of("rolora"), cohort, 4):
        frozen = "lora_A" if played.number % 2 else "lora_B"
        held = [*played.trained, played.before["adapter"], played.after["adapter"]]
        assert len({digest(only(adapter, frozen)) for adapter in held}) == 1
        sent = {name for update in played.updates for name in update.state["delta"]}
        assert sent == {name for name in played.before["adapter"] if frozen not in name}


def test_a_phase_of_a_where_b_is_zero_has_no_gradient() -> None:
    """Why B comes first (rolora.3): dL/dA = s B^T G."""
    A = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    B = torch.zeros(4, 2, dtype=torch.float64, requires_grad=True)
    (torch.sin(B @ A + 1.0)).sum().backward()
    assert A.grad is not None
    assert B.grad is not None
    assert not A.grad.any()
    assert B.grad.any()


@given(cohort=cohorts())
def test_fedsa_lora_sends_a_and_keeps_b(cohort: Cohort) -> None:
    """fedsa.1, fedsa.4, catalogue 17: no B in any payload; of (m + n) r numbers n r are sent."""
    strategy = strategy_of("fedsa_lora")
    kept: list[State] = [{} for _ in cohort.weights]
    server = strategy.start(cohort.adapter("start"))
    share = sum(n for _, n in cohort.shapes.values()) / sum(
        m + n for m, n in cohort.shapes.values()
    )
    for number in (1, 2):
        updates = []
        for client, weight in enumerate(cohort.weights):
            turn = turn_of(strategy, server, cohort, client, number, number - 1, kept[client])
            plan = strategy.plan(turn)
            if kept[client]:  # what it kept is what it begins from, whatever was broadcast
                own = only(plan.start["adapter"], "lora_B")
                assert digest(own) == digest({"x": kept[client]["adapter"]})
            end = {n: t + 0.1 for n, t in plan.start["adapter"].items()}
            sent, kept[client] = strategy.reply(turn, plan, {"adapter": end})
            private = {digest({"x": {"": t}}) for t in kept[client]["adapter"].values()}
            assert not private & {digest({"x": {"": t}}) for t in sent["delta"].values()}
            assert nbytes(sent) == pytest.approx(share * nbytes({"adapter": end}))
            updates.append(Update(f"c{client}", weight, sent))
        server = strategy.aggregate(server, updates, Mean(), number)


@pytest.mark.parametrize("name", ["fedsa_lora", "local_only"])
@given(cohort=cohorts(least=2))
def test_two_clients_with_one_shard_are_one_client(name: str, cohort: Cohort) -> None:
    """fedsa.2, fedsa.3: K equal clients and one alone end with the same factors, own and common."""
    strategy = strategy_of(name)
    ends = []
    for count in (1, len(cohort.weights)):
        server, kept = strategy.start(cohort.adapter("start")), [State() for _ in range(count)]
        for number in (1, 2):
            updates = []
            for client in range(count):
                info = ClientInfo(f"c{client}", 9, number - 1)
                turn = Turn(number, strategy.broadcast(server, info, number), kept[client])
                plan = strategy.plan(turn)
                steps = cohort.adapter(number)
                end = {n: t + 0.1 * steps[n] for n, t in plan.start["adapter"].items()}
                sent, kept[client] = strategy.reply(turn, plan, {"adapter": end})
                updates.append(Update(f"c{client}", cohort.weights[client], sent))
            server = strategy.aggregate(server, updates, Mean(), number)
        ends += [{**server["adapter"], **own["adapter"]} for own in kept]
    for other in ends[1:]:
        away = subtract(ends[0], other)
        assert max(float(tensor.norm()) for tensor in away.values()) < EXACT


@given(cohort=cohorts())
def test_scaffolds_first_round_is_fedits_and_its_control_the_mean(cohort: Cohort) -> None:
    """scaf.1 bit for bit; scaf.2: with everybody in every round, c is the mean of the c_i."""
    strategy = Scaffold()
    (fedit,) = rounds(strategy_of("fedit"), cohort, 1)
    server = strategy.start(cohort.adapter("start"))
    kept: list[State] = [{} for _ in cohort.weights]
    for number in (1, 2, 3):
        updates = []
        for client, weight in enumerate(cohort.weights):
            turn = turn_of(strategy, server, cohort, client, number, number - 1, kept[client])
            plan = strategy.plan(turn)
            steps = cohort.adapter(number, client)
            end = {n: t + 0.3 * steps[n] for n, t in plan.start["adapter"].items()}
            sent, kept[client] = strategy.reply(turn, plan, {"adapter": end})
            updates.append(Update(f"c{client}", weight, sent))
        server = strategy.aggregate(server, updates, Mean(), number)
        if number == 1:
            assert digest({"x": server["adapter"]}) == digest({"x": fedit.after["adapter"]})
        mean = weighted_mean([own["control"] for own in kept], [1.0] * len(kept))
        for tensor in subtract(server["control"], mean).values():
            assert float(tensor.norm()) < EXACT


@given(cohort=cohorts(least=2))
def test_lora_fair_lies_between_fedit_and_the_best_b(cohort: Cohort) -> None:
    """Catalogue 10: lambda to infinity is FedIT; at 0 the error is Delta* off the rows of A-bar.

    In between err(FlexLoRA) <= err <= err(FedIT), and less regularizer never errs more.
    """
    (fedit,) = rounds(strategy_of("fedit"), cohort, 1)
    (flex,) = rounds(strategy_of("flexlora"), cohort, 1)
    target = ideal(fedit, cohort)
    errors = []
    for regularizer in ("1e12", "10.0", "0.01", "0.0"):
        (fair,) = rounds(strategy_of(f"lora_fair(regularizer={regularizer})"), cohort, 1)
        errors.append(error(effective(fair.after), target))
        if regularizer == "1e12":
            assert error(effective(fair.after), effective(fedit.after)) < 1e-9
        if regularizer == "0.0":
            mean = weighted_mean(fair.trained, cohort.weights)
            for module, own in products(mean):
                outside = target[module] - target[module] @ torch.linalg.pinv(own.A) @ own.A
                away = (effective(fair.after)[module] - target[module]).norm()
                torch.testing.assert_close(away, outside.norm(), rtol=1e-8, atol=1e-9)
    best, worst = error(effective(flex.after), target), error(effective(fedit.after), target)
    ordered = [worst, *errors, best]
    assert all(after <= before + 1e-9 for before, after in itertools.pairwise(ordered))


@given(cohort=cohorts(least=2), regularizer=st.floats(0.001, 10.0))
def test_lora_fairs_correction_is_where_the_gradient_vanishes(
    cohort: Cohort, regularizer: float
) -> None:
    """By automatic differentiation of |D - (B + dB) A|^2 + lambda |dB|^2, in dB."""
    (fair,) = rounds(strategy_of(f"lora_fair(regularizer={regularizer})"), cohort, 1)
    mean = dict(products(weighted_mean(fair.trained, cohort.weights)))
    target = ideal(fair, cohort)
    for module, own in products(fair.after["adapter"]):
        change = (own.B - mean[module].B).requires_grad_()
        away = target[module] - (mean[module].B + change) @ mean[module].A
        (away.square().sum() + regularizer * change.square().sum()).backward()
        assert change.grad is not None
        scale = 1 + float(target[module].norm()) * float(own.A.norm())
        assert float(change.grad.norm()) < 1e-9 * scale


def replies(text: str, cohort: Cohort, round: int, ends: list[Adapter]) -> list[Adapter]:
    """What clients that ended with `ends` would have the coordinator believe they ended with."""
    strategy, start = strategy_of(text), cohort.adapter("start")
    plan = Plan({"adapter": start}, frozenset(start))
    sent = [strategy.reply(Turn(round, {}, {}), plan, {"adapter": end})[0] for end in ends]
    return [{n: start[n] + state["delta"][n] for n in start} for state in sent]


@given(cohort=cohorts(), strength=st.floats(0.0, 1.0), round=st.integers(1, 2))
def test_fedrot_changes_no_product(cohort: Cohort, strength: float, round: int) -> None:
    """Catalogue 13: R is orthogonal and one client's product stays; with strength 0 it is FedIT."""
    ends = [cohort.adapter(client) for client in range(len(cohort.weights))]
    for end, seen in zip(
        ends, replies(f"fedrot(strength={strength})", cohort, round, ends), strict=True
    ):
        assert error(dense(seen), dense(end)) < EXACT
        for (_, own), (_, other) in zip(products(end), products(seen), strict=True):
            for one, two in ((own.A, other.A), (own.B, other.B)):
                torch.testing.assert_close(one.norm(), two.norm(), rtol=1e-10, atol=1e-10)
    (none,), (fedit,) = (
        rounds(strategy_of(t), cohort, 1) for t in ("fedrot(strength=0.0)", "fedit")
    )
    assert digest(none.after) == digest(fedit.after)


@given(cohort=cohorts(), round=st.integers(1, 2))
def test_fedrot_finds_a_planted_rotation(cohort: Cohort, round: int) -> None:
    """Catalogue 13: at strength 1 a rotated copy of the broadcast adapter is turned back exactly.

    The factor that is aligned must have full rank, else its rotation is not determined.
    """
    assume(all(cohort.rank <= min(shape) for shape in cohort.shapes.values()))
    start = cohort.adapter("start")
    copies = [turned(start, rotation(cohort.rank, cohort.seed, i)) for i in range(3)]
    for seen in replies("fedrot(strength=1.0)", cohort, round, copies):
        away = subtract(seen, start)
        assert max(float(tensor.norm()) for tensor in away.values()) < 1e-8


def residue(seen: list[Adapter], weights: Sequence[float]) -> float:
    """The norm of what averaging these factors leaves out."""
    left = residual(seen, weights)
    return sum(float(own.dense().square().sum()) for own in left.values()) ** 0.5


@given(cohort=cohorts(least=2), strength=st.floats(0.0, 1.0), round=st.integers(1, 2))
def test_fedrot_errs_no_more_than_fedit_on_clients_turned_a_little(
    cohort: Cohort, strength: float, round: int
) -> None:
    """Copies of one adapter turned by less than half a radian: means of their factors shrink."""
    assume(all(cohort.rank <= min(shape) for shape in cohort.shapes.values()))
    start, copies = cohort.adapter("start"), []
    for client in range(len(cohort.weights)):
        draws = generator(cohort.seed, client)
        drawn = torch.randn(cohort.rank, cohort.rank, generator=draws, dtype=torch.float64)
        skew = drawn - drawn.T
        turn = torch.linalg.matrix_exp(0.5 * skew / (1e-9 + skew.norm()))
        copies.append(turned(start, turn))
    fedit, soft, whole = (
        residue(replies(f"fedrot(strength={strong})", cohort, round, copies), cohort.weights)
        for strong in (0.0, strength, 1.0)
    )
    assert soft <= fedit + 1e-8
    assert whole < 1e-7


def test_half_a_way_back_may_be_worse_than_none() -> None:
    """Two clients turned by 170 and -170 degrees are 20 apart, so FedIT errs little.

    Both are brought nearer to 0 by strength 0.25, on opposite sides of it: atan2(sin 170 / 4,
    3 / 4 + cos 170 / 4) = 4.9 of the 170 degrees, so that they are 30 apart.
    """
    cohort = Cohort({"q": (2, 3)}, 2, (1.0, 1.0), (0, 0), 0)
    start = cohort.adapter("start")
    product = dense(start)["q"].norm()
    angles = [math.radians(170.0), math.radians(-170.0)]
    copies = [
        turned(
            start, torch.tensor([[math.cos(t), -math.sin(t)], [math.sin(t), math.cos(t)]]).double()
        )
        for t in angles
    ]
    back = math.atan2(math.sin(angles[0]) / 4, 0.75 + math.cos(angles[0]) / 4)
    for strength, left in ((0.0, angles[0]), (0.25, angles[0] - back), (1.0, 0.0)):
        seen = replies(f"fedrot(strength={strength})", cohort, 1, copies)
        expected = math.sin(left) ** 2 * float(product)  # I - R-bar R-bar^T = sin^2
        assert residue(seen, cohort.weights) == pytest.approx(expected, rel=1e-5, abs=1e-9)


def test_fedrot_aligns_a_in_odd_rounds_and_b_in_even_ones() -> None:
    """By hand at rank 2: a quarter turn of A is undone, or half of it, from 90 to 45 degrees."""
    cohort = Cohort({"q": (2, 3)}, 2, (1.0,), (0,), 0)
    start = cohort.adapter("start")
    quarter = torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=torch.float64)
    end = {n: quarter.T @ t if "lora_A" in n else 7.0 * t for n, t in start.items()}
    (whole,) = replies("fedrot(strength=1.0)", cohort, 1, [end])
    torch.testing.assert_close(whole["q.lora_A.weight"], start["q.lora_A.weight"])
    (half,) = replies("fedrot(strength=0.5)", cohort, 1, [end])
    eighth = torch.tensor([[1.0, -1.0], [1.0, 1.0]], dtype=torch.float64) / 2**0.5
    torch.testing.assert_close(half["q.lora_A.weight"], eighth.T @ start["q.lora_A.weight"])
    (even,) = replies("fedrot(strength=1.0)", cohort, 2, [end])  # B needs no turn
    torch.testing.assert_close(even["q.lora_A.weight"], end["q.lora_A.weight"])
