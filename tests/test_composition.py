"""The composition table: each pair of a strategy and a key is accepted or refused, all of them."""

import pytest

from fedtune import parts
from fedtune.attacks import ATTACKS
from fedtune.combine import COMBINES
from fedtune.config import Experiment
from fedtune.errors import RecipeError
from fedtune.optimizers import OPTIMIZERS
from fedtune.strategies import STRATEGIES

VALUES = {
    "combine": {
        "mean": "mean",
        "median": "median",
        "trimmed_mean": "trimmed_mean",
        "krum": "krum",
        "multi_krum": "multi_krum(chosen=3)",
        "bulyan": "bulyan",
        "geometric_median": "geometric_median",
        "norm_bounded": "norm_bounded(norm=1.0)",
        "centered_clipping": "centered_clipping(norm=1.0)",
        "dnc": "dnc",
        "fltrust": "fltrust(root='north')",
    },
    "server_optimizer": {name: name for name in OPTIMIZERS},
    "attack": {name: name for name in ATTACKS}
    | {"backdoor": "backdoor(trigger='my card', target='late')"},
    "adapter.dora": {"off": False, "on": True},
    "model.quantization": {"none": "none", "nf4": "nf4"},
    "adapter.ranks": {"one": "", "mixed": "2,4,8"},
}
DISTANCES = {
    "krum", "multi_krum", "geometric_median", "norm_bounded", "centered_clipping", "dnc", "fltrust"
}  # fmt: skip
COORDINATES = {"median", "trimmed_mean", "bulyan"}
MOMENTS = {"momentum", "adagrad", "adam", "yogi"}
FORGED = {"alie", "inner_product"}
GAUGE = {"gauge"}
EVERYBODY = {"sign_flip", "scaled_update", "label_flip", "backdoor", "alie", "inner_product"}
NO_DORA = {"adapter.dora": {"on"}}
ONE_RANK = {"adapter.ranks": {"mixed"}}
FROZEN_BASE = {"model.quantization": {"nf4"}}
CORRECTED = {"combine": DISTANCES | COORDINATES, **NO_DORA}
PRODUCTS = {
    "combine": DISTANCES | COORDINATES,
    "server_optimizer": MOMENTS,
    "attack": FORGED,
    **NO_DORA,
}
# Strategy -> what it refuses of each key; everything else goes with it.
REFUSED: dict[str, dict[str, set[str]]] = {
    "fedit": {"combine": COORDINATES, **ONE_RANK},
    "ffa_lora": {"attack": GAUGE, **NO_DORA, **ONE_RANK},
    "rolora": {"attack": GAUGE, **NO_DORA, **ONE_RANK},
    "fedsa_lora": {"attack": GAUGE, **ONE_RANK},
    "fedsvd": {"server_optimizer": MOMENTS, "attack": GAUGE, **NO_DORA, **ONE_RANK},
    "scaffold": {"combine": DISTANCES | COORDINATES, **ONE_RANK},
    "fedrot": {"combine": COORDINATES, **ONE_RANK},
    "fed_sb": {"server_optimizer": MOMENTS, "attack": GAUGE, **NO_DORA, **ONE_RANK},
    "ravan": {"server_optimizer": MOMENTS, "attack": GAUGE, **NO_DORA, **ONE_RANK},
    "flora": {**PRODUCTS, **FROZEN_BASE},
    "flora_sum": {**PRODUCTS, **ONE_RANK, **FROZEN_BASE},
    "flexlora": PRODUCTS,
    "flexlora_sum": {**PRODUCTS, **ONE_RANK},
    "hetlora": PRODUCTS,
    "hetlora_sum": PRODUCTS,
    "fedmomentum": {**PRODUCTS, **FROZEN_BASE},
    "fedex_lora": {**CORRECTED, "server_optimizer": MOMENTS, **ONE_RANK, **FROZEN_BASE},
    "frlora": {**CORRECTED, "server_optimizer": MOMENTS, **ONE_RANK, **FROZEN_BASE},
    "oracle": {**CORRECTED, "server_optimizer": MOMENTS, **FROZEN_BASE},
    "lora_fair": {**CORRECTED, **ONE_RANK},
    "lora_a2": {"combine": COORDINATES, "attack": GAUGE, **NO_DORA, **ONE_RANK},
    "feddpa": {"combine": COORDINATES, "attack": GAUGE, **NO_DORA, **ONE_RANK},
    "pf2lora": {"combine": COORDINATES, "attack": GAUGE, **NO_DORA, **ONE_RANK},
    "fedalt": {
        "combine": DISTANCES | COORDINATES,
        "server_optimizer": MOMENTS,
        "attack": FORGED | GAUGE,
        **NO_DORA,
        **ONE_RANK,
    },
    "local_only": {
        "combine": DISTANCES | COORDINATES,
        "server_optimizer": MOMENTS,
        "attack": EVERYBODY | GAUGE,
    },
    "centralized": {
        "combine": DISTANCES | COORDINATES,
        "server_optimizer": MOMENTS,
        "attack": EVERYBODY | GAUGE,
    },
}
PAIRS = [
    (strategy, key, name)
    for strategy in sorted(STRATEGIES)
    for key, values in VALUES.items()
    for name in values
]


def test_every_pair_is_in_the_table() -> None:
    assert REFUSED.keys() == STRATEGIES.keys()
    assert VALUES["combine"].keys() == COMBINES.keys()
    assert VALUES["attack"].keys() == ATTACKS.keys()
    assert len(PAIRS) == len(STRATEGIES) * (11 + 5 + 8 + 2 + 2 + 2)
    assert sum(len(names) for keys in REFUSED.values() for names in keys.values()) == 313


@pytest.mark.parametrize(("strategy", "key", "name"), PAIRS)
def test_a_pair_is_accepted_or_refused(strategy: str, key: str, name: str) -> None:
    """A refusal names both keys with their values, and what to set instead."""
    value = VALUES[key][name]
    experiment = Experiment().replace(**{"strategy": strategy, key.replace(".", "__"): value})
    if name not in REFUSED[strategy].get(key, set()):
        assert parts.resolve(experiment)
        return
    with pytest.raises(RecipeError) as error:
        parts.resolve(experiment)
    message = str(error.value)
    assert f"strategy = '{strategy}'" in message
    assert (f"{key} = true" if value is True else f"{key} = '{value}'") in message
    assert " Set " in message


@pytest.mark.parametrize(
    ("changes", "first", "second"),
    [
        (
            {"combine": "krum(malicious=2)", "strategy": "ffa_lora", "cohort": "fixed(size=6)"},
            "combine = 'krum(malicious=2)'",
            "cohort = 'fixed(size=6)'",
        ),
        ({"combine": "dnc", "cohort": "poisson(rate=0.5)"}, "combine", "cohort = 'poisson"),
        (
            {"combine": "fltrust(root='north')", "cohort": "fixed(size=9)"},
            "combine = 'fltrust(root='north')'",
            "cohort = 'fixed(size=9)'",
        ),
        (
            {"attack": "alie", "strategy": "oracle", "adapter__ranks": "2,4"},
            "attack = 'alie'",
            "adapter.ranks = '2,4'",
        ),
        ({"attack": "label_flip", "task": "causal_lm"}, "attack = 'label_flip'", "task = 'causal"),
        ({"evaluation__samples": 2}, "evaluation.samples = 2", "task = 'classification'"),
        ({"adapter__init": "orthogonal", "adapter__rank": 3}, "adapter.init", "adapter.rank"),
    ],
)
def test_other_keys_that_do_not_go_together(
    changes: dict[str, str | int], first: str, second: str
) -> None:
    with pytest.raises(RecipeError) as error:
        parts.resolve(Experiment().replace(**changes))
    assert first in str(error.value)
    assert second in str(error.value)
    assert "Set " in str(error.value)


def test_cohorts_that_are_large_enough_are_accepted() -> None:
    for cohort in ("all", "fixed(size=7)"):
        assert parts.resolve(Experiment().replace(combine="krum(malicious=2)", cohort=cohort))
    assert parts.resolve(
        Experiment().replace(combine="norm_bounded(norm=1.0)", cohort="poisson(rate=0.5)")
    )


def test_references_that_join_nothing_are_neither_attacked_nor_defended() -> None:
    """The yardsticks stay what they are; a federated reference meets what the recipe does."""
    recipe = Experiment().replace(
        combine="krum",
        server_optimizer="momentum",
        attack="sign_flip",
        references="local_only,centralized,ffa_lora",
    )
    assert parts.resolve(recipe)
    for name in ("local_only", "centralized"):
        arm = parts.reference(recipe, name)
        assert (arm.combine, arm.server_optimizer, arm.attack) == ("mean", "none", "none")
    arm = parts.reference(recipe, "ffa_lora")
    assert (arm.combine, arm.server_optimizer, arm.attack) == ("krum", "momentum", "sign_flip")
