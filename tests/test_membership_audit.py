"""Membership inference: statistics by hand, planted members, and rows that nobody trained on."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from conftest import WORDS, make_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from clients.app import app as client_app
from clients.cohort import CohortGrid
from fedtune import models, parts
from fedtune.audits import blind, likelihoods, membership, ranking
from fedtune.audits.audited import Claim, open_run
from fedtune.audits.finding import Finding, NotApplicableError
from fedtune.audits.likelihoods import Tokens
from fedtune.config import Experiment
from fedtune.models import Model
from server.app import app as server_app


def test_ez_by_hand() -> None:
    """Row 0: errors rose by 2 and fell by 1, a right token does not count: 2 / 3. Row 1 has none.

    Row 2 only fell: 0. Row 3 only rose, the surest member, where P / N has no value: 1.
    """
    tokens = Tokens(
        row=np.array([0, 0, 0, 1, 2, 3]),
        tuned=np.array([-1.0, -3.0, -0.1, -0.1, -4.0, -1.0]),
        base=np.array([-3.0, -2.0, -5.0, -2.0, -1.0, -2.0]),
        wrong=np.array([True, True, False, False, True, True]),
        z=np.zeros(6),
    )
    assert likelihoods.ez(tokens, 4).tolist() == pytest.approx([2 / 3, 1, 0, 1])


def test_min_k_by_hand() -> None:
    """Of ten tokens the two lowest count, of three the lowest."""
    z = np.array([0.0, -2.0, 1, 1, 1, 1, 1, 1, 1, -4.0, 5.0, -1.0, 7.0])
    tokens = Tokens(np.array([0] * 10 + [1] * 3), z, z, z > 0, z)
    assert likelihoods.min_k(tokens, 2).tolist() == pytest.approx([-3, -1])


@given(st.floats(1e-6, 0.999999))
def test_odds_are_those_of_the_probability(p: float) -> None:
    loss = torch.tensor([-np.log(p)], dtype=torch.float64)
    assert float(likelihoods.odds(loss)) == pytest.approx(np.log(p / (1 - p)), rel=1e-6, abs=1e-8)


def loaded(experiment: Experiment) -> Model:
    """With an adapter that changes something."""
    e = experiment
    model = models.load(parts.resolve(e).task, e.model, e.adapter, ("a", "b", "c"), e.seed)
    draws = torch.Generator().manual_seed(7)
    state = {
        group: {n: torch.randn(t.shape, generator=draws) * 0.4 for n, t in tensors.items()}
        for group, tensors in models.read(model).items()
    }
    models.write(model, state)
    return model


def test_losses_of_classes_are_the_models_and_its_bases(tiny: Experiment) -> None:
    """Row by row without padding, in the order given."""
    model, task = loaded(tiny), parts.resolve(tiny).task
    examples = [
        {"input_ids": [2, *range(5, 5 + length), 3], "label": [length % 3]}
        for length in (7, 2, 9, 4, 4, 1)
    ]
    found = likelihoods.of_classes(model, task, examples)

    def loss(example: dict[str, list[int]]) -> float:
        ids = torch.tensor([example["input_ids"]])
        logits = model.module(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        return float(F.cross_entropy(logits, torch.tensor(example["label"])))

    model.module.eval()
    with torch.no_grad():
        tuned = np.array([loss(example) for example in examples])
        with model.module.disable_adapter():
            base = np.array([loss(example) for example in examples])
    assert list(found) == ["loss ratio", "log-odds gained", "loss"]
    assert found["loss"] == pytest.approx(-tuned, rel=1e-4)
    assert found["loss ratio"] == pytest.approx(-tuned / base, rel=1e-4)
    assert not np.allclose(tuned, base, atol=0.05)


def test_likelihoods_of_text_are_the_models_and_its_bases(
    tiny: Experiment, tiny_llama: Path
) -> None:
    """Token by token, one window at a time; both windows of row 0 count for it."""
    e = tiny.replace(model__name=str(tiny_llama), task="causal_lm")
    model, task = loaded(e), parts.resolve(e).task
    windows = [[1, 8, 9, 12, 2], [7, 7, 4], [1, 20, 2], [1, 5, 9, 30, 31, 8, 2]]
    rows = [0, 0, 1, 2]
    examples = [{"input_ids": ids, "labels": [-100, *ids[1:]]} for ids in windows]
    tokens = likelihoods.tokens_of(model, task, examples, rows)
    scores = likelihoods.of_tokens(tokens, 3)
    assert list(scores) == ["EZ", "loss ratio", "min-k%++", "loss"]
    expected: dict[str, list[list[float]]] = {"tuned": [[], [], []], "base": [[], [], []]}
    lowest: list[list[float]] = [[], [], []]
    for ids, row in zip(windows, rows, strict=True):
        with torch.no_grad():
            whole = model.module(input_ids=torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
            with model.module.disable_adapter():
                base = model.module(input_ids=torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        for place, target in enumerate(ids[1:]):
            p = whole[place].exp()
            mean = float((p * whole[place]).sum())
            spread = float((p * (whole[place] - mean) ** 2).sum()) ** 0.5
            expected["tuned"][row].append(float(whole[place, target]))
            expected["base"][row].append(float(base[place, target]))
            lowest[row].append((float(whole[place, target]) - mean) / spread)
    sums = {name: np.array([sum(own) for own in v]) for name, v in expected.items()}
    assert scores["loss ratio"] == pytest.approx(-sums["tuned"] / sums["base"], rel=1e-3)
    counts = np.array([len(own) for own in lowest])
    assert scores["loss"] == pytest.approx(sums["tuned"] / counts, rel=1e-3)
    assert scores["min-k%++"] == pytest.approx([min(own) for own in lowest], rel=1e-2, abs=1e-3)


def texts(count: int, seed: int, words: list[str] = WORDS) -> list[dict[str, str]]:
    """Rows whose labels nothing tells: to know them is to remember them."""
    draw = random.Random(seed)
    return [
        {
            "text": " ".join(draw.choices(words, k=5)),
            "label": draw.choice("xy"),
            "client": draw.choice(["north", "south"]),
        }
        for _ in range(count)
    ]


def examples(rows: list[dict[str, str]]) -> list[dict[str, list[int]]]:
    return [
        {"input_ids": [WORDS.index(word) for word in row["text"].split()], "label": [0]}
        for row in rows
    ]


def test_a_blind_classifier_sees_other_words_and_nothing_else() -> None:
    same = blind.guesses(examples(texts(200, 1)), examples(texts(150, 2)), 0)
    assert 0.35 < ranking.auc(*same) < 0.65
    other = blind.guesses(examples(texts(200, 1)), examples(texts(150, 2, WORDS[:20])), 0)
    assert ranking.auc(*other) > 0.9
    labels = [[{**row, "label": [n]} for row in examples(texts(80, n))] for n in (0, 1)]
    assert ranking.auc(*blind.guesses(*labels, 0)) > 0.99


def play(experiment: Experiment) -> Path:
    grid = CohortGrid(client_app, experiment.flat())
    server_app(grid, grid.server_context({"arms": ""}))
    return parts.folder_of(experiment)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Random models that are wide enough to learn a few rows by heart."""
    sizes = {"hidden_size": 64, "intermediate_size": 64, "vocab_size": 64}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 128}
    folders = {task: tmp_path_factory.mktemp(task) for task in ("causal_lm", "classification")}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        text = LlamaConfig(**sizes, bos_token_id=1, eos_token_id=2, initializer_range=0.2)
        LlamaForCausalLM(text).save_pretrained(folders["causal_lm"])
        encoder = BertModel(BertConfig(**sizes, initializer_range=0.3))
        encoder.save_pretrained(folders["classification"])
    for task, folder in folders.items():
        make_tokenizer(folder, bert=task == "classification")
    return folders


def written(tiny: Experiment, task: str, model: Path, folder: Path, **changes: Any) -> Experiment:
    path = folder / "texts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in texts(200, 0)), encoding="utf-8")
    settings: dict[str, Any] = {
        "rounds": 2,
        "task": task,
        "model__name": str(model),
        "adapter__rank": 8,
        "data__source": f"jsonl(train='{path}')",
        "data__audit_holdout": 0.5,
        "train__batch_size": 8,
        "train__schedule": "linear",
    }
    return tiny.replace(name=task, **{**settings, **changes})


def area(finding: Finding, name: str) -> float:
    return next(m.value for m in finding.measures if m.name == name and not m.subject)


def test_texts_that_were_learnt_by_heart_are_told(
    tiny: Experiment, wide: dict[str, Path], tmp_path: Path
) -> None:
    e = written(tiny, "causal_lm", wide["causal_lm"], tmp_path)
    e = e.replace(train__learning_rate=0.01, train__epochs=20)
    finding = membership.audit(open_run(play(e)))
    assert finding.verdict == "no claim"
    assert "data.audit_holdout" in finding.validity
    assert finding.measures[0].name == "AUC of the EZ"
    assert finding.measures[0].value > 0.85
    assert area(finding, "AUC of the loss ratio") > 0.95
    assert area(finding, "AUC of the min-k%++") > 0.85
    assert {measure.subject for measure in finding.measures} == {"", "north", "south"}


def test_labels_that_were_learnt_by_heart_are_told(
    tiny: Experiment, wide: dict[str, Path], tmp_path: Path
) -> None:
    """By one client: a mean of several forgets what each alone has learnt by heart."""
    e = written(tiny, "classification", wide["classification"], tmp_path)
    alone = {"data__partition": "iid", "data__clients": 1}
    e = e.replace(train__learning_rate=0.005, train__epochs=40, **alone)
    finding = membership.audit(open_run(play(e)))
    assert finding.measures[0].name == "AUC of the loss ratio"
    assert finding.measures[0].value > 0.8, finding
    assert area(finding, "AUC of the loss") > 0.8


@pytest.mark.parametrize("task", ["causal_lm", "classification"])
def test_what_was_not_learnt_is_not_told(
    task: str, tiny: Experiment, wide: dict[str, Path], tmp_path: Path
) -> None:
    e = written(tiny, task, wide[task], tmp_path, train__learning_rate=1e-9, rounds=1)
    first = membership.audit(open_run(play(e))).measures[0]
    assert first.low is not None
    assert first.high is not None
    assert first.low < 0.5 < first.high


def test_without_a_holdout_test_rows_serve_and_other_words_make_it_invalid(
    tiny: Experiment, tiny_bert: Path, tmp_path: Path
) -> None:
    test = tmp_path / "test.jsonl"
    rows = texts(90, 5, WORDS[:15])
    test.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    e = written(tiny, "classification", tiny_bert, tmp_path, data__audit_holdout=0.0)
    e = e.replace(data__source=e.data.source.replace("')", f"', test='{test}')"))
    finding = membership.audit(open_run(play(e)))
    assert finding.verdict == "invalid"
    assert "differ by themselves" in finding.reason
    assert "test rows" in finding.validity


def test_a_promise_that_members_disprove_is_broken() -> None:
    """1,000 members far above 1,000 others: all are found, where e^0.1 alarms are allowed."""
    members, others = np.linspace(1, 2, 1000), np.linspace(-1, 0.99, 1000)
    differ, area = (ranking.delong(others, others + d, "area") for d in (0.0, -2.0))

    def verdict(epsilon: float, delta: float = 1e-5) -> Any:
        claim = Claim("record", "record", epsilon, delta, "")
        found = [ranking.caught(members, others, rate) for rate in membership.RATES]
        return membership._verdict(claim, area, found, differ)[0]

    assert verdict(0.1) == "broken"
    assert verdict(3.0) == "broken"
    assert verdict(5.0) == "broken"
    assert verdict(8.0) == "invalid"  # whoever finds everybody is within the promise
    assert verdict(0.1, delta=1.0) == "invalid"
    chance = [ranking.caught(others, others, rate) for rate in membership.RATES]
    claim = Claim("record", "record", 0.1, 1e-5, "")
    assert membership._verdict(claim, area, chance, differ)[0] == "holds"
    assert membership._verdict(claim, area, chance, area)[0] == "invalid"


def test_personal_models_are_not_one_model(
    tiny: Experiment, tiny_bert: Path, tmp_path: Path
) -> None:
    e = written(tiny, "classification", tiny_bert, tmp_path, strategy="fedsa_lora")
    with pytest.raises(NotApplicableError, match="keeps its own model"):
        membership.audit(open_run(play(e)))
