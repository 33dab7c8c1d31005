"""A study is read strictly, its grid is paired, and equal cells are one."""

from fnmatch import fnmatch
from pathlib import Path

import pytest
from test_cli import write_recipe
from test_imports import SOURCES, imports

from clients.client import simulated
from fedtune import models, parts
from fedtune.config import Experiment
from fedtune.errors import RecipeError
from fedtune.strategies.strategy import ClientInfo
from fedtune.studies import identity, study_file
from fedtune.studies.study import Study
from fedtune.wire import Address

ROOT = Path(__file__).parent.parent
STUDY = """
[vary]
strategy = ["fedit", "ffa_lora"]
seed = [0, 1]
"adapter.rank" = [2, 4]
[study]
references = ["local_only", "centralized"]
"""


@pytest.fixture
def written(tiny: Experiment, tmp_path: Path):  # type: ignore[no-untyped-def]
    """A function that writes the tiny recipe with more text and loads it as a study."""

    def load(text: str = "", *overrides: str, **options: str) -> Study:
        path = write_recipe(tiny, tmp_path)
        path.write_text(path.read_text() + text)
        return study_file.load(path, overrides, **options)

    return load


def test_the_grid_is_every_combination(written) -> None:  # type: ignore[no-untyped-def]
    study = written(STUDY)
    assert [name for name, _ in study.conditions()] == ["adapter.rank=2", "adapter.rank=4"]
    assert study.arms == (
        ("local_only", "reference"),
        ("centralized", "reference"),
        ("fedit", "strategy"),
        ("ffa_lora", "strategy"),
    )
    cells = study.cells()
    assert len(cells) == 2 * 2 * 4
    assert study.baseline == "fedit"
    for cell in cells:
        e = cell.experiment
        assert (e.strategy, e.seed, f"adapter.rank={e.adapter.rank}") == (
            cell.arm,
            cell.seed,
            cell.condition,
        )
        assert e.references == "none"
        assert parts.folder_of(e) == study.folder / "cells" / e.name


def test_cells_of_one_identity_are_one_and_others_are_not(written) -> None:  # type: ignore[no-untyped-def]
    keys = {cell.experiment.name for cell in written(STUDY).cells()}
    assert len(keys) == 16
    again = written(STUDY, "name=other", "output=elsewhere", "coordinator.wait_seconds=3")
    assert {cell.experiment.name for cell in again.cells()} == keys
    assert not {cell.experiment.name for cell in written(STUDY, "rounds=4").cells()} & keys


def test_a_reference_is_shared_by_all_combiners(written, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    from fedtune.combine import COMBINES

    monkeypatch.setitem(COMBINES, "middle", COMBINES["mean"])
    text = STUDY.replace('"adapter.rank" = [2, 4]', 'combine = ["mean", "middle"]')
    cells = written(text).cells()
    keys = {role: {c.experiment.name for c in cells if c.role == role} for _, role in
            (("", "reference"), ("", "strategy"))}  # fmt: skip
    assert len(keys["reference"]) == 4
    assert len(keys["strategy"]) == 8


def test_a_plain_recipe_and_options_are_a_study_too(written) -> None:  # type: ignore[no-untyped-def]
    refs = 'study.references=["centralized"]'
    study = written("", refs, strategies="fedit, ffa_lora", seeds="0-2,7", baseline="ffa_lora")
    assert study.strategies == ("fedit", "ffa_lora")
    assert study.seeds == (0, 1, 2, 7)
    assert study.baseline == "ffa_lora"
    assert [c.arm for c in study.cells()][:3] == ["centralized", "fedit", "ffa_lora"]


def test_what_a_recipe_refers_to_stays_and_a_strategy_is_no_reference_to_itself(written) -> None:  # type: ignore[no-untyped-def]
    study = written("", "study.references=[]", "references=local_only", strategies="fedit")
    assert study.references == ("local_only",)
    both = written("", 'study.references=["local_only"]', strategies="fedit,local_only")
    assert both.arms == (("fedit", "strategy"), ("local_only", "strategy"))


def test_its_text_is_itself(written, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    text = STUDY + 'question = "Which \\"one\\"?"\ntarget = 0.5\n[study.tune]\nvalues = [0.1, 0.01]'
    study = written(text)
    path = tmp_path / "again.toml"
    path.write_text(study.text())
    again = study_file.load(path)
    assert again.cells() == study.cells()
    assert (again.question, again.target, again.tune) == (study.question, 0.5, study.tune)
    assert again.text() == study.text()


def test_an_epsilon_of_0_is_no_promise(written, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """Beside real ones it is the condition without any; what went with a promise goes too."""
    text = """
[vary]
strategy = ["ffa_lora", "fedsvd"]
"privacy.epsilon" = [0, 3.0, 8.0]
[study]
references = ["local_only"]
"""
    study = written(text, "privacy.mode=record", "privacy.unit=client", "train.batch_size=1")
    names = [name for name, _ in study.conditions()]
    assert names == [f"privacy.epsilon={value}" for value in ("none", "3.0", "8.0")]
    cells = study.cells()
    promised = {
        (
            c.condition,
            c.experiment.privacy.mode,
            c.experiment.privacy.epsilon,
            c.experiment.privacy.unit,
        )
        for c in cells
        if c.role == "strategy"
    }
    assert promised == {
        (names[0], "none", 0.0, ""),
        (names[1], "record", 3.0, "client"),
        (names[2], "record", 8.0, "client"),
    }
    references = {c.experiment.name for c in cells if c.role == "reference"}
    assert len(references) == 1, "what is promised is no part of a reference"
    path = tmp_path / "again.toml"
    path.write_text(study.text())
    assert study_file.load(path).cells() == cells
    noisy = written(text, "privacy.mode=record", "privacy.noise=1.0", "train.batch_size=1")
    assert {c.experiment.privacy.mode for c in noisy.cells() if c.role == "strategy"} == {"record"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[study]\naudits = "membershop"', "There is no audit 'membershop'"),
        ("[study]\naudits = ['tokens']", "study.audits must be of type str"),
        ('[vary]\nstratgy = ["fedit"]', "vary.stratgy: unknown key. Did you mean 'strategy'?"),
        ("[vary]\nseed = 3", "vary.seed = 3 must be a list of values"),
        ("[vary]\nseed = []", r"vary.seed = \[\] must be a list"),
        ("[vary]\nseed = [1, 1]", "vary.seed lists 1 twice"),
        ('[vary]\noutput = ["a", "b"]', "output does not change a result"),
        ("[vary]\nrounds = [1, 2.5]", "rounds must be of type int"),
        ('[vary]\nstrategy = ["fediit"]', "strategy 'fediit' is unknown. Did you mean 'fedit'"),
        ('[study]\nbaselin = "fedit"', "Unknown key 'study.baselin'. Did you mean 'baseline'"),
        ('[study]\nbaseline = "fedlt"', "is no arm of the study. Did you mean 'fedit'"),
        ('[study]\nreferences = ["oracel"]', "study.references: strategy 'oracel' is unknown"),
        ('[study]\ntarget = "high"', "study.target must be of type float"),
        ('[study]\nmetric = "acuracy"', "'acuracy' is not measured. Did you mean 'accuracy'"),
        ("[study.tune]\nrounds = 1", "needs either values"),
        ("[study.tune]\nvalues = [0.1]\nlow = 0.1", "needs either values"),
        ("[study.tune]\nlow = 0.1\nhigh = 0.01\ntrials = 3", "0 < low < high"),
        ("[study.tune]\nlow = 0.01\nhigh = 0.1", "0 < low < high, and trials"),
        ('[study.tune]\nkey = "seed"\nvalues = [1]', "is no key that can be tuned"),
        ("[study.tune]\nvalues = [-1.0]", "train.learning_rate = -1.0 must be above 0"),
        ("[study.tune]\nvalues = [0.1]\nvalidation_fraction = 1.0", "validation_fraction between"),
        (
            "[vary]\n'train.learning_rate' = [0.1]\n[study.tune]\nvalues = [0.1]",
            "is varied too",
        ),
        (
            '[vary]\nstrategy = ["fedit", "flexlora"]\n"adapter.dora" = [true]',
            "flexlora, adapter.dora=True: ",
        ),
    ],
)
def test_what_is_wrong_is_told(written, text: str, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(RecipeError, match=message.replace("(", r"\(")):
        written(text, *([] if "references" in text else ["study.references=[]"]))


def test_an_override_of_a_varied_key_says_how(written) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(RecipeError, match=r"seed is varied.*'vary.seed=\[...\]'"):
        written(STUDY, "seed=3")
    assert written(STUDY, "vary.seed=[3]").seeds == (3,)


@pytest.mark.parametrize("text", ["5-", "a", "1,,2", "-3", "1.5"])
def test_seeds_that_are_none(text: str) -> None:
    with pytest.raises(RecipeError, match="expected numbers and ranges"):
        study_file.seeds_of(text)


def test_commas_inside_parentheses_do_not_separate() -> None:
    texts = "hetlora(keep=0.9, penalty=0.1), fedit ,x(a='(,')"
    assert study_file.split(texts.replace("(,", ",")) == [
        "hetlora(keep=0.9, penalty=0.1)",
        "fedit",
        "x(a=',')",
    ]


def test_run_and_plan_send_a_study_to_compare(tiny: Experiment, tmp_path: Path) -> None:
    path = write_recipe(tiny, tmp_path)
    path.write_text(path.read_text() + STUDY)
    with pytest.raises(RecipeError, match=r"is a study.*`fedtune compare"):
        Experiment.load(path)


def test_sources_that_a_key_leaves_out_have_no_part_in_a_run() -> None:
    """Whatever a run imports is hashed, but for the pages that are written after it."""
    left_out = {p for p in SOURCES if identity.reads_only(p.relative_to(ROOT))}
    relative = [p.relative_to(ROOT) for p in left_out]
    for pattern in identity.READERS:
        assert any(fnmatch(p.as_posix(), pattern) for p in relative), pattern
    names = {".".join(p.with_suffix("").parts) for p in relative}
    for path in set(SOURCES) - left_out:
        found = imports(path) & names
        name = path.relative_to(ROOT).as_posix()
        allowed = {"fedtune.page"} if name in ("fedtune/launch.py", "server/app.py") else set()
        assert found <= allowed, name


def test_a_key_follows_the_sources(tmp_path: Path) -> None:
    """Any change of what a run depends on is another key; of what only reads results, none."""
    for path in SOURCES:
        copy = tmp_path / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    assert identity.code.__wrapped__(tmp_path) == identity.code()
    with (tmp_path / "fedtune" / "studies" / "tables.py").open("a") as file:
        file.write("# another\n")
    assert identity.code.__wrapped__(tmp_path) == identity.code()
    with (tmp_path / "server" / "coordinator.py").open("a") as file:
        file.write("# another\n")
    assert identity.code.__wrapped__(tmp_path) != identity.code()


def test_arms_of_a_seed_are_paired(tiny: Experiment) -> None:
    """Shards, initial adapter, cohorts, batches, rates and dropout are those of any strategy."""
    seen = []
    shared = ["fedit", "ffa_lora", "rolora", "flexlora", "fedsa_lora", "local_only"]
    for strategy in shared:
        e = tiny.replace(
            name=f"paired-{strategy}", strategy=strategy, cohort="fixed(size=2)", seed=5
        )
        clients = simulated(e)
        resolved = parts.resolve(e)
        model = clients["north"].model
        initial = models.initial(model, e.seed)
        state = resolved.strategy.start(initial["adapter"])
        for round in (1, 2):
            cohort = resolved.cohort.draw(list(clients), round, e.seed)
            for name in cohort:
                client = clients[name]
                info = ClientInfo(name, len(client.shard.train))
                received = resolved.strategy.broadcast(state, info, round)
                received = {**received, "head": initial["head"]}
                address = Address(e.run_id, "", round, name, 0)
                work = client.prepare(address, received).work
                tensors = {k: v.tolist() for k, v in sorted(initial["adapter"].items())}
                shard = client.shard.train["text"][:], client.shard.test["text"][:]
                seen.append((strategy, round, name, (shard, tensors, work)))
    first = [item[1:] for item in seen if item[0] == shared[0]]
    assert len(first) == 4
    for strategy in shared[1:]:
        assert [item[1:] for item in seen if item[0] == strategy] == first, strategy
