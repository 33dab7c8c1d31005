"""A comparison survives its file, and nothing else is taken for one."""

import dataclasses
import json

import pytest
from made_comparison import example

from fedtune.errors import RunError
from fedtune.studies.comparison import Comparison, Curve, read


@pytest.mark.parametrize("conditions", [1, 2])
def test_json_and_back_is_the_same(conditions: int) -> None:
    made = example(conditions)
    again = Comparison.from_json(made.to_json())
    assert again == made
    assert isinstance(again.conditions[0].arms[0].curves[0], Curve)


def test_every_class_of_it_is_in_the_example() -> None:
    """Else the round trip above would prove little."""

    def kinds(value: object) -> set[str]:
        if isinstance(value, list):
            return set().union(*map(kinds, value)) if value else set()
        if isinstance(value, dict):
            return kinds(list(value.values()))
        if dataclasses.is_dataclass(value):
            fields = [getattr(value, field.name) for field in dataclasses.fields(value)]
            return {type(value).__name__} | kinds(fields)
        return set()

    import fedtune.studies.comparison as module

    named = {n for n, v in vars(module).items() if dataclasses.is_dataclass(v)}
    assert kinds(example()) == named
    assert len(named) == 15


@pytest.mark.parametrize(
    ("key", "value"), [("cells", "many"), ("seeds", 3), ("colour", "blue"), ("conditions", [{}])]
)
def test_another_shape_is_refused(key: str, value: object) -> None:
    tree = json.loads(example().to_json()) | {key: value}
    with pytest.raises(ValueError, match="no comparison"):
        Comparison.from_json(json.dumps(tree))


def test_a_missing_field_is_refused() -> None:
    tree = json.loads(example().to_json())
    del tree["metric"]
    with pytest.raises(ValueError, match="metric"):
        Comparison.from_json(json.dumps(tree))


def test_a_damaged_file_says_what_to_do(tmp_path) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "comparison.json").write_text('{"study": ')
    with pytest.raises(RunError, match="writes it again"):
        read(tmp_path / "comparison.json")
