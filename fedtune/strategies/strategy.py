"""The rule of a round: what is sent, what is trained, what comes back, how it is joined.

A strategy is a frozen dataclass whose fields are its parameters; the defaults below are FedIT. Both
halves of a method, client and server, live in one file. Its state is never an attribute: it is in
the `State` it is given and returns, so a checkpoint is complete by construction and one round can
be replayed through every strategy. A strategy sees LoRA tensors only; a classifier's head is
averaged beside it (see `Experiment.task`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from torch import Tensor

from fedtune import adapter, lowrank
from fedtune.adapter import Adapter, State, add, pick, pick_groups, subtract
from fedtune.combine import MEAN, Combine, Family
from fedtune.config import Experiment


@dataclass(frozen=True)
class ClientInfo:
    """What the coordinator knows of a client.

    Attributes:
        name: its name.
        examples: training rows, as it says itself.
        last_round: the last round whose reply was accepted, 0 for none.
        rank: of its adapter, 0 for the recipe's own.
    """

    name: str
    examples: int
    last_round: int = 0
    rank: int = 0


@dataclass(frozen=True)
class Update:
    """One client's accepted reply.

    Attributes:
        client: its name.
        weight: its weight in the mean, above 0.
        state: what it sent.
        stands_for: the clients whose mean it is, () for the one that sent it.
    """

    client: str
    weight: float
    state: State
    stands_for: tuple[str, ...] = ()

    @property
    def clients(self) -> tuple[str, ...]:
        """All clients that are in it."""
        return self.stands_for or (self.client,)


@dataclass(frozen=True)
class Turn:
    """What a client has when its round begins.

    Attributes:
        round: from 1.
        received: what the coordinator broadcast to it.
        personal: what it kept to itself in an earlier round, {} at first.
        rates_sum: the learning rates of the round's steps, added up.
        rank: of the client's adapter, 0 for the recipe's own.
    """

    round: int
    received: State
    personal: State
    rates_sum: float = 1.0
    rank: int = 0


@dataclass(frozen=True)
class Plan:
    """What a client trains: plain data, so that every engine runs it with the same result.

    Attributes:
        start: group -> tensors that the first step begins from. LoRA factors may have other ranks
            than the recipe's adapter, on the same scaling. A group "core" holds small matrices
            between the factors, see cores.py.
        trainable: names of the tensors that receive gradients.
        base: the change of the frozen weights, as LoRA factors of any rank on the model's scaling.
        correction: added to the gradient of every step, before it is clipped (SCAFFOLD).
        penalty: lambda of the term lambda sum |B[:, tail:]| |A[tail:, :]| in the loss (HetLoRA).
        tail: the first rank of that term.
        scale: of the adapter's product, beside the model's own scaling.
        mask: name -> 0 or 1, of a shape that broadcasts to the tensor's: an entry at 0 receives no
            gradient and stays as it began.
        keep: the share of all modules' ranks that is trained: those whose products move most in a
            provisional pass over the same batches (LoRA-A^2). Everything else of the plan begins
            again after it.
    """

    start: State
    trainable: frozenset[str]
    base: Adapter = field(default_factory=dict)
    correction: Adapter = field(default_factory=dict)
    penalty: float = 0.0
    tail: int = 0
    scale: float = 1.0
    mask: Adapter = field(default_factory=dict)
    keep: float = 1.0


@dataclass(frozen=True)
class Strategy:
    """FedIT's rule, and the interface of every other.

    Class attributes:
        sends: "delta", the change of what was broadcast, or "adapter", whole factors.
        combines: the families of combine rules that have a meaning for what is sent.
        joins: whether anything that clients send is joined.
        admits_dora: whether it may train DoRA's norms beside the factors.
        fixed_frame: whether coordinates mean the same every round (else no server moments).
        sums_only: whether `aggregate` needs only a weighted sum (secure aggregation).
        one_sum: whether a delta is all that a client sends, so that one noisy sum covers it.
        mixed_ranks: whether clients may have adapters of different ranks.
        changes_base: whether it changes the frozen weights (else they may be quantized).
        begins: whether round 1 begins from random factors, or from the principal ones of the frozen
            weights, those of their best approximation of the adapter's rank.
        personal: whether the model that counts is each client's own.
        pools: whether one client holds the rows of all: a reference, not federated learning.
    """

    sends: ClassVar[Literal["delta", "adapter"]] = "delta"
    combines: ClassVar[frozenset[Family]] = MEAN
    joins: ClassVar[bool] = True
    admits_dora: ClassVar[bool] = True
    fixed_frame: ClassVar[bool] = True
    sums_only: ClassVar[bool] = True
    one_sum: ClassVar[bool] = True
    mixed_ranks: ClassVar[bool] = False
    changes_base: ClassVar[bool] = False
    begins: ClassVar[Literal["random", "principal"]] = "random"
    personal: ClassVar[bool] = False
    pools: ClassVar[bool] = False

    def trains(self, name: str, round: int) -> bool:
        """Whether the LoRA tensor `name` receives gradients in `round`."""
        return True

    def shares(self, name: str, round: int) -> bool:
        """Whether the change of the LoRA tensor `name` leaves the client in `round`."""
        return self.trains(name, round)

    def start(self, initial: Adapter) -> State:
        """The coordinator's state before round 1."""
        return {"adapter": initial}

    def client_rank(self, server: State, client: ClientInfo) -> int:
        """The rank of the client's adapter from the next round on, 0 for the recipe's own."""
        return client.rank

    def broadcast(self, server: State, client: ClientInfo, round: int) -> State:
        """What `client` receives in `round`; for an evaluation too.

        The base travels whole: whoever missed rounds is up to date with the next message.
        """
        return pick_groups(server, "adapter", "base")

    def aggregate(
        self, server: State, updates: Sequence[Update], combine: Combine, round: int
    ) -> State:
        """The coordinator's state after `round`.

        Args:
            server: the state before; it is not changed.
            updates: at least one, sorted by client name.
            combine: how the deltas are joined, decided for this round (see `decide`).
            round: from 1.
        """
        deltas = [update.state["delta"] for update in updates]
        if not deltas[0]:
            return server
        joined = combine(deltas, [update.weight for update in updates])
        moved = add(pick(server["adapter"], frozenset(joined)), joined)
        return {**server, "adapter": {**server["adapter"], **moved}}

    def decide(
        self, server: State, updates: Sequence[Update], combine: Combine, round: int
    ) -> Combine:
        """The recipe's rule with its choice among the round's clients made.

        It is made once, from all that they sent, so that adapter and head are joined alike.

        Raises:
            ValueError: these clients cannot be joined by the rule.
        """

        def gram() -> Tensor:
            heads = [update.state["head"] for update in updates if "head" in update.state]
            own = self.gram(server, updates, round)
            return own + adapter.gram(heads) if heads else own

        return combine.decided(gram, [update.client for update in updates])

    def gram(self, server: State, updates: Sequence[Update], round: int) -> Tensor:
        """Inner products of the clients' changes, (clients, clients) float64, without the head.

        A module of which both factors were sent counts by the change of its product, in which it
        does not show how a client writes its factors; everything else counts by its coordinates.
        """
        deltas = [update.state["delta"] for update in updates]
        terms = [lowrank.changes(server["adapter"], delta) for delta in deltas]
        paired = lowrank.factors(deltas[0])
        rest = [pick(delta, frozenset(delta) - paired) for delta in deltas]
        return lowrank.gram(terms) + adapter.gram(rest)

    def plan(self, turn: Turn) -> Plan:
        """What the client begins from and trains; its start is also the model it evaluates."""
        start = turn.received["adapter"]
        names = frozenset(name for name in start if self.trains(name, turn.round))
        return Plan({"adapter": start}, names, base=turn.received.get("base", {}))

    def reply(self, turn: Turn, plan: Plan, trained: State) -> tuple[State, State]:
        """(what is sent, what the client keeps to itself)."""
        change = subtract(trained["adapter"], plan.start["adapter"])
        shared = [name for name in change if self.shares(name, turn.round)]
        return {"delta": pick(change, shared)}, {}

    def payload(self, initial: Adapter, client: ClientInfo, round: int) -> State:
        """Tensors of the names, shapes and dtypes that `client` sends: the gate's schema."""
        return {"delta": {name: t for name, t in initial.items() if self.shares(name, round)}}

    def contribution(self, server: State, update: Update, round: int) -> Adapter | None:
        """The adapter that the client ended with, beside the base it was sent.

        None where the update does not tell, since the client keeps a part. Metrics and `oracle`
        compare what was aggregated with the mean of these adapters' products.
        """
        if self.personal:
            return None
        return ended(server, update)

    def shortage(self, initial: Adapter, clients: int) -> str:
        """Why so many clients of a round cannot be joined, "" where they can."""
        return ""

    def check(self, experiment: Experiment) -> None:
        """Refuse, with a RecipeError, settings that have no meaning for this strategy."""


def ended(server: State, update: Update) -> Adapter:
    """The adapter of a client that sends its delta, as it was after the client's training."""
    delta = update.state["delta"]
    return {**server["adapter"], **add(pick(server["adapter"], frozenset(delta)), delta)}
