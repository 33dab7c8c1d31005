"""Clients of different ranks: what is cut off, what is padded, and who may still grow."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from rounds import EXACT, Cohort, cohorts, dense, effective, error, ideal, rounds, strategy_of

from fedtune.adapter import at_rank, digest, rank_of, subtract, weighted_mean
from fedtune.combine import Mean
from fedtune.lowrank import product_norm, products, svd
from fedtune.strategies.hetlora import HetLoRA, tail_norm
from fedtune.strategies.hetlora_sum import HetLoRASum
from fedtune.strategies.strategy import ClientInfo, Plan, Turn, Update


@given(cohort=cohorts(mixed=True))
def test_flexlora_drops_the_tail_and_nothing_else(cohort: Cohort) -> None:
    """flex.1, flex.2, flex.5: Eckart-Young against dense singular values; exact below the rank."""
    for played in rounds(strategy_of("flexlora"), cohort):
        for module, matrix in ideal(played, cohort).items():
            singular = torch.linalg.svdvals(matrix)
            away = (matrix - effective(played.after)[module]).norm()
            torch.testing.assert_close(away, singular[cohort.rank :].norm(), rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    "text",
    ["fedit", "lora_fair", "lora_fair(regularizer=0.0)", "fedrot", "fedmomentum", "hetlora"],
)
@given(cohort=cohorts())
def test_no_factors_of_the_same_rank_are_nearer_than_flexloras(text: str, cohort: Cohort) -> None:
    """Catalogue 6: Eckart-Young against every rule that leaves rank-r factors."""
    (played,) = rounds(strategy_of(text), cohort, 1)
    (flex,) = rounds(strategy_of("flexlora"), cohort, 1)
    target = ideal(played, cohort)
    best = error(effective(flex.after), target)
    assert best <= error(dense(played.after["adapter"]), target) + EXACT


@given(cohort=cohorts(), balanced=st.booleans())
def test_flexloras_smaller_ranks_are_leading_blocks(cohort: Cohort, balanced: bool) -> None:
    """flex.4: what a client of fewer ranks gets is the best approximation of that rank."""
    strategy = strategy_of(f"flexlora(balanced={balanced})")
    (played,) = rounds(strategy, cohort, 1)
    for rank in range(1, cohort.rank + 1):
        info = ClientInfo("x", 9, 1, rank)
        sent = strategy.broadcast(played.after, info, 2)["adapter"]
        for module, own in products(sent):
            matrix = ideal(played, cohort)[module]
            away = (matrix - own.dense()).norm()
            singular = torch.linalg.svdvals(matrix)
            torch.testing.assert_close(away, singular[rank:].norm(), rtol=0, atol=1e-10)


@given(cohort=cohorts(), more=st.integers(0, 4))
def test_padding_changes_no_product_and_cropping_takes_it_back(cohort: Cohort, more: int) -> None:
    """het.1, catalogue 12: crop(pad(x)) = x bit for bit."""
    adapter = cohort.adapter("x")
    padded = at_rank(adapter, cohort.rank + more)
    assert digest({"x": at_rank(padded, cohort.rank)}) == digest({"x": adapter})
    assert error(dense(padded), dense(adapter)) < 1e-14


@given(cohort=cohorts())
def test_the_norm_of_a_product_needs_no_product(cohort: Cohort) -> None:
    """het.3: |B A|_F = sqrt(tr((B^T B)(A A^T))), over all modules together."""
    adapter = cohort.adapter("x")
    whole = math.sqrt(sum(float(m.square().sum()) for m in dense(adapter).values()))
    assert product_norm(adapter) == pytest.approx(whole, rel=1e-10)


@given(cohort=cohorts(mixed=True))
def test_hetlora_is_the_mean_of_padded_factors_by_norm(cohort: Cohort) -> None:
    """Against dense norms; ranks that no client has stay as they were."""
    for played in rounds(strategy_of("hetlora"), cohort):
        norms = [
            math.sqrt(sum(float(m.square().sum()) for m in dense(end).values()))
            for end in played.trained
        ]
        weights = [p * v for p, v in zip(cohort.weights, norms, strict=True)]
        most = max(cohort.ranks)
        mean = weighted_mean([at_rank(end, most) for end in played.trained], weights)
        got = at_rank(played.after["adapter"], most)
        assert max(float(t.norm()) for t in subtract(got, mean).values()) < EXACT
        for name, tensor in played.after["adapter"].items():
            axis = 0 if "lora_A" in name else 1
            ends = [
                x.narrow(axis, most, cohort.rank - most)
                for x in (tensor, played.before["adapter"][name])
            ]
            assert torch.equal(*ends)


@given(cohort=cohorts(least=2))
def test_hetlora_of_equal_norms_and_ranks_is_fedit(cohort: Cohort) -> None:
    """het.2: with clients scaled to the same norm, the weights are the recipe's."""
    strategy, fedit = strategy_of("hetlora"), strategy_of("fedit")
    (played,) = rounds(strategy, cohort, 1)
    start = played.before["adapter"]
    ends = [{n: t / product_norm(end) ** 0.5 for n, t in end.items()} for end in played.trained]
    plan = Plan({"adapter": start}, frozenset(start), tail=cohort.rank)
    afters = []
    for rule in (strategy, fedit):
        updates = [
            Update(f"c{i}", w, rule.reply(Turn(1, {}, {}), plan, {"adapter": end})[0])
            for i, (w, end) in enumerate(zip(cohort.weights, ends, strict=True))
        ]
        afters.append(rule.aggregate(played.before, updates, Mean(), 1)["adapter"])
    assert max(float(t.norm()) for t in subtract(*afters).values()) < EXACT


@given(cohort=cohorts(mixed=True), keep=st.floats(0.1, 1.0))
def test_as_a_sum_hetlora_is_the_same(cohort: Cohort, keep: float) -> None:
    """One sum of v_i pad(A_i), v_i pad(B_i) and one of v_i, where somebody has the largest rank."""
    cohort = replace(cohort, ranks=(cohort.rank, *cohort.ranks[1:]))
    (one,) = rounds(HetLoRA(keep=keep), cohort, 1)
    (other,) = rounds(HetLoRASum(keep=keep), cohort, 1)
    away = subtract(one.after["adapter"], other.after["adapter"])
    assert max(float(tensor.norm()) for tensor in away.values()) < EXACT


@pytest.mark.parametrize("summed", [False, True])
@given(cohort=cohorts(mixed=True), keep=st.floats(0.1, 0.99))
def test_a_hetlora_client_prunes_when_its_tail_shrank(
    summed: bool, cohort: Cohort, keep: float
) -> None:
    """het.4: to floor(g r), never below 1, never up; its next broadcast or plan has that rank."""
    strategy = HetLoRASum(keep=keep) if summed else HetLoRA(keep=keep)
    ranks = list(cohort.ranks)
    for played in rounds(strategy, cohort, 4):
        for client, (plan, end) in enumerate(zip(played.plans, played.trained, strict=True)):
            rank = rank_of(plan.start["adapter"])
            assert rank == ranks[client]
            tail = max(1, math.floor(keep * rank))
            assert plan.tail == tail
            assert (plan.penalty > 0) == (tail < rank)
            if tail_norm(end, tail) < tail_norm(plan.start["adapter"], tail):
                ranks[client] = tail


def test_a_penalised_tail_shrinks_by_hand() -> None:
    """lambda |B[:, 1:]| |A[1:, :]| with |B[:, 1]| = 5 and |A[1]| = 13 is 65 lambda."""
    adapter = {
        "q.lora_A.weight": torch.tensor([[1.0, 1.0], [5.0, 12.0]]),
        "q.lora_B.weight": torch.tensor([[1.0, 3.0], [1.0, 4.0]]),
    }
    assert tail_norm(adapter, 1) == pytest.approx(65.0)
    assert tail_norm(adapter, 2) == 0.0
    plan = HetLoRA(keep=0.5, penalty=0.25).plan(Turn(1, {"adapter": adapter}, {}))
    assert (plan.tail, plan.penalty) == (1, 0.25)
    smaller = {n: 0.9 * t for n, t in adapter.items()}
    sent, kept = HetLoRA(keep=0.5).reply(Turn(1, {}, {}), plan, {"adapter": smaller})
    assert kept == {}
    assert sent["rank"]["rank"].tolist() == [1.0]
    assert not sent["adapter"]["q.lora_A.weight"][1].any()
    assert torch.equal(sent["adapter"]["q.lora_A.weight"][0], smaller["q.lora_A.weight"][0])


@pytest.mark.parametrize("told", [-3.0, 0.0, 1e9])
def test_a_false_rank_gives_a_client_no_more_than_it_had(told: float) -> None:
    cohort = Cohort({"q": (3, 4)}, 3, (1.0,), (2,), 0)
    strategy = HetLoRA()
    (played,) = rounds(strategy, cohort, 1)
    (update,) = played.updates
    forged = replace(update, state={**update.state, "rank": {"rank": torch.tensor([told])}})
    after = strategy.aggregate(played.before, [forged], Mean(), 1)
    assert strategy.client_rank(after, cohort.info(0)) == (2 if told > 0 else 1)


@given(cohort=cohorts())
def test_the_core_decomposition_is_the_dense_one(cohort: Cohort) -> None:
    """flex.5, catalogue 6: singular values of B A by its factors and by the matrix."""
    assume(len(cohort.weights) > 1)
    for _, own in products(cohort.adapter("x")):
        u, s, vt = svd(own)
        torch.testing.assert_close((u * s) @ vt, own.dense(), rtol=0, atol=1e-10)
        whole = torch.linalg.svdvals(own.dense())
        torch.testing.assert_close(s, whole[: len(s)], rtol=0, atol=1e-10)
