"""B C A with B and A fixed and the same everywhere: only the small core C is trained and sent.

What Fed-SB and RAVAN have in common. sum_i p_i B C_i A = B C-bar A, so averaging is exact. The
coordinator keeps the frame (B and A), the core, and as its adapter the product B C beside A, an
ordinary adapter for whoever exports or measures it. A client is sent the frame once and keeps it.
"""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from fedtune.adapter import Adapter, State, add, subtract
from fedtune.combine import EVERY, Combine, Family
from fedtune.cores import folded, merged
from fedtune.strategies.strategy import ClientInfo, Plan, Strategy, Turn, Update


@dataclass(frozen=True)
class Cored(Strategy):
    """The core's blocks are shared; everything else of a client's plan is the same everywhere."""

    combines: ClassVar[frozenset[Family]] = EVERY
    admits_dora: ClassVar[bool] = False
    # A server optimizer steps the factors that are sent, and here none is.
    fixed_frame: ClassVar[bool] = False

    @abstractmethod
    def blocks(self, initial: Adapter) -> Adapter:
        """Zeros in the shapes of the blocks that clients send, for an adapter's modules."""

    @property
    def rounds_before(self) -> int:
        """Rounds before there is a core."""
        return 0

    def trains(self, name: str, round: int) -> bool:
        return False

    def broadcast(self, server: State, client: ClientInfo, round: int) -> State:
        if client.last_round > self.rounds_before:
            return {"core": server["core"]}
        return {"frame": server["frame"], "core": server["core"]}

    def aggregate(
        self, server: State, updates: Sequence[Update], combine: Combine, round: int
    ) -> State:
        deltas = [update.state["delta"] for update in updates]
        core = add(server["core"], combine(deltas, [update.weight for update in updates]))
        return {**server, "core": core, "adapter": folded(server["frame"], core)}

    def plan(self, turn: Turn) -> Plan:
        frame = turn.received.get("frame") or turn.personal.get("frame")
        if frame is None:
            raise ValueError("this client's frame is gone; it cannot continue its run")
        core = turn.received["core"]
        return Plan({"adapter": frame, "core": core}, frozenset(core))

    def reply(self, turn: Turn, plan: Plan, trained: State) -> tuple[State, State]:
        change = subtract(merged(trained["core"]), turn.received["core"])
        return {"delta": change}, {"frame": plan.start["adapter"]}

    def payload(self, initial: Adapter, client: ClientInfo, round: int) -> State:
        return {"delta": self.blocks(initial)}

    def contribution(self, server: State, update: Update, round: int) -> Adapter | None:
        return folded(server["frame"], add(server["core"], update.state["delta"]))
