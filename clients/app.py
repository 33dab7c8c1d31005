"""The ClientApp: translates messages, nothing more.

A simulated node hosts every client whose number is its own modulo the number of nodes, so that any
number of nodes can carry any number of clients; an institution's SuperNode hosts one.
"""

import functools
import json
import logging
from collections.abc import Callable

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from clients import client as clients
from clients.client import Client, Job
from fedtune import parts, shards, wire
from fedtune.adapter import State
from fedtune.config import Experiment
from fedtune.errors import FedTuneError, RecipeError, RunError
from fedtune.records import Sums
from fedtune.wire import Address, RejectedError

log = logging.getLogger("fedtune")
app = ClientApp()


def _experiment(context: Context) -> Experiment:
    experiment = Experiment.from_flat(context.run_config)
    if not experiment.name:
        experiment = experiment.replace(name=f"run-{context.run_id}")
    return experiment


def hosted(context: Context, arm: str) -> dict[str, Client]:
    """The clients of this node by name."""
    whole, node = _experiment(context), dict(context.node_config)
    experiment = parts.reference(whole, arm) if arm else whole
    if "partition-id" not in node:
        client = clients.institution(experiment, whole.run_id, tuple(sorted(node.items())))
        return {client.shard.name: client}
    own, nodes = int(node["partition-id"]), int(node["num-partitions"])
    everybody = sorted(clients.simulated(experiment).items())
    return {name: c for number, (name, c) in enumerate(everybody) if number % nodes == own}


def _guarded(
    answer: Callable[[Message, Context], Message],
) -> Callable[[Message, Context], Message]:
    """Tell the coordinator why this client failed, but never what stood in a row.

    FedTune's own errors quote no rows. Those of libraries may, so an institution sends only their
    kind and keeps the rest in its own log.
    """

    @functools.wraps(answer)
    def guarded(message: Message, context: Context) -> Message:
        try:
            return answer(message, context)
        except (FedTuneError, FloatingPointError, RejectedError):
            raise
        except Exception as error:
            if "partition-id" in context.node_config:
                raise
            log.exception("this client failed")
            raise RunError(f"{type(error).__name__}, see this client's own log") from None

    return guarded


def _addressed(message: Message, context: Context) -> tuple[Client, Address]:
    address = Address.of(message.content)
    here = hosted(context, address.arm)
    if address.client not in here:
        raise RecipeError(f"Client '{address.client}' is not here; here are {', '.join(here)}.")
    return here[address.client], address


@app.query("describe")
@_guarded
def describe(message: Message, context: Context) -> Message:
    """Who is here: names, numbers of rows, labels; label counts where the policy allows."""
    here = hosted(context, str(message.content[wire.CONFIG]["arm"]))
    described = []
    for name, client in here.items():
        client.require_rows()
        column = client.parts.task.label_column
        counts = shards.mix([client.shard], column)[name] if column else None
        described.append(
            {
                "name": name,
                "examples": len(client.shard.train),
                "test_examples": len(client.shard.test),
                "mix": counts if client.policy.label_counts else None,
                "labels": list(client.labels),
            }
        )
    nodes = int(context.node_config.get("num-partitions", 0))
    record = ConfigRecord({"clients": json.dumps(described), "nodes": nodes})
    return Message(RecordDict({wire.CONFIG: record}), reply_to=message)


@app.train()
@_guarded
def train(message: Message, context: Context) -> Message:
    """One client's round."""
    client, job = opened(message, context)
    return closed(message, client, job, *client.train(job))


def opened(message: Message, context: Context) -> tuple[Client, Job]:
    """The client and the job of a train message; engines that train jobs together begin here."""
    client, address = _addressed(message, context)
    return client, client.prepare(address, wire.unpack(message.content))


def closed(message: Message, client: Client, job: Job, trained: State, sums: Sums) -> Message:
    """The reply to a train message, once its job was trained."""
    sent = client.finish(job, trained)
    content = RecordDict({wire.CONFIG: job.address.record(), **wire.pack(sent)})
    content[wire.METRICS] = wire.metrics_record(sums, len(client.shard.train))
    return Message(content, reply_to=message)


@app.evaluate()
@_guarded
def evaluate(message: Message, context: Context) -> Message:
    """One client's test rows."""
    client, address = _addressed(message, context)
    sums = client.evaluate(address, wire.unpack(message.content))
    content = RecordDict({wire.CONFIG: address.record(), wire.METRICS: wire.metrics_record(sums)})
    if address.scope == "own" and address.round == client.experiment.rounds:
        content[wire.SAMPLES] = wire.samples_record(client.samples())
    return Message(content, reply_to=message)
