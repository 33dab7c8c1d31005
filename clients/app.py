"""The ClientApp: translates messages, nothing more.

A simulated node hosts every client whose number is its own modulo the number of nodes, so that any
number of nodes can carry any number of clients; an institution's SuperNode hosts one.
"""

import json

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from clients import client as clients
from clients.client import Client
from fedtune import parts, shards, wire
from fedtune.config import Experiment
from fedtune.errors import RecipeError
from fedtune.wire import Address

app = ClientApp()


def _experiment(context: Context, arm: str) -> Experiment:
    experiment = Experiment.from_flat(context.run_config)
    if not experiment.name:
        experiment = experiment.replace(name=f"run-{context.run_id}")
    return parts.reference(experiment, arm) if arm else experiment


def hosted(context: Context, arm: str) -> dict[str, Client]:
    """The clients of this node by name."""
    experiment, node = _experiment(context, arm), dict(context.node_config)
    if "partition-id" not in node:
        client = clients.institution(experiment, tuple(sorted(node.items())))
        return {client.shard.name: client}
    own, nodes = int(node["partition-id"]), int(node["num-partitions"])
    everybody = sorted(clients.simulated(experiment).items())
    return {name: c for number, (name, c) in enumerate(everybody) if number % nodes == own}


def _addressed(message: Message, context: Context) -> tuple[Client, Address]:
    address = Address.of(message.content)
    here = hosted(context, address.arm)
    if address.client not in here:
        raise RecipeError(f"Client '{address.client}' is not here; here are {', '.join(here)}.")
    return here[address.client], address


@app.query("describe")
def describe(message: Message, context: Context) -> Message:
    """Who is here: names, numbers of rows, labels; label counts where the policy allows."""
    here = hosted(context, str(message.content[wire.CONFIG]["arm"]))
    described = []
    for name, client in here.items():
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
def train(message: Message, context: Context) -> Message:
    """One client's round."""
    client, address = _addressed(message, context)
    job = client.prepare(address, wire.unpack(message.content))
    trained, sums = client.train(job)
    sent = client.finish(job, trained)
    metrics = wire.metrics_record(sums, len(client.shard.train))
    content = RecordDict({wire.CONFIG: address.record(), **wire.pack(sent)})
    content[wire.METRICS] = metrics
    return Message(content, reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """One client's test rows."""
    client, address = _addressed(message, context)
    sums = client.evaluate(address, wire.unpack(message.content))
    content = RecordDict({wire.CONFIG: address.record(), wire.METRICS: wire.metrics_record(sums)})
    if address.scope == "own" and address.round == client.experiment.rounds:
        samples = json.dumps(client.samples(), ensure_ascii=False)
        content["samples"] = ConfigRecord({"samples": samples})
    return Message(content, reply_to=message)
