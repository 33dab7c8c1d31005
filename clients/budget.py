"""A client's own account of its noisy rounds: the promise holds against the coordinator too.

A coordinator may ask for a round again with another model, by accident or not. Each time other
inputs are learnt from and the client's records pay again, so the client keeps its own ledger and
refuses what the recipe's budget does not cover, whatever the coordinator's ledger says.
"""

from dataclasses import asdict
from pathlib import Path

from fedtune.errors import BudgetError
from fedtune.privacy import spending
from fedtune.privacy.ledger import BEGIN, Ledger
from fedtune.privacy.mechanism import Mechanism
from fedtune.privacy.spending import CHARGE, Account
from fedtune.wire import Address


def charge(
    folder: Path, key: bytes, mechanism: Mechanism, address: Address, inputs: str, *, solved: bool
) -> None:
    """Enter a round before its rows are learnt from; the same inputs are not charged again.

    Args:
        folder: of what the client keeps.
        key: its secret.
        mechanism: its own.
        address: of the turn.
        inputs: their hash.
        solved: whether the noise was found from the budget, so that it covers the recipe's rounds.

    Raises:
        BudgetError: the round would cost more than the recipe allows.
        LedgerError: the client's ledger was altered.
    """
    name, ledger = address.client, Ledger(folder, key)
    if spending.of(ledger.lines).mechanisms != {name: mechanism}:
        ledger.append(BEGIN, run=address.run, mechanisms={name: asdict(mechanism)})
    if any(line["kind"] == CHARGE and line["inputs"] == inputs for line in ledger.lines):
        return
    after = spending.of(ledger.lines).after([name])[name]
    covered = not mechanism.budget or (solved and _covered(after, mechanism))
    if not covered and after.epsilon > mechanism.budget:
        raise BudgetError(
            f"round {address.round} with these inputs would bring the epsilon of this client's own "
            f"ledger to {after.epsilon:.4g}, above privacy.epsilon = {mechanism.budget:.4g}, so "
            "nothing was learnt from its rows"
        )
    ledger.append(CHARGE, round=address.round, clients=[name], inputs=inputs)


def _covered(account: Account, mechanism: Mechanism) -> bool:
    """Whether these are no more rounds than the noise was made for, all of one mechanism."""
    return account.rounds <= mechanism.rounds and len(account.events) == 1
