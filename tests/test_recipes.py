"""Every recipe in experiments/ can be run as its own header says."""

import re
from pathlib import Path

import pytest

from fedtune import bases, parts
from fedtune.config import Experiment
from fedtune.studies import study_file

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "experiments").rglob("*.toml"))
STUDIES = [path for path in FILES if "\n[vary]\n" in path.read_text(encoding="utf-8")]
RECIPES = [path for path in FILES if path not in STUDIES]
COUNT = {"recipes": 5, "studies": 6}


def test_none_is_forgotten() -> None:
    assert {"recipes": len(RECIPES), "studies": len(STUDIES)} == COUNT
    listed = (ROOT / "experiments" / "README.md").read_text(encoding="utf-8")
    for path in (ROOT / "experiments").glob("*.toml"):
        assert f"({path.name})" in listed


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_it_resolves_and_its_header_has_the_command(path: Path) -> None:
    experiment = Experiment.load(path)
    assert parts.resolve(experiment)
    header = path.read_text(encoding="utf-8").split("\n\n")[0]
    assert re.search(rf"^#   .*(fedtune run experiments/{path.name}|one_machine\.sh)", header, re.M)


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_a_study_resolves_every_cell_and_its_header_has_the_command(path: Path) -> None:
    study = study_file.load(path)
    assert len(study.seeds) >= 3
    assert study.question
    assert len(study.cells()) == len(study.conditions()) * len(study.seeds) * len(study.arms)
    header = path.read_text(encoding="utf-8").split("\n\n")[0]
    assert f"#   fedtune compare experiments/{path.name}" in header


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_its_model_fits_where_model_and_data_are(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedtune import planning

    monkeypatch.chdir(ROOT)
    experiment = Experiment.load(path)
    if "one_machine" in path.read_text(encoding="utf-8"):
        pytest.skip("a deployment's recipe has no data")
    if bases.resolve(experiment.model.name) == experiment.model.name:
        pytest.skip(f"{experiment.model.name} is not here")
    for file in re.findall(r"'([^']+\.jsonl)'", experiment.data.source):
        if not Path(file).exists():
            pytest.skip(f"{file} is not here")
    cost = planning.forecast(experiment)
    assert cost.clients > 1
    assert 0 < cost.bytes_up <= cost.bytes_down
