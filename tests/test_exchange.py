"""Every question gets one answer a client: a reply, or the reason why there is none."""

from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from flwr.app import ConfigRecord, Error, Message, RecordDict

from clients.local import NODE, LocalGrid, identified
from fedtune import wire
from fedtune.adapter import Adapter
from fedtune.records import Rejection
from fedtune.wire import Address
from server import exchange
from server.roster import Member, Roster

NAMES = ("east", "north", "south")
WORK = {"east": 1.0, "north": 5.0, "south": 4.0}


def roster(nodes: int, together: int) -> Roster:
    """Nodes of a simulation, or with 0 of them three institutions."""
    members = {name: Member(name, NODE + i, 10, 5, None, ()) for i, name in enumerate(NAMES)}
    return Roster(members, (), tuple(range(NODE, NODE + nodes)), together)


class Scripted(LocalGrid):
    """Nodes that answer as a test says; keeps what it was sent."""

    def __init__(self, script: Callable[[Sequence[Message]], Iterator[Message]]) -> None:
        super().__init__({}, 2)
        self.script, self.sent = script, list[Message]()

    def answers(self, messages: Sequence[Message]) -> Iterator[Message]:
        self.sent = list(messages)
        yield from self.script(messages)


def turns(shared: Adapter) -> dict[str, RecordDict]:
    return exchange.contents(
        {name: (Address("r", "", 1, name), {"adapter": shared}) for name in NAMES}
    )


def asked(
    script: Callable[[Sequence[Message]], Iterator[Message]], nodes: int, together: int
) -> tuple[list[tuple[str, RecordDict | Rejection]], list[Message]]:
    grid = Scripted(script)
    sent = turns({"A": torch.ones(3)})
    answers = exchange.ask(grid, roster(nodes, together), "train", sent, WORK, 1, 60.0)
    return list(answers), grid.sent


def echo(message: Message) -> Message:
    return identified(Message(message.content, reply_to=message))


@pytest.mark.parametrize(("nodes", "together"), [(0, 1), (1, 1), (2, 1), (2, 2), (1, 8)])
def test_everybody_gets_its_own_turn_however_they_travel(nodes: int, together: int) -> None:
    answers, sent = asked(lambda messages: map(echo, reversed(messages)), nodes, together)
    assert sorted(name for name, _ in answers) == list(NAMES)
    for name, content in answers:
        assert isinstance(content, RecordDict)
        assert Address.of(content).client == name
    types = {message.metadata.message_type for message in sent}
    assert types == {"train.cohort" if together > 1 else "train"}
    assert len(sent) == (min(nodes, 3) if together > 1 else 3)


def test_what_all_receive_is_in_a_bundle_once() -> None:
    _, (message,) = asked(lambda messages: map(echo, messages), 1, 8)
    sent = turns({"A": torch.ones(3)})
    assert wire.size(message.content) == wire.size(sent["east"])


def test_an_institution_is_asked_at_its_own_node() -> None:
    _, sent = asked(lambda messages: map(echo, messages), 0, 1)
    assert [message.metadata.dst_node_id - NODE for message in sent] == [0, 1, 2]


def test_silence_second_replies_and_unasked_ones_are_told_apart() -> None:
    """Chunks of two nodes: north alone is the most work; east and south travel together."""

    def script(messages: Sequence[Message]) -> Iterator[Message]:
        stranger = identified(Message(RecordDict(), NODE, "train.cohort"))
        yield echo(stranger)
        yield echo(messages[1])
        yield echo(messages[1])

    answers, _ = asked(script, 2, 2)
    told = [(n, a.code) for n, a in answers if isinstance(a, Rejection)]
    assert told == [
        ("unknown", "E_REPLAY"),
        ("east", "E_REPLAY"),
        ("south", "E_REPLAY"),
        ("north", "E_TIMEOUT"),
    ]
    assert [n for n, a in answers if isinstance(a, RecordDict)] == ["east", "south"]


def test_a_fault_in_a_bundle_is_its_clients_own_and_a_fault_of_a_node_everybodys() -> None:
    def script(messages: Sequence[Message]) -> Iterator[Message]:
        east, _ = wire.unbundle(messages[1].content)
        bundled = wire.bundle([east, wire.fault("ValueError: no luck")])
        yield identified(Message(bundled, reply_to=messages[1]))
        yield identified(Message(Error(0, "the node is gone"), reply_to=messages[0]))

    answers, _ = asked(script, 2, 2)
    told = {name: a for name, a in answers if isinstance(a, Rejection)}
    assert told == {
        "south": Rejection("south", "E_CLIENT", "ValueError: no luck"),
        "north": Rejection("north", "E_CLIENT", "the node is gone"),
    }


@pytest.mark.parametrize(
    "content",
    [
        RecordDict(),
        wire.bundle([RecordDict()]),
        RecordDict({wire.BUNDLE: ConfigRecord({wire.BUNDLE: "7"})}),
        RecordDict({wire.BUNDLE: ConfigRecord({wire.BUNDLE: '[{"a": "9"}]'})}),
        RecordDict({wire.BUNDLE: ConfigRecord({wire.BUNDLE: '["a"]'})}),
        RecordDict({wire.BUNDLE: ConfigRecord({"other": "[]"})}),
    ],
)
def test_a_reply_that_is_no_bundle_of_so_many_turns_is_set_aside(content: RecordDict) -> None:
    answers, _ = asked(lambda m: iter([identified(Message(content, reply_to=m[0]))]), 1, 8)
    assert [(n, a.code) for n, a in answers if isinstance(a, Rejection)] == [
        (name, "E_SCHEMA") for name in NAMES
    ]
