"""CohortGrid: a Flower Grid whose clients live in this process.

No Ray, no SuperLink, no network, and the unmodified ServerApp and ClientApp: for research on one
machine, for debugging and for tests. Messages are answered one after another, or a round's clients
trained together (`batched`), which is the same computation.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from uuid import uuid4

from flwr.app import Array, ArrayRecord, Context, Error, Message, RecordDict
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from clients import app
from clients.client import Client, Job
from fedtune import vectorized
from fedtune.vectorized import Outcome

log = logging.getLogger("fedtune")
NODE = 1000
RUN = 1
TOGETHER = 4  # clients trained at once; more won nothing on a CPU and cost memory


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


def _delivered(message: Message) -> Message:
    """The message as a client gets it, with an id, which the SuperLink gives it on a network."""
    message.metadata.__dict__["_message_id"] = str(uuid4())
    delivered: Message = Message(copied(message.content), metadata=message.metadata)  # type: ignore[call-overload]
    return delivered


def _failed(message: Message, error: Exception) -> Message:
    """What Flower's client does: any fault of a client is a reply, never the run's end."""
    reason = f"{type(error).__name__}: {error}"
    return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason), reply_to=message)


def _identified(reply: Message) -> Message:
    reply.metadata.__dict__["_message_id"] = str(uuid4())
    return reply


class CohortGrid(Grid):
    """One node that hosts every client.

    Args:
        client_app: the ClientApp.
        run_config: the flat recipe.
        batched: train the clients of one round together; `client_app` then answers other messages.
    """

    def __init__(
        self,
        client_app: Callable[[Message, Context], Message],
        run_config: Mapping[str, bool | int | float | str],
        *,
        batched: bool = False,
    ) -> None:
        # Class-wide in Flower: one run a process.
        TaskIdentity.run_id, TaskIdentity.task_id = RUN, 1
        TaskIdentity.node_id = SUPERLINK_NODE_ID
        self._app, self._run, self._batched = client_app, Run.create_empty(RUN), batched
        node_config: dict[str, bool | int | float | str] = {"partition-id": 0, "num-partitions": 1}
        self._context = Context(RUN, NODE, node_config, RecordDict(), dict(run_config))
        self._replies: dict[str, Message] = {}
        self._told: set[str] = set()  # reasons not to train together, each said once

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
        inbound = _delivered(message)
        try:
            reply = self._app(inbound, self._context)
        except Exception as error:
            reply = _failed(inbound, error)
        return _identified(reply)

    def _answer_together(self, messages: Sequence[Message]) -> Iterator[Message]:
        """Replies to the train messages of one round, their jobs trained at once."""
        inbound = [_delivered(message) for message in messages]
        for begin in range(0, len(inbound), TOGETHER):
            opened: list[tuple[Message, Client, Job]] = []
            for message in inbound[begin : begin + TOGETHER]:
                try:
                    opened.append((message, *app.opened(message, self._context)))
                except Exception as error:
                    yield _identified(_failed(message, error))
            for (message, client, job), outcome in zip(opened, self._trained(opened), strict=True):
                try:
                    if isinstance(outcome, Exception):
                        raise outcome
                    reply = app.closed(message, client, job, outcome.state, outcome.sums)
                except Exception as error:
                    reply = _failed(message, error)
                yield _identified(reply)

    def _trained(self, opened: Sequence[tuple[Message, Client, Job]]) -> list[Outcome]:
        """The outcome of each job; all clients of a run share model, task and settings."""
        if not opened:
            return []
        first = opened[0][1]
        model, settings = first.model, first.experiment.train
        jobs = [(job.plan, job.work) for _, _, job in opened]
        reason = vectorized.obstacle(model, jobs)
        if reason and reason not in self._told:
            self._told.add(reason)
            log.warning("clients are trained one after another: %s", reason)
        return vectorized.train(model, first.parts.task, jobs, settings)

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
        messages = list(messages)
        if self._batched and all(m.metadata.message_type == "train" for m in messages):
            yield from self._answer_together(messages)
            return
        for message in messages:
            yield self._answer(message)
