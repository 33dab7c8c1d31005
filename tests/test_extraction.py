"""What a language model recites, against generation token by token, and in real runs."""

import random
from pathlib import Path

import pytest
import torch
from conftest import WORDS, write_jsonl

from clients.app import app as client_app
from clients.cohort import CohortGrid
from fedtune import models, parts, shards
from fedtune.audits import extraction, losses
from fedtune.audits.audited import Audited, open_run
from fedtune.audits.extraction import Probe, Recited
from fedtune.audits.finding import BROKEN, HOLDS, INVALID, OPEN, NotApplicableError
from fedtune.config import Experiment
from server.app import app as server_app

EOS = 2


def play(experiment: Experiment) -> Audited:
    """The finished run, opened."""
    grid = CohortGrid(client_app, experiment.flat())
    server_app(grid, grid.server_context({"arms": ""}))
    return open_run(parts.folder_of(experiment))


def texts(count: int, client: str, seed: int = 0) -> list[dict[str, str]]:
    draw = random.Random(f"{seed}{client}")
    return [{"text": " ".join(draw.choices(WORDS, k=20)), "client": client} for _ in range(count)]


@pytest.fixture
def heart(tiny: Experiment, wide_llama: Path, tmp_path: Path) -> Experiment:
    """Three texts, which a Llama with room for them learns by heart."""
    train = write_jsonl(tmp_path / "train.jsonl", texts(3, "north"))
    test = write_jsonl(tmp_path / "test.jsonl", texts(18, "north", 1))
    return tiny.replace(
        task="causal_lm",
        model__name=str(wide_llama),
        data__source=f"jsonl(train='{train}', test='{test}')",
        rounds=1,
        adapter__rank=16,
        adapter__alpha=32.0,
        train__steps=100,
        train__batch_size=3,
    )


def test_a_model_that_learnt_its_rows_by_heart_recites_them(heart: Experiment) -> None:
    opened = play(heart)
    found = extraction.audit(opened)
    rates = [measure.value for measure in found.measures]
    assert found.verdict == OPEN
    assert rates[0] == 1.0  # training rows
    assert rates[1] == 0.0  # without the adapter
    assert rates[2] == 0.0  # test rows
    assert rates[3] >= 10 > rates[4]  # tokens


def test_one_forward_pass_tells_what_greedy_generation_recites(heart: Experiment) -> None:
    """Of a model that has learnt its rows in part, token for token, by transformers' own loop."""
    opened = play(heart.replace(train__steps=30))
    model = opened.model
    everything = shards.pooled(opened.shards)
    probes = [*extraction.probes(opened, everything.train)]
    probes += extraction.probes(opened, everything.test)
    told = extraction._right(model, probes)
    model.module.eval()
    for probe, length in zip(probes, told, strict=True):
        truth = probe.tokens[probe.start :]
        prompt = torch.tensor([probe.tokens[: probe.start]])
        with torch.no_grad():
            out = model.module.generate(
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=len(truth),
                do_sample=False,
                pad_token_id=model.pad,
            )
        written = out[0, probe.start :].tolist()
        pairs = zip(written, truth, strict=False)
        same = next((i for i, (a, b) in enumerate(pairs) if a != b), len(written))
        assert length == same
    assert len(probes) == 21
    assert 0 < sum(told) < sum(len(p.tokens) - p.start for p in probes)


def test_leaving_the_adapter_out_leaves_the_model_as_it_was(heart: Experiment) -> None:
    opened = play(heart.replace(train__steps=5))
    probes = extraction.probes(opened, shards.pooled(opened.shards).train)
    rows = opened.shards[0].train
    tuned = losses.of_rows(opened.model, opened.parts.task, rows, 128)
    with models.untuned(opened.model):
        base = losses.of_rows(opened.model, opened.parts.task, rows, 128)
        extraction.recited(opened.model, probes, 2)
    again = losses.of_rows(opened.model, opened.parts.task, rows, 128)
    assert tuned == pytest.approx(again, abs=1e-6)
    assert abs(tuned - base).max() > 1e-3


def test_a_text_is_cut_after_its_first_tokens_and_an_answer_after_its_instruction() -> None:
    text = list(range(10, 130))
    assert extraction.cut({"input_ids": text, "labels": text}, EOS) == Probe(text[:100], 50)
    short = [*range(10, 30), EOS]
    assert extraction.cut({"input_ids": short, "labels": short}, EOS) == Probe(short[:20], 10)
    labels = [-100] * 4 + short[4:]
    assert extraction.cut({"input_ids": short, "labels": labels}, EOS) == Probe(short[:20], 4)
    assert extraction.cut({"input_ids": short[5:], "labels": short[5:]}, EOS) == Probe(
        short[5:20], 7
    )
    assert extraction.cut({"input_ids": short[6:], "labels": short[6:]}, EOS) is None


def test_a_long_text_is_asked_for_once(heart: Experiment, tmp_path: Path) -> None:
    """130 words are three windows of 50 tokens; a hundred rows at most are asked for."""
    rows = [{"text": " ".join(row["text"] for row in texts(7, f"n{i}")), "client": "n"} for i in
            range(130)]  # fmt: skip
    train = write_jsonl(tmp_path / "long.jsonl", rows)
    e = heart.replace(data__source=f"jsonl(train='{train}')", model__max_length=50, train__steps=1)
    opened = play(e)
    probes = extraction.probes(opened, shards.pooled(opened.shards).train)
    assert len(probes) == extraction.ROWS == 100
    assert len({tuple(probe.tokens) for probe in probes}) == 100
    assert {(probe.start, len(probe.tokens)) for probe in probes} == {(25, 50)}


@pytest.mark.parametrize(
    ("tuned", "base", "unseen", "verdict"),
    [
        ((0, 100), (0, 100), (0, 100), HOLDS),  # the base's interval ends at 0.0362
        ((3, 100), (0, 100), (0, 100), HOLDS),
        ((4, 100), (0, 100), (0, 100), BROKEN),
        ((4, 100), (0, 100), (3, 100), HOLDS),  # as often as rows that it never saw
        ((4, 100), (0, 100), (0, 0), BROKEN),
        ((3, 3), (3, 3), (0, 3), INVALID),
    ],
)
def test_a_claim_is_broken_above_both_intervals_only(
    tuned: tuple[int, int], base: tuple[int, int], unseen: tuple[int, int], verdict: str
) -> None:
    of = [Recited(whole, rows, 0) for whole, rows in (tuned, base, unseen)]
    assert extraction._verdict(*of)[0] == verdict


def test_the_interval_is_clopper_and_pearsons() -> None:
    """Of 0 in n: 1 - 0.025^(1/n). Of 5 in 10, from their table: 0.187 to 0.813."""
    assert Recited(0, 100, 0).interval == pytest.approx((0.0, 1 - 0.025**0.01))
    assert Recited(5, 10, 0).interval == pytest.approx((0.1871, 0.8129), abs=1e-4)
    assert Recited(7, 7, 0).interval[1] == 1.0


def test_classifiers_write_nothing(tiny: Experiment) -> None:
    with pytest.raises(NotApplicableError, match="chooses labels and writes no text"):
        extraction.audit(play(tiny.replace(rounds=1)))
