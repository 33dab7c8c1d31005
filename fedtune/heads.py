"""A classifier's head beside the adapter: who trains it, and whether it leaves the client.

The recipe's task decides (`classification(head='average' | 'local' | 'frozen')`), the same for
every strategy; a strategy of personal models keeps the head with the rest. Both sides of the
network ask here, so that they agree.
"""

from dataclasses import dataclass

from fedtune.adapter import Adapter, State, subtract
from fedtune.strategies.strategy import Strategy
from fedtune.tasks.task import Task


@dataclass(frozen=True)
class HeadRule:
    """What happens to the group "head".

    Attributes:
        trained: whether it receives gradients.
        shared: whether its change is sent and averaged; a trained head that is not shared is kept.
    """

    trained: bool
    shared: bool

    @classmethod
    def of(cls, task: Task, strategy: Strategy) -> "HeadRule":
        """The rule of an experiment's task and strategy."""
        average = task.head_policy == "average"
        return cls(task.head_policy in ("average", "local"), average and not strategy.personal)

    def start(self, received: State, personal: State) -> Adapter:
        """The head that a client begins from, {} where the model has none."""
        if self.trained and not self.shared and "head" in personal:
            return personal["head"]
        return received.get("head", {})

    def reply(self, start: Adapter, trained: Adapter) -> tuple[State, State]:
        """(what is sent, what is kept) of a trained head."""
        if not start or not self.trained:
            return {}, {}
        if self.shared:
            return {"head": subtract(trained, start)}, {}
        return {}, {"head": trained}
