"""What secure aggregation costs in a round: CPU seconds of a client and the coordinator, bytes.

    python experiments/benchmarks/masking.py --clients 4,8,16,32 --parameters 300000,1000000

Everything but training is real: keys, letters, signatures, files, masks and the sum, through the
coordinator's own code, on one core. The clients answer in turn; a client's seconds are its share.
Bytes are relative to four a parameter and client.
"""

import argparse
import logging
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from flwr.app import Message, RecordDict
from flwr.common.serde import message_to_proto

from clients.local import NODE, LocalGrid, failed, identified
from clients.secure_aggregation import Desk
from fedtune import adapter, wire
from fedtune.adapter import State
from fedtune.privacy.identity import Identity, simulated
from fedtune.privacy.secure import Masked
from fedtune.privacy.stages import Rules
from fedtune.wire import Address
from server import secure_aggregation
from server.roster import Member, Roster

CONFIG, RUN, METRICS = b"config", "bench/", {"accuracy": 2, "loss": 2}


class Desks(LocalGrid):
    """Clients without a model: each sends the same update."""

    def __init__(self, identities: dict[str, Identity], update: State, folder: Path, gone: int):
        super().__init__({}, len(identities))
        self.update, self.seconds, self.gone = update, 0.0, list(identities)[:gone]
        self.up = self.down = 0
        self.serialising = 0.0
        self.desks = {
            name: Desk(folder / name, Rules(identity, RUN, 1, CONFIG, Masked(), "examples"))
            for name, identity in identities.items()
        }

    def answers(self, messages: Sequence[Message]) -> Iterator[Message]:
        for message in messages:
            began = time.process_time()
            reply = self.answer(message)
            answered = time.process_time()
            self.seconds += answered - began
            self.down += serialised(message)
            self.up += serialised(reply)
            self.serialising += time.process_time() - answered
            yield reply

    def answer(self, message: Message) -> Message:
        address, leg = Address.of(message.content), message.metadata.message_type.split(".")[1]
        desk, (body, _) = self.desks[address.client], wire.letter_of(message.content)
        content = RecordDict({wire.CONFIG: address.record()})
        if leg != "masked":
            signed = desk.answer(leg, body)
        elif address.client in self.gone:
            return failed(message, "gone")
        else:
            received = wire.unpack(message.content)
            mask = desk.mask(body, bytes.fromhex(adapter.digest(received)))
            sums = {"accuracy": [1.0, 2.0], "loss": [0.5, 2.0]}
            words = desk.masked(mask, self.update, 100, sums, [64.0, 64.0])
            content[wire.WORDS] = wire.words_record(words)
            signed = desk.signed(mask, words)
        content[wire.LETTER] = wire.letter_record(signed.body, signed.signature)
        return identified(Message(content, reply_to=message))


def _ignored(*_: object) -> None:
    pass


def serialised(message: Message) -> int:
    """Bytes of a message as Flower serialises it."""
    return len(message_to_proto(message).SerializeToString())


def measured(count: int, parameters: int, gone: int) -> dict[str, float]:
    """One round of so many clients, of which `gone` drop out before their words arrive."""
    update = {"delta": {"values": torch.randn(parameters) * 1e-3}}
    identities = simulated(CONFIG, [f"client-{number:02d}" for number in range(count)])
    manifest = next(iter(identities.values())).manifest.digest().hex()
    members = {
        name: Member(
            name,
            NODE + number,
            100,
            10,
            None,
            (),
            identity=identity.public.hex(),
            manifest=manifest,
        )
        for number, (name, identity) in enumerate(identities.items())
    }
    folder = Path(tempfile.mkdtemp(prefix="masking-"))
    try:
        grid = Desks(identities, update, folder, gone)
        asked = secure_aggregation.Asked(
            RUN,
            1,
            {name: Address(RUN, "", 1, name) for name in members},
            {"adapter": update["delta"]},
            update,
            METRICS,
            dict.fromkeys(members, 1.0),
            CONFIG,
            Masked(),
            "examples",
        )
        legs = secure_aggregation.Legs(grid, Roster(members), 60.0, _ignored, _ignored)
        began = time.process_time()
        active, totals = secure_aggregation.collect(asked, legs, folder / "server")
        seconds = time.process_time() - began - grid.serialising
    finally:
        shutil.rmtree(folder)
    error = float((totals.mean["delta"]["values"] - update["delta"]["values"]).abs().max())
    assert len(active) == count - gone
    return {
        "client": grid.seconds / count,
        "coordinator": seconds - grid.seconds,
        "all": seconds,
        "up": grid.up / (4 * parameters * (count - gone)),
        "down": grid.down / (4 * parameters * count),
        "error": error,
    }


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", default="4,8,16,32")
    parser.add_argument("--parameters", default="300000,1000000")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    columns = "clients, drop out, parameters, s a client, s coordinator, s in all, up, down, error"
    print("| " + columns.replace(", ", " | ") + " |")
    print("|---" * 9 + "|")
    for parameters in map(int, options.parameters.split(",")):
        for count in map(int, options.clients.split(",")):
            for gone in sorted({0, count - Masked().needed(count)}):
                row = measured(count, parameters, gone)
                print(
                    f"| {count} | {gone} | {parameters:,} | {row['client']:.3f} "
                    f"| {row['coordinator']:.3f} | {row['all']:.2f} | {row['up']:.3f} "
                    f"| {row['down']:.3f} | {row['error']:.1e} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
