"""Cores between factors: their algebra, and the strategies that fix the factors around them."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedtune import exporting, models, training
from fedtune.adapter import Adapter, State, digest
from fedtune.combine import Mean
from fedtune.config import AdapterSettings, ModelSettings
from fedtune.cores import between, folded, gradients, matrix, merged
from fedtune.errors import RecipeError
from fedtune.lowrank import products, stack
from fedtune.seeds import generator
from fedtune.strategies import STRATEGIES, Strategy
from fedtune.strategies.fed_sb import FedSB
from fedtune.strategies.ravan import Ravan
from fedtune.strategies.strategy import ClientInfo, Plan, Turn, Update
from fedtune.tasks import CausalLM

BOTH: list[Strategy] = [FedSB(), FedSB(warmup=1), Ravan(), Ravan(heads=2, rank=3)]
both = pytest.mark.parametrize("strategy", BOTH, ids=repr)
shapes = st.lists(st.tuples(st.integers(3, 9), st.integers(3, 9)), min_size=1, max_size=3)
kinds = st.sampled_from(["blocks", "scales", "both"])


def adapter_of(seed: int, sizes: list[tuple[int, int]], rank: int) -> Adapter:
    """Modules of these (d_out, d_in), in float64."""
    draws, adapter = generator(seed), {}
    for number, (d_out, d_in) in enumerate(sizes):
        for key, shape in (("A", (rank, d_in)), ("B", (d_out, rank))):
            drawn = torch.randn(shape, generator=draws, dtype=torch.float64)
            adapter[f"m{number}.lora_{key}.weight"] = drawn
    return adapter


def trained_by(plan: Plan, seed: int) -> State:
    return {
        group: {
            n: t + torch.randn(t.shape, generator=generator(seed, n), dtype=t.dtype)
            if n in plan.trainable
            else t
            for n, t in tensors.items()
        }
        for group, tensors in plan.start.items()
    }


def effective(plan: Plan, state: State) -> Adapter:
    adapter = state["adapter"]
    return folded(adapter, state["core"]) if "core" in plan.start else adapter


def turn_of(strategy: Strategy, server: State, info: ClientInfo, round: int, kept: State) -> Turn:
    return Turn(round, strategy.broadcast(server, info, round), kept)


@given(st.integers(1, 4), st.integers(1, 3), kinds, st.integers(0, 99))
def test_a_core_is_the_sum_of_its_heads(heads: int, size: int, kind: str, seed: int) -> None:
    """B C A = sum_h s_h B_h H_h A_h, and its gradients are autograd's, row by row."""
    draws = generator(seed)
    blocks = torch.randn(heads, size, size, generator=draws, dtype=torch.float64)
    scales = torch.randn(heads, generator=draws, dtype=torch.float64)
    own = None if kind == "scales" else blocks.requires_grad_()
    factors = None if kind == "blocks" else scales.requires_grad_()
    rank = heads * size
    adapter = adapter_of(seed, [(4, 6)], rank)
    named = {"m0.core.blocks": own, "m0.core.scales": factors}
    core = {name: t.detach() for name, t in named.items() if t is not None}
    b, a = adapter["m0.lora_B.weight"], adapter["m0.lora_A.weight"]
    expected = torch.zeros(4, 6, dtype=torch.float64)
    for h in range(heads):
        part = slice(h * size, (h + 1) * size)
        inner = torch.eye(size, dtype=torch.float64) if own is None else blocks[h]
        s = 1.0 if factors is None else scales[h]
        expected = expected + s * b[:, part] @ inner @ a[part]
    (_, product), *_ = products(folded(adapter, core))
    torch.testing.assert_close(product.dense(), expected.detach(), rtol=1e-10, atol=1e-10)

    weights = torch.randn(3, rank, rank, generator=draws, dtype=torch.float64)
    leaves = [t for t in (own, factors) if t is not None]
    c = between(own, factors, rank)
    by_hand = [
        part
        for part in gradients(weights, *(None if t is None else t.detach() for t in (own, factors)))
        if part is not None
    ]
    for row in range(3):
        for mine, theirs in zip(
            by_hand,
            torch.autograd.grad((weights[row] * c).sum(), leaves, retain_graph=True),
            strict=True,
        ):
            torch.testing.assert_close(mine[row], theirs, rtol=1e-10, atol=1e-10)


def test_merged_blocks_are_the_same_core_without_scales() -> None:
    draws = generator(3)
    core = {
        "m.core.blocks": torch.randn(2, 3, 3, generator=draws, dtype=torch.float64),
        "m.core.scales": torch.randn(2, generator=draws, dtype=torch.float64),
    }
    assert list(merged(core)) == ["m.core.blocks"]
    torch.testing.assert_close(matrix(merged(core), "m", 6), matrix(core, "m", 6))
    assert matrix(core, "m", 6).count_nonzero() == 18


@both
@given(sizes=shapes, rank=st.integers(1, 3), weights=st.lists(st.floats(0.1, 9), min_size=1))
def test_the_mean_of_the_products_is_exact(
    strategy: Strategy, sizes: list[tuple[int, int]], rank: int, weights: list[float]
) -> None:
    """sum_i p_i B C_i A = B C-bar A in every round, and what is contributed is what was trained."""
    weights = weights[:4]
    server = strategy.start(adapter_of(1, sizes, rank))
    kept: dict[str, State] = {}
    for round in range(1, 5):
        updates, ideal = [], {}
        for number, weight in enumerate(weights):
            name = f"c{number}"
            info = ClientInfo(name, 9, round - 1)
            turn = turn_of(strategy, server, info, round, kept.get(name, {}))
            plan = strategy.plan(turn)
            trained = trained_by(plan, 10 * round + number)
            sent, kept[name] = strategy.reply(turn, plan, trained)
            updates.append(Update(name, weight, sent))
            ideal[name] = dict(products(effective(plan, trained)))
            told = strategy.contribution(server, updates[-1], round)
            assert told is not None
            for module, product in products(told):
                torch.testing.assert_close(
                    product.dense(), ideal[name][module].dense(), rtol=1e-10, atol=1e-10
                )
        server = strategy.aggregate(server, updates, Mean(), round)
        shares = [weight / sum(weights) for weight in weights]
        for module, product in products(server["adapter"]):
            mean = stack([own[module] for own in ideal.values()], shares).dense()
            torch.testing.assert_close(product.dense(), mean, rtol=1e-10, atol=1e-9)


@both
def test_the_frame_never_moves_and_is_sent_once(strategy: Strategy) -> None:
    """A client that has it gets the core alone; one that comes late, or comes back, gets both."""
    begins = strategy.rounds_before if isinstance(strategy, FedSB) else 0
    server = strategy.start(adapter_of(1, [(6, 4), (5, 8)], 2))
    kept: State = {}
    first = ""
    for round in range(1, begins + 4):
        info = ClientInfo("a", 9, round - 1)
        turn = turn_of(strategy, server, info, round, kept)
        plan = strategy.plan(turn)
        if round > begins:
            assert ("frame" in turn.received) == (round == begins + 1)
            late = turn_of(strategy, server, ClientInfo("late", 9, min(begins, 1)), round, {})
            assert digest(strategy.plan(late).start) == digest(plan.start)
            first = first or digest({"frame": plan.start["adapter"]})
            assert digest({"frame": plan.start["adapter"]}) == first
            assert plan.trainable == plan.start["core"].keys()
        sent, kept = strategy.reply(turn, plan, trained_by(plan, round))
        before = server.get("frame")
        server = strategy.aggregate(server, [Update("a", 1.0, sent)], Mean(), round)
        assert before is None or digest({"f": server["frame"]}) == digest({"f": before})
    with pytest.raises(ValueError, match="frame is gone"):
        strategy.plan(turn_of(strategy, server, ClientInfo("a", 9, round), round + 1, {}))


def test_fed_sb_sends_the_square_of_the_rank_whatever_the_module_and_the_cohort() -> None:
    initial = adapter_of(1, [(60, 40), (50, 80)], 3)
    for round, numbers in ((1, 3 * (60 + 50)), (2, 3 * (40 + 80)), (3, 2 * 9), (9, 2 * 9)):
        sent = FedSB().payload(initial, ClientInfo("a", 1), round)["delta"]
        assert sum(t.numel() for t in sent.values()) == numbers


def test_fed_sb_turns_its_warm_up_into_a_frame_without_changing_the_model() -> None:
    """Also where nothing was learnt, and where the round that should have done it had no reply."""
    strategy = FedSB()
    for zero in (False, True):
        start = adapter_of(1, [(6, 4), (3, 8)], 3)
        if zero:
            start = {n: torch.zeros_like(t) if "lora_B" in n else t for n, t in start.items()}
        server = strategy.start(start)
        assert "core" not in strategy.broadcast(server, ClientInfo("a", 9, 0), 2)
        sent = strategy.broadcast(server, ClientInfo("a", 9, 0), 3)
        again = dict(products(folded(sent["frame"], sent["core"])))
        for module, product in products(start):
            torch.testing.assert_close(
                again[module].dense(), product.dense(), rtol=1e-10, atol=1e-10
            )
        for _, frame in products(sent["frame"]):
            eye = torch.eye(3, dtype=torch.float64)
            torch.testing.assert_close(frame.A @ frame.A.T, eye, rtol=1e-10, atol=1e-10)
            torch.testing.assert_close(frame.B.T @ frame.B, eye, rtol=1e-10, atol=1e-10)
        update = Update("a", 1.0, {"delta": sent["core"]})
        after = strategy.aggregate(server, [update], Mean(), 3)
        doubled = dict(products(after["adapter"]))
        for module, product in products(start):
            torch.testing.assert_close(
                doubled[module].dense(), 2 * product.dense(), rtol=1e-10, atol=1e-10
            )


@given(shapes, st.integers(1, 8), st.integers(1, 5), st.integers(0, 99))
def test_ravan_begins_without_a_change_and_costs_what_fedit_costs(
    sizes: list[tuple[int, int]], rank: int, heads: int, seed: int
) -> None:
    initial = adapter_of(seed, sizes, rank)
    strategy = Ravan(heads=heads)
    server = strategy.start(initial)
    blocks = strategy.payload(initial, ClientInfo("a", 1), 1)["delta"]
    for module, product in products(server["adapter"]):
        assert not product.dense().any()
        a, b = (server["frame"][f"{module}.lora_{key}.weight"] for key in "AB")
        fedit = sum(initial[f"{module}.lora_{key}.weight"].numel() for key in "AB")
        assert blocks[f"{module}.core.blocks"].numel() <= max(fedit, heads)
        for rows in (a, b.T):
            group = rows[: rows.shape[1]]
            eye = torch.eye(len(group), dtype=torch.float64)
            torch.testing.assert_close(group @ group.T, eye, rtol=1e-10, atol=1e-10)


def test_ravan_draws_its_frame_from_the_runs_first_adapter() -> None:
    one, same, other = (Ravan().start(adapter_of(seed, [(9, 7)], 2)) for seed in (1, 1, 2))
    assert digest(one) == digest(same) != digest(other)
    large = adapter_of(0, [(384, 384)], 8)
    blocks = Ravan().payload(large, ClientInfo("a", 1), 1)["delta"]["m0.core.blocks"]
    assert blocks.shape == (4, 39, 39)  # 6,084 numbers beside FedIT's 6,144


@pytest.mark.parametrize("text", ["fed_sb(warmup=0)", "ravan(heads=0)", "ravan(rank=-1)"])
def test_parameters_without_meaning_are_refused(text: str) -> None:
    name, _, arguments = text.partition("(")
    key, value = arguments.rstrip(")").split("=")
    with pytest.raises(RecipeError, match=key):
        STRATEGIES[name](**{key: int(value)})


def test_an_adapter_of_other_ranks_exports_as_the_model_that_was_trained(
    tiny_gpt2: Path, tmp_path: Path
) -> None:
    """Conv1D modules of different shapes, so that RAVAN's ranks differ; PEFT gives its logits."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    settings = ModelSettings(name=str(tiny_gpt2), device="cpu", dtype="float64")
    model = models.load(CausalLM(), settings, AdapterSettings(rank=2, alpha=8.0), (), 0)
    strategy = Ravan()
    server = strategy.start(models.initial(model, 0)["adapter"])
    turn = turn_of(strategy, server, ClientInfo("a", 1), 1, {})
    plan = strategy.plan(turn)
    sent, _ = strategy.reply(turn, plan, trained_by(plan, 1))
    server = strategy.aggregate(server, [Update("a", 1.0, sent)], Mean(), 1)
    ids = torch.tensor([[1, 5, 7, 9]])
    plan = strategy.plan(turn_of(strategy, server, ClientInfo("a", 1), 2, {}))
    with torch.no_grad(), training.opened(model, plan):
        model.module.eval()
        expected = model.module(input_ids=ids).logits
    exporting.save(model, {"adapter": server["adapter"]}, tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(tiny_gpt2, dtype=torch.float64)
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=ids).logits, expected, rtol=1e-8, atol=1e-8)
