"""One resident model: what is read is what was written, and PEFT agrees about every name."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict
from transformers import AutoConfig, AutoModelForCausalLM

from fedtune import adapted, bases, exporting, lowrank, models, training
from fedtune.adapter import digest
from fedtune.config import AdapterSettings, ModelSettings
from fedtune.errors import RecipeError
from fedtune.models import SentenceClassifier
from fedtune.strategies.strategy import Plan
from fedtune.tasks import CausalLM, Classification, Task

LABELS = ("a", "b", "c")
CASES = [
    ("tiny_bert", Classification(), LABELS),
    ("tiny_bert", Classification(pooling="model"), LABELS),
    ("tiny_llama", Classification(), LABELS),
    ("tiny_llama", CausalLM(), ()),
    ("tiny_gpt2", CausalLM(), ()),
]


@pytest.fixture(params=CASES, ids=lambda case: f"{case[0]}-{type(case[1]).__name__}")
def case(request: pytest.FixtureRequest) -> tuple[Task, ModelSettings, tuple[str, ...]]:
    name, task, labels = request.param
    return task, ModelSettings(name=str(request.getfixturevalue(name)), device="cpu"), labels


@pytest.mark.parametrize("dora", [False, True])
def test_names_are_pefts(case: tuple[Task, ModelSettings, tuple[str, ...]], dora: bool) -> None:
    task, settings, labels = case
    model = models.load(task, settings, AdapterSettings(rank=2, dora=dora), labels, 0)
    theirs = get_peft_model_state_dict(model.module, save_embedding_layers=False)
    ours = {name: p for group in model.tensors.values() for name, p in group.items()}
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert all("lora_" in name for name in model.tensors["adapter"])
    assert ("head" in model.tensors) == bool(labels)


def test_the_skeleton_has_the_same_tensors(
    case: tuple[Task, ModelSettings, tuple[str, ...]],
) -> None:
    task, settings, labels = case
    model = models.load(task, settings, AdapterSettings(rank=3), labels, 0)
    tensors, parameters, size = models.skeleton(task, settings, AdapterSettings(rank=3), labels)
    assert {g: {n: p.shape for n, p in t.items()} for g, t in tensors.items()} == {
        g: {n: p.shape for n, p in t.items()} for g, t in model.tensors.items()
    }
    trainable = sum(p.numel() for p in model.module.parameters() if p.requires_grad)
    everything = sum(p.numel() for p in model.module.parameters())
    # PEFT keeps an untrained copy of each head, and the base's own counts once.
    assert parameters == everything - trainable
    assert size == 4 * parameters


def test_the_start_depends_on_the_seed_alone(
    case: tuple[Task, ModelSettings, tuple[str, ...]],
) -> None:
    task, settings, labels = case
    model = models.load(task, settings, AdapterSettings(rank=2), labels, 0)
    torch.manual_seed(1)
    first = models.initial(model, 5)
    torch.manual_seed(2)
    before = digest(models.read(model))
    assert digest(models.initial(model, 5)) == digest(first) != digest(models.initial(model, 6))
    assert digest(models.read(model)) == before
    assert all(
        bool(tensor.any()) == ("lora_B" not in name) for name, tensor in first["adapter"].items()
    )


@pytest.mark.parametrize("init", sorted(adapted.INIT))
def test_every_initialisation_leaves_the_model_trainable(tiny_bert: Path, init: str) -> None:
    """B A is zero at the start, and what is drawn lands in the parameters that are trained."""
    settings = ModelSettings(name=str(tiny_bert), device="cpu")
    task, adapter = Classification(), AdapterSettings(rank=2, init=init)
    model = models.load(task, settings, adapter, ("a", "b"), 0)
    live = {n: p for group in model.tensors.values() for n, p in group.items()}
    state = models.initial(model, 3)
    inside = dict(model.module.named_parameters())
    assert all(any(p is q for q in inside.values()) for p in live.values())
    for name, a in state["adapter"].items():
        if "lora_A" in name:
            b = state["adapter"][name.replace("lora_A", "lora_B")]
            assert a.any()
            assert torch.allclose(b @ a, torch.zeros(()), atol=1e-6)


def test_write_refuses_what_does_not_fit(tiny_llama: Path) -> None:
    model = models.load(
        CausalLM(),
        ModelSettings(name=str(tiny_llama), device="cpu"),
        AdapterSettings(rank=2),
        (),
        0,
    )
    state = models.read(model)
    name, tensor = next(iter(state["adapter"].items()))
    for wrong in (
        {"adapter": {name: tensor[:1]}},
        {"adapter": {"x": tensor}},
        {"head": {name: tensor}},
    ):
        with pytest.raises(ValueError, match="the model has no tensor"):
            models.write(model, wrong)
    assert digest(models.read(model)) == digest(state)


@pytest.mark.parametrize("dora", [False, True])
def test_peft_loads_a_saved_classifier_with_the_same_predictions(
    tiny_bert: Path, tmp_path: Path, dora: bool
) -> None:
    settings, adapter = (
        ModelSettings(name=str(tiny_bert), device="cpu"),
        AdapterSettings(2, dora=dora),
    )
    model = models.load(Classification(), settings, adapter, LABELS, 0)
    state = perturbed(models.initial(model, 0))
    before = digest(models.read(model))
    exporting.save(model, state, tmp_path / "adapter")
    assert digest(models.read(model)) == before
    base = SentenceClassifier.from_pretrained(
        tiny_bert, config=AutoConfig.from_pretrained(tiny_bert, num_labels=3)
    )
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    models.write(model, state)
    model.module.eval()
    ids = torch.tensor([[2, 5, 6, 7, 3], [2, 9, 8, 3, 0]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]])
    with torch.no_grad():
        ours = model.module(input_ids=ids, attention_mask=mask).logits
        theirs = loaded(input_ids=ids, attention_mask=mask).logits
    assert torch.equal(ours, theirs)
    about = json.loads((tmp_path / "adapter" / "fedtune.json").read_text())
    assert about["labels"] == list(LABELS)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("name", ["tiny_llama", "tiny_gpt2"])
def test_a_change_of_the_frozen_weights_is_saved_as_an_adapter_of_higher_rank(
    request: pytest.FixtureRequest, tmp_path: Path, name: str, rslora: bool
) -> None:
    """The base that PEFT loads is the checkpoint's own; linear layers and Conv1D."""
    folder: Path = request.getfixturevalue(name)
    settings = ModelSettings(name=str(folder), device="cpu", dtype="float64")
    model = models.load(CausalLM(), settings, AdapterSettings(rank=2, rslora=rslora), (), 0)
    state = perturbed(models.initial(model, 0))["adapter"]
    others = [perturbed(models.initial(model, seed))["adapter"] for seed in (1, 2)]
    change = lowrank.mean_product(others, [1, 2])
    exporting.save(model, {"adapter": state, "base": change}, tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter").double().eval()
    assert loaded.peft_config["default"].r == 6
    model.module.eval()
    ids = torch.tensor([[1, 5, 6, 7]])
    plan = Plan({"adapter": state}, frozenset(), base=change)
    with torch.no_grad(), training.opened(model, plan):
        ours = model.module(input_ids=ids).logits
        theirs = loaded(input_ids=ids).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_a_merged_model_needs_no_peft(tiny_llama: Path, tmp_path: Path) -> None:
    settings = ModelSettings(name=str(tiny_llama), device="cpu")
    model = models.load(CausalLM(), settings, AdapterSettings(rank=2), (), 0)
    state = perturbed(models.initial(model, 0))
    models.write(model, state)
    ids = torch.tensor([[1, 5, 6, 7]])
    model.module.eval()
    with torch.no_grad():
        expected = model.module(input_ids=ids).logits
    exporting.save_merged(model, state, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        torch.testing.assert_close(merged(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-5)


def perturbed(state: dict[str, dict[str, torch.Tensor]]) -> dict[str, dict[str, torch.Tensor]]:
    draws = torch.Generator().manual_seed(3)
    return {
        group: {
            name: t + 0.3 * torch.randn(t.shape, generator=draws) for name, t in tensors.items()
        }
        for group, tensors in state.items()
    }


def test_a_missing_target_module_is_told_with_those_there_are(tiny_llama: Path) -> None:
    settings = ModelSettings(name=str(tiny_llama), device="cpu")
    with pytest.raises(RecipeError, match=r"no linear module 'query'.*down_proj, gate_proj"):
        models.load(CausalLM(), settings, AdapterSettings(target_modules="q_proj,query"), (), 0)


def test_a_missing_model_is_told_with_what_to_do() -> None:
    settings = ModelSettings(name="no-such/model", device="cpu")
    with pytest.raises(RecipeError, match=r"'no-such/model'.*hf download no-such/model"):
        models.load(CausalLM(), settings, AdapterSettings(), (), 0)


def test_an_unusable_device_is_told(tiny_llama: Path) -> None:
    settings = ModelSettings(name=str(tiny_llama), device="warp:9")
    with pytest.raises(RecipeError, match=r"model.device = 'warp:9' cannot be used"):
        models.load(CausalLM(), settings, AdapterSettings(), (), 0)


def test_a_relative_folder_is_found_from_the_given_one(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDTUNE_FOLDER", str(tiny_llama.parent))
    assert bases.resolve(tiny_llama.name) == str(tiny_llama)
    assert bases.resolve("organisation/model") == "organisation/model"


def test_bfloat16_keeps_the_trained_part_in_float32(tiny_llama: Path) -> None:
    settings = ModelSettings(name=str(tiny_llama), device="cpu", dtype="bfloat16")
    model = models.load(Classification(), settings, AdapterSettings(rank=2), LABELS, 0)
    assert {p.dtype for group in model.tensors.values() for p in group.values()} == {torch.float32}
    assert model.module.get_base_model().model.embed_tokens.weight.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("layers", "adapted"),
    [("all", {0, 1}), ("top:1", {1}), ("top:2", {0, 1}), ("0", {0}), ("1,0", {0, 1})],
)
def test_adapters_lie_in_the_chosen_layers_only(
    tiny_llama: Path, layers: str, adapted: set[int]
) -> None:
    """Whichever modules are adapted; and PEFT loads what was saved."""
    settings = ModelSettings(name=str(tiny_llama), device="cpu")
    for targets in ("all-linear", "q_proj,down_proj"):
        adapter = AdapterSettings(rank=2, target_modules=targets, layers=layers)
        model = models.load(CausalLM(), settings, adapter, (), 0)
        names = list(model.tensors["adapter"])
        assert {int(name.split(".layers.")[1].split(".")[0]) for name in names} == adapted
        per_layer = 14 if targets == "all-linear" else 4
        assert len(names) == per_layer * len(adapted)
        skeleton, _, _ = models.skeleton(CausalLM(), settings, adapter, ())
        assert list(skeleton["adapter"]) == names


@pytest.mark.parametrize("layers", ["top:3", "top:0", "2", "-1", "0,0", "first", "top:x", ""])
def test_layers_that_are_not_there_are_an_error(tiny_llama: Path, layers: str) -> None:
    settings = ModelSettings(name=str(tiny_llama), device="cpu")
    with pytest.raises(RecipeError, match="the model has the layers 0 to 1"):
        models.load(CausalLM(), settings, AdapterSettings(layers=layers), (), 0)
