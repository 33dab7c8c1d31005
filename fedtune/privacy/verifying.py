"""Recompute from a ledger alone what a run has spent, and refuse one that does not add up.

Everything a line claims follows from the lines before it: its hash from their bytes, its epsilon
from their events. What the run's folder holds beside the ledger must agree with it: no round may
have been committed that was not charged.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedtune.config import Experiment
from fedtune.errors import RecipeError
from fedtune.privacy import accounting, distributed, ledger, spending
from fedtune.privacy.ledger import BEGIN, KEY, LedgerError, Line
from fedtune.privacy.noise import KEY_BYTES, subkey
from fedtune.privacy.spending import CHARGE, Account, Spending

SAME, OTHER = 1e-9, 1e-2  # relative differences of an epsilon: same accountant, another release
RELEASE = "release"


@dataclass(frozen=True)
class Verified:
    """What a ledger that holds says.

    Attributes:
        lines: all of them.
        begin: the last "begin".
        accounts: client -> what was charged; "" stands for all clients in client mode.
        worst: the account with the largest epsilon.
        rounds: the last committed one.
    """

    lines: list[Line]
    begin: Line
    accounts: dict[str, Account]
    worst: str
    rounds: int


def verify(folder: Path) -> Verified:
    """The accounts of a run's ledger, every number of it recomputed.

    Raises:
        RecipeError: the folder holds no run that promises anything.
        LedgerError: the ledger was altered, or does not agree with itself or with the run.
    """
    if not (folder / ledger.FILE).exists():
        raise _absent(folder)
    lines = ledger.read(folder)
    _same_key(folder, lines[0])
    spent = _recomputed(folder, lines)
    begin = [line for line in lines if line["kind"] == BEGIN][-1]
    recipe = Experiment.load(folder / "experiment.toml").identity()
    if recipe != begin["recipe"]:
        raise LedgerError(f"{folder} has another recipe than its ledger.")
    last = _committed(folder, lines)
    return Verified(lines, begin, spent.accounts, spending.worst(spent.accounts), last)


def _absent(folder: Path) -> Exception:
    if not (folder / "experiment.toml").exists():
        return RecipeError(f"{folder} holds no run. Begin one with `fedtune run RECIPE`.")
    mode = Experiment.load(folder / "experiment.toml").privacy.mode
    if mode == "none":
        return RecipeError(f"The run in {folder} promises nothing: its privacy.mode is 'none'.")
    return LedgerError(f"The run in {folder} has privacy.mode = '{mode}', but its ledger is gone.")


def _same_key(folder: Path, first: Line) -> None:
    """Where the secret is at hand, the signatures must be its own."""
    key = (folder / KEY).read_bytes() if (folder / KEY).exists() else b""
    if len(key) == KEY_BYTES:
        signer = Ed25519PrivateKey.from_private_bytes(subkey(key, "ledger"))
        if signer.public_key().public_bytes_raw().hex() != first["public_key"]:
            raise LedgerError(f"The ledger of {folder} is signed with another key than {KEY}.")


def _recomputed(folder: Path, lines: Sequence[Line]) -> Spending:
    """The accounts; every charge's own numbers are compared with them."""
    spent = Spending()
    tolerance = SAME
    for line in lines:
        spent.take(line)
        if line["kind"] == BEGIN:
            same = line["accountant"]["name"] == accounting.accountant()
            tolerance = SAME if same else OTHER
        number = line["seq"] + 1
        if line["kind"] == RELEASE and "shares" in line:
            promised = next(iter(spent.mechanisms.values()))
            if why := distributed.lacking(line, promised):
                raise LedgerError(f"Line {number} of {folder}'s ledger tells of {why}.")
        if line["kind"] != CHARGE:
            continue
        name = line["worst"]
        budget = spent.mechanisms[name].budget
        if spent.mechanisms[name].sigma != line["sigma_abs"]:
            raise LedgerError(
                f"Line {number} of {folder}'s ledger has another noise than it began."
            )
        cost = spending.told(spent.accounts[name].cost)
        for key, value in cost.items():
            if not _close(line["cost"].get(key), value, tolerance):
                raise LedgerError(
                    f"Line {number} of {folder}'s ledger says {key} = {line['cost'].get(key)}, "
                    f"but its events cost {value}."
                )
        if budget and spent.accounts[name].epsilon > budget * (1 + tolerance):
            raise LedgerError(f"Line {number} of {folder}'s ledger exceeds the budget {budget}.")
    return spent


def _close(claimed: float | None, found: float | None, tolerance: float) -> bool:
    if claimed is None or found is None:
        return claimed is found
    return math.isclose(claimed, found, rel_tol=tolerance, abs_tol=tolerance)


def _committed(folder: Path, lines: Sequence[Line]) -> int:
    """The last committed round, after each was found charged and released in the ledger.

    Raises:
        LedgerError: one was not, so lines were cut off.
    """
    charged: dict[int, set[str]] = {}
    released: set[int] = set()
    for line in lines:
        if line["kind"] == CHARGE:
            charged.setdefault(line["round"], set()).update(line["clients"])
        elif line["kind"] == RELEASE:
            released.add(line["round"])
    last = _head(folder)
    path = folder / "rounds.jsonl"
    records = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    for record in map(json.loads, records):
        round, cohort = record["round"], set(record["cohort"])
        if not 0 < round <= last:
            continue
        paid = charged.get(round, set())
        if not (cohort <= paid or "" in paid) or round not in released:
            raise LedgerError(
                f"Round {round} of {folder} was committed, but its ledger has no charge for it."
            )
    return last


def _head(folder: Path) -> int:
    try:
        return int((folder / "checkpoint" / "HEAD").read_text())
    except (OSError, ValueError):
        return 0
