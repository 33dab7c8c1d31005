"""CohortGrid: one node that plays every client in this process, one message after another."""

from collections.abc import Iterator, Sequence

from flwr.app import Message

from clients.local import Answer, Config, LocalGrid, answered, node_context


class CohortGrid(LocalGrid):
    """One node that plays every client.

    Args:
        client_app: the ClientApp.
        run_config: the flat recipe.
        together: clients in one message, 0 for as many as the node thinks best.
    """

    def __init__(self, client_app: Answer, run_config: Config, *, together: int = 1) -> None:
        super().__init__(run_config, 1)
        self._app, self._context = client_app, node_context(run_config, 0, 1, together)

    def answers(self, messages: Sequence[Message]) -> Iterator[Message]:
        for message in messages:
            yield answered(self._app, message, self._context)
