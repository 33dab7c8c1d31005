"""A recipe's component texts become frozen dataclasses, or errors that name the remedy."""

import contextlib
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtune.components import build, signature
from fedtune.errors import RecipeError


@dataclass(frozen=True)
class Part:
    """A part with one parameter of each type."""

    needed: int
    rate: float = 0.5
    name: str = "x"
    on: bool = False

    def __post_init__(self) -> None:
        if self.rate < 0:
            raise ValueError("rate must be at least 0")


@dataclass(frozen=True)
class Bare:
    """A part without parameters."""


REGISTRY = {"part": Part, "bare": Bare}


@given(st.integers(), st.floats(0, 1e9), st.text(), st.booleans())
def test_what_is_written_is_what_is_built(needed: int, rate: float, name: str, on: bool) -> None:
    text = f"part(needed={needed!r}, rate={rate!r}, name={name!r}, on={on!r})"
    assert build(text, REGISTRY, "kind") == Part(needed, rate, name, on)


def test_a_bare_name_is_enough() -> None:
    assert build("bare", REGISTRY, "kind") == Bare() == build("bare()", REGISTRY, "kind")


def test_an_int_is_taken_for_a_float_and_nothing_else() -> None:
    assert build("part(needed=1, rate=2)", REGISTRY, "kind") == Part(1, 2.0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prat(needed=1)", "kind 'prat' is unknown. Did you mean 'part'? Known: bare, part."),
        ("part(need=1)", "has no parameter 'need'. Its parameters: needed, rate=0.5"),
        ("bare(x=1)", "kind 'bare' has no parameter 'x'. It has none."),
        ("part(rate=1.0)", "kind 'part' needs needed."),
        ("part(needed=1.5)", "needed = 1.5 is not of type int"),
        ("part(needed=True)", "needed = True is not of type int"),
        ("part(needed=1, on=1)", "on = 1 is not of type bool"),
        ("part(needed=1, name=None)", "name = None is not of type str"),
        ("part(needed=1, rate=-1.0)", "rate must be at least 0"),
        ("part(1)", "name its arguments"),
        ("part(needed=1", "is not of the form"),
        ("a.b(needed=1)", "is not of the form"),
        ("part(**{})", "is not of the form"),
        ("part(needed=__import__('os'))", "is no literal"),
        ("", "is not of the form"),
    ],
)
def test_errors_name_what_was_wrong_and_what_there_is(text: str, message: str) -> None:
    with pytest.raises(RecipeError) as error:
        build(text, REGISTRY, "kind")
    assert message in str(error.value)


@given(st.text(max_size=40))
def test_any_text_is_built_or_refused(text: str) -> None:
    with contextlib.suppress(RecipeError):
        assert isinstance(build(text, REGISTRY, "kind"), Part | Bare)


def test_signature_shows_defaults() -> None:
    assert signature(Part) == "needed, rate=0.5, name='x', on=False"
