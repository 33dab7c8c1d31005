"""Flower's Grid and its nodes on one machine: no Ray, no SuperLink, no network.

The unmodified ServerApp and ClientApp meet here, for research, for debugging and for tests.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TypeAlias
from uuid import uuid4

from flwr.app import Array, ArrayRecord, Context, Error, Message, RecordDict
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from clients.app import TOGETHER

NODE = 1000  # the first node's id
RUN = 1
Config: TypeAlias = Mapping[str, bool | int | float | str]
Answer: TypeAlias = Callable[[Message, Context], Message]


def identify() -> None:
    """Tell Flower which run this process belongs to; class-wide there: one run a process."""
    TaskIdentity.run_id, TaskIdentity.task_id = RUN, 1
    TaskIdentity.node_id = SUPERLINK_NODE_ID


def node_context(run_config: Config, number: int, nodes: int, together: int) -> Context:
    """What the ClientApp of one node is called with.

    Args:
        run_config: the flat recipe.
        number: of the node, from 0.
        nodes: how many there are.
        together: clients in one message, 0 for as many as the node thinks best.
    """
    node: dict[str, bool | int | float | str] = {"partition-id": number, "num-partitions": nodes}
    return Context(RUN, NODE + number, {**node, TOGETHER: together}, RecordDict(), dict(run_config))


def copied(records: RecordDict) -> RecordDict:
    """The same records in new containers; the immutable bytes are shared.

    Over a network each client has its own message. Here a client that removed a key from its own
    would remove it from everybody's.
    """
    copy = RecordDict()
    for name, record in records.items():
        if isinstance(record, ArrayRecord):
            copy[name] = ArrayRecord(
                {k: Array(a.dtype, tuple(a.shape), a.stype, a.data) for k, a in record.items()}
            )
        else:
            copy[name] = type(record)(dict(record))  # type: ignore[arg-type]
    return copy


def answered(app: Answer, message: Message, context: Context) -> Message:
    """The reply; as in Flower's client, a fault is a reply too and never the run's end."""
    inbound: Message = Message(copied(message.content), metadata=message.metadata)  # type: ignore[call-overload]
    try:
        reply = app(inbound, context)
    except Exception as error:
        return failed(message, f"{type(error).__name__}: {error}")
    return identified(reply)


def failed(message: Message, reason: str) -> Message:
    """An error in the place of a reply."""
    error = Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason)
    return identified(Message(error, reply_to=message))


def identified(message: Message) -> Message:
    """The message with an id, which the SuperLink gives it on a network."""
    message.metadata.__dict__["_message_id"] = str(uuid4())
    return message


class LocalGrid(Grid):
    """A Grid whose nodes are on this machine; nothing is ever late.

    Args:
        run_config: the flat recipe.
        nodes: how many there are.
    """

    def __init__(self, run_config: Config, nodes: int) -> None:
        identify()
        self._run, self._config, self._nodes = Run.create_empty(RUN), dict(run_config), nodes
        self._replies: dict[str, Message] = {}

    @abstractmethod
    def answers(self, messages: Sequence[Message]) -> Iterator[Message]:
        """The replies, as they come."""

    def server_context(self, node_config: Config) -> Context:
        """What the ServerApp of this grid is called with."""
        return Context(RUN, SUPERLINK_NODE_ID, dict(node_config), RecordDict(), dict(self._config))

    def set_run(self, run: Run) -> None:
        self._run = run

    @property
    def run(self) -> Run:
        """Flower's record of the run."""
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        return range(NODE, NODE + self._nodes)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        messages = list(messages)
        for reply in self.send_and_receive(messages):
            self._replies[reply.metadata.reply_to_message_id] = reply
        return [message.metadata.message_id for message in messages]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return [self._replies.pop(i) for i in message_ids if i in self._replies]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Replies to all messages, each as it comes; `timeout` has no meaning here."""
        yield from self.answers([identified(message) for message in messages])
