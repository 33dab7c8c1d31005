"""`fedtune compare`: whole studies of tiny cells."""

import json
import os
import signal
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest
from test_cli import call, write_recipe

from fedtune import launch, parts, report
from fedtune.adapter import State
from fedtune.combine import Combine
from fedtune.config import Experiment
from fedtune.errors import RecipeError, RunError
from fedtune.processes import can_fork
from fedtune.records import RoundRecord
from fedtune.strategies import STRATEGIES
from fedtune.strategies.strategy import Strategy, Update
from fedtune.studies import comparing, comparison, study_file
from fedtune.studies.cells import Runner
from fedtune.studies.comparison import GLOBAL, PERSONAL, Comparison
from fedtune.studies.progress import StudyProgress
from fedtune.studies.study import Study

STUDY = """
[vary]
strategy = ["fedit", "fedsa_lora"]
seed = [0, 1]

[study]
question = "Does it run?"
references = ["local_only", "centralized"]
target = 0.3
"""


@pytest.fixture
def fedtune(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):  # type: ignore
    return lambda *arguments: call(capsys, monkeypatch, *arguments)


@pytest.fixture
def small(tiny: Experiment) -> Experiment:
    return tiny.replace(rounds=2, train__steps=2)


def written(experiment: Experiment, text: str) -> Path:
    """A study's file, beside the folder of all runs."""
    path = write_recipe(experiment, Path(experiment.output).parent)
    path.write_text(path.read_text() + text)
    return path


def touched(folder: Path) -> dict[str, int]:
    """When each cell was last written to."""
    return {p.parent.name: p.stat().st_mtime_ns for p in folder.glob("cells/*/rounds.jsonl")}


class Watching:
    """Remembers what it is told; stops the study where it should."""

    def __init__(self, stop_at: int = 0) -> None:
        self.stop_at = stop_at
        self.complete: list[int] = []
        self.rounds: list[tuple[str, int]] = []
        self.over: list[tuple[str, str]] = []
        self.title, self.labels = "", dict[str, str]()

    def planned(self, cells: Mapping[str, Experiment], complete: set[str]) -> None:
        self.complete.append(len(complete))

    def started(self, key: str) -> None:
        assert len(key) == 20

    def committed(self, key: str, record: RoundRecord) -> None:
        self.rounds.append((key, record.round))
        if len(self.rounds) == self.stop_at:
            raise KeyboardInterrupt

    def ended(self, key: str, reason: str) -> None:
        self.over.append((key, reason))

    def warned(self, key: str, text: str) -> None:
        raise AssertionError(text)


def compare(study: Study, view: Watching | None = None, workers: int = 1) -> Comparison:
    return comparing.compare(study, view or Watching(), workers)


def score(found: Comparison, arm: str, protocol: str = GLOBAL) -> comparison.Score:
    one = next(a for a in found.conditions[0].arms if a.name == arm)
    made = one.score(protocol, "accuracy")
    assert made is not None
    return made


def test_a_study_runs_once_and_leaves_everything(small: Experiment, fedtune) -> None:  # type: ignore
    path, folder = written(small, STUDY), Path(small.output) / "tiny"
    code, out, err = fedtune("compare", path, "--workers", 1)
    assert (code, err) == (0, "")
    assert "cells: 8, of which 0 are finished" in out
    first = touched(folder)
    assert len(first) == 8

    found = comparison.read(folder / "comparison.json")
    assert [a.name for a in found.conditions[0].arms] == [
        *("untuned", "local_only", "centralized", "fedit", "fedsa_lora")
    ]
    assert found.question == "Does it run?"
    assert "| fedit | global |" in (folder / "comparison.md").read_text()
    table = pq.read_table(folder / "comparison.parquet")
    assert table.num_rows == pa_csv.read_csv(folder / "comparison.csv").num_rows > 500

    code, out, _ = fedtune("compare", path, "vary.seed=[0,1,2]", "--workers", 1)
    assert code == 0
    assert "cells: 12, of which 8 are finished" in out
    again = touched(folder)
    assert len(again) == 12
    assert first.items() <= again.items()
    more = comparison.read(folder / "comparison.json")
    assert score(more, "fedit").values[:2] == score(found, "fedit").values


def test_its_numbers_are_those_of_ordinary_runs(small: Experiment) -> None:
    study = study_file.load(written(small, STUDY))
    found = compare(study)
    for seed in (0, 1):
        for strategy, protocol in (("fedit", GLOBAL), ("fedsa_lora", PERSONAL)):
            e = small.replace(
                name=f"{strategy}-{seed}",
                strategy=strategy,
                seed=seed,
                references="local_only,centralized",
            )
            done = launch.run(e, workers=1)
            runs = {strategy: done, **done.references}
            for arm, run in runs.items():
                expected = report.summarise(report.pooled(run.records[-1]))["accuracy"]
                local = arm == "local_only" or arm == strategy == "fedsa_lora"
                assert score(found, arm, PERSONAL if local else GLOBAL).values[seed] == expected
            assert (
                score(found, "untuned", protocol).values[seed]
                == (report.summarise(report.pooled(done.records[0]))["accuracy"])
            )
            arm = next(a for a in found.conditions[0].arms if a.name == strategy)
            assert arm.cost.bytes_up is not None
            assert arm.cost.bytes_up[seed] == sum(r.bytes_up for r in done.records)


def test_stopped_anywhere_it_goes_on_with_the_same_result(small: Experiment) -> None:
    text = '[vary]\nstrategy = ["fedit", "ffa_lora"]\n[study]\nreferences = []\n'
    study = study_file.load(written(small, text))
    with pytest.raises(KeyboardInterrupt):
        compare(study, Watching(stop_at=5))  # in the first round of the second cell
    view = Watching()
    found = compare(study, view)
    assert view.complete == [1]
    assert [round for _, round in view.rounds] in ([1, 2], [2])
    whole = compare(study_file.load(written(small.replace(name="whole"), text)))
    assert [a.scores for a in found.conditions[0].arms] == [
        a.scores for a in whole.conditions[0].arms
    ]


def test_cells_at_a_time_change_nothing(small: Experiment) -> None:
    """Not a bit: every cell trains as it would alone."""
    text = '[vary]\nstrategy = ["fedit", "ffa_lora"]\nseed = [0, 1]\n[study]\nreferences = []\n'
    one = study_file.load(written(small, text))
    two = study_file.load(written(small.replace(name="two"), text))
    view = Watching()
    first, second = compare(one), compare(two, view, workers=2)
    assert [a.scores for a in first.conditions[0].arms] == [
        a.scores for a in second.conditions[0].arms
    ]
    assert sorted(reason for _, reason in view.over) == [""] * 4
    for cell in one.cells():
        name = Path(cell.experiment.name) / "adapter" / "adapter_model.safetensors"
        here, there = (s.folder / "cells" / name for s in (one, two))
        assert here.read_bytes() == there.read_bytes()


@dataclass(frozen=True)
class Failing(Strategy):
    """FedIT, until its second round."""

    how: str = "error"

    def aggregate(
        self, server: State, updates: Sequence[Update], combine: Combine, round: int
    ) -> State:
        if round == 2 and Path(os.environ["FAILING"]).exists():
            if self.how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise RunError("the server ran out of luck")
        return super().aggregate(server, updates, combine, round)


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A file; while it is there, the strategy "failing" fails."""
    monkeypatch.setitem(STRATEGIES, "failing", Failing)
    path = tmp_path / "failing"
    monkeypatch.setenv("FAILING", str(path))
    path.touch()
    return path


def test_a_failing_cell_is_told_and_the_rest_goes_on(
    small: Experiment,
    failing: Path,
    fedtune,  # type: ignore[no-untyped-def]
) -> None:
    text = '[vary]\nstrategy = ["fedit", "failing", "ffa_lora"]\nseed = [0, 1]\n'
    path = written(small, text + '[study]\nreferences = ["local_only"]\n')
    folder = Path(small.output) / "tiny"
    code, out, err = fedtune("compare", path, "--workers", 1)
    assert code == 1
    assert "failed: failing, seed 0: RunError: the server ran out of luck" in out
    assert "2 cells have no result" in err
    found = comparison.read(folder / "comparison.json")
    assert [(f.arm, f.seed) for f in found.failures] == [("failing", 0), ("failing", 1)]
    assert [a.name for a in found.conditions[0].arms] == [
        *("untuned", "local_only", "fedit", "ffa_lora")
    ]
    before = touched(folder)
    failing.unlink()
    code, out, err = fedtune("compare", path, "--workers", 1)
    assert (code, err) == (0, "")
    after = touched(folder)
    assert sum(after[key] != when for key, when in before.items()) == 2
    assert comparison.read(folder / "comparison.json").failures == []


@pytest.mark.skipif(not can_fork(1), reason="a spawned process does not know the strategy")
def test_a_cell_that_takes_its_process_along_costs_that_cell_only(
    small: Experiment, failing: Path
) -> None:
    text = '[vary]\nstrategy = ["failing(how=\'kill\')", "fedit", "ffa_lora", "rolora"]\n'
    study = study_file.load(written(small, text + '[study]\nreferences = []\nbaseline = "fedit"\n'))
    found = compare(study, workers=2)
    (failure,) = found.failures
    assert (failure.arm, failure.seed) == ("failing(how='kill')", 0)
    assert "its process ended by SIGKILL" in failure.reason
    assert len(found.conditions[0].arms) == 4


def test_a_study_of_failures_is_an_error(small: Experiment, failing: Path) -> None:
    text = '[vary]\nstrategy = ["failing"]\n[study]\nreferences = []\n'
    with pytest.raises(RunError, match=r"No strategy has a finished cell.*out of luck"):
        compare(study_file.load(written(small, text)))


def test_a_listed_setting_is_tuned_on_validation_rows(small: Experiment) -> None:
    text = """
[vary]
strategy = ["fedit", "ffa_lora"]
seed = [0, 1]
[study]
references = ["centralized"]
[study.tune]
values = [1e-6, 1e-2]
rounds = 1
validation_fraction = 0.3
"""
    study = study_file.load(written(small, text))
    found = compare(study)
    assert [(t.arm, len(t.trials)) for t in found.tuning] == [
        *(("centralized", 2), ("fedit", 2), ("ffa_lora", 2))
    ]
    for tuned in found.tuning:
        scores = [trial.score for trial in tuned.trials]
        best = max(range(2), key=lambda n: (scores[n], -n))
        assert tuned.chosen == tuned.trials[best].value
        arm = next(a for a in found.conditions[0].arms if a.name == tuned.arm)
        assert arm.settings == {"train.learning_rate": tuned.chosen}
    kept = [Experiment.load(path) for path in study.folder.glob("cells/*/experiment.toml")]
    trials = [e for e in kept if e.data.validation_fraction]
    assert {(e.rounds, e.seed, e.data.validation_fraction) for e in trials} == {(1, 0, 0.3)}
    assert len(trials) == 6
    assert len(kept) == 6 + 6
    view = Watching()
    assert compare(study, view).to_json() == found.to_json()
    assert view.over == []


def test_a_range_is_searched_the_same_way_twice(small: Experiment) -> None:
    pytest.importorskip("optuna")
    text = '[vary]\nstrategy = ["fedit"]\n[study]\nreferences = []\n'
    text += "[study.tune]\nlow = 1e-4\nhigh = 1e-1\ntrials = 3\nrounds = 1\n"
    found = [
        compare(study_file.load(written(small.replace(name=name), text))).tuning
        for name in ("first", "second")
    ]
    values = [[(t.value, t.score) for t in tuned.trials] for (tuned,) in found]
    assert values[0] == values[1]
    assert len({value for value, _ in values[0]}) == 3
    assert all(1e-4 <= float(value) <= 1e-1 for value, _ in values[0])
    assert found[0][0].sampler == "tpe"


def test_an_arm_that_cannot_be_tuned_is_not_run(small: Experiment, failing: Path) -> None:
    text = '[vary]\nstrategy = ["fedit", "failing"]\n[study]\nreferences = []\n'
    text += "[study.tune]\nvalues = [1e-2]\n"
    found = compare(study_file.load(written(small, text)))
    assert [(t.arm, t.chosen) for t in found.tuning] == [("fedit", 0.01), ("failing", None)]
    (failure,) = found.failures
    assert "every trial of train.learning_rate failed: RunError: the server" in failure.reason


def test_conditions_are_apart_and_references_shared(small: Experiment) -> None:
    text = """
[vary]
strategy = ["fedit", "ffa_lora"]
weighting = ["examples", "uniform"]
[study]
references = []
"""
    found = compare(study_file.load(written(small, text)))
    assert [c.name for c in found.conditions] == ["weighting=examples", "weighting=uniform"]
    values = [[s.values for s in c.arms[1].scores] for c in found.conditions]
    assert values[0] != values[1]
    assert found.cells == 4


def test_a_folder_that_holds_a_run_or_is_in_use_is_left_alone(small: Experiment) -> None:
    from filelock import FileLock

    launch.run(small, workers=1)
    text = "[vary]\nseed = [0]\n[study]\nreferences = []\n"
    with pytest.raises(RecipeError, match=r"holds a run.*name=second"):
        compare(study_file.load(written(small, text)))
    other = study_file.load(written(small.replace(name="other"), text))
    other.folder.mkdir()
    with (
        FileLock(other.folder / ".lock"),
        pytest.raises(RecipeError, match="in use by another process"),
    ):
        compare(other)
    with pytest.raises(RecipeError, match=r"no run of FedTune \(it holds cells"):
        launch.run(small.replace(name="other"))


def test_the_view_says_how_far_it_is(small: Experiment) -> None:
    from io import StringIO

    from rich.console import Console

    screen = StringIO()
    console = Console(file=screen, force_terminal=True, width=100)
    text = '[vary]\nstrategy = ["fedit", "ffa_lora"]\n[study]\nreferences = []\n'
    study = study_file.load(written(small, text))
    with StudyProgress(console) as view:
        comparing.compare(study, view, workers=1)
        assert (view.done, view.failed, view.running) == (2, 0, {})
        assert view.rounds_done == view.rounds == 4
    shown = screen.getvalue()
    assert "2 done, 0 running, 0 waiting" in shown
    assert "0 done, 1 running, 1 waiting" in shown


def test_json_on_standard_output_is_the_comparison(small: Experiment, fedtune) -> None:  # type: ignore
    path = written(small, "")
    code, out, _ = fedtune(
        *("compare", path, "study.references=[]", "--strategies", "fedit,ffa_lora"),
        *("--seeds", "0-1", "--baseline", "ffa_lora", "--output", Path(small.output).parent / "x"),
        *("--workers", 1, "--json"),
    )
    assert code == 0
    assert json.loads(out)["baseline"] == "ffa_lora"
    assert Comparison.from_json(out).study == "tiny"
    assert (Path(small.output).parent / "x" / "tiny" / "comparison.tex").exists()


def test_a_runner_runs_what_is_there_twice_once(small: Experiment) -> None:
    view = Watching()
    cell = small.replace(name="0123456789" * 2)
    with Runner(view, workers=1) as runner:
        assert runner.run([cell, cell]) == {}
        assert runner.run([cell]) == {}
    assert len(view.over) == 1
    assert launch.complete(cell)
    assert not (parts.folder_of(cell) / "report.html").exists()
