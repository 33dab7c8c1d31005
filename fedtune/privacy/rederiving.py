"""What a recipe and its roster say that a ledger must hold: derived again, and compared.

A ledger whose chain and sums are right may still tell of another run: of a smaller rate, fewer
steps or more noise than the recipe asks for, or of releases that nobody paid. Everything here
follows from the recipe, the clients and the order of the lines; nothing is taken from a line that
can be derived.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from fedtune.cohorts import COHORTS, Cohort
from fedtune.components import build
from fedtune.config import Experiment
from fedtune.errors import RecipeError
from fedtune.privacy import central, distributed, mechanism, noise, spending
from fedtune.privacy.ledger import BEGIN, LedgerError, Line
from fedtune.privacy.mechanism import Mechanism
from fedtune.privacy.spending import CHARGE, RELEASE

FOUND = 1e-3  # relative difference of a noise found from a budget, on another machine
SAME = 1e-9  # of a number computed in the same way


def require(experiment: Experiment, units: Mapping[str, int], lines: Sequence[Line]) -> None:
    """Compare every line with what the recipe and the roster make of it.

    Args:
        experiment: the recipe of the run's folder.
        units: client -> its records, by roster.json; 0 in other modes than record.
        lines: of the ledger, whose chain was checked.

    Raises:
        LedgerError: a line says something else; it is named.
    """
    cohort: Cohort = build(experiment.cohort, COHORTS, "cohort")
    begun = [line for line in lines if line["kind"] == BEGIN]
    mechanisms: dict[str, Mechanism] = {}
    era: list[Line] = []  # since the mechanisms are what they are
    for line in lines:
        try:
            if line["kind"] == BEGIN:
                told = _begun(experiment, cohort, line)
                if line is begun[-1]:
                    _require_roster(experiment, units, told, line)
                era = era if told == mechanisms else []
                mechanisms = told
            elif line["kind"] == CHARGE:
                _require_charge(experiment, mechanisms, line)
            elif line["kind"] == RELEASE:
                _require_release(experiment, mechanisms, era, line)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise _wrong(line, f"lacks what such a line tells ({error!r})") from error
        era.append(line)


def _wrong(line: Line, how: str) -> LedgerError:
    return LedgerError(f"Line {line['seq'] + 1} of the ledger {how}.")


def _begun(experiment: Experiment, cohort: Cohort, line: Line) -> dict[str, Mechanism]:
    """The mechanisms of a "begin" line, found equal to those of the recipe for its clients."""
    if line["recipe"] != experiment.identity():
        raise _wrong(line, "begins another recipe than the run's")
    if line["run"] != experiment.run_id or line["mode"] != experiment.privacy.mode:
        raise _wrong(line, f"begins another run or mode than {experiment.run_id}'s")
    told = spending.mechanisms_of(line)
    units = {name: own.units for name, own in told.items()}
    if experiment.privacy.mode == "client":
        units = dict.fromkeys(map(str, range(told[""].units)), 0)
    try:
        derived = mechanism.of_roster(experiment, cohort, units)
    except RecipeError as error:
        raise _wrong(line, f"tells of clients that the recipe does not fit: {error}") from error
    if odd := told.keys() ^ derived.keys():
        raise _wrong(line, f"tells of mechanisms of {sorted(odd)} that the recipe has not")
    for name, own in derived.items():
        _require_mechanism(experiment, name, told[name], own, line)
    return told


def _require_mechanism(
    experiment: Experiment, name: str, told: Mechanism, derived: Mechanism, line: Line
) -> None:
    tolerance = 0.0 if experiment.privacy.noise else FOUND
    for field, value in asdict(derived).items():
        said = getattr(told, field)
        near = field == "noise" and math.isclose(said, value, rel_tol=tolerance)
        if said != value and not near:
            whose = f" for '{name}'" if name else ""
            raise _wrong(line, f"says {field} = {said}{whose}, but the recipe makes it {value}")


def _require_roster(
    experiment: Experiment, units: Mapping[str, int], told: Mapping[str, Mechanism], line: Line
) -> None:
    """The population that the ledger ends with is that of roster.json."""
    mode = experiment.privacy.mode
    found: Any = {name: own.units for name, own in told.items()}
    wanted: Any = dict(units)
    if mode == "client":
        found, wanted = told[""].units, len(units)
    elif mode != "record":
        found, wanted = sorted(told), sorted(units)
    if found != wanted:
        raise _wrong(line, f"is about {found}, but roster.json about {wanted}")


def _require_charge(experiment: Experiment, told: Mapping[str, Mechanism], line: Line) -> None:
    if line["round"] not in range(1, experiment.rounds + 1):
        raise _wrong(line, f"charges round {line['round']} of a run of {experiment.rounds}")
    if not line["clients"] or (odd := set(line["clients"]) - told.keys()):
        named = sorted(odd) if line["clients"] else "nobody"
        raise _wrong(line, f"charges {named}, who is not in the run")
    own = told.get(line["worst"])
    if own is None or line["mechanism"] != asdict(own) or line["sigma_abs"] != own.sigma:
        raise _wrong(line, "has another mechanism or noise than its clients")


def _require_release(
    experiment: Experiment, told: Mapping[str, Mechanism], era: Sequence[Line], line: Line
) -> None:
    """What a round released was charged before, and is what was charged."""
    charges = [x for x in era if x["kind"] == CHARGE and x["round"] == line["round"]]
    released = [x for x in era if x["kind"] == RELEASE and x["round"] == line["round"]]
    if "" in told:
        inputs = {x["inputs"] for x in released} | {line["inputs"]}
        unpaid = len(inputs) > len(charges)
        _require_parameters(experiment, told[""], line)
    else:
        paid = {name for x in charges if x["inputs"] == line["inputs"] for name in x["clients"]}
        unpaid = not set(line["clients"]) <= paid
        own = told[line["clients"][0]] if line["clients"] else None
        if own and own.mode == mechanism.DISTRIBUTED and (why := distributed.lacking(line, own)):
            raise _wrong(line, f"tells of {why}")
    if unpaid:
        raise _wrong(line, f"releases what no charge of round {line['round']} has paid")


def _require_parameters(experiment: Experiment, own: Mechanism, line: Line) -> None:
    """Clip, noise, denominator and grid of a noisy sum."""
    settings, clip = experiment.privacy, line["clip"]
    multiplier, _ = central.split(own, settings.clip_quantile)
    wanted = {
        "clip": clip if settings.clip_quantile else settings.clip,
        "sigma_abs": multiplier * clip,
        "denominator": own.denominator,
    }
    wanted["grid"] = noise.grid_of(wanted["sigma_abs"])
    for key, value in wanted.items():
        if not math.isclose(line[key], value, rel_tol=SAME):
            raise _wrong(line, f"releases with {key} = {line[key]}, but {value} was charged")
