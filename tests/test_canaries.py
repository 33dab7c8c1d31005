"""Canaries: where a coin puts them, and what an audit finds of them in real runs."""

import math
import random
from collections import Counter
from pathlib import Path

import pytest
from conftest import WORDS, write_jsonl
from datasets import Dataset

from clients.app import app as client_app
from clients.client import institution, simulated
from clients.cohort import CohortGrid
from fedtune import canaries, parts, planning, shards
from fedtune.audits import canaries as audits
from fedtune.audits.audited import Audited, Claim, open_run
from fedtune.audits.finding import BROKEN, HOLDS, INVALID, OPEN, Finding, NotApplicableError
from fedtune.canaries import Canary
from fedtune.config import Experiment
from fedtune.errors import RecipeError
from fedtune.report import Run
from fedtune.shards import Shard
from fedtune.tasks import TASKS
from fedtune.tasks.classification import Classification
from server.app import app as server_app

TASK = Classification()


def play(experiment: Experiment) -> Audited:
    """The finished run, opened."""
    grid = CohortGrid(client_app, experiment.flat())
    server_app(grid, grid.server_context({"arms": ""}))
    return open_run(parts.folder_of(experiment))


@pytest.fixture
def held(tiny: Experiment) -> list[Shard]:
    return shards.load(tiny.data, 0)


def test_a_canary_is_there_only_where_its_coin_says_so(held: list[Shard]) -> None:
    """Behind the client's own rows, which are as they were."""
    drawn = canaries.drawn(held, TASK, 100, 0)
    for before, after in zip(held, canaries.planted(held, drawn), strict=True):
        own = [c.row for c in drawn if c.client == before.name and c.inserted]
        assert list(after.train) == [*before.train, *own]
        assert list(after.test) == list(before.test)
        assert own
    texts = {c.row["text"] for c in drawn}
    assert len(texts) == 100
    assert not texts & {text for shard in held for text in shard.train["text"]}


def test_coins_are_fair_and_of_each_canary_alone(held: list[Shard]) -> None:
    """1,000 coins: 500 heads but for three standard errors. More canaries change no earlier one."""
    many, few = canaries.drawn(held, TASK, 1000, 0), canaries.drawn(held, TASK, 40, 0)
    assert many[:40] == few
    assert abs(sum(c.inserted for c in many) - 500) < 3 * math.sqrt(1000 / 4)
    assert set(Counter(c.client for c in many).values()) == {333, 334}
    other = canaries.drawn(held, TASK, 1000, 1)
    assert not {c.row["text"] for c in many} & {c.row["text"] for c in other}
    same = sum(a.inserted == b.inserted for a, b in zip(many, other, strict=True))
    assert abs(same - 500) < 3 * math.sqrt(1000 / 4)


def test_what_a_canary_says_does_not_depend_on_its_coin(held: list[Shard]) -> None:
    """Labels and words are as frequent among those that are in as among those that are not."""
    drawn = canaries.drawn(held, TASK, 3000, 0)
    for value in ("status", "hours", "cancel"):
        counts = [
            sum(c.row["label"] == value for c in drawn if c.inserted is coin)
            for coin in (True, False)
        ]
        assert abs(counts[0] - counts[1]) < 3 * math.sqrt(2 * 1500 * (1 / 3) * (2 / 3))


def test_canaries_are_made_of_their_clients_own_words(held: list[Shard]) -> None:
    words = {s.name: {w for text in s.train["text"] for w in text.split()} for s in held}
    for canary in canaries.drawn(held, TASK, 30, 0):
        found = canary.row["text"].split()
        assert set(found) <= words[canary.client]
        assert len(found) == canaries.WORDS


def shard(**columns: list[object]) -> Shard:
    rows = Dataset.from_dict(columns)
    return Shard("north", rows, rows.select([]))


def test_each_canary_is_a_unit_of_its_own_and_keeps_the_columns_types() -> None:
    texts: list[object] = ["a b c d e", "f g h i j"]
    own = shard(text=texts, label=[3, 7], patient=["p", "q"], ward=[1, 2], age=[0.5, 1.5])
    drawn = canaries.drawn([own], TASK, 20, 0)
    (after,) = canaries.planted([own], drawn)
    assert after.train.features == own.train.features
    inside = sum(canary.inserted for canary in drawn)
    assert shards.units(after, "patient") == shards.units(after, "ward") == 2 + inside
    assert {canary.row["label"] for canary in drawn} == {3, 7}
    assert {canary.row["age"] for canary in drawn} == {None}


def test_text_without_spaces_gives_short_words() -> None:
    own = shard(
        text=["我想取消明天早上的预约请帮我处理谢谢", "请问营业时间是几点"], label=["a", "b"]
    )
    (canary,) = canaries.drawn([own], TASK, 1, 0)
    assert all(len(word) <= canaries.LETTERS for word in canary.row["text"].split())


def test_rows_with_too_few_words_are_refused() -> None:
    with pytest.raises(RecipeError, match="so few different words that two canaries are the same"):
        canaries.drawn([shard(text=["a", "a a"], label=["x", "y"])], TASK, 2, 0)


def test_an_instructions_canary_has_both_texts() -> None:
    own = shard(instruction=["a b c"], output=["d e f"], input=["g"])
    (canary,) = canaries.drawn([own], TASKS["instruction"](), 1, 0)
    assert len(canary.row["instruction"].split()) == len(canary.row["output"].split()) == 12


def test_clients_train_on_them_and_count_them(tiny: Experiment) -> None:
    """Privacy is accounted for the rows there are, in a run and in its forecast."""
    e = tiny.replace(data__audit_canaries=30)
    drawn = canaries.drawn(shards.load(e.data, e.seed), TASK, 30, e.seed)
    inside = Counter(canary.client for canary in drawn if canary.inserted)
    expected = {"north": 24, "south": 17, "west": 9}
    clients = simulated(e)
    assert {n: c.units for n, c in clients.items()} == {
        name: rows + inside[name] for name, rows in expected.items()
    }
    assert [len(client.examples) for client in clients.values()] == [
        client.units for client in clients.values()
    ]
    assert planning.forecast(e).examples == 50 + sum(inside.values())
    plain = simulated(tiny)
    assert {name: client.units for name, client in plain.items()} == expected


def test_canaries_go_with_honest_simulations_only(tiny: Experiment, three_clients: Path) -> None:
    e = tiny.replace(data__audit_canaries=8)
    with pytest.raises(RecipeError, match=r"data.audit_canaries = 8 does not go with attack"):
        parts.resolve(e.replace(attack="sign_flip"))
    node = (("client", "north"), ("shard", str(three_clients / "train.jsonl")))
    with pytest.raises(RecipeError, match=r"data.audit_canaries = 8 is for simulations"):
        institution(e, "run", node)
    with pytest.raises(RecipeError, match=r"data.audit_canaries = -1 must be at least 0"):
        tiny.replace(data__audit_canaries=-1)


@pytest.fixture
def language(tiny: Experiment, tiny_llama: Path, tmp_path: Path) -> Experiment:
    """Sixteen texts of many words and forty canaries, for a language model."""
    draw = random.Random(0)
    texts = [" ".join(draw.choices(WORDS, k=12)) for _ in range(16)]
    rows = [{"text": text, "client": "north"} for text in texts]
    train = write_jsonl(tmp_path / "train.jsonl", rows)
    return tiny.replace(
        task="causal_lm",
        model__name=str(tiny_llama),
        data__source=f"jsonl(train='{train}')",
        data__audit_canaries=40,
    )


def values(finding: Finding) -> dict[str, float]:
    return {measure.name: measure.value for measure in finding.measures}


def test_a_model_that_learnt_its_rows_by_heart_tells_its_canaries(
    language: Experiment, wide_llama: Path
) -> None:
    """Twenty guesses, of which all right would show 1.82."""
    opened = play(
        language.replace(
            model__name=str(wide_llama),
            rounds=2,
            adapter__rank=16,
            adapter__alpha=32.0,
            train__steps=60,
            train__batch_size=64,
        )
    )
    found = audits.audit(opened)
    assert found.verdict == OPEN
    assert values(found)["epsilon, lower bound"] > 0.5
    assert values(found)["exposure, median, bits"] > 2.0
    # The base is what it was: the same again.
    assert audits.audit(opened) == found


def test_a_model_that_was_not_tuned_tells_nothing(language: Experiment) -> None:
    """Tuned by a hair only, so that scores are not all equal."""
    found = audits.audit(play(language.replace(rounds=1, train__learning_rate=1e-7)))
    assert values(found)["epsilon, lower bound"] == 0.0
    median = found.measures[2]
    assert median.low is not None
    assert median.low <= 1.0 <= (median.high or 0.0)


def test_a_private_run_keeps_what_its_ledger_promises(tiny: Experiment) -> None:
    """Sixty canaries, thirty guesses: all right they would refute 1, and they do not."""
    private = tiny.replace(
        data__audit_canaries=60,
        rounds=1,
        privacy__mode="record",
        privacy__epsilon=1.0,
        train__max_grad_norm=0.0,
    )
    found = audits.audit(play(private))
    assert found.verdict == HOLDS, found.reason
    assert found.measures[0].allowed == pytest.approx(1.0, abs=0.01)
    assert "differentially private for each record" in found.claim


def test_runs_without_canaries_or_without_a_common_model_say_so(tiny: Experiment) -> None:
    with pytest.raises(NotApplicableError, match=r"run it again with data.audit_canaries=200"):
        audits.audit(play(tiny))
    alone = tiny.replace(name="alone", strategy="local_only", data__audit_canaries=20)
    with pytest.raises(NotApplicableError, match="trains no common model"):
        audits.audit(play(alone))


def claim(epsilon: float, mode: str = "record", delta: float = 1e-6) -> Claim:
    return Claim(mode, "record", epsilon, delta, "so much is promised")


COINS = [True, False] * 100
TELLING = [float(coin) for coin in COINS]


def test_a_claim_is_broken_by_a_bound_above_it() -> None:
    """100 right of 100: q = 0.05^0.01 = 0.9705, epsilon 3.49, less what delta takes."""
    found = audits.found(TELLING, COINS, claim(3.0))
    assert found.verdict == BROKEN
    assert found.measures[0].value == pytest.approx(3.49, abs=0.02)
    assert found.measures[0].allowed == 3.0


def test_a_claim_that_no_guesses_could_refute_is_not_called_kept() -> None:
    found = audits.found(TELLING, COINS, claim(8.0, delta=0.0))
    assert found.verdict == INVALID
    needed = math.log(0.05) / math.log(1 / (1 + math.exp(-8.0)))
    assert f"data.audit_canaries = {4 * math.ceil(needed / 2)} could" in found.reason


def test_guesses_at_chance_hold_against_any_claim_they_could_refute() -> None:
    found = audits.found([0.0] * 200, COINS, claim(1.0))
    assert found.verdict == HOLDS
    assert found.measures[0].value == 0.0


def test_of_a_client_a_row_is_promised_twice_as_much() -> None:
    """A row more in a client: the client without it removed, and the client with it added."""
    assert audits.found(TELLING, COINS, claim(2.0)).verdict == BROKEN
    assert audits.found(TELLING, COINS, claim(2.0, "local")).verdict == BROKEN
    assert audits.found(TELLING, COINS, claim(2.0, "client")).verdict == INVALID
    assert audits.found(TELLING, COINS, claim(1.7, "client")).verdict == BROKEN


def test_canaries_that_are_one_unit_cannot_be_guessed(tiny: Experiment) -> None:
    rows = [Canary("north", {"age": None}, True)] * 8
    audits._require_units(Audited(Run(Path(), tiny, (), [], [])), rows)
    e = tiny.replace(privacy__unit="age")
    with pytest.raises(NotApplicableError, match="neither text nor whole numbers"):
        audits._require_units(Audited(Run(Path(), e, (), [], [])), rows)
