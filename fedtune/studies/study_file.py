"""A study's file, or a plain recipe and options of a command line, read as a `Study`."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedtune import parts
from fedtune.audits import auditing
from fedtune.components import fits, nearest
from fedtune.config import FREE, Experiment, Leaf, name_of, parse_override, read_flat
from fedtune.errors import RecipeError
from fedtune.studies.study import EPSILON, Study, Tune

REFERENCES = ("local_only", "centralized", "oracle")
LISTS = ("references", "tune.values", "tune.seeds")
KINDS: dict[str, type] = {
    "question": str,
    "baseline": str,
    "metric": str,
    "target": float,
    "audits": str,
    "tune.key": str,
    "tune.low": float,
    "tune.high": float,
    "tune.trials": int,
    "tune.rounds": int,
    "tune.validation_fraction": float,
}


def load(
    path: str | Path,
    overrides: Sequence[str] = (),
    strategies: str = "",
    seeds: str = "",
    baseline: str = "",
) -> Study:
    """The study in a file, or the one that a plain recipe becomes by the other arguments.

    Args:
        path: of a TOML file.
        overrides: `key=value`; keys of [study] and [vary] too, as in study.target=0.8.
        strategies: in place of the file's, "fedit,hetlora(keep=0.9)".
        seeds: in place of the file's, "0-4" or "0,1,7".
        baseline: in place of the file's.

    Raises:
        RecipeError: the file cannot be read, or a key or value is wrong.
    """
    given = dict(parse_override(item) for item in overrides)
    flat = read_flat(path) | given
    told, vary = _section(flat, "study."), _section(flat, "vary.")
    flat = {k: v for k, v in flat.items() if not k.startswith(("study.", "vary."))}
    if strategies:
        vary["strategy"] = split(strategies)
    if seeds:
        vary["seed"] = seeds_of(seeds)
    if baseline:
        told["baseline"] = baseline
    if varied := sorted(given.keys() & vary.keys()):
        raise RecipeError(
            f"{varied[0]} is varied, so {varied[0]}={given[varied[0]]} says nothing. Write "
            f"'vary.{varied[0]}=[...]'."
        )
    return _of({**flat, "name": flat.get("name") or name_of(path)}, vary, told)


def _of(flat: dict[str, Any], vary: dict[str, Any], told: dict[str, Any]) -> Study:
    axes = {key: _values(f"vary.{key}", values) for key, values in vary.items()}
    for key in axes:
        if key not in Experiment().flat():
            raise RecipeError(
                f"vary.{key}: unknown key.{nearest(key, Experiment().flat())} [vary] lists "
                "values of recipe keys."
            )
        if key in FREE:
            raise RecipeError(f"vary.{key}: {key} does not change a result; leave it out.")
        for value in axes[key]:
            Experiment.from_flat({key: value})
    told = _checked(told)
    first = {key: values[0] for key, values in axes.items()}
    if EPSILON in axes:  # a promise of 0 is none, which the study says of its conditions
        first[EPSILON] = max(float(value) for value in axes[EPSILON])
    base = Experiment.from_flat(flat | first)
    chosen = tuple(str(s) for s in axes.pop("strategy", (base.strategy,)))
    named = told.get("references", REFERENCES)
    extra = [name for name in parts.reference_names(base) if name not in named]
    tune = _section(told, "tune.")
    study = Study(
        # A comparison has no use for either, and personal models on all rows take long.
        base=base.replace(references="none", evaluation__samples=0, evaluation__pooled=False),
        strategies=chosen,
        seeds=tuple(int(s) for s in axes.pop("seed", (base.seed,))),
        axes=axes,
        question=str(told.get("question", "")),
        baseline=str(told.get("baseline", chosen[0])),
        references=tuple(name for name in (*named, *extra) if name not in chosen),
        metric=str(told.get("metric", "")),
        target=told.get("target"),
        tune=_tune(tune) if tune else None,
        audits=auditing.chosen(audits) if (audits := str(told.get("audits", ""))) else (),
    )
    study.check()
    return study


def _section(flat: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {k.removeprefix(prefix): v for k, v in flat.items() if k.startswith(prefix)}


def _values(key: str, values: object) -> tuple[Leaf, ...]:
    if not isinstance(values, list) or not values:
        raise RecipeError(f"{key} = {values!r} must be a list of values, as in seed = [0, 1, 2].")
    for value in values:
        if not isinstance(value, bool | int | float | str):
            raise RecipeError(f"{key}: {value!r} is no value of a recipe's key.")
        if values.count(value) > 1:
            raise RecipeError(f"{key} lists {value!r} twice. Name each value once.")
    return tuple(values)


def _checked(told: dict[str, Any]) -> dict[str, Any]:
    known = [*KINDS, *LISTS]
    for key, value in told.items():
        if key not in known:
            raise RecipeError(f"Unknown key 'study.{key}'.{nearest(key, known)}")
        if key in LISTS:
            if value != []:
                _values(f"study.{key}", value)
        elif not fits(value, KINDS[key]):
            shown = f"{type(value).__name__} {value!r}"
            raise RecipeError(f"study.{key} must be of type {KINDS[key].__name__}, not {shown}.")
    return told


def _tune(told: Mapping[str, Any]) -> Tune:
    fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in told.items()}
    return Tune(**fields)


def split(texts: str) -> list[str]:
    """Components separated by commas, of which those inside parentheses do not count."""
    found, depth, start = [], 0, 0
    for place, character in enumerate(texts):
        depth += (character == "(") - (character == ")")
        if character == "," and depth == 0:
            found.append(texts[start:place])
            start = place + 1
    return [text.strip() for text in [*found, texts[start:]] if text.strip()]


def seeds_of(text: str) -> list[int]:
    """The seeds of "0-4" or "0,1,7-9".

    Raises:
        RecipeError: it is neither.
    """
    seeds: list[int] = []
    for item in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", item)
        if not match:
            raise RecipeError(f"--seeds {text}: expected numbers and ranges, as in 0-4 or 0,1,7.")
        first = int(match[1])
        seeds += range(first, int(match[2] or first) + 1)
    return seeds
