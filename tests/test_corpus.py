"""The demonstration set keeps what the quickstart claims of it."""

import re
from collections import Counter

import pytest

from fedtune import corpus
from fedtune.errors import RecipeError

in_each_language = pytest.mark.parametrize("language", corpus.LANGUAGES)


def patterns(language: str, label: str) -> dict[str, re.Pattern[str]]:
    """A pattern a wording, its slots standing for anything."""
    return {
        wording: re.compile(re.sub(r"\\\{\w+\\\}", "(.+)", re.escape(wording)))
        for wording in corpus.text(language)["wordings"][label]
    }


@in_each_language
def test_the_file_is_complete(language: str) -> None:
    text = corpus.text(language)
    assert tuple(text["institutions"]) == corpus.INSTITUTIONS
    assert list(text["wordings"]) == list(corpus.MIX)
    for label, wordings in text["wordings"].items():
        assert len(set(wordings)) == len(wordings) >= 20, label
    nouns = Counter(
        noun
        for institution in text["institutions"].values()
        for noun in {n for values in institution["slots"].values() for n in values}
    )
    assert max(nouns.values()) == 1, "a noun belongs to one institution"


@in_each_language
def test_rows_are_as_many_as_the_mix_says(language: str) -> None:
    train, test = corpus.rows(language)
    counts = Counter((row["label"], row["client"]) for row in train)
    for label, wanted in corpus.MIX.items():
        assert tuple(counts[label, client] for client in corpus.INSTITUTIONS) == wanted
    assert 950 <= len(train) <= 1050
    for client in corpus.INSTITUTIONS:
        assert len({row["label"] for row in train if row["client"] == client}) >= 10
        assert len({row["label"] for row in test if row["client"] == client}) == len(corpus.MIX)


@in_each_language
def test_nothing_leaks(language: str) -> None:
    train, test = corpus.rows(language)
    texts = [row["text"] for row in (*train, *test)]
    assert len(set(texts)) == len(texts)
    assert not any("{" in text or "}" in text for text in texts)
    for label in corpus.MIX:
        found = patterns(language, label)
        old, new = corpus.split(list(found))
        assert len(new) == len(found) // 4
        for row in train:
            if row["label"] == label:
                assert any(found[wording].fullmatch(row["text"]) for wording in old), row
        for row in test:
            if row["label"] == label:
                assert any(found[wording].fullmatch(row["text"]) for wording in new), row


@in_each_language
def test_rows_are_the_same_every_time(language: str) -> None:
    again = corpus.rows(language)
    corpus.text.cache_clear()
    assert corpus.rows(language) == again


def test_an_unknown_language_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"no language 'xx'; it has en, zh"):
        corpus.rows("xx")
