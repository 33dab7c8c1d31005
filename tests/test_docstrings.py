"""Docstrings are read from files of installed packages, without importing any of them."""

import json
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtune import docstrings
from fedtune.cache import cache_folder
from fedtune.data import Docstrings
from fedtune.errors import RecipeError

ALPHA = '''"""The module that is read but never run.

A second paragraph.
"""
raise SystemExit("imported")


class Kettle:
    """Boils water for
    as many cups as there are.

    Cups are counted.
    """

    def pour(self):
        """Pours the water into all of the cups."""

        def inner():
            """A function inside a function is nobody's business."""

    def short(self):
        """Too short."""


async def wait():
    """Waits until the water has come to the boil."""


def listed():
    """cups (`int`, *optional*): how many of the cups are filled."""


def prompt():
    """>>> kettle.pour(cups) and then wait for the water"""


def same():
    """This sentence stands in both of the packages."""
'''
BETA = '''
def same():
    """This sentence stands in both of the packages."""


def other():
    "\\d is an escape of somebody else, which warns when parsed."
'''


def install(site: Path, name: str, files: dict[str, str], version: str = "1.0") -> None:
    info = site / f"{name}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (info / "RECORD").write_text("".join(f"{file},,\n" for file in [*files, "../bin/tool.py"]))
    for file, text in files.items():
        (site / file).parent.mkdir(parents=True, exist_ok=True)
        (site / file).write_text(text)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A path with two packages and nothing else."""
    folder = tmp_path / "site"
    install(
        folder,
        "Alpha.Kit",
        {
            "alpha/__init__.py": "",
            "alpha/kettle.py": ALPHA,
            "alpha/tests/test_kettle.py": ALPHA.replace("water", "soup"),
            "alpha/_vendor/soup.py": ALPHA.replace("water", "stew"),
            "alpha/template.py": "{{ name }} is no Python, but it ships with the package",
            "alpha/absent.pyi": '"""A stub file has the docstrings of nobody."""',
        },
    )
    install(folder, "beta", {"beta.py": BETA})
    monkeypatch.setattr(sys, "path", [str(folder)])
    monkeypatch.setenv("FEDTUNE_CACHE", str(tmp_path / "cache"))
    return folder


def test_rows_are_first_paragraphs_with_their_owner_and_name(site: Path) -> None:
    rows = Docstrings(packages="alpha-kit,beta").load()
    assert rows.test is None
    found = {(row["client"], row["name"], row["kind"]): row["text"] for row in rows.train}
    assert found == {
        ("alpha-kit", "alpha.kettle", "module"): "The module that is read but never run.",
        ("alpha-kit", "alpha.kettle.Kettle", "class"): (
            "Boils water for as many cups as there are."
        ),
        ("alpha-kit", "alpha.kettle.Kettle.pour", "function"): (
            "Pours the water into all of the cups."
        ),
        ("alpha-kit", "alpha.kettle.wait", "function"): (
            "Waits until the water has come to the boil."
        ),
        ("alpha-kit", "alpha.kettle.same", "function"): (
            "This sentence stands in both of the packages."
        ),
        ("beta", "beta.other", "function"): (
            "\\d is an escape of somebody else, which warns when parsed."
        ),
    }


def test_by_default_the_packages_with_the_most_docstrings(site: Path) -> None:
    assert set(Docstrings(largest=1).load().train["client"]) == {"alpha-kit"}
    assert set(Docstrings(largest=8).load().train["client"]) == {"alpha-kit", "beta"}


@pytest.mark.parametrize(("kind", "count"), [("module", 1), ("class", 1), ("function", 3)])
def test_one_kind_only(site: Path, kind: str, count: int) -> None:
    rows = Docstrings(packages="alpha-kit", kind=kind).load().train
    assert list(rows["kind"]) == [kind] * count


def test_limit_keeps_a_part_of_each_package_and_always_the_same(site: Path) -> None:
    whole = Docstrings(packages="alpha-kit").load().train.to_list()
    rows = Docstrings(packages="alpha-kit", limit=2).load().train.to_list()
    assert len(rows) == 2
    assert all(row in whole for row in rows)
    for file in cache_folder().iterdir():
        file.unlink()
    assert Docstrings(packages="alpha-kit", limit=2).load().train.to_list() == rows


def test_cache_is_used_until_a_version_or_parameter_changes(site: Path) -> None:
    before = Docstrings(packages="beta").load().train.to_list()
    (site / "beta.py").write_text('"""Another text, but of the same version."""\n')
    assert Docstrings(packages="beta").load().train.to_list() == before
    assert Docstrings(packages="beta", limit=3).load().train.to_list() != before
    (site / "beta-1.0.dist-info").rename(site / "beta-1.1.dist-info")
    metadata = site / "beta-1.1.dist-info" / "METADATA"
    metadata.write_text(metadata.read_text().replace("1.0", "1.1"))
    rows = Docstrings(packages="beta").load().train
    assert list(rows["text"]) == ["Another text, but of the same version."]
    names = sorted(file.suffix for file in cache_folder().iterdir())
    assert names == [".jsonl"] * 3  # and no half-written file


def test_bad_packages_are_named(site: Path) -> None:
    with pytest.raises(RecipeError, match=r"'betta' is not installed. Did you mean 'beta'\?"):
        Docstrings(packages="betta").load()
    with pytest.raises(RecipeError, match="'beta' has no docstrings of kind 'class'"):
        Docstrings(packages="beta", kind="class").load()


def test_cache_that_cannot_be_written(
    site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FEDTUNE_CACHE", str(tmp_path / "file"))
    with pytest.raises(RecipeError, match="Set FEDTUNE_CACHE"):
        Docstrings(packages="beta").load()


def test_a_real_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDTUNE_CACHE", str(tmp_path))
    rows = Docstrings(packages="rich, Hypothesis", limit=40).load().train
    assert rows.column_names == ["client", "name", "kind", "text"]
    assert len(rows) == 80
    assert set(rows["client"]) == {"rich", "hypothesis"}
    assert len(set(rows["text"])) == 80
    assert all(r["name"].split(".")[0] == "rich" for r in rows if r["client"] == "rich")
    (file,) = tmp_path.iterdir()
    assert [json.loads(line) for line in file.read_text().splitlines()] == rows.to_list()


@given(st.text(max_size=200))
def test_a_paragraph_is_empty_or_one_line_of_text(docstring: str) -> None:
    text = docstrings.paragraph(docstring)
    assert text == "" or (len(text) >= 20 and text.isprintable() and text == " ".join(text.split()))
