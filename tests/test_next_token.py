"""The loss over learnt tokens is the model's own, whatever is left out to compute it."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import given
from hypothesis import settings as limits
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from fedtune.tasks import CausalLM, next_token
from fedtune.tasks.causal_lm import IGNORED

SMALL: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def llama() -> nn.Module:
    return LlamaForCausalLM(LlamaConfig(**SMALL))


def gpt2() -> nn.Module:
    config = GPT2Config(
        vocab_size=40, n_embd=16, n_layer=2, n_head=2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
    )
    return GPT2LMHeadModel(config)


def biased() -> nn.Module:
    model = LlamaForCausalLM(LlamaConfig(**SMALL))
    model.lm_head = nn.Linear(16, 40)
    return model


def capped() -> nn.Module:
    config = Gemma2Config(**SMALL, head_dim=8, num_key_value_heads=1, final_logit_softcapping=5.0)
    return Gemma2ForCausalLM(config)


def scaled() -> nn.Module:
    return CohereForCausalLM(CohereConfig(**SMALL, logit_scale=0.25))


def projected() -> nn.Module:
    """OPT's decoder lies one level below its base model."""
    return OPTForCausalLM(
        OPTConfig(
            vocab_size=40,
            hidden_size=16,
            ffn_dim=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            word_embed_proj_dim=8,
            dropout=0.0,
        )
    )


def adapted(make: Callable[[], nn.Module], dtype: torch.dtype = torch.float64) -> nn.Module:
    """The model with an adapter whose B is not zero, so that A has gradients too."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LoraConfig(r=2, target_modules="all-linear", fan_in_fan_out=make is gpt2)
        model = get_peft_model(make(), config)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter)
    return model.to(dtype).train()


def batch(seed: int, learnt: float = 0.5) -> dict[str, Tensor]:
    """Three rows of seven tokens, the second padded, of which some are learnt."""
    drawn = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 40, (3, 7), generator=drawn)
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    labels = torch.where(torch.rand(ids.shape, generator=drawn) < learnt, ids, IGNORED)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels.where(mask == 1, IGNORED)}


def plainly(model: nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor, int]:
    """(loss of each row, right tokens) from the logits of all positions."""
    logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    logits, labels = logits[:, :-1], inputs["labels"][:, 1:]
    if logits.dtype != torch.float64:
        logits = logits.float()
    nll = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=IGNORED)
    return nll.sum(1) / (labels != IGNORED).sum(1).clamp(min=1), int(
        (logits.argmax(-1) == labels).sum()
    )


def gradients(model: nn.Module, losses: Tensor) -> dict[str, Tensor]:
    """Of differently weighted rows, so that no row's factor is lost."""
    model.zero_grad()
    (losses * torch.arange(1, len(losses) + 1)).sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def require_equal(model: nn.Module, inputs: dict[str, Tensor], tolerance: float) -> None:
    scores = CausalLM().scores(model, inputs)
    losses, right = plainly(model, inputs)
    assert scores["loss"].dtype == losses.dtype
    torch.testing.assert_close(scores["loss"], losses, rtol=tolerance, atol=tolerance)
    assert int(scores["right"].sum()) == right
    own, expected = gradients(model, scores["loss"]), gradients(model, losses)
    assert own.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(own[name], gradient, rtol=tolerance, atol=tolerance)


def seen_by_head(model: nn.Module, inputs: dict[str, Tensor]) -> list[int]:
    """How many positions the model's own output layer was called with, by call."""
    calls: list[int] = []
    head = model.get_base_model().get_output_embeddings()
    hook = head.register_forward_hook(
        lambda _, args, output: calls.append(output.shape[:-1].numel())
    )
    CausalLM().scores(model, inputs)
    hook.remove()
    return calls


PLAIN = [llama, gpt2, biased, projected]


@pytest.mark.parametrize("make", PLAIN)
@pytest.mark.parametrize("chunk", [1, 3, 10**6])
def test_values_and_gradients_are_the_models_own(
    make: Callable[[], nn.Module], chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Float64: 1e-12 is some thousand roundings."""
    monkeypatch.setattr(next_token, "LOGITS", chunk * 40)
    model = adapted(make)
    require_equal(model, batch(0), 1e-12)
    require_equal(model, batch(1, learnt=1.0), 1e-12)


@given(st.integers(0, 99), st.sampled_from([0.0, 0.1, 0.9]))
@limits(max_examples=10)
def test_any_choice_of_learnt_tokens(seed: int, learnt: float) -> None:
    require_equal(adapted(llama), batch(seed, learnt), 1e-12)


def test_rows_with_nothing_learnt_have_no_loss_and_no_gradient() -> None:
    model, inputs = adapted(llama), batch(0)
    inputs["labels"] = torch.full_like(inputs["labels"], IGNORED)
    scores = CausalLM().scores(model, inputs)
    assert scores["loss"].tolist() == [0, 0, 0]
    assert all(not g.any() for g in gradients(model, scores["loss"]).values())


@pytest.mark.parametrize("make", [llama, gpt2, biased])
def test_the_models_own_head_is_called_once_with_one_position_and_never_again(
    make: Callable[[], nn.Module],
) -> None:
    model = adapted(make)
    assert seen_by_head(model, batch(0)) == [3]  # one position of three rows
    assert seen_by_head(model, batch(1)) == []


@pytest.mark.parametrize("make", [capped, scaled])
def test_a_model_that_changes_its_logits_computes_them_itself(
    make: Callable[[], nn.Module],
) -> None:
    model = adapted(make)
    require_equal(model, batch(0), 1e-12)
    assert seen_by_head(model, batch(1)) == [21]


@pytest.mark.parametrize("how", ["adapted", "trained", "replaced"])
def test_a_head_that_is_not_frozen_and_linear_is_called(how: str) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        names = ["q_proj", "lm_head"] if how == "adapted" else ["q_proj"]
        whole = ["lm_head"] if how == "trained" else None
        config = LoraConfig(r=2, target_modules=names, modules_to_save=whole)
        model = get_peft_model(llama(), config).double()
        for parameter in model.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter)
    if how == "replaced":
        head = model.get_base_model().lm_head
        head.forward = lambda hidden: 2 * F.linear(hidden, head.weight)
    require_equal(model, batch(0), 1e-12)


def test_dropout_draws_the_same_the_first_time_and_later() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LoraConfig(r=2, target_modules="all-linear", lora_dropout=0.5)
        model = get_peft_model(llama(), config).train()
        losses = []
        for _ in range(2):
            torch.manual_seed(1)
            losses.append(CausalLM().scores(model, batch(0))["loss"])
    assert torch.equal(*losses)


def error(gradients: dict[str, Tensor], true: dict[str, Tensor]) -> float:
    """The Euclidean distance of all gradients from the true ones."""
    return float(sum((g - true[name]).square().sum() for name, g in gradients.items()) ** 0.5)


def test_half_precision_is_as_precise_as_before() -> None:
    """Losses are equal; gradients differ in rounding, so both are compared with float64's."""
    model = adapted(llama, torch.bfloat16)
    exact = copy.deepcopy(model).double()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    ours, theirs = 0.0, 0.0
    for seed in range(5):
        with torch.autocast("cpu", torch.bfloat16):
            scores = CausalLM().scores(model, batch(seed))
            losses, right = plainly(model, batch(seed))
        assert scores["loss"].dtype == torch.float32
        torch.testing.assert_close(scores["loss"], losses, rtol=1e-6, atol=1e-6)
        assert int(scores["right"].sum()) == right
        true = gradients(exact, plainly(exact, batch(seed))[0])
        ours += error(gradients(model, scores["loss"]), true)
        theirs += error(gradients(model, losses), true)
    assert 0 < ours < 1.2 * theirs


def test_layers_inside_the_backbone_may_be_lent_to_an_engine() -> None:
    model = adapted(llama)
    layer = model.get_base_model().model.layers[0].mlp
    before = layer.forward
    layer.forward = lambda hidden: before(hidden) * 0.5
    require_equal(model, batch(0), 1e-12)
    del layer.forward
    require_equal(model, batch(0), 1e-12)
