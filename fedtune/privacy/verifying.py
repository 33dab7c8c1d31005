"""Recompute from a ledger what a run has spent, and refuse one that does not add up.

Everything a line claims follows from the lines before it: its hash from their bytes, its epsilon
from their events. What the run's folder holds beside the ledger must agree with it: the mechanisms
are those of its recipe and roster, and no round was committed or released that was not charged.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedtune.config import Experiment
from fedtune.errors import RecipeError
from fedtune.privacy import accounting, ledger, rederiving, spending
from fedtune.privacy.ledger import BEGIN, KEY, LedgerError, Line
from fedtune.privacy.noise import KEY_BYTES, subkey
from fedtune.privacy.rederiving import SAME
from fedtune.privacy.spending import CHARGE, RELEASE, Account, Spending

OTHER = 1e-2  # relative difference of an epsilon that another release of the accountant may have


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
    rederiving.require(Experiment.load(folder / "experiment.toml"), _units(folder), lines)
    spent = _recomputed(folder, lines)
    begin = [line for line in lines if line["kind"] == BEGIN][-1]
    last = _committed(folder, lines)
    return Verified(lines, begin, spent.accounts, spending.worst(spent.accounts), last)


def _units(folder: Path) -> dict[str, int]:
    """Client -> its records, as roster.json tells; 0 where they are not told."""
    path = folder / "roster.json"
    try:
        clients = json.loads(path.read_text(encoding="utf-8"))["clients"]
        return {str(client["name"]): int(client["units"] or 0) for client in clients}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LedgerError(f"{path} does not tell whose privacy the ledger is about.") from error


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
        if line["kind"] != CHARGE:
            continue
        number = line["seq"] + 1
        name = line["worst"]
        account, budget = spent.accounts.get(name, Account()), spent.mechanisms[name].budget
        here = spending.present(spent.accounts, spent.mechanisms)
        most = here[spending.worst(here)].epsilon
        if account.epsilon < most * (1 - OTHER):
            raise LedgerError(f"Line {number} of {folder}'s ledger hides who is worse off.")
        cost = spending.told(account.cost)
        for key, value in cost.items():
            if not _close(line["cost"].get(key), value, tolerance):
                raise LedgerError(
                    f"Line {number} of {folder}'s ledger says {key} = {line['cost'].get(key)}, "
                    f"but its events cost {value}."
                )
        if budget and account.epsilon > budget * (1 + tolerance):
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
    released: dict[int, set[str]] = {}
    for line in lines:
        if line["kind"] == CHARGE:
            charged.setdefault(line["round"], set()).update(line["clients"])
        elif line["kind"] == RELEASE:
            released.setdefault(line["round"], set()).update(line.get("clients", ()))
    last = _head(folder)
    path = folder / "rounds.jsonl"
    lines_ = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    records = [json.loads(line) for line in lines_]
    if missing := set(range(1, last + 1)) - {record["round"] for record in records}:
        raise LedgerError(
            f"{path} does not tell of round {min(missing)}, and {last} were committed, so whom the "
            "ledger must have charged is not known. `fedtune run RECIPE --resume` cannot bring it "
            "back; a copy can."
        )
    for record in records:
        round, cohort = record["round"], set(record["cohort"])
        if not 0 < round <= last:
            continue
        paid = charged.get(round, set())
        if not (cohort <= paid or "" in paid) or round not in released:
            raise LedgerError(
                f"Round {round} of {folder} was committed, but its ledger has no charge for it."
            )
        joined = cohort - {rejection["client"] for rejection in record["rejected"]}
        if "" not in paid and (untold := joined - released[round]):
            raise LedgerError(
                f"Round {round} of {folder} joined {sorted(untold)}, of whom its ledger releases "
                "nothing."
            )
    return last


def _head(folder: Path) -> int:
    try:
        return int((folder / "checkpoint" / "HEAD").read_text())
    except (OSError, ValueError):
        return 0
