"""What was encoded once is found again, exactly, and nothing else is."""

import os
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from clients import client
from fedtune import bases, tokens
from fedtune.config import Experiment
from fedtune.errors import RecipeError
from fedtune.tasks import CausalLM, Classification, Instruction
from fedtune.tasks.task import Example
from fedtune.tokens import Encoded

ids = st.lists(st.integers(-(2**31), 2**31 - 1), max_size=6)
groups_of_examples = st.lists(
    st.lists(st.fixed_dictionaries({"input_ids": ids, "label": ids}), max_size=4), max_size=4
)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FEDTUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tokens"


class Counted:
    """An encode that counts what it was asked; the words' lengths are the tokens."""

    def __init__(self, *texts: list[str]) -> None:
        self.rows = [Dataset.from_dict({"text": group}) for group in texts]
        self.texts, self.asked = texts, 0

    def __call__(self, number: int) -> list[Example]:
        self.asked += 1
        return [{"input_ids": [len(w) for w in text.split()]} for text in self.texts[number]]

    def load(self, identity: str = "words") -> Encoded:
        return tokens.load(self.rows, self, identity)


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.arrow"))


@given(groups_of_examples)
def test_examples_come_back_as_they_were(groups: list[list[Example]]) -> None:
    """Made and read again are the same, in the whole and in every part."""
    rows = [Dataset.from_dict({"row": [str(e) for e in group]}) for group in groups]
    flat = [example for group in groups for example in group]
    for _ in range(2):
        encoded = tokens.load(rows, groups.__getitem__, "drawn")
        assert [list(part) for part in encoded.parts] == groups
        assert list(encoded.whole) == flat
        assert encoded.whole.lengths.tolist() == [len(e["input_ids"]) for e in flat]


@given(st.integers(0, 7), st.data())
def test_indices_and_slices_are_those_of_a_list(count: int, data: st.DataObject) -> None:
    examples: list[Example] = [{"input_ids": [i] * i} for i in range(count)]
    rows = [Dataset.from_dict({"row": list(range(count))})]
    whole = tokens.load(rows, lambda _: examples, "").whole
    cut = data.draw(st.slices(count))
    assert list(whole[cut]) == examples[cut]
    assert [whole[i] for i in range(-count, count)] == examples * 2
    for outside in (count, -count - 1):
        with pytest.raises(IndexError):
            whole[outside]
    inner = whole[1:]
    assert isinstance(inner, tokens.Examples)
    assert inner.lengths.tolist() == list(range(1, count))


def test_the_second_time_nothing_is_encoded(cache: Path) -> None:
    first, second = Counted(["a bb", "c"], ["dd"]), Counted(["a bb", "c"], ["dd"])
    assert list(first.load().whole) == list(second.load().whole)
    assert (first.asked, second.asked) == (2, 0)
    (file,) = files(cache)
    assert (file.stat().st_mode & 0o777, cache.stat().st_mode & 0o777) == (0o600, 0o700)


@pytest.mark.parametrize(
    ("texts", "identity"),
    [
        ([["a bb", "c"], ["de"]], "words"),
        ([["a bb", "c", "dd"], []], "words"),
        ([["a bb"], ["c", "dd"]], "words"),
        ([["c", "a bb"], ["dd"]], "words"),
        ([["a bb", "c"], ["dd"]], "other"),
    ],
)
def test_other_rows_other_parts_and_other_tasks_are_not_taken_for_them(
    texts: list[list[str]], identity: str, cache: Path
) -> None:
    Counted(["a bb", "c"], ["dd"]).load()
    other = Counted(*texts)
    other.load(identity)
    assert other.asked == 2
    assert len(files(cache)) == 2


def test_the_same_rows_are_found_whatever_dataset_they_were_selected_from(cache: Path) -> None:
    Counted(["a", "bb"]).load()
    wide = Dataset.from_dict({"text": ["zzz", "bb", "a"]})
    again = Counted(["a", "bb"])
    again.rows = [wide.select([2, 1])]
    again.load()
    assert again.asked == 0


def test_a_damaged_file_is_made_again(cache: Path) -> None:
    """Cut short or empty, or with one byte of another value."""
    expected = list(Counted(["a bb", "ccc"]).load().whole)
    (file,) = files(cache)
    sound = file.read_bytes()
    wrong = [sound[:0], sound[:20], sound[:64], sound[:-1]]
    wrong += [sound[:i] + bytes([sound[i] ^ 1]) + sound[i + 1 :] for i in range(0, len(sound), 9)]
    for damaged in wrong:
        file.write_bytes(damaged)
        again = Counted(["a bb", "ccc"])
        assert list(again.load().whole) == expected
    file.write_bytes(sound[:-1])
    for count in (1, 0):
        again = Counted(["a bb", "ccc"])
        again.load()
        assert again.asked == count


def test_without_a_writable_folder_rows_are_encoded_every_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("FEDTUNE_CACHE", str(tmp_path / "file"))
    for _ in range(2):
        rows = Counted(["a bb"])
        assert list(rows.load().whole) == [{"input_ids": [1, 2]}]
        assert rows.asked == 1


def test_the_folder_is_bounded_and_the_longest_unused_file_goes_first(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Counted(["a"]).load()
    (first,) = files(cache)
    size = first.stat().st_size
    Counted(["b"]).load()
    (second,) = set(files(cache)) - {first}
    os.utime(first, (1, 1))
    os.utime(second, (2, 2))
    Counted(["a"]).load()  # used, so that it is the younger one now
    monkeypatch.setenv("FEDTUNE_CACHE_GB", str(2.5 * size / 1e9))
    Counted(["c"]).load()
    assert first in files(cache)
    assert second not in files(cache)
    monkeypatch.setenv("FEDTUNE_CACHE_GB", str(0.5 * size / 1e9))
    assert list(Counted(["d"]).load().whole) == [{"input_ids": [1]}]
    assert len(files(cache)) == 2  # what alone is too large takes nobody's place


@pytest.mark.parametrize("told", ["much", "-1", "nan", "inf"])
def test_a_limit_that_is_no_number_is_refused(told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDTUNE_CACHE_GB", told)
    with pytest.raises(RecipeError, match="FEDTUNE_CACHE_GB"):
        Counted(["a"]).load()


def test_a_tokenizer_is_known_by_what_it_does_and_not_by_its_last_call(tiny_llama: Path) -> None:
    one, other = (AutoTokenizer.from_pretrained(tiny_llama) for _ in range(2))
    other(["where is my card"], truncation=True, max_length=2)
    assert bases.fingerprint(one) == bases.fingerprint(other)
    other.chat_template = "{{ messages }}"
    assert bases.fingerprint(one) != bases.fingerprint(other)
    more = AutoTokenizer.from_pretrained(tiny_llama)
    more.add_tokens(["phones"])
    assert bases.fingerprint(one) != bases.fingerprint(more)


def test_a_task_is_known_by_its_parameters_and_its_source() -> None:
    tasks = [CausalLM(), CausalLM(text="body"), Classification(), Instruction(), Instruction("a")]
    assert len({task.identity() for task in tasks}) == 5
    assert "def encode" in CausalLM().identity()


def test_clients_arms_and_runs_share_one_encoding(tiny: Experiment, cache: Path) -> None:
    """Each client has its own rows, everybody has all, and a second process finds both splits."""
    for _ in range(2):
        # As in a new process, whatever other tests have encoded in this one.
        client._rows.cache_clear()
        client.simulated.cache_clear()
        everybody = client.simulated(tiny.replace(strategy="centralized"))["centralized"]
        for name, one in client.simulated(tiny).items():
            task, words = one.parts.task, one.model.tokenizer
            limit = tiny.model.max_length
            assert list(one.examples) == task.encode(one.shard.train, words, one.labels, limit)
            assert list(one.tests) == task.encode(one.shard.test, words, one.labels, limit)
            assert name in ("north", "south", "west")
        together = [e for one in client.simulated(tiny).values() for e in one.examples]
        assert list(everybody.examples) == together
        assert np.sum(everybody.tests.lengths) > 0
        assert len(files(cache)) == 2
