"""What claims to be the mean of the clients' products is it: to 1e-10 against dense matrices."""

from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given, settings
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
    whole,
)

from fedtune.adapter import digest, rank_of, subtract, weighted_mean
from fedtune.combine import Mean
from fedtune.lowrank import Product, products, residual, stack, svd
from fedtune.strategies import STRATEGIES
from fedtune.strategies.strategy import Update

ALWAYS = [
    "ffa_lora",
    "rolora",
    "fedsvd",
    "flora",
    "flora_sum",
    "fedex_lora",
    "fedmomentum(energy=1.0)",
    "oracle",
]
MIXED = ["flora", "fedmomentum(energy=1.0)", "oracle"]
# Where every strategy is played: each example is several rounds of several clients.
few = settings(max_examples=15)
BASES = {"flora", "flora_sum", "fedex_lora", "fedmomentum", "frlora", "oracle"}


@pytest.mark.parametrize("text", ALWAYS)
@given(cohort=cohorts())
def test_exact_strategies_err_by_rounding_only(text: str, cohort: Cohort) -> None:
    """ffa.1, rolora.1, fedsvd.1, flora.1, fedex.1, FedMomentum at tau = 1, the oracle itself."""
    for played in rounds(strategy_of(text), cohort, 3):
        assert error(effective(played.after), ideal(played, cohort)) < EXACT


@pytest.mark.parametrize("text", ALWAYS)
@few
@given(cohort=cohorts())
def test_in_float32_they_err_by_its_rounding(text: str, cohort: Cohort) -> None:
    """Sums and decompositions are float64; what is kept and sent is as precise as the adapter."""
    for played in rounds(strategy_of(text), replace(cohort, dtype=torch.float32), 2):
        tensors = [t for group in played.after.values() for t in group.values()]
        assert {t.dtype for t in tensors} <= {torch.float32, torch.float64}
        assert error(effective(played.after), ideal(played, cohort)) < 1e-5


@pytest.mark.parametrize("text", MIXED)
@given(cohort=cohorts(mixed=True))
def test_they_are_exact_for_clients_of_mixed_ranks(text: str, cohort: Cohort) -> None:
    for played in rounds(strategy_of(text), cohort, 3):
        assert error(effective(played.after), ideal(played, cohort)) < EXACT


@given(cohort=cohorts(mixed=True))
def test_the_oracles_clients_all_begin_from_the_same_model(cohort: Cohort) -> None:
    """Whatever their rank: the ranks that a client does not train are in the base it is sent."""
    for played in rounds(strategy_of("oracle"), cohort):
        for plan in played.plans:
            start = effective({"adapter": plan.start["adapter"], "base": plan.base})
            assert error(start, effective(played.before)) < EXACT


@given(cohort=cohorts(least=2))
def test_fedex_is_the_oracle(cohort: Cohort) -> None:
    """Factors bit for bit, bases to rounding, round after round."""
    ours, theirs = (rounds(strategy_of(name), cohort, 3) for name in ("fedex_lora", "oracle"))
    for one, other in zip(ours, theirs, strict=True):
        assert digest({"x": one.after["adapter"]}) == digest({"x": other.after["adapter"]})
        assert error(effective(one.after), effective(other.after)) < EXACT


@pytest.mark.parametrize("name", sorted(STRATEGIES))
@few
@given(cohort=cohorts())
def test_a_contribution_is_what_the_client_trained(name: str, cohort: Cohort) -> None:
    """What metrics compare with: the client's adapter, as the coordinator reads an update."""
    strategy = strategy_of(name)
    for played in rounds(strategy, cohort):
        for end, update in zip(played.trained, played.updates, strict=True):
            seen = strategy.contribution(played.before, update, played.number)
            assert (seen is None) == strategy.personal
            if seen is not None:
                assert error(dense(seen), dense(end)) < EXACT


@given(cohort=cohorts(least=2))
def test_the_residual_of_averaged_factors(cohort: Cohort) -> None:
    """Catalogue 4: three forms of one residual, dense; its rank is (K - 1) r at most (fedex.3)."""
    (played,) = rounds(strategy_of("fedit"), cohort, 1)
    mean, left = dict(products(played.after["adapter"])), residual(played.trained, cohort.weights)
    clients = [dict(products(end)) for end in played.trained]
    for module, own in left.items():
        away = ideal(played, cohort)[module] - mean[module].dense()
        centred = stack(
            [Product(c[module].B - mean[module].B, c[module].A - mean[module].A) for c in clients],
            cohort.shares,
        ).dense()
        pairs = sum(
            p * q * (first[module].B - second[module].B) @ (first[module].A - second[module].A)
            for i, (p, first) in enumerate(zip(cohort.shares, clients, strict=True))
            for q, second in list(zip(cohort.shares, clients, strict=True))[:i]
        )
        for form in (own.dense(), centred, pairs):
            torch.testing.assert_close(form, away, rtol=1e-10, atol=1e-10)
        assert len(own.A) == (len(clients) - 1) * cohort.rank


@pytest.mark.parametrize("alike", ["lora_A", "lora_B"])
@given(cohort=cohorts())
def test_no_residual_where_one_factor_is_the_same(alike: str, cohort: Cohort) -> None:
    """fedex.2, fedit.3: K = 1, equal A, or equal B."""
    ends = [cohort.adapter(client) for client in range(len(cohort.weights))]
    ends = [{n: ends[0][n] if alike in n else t for n, t in end.items()} for end in ends]
    assert all(float(own.dense().norm()) < EXACT for own in residual(ends, cohort.weights).values())
    assert residual(ends[:1], [1.0]) == {}
    if alike == "lora_A":
        assert residual(ends, cohort.weights) == {}


@given(cohort=cohorts(least=2), rank=st.integers(1, 6))
def test_a_truncated_residual_is_the_best_of_its_rank(cohort: Cohort, rank: int) -> None:
    """FedEx with r' errs by the residual's singular values beyond r'; with none it is FedIT."""
    (fedit,) = rounds(strategy_of("fedit"), cohort, 1)
    (whole,) = rounds(strategy_of("fedex_lora"), cohort, 1)
    (short,) = rounds(strategy_of(f"fedex_lora(rank={rank})"), cohort, 1)
    for some in (whole, short):  # fedex.4: without the base it is FedIT
        assert digest({"x": some.after["adapter"]}) == digest({"x": fedit.after["adapter"]})
    for module, matrix in ideal(short, cohort).items():
        residue = torch.linalg.svdvals(matrix - effective(fedit.after)[module])
        away = (matrix - effective(short.after)[module]).norm()
        torch.testing.assert_close(away, residue[rank:].norm(), rtol=1e-8, atol=1e-10)


@given(cohort=cohorts(least=2))
def test_any_factors_are_exact_with_their_own_residual(cohort: Cohort) -> None:
    """fedex.5: the mean, one client's own, or fresh ones, each beside Delta* - B A in the base."""
    (played,) = rounds(strategy_of("fedit"), cohort, 1)
    clients = [dict(products(end)) for end in played.trained]
    for chosen in (played.after["adapter"], played.trained[0], cohort.adapter("fresh")):
        for module, own in products(chosen):
            terms = [*(client[module] for client in clients), own]
            left = stack(terms, [*cohort.shares, -1.0])
            total = own.dense() + left.dense()
            torch.testing.assert_close(total, ideal(played, cohort)[module], rtol=0, atol=1e-10)


@given(cohort=cohorts())
def test_flora_stacks_with_the_weights_on_one_side(cohort: Cohort) -> None:
    """flora.1: without weights, or with weights on both sides, the sum is another one."""
    (played,) = rounds(strategy_of("flora"), cohort, 1)
    for module, own in products(played.after["base"]):
        terms = [dict(products(end))[module] for end in played.trained]
        target = ideal(played, cohort)[module]
        torch.testing.assert_close(own.dense(), target, rtol=0, atol=1e-10)
        if len(terms) > 1:
            twice = stack(terms, [p * p for p in cohort.shares]).dense()
            never = stack(terms, [1.0] * len(terms)).dense()
            for wrong in (twice, never):
                assert float((wrong - target).norm()) > 1e-6 * float(target.norm())


@given(cohort=cohorts())
def test_florist_keeps_everything_at_a_share_of_one(cohort: Cohort) -> None:
    """At tau = 1 it is FLoRA, bit for bit; just below, to what was cut off."""
    plain, kept = (
        list(rounds(strategy_of(text), cohort)) for text in ("flora", "flora(energy=1.0)")
    )
    assert [digest(p.after) for p in plain] == [digest(p.after) for p in kept]
    (first,) = rounds(strategy_of("flora(energy=0.9)"), cohort, 1)
    for module, own in products(first.after["base"]):
        target = ideal(first, cohort)[module]
        away = float((own.dense() - target).square().sum())
        assert away <= (0.1 + 1e-9) * float(target.square().sum())
        assert len(own.A) <= rank_of(plain[0].after["base"])


@given(cohort=cohorts(), energy=st.floats(0.0, 1.0))
def test_fedmomentum_drops_no_more_than_it_may(cohort: Cohort, energy: float) -> None:
    """At tau = 0 it is FlexLoRA, balanced; in between its error is below 1 - tau of the energy."""
    (played,) = rounds(strategy_of(f"fedmomentum(energy={energy})"), cohort, 1)
    (flex,) = rounds(strategy_of("flexlora(balanced=True)"), cohort, 1)
    (none,) = rounds(strategy_of("fedmomentum(energy=0.0)"), cohort, 1)
    assert digest(none.after) == digest(flex.after)
    assert digest({"x": played.after["adapter"]}) == digest({"x": flex.after["adapter"]})
    for module, matrix in ideal(played, cohort).items():
        away = float((matrix - effective(played.after)[module]).square().sum())
        assert away <= (1 - energy + 1e-9) * float(matrix.square().sum())


@given(cohort=cohorts())
def test_frlora_adds_the_change_of_fedits_product_to_the_base(cohort: Cohort) -> None:
    """The start leaves the weights alone; then base += B-bar A-bar - B_0 A_0, of rank 2 r."""
    strategy = strategy_of("frlora")
    start = strategy.start(cohort.adapter("start"))
    assert all(float(matrix.norm()) == 0 for matrix in effective(start).values())
    base = dense(start["base"])
    for played in rounds(strategy, cohort, 3):
        mean = weighted_mean(played.trained, cohort.weights)
        first = dense(start["adapter"])
        base = {m: base[m] + own - first[m] for m, own in dense(mean).items()}
        assert error(dense(played.after["base"]), base) < EXACT
        assert digest({"x": played.after["adapter"]}) == digest({"x": start["adapter"]})
        for module, own in products(played.after["base"]):
            most = min(cohort.shapes[module])
            assert len(own.A) <= max(cohort.rank, min(most, cohort.rank * (1 + 2 * played.number)))


@pytest.mark.parametrize("name", sorted(BASES))
@few
@given(cohort=cohorts(least=2))
def test_a_base_has_no_more_ranks_than_its_matrix(name: str, cohort: Cohort) -> None:
    """Catalogue 16: brought down without loss, so that a long absence costs min(m, n) ranks."""
    *_, last = rounds(strategy_of(name), cohort, 4)
    for module, own in products(last.after.get("base", {})):
        assert len(own.A) <= max(cohort.rank, min(cohort.shapes[module]))


@pytest.mark.parametrize("name", [n for n, s in sorted(STRATEGIES.items()) if not s.personal])
@few
@given(cohort=cohorts())
def test_whoever_missed_rounds_has_the_model_of_whoever_did_not(name: str, cohort: Cohort) -> None:
    """Catalogue 16: absent for one, two or three rounds, with what it kept then: the same model."""
    strategy = strategy_of(name)
    played = list(rounds(strategy, cohort, 3))
    server, models = played[-1].after, []
    for last in (3, 2, 1, 0):
        kept = played[last - 1].kept[0] if last else {}
        plan = strategy.plan(turn_of(strategy, server, cohort, 0, 4, last, kept))
        models.append(effective({**plan.start, "adapter": whole(plan.start), "base": plan.base}))
    for model in models:
        assert error(model, models[0]) < EXACT
    assert error(models[0], effective(server)) < EXACT


@pytest.mark.parametrize("name", [n for n, s in sorted(STRATEGIES.items()) if s.sums_only])
@few
@given(cohort=cohorts(least=2))
def test_where_sums_suffice_one_update_may_hold_them(name: str, cohort: Cohort) -> None:
    """Catalogue 17: the mean of what clients send, as one update, gives what all of them give."""
    equal = Cohort(cohort.shapes, cohort.rank, (1.0,) * len(cohort.weights), cohort.ranks, 7)
    strategy = strategy_of(name)
    for played in rounds(strategy, equal):
        states = [update.state for update in played.updates]
        mean = {g: weighted_mean([s[g] for s in states], equal.weights) for g in states[0]}
        count = float(len(states))
        after = strategy.aggregate(
            played.before, [Update("all", count, mean)], Mean(), played.number
        )
        assert after.keys() == played.after.keys()
        assert error(effective(after), effective(played.after)) < EXACT
        for group in after.keys() - {"base"}:
            for tensor in subtract(after[group], played.after[group]).values():
                assert float(tensor.norm()) < 1e-8


SPACES = {
    "product": [
        "flora",
        "flora_sum",
        "flexlora",
        "flexlora_sum",
        "fedex_lora",
        "fedmomentum",
        "oracle",
    ],
    "factors": ["fedit", "lora_fair", "frlora", "hetlora"],
}


@pytest.mark.parametrize("space", SPACES)
@given(cohort=cohorts(least=2))
def test_who_sees_in_which_coordinates_a_client_writes(space: str, cohort: Cohort) -> None:
    """Catalogue 14, fedit.4, flex.3: who turned its factors is the same client for some rules."""
    assume(cohort.rank > 1)
    for text in SPACES[space]:
        strategy = strategy_of(text)
        (played,) = rounds(strategy, cohort, 1)
        updates = []
        for client, (plan, end) in enumerate(zip(played.plans, played.trained, strict=True)):
            turn = turn_of(strategy, played.before, cohort, client, 1, 0, {})
            other = turned(end, rotation(cohort.rank, cohort.seed, client))
            sent, _ = strategy.reply(turn, plan, {"adapter": other})
            updates.append(Update(f"c{client}", cohort.weights[client], sent))
        after = strategy.aggregate(played.before, updates, Mean(), 1)
        away = error(effective(after), effective(played.after))
        assert away < EXACT if space == "product" else away > 1e-9


@given(cohort=cohorts())
def test_fedsvd_turns_the_mean_and_nothing_else(cohort: Cohort) -> None:
    """fedsvd.1-3: the product stays; where it turns, A A^T = I, in the row space of the first A."""
    strategy = strategy_of("fedsvd")
    first = dict(products(cohort.adapter("start")))
    for played in rounds(strategy, cohort, 3):
        assert error(effective(played.after), ideal(played, cohort)) < EXACT
        for module, own in products(played.after["adapter"]):
            if torch.equal(own.A, dict(products(played.before["adapter"]))[module].A):
                continue  # of less than full rank: left alone
            unit = torch.eye(cohort.rank, dtype=torch.float64)
            torch.testing.assert_close(own.A @ own.A.T, unit, rtol=0, atol=1e-10)
            _, s, rows = svd(Product(first[module].A.T, first[module].A))
            basis = rows[s > 1e-12 * s[0]]
            torch.testing.assert_close(own.A @ basis.T @ basis, own.A, rtol=0, atol=1e-7)
