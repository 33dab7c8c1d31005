"""Does the noise hide what it says? The run's own release path, thousands of times, from outside.

A worst-case canary is in the data or not, the path that made the run's models (fedtune/privacy, the
strategy, the coordinator's join) releases a noisy mean with a new key each time, and whoever sees
it must tell the sides apart no better than the ledger's epsilon of one release allows (checks.py
has that and what it cannot see). The rate of sampling and what rounds.jsonl tells come beside it.
Steps and rounds are composed by the accountant, which its own oracles test.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path as FilePath

import numpy as np
import torch
from safetensors import safe_open

from fedtune.adapter import Adapter
from fedtune.audits import draws
from fedtune.audits.audited import Audited
from fedtune.audits.checks import TOLERANCE, Check, checked, measured
from fedtune.audits.draws import Interval
from fedtune.audits.finding import (
    BROKEN,
    HOLDS,
    INVALID,
    Finding,
    Measure,
    NotApplicableError,
    Verdict,
)
from fedtune.audits.paths import Central, Local, Path, Step, Trained, directions
from fedtune.audits.sides import keys_of
from fedtune.cohorts import Poisson
from fedtune.config import Experiment
from fedtune.heads import HeadRule
from fedtune.parts import Parts
from fedtune.privacy import noise, spending, steps, verifying
from fedtune.privacy.clipping import CLIP
from fedtune.privacy.mechanism import Mechanism

FAR = 10.0  # norm of the model's weights over the clip
SIDE, MODULES = 4, 1  # of a tensor in miniature, and how many modules
COINS = 100_000  # of the check of sampling


def audit(audited: Audited) -> Finding:
    """The finding for the worst-off client of a run.

    Raises:
        NotApplicableError: the run promises nothing, or by another mechanism.
    """
    mode = audited.experiment.privacy.mode
    if mode not in ("record", "client", "local"):
        why = "promises nothing" if mode == "none" else "adds its noise inside masked sums"
        raise NotApplicableError(f"privacy.mode = '{mode}' {why}: there is no noisy mean to test.")
    verified = verifying.verify(audited.run.folder)
    own = spending.ever(verified.lines)[verified.worst]
    weights = far(_miniature(audited.run.folder), own.clip)
    path = path_of(audited.experiment, audited.parts, own, weights)
    checks = [*checked(path), *_sampled(audited, own), _silent(audited)]
    return _finding(audited, path, checks)


def path_of(experiment: Experiment, parts: Parts, mechanism: Mechanism, weights: Adapter) -> Path:
    """The release path of a recipe for a model of these weights, adapter and head."""
    adapter = {name: tensor for name, tensor in weights.items() if "lora_" in name}
    head = {name: tensor for name, tensor in weights.items() if name not in adapter}
    server = parts.strategy.start(adapter)
    server = {**server, "head": head} if head else server
    if experiment.privacy.clip_quantile:
        clip = torch.tensor(experiment.privacy.clip, dtype=torch.float64)
        server = {**server, CLIP: {CLIP: clip}}
    central = Central(mechanism, {}, experiment, parts, server)
    _, plan = central.turn(Trained("any", 1, {}))
    trainable = plan.trainable
    if HeadRule.of(parts.task, parts.strategy).trained:
        trainable = trainable | frozenset(head)
    shapes = {n: t.shape for own in plan.start.values() for n, t in own.items() if n in trainable}
    if mechanism.mode == "record":
        return Step(mechanism, shapes)
    if mechanism.mode == "local":
        return Local(mechanism, shapes)
    return replace(central, shapes=shapes)


def _miniature(folder: FilePath) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the run's first modules and head, cut to a few rows and columns."""
    file = folder / "adapter" / "adapter_model.safetensors"
    with safe_open(file, "pt") as opened:
        names = list(opened.keys())
        shapes = {name: opened.get_slice(name).get_shape() for name in names}
    modules = list(dict.fromkeys(n.split(".lora_")[0] for n in shapes if ".lora_" in n))[:MODULES]
    return {
        name: tuple(min(SIDE, size) for size in shape)
        for name, shape in shapes.items()
        if ".lora_" not in name or name.split(".lora_")[0] in modules
    }


def far(shapes: Mapping[str, tuple[int, ...]], clip: float) -> Adapter:
    """Weights whose norm is far above the clip, so that whoever bounds them is found out."""
    sized = {name: torch.Size(shape) for name, shape in shapes.items()}
    return {name: FAR * clip * tensor for name, tensor in directions(sized).items()}


def _sampled(audited: Audited, mechanism: Mechanism) -> list[Check]:
    """How often a unit takes part, over the claimed rate; nothing where all do."""
    if mechanism.sampling != "poisson":
        return []
    units = min(mechanism.units, 1000)
    rounds = -(-COINS // units)
    key = keys_of(1, "sampling")[0]
    cohort = audited.parts.cohort
    if mechanism.mode == "record":
        rows = [[row] for row in range(units)]
        taken = sum(len(r) for r, _ in steps.drawn(rows, mechanism.rate, rounds, 0, key, "audit"))
    elif isinstance(cohort, Poisson):
        names = [f"client-{number}" for number in range(units)]
        secret = noise.secret_seed(key, "audit", "cohort")
        taken = sum(len(cohort.draw(names, round, secret)) for round in range(1, rounds + 1))
    else:
        return []
    low, high = draws.clopper_pearson(np.array([float(taken)]), units * rounds)
    numbers = (taken / units / rounds, float(low[0]), float(high[0]))
    ratio = Interval(*(number / mechanism.rate for number in numbers))
    told = f"units are sampled {ratio.value:.3g} times as often as claimed"
    measure = measured("rate of sampling over the claimed", ratio, "Clopper-Pearson", 1.0)
    return [Check(measure, told if ratio.low > TOLERANCE else "")]


def _silent(audited: Audited) -> Check:
    """Rounds of the run whose record tells what its promise does not cover."""
    told = [
        record.round
        for record in audited.run.records
        if any(record.train.values())
        or (audited.experiment.privacy.mode == "client" and record.aggregation)
    ]
    measure = Measure("rounds that tell figures of training rows", len(told), allowed=0.0)
    return Check(measure, f"rounds.jsonl tells them in round {told[0]}" if told else "")


def _finding(audited: Audited, path: Path, checks: Sequence[Check]) -> Finding:
    broken = [check.broken for check in checks if check.broken]
    controls = [check for check in checks if check.control]
    seen = any(check.seen for check in controls)
    own, claim = path.mechanism, audited.claim
    verdict: Verdict = BROKEN if broken else (HOLDS if seen else INVALID)
    reason = "no check contradicts the claim"
    if not seen:
        reason = "so few draws would not have shown a quarter of the noise either"
    return Finding(
        audit="mechanism",
        question="Does the run's own noisy mean hide one worst-case unit as its epsilon says?",
        adversary=f"knows all other data and sees every release; against {own.adversary}",
        measures=tuple(check.measure for check in checks),
        claim=claim.text if claim else "none",
        verdict=verdict,
        reason="; ".join(broken) or reason,
        validity="; ".join(check.control for check in controls),
    )
