"""What a ledger's lines add up to: every client's events and its epsilon.

Only "charge" lines cost. Each names the clients (or, in client mode, the whole population under "")
whose mechanism, as the last "begin" line tells it, ran for one round.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from fedtune.privacy import accounting
from fedtune.privacy.accounting import Cost, Event
from fedtune.privacy.ledger import BEGIN, Line
from fedtune.privacy.mechanism import Mechanism

CHARGE, RELEASE = "charge", "release"


@dataclass(frozen=True)
class Account:
    """One protected population: a client's records, or all clients.

    Attributes:
        events: charged so far.
        delta: the largest that any of its mechanisms promised.
        rounds: charged.
    """

    events: tuple[Event, ...] = ()
    delta: float = 0.0
    rounds: int = 0

    def after(self, mechanism: Mechanism) -> "Account":
        """The account with one more round of a mechanism."""
        events = accounting.merged([*self.events, mechanism.event(1)])
        return Account(events, max(self.delta, mechanism.delta), self.rounds + 1)

    @property
    def epsilon(self) -> float:
        """Of the models alone."""
        return self.at(self.delta)

    def at(self, delta: float) -> float:
        """The epsilon of the models alone for another delta."""
        return accounting.epsilon(self.events, delta) if self.events else 0.0

    @property
    def cost(self) -> Cost:
        """All numbers of both accountants."""
        return accounting.cost(self.events, self.delta or accounting.SMALLEST)


@dataclass
class Spending:
    """The accounts of a ledger, and the mechanisms in force."""

    accounts: dict[str, Account] = field(default_factory=dict)
    mechanisms: dict[str, Mechanism] = field(default_factory=dict)

    def take(self, line: Line) -> None:
        """Enter a line."""
        if line["kind"] == BEGIN:
            self.mechanisms = mechanisms_of(line)
        elif line["kind"] == CHARGE:
            self.accounts |= self.after(line["clients"])

    def after(self, clients: Iterable[str]) -> dict[str, Account]:
        """The accounts of `clients` with one more round."""
        return {
            name: self.accounts.get(name, Account()).after(self.mechanisms[name])
            for name in clients
        }


def present(accounts: Mapping[str, Account], here: Mapping[str, Mechanism]) -> dict[str, Account]:
    """The accounts of those who have not left."""
    return {name: account for name, account in accounts.items() if name in here}


def of(lines: Sequence[Line]) -> Spending:
    """The accounts after all lines of a ledger."""
    spending = Spending()
    for line in lines:
        spending.take(line)
    return spending


def whole(lines: Sequence[Line], run: str = "", *, others: bool = False) -> Account:
    """One account of all charges, whoever they name: what a client's rows have paid.

    Args:
        lines: of a client's own ledger.
        run: of this run alone; "" is all runs.
        others: of all runs but that one.
    """
    account, current = Account(), ""
    mechanisms: dict[str, Mechanism] = {}
    for line in lines:
        if line["kind"] == BEGIN:
            mechanisms, current = mechanisms_of(line), line["run"]
        elif line["kind"] == CHARGE and (not run or (current == run) != others):
            for name in line["clients"]:
                account = account.after(mechanisms[name])
    return account


def worst(accounts: Mapping[str, Account]) -> str:
    """The account with the largest epsilon, the first by name among equals; "" of none."""
    return max(sorted(accounts), key=lambda name: accounts[name].epsilon, default="")


def mechanisms_of(begin: Line) -> dict[str, Mechanism]:
    """The mechanisms of a "begin" line."""
    return {name: Mechanism(**fields) for name, fields in begin["mechanisms"].items()}


def ever(lines: Sequence[Line]) -> dict[str, Mechanism]:
    """Each account's newest mechanism, of clients that have left too."""
    found: dict[str, Mechanism] = {}
    for line in lines:
        if line["kind"] == BEGIN:
            found |= mechanisms_of(line)
    return found


def told(cost: Cost) -> dict[str, float | None]:
    """A cost as the ledger tells it: what an accountant cannot say is null."""
    numbers = {
        "eps_final_model_only": cost.epsilon,
        "eps_observes_participation": cost.observed,
        "delta": cost.delta,
        "eps_pld": cost.pld,
        "eps_rdp": cost.rdp,
        "eps_observed_pld": cost.observed_pld,
        "eps_observed_rdp": cost.observed_rdp,
        "rho_zcdp": cost.rho,
    }
    return {key: value if math.isfinite(value) else None for key, value in numbers.items()}
