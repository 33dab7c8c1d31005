"""A client's own account of its noisy rounds: the promise holds against the coordinator too.

A coordinator may ask for a round again with another model, or for a run again under another name,
by accident or not. Each time the client's rows pay again, so the client keeps its own ledger, of an
institution above all its runs, and refuses what the recipe's budget or the institution's own does
not cover, whatever the coordinator's ledger says.

What was paid for is known by its inputs and by the secret that its noise is made of. A client that
has lost that secret has other noise for the same inputs, which is another release and paid again.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from filelock import FileLock

from fedtune.errors import BudgetError, RecipeError
from fedtune.privacy import accounting, ledger, noise, spending
from fedtune.privacy.accounting import Event
from fedtune.privacy.ledger import BEGIN, Ledger, LedgerError, Line
from fedtune.privacy.mechanism import Mechanism
from fedtune.privacy.spending import CHARGE, Account
from fedtune.wire import Address

KEY = "ledger.key"  # signs the ledger; the noise has another, which may be lost without it
ROUNDING = 1e-9  # relative, of an epsilon


@dataclass(frozen=True)
class Book:
    """One client's account.

    Attributes:
        folder: of its ledger.
        epsilon: of all runs together at most; 0 is no limit.
        delta: of it.
    """

    folder: Path
    epsilon: float = 0.0
    delta: float = accounting.SMALLEST

    def charge(
        self,
        run: str,
        key: bytes,
        mechanism: Mechanism,
        address: Address,
        inputs: str,
        *,
        solved: bool,
    ) -> None:
        """Enter a round before anything follows from it; the same round is not charged again.

        Args:
            run: the run's id as the client itself knows it.
            key: the secret of the noise.
            mechanism: the client's own.
            address: of the turn.
            inputs: the hash of what the noise is to hide.
            solved: whether the noise was found from the budget, so that it covers the recipe's
                rounds.

        Raises:
            BudgetError: the round would cost more than the recipe, or the institution, allows.
            RecipeError: the account is of other units.
            LedgerError: the account was altered.
        """
        paid_for = noise.subkey(key, "charge", inputs).hex()
        with self._opened() as book:
            if any(line["kind"] == CHARGE and line["inputs"] == paid_for for line in book.lines):
                return
            own = spending.whole(book.lines, run).after(mechanism)
            covered = not mechanism.budget or (solved and _covered(own, mechanism))
            if not covered and own.epsilon > mechanism.budget:
                raise BudgetError(
                    f"round {address.round} with these inputs would bring the epsilon of this "
                    f"client's records to {own.epsilon:.4g}, above privacy.epsilon = "
                    f"{mechanism.budget:.4g}, so this client takes no part in it"
                )
            after = spending.whole(book.lines).after(mechanism)
            if cost := self._excess(book.lines, mechanism, after.events):
                raise BudgetError(
                    f"round {address.round} would bring the epsilon of this client's records over "
                    f"all runs to {cost:.4g}, above {self._limit}, so this client takes no part "
                    "in it"
                )
            self._enter(book, run, mechanism, address, paid_for)

    def require_room(self, run: str, mechanism: Mechanism) -> None:
        """Refuse a run, before it begins, whose rounds would not all fit.

        Raises:
            RecipeError: they would not, or the account is of other units.
            LedgerError: the account was altered.
        """
        if not self.epsilon:
            return
        with self._opened() as book:
            before = spending.whole(book.lines, run, others=True)
            whole = accounting.merged([*before.events, mechanism.event(mechanism.rounds)])
            if cost := self._excess(book.lines, mechanism, whole):
                spent = accounting.epsilon(before.events, self.delta)
                raise RecipeError(
                    f"The {mechanism.rounds} rounds of this run would bring the epsilon of this "
                    f"client's records over all runs from {spent:.4g} to {cost:.4g}, above "
                    f"{self._limit}. Lower privacy.epsilon or rounds, or raise privacy.noise."
                )

    @property
    def _limit(self) -> str:
        return f"this institution's {self.epsilon:.4g} (delta {self.delta:.3g})"

    def _excess(self, lines: list[Line], mechanism: Mechanism, events: tuple[Event, ...]) -> float:
        """The epsilon of the events where it is above the limit, else 0.

        Local noise hides all of a client, so whatever the unit of the account is, it bounds it. A
        patient's charge does not bound what a record of his pays, whose neighbour it may replace.
        """
        if not self.epsilon:
            return 0.0
        begun = [m for line in lines if line["kind"] == BEGIN for m in _mechanisms(line)]
        units = sorted({m.unit for m in [*begun, mechanism] if m.mode == "record"})
        if len(units) > 1:
            raise RecipeError(
                f"This client's account counts what one '{units[0]}' and one '{units[1]}' pays, "
                "which cannot be added up. Set privacy.unit as in the runs before; the institution "
                "may open an account apart (node-config ledger)."
            )
        cost = accounting.epsilon(events, self.delta)
        return cost if cost > self.epsilon * (1 + ROUNDING) else 0.0

    @contextmanager
    def _opened(self) -> Iterator[Ledger]:
        """The ledger, while no other process of the client may enter anything."""
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with FileLock(self.folder / ".ledger.lock"):
            if (self.folder / ledger.FILE).exists() and not (self.folder / KEY).exists():
                raise LedgerError(
                    f"{self.folder / KEY}, which signs this client's account, is gone, so what "
                    "its rows have paid cannot be believed. Bring it back from a copy."
                )
            yield Ledger(self.folder, noise.load_key(self.folder / KEY))

    @staticmethod
    def _enter(
        book: Ledger, run: str, mechanism: Mechanism, address: Address, paid_for: str
    ) -> None:
        name = address.client
        begun = next((line for line in reversed(book.lines) if line["kind"] == BEGIN), None)
        now = {name: mechanism}
        if not begun or begun["run"] != run or spending.mechanisms_of(begun) != now:
            book.append(BEGIN, run=run, mechanisms={name: asdict(mechanism)})
        book.append(CHARGE, round=address.round, clients=[name], inputs=paid_for)


def _mechanisms(begin: Line) -> list[Mechanism]:
    return list(spending.mechanisms_of(begin).values())


def _covered(account: Account, mechanism: Mechanism) -> bool:
    """Whether these are no more rounds than the noise was made for, all of one mechanism."""
    return account.rounds <= mechanism.rounds and len(account.events) == 1
