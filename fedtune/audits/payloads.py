"""What some clients of a run send in its first round: their own code, on their own rows.

The round is played again in a folder of its own, with copies of the run's secrets: the noise is the
run's own, nothing is charged to it and none of its files is touched.
"""

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from clients import client as clients
from clients.client import Client, Job
from fedtune import adapter, models, parts, vectorized
from fedtune.adapter import Adapter, State
from fedtune.audits.audited import Audited
from fedtune.config import Experiment
from fedtune.errors import RunError
from fedtune.heads import HeadRule
from fedtune.models import Model
from fedtune.privacy import central, mechanism, noise
from fedtune.privacy.clipping import CLIP
from fedtune.privacy.ledger import KEY
from fedtune.strategies.strategy import ClientInfo, Update
from fedtune.tokens import Examples
from fedtune.wire import Address


@dataclass(frozen=True)
class Played:
    """Round 1 of a few clients.

    Attributes:
        cohort: their names, the one with the fewest rows first.
        start: the LoRA tensors that the first of them began from.
        raw: its change of them without the recipe's protection.
        sent: its change of them as it leaves the client.
        other: the change that a client outside the cohort sends, None where there is none.
        joined: the mean of all their changes as it leaves the coordinator; None for a cohort of
            one, or of clients with adapters of different ranks.
        train: every client's encoded training rows.
        tests: the encoded test rows of all.
        model: the resident model, as it was before.
    """

    cohort: tuple[str, ...]
    start: Adapter
    raw: Adapter
    sent: Adapter
    other: Adapter | None
    joined: Adapter | None
    train: dict[str, Examples]
    tests: Examples
    model: Model


def play(audited: Audited, most: int) -> Played:
    """Round 1 of the clients with the fewest rows, at most `most` and never all of several.

    Raises:
        RunError: a client's training did not give finite numbers.
    """
    by_size = sorted((len(shard.train), shard.name) for shard in audited.shards)
    names = [name for _, name in by_size]
    many = max(1, min(most, len(names) - 1))
    cohort = names[:many]
    with _apart(audited) as e:
        everybody = clients.simulated(e)
        first = everybody[cohort[0]]
        model = first.model
        before = models.read(model)
        try:
            principal = first.parts.strategy.begins == "principal"
            initial = models.initial(model, e.seed, principal=principal)
            jobs, sent = _turns(e, everybody, names[: many + 1], initial)
            changes = [
                _change(job.plan.start["adapter"], state)
                for job, state in zip(jobs, sent, strict=True)
            ]
            raw = sent[0]
            if e.privacy.mode != "none":
                raw = _turns(_unprotected(e), everybody, cohort[:1], initial)[1][0]
            start = jobs[0].plan.start["adapter"]
            return Played(
                cohort=tuple(cohort),
                start=start,
                raw=_change(start, raw),
                sent=changes[0],
                other=changes[many] if len(names) > many else None,
                joined=_joined(e, everybody, cohort, changes, sent[:many], initial),
                train={name: client.examples for name, client in everybody.items()},
                tests=_tests(first),
                model=model,
            )
        finally:
            models.write(model, before)


@contextmanager
def _apart(audited: Audited) -> Iterator[Experiment]:
    """The run's recipe in an empty folder, with the run's secrets."""
    with tempfile.TemporaryDirectory(prefix="fedtune-audit-") as folder:
        experiment = audited.experiment.replace(output=folder)
        root = audited.run.folder
        for key in [root / KEY, *root.glob(f"clients/*/{KEY}")]:
            if key.exists():
                target = parts.folder_of(experiment) / key.relative_to(root)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(key, target)
        yield experiment


def _unprotected(e: Experiment) -> Experiment:
    return e.replace(
        privacy__mode="none", privacy__unit="", privacy__unit_rows=0, privacy__clip_quantile=0.0
    )


def _tests(client: Client) -> Examples:
    everybody = client.everybody
    assert everybody is not None  # a simulation's clients know it
    return everybody.tests


def _turns(
    e: Experiment, everybody: dict[str, Client], cohort: Sequence[str], initial: State
) -> tuple[list[Job], list[State]]:
    """The jobs of round 1 and what is sent after them."""
    playing = clients.simulated(e)
    chosen = [playing[name] for name in cohort]
    jobs = []
    for client in chosen:
        info = _info(e, everybody, client, initial)
        address = Address(e.run_id, "", 1, info.name, 0, "own", info.rank)
        jobs.append(client.prepare(address, _broadcast(e, client, info, initial)))
    first = chosen[0]
    work = [(job.plan, job.work) for job in jobs]
    outcomes = vectorized.train(first.model, first.parts.task, work, e.train)
    sent = []
    for client, job, outcome in zip(chosen, jobs, outcomes, strict=True):
        if isinstance(outcome, FloatingPointError):
            raise RunError(f"The first round of client '{client.shard.name}': {outcome}.")
        sent.append(client.finish(job, outcome.state))
    return jobs, sent


def _info(
    e: Experiment, everybody: dict[str, Client], client: Client, initial: State
) -> ClientInfo:
    """What the coordinator knows of a client; ranks are dealt in the order of names."""
    name, dealt, strategy = client.shard.name, e.adapter.dealt(), client.parts.strategy
    rank = dealt[sorted(everybody).index(name) % len(dealt)] if dealt else 0
    info = ClientInfo(name, len(client.shard.train), 0, rank)
    return replace(info, rank=strategy.client_rank(strategy.start(initial["adapter"]), info))


def _broadcast(e: Experiment, client: Client, info: ClientInfo, initial: State) -> State:
    """What the coordinator sends a client in round 1."""
    strategy = client.parts.strategy
    server = strategy.start(initial["adapter"])
    sent = strategy.broadcast(server, info, 1)
    if "head" in initial:
        sent = {**sent, "head": initial["head"]}
    if e.privacy.clip_quantile:
        sent = {**sent, CLIP: {CLIP: torch.tensor(e.privacy.clip, dtype=torch.float64)}}
    return sent


def _change(start: Adapter, sent: State) -> Adapter:
    """The change of LoRA tensors that a message tells."""
    if "delta" in sent:
        return sent["delta"]
    whole = sent.get("adapter", {})
    return {name: tensor - start[name] for name, tensor in whole.items() if name in start}


def _joined(
    e: Experiment,
    everybody: dict[str, Client],
    cohort: Sequence[str],
    changes: Sequence[Adapter],
    sent: Sequence[State],
    initial: State,
) -> Adapter | None:
    if len(cohort) < 2:
        return None
    if e.privacy.mode == "client":
        return _released(e, everybody, cohort, sent, initial)
    own = changes[: len(cohort)]
    shapes = [{name: tensor.shape for name, tensor in change.items()} for change in own]
    if any(those != shapes[0] for those in shapes):
        return None
    examples = [float(len(everybody[name].shard.train)) for name in cohort]
    weights = examples if e.weighting == "examples" else [1.0] * len(cohort)
    return adapter.weighted_mean(own, weights)


def _released(
    e: Experiment,
    everybody: dict[str, Client],
    cohort: Sequence[str],
    sent: Sequence[State],
    initial: State,
) -> Adapter:
    """The noisy mean of client mode, in which only these clients took part."""
    found = everybody[cohort[0]].parts
    updates = [Update(name, 1.0, state) for name, state in zip(cohort, sent, strict=True)]
    schema = found.strategy.payload(initial["adapter"], ClientInfo("any", 1), 1)
    if HeadRule.of(found.task, found.strategy).shared and "head" in initial:
        schema = {**schema, "head": initial["head"]}
    done = central.release(
        updates,
        schema,
        mechanism.client(e, found.cohort, len(everybody)),
        e.privacy,
        e.privacy.clip,
        noise.load_key(Path(parts.folder_of(e), KEY)),
        e.run_id,
        1,
        central.inputs_hash(updates, "audit"),
    )
    return done.update.state["delta"]
