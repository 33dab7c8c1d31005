"""The audit of one message: planted tokens are found, and runs are left as they are."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_tokenizer
from flwr.app import Context, Message
from hypothesis import given
from hypothesis import settings as limits
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from clients.app import app as client_app
from clients.cohort import CohortGrid
from fedtune import models, parts, wire
from fedtune.adapter import Adapter
from fedtune.audits import inputs, payloads, ranking, tokens
from fedtune.audits.audited import open_run
from fedtune.audits.finding import NotApplicableError
from fedtune.config import Experiment
from fedtune.models import Model
from fedtune.privacy.ledger import KEY
from fedtune.seeds import generator
from server.app import app as server_app

WIDTH, RANK, OUT, VOCABULARY = 32, 3, 20, 60
NAMES = ("a", "b", "c", "d", "e")
CONTROL = "by the message of another client, as a control"
MANY = [f"w{number}" for number in range(150)]


def planted(draw: int, count: int, *, only_b: bool) -> tuple[Tensor, Adapter, Adapter]:
    """Inputs of a vocabulary, an adapter, and the gradient of a layer that saw its first tokens."""
    random = generator(draw, "planted")
    states = torch.randn(VOCABULARY, WIDTH, generator=random, dtype=torch.float64)
    a = torch.randn(RANK, WIDTH, generator=random, dtype=torch.float64)
    start = {"q.lora_A.weight": a, "q.lora_B.weight": torch.zeros(OUT, RANK, dtype=torch.float64)}
    slopes = torch.randn(RANK, count, generator=random, dtype=torch.float64)
    if not only_b:
        return states, start, {"q.lora_A.weight": slopes @ states[:count]}
    slopes = torch.randn(OUT, count, generator=random, dtype=torch.float64)
    return states, start, {"q.lora_B.weight": slopes @ (states[:count] @ a.T)}


@limits(max_examples=20)
@given(st.integers(0, 1000), st.booleans(), st.integers(1, 2))
def test_tokens_of_a_planted_gradient_are_found(draw: int, only_b: bool, count: int) -> None:
    """As many tokens as the layer has directions, less one, lie in its row space exactly."""
    states, start, change = planted(draw, count, only_b=only_b)
    rest = tokens.unexplained(states, start, change, ["q"]).numpy()
    assert rest[:count] == pytest.approx(0, abs=1e-6)
    assert ranking.auc(-rest[:count], -rest[count:]) == 1.0


def test_directions_are_weighed_where_all_are_there() -> None:
    """1 - |S W x| / (2 |x|), S = diag(2, 1): 0 along the first direction, 1/2 along the second."""
    states = torch.tensor([[3.0, 0.0], [0.0, 5.0], [0.6, 0.8]], dtype=torch.float64)
    change = torch.diag(torch.tensor([2.0, 1.0], dtype=torch.float64))
    expected = [0.0, 0.5, 1 - (1.2**2 + 0.8**2) ** 0.5 / 2]
    assert tokens.residual(states, change).tolist() == pytest.approx(expected)
    assert tokens.residual(states, torch.zeros(3, 2).double()).tolist() == [1.0] * 3


def test_several_projections_of_one_input_are_looked_at_together() -> None:
    """Each alone explains one of two tokens."""
    states = torch.eye(4, dtype=torch.float64)
    change = {"q.lora_A.weight": states[:1], "v.lora_A.weight": states[1:2]}
    rest = tokens.unexplained(states, {}, change, ["q", "v"])
    assert rest.tolist() == pytest.approx([0, 0, 1, 1])


def loaded(experiment: Experiment) -> Model:
    e = experiment
    return models.load(parts.resolve(e).task, e.model, e.adapter, ("a", "b"), e.seed)


def layer_norm(values: Tensor, layer: torch.nn.Module) -> Tensor:
    result: Tensor = layer(values)
    return result.double()


def test_what_bert_reads_is_the_normed_sum_of_its_embeddings(tiny: Experiment) -> None:
    model = loaded(tiny.replace(adapter__target_modules="query,value,key"))
    found = inputs.readers(model, [2, 7, 8, 3])
    assert (found.alone, found.before, found.after) == (True, (2,), (3,))
    assert [path.rpartition(".")[2] for path in found.paths] == ["query", "key", "value"]
    assert all(".layer.0." in path for path in found.paths)
    words = model.module.get_base_model().backbone.embeddings
    with torch.no_grad():
        whole = (
            words.word_embeddings.weight[[7, 9]].unsqueeze(1)
            + words.position_embeddings.weight[1 : 1 + inputs.COPIES]
            + words.token_type_embeddings.weight[0]
        )
        expected = layer_norm(whole, words.LayerNorm).mean(1)
    assert torch.allclose(inputs.states(model, found, [7, 9]), expected, atol=1e-6)


@pytest.mark.parametrize("base", ["tiny_llama", "tiny_gpt2"])
def test_what_decoders_read_is_the_normed_embedding(
    base: str, tiny: Experiment, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(base)
    model = loaded(tiny.replace(model__name=str(folder), task="causal_lm"))
    found = inputs.readers(model, [1, 7, 8, 2])
    assert found.alone
    inner = model.module.get_base_model()
    with torch.no_grad():
        if base == "tiny_llama":
            words, layer = inner.model.embed_tokens.weight, inner.model.layers[0].input_layernorm
            expected = layer_norm(words[[7, 9]], layer)
        else:
            words = inner.transformer.wte.weight[[7, 9]].unsqueeze(1)
            whole = words + inner.transformer.wpe.weight[1 : 1 + inputs.COPIES]
            expected = layer_norm(whole, inner.transformer.h[0].ln_1).mean(1)
    assert torch.allclose(inputs.states(model, found, [7, 9]), expected, atol=1e-6)


def test_an_upper_layer_reads_the_hidden_state_of_the_token_alone(tiny: Experiment) -> None:
    """Whatever the adapter is: the public base is asked."""
    model = loaded(tiny.replace(adapter__layers="1"))
    before = models.read(model)
    models.write(model, {"adapter": {n: t + 0.3 for n, t in before["adapter"].items()}})
    found = inputs.readers(model, [2, 7, 8, 3])
    assert not found.alone
    assert ".layer.1." in found.paths[0]
    states = inputs.states(model, found, [7, 9])
    with torch.no_grad(), model.module.disable_adapter():
        backbone = model.module.get_base_model().backbone
        for token, state in zip([7, 9], states, strict=True):
            ids = torch.tensor([[2, token, 3]])
            hidden = backbone(input_ids=ids, output_hidden_states=True).hidden_states[1]
            assert torch.allclose(state, hidden[0, 1].double(), atol=1e-6)
    models.write(model, before)


@pytest.fixture(scope="module")
def wide_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama wider than a client's vocabulary has words."""
    folder = tmp_path_factory.mktemp("wide-llama")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=160,
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            intermediate_size=64,
            max_position_embeddings=128,
            bos_token_id=1,
            eos_token_id=2,
        )
        LlamaForCausalLM(config).save_pretrained(folder)
    make_tokenizer(folder, bert=False, known=MANY)
    return folder


@pytest.fixture
def told(tiny: Experiment, wide_llama: Path, tmp_path: Path) -> Experiment:
    """Five clients, each with thirty words of its own and ten rows of eight of them."""
    draw, rows = random.Random(0), []
    for place, client in enumerate(NAMES):
        own = MANY[30 * place : 30 * place + 30]
        rows += [{"text": " ".join(draw.choices(own, k=8)), "client": client} for _ in range(10)]
    path = tmp_path / "told.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return tiny.replace(
        name="told",
        rounds=1,
        task="causal_lm",
        model__name=str(wide_llama),
        adapter__rank=8,
        data__source=f"jsonl(train='{path}')",
        data__test_fraction=0.1,
        train__epochs=3,
    )


def play(experiment: Experiment, client: Any = client_app) -> Path:
    """Run it with known secrets: with new ones every run would differ."""
    folder = parts.folder_of(experiment)
    for own in (folder, *(folder / "clients" / name for name in NAMES)):
        own.mkdir(parents=True, exist_ok=True)
        (own / KEY).write_bytes(bytes(range(32)))
        (own / KEY).chmod(0o600)
    grid = CohortGrid(client, experiment.flat())
    server_app(grid, grid.server_context({"arms": ""}))
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


PROTECTED: dict[str, dict[str, Any]] = {
    "none": {},
    "record": {"privacy__mode": "record", "privacy__noise": 1.0},
    "local": {"privacy__mode": "local", "privacy__noise": 1.0, "weighting": "uniform"},
}


@pytest.mark.parametrize("mode", PROTECTED)
def test_what_is_audited_is_what_was_sent(told: Experiment, mode: str) -> None:
    """In the run's first round, to the rounding of engines; run and model are left as they were.

    Local noise depends on the last bit of what it hides, so another engine has other noise.
    """
    sent: dict[str, Adapter] = {}

    def watching(message: Message, context: Context) -> Message:
        reply = client_app(message, context)
        if message.metadata.message_type == "train":
            sent[str(reply.content["config"]["client"])] = wire.unpack(reply.content)["delta"]
        return reply

    folder = play(told.replace(**PROTECTED[mode]), watching)
    before, audited = files(folder), open_run(folder)
    state = models.read(audited.model)
    played = payloads.play(audited, 2)
    assert played.cohort == ("a", "b")
    assert played.sent.keys() == sent["a"].keys()
    for name, tensor in played.sent.items():
        assert mode == "local" or torch.allclose(tensor, sent["a"][name], atol=2e-4)
    assert (mode == "none") == all(torch.equal(played.raw[n], t) for n, t in played.sent.items())
    assert played.joined is not None
    finding = tokens.audit(audited)
    assert finding == tokens.audit(audited)
    assert files(folder) == before
    after = models.read(audited.model)
    assert all(torch.equal(after[g][n], t) for g, own in state.items() for n, t in own.items())


def test_words_of_one_client_are_told_by_its_message_and_by_no_other(told: Experiment) -> None:
    """Less by a mean of four, and hardly once noise far larger than the update is added."""
    finding = tokens.audit(open_run(play(told)))
    assert finding.verdict == "no claim"
    shown = {m.name.removeprefix("AUC of token presence, "): m.value for m in finding.measures}
    assert list(shown) == ["as sent", "mean of 4 clients", CONTROL]
    assert shown["as sent"] > 0.85
    assert shown["as sent"] > shown["mean of 4 clients"] > 0.6 > shown[CONTROL]
    hidden = told.replace(name="hidden", privacy__mode="record", privacy__noise=50.0)
    finding = tokens.audit(open_run(play(hidden)))
    noisy = {m.name.removeprefix("AUC of token presence, "): m.value for m in finding.measures}
    assert list(noisy) == ["as sent", "mean of 4 clients", "without protection", CONTROL]
    assert noisy["as sent"] < 0.75
    assert noisy["without protection"] == shown["as sent"]
    assert [m.allowed for m in finding.measures] == [tokens.BOUND, None, None, None]


def test_pairs_are_equally_frequent_and_on_their_sides(told: Experiment) -> None:
    played = payloads.play(open_run(play(told)), 2)
    pairs = tokens.matched(played, 0)
    mine = tokens.counted(played.train["a"])
    both = mine + tokens.counted(played.train["b"])
    rest = [tokens.counted(played.train[name]) for name in "cde"]
    everything = sum(rest, both + tokens.counted(played.tests))
    assert len(pairs) > 15
    for present, absent in pairs:
        assert present in mine
        assert absent not in both
        assert 0.5 < everything[present] / everything[absent] < 2


def test_a_strategy_without_messages_has_none_to_audit(told: Experiment) -> None:
    audited = open_run(play(told.replace(strategy="local_only")))
    with pytest.raises(NotApplicableError, match="no client sends an update"):
        tokens.audit(audited)
