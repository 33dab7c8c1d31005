"""CohortGrid: a Flower Grid whose clients live in this process.

No Ray, no SuperLink, no network, and the unmodified ServerApp and ClientApp: for research on one
machine, for debugging and for tests. Messages are answered one after another.
"""

from collections.abc import Callable, Iterable, Mapping
from uuid import uuid4

from flwr.app import Array, ArrayRecord, Context, Error, Message, RecordDict
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

NODE = 1000
RUN = 1


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


class CohortGrid(Grid):
    """One node that hosts every client.

    Args:
        client_app: the ClientApp.
        run_config: the flat recipe.
    """

    def __init__(
        self,
        client_app: Callable[[Message, Context], Message],
        run_config: Mapping[str, bool | int | float | str],
    ) -> None:
        # Class-wide in Flower: one run a process.
        TaskIdentity.run_id, TaskIdentity.task_id = RUN, 1
        TaskIdentity.node_id = SUPERLINK_NODE_ID
        self._app, self._run = client_app, Run.create_empty(RUN)
        node_config: dict[str, bool | int | float | str] = {"partition-id": 0, "num-partitions": 1}
        self._context = Context(RUN, NODE, node_config, RecordDict(), dict(run_config))
        self._replies: dict[str, Message] = {}

    def server_context(self, node_config: Mapping[str, bool | int | float | str]) -> Context:
        """What the ServerApp of this grid is called with."""
        config = dict(self._context.run_config)
        return Context(RUN, SUPERLINK_NODE_ID, dict(node_config), RecordDict(), config)

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
        return [NODE]

    def _answer(self, message: Message) -> Message:
        # What the SuperLink does on a network: give the message its id.
        message.metadata.__dict__["_message_id"] = str(uuid4())
        inbound = Message(copied(message.content), metadata=message.metadata)  # type: ignore[call-overload]
        try:
            reply = self._app(inbound, self._context)
        except Exception as error:
            # What Flower's client does: any fault of a client is a reply, never the run's end.
            reason = f"{type(error).__name__}: {error}"
            failure = Error(code=ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason=reason)
            reply = Message(failure, reply_to=inbound)
        reply.metadata.__dict__["_message_id"] = str(uuid4())
        return reply

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = []
        for message in messages:
            reply = self._answer(message)
            ids.append(message.metadata.message_id)
            self._replies[ids[-1]] = reply
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return [self._replies.pop(i) for i in message_ids if i in self._replies]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Replies to all messages.

        A generator, so that a coordinator sees each reply as it comes; `timeout` has no meaning
        where nothing can be late.
        """
        for message in messages:
            yield self._answer(message)
