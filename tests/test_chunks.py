"""Clients are dealt to chunks evenly, and the same way every time."""

import math
import random

from hypothesis import given
from hypothesis import strategies as st

from server.chunks import deal

WORK = st.dictionaries(
    st.text("abcdefgh", min_size=1, max_size=4), st.sampled_from([0.0, 1.0, 2.5, 7.0, 40.0])
)


@given(WORK, st.integers(1, 5), st.integers(1, 4), st.randoms(use_true_random=False))
def test_every_client_is_dealt_once_to_a_chunk_with_room(
    work: dict[str, float], together: int, nodes: int, chance: random.Random
) -> None:
    chunks = deal(work, together, nodes)
    assert sorted(name for chunk in chunks for name in chunk) == sorted(work)
    assert all(1 <= len(chunk) <= together for chunk in chunks)
    assert all(chunk == sorted(chunk) for chunk in chunks)
    fewest = nodes * math.ceil(len(work) / (together * nodes))
    assert len(chunks) == min(len(work), fewest)
    names = list(work)
    chance.shuffle(names)
    assert deal({name: work[name] for name in names}, together, nodes) == chunks


@given(WORK, st.integers(1, 4))
def test_with_room_enough_no_chunk_has_much_more_than_another(
    work: dict[str, float], nodes: int
) -> None:
    """The last client dealt to the fullest chunk went there because it was the emptiest."""
    loads = [sum(work[name] for name in chunk) for chunk in deal(work, len(work) or 1, nodes)]
    if loads:
        assert max(loads) - min(loads) <= max(work.values())


def test_a_case_by_hand() -> None:
    """Two nodes, three clients a chunk: 8 -> first, 7 -> second, 3 -> second (7 < 8), 2 -> first
    (8 < 10), 1 -> one of 10 and 10, the first."""
    work = {"e": 1.0, "d": 2.0, "c": 3.0, "b": 7.0, "a": 8.0}
    assert deal(work, 3, 2) == [["a", "d", "e"], ["b", "c"]]
    assert deal(work, 1, 2) == [["a"], ["b"], ["c"], ["d"], ["e"]]
    # Four chunks of two: a to d one each; e to the chunk with the least work, d's.
    assert deal(work, 2, 2) == [["a"], ["b"], ["c"], ["d", "e"]]
    assert deal({}, 2, 2) == []
