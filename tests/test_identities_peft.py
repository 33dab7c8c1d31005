"""Aggregation against PEFT's own arithmetic, on Linear and Conv1D layers that are not square."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from rounds import strategy_of
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from fedtune import bases, models, training
from fedtune.adapted import require_untied
from fedtune.adapter import Adapter, weighted_mean
from fedtune.combine import Mean
from fedtune.config import AdapterSettings, ModelSettings
from fedtune.errors import RecipeError
from fedtune.lowrank import mean_product, products
from fedtune.models import Model
from fedtune.seeds import generator
from fedtune.strategies import STRATEGIES
from fedtune.strategies.strategy import ClientInfo, Plan, Turn, Update
from fedtune.tasks import CausalLM

CASES = [(name, rslora) for name in ("tiny_gpt2", "tiny_llama") for rslora in (False, True)]
EXACT = ["flora", "fedex_lora", "fedmomentum(energy=1.0)", "oracle"]
WEIGHTS = (1.0, 4.0, 2.5)


@pytest.fixture(params=CASES, ids=lambda case: f"{case[0]}-{'rs' if case[1] else ''}lora")
def model(request: pytest.FixtureRequest) -> Model:
    """GPT-2 has Conv1D of 16 x 48, 16 x 64 and 64 x 16, Llama Linear of 16 x 8 and 16 x 24."""
    name, rslora = request.param
    settings = ModelSettings(name=str(request.getfixturevalue(name)), device="cpu", dtype="float64")
    return models.load(CausalLM(), settings, AdapterSettings(rank=3, rslora=rslora), (), 0)


def weights_of(model: Model, plan: Plan) -> dict[str, torch.Tensor]:
    """Every adapted layer's weight as PEFT would merge it."""
    with training.opened(model, plan):
        return {
            path: (layer.get_base_layer().weight + layer.get_delta_weight("default")).detach()
            for path, layer in models.lora_layers(model)
        }


def moved(adapter: Adapter, *seed: int | str) -> Adapter:
    draws = generator(*seed)
    return {
        name: tensor + 0.3 * torch.randn(tensor.shape, generator=draws, dtype=tensor.dtype)
        for name, tensor in adapter.items()
    }


@pytest.mark.parametrize("text", EXACT)
def test_the_merged_weights_are_the_mean_of_the_clients(model: Model, text: str) -> None:
    """fedex.6, catalogue 5 and 7: W0 + s (base + B A) = sum_i p_i (W0 + s (base + B_i A_i))."""
    strategy = strategy_of(text)
    server = strategy.start(models.initial(model, 0)["adapter"])
    for round in (1, 2):
        updates, ideal = [], {}
        for client, weight in enumerate(WEIGHTS):
            info = ClientInfo(f"c{client}", 9, round - 1)
            turn = Turn(round, strategy.broadcast(server, info, round), {})
            plan = strategy.plan(turn)
            end = moved(plan.start["adapter"], round, client)
            sent, _ = strategy.reply(turn, plan, {"adapter": end})
            updates.append(Update(f"c{client}", weight, sent))
            own = weights_of(model, Plan({"adapter": end}, frozenset(), base=plan.base))
            for path, merged in own.items():
                ideal[path] = ideal.get(path, 0.0) + weight / sum(WEIGHTS) * merged
        server = strategy.aggregate(server, updates, Mean(), round)
        after = Plan({"adapter": server["adapter"]}, frozenset(), base=server["base"])
        for path, merged in weights_of(model, after).items():
            torch.testing.assert_close(merged, ideal[path], rtol=1e-10, atol=1e-10)
        assert any(merged.shape[0] != merged.shape[1] for merged in ideal.values())


def test_frlora_begins_with_the_weights_as_they_are(model: Model) -> None:
    """The principal factors in the adapter are what the base lacks; to 1e-10, in every layer."""
    strategy = STRATEGIES["frlora"]()
    server = strategy.start(models.initial(model, 0, principal=True)["adapter"])
    plan = strategy.plan(Turn(1, strategy.broadcast(server, ClientInfo("x", 1), 1), {}))
    for path, layer in models.lora_layers(model):
        frozen = layer.get_base_layer().weight
        torch.testing.assert_close(weights_of(model, plan)[path], frozen, rtol=0, atol=1e-10)


def test_principal_factors_are_the_best_approximation_of_the_weights(model: Model) -> None:
    """Eckart-Young on the model's scaling, and the same whatever the seed; a head would differ."""
    first, second = (models.initial(model, s, principal=True)["adapter"] for s in (0, 1))
    for path, layer in models.lora_layers(model):
        weight = layer.get_base_layer().weight.detach()
        weight = weight.T if layer.fan_in_fan_out else weight
        own = dict(products(first))[path]
        away = (weight - layer.scaling["default"] * own.dense()).norm()
        tail = torch.linalg.svdvals(weight)[3:].norm()
        torch.testing.assert_close(away, tail, rtol=1e-10, atol=1e-10)
        assert torch.equal(own.A, dict(products(second))[path].A)


def test_a_weight_that_is_an_embedding_too_is_refused(tiny_gpt2: Path) -> None:
    """GPT-2's output layer is its input embedding: a changed base would change both."""
    settings = ModelSettings(name=str(tiny_gpt2), device="cpu")
    for targets, tied in (("c_attn,c_fc", False), ("c_attn,lm_head", True)):
        adapter = AdapterSettings(rank=2, target_modules=targets)
        module = models.load(CausalLM(), settings, adapter, (), 0).module
        if tied:
            with pytest.raises(RecipeError, match=r"'flora'.*lm_head'.*transformer.wte.*Leave it"):
                require_untied(module, "flora")
        else:
            require_untied(module, "flora")


def test_principal_factors_are_pissas(tiny_llama: Path) -> None:
    """Meng et al. 2024, as PEFT has it, in the float32 that it asks for."""
    settings = ModelSettings(name=str(tiny_llama), device="cpu")
    adapter = AdapterSettings(rank=3, target_modules="q_proj,down_proj")
    model = models.load(CausalLM(), settings, adapter, (), 0)
    ours = dict(products(models.initial(model, 0, principal=True)["adapter"]))
    base = AutoModelForCausalLM.from_pretrained(tiny_llama)
    config = LoraConfig(
        r=3, lora_alpha=16, target_modules=["q_proj", "down_proj"], init_lora_weights="pissa"
    )
    theirs = get_peft_model(base, config)
    layers = [m for m in theirs.modules() if hasattr(m, "get_delta_weight") and hasattr(m, "r")]
    assert len(layers) == len(ours) == 4
    for own, layer in zip(ours.values(), layers, strict=True):
        delta = layer.get_delta_weight("default").double()
        torch.testing.assert_close(16 / 3 * own.dense(), delta, rtol=1e-4, atol=1e-5)


class Layers(nn.Module):
    """One layer of each kind, neither of them square."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 7)
        self.conv = Conv1D(9, 5)


RANKS = (2, 4, 3)
ALPHAS = {2: 4.0, 4: 6.0, 3: 16.0}


def clients(*, rslora: bool, seed: int, ranks: tuple[int, ...] = RANKS) -> PeftModel:
    """Adapters of several ranks and alphas on one base, every factor drawn."""
    draws = generator(seed)
    peft: PeftModel | None = None
    for number, rank in enumerate(ranks):
        config = LoraConfig(
            r=rank, lora_alpha=ALPHAS[rank], use_rslora=rslora, target_modules=["linear", "conv"]
        )
        with bases.quiet():  # PEFT tells that Conv1D stores its weight transposed
            if peft is None:
                peft = get_peft_model(Layers().double(), config, adapter_name="c0")
            else:
                peft.add_adapter(f"c{number}", config)
    assert peft is not None
    peft.double()
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=draws).double())
    return peft


def factors(peft: PeftModel, client: str, scale: float) -> Adapter:
    """A client's factors under FedTune's names, B multiplied by its own scaling over `scale`."""
    adapter = {}
    for path in ("linear", "conv"):
        layer = getattr(peft.base_model.model, path)
        adapter[f"{path}.lora_A.weight"] = layer.lora_A[client].weight.detach()
        own = layer.scaling[client] / scale
        adapter[f"{path}.lora_B.weight"] = own * layer.lora_B[client].weight.detach()
    return adapter


def deltas(peft: PeftModel, client: str) -> dict[str, torch.Tensor]:
    """PEFT's change of each layer, (d_out, d_in) for both kinds."""
    linear, conv = (getattr(peft.base_model.model, path) for path in ("linear", "conv"))
    return {
        "linear": linear.get_delta_weight(client).detach(),
        "conv": conv.get_delta_weight(client).detach().T,
    }


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("scale", [1.0, 2.0, 0.37])
def test_imported_scalings_give_the_same_oracle(rslora: bool, scale: float) -> None:
    """Catalogue 15: alpha / r and alpha / sqrt(r) of every client, B_i times s_i / s on import."""
    peft = clients(rslora=rslora, seed=1)
    names = ["c0", "c1", "c2"]
    ours = mean_product([factors(peft, name, scale) for name in names], WEIGHTS)
    for module, own in products(ours):
        ideal = sum(
            weight / sum(WEIGHTS) * deltas(peft, name)[module]
            for weight, name in zip(WEIGHTS, names, strict=True)
        )
        torch.testing.assert_close(scale * own.dense(), ideal, rtol=1e-10, atol=1e-10)


def test_a_stack_is_pefts_cat() -> None:
    """flora.3, catalogue 5: `cat` of weighted adapters is the mean of the products.

    Of rsLoRA adapters PEFT 0.21 makes one that is too large by the root of its rank.
    """
    peft, names = clients(rslora=False, seed=2), ["c0", "c1", "c2"]
    shares = [weight / sum(WEIGHTS) for weight in WEIGHTS]
    ours = mean_product([factors(peft, name, 1.0) for name in names], WEIGHTS)
    peft.add_weighted_adapter(names, shares, "stacked", combination_type="cat")
    for module, own in products(ours):
        theirs = deltas(peft, "stacked")[module]
        torch.testing.assert_close(own.dense(), theirs, rtol=1e-10, atol=1e-10)
        assert len(own.A) == sum(RANKS)


def test_pefts_linear_is_not_fedit() -> None:
    """It sums sqrt(p s) A_i and sqrt(p s) B_i: for p = 1/2 twice the product of the means."""
    peft = clients(rslora=False, seed=3, ranks=(2, 2))
    peft.add_weighted_adapter(["c0", "c1"], [0.5, 0.5], "summed", combination_type="linear")
    mean = weighted_mean([factors(peft, name, 2.0) for name in ("c0", "c1")], [1.0, 1.0])
    for module, own in products(mean):
        theirs = deltas(peft, "summed")[module]
        torch.testing.assert_close(theirs, 2 * 2.0 * own.dense(), rtol=1e-10, atol=1e-10)
