"""One recorded round through every strategy's aggregate: only the operator varies.

Each client ends where it ended in the recording; what it sends, what the server makes of that and
what the next broadcast carries are the strategy's own. Where a strategy trains fewer tensors, its
clients keep the others as they were (projected); where it cannot have such clients, the reason is
told instead of a number.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from flwr.app import RecordDict

from fedtune import aggregation, wire
from fedtune.adapter import Adapter, State, at_rank, rank_of
from fedtune.combine import Mean
from fedtune.components import build
from fedtune.strategies import STRATEGIES
from fedtune.strategies.strategy import ClientInfo, Strategy, Turn, Update
from recording import Recorded

TIMES = 3


class NotApplicableError(Exception):
    """A strategy's clients cannot end where the recorded ones did."""


@dataclass(frozen=True)
class Replayed:
    """What one strategy made of the round.

    Attributes:
        strategy: as a recipe names it.
        setting: which recording.
        clients: how many.
        error: distance from the mean of the products of its own clients, over that mean.
        oracle_error: distance from the mean of the recorded clients' products, over that mean.
        effective_rank: of the new model's change, a mean over modules.
        bytes_up: a client's reply, the mean over clients.
        bytes_down: the broadcast that follows, the mean over clients.
        seconds: CPU time of the server's aggregate, the median of some.
        trained: what of the recorded clients the strategy keeps: "A, B", or one of them.
    """

    strategy: str
    setting: str
    clients: int
    error: float
    oracle_error: float
    effective_rank: float
    bytes_up: float
    bytes_down: float
    seconds: float
    trained: str


def replay(text: str, setting: str, recorded: Recorded) -> dict[str, Any]:
    """One strategy's line, or the reason why it has none."""
    try:
        return asdict(_replayed(text, setting, recorded))
    except NotApplicableError as error:
        return {"strategy": text, "setting": setting, "reason": str(error)}


def _replayed(text: str, setting: str, recorded: Recorded) -> Replayed:
    """The figures, in float64; bytes and seconds, of float32 as in a run."""
    strategy = build(text, STRATEGIES, "strategy")
    _require(strategy, recorded)
    exact = _sent(strategy, recorded, lambda adapter: _cast(adapter, double=True))
    server, updates, trained = exact
    after = strategy.aggregate(server, updates, Mean(), recorded.round)
    own = aggregation.of_round(strategy, server, updates, after, recorded.round)
    clients = [_cast(client.ended, double=True) for client in recorded.clients]
    weights = [client.weight for client in recorded.clients]
    others = aggregation.measure(clients, weights, server, after)
    server, updates, _ = _sent(strategy, recorded, lambda adapter: _cast(adapter, double=False))
    seconds = []
    for _ in range(TIMES):
        began = time.process_time()
        after = strategy.aggregate(server, updates, Mean(), recorded.round)
        seconds.append(time.process_time() - began)
    infos = [_info(recorded, k, recorded.round) for k in range(len(updates))]
    following = [strategy.broadcast(after, info, recorded.round + 1) for info in infos]
    return Replayed(
        strategy=text,
        setting=setting,
        clients=len(updates),
        error=own["relative_error"],
        oracle_error=others["relative_error"],
        effective_rank=own["accumulated_effective_rank"],
        bytes_up=statistics.mean(_bytes(update.state) for update in updates),
        bytes_down=statistics.mean(map(_bytes, following)),
        seconds=statistics.median(seconds),
        trained=trained,
    )


def _require(strategy: Strategy, recorded: Recorded) -> None:
    """Refuse strategies whose server does not join whole adapters."""
    if strategy.pools:
        raise NotApplicableError("one client holds the rows of all: nothing is aggregated")
    if strategy.personal:
        raise NotApplicableError("clients keep a part to themselves: there is no one new model")
    if recorded.ranks and not strategy.mixed_ranks:
        raise NotApplicableError("clients have one rank")


def _sent(
    strategy: Strategy, recorded: Recorded, cast: Callable[[Adapter], Adapter]
) -> tuple[State, list[Update], str]:
    """(the server's state before, the updates, what of the clients they tell).

    Raises:
        NotApplicableError: clients of this strategy train something else than their factors.
    """
    server = strategy.start(cast(recorded.before))
    updates, kept = [], set()
    for number, client in enumerate(recorded.clients):
        info = _info(recorded, number, 0)
        sent = strategy.broadcast(server, info, recorded.round)
        turn = Turn(recorded.round, sent, {}, rank=info.rank)
        plan = strategy.plan(turn)
        begun, ended = plan.start.get("adapter", {}), cast(client.ended)
        if plan.start.keys() != {"adapter"} or not _same(
            begun, at_rank(server["adapter"], info.rank)
        ):
            raise NotApplicableError("clients begin from other tensors than LoRA's two factors")
        trained = {
            name: ended[name] if name in plan.trainable else tensor
            for name, tensor in begun.items()
        }
        kept |= {key for key in "AB" for name in plan.trainable if f"lora_{key}" in name}
        reply, _ = strategy.reply(turn, plan, {"adapter": trained})
        updates.append(Update(client.name, client.weight, reply))
    return server, updates, ", ".join(sorted(kept))


def _same(one: Adapter, other: Adapter) -> bool:
    return one.keys() == other.keys() and all(
        one[name].shape == other[name].shape and bool((one[name] == other[name]).all())
        for name in one
    )


def _info(recorded: Recorded, number: int, last_round: int) -> ClientInfo:
    client = recorded.clients[number]
    rank = rank_of(client.ended) if recorded.ranks else 0
    return ClientInfo(client.name, int(client.weight), last_round, rank)


def _cast(adapter: Adapter, *, double: bool) -> Adapter:
    return {name: t.double() if double else t.float() for name, t in adapter.items()}


def _bytes(state: State) -> int:
    return wire.size(RecordDict(dict(wire.pack(state))))


def all_of(texts: Sequence[str], rounds: dict[str, Recorded]) -> list[dict[str, Any]]:
    """Every strategy on every recording."""
    return [
        replay(text, setting, recorded) for setting, recorded in rounds.items() for text in texts
    ]
