"""Questions to clients and their answers, whatever number of them travels in one message.

An institution gets a message of its own. The nodes of a simulation can each play any client and say
how many they want in one message; which client goes where then depends on names and work alone.
"""

from collections.abc import Iterator, Mapping, Sequence

from flwr.app import ArrayRecord, Message, RecordDict
from flwr.serverapp import Grid

from fedtune import wire
from fedtune.adapter import Adapter, State
from fedtune.records import Rejection
from fedtune.wire import Address, RejectedError
from server import chunks
from server.roster import Roster


def contents(turns: Mapping[str, tuple[Address, State]]) -> dict[str, RecordDict]:
    """What each client is sent; tensors that several receive are serialised once and shared."""
    # The tensors are kept beside it: while they live, no others can have their id.
    packed: dict[int, tuple[Adapter, ArrayRecord]] = {}
    sent = {}
    for name, (address, state) in turns.items():
        for group, tensors in state.items():
            if id(tensors) not in packed:
                packed[id(tensors)] = (tensors, wire.pack({group: tensors})[group])
        arrays = {group: packed[id(tensors)][1] for group, tensors in state.items()}
        sent[name] = RecordDict({wire.CONFIG: address.record(), **arrays})
    return sent


def ask(
    grid: Grid,
    roster: Roster,
    kind: str,
    sent: Mapping[str, RecordDict],
    work: Mapping[str, float],
    round: int,
    timeout: float,
) -> Iterator[tuple[str, RecordDict | Rejection]]:
    """Each client's answer, as it comes: the content of its reply, or why there is none.

    Errors and silence become rejections; so does a second reply, and one that nobody asked for,
    which stands under "unknown".

    Args:
        grid: Flower's way to the nodes.
        roster: who is where.
        kind: "train" or "evaluate", or "train." and a leg of secure aggregation.
        sent: client -> what it is sent.
        work: client -> what its answer will cost, in any unit.
        round: stands in the messages' metadata.
        timeout: seconds to wait for all.
    """
    messages = _messages(roster, kind, sent, work, str(round))
    asked: dict[str, list[str]] = {}
    waiting = set(sent)
    for reply in grid.send_and_receive([message for _, message in messages], timeout=timeout):
        # The grid numbers the messages while it sends them.
        asked = asked or {message.metadata.message_id: chunk for chunk, message in messages}
        chunk = asked.get(reply.metadata.reply_to_message_id)
        if not chunk:
            yield "unknown", Rejection("unknown", "E_REPLAY", "a reply that nobody asked for")
            continue
        for name, answer in zip(chunk, _answers(chunk, kind, reply), strict=True):
            if name in waiting:
                waiting.remove(name)
                yield name, answer
            else:
                yield name, Rejection(name, "E_REPLAY", "a second reply")
    for name in sorted(waiting):
        yield name, Rejection(name, "E_TIMEOUT", f"no reply in {timeout:.0f} s")


def _messages(
    roster: Roster,
    kind: str,
    sent: Mapping[str, RecordDict],
    work: Mapping[str, float],
    group: str,
) -> list[tuple[list[str], Message]]:
    """The messages, with the clients that each is for."""
    if not roster.nodes:
        return [
            ([name], Message(content, roster.members[name].node, kind, group_id=group))
            for name, content in sent.items()
        ]
    messages = []
    own = {name: work[name] for name in sent}
    for number, chunk in enumerate(chunks.deal(own, roster.together, len(roster.nodes))):
        node, content, type_ = roster.nodes[number % len(roster.nodes)], sent[chunk[0]], kind
        if roster.together > 1:
            together = f"{kind}_cohort" if "." in kind else f"{kind}.cohort"
            content, type_ = wire.bundle([sent[name] for name in chunk]), together
        messages.append((chunk, Message(content, node, type_, group_id=group)))
    return messages


def _answers(chunk: Sequence[str], kind: str, reply: Message) -> list[RecordDict | Rejection]:
    """The answer of each client of a chunk; whether it is theirs is for the gate to see."""
    if reply.has_error():
        reason = reply.error.reason or "no reason given"
        return [Rejection(name, "E_CLIENT", reason) for name in chunk]
    if reply.metadata.message_type == kind:
        return [reply.content]
    try:
        contents = wire.unbundle(reply.content)
    except RejectedError as error:
        return [Rejection(name, error.code, error.reason) for name in chunk]
    if len(contents) != len(chunk):
        reason = f"the reply bundles {len(contents)} turns, not {len(chunk)}"
        return [Rejection(name, "E_SCHEMA", reason) for name in chunk]
    answers: list[RecordDict | Rejection] = []
    for name, content in zip(chunk, contents, strict=True):
        fault = wire.fault_of(content)
        answers.append(content if fault is None else Rejection(name, "E_CLIENT", fault))
    return answers
