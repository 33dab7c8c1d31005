"""One recipe, three forms: a TOML file, frozen dataclasses, Flower's flat run-config."""

import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtune.config import Experiment, flatten, parse_override
from fedtune.errors import RecipeError

ROOT = Path(__file__).parent.parent


def test_pyproject_holds_the_defaults() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert flatten(project["tool"]["flwr"]["app"]["config"]) == Experiment().flat()


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "rounds": st.integers(1, 1000),
            "train.learning_rate": st.floats(1e-9, 10),
            "adapter.rslora": st.booleans(),
            "task": st.text(st.characters(exclude_categories=("Cs",)), max_size=30),
            "name": st.from_regex(r"[a-z0-9][a-z0-9._-]{0,63}", fullmatch=True),
        },
    )
)
def test_text_and_flat_read_back_as_the_same_experiment(flat: dict[str, object]) -> None:
    experiment = Experiment.from_flat(flat)
    assert Experiment.from_flat(experiment.flat()) == experiment
    assert Experiment.from_flat(flatten(tomllib.loads(experiment.text()))) == experiment
    assert all(experiment.flat()[key] == value for key, value in flat.items())


@pytest.mark.parametrize(
    ("flat", "message"),
    [
        ({"adapter.rnak": 4}, "Unknown key 'adapter.rnak'. Did you mean 'adapter.rank'?"),
        ({"rounds": "3"}, "rounds must be of type int, not str '3'"),
        ({"rounds": True}, "rounds must be of type int, not bool True"),
        ({"rounds": 2.0}, "rounds must be of type int, not float 2.0"),
        ({"rounds": 0}, "rounds = 0 must be at least 1"),
        ({"train.learning_rate": float("nan")}, "train.learning_rate = nan must be above 0"),
        ({"name": "../x"}, "name = '../x' must be"),
        ({"adapter.init": "pissa"}, "others change the frozen weights"),
        ({"adapter": "x"}, "Unknown key 'adapter'"),
    ],
)
def test_a_wrong_key_or_value_is_named(flat: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError) as e:
        Experiment.from_flat(flat)
    assert message in str(e.value)


def test_an_int_stands_for_a_float() -> None:
    assert Experiment.from_flat({"train.learning_rate": 1}).train.learning_rate == 1.0


def test_load_reads_nested_tables_overrides_and_takes_the_files_name(tmp_path: Path) -> None:
    recipe = tmp_path / "My Recipe.toml"
    recipe.write_text("rounds = 2\n[train]\nbatch_size = 3\n")
    loaded = Experiment.load(recipe, ["train.batch_size=5", "strategy=ffa_lora", "seed = 4"])
    assert (loaded.rounds, loaded.train.batch_size, loaded.seed) == (2, 5, 4)
    assert (loaded.strategy, loaded.name) == ("ffa_lora", "my-recipe")


@pytest.mark.parametrize(
    ("item", "parsed"),
    [
        ("rounds=3", ("rounds", 3)),
        ("train.learning_rate=1e-3", ("train.learning_rate", 1e-3)),
        ("adapter.dora=true", ("adapter.dora", True)),
        ("name=second", ("name", "second")),
        ("name='second'", ("name", "second")),
        ("name=2024", ("name", "2024")),
        ("task=classification(label='x=y')", ("task", "classification(label='x=y')")),
    ],
)
def test_overrides(item: str, parsed: tuple[str, object]) -> None:
    assert parse_override(item) == parsed


def test_an_override_without_a_value_is_an_error() -> None:
    with pytest.raises(RecipeError, match="write key=value"):
        parse_override("rounds")


def test_a_missing_or_broken_recipe_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="Cannot read the recipe"):
        Experiment.load(tmp_path / "none.toml")
    broken = tmp_path / "broken.toml"
    broken.write_text("rounds = = 2")
    with pytest.raises(RecipeError, match="no valid TOML"):
        Experiment.load(broken)
    broken.write_bytes(b"name = '\xff'")
    with pytest.raises(RecipeError, match="Cannot read the recipe"):
        Experiment.load(broken)


@pytest.mark.parametrize(
    "text",
    ["x = " + "[" * 5000, 'task = "' + "(" * 3000 + '"', 'task = "f(x=' + "-" * 9000 + '1)"'],
)
def test_a_recipe_nested_without_end_is_an_error(tmp_path: Path, text: str) -> None:
    from fedtune import parts

    path = tmp_path / "deep.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(RecipeError):
        parts.resolve(Experiment.load(path))


def test_a_path_that_cannot_be_is_an_error() -> None:
    with pytest.raises(RecipeError, match="must be a folder"):
        Experiment().replace(output="a\0b")
    with pytest.raises(RecipeError, match="Cannot read the recipe"):
        Experiment.load("a\0b.toml")
