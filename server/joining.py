"""What a round's accepted replies make of the coordinator's state.

The recipe's combine rule decides once for adapter and head, the strategy joins the adapter, and the
server optimizer steps what was joined.
"""

from collections.abc import Sequence

from fedtune import adapter
from fedtune.adapter import Adapter, State
from fedtune.errors import RecipeError, RunError
from fedtune.heads import HeadRule
from fedtune.parts import Parts
from fedtune.strategies.strategy import Update


def join(parts: Parts, server: State, updates: Sequence[Update], round: int) -> State:
    """The coordinator's state after a round, of at least one update, sorted by client name.

    Raises:
        RunError: these clients cannot be joined by the recipe's rule.
    """
    clients = [update.client for update in updates]
    if reason := parts.combine.shortage(clients):
        raise RunError(
            f"Round {round}: the accepted replies cannot be joined by combine: {reason}. Nothing "
            "of this round was kept; run the same command again to repeat it."
        )
    strategy = parts.strategy
    rule = strategy.decide(server, updates, parts.combine, round)
    after = strategy.aggregate(server, updates, rule, round)
    names = {name for name in server["adapter"] if strategy.shares(name, round)}
    if "head" in server and HeadRule.of(parts.task, strategy).shared:
        heads = [update.state["head"] for update in updates]
        joined = rule(heads, [update.weight for update in updates])
        after = {**after, "head": adapter.add(server["head"], joined)}
        names |= server["head"].keys()
    stepped = parts.server_optimizer.step(server, after, names)
    # As a checkpoint gives them back: a part of a larger tensor is multiplied in another order.
    return {
        group: {name: tensor.contiguous() for name, tensor in tensors.items()}
        for group, tensors in stepped.items()
    }


def require_room(parts: Parts, initial: Adapter, population: int) -> None:
    """Refuse cohorts that the strategy cannot join.

    Raises:
        RecipeError: they may have too many clients.
    """
    if reason := parts.strategy.shortage(initial, parts.cohort.most(population)):
        raise RecipeError(f"strategy: {reason}.")


def require(parts: Parts, clients: Sequence[str]) -> None:
    """Refuse a population that could only fail in its first round.

    Raises:
        RecipeError: it is too small for the combine rule or the attack, or lacks who is trusted.
    """
    for key, part in (("combine", parts.combine), ("attack", parts.attack)):
        if reason := part.shortage(clients):
            raise RecipeError(f"{key}: {reason}. Change {key}, or who takes part.")
    if parts.combine.trusted in parts.attack.malicious(clients):
        raise RecipeError(
            f"combine trusts client '{parts.combine.trusted}', whom attack makes malicious (the "
            f"last {parts.attack.count} by name). Trust another one."
        )
