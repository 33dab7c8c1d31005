"""The ClientApp: translates messages, nothing more.

An institution's SuperNode hosts one client. The nodes of a simulation can each play any client,
since the rows are at hand and what a client keeps lies on the disk; for the roster alone each
speaks for its share of them. Such a node takes the turns of several clients in one message, a
bundle, and trains them together; the reply bundles theirs, a fault of one being its own.
"""

import functools
import json
import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from clients import client as clients
from clients import secure_aggregation
from clients.client import Client, Job, Trial
from clients.secure_aggregation import Desk
from fedtune import adapter, parts, resident, shards, vectorized, wire
from fedtune.config import Experiment, Leaf
from fedtune.errors import FedTuneError, RecipeError, RunError
from fedtune.privacy.letters import Signed
from fedtune.privacy.stages import Mask
from fedtune.records import Sums
from fedtune.training import Trained
from fedtune.wire import Address, RejectedError

log = logging.getLogger("fedtune")
app = ClientApp()
TOGETHER = "together"  # in a simulated node's configuration: clients a message, 0 for its own guess
Turn = TypeVar("Turn", bound=tuple[Any, ...])
Outcome = TypeVar("Outcome")


def answer(message: Message, context: Context) -> Message:
    """What `app` answers; unlike it, a function by name, which another process can be given."""
    return app(message, context)


def _experiment(context: Context) -> Experiment:
    return _read(tuple(context.run_config.items()), context.run_id)


@functools.lru_cache(maxsize=4)  # every turn of a run asks
def _read(run_config: tuple[tuple[str, Leaf], ...], run_id: int) -> Experiment:
    experiment = Experiment.from_flat(dict(run_config))
    return experiment if experiment.name else experiment.replace(name=f"run-{run_id}")


@functools.lru_cache(maxsize=16)
def _of_arm(experiment: Experiment, arm: str) -> Experiment:
    return parts.reference(experiment, arm) if arm else experiment


def hosted(context: Context, arm: str) -> dict[str, Client]:
    """The clients that this node can play, by name."""
    whole, node = _experiment(context), dict(context.node_config)
    experiment = _of_arm(whole, arm)
    if _simulates(context):
        return clients.simulated(experiment)
    if arm and whole.secure_aggregation != "none":
        raise RecipeError(
            f"references = '{whole.references}' would be a second sum over the same updates, which "
            "secure aggregation must not give. Set references = 'none'."
        )
    if arm and whole.privacy.mode != "none":
        raise RecipeError(
            f"references = '{whole.references}' would train on this client's rows without the "
            f"noise of privacy.mode = '{whole.privacy.mode}'. Only a simulation may compare so: "
            "set references = 'none'."
        )
    client = clients.institution(experiment, whole.run_id, tuple(sorted(node.items())))
    return {client.shard.name: client}


def _simulates(context: Context) -> bool:
    return "partition-id" in context.node_config


def _share(context: Context, everybody: dict[str, Client]) -> dict[str, Client]:
    """The clients that this node describes."""
    if not _simulates(context):
        return everybody
    own, nodes = (int(context.node_config[key]) for key in ("partition-id", "num-partitions"))
    return {name: c for i, (name, c) in enumerate(sorted(everybody.items())) if i % nodes == own}


def _together(context: Context, everybody: Iterable[Client]) -> int:
    """How many clients this node wants in one message."""
    wanted = int(context.node_config.get(TOGETHER, 0)) if _simulates(context) else 1
    if wanted:
        return wanted
    here, nodes = list(everybody), int(context.node_config["num-partitions"])
    lengths = [length for client in here for length in client.examples.lengths.tolist()]
    e = here[0].experiment
    noisy = e.privacy.mode == "record"
    return resident.together(here[0].model, e.train, lengths, nodes, noisy=noisy)


def _told(error: Exception, context: Context) -> Exception:
    """What the coordinator may know of a fault: why, but never what stood in a row.

    FedTune's own errors quote no rows. Those of libraries may, so an institution sends only their
    kind and keeps the rest in its own log.
    """
    own = isinstance(error, FedTuneError | FloatingPointError | RejectedError)
    if own or _simulates(context):
        return error
    log.error("this client failed", exc_info=error)
    return RunError(f"{type(error).__name__}, see this client's own log")


def _guarded(
    answer: Callable[[Message, Context], Message],
) -> Callable[[Message, Context], Message]:
    """Let out of a handler only what `_told` lets out."""

    @functools.wraps(answer)
    def guarded(message: Message, context: Context) -> Message:
        try:
            return answer(message, context)
        except Exception as error:
            told = _told(error, context)
            if told is error:
                raise
            raise told from None

    return guarded


def _addressed(content: RecordDict, context: Context) -> tuple[Client, Address]:
    address = Address.of(content)
    here = hosted(context, address.arm)
    if address.client not in here:
        raise RecipeError(f"Client '{address.client}' is not here; here are {', '.join(here)}.")
    return here[address.client], address


@app.query("describe")
@_guarded
def describe(message: Message, context: Context) -> Message:
    """Who is here: names, numbers of rows, labels; label counts where the policy allows."""
    everybody = hosted(context, str(message.content[wire.CONFIG]["arm"]))
    here = _share(context, everybody)
    described = []
    for name, client in here.items():
        client.require_rows()
        column = client.parts.task.label_column
        counts = shards.mix([client.shard], column)[name] if column else None
        key, mode = client.identity, client.experiment.privacy.mode
        # What is masked, or protected as a whole, does not tell its size here either; a client
        # whose records are protected does, since noise is to be charged by their number.
        hides = mode != "record" and (key or mode != "none") and not _simulates(context)
        described.append(
            {
                "name": name,
                "examples": 0 if hides else len(client.shard.train),
                "identity": key.public.hex() if key else "",
                "manifest": key.manifest.digest().hex() if key else "",
                "test_examples": len(client.shard.test),
                "mix": counts if client.policy.label_counts else None,
                "labels": list(client.labels),
                "units": 0 if hides else client.units,
            }
        )
    nodes = int(context.node_config.get("num-partitions", 0))
    together = _together(context, everybody.values())
    record = ConfigRecord({"clients": json.dumps(described), "nodes": nodes, "together": together})
    return Message(RecordDict({wire.CONFIG: record}), reply_to=message)


@app.train()
@_guarded
def train(message: Message, context: Context) -> Message:
    """One client's round."""
    client, job = _opened(message.content, context)
    return Message(_closed(client, job, client.train(job)), reply_to=message)


@app.evaluate()
@_guarded
def evaluate(message: Message, context: Context) -> Message:
    """One client's test rows."""
    client, address, trial = _tried(message.content, context)
    (sums,) = _evaluated([(client, address, trial)])
    return Message(_measured(client, address, trial, sums), reply_to=message)


def _opened(content: RecordDict, context: Context) -> tuple[Client, Job]:
    client, address = _addressed(content, context)
    if client.identity:
        raise RecipeError("This client sends masked updates only; this message asks for its own.")
    return client, client.prepare(address, wire.unpack(content))


def _closed(client: Client, job: Job, trained: Trained) -> RecordDict:
    sent = client.finish(job, trained.state)
    content = RecordDict({wire.CONFIG: job.address.record(), **wire.pack(sent)})
    mode = client.experiment.privacy.mode
    if mode == "none":
        tokens = [trained.tokens, trained.computed]
        content[wire.METRICS] = wire.metrics_record(trained.sums, len(client.shard.train), tokens)
    else:
        # Losses and counts of training rows are releases too, and nothing has paid for them.
        examples = len(client.shard.train) if mode == "record" else 1
        content[wire.METRICS] = wire.metrics_record({}, examples)
    return content


def _tried(content: RecordDict, context: Context) -> tuple[Client, Address, Trial]:
    client, address = _addressed(content, context)
    return client, address, client.trial(address, wire.unpack(content))


def _measured(client: Client, address: Address, trial: Trial, sums: Sums) -> RecordDict:
    content = RecordDict({wire.CONFIG: address.record(), wire.METRICS: wire.metrics_record(sums)})
    if address.scope == "own" and address.round == client.experiment.rounds:
        content[wire.SAMPLES] = wire.samples_record(client.samples(trial[0]))
    return content


@app.train("cohort")
@_guarded
def train_cohort(message: Message, context: Context) -> Message:
    """The rounds of a bundle's clients, trained together."""
    return _bundled(message, context, _opened, _trained, _closed)


@app.evaluate("cohort")
@_guarded
def evaluate_cohort(message: Message, context: Context) -> Message:
    """The test rows of a bundle's clients."""
    return _bundled(message, context, _tried, _evaluated, _measured)


def _trained(turns: Sequence[tuple[Client, Job]]) -> Sequence[Trained | FloatingPointError]:
    """The outcome of each job; all clients of a run share model, task and settings."""
    first = turns[0][0]
    model, settings = first.model, first.experiment.train
    jobs = [(job.plan, job.work) for _, job in turns]
    if reason := vectorized.obstacle(model, jobs):
        _say_once(turns[0][1].address.run, reason)
    return vectorized.train(model, first.parts.task, jobs, settings)


@functools.lru_cache(maxsize=64)
def _say_once(run: str, reason: str) -> None:
    log.warning("clients are trained one after another: %s", reason)


def _evaluated(turns: Sequence[tuple[Client, Address, Trial]]) -> Sequence[Sums]:
    first, trials = turns[0][0], [trial for _, _, trial in turns]
    model, task, attack = first.model, first.parts.task, first.parts.attack
    size = first.experiment.evaluation.batch_size
    measured = vectorized.evaluate(model, task, trials, size)
    if not attack.metrics:
        return measured
    aimed = [(plan, client.triggered(address)) for client, address, (plan, _) in turns]
    hit = vectorized.evaluate(model, task, aimed, size)
    return [{**own, **attack.measured(sums)} for own, sums in zip(measured, hit, strict=True)]


def _bundled(
    message: Message,
    context: Context,
    begin: Callable[[RecordDict, Context], Turn],
    compute: Callable[[Sequence[Turn]], Sequence[Outcome]],
    end: Callable[..., RecordDict],
) -> Message:
    """The replies to a bundle's turns, each begun and ended on its own and computed together."""
    contents = wire.unbundle(message.content)
    if len(contents) != 1 and not _simulates(context):
        raise RecipeError(f"A message for {len(contents)} clients; an institution is one.")
    replies: list[RecordDict | Exception] = []
    begun: dict[int, Turn] = {}
    for number, content in enumerate(contents):
        try:
            begun[number] = begin(content, context)
            replies.append(RecordDict())
        except Exception as error:
            replies.append(error)
    outcomes = compute(list(begun.values())) if begun else []
    for (number, turn), outcome in zip(begun.items(), outcomes, strict=True):
        try:
            replies[number] = outcome if isinstance(outcome, Exception) else end(*turn, outcome)
        except Exception as error:
            replies[number] = error
    return Message(wire.bundle([_reply(reply, context) for reply in replies]), reply_to=message)


def _reply(reply: RecordDict | Exception, context: Context) -> RecordDict:
    if isinstance(reply, RecordDict):
        return reply
    told = _told(reply, context)
    return wire.fault(f"{type(told).__name__}: {told}")


Masking = tuple[Client, Job, Desk, Mask]
Answered = tuple[Address, Signed]


def _desk(content: RecordDict, context: Context) -> tuple[Client, Address, Desk, bytes]:
    """Who answers a letter of secure aggregation, and the letter's body."""
    client, address = _addressed(content, context)
    desk = secure_aggregation.desk_of(client, f"{_experiment(context).run_id}/{address.arm}")
    return client, address, desk, wire.letter_of(content)[0]


def _unsealed(content: RecordDict, context: Context) -> Masking:
    client, address, desk, body = _desk(content, context)
    received = wire.unpack(content)
    mask = desk.mask(body, bytes.fromhex(adapter.digest(received)))
    # What a round pays for is told by the address, and what its noise is made of by the letter.
    if address.round != mask.head.session.round:
        raise RejectedError(
            "E_REPLAY",
            f"the letter is of round {mask.head.session.round}, its model of {address.round}",
        )
    return client, client.prepare(address, received), desk, mask


def _hidden(client: Client, job: Job, desk: Desk, mask: Mask, trained: Trained) -> RecordDict:
    """The masked words and nothing else: no metrics, no counts."""
    sent, tells = client.finish(job, trained.state), client.experiment.privacy.mode == "none"
    tokens = [float(trained.tokens), float(trained.computed)] if tells else [0.0, 0.0]
    sums = trained.sums if tells else {}
    words = desk.masked(mask, sent, len(client.shard.train), sums, tokens)
    signed = desk.signed(mask, words)
    letter = wire.letter_record(signed.body, signed.signature)
    records = {wire.CONFIG: job.address.record(), wire.LETTER: letter}
    return RecordDict({**records, wire.WORDS: wire.words_record(words)})


def _lettered(address: Address, signed: Signed) -> RecordDict:
    letter = wire.letter_record(signed.body, signed.signature)
    return RecordDict({wire.CONFIG: address.record(), wire.LETTER: letter})


@app.train("masked")
@_guarded
def train_masked(message: Message, context: Context) -> Message:
    """Leg 3 of secure aggregation: one client's round, and its masked update."""
    client, job, desk, mask = _unsealed(message.content, context)
    return Message(_hidden(client, job, desk, mask, client.train(job)), reply_to=message)


@app.train("masked_cohort")
@_guarded
def train_masked_cohort(message: Message, context: Context) -> Message:
    """Leg 3 of a bundle's clients, trained together."""

    def trained(turns: Sequence[Masking]) -> Sequence[Trained | FloatingPointError]:
        return _trained([(client, job) for client, job, _, _ in turns])

    return _bundled(message, context, _unsealed, trained, _hidden)


def _leg(leg: str) -> None:
    """Register the answers to a leg without a model, of one client and of a bundle's."""

    def begin(content: RecordDict, context: Context) -> Answered:
        _, address, desk, body = _desk(content, context)
        return address, desk.answer(leg, body)

    def one(message: Message, context: Context) -> Message:
        return Message(_lettered(*begin(message.content, context)), reply_to=message)

    def many(message: Message, context: Context) -> Message:
        return _bundled(message, context, begin, list, lambda *turn: _lettered(*turn[-1]))

    app.train(leg)(_guarded(one))
    app.train(f"{leg}_cohort")(_guarded(many))


for _name in ("keys", "shares", "sign", "reveal"):
    _leg(_name)
