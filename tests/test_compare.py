"""`fedtune compare`: whole studies of tiny cells, in this process."""

import csv
import json
import re
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from test_cli import call, write_recipe

from fedtune import comparing, comparison, launch, report, study_file
from fedtune.comparison import GLOBAL, PERSONAL, Comparison
from fedtune.config import Experiment
from fedtune.errors import RecipeError
from fedtune.study import Study


@pytest.fixture
def fedtune(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):  # type: ignore
    return lambda *arguments: call(capsys, monkeypatch, *arguments)


def study_of(tiny: Experiment, folder: Path, text: str) -> Path:
    path = write_recipe(tiny.replace(name="tiny", rounds=2), folder)
    path.write_text(path.read_text() + text)
    return path


STUDY = """
[vary]
strategy = ["fedit", "fedsa_lora"]
seed = [0, 1]

[study]
question = "Does it run?"
references = ["local_only", "centralized"]
target = 0.3
"""


def cells(folder: Path) -> dict[str, int]:
    """When each cell was last written to."""
    return {p.parent.name: p.stat().st_mtime_ns for p in folder.glob("cells/*/rounds.jsonl")}


def test_a_study_runs_once_and_leaves_everything(tiny: Experiment, tmp_path: Path, fedtune) -> None:  # type: ignore
    path = study_of(tiny, tmp_path, STUDY)
    code, out, err = fedtune("compare", path, "--workers", 1)
    print(out, err)
    assert (code, err) == (0, "")
    folder = tmp_path / "runs" / "tiny"
    written = cells(folder)
    assert len(written) == 8
