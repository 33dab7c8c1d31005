"""The coordinator's side of secure aggregation: five exchanges in the place of a round's one.

keys, shares, masked, sign, reveal: whoever does not answer a leg, or answers it wrongly, is out of
the round, down to the threshold; below it the round ends and nothing was revealed. What is needed
to open the sum is on the disk before anybody is asked to reveal, since a client reveals once a
round: after a crash the round goes on with the very same request.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np
from flwr.app import RecordDict
from flwr.serverapp import Grid

from fedtune import adapter, wire
from fedtune.adapter import State
from fedtune.errors import RunError
from fedtune.privacy import ring, unmasking
from fedtune.privacy.identity import SMALLEST
from fedtune.privacy.letters import (
    Delivery,
    Entries,
    Entry,
    Masked,
    Opening,
    RefusedError,
    Request,
    Revealed,
    Session,
    Shares,
    Signed,
    Survivors,
    body_of,
    digest,
    verify,
)
from fedtune.privacy.masks import Words
from fedtune.privacy.protocol import checked
from fedtune.privacy.ring import Layout, Totals
from fedtune.privacy.secure import Masked as Settings
from fedtune.privacy.unmasking import Pending
from fedtune.records import Rejection
from fedtune.wire import Address, RejectedError
from server import exchange
from server.pending import Journal
from server.roster import Roster

T = TypeVar("T")


@dataclass(frozen=True)
class Asked:
    """What a round is about.

    Attributes:
        run: the run's id, "/" and the arm.
        round: from 1.
        addresses: of the cohort's clients, in the order of names.
        broadcast: what all of them receive.
        schema: tensors of the names, shapes and dtypes that each gives.
        metrics: of training, and how many numbers each has.
        work: of each client's training, in any unit.
        config: digest of the recipe.
        settings: of the recipe.
        weighting: of the recipe.
    """

    run: str
    round: int
    addresses: Mapping[str, Address]
    broadcast: State
    schema: State
    metrics: Mapping[str, int]
    work: Mapping[str, float]
    config: bytes
    settings: Settings
    weighting: str


@dataclass
class Legs:
    """How letters travel.

    Attributes:
        grid: Flower's way to the nodes.
        roster: who is where.
        timeout: seconds to wait for all answers to one leg.
        moved: told the bytes of each message: (down, up).
        rejected: told of each answer that was set aside.
        rejections: all of them.
    """

    grid: Grid
    roster: Roster
    timeout: float
    moved: Callable[[int, int], None]
    rejected: Callable[[Rejection], None]
    rejections: list[Rejection] = field(default_factory=list)

    def identity(self, name: str) -> bytes:
        """The key by which a client made itself known when the run began."""
        return bytes.fromhex(self.roster.members[name].identity)

    def exchange(
        self,
        leg: str,
        asked: Asked,
        bodies: Mapping[str, bytes],
        accept: Callable[[str, RecordDict, Signed], T],
        extra: State | None = None,
    ) -> dict[str, T]:
        """What was accepted, by name.

        Args:
            leg: of the protocol.
            asked: what the round is about.
            bodies: client -> the letter that it is sent.
            accept: makes of an answer what is kept, or raises why not.
            extra: arrays beside the letter.
        """
        turns = {name: (asked.addresses[name], extra or {}) for name in bodies}
        sent = exchange.contents(turns)
        records = {body: wire.letter_record(body) for body in set(bodies.values())}
        for name, content in sent.items():
            content[wire.LETTER] = records[bodies[name]]
            self.moved(wire.size(content), 0)
        work = asked.work if leg == "masked" else dict.fromkeys(bodies, 1.0)
        answers = exchange.ask(
            self.grid, self.roster, f"train.{leg}", sent, work, asked.round, self.timeout
        )
        accepted: dict[str, T] = {}
        for name, answer in answers:
            try:
                if isinstance(answer, Rejection):
                    raise RejectedError(answer.code, answer.reason)
                self.moved(0, wire.size(answer))
                wire.same_turn(answer, asked.addresses[name])
                accepted[name] = accept(name, answer, Signed(*wire.letter_of(answer)))
            except (RejectedError, RefusedError) as error:
                self.rejections.append(Rejection(name, error.code, error.reason))
                self.rejected(self.rejections[-1])
        return dict(sorted(accepted.items()))

    def require(self, leg: str, left: int, needed: int, round: int, after: str) -> None:
        """Nothing, if enough clients are left.

        Raises:
            RunError: too few.
        """
        if left >= needed:
            return
        reasons = "; ".join(
            f"{r.client}: {r.reason.removeprefix('RefusedError: ').rstrip('.')}"
            for r in self.rejections
        )
        raise RunError(
            f"Round {round}: {left} clients are left after leg '{leg}' of secure aggregation, "
            f"{needed} are needed. {reasons}. {after}"
        )


NOTHING = "Nothing of this round was revealed; run the same command again to repeat it."
STUCK = "The sum is masked yet; run the same command again to ask those clients for their shares."


def collect(asked: Asked, legs: Legs, folder: Path) -> tuple[tuple[str, ...], Totals]:
    """The clients whose updates are in the sum, and what it tells.

    Args:
        asked: what the round is about.
        legs: how letters travel.
        folder: what must outlive a crash lies here.

    Raises:
        RunError: too few clients stayed, or the sum is not what they signed.
    """
    journal = Journal(folder)
    if (found := journal.pending(asked.run, asked.round)) is None:
        found = _masked_sum(asked, legs, journal.attempt(asked.round))
        journal.keep(*found)
    pending, total = found
    if pending.broadcast != bytes.fromhex(adapter.digest(asked.broadcast)):
        raise RunError(
            f"Round {asked.round} was masked for another model than this run now has. Give the run "
            "another name (name=second)."
        )
    words = _revealed(asked, legs, pending, total)
    layout = Layout.of(asked.schema, asked.metrics)
    factors = ring.multipliers(asked.run, asked.round, layout.words)
    grid = asked.settings.grid(len(pending.opening.cohort), asked.weighting)
    active = pending.survivors.active
    try:
        totals = ring.decoded(grid, layout, words, factors, asked.schema)
        if totals.clients != len(active):
            raise RefusedError("E_SUM", f"the sum counts {totals.clients} of {len(active)} clients")
    except RefusedError as error:
        raise _wrong(asked, error) from error
    return active, totals


def _wrong(asked: Asked, error: RefusedError) -> RunError:
    return RunError(
        f"Round {asked.round}: a client did not keep to secure aggregation, and it cannot be told "
        f"which ({error.reason}). Nothing of this round was kept. Give the run another name "
        "(name=second)."
    )


def _masked_sum(asked: Asked, legs: Legs, attempt: int) -> tuple[Pending, Words]:
    """Legs 1 to 3 and the signatures of leg 4."""
    opening = _opening(asked, legs, attempt)
    entries = _keys(asked, legs, opening)
    shares = _shares(asked, legs, opening, entries)
    broadcast = bytes.fromhex(adapter.digest(asked.broadcast))
    active, total = _words(asked, legs, opening, shares, broadcast)
    dead = tuple(name for name in shares if name not in active)
    survivors = Survivors(opening.session, tuple(active), dead)
    body, session = body_of(survivors), opening.session

    def accept(name: str, content: RecordDict, signed: Signed) -> bytes:
        if signed.body != body:
            raise RefusedError("E_COHORT", "other survivors were signed")
        verify(legs.identity(name), "sign", session, signed, name)
        return signed.signature

    signatures = legs.exchange("sign", asked, dict.fromkeys(active, body), accept)
    legs.require("sign", len(signatures), opening.threshold, asked.round, NOTHING)
    plain = tuple(entry for entry, _ in entries.values())
    return Pending(opening, broadcast, plain, survivors, signatures), total


def _opening(asked: Asked, legs: Legs, attempt: int) -> Opening:
    names = tuple(asked.addresses)
    manifests = {legs.roster.members[name].manifest for name in names}
    if len(manifests) != 1:
        raise RunError("The clients have different rosters; secure aggregation needs one for all.")
    return Opening(
        Session(asked.run, asked.round, attempt),
        names,
        asked.settings.needed(len(names)),
        asked.config,
        bytes.fromhex(manifests.pop()),
        asked.settings.grid(len(names), asked.weighting).digest(),
        Layout.of(asked.schema, asked.metrics).digest(),
    )


def _keys(asked: Asked, legs: Legs, opening: Opening) -> dict[str, tuple[Entry, Signed]]:
    body = body_of(opening)
    identities = {name: legs.identity(name) for name in opening.cohort}

    def accept(name: str, content: RecordDict, signed: Signed) -> tuple[Entry, Signed]:
        return checked(signed, opening.session, digest(body), identities, [name]), signed

    found = legs.exchange("keys", asked, dict.fromkeys(opening.cohort, body), accept)
    legs.require("keys", len(found), opening.threshold, asked.round, NOTHING)
    return found


def _shares(
    asked: Asked, legs: Legs, opening: Opening, entries: Mapping[str, tuple[Entry, Signed]]
) -> dict[str, Shares]:
    body = body_of(Entries(opening.session, tuple(signed for _, signed in entries.values())))

    def accept(name: str, content: RecordDict, signed: Signed) -> Shares:
        session, identity = opening.session, legs.identity(name)
        letter = unmasking.accepted(Shares, "shares", session, name, identity, signed)
        unmasking.check_shares(letter, digest(body), list(entries))
        return letter

    found = legs.exchange("shares", asked, dict.fromkeys(entries, body), accept)
    legs.require("shares", len(found), opening.threshold, asked.round, NOTHING)
    return found


def _words(
    asked: Asked,
    legs: Legs,
    opening: Opening,
    shares: Mapping[str, Shares],
    broadcast: bytes,
) -> tuple[list[str], Words]:
    """Whose words arrived, and their sum, added as they come."""
    session, senders = opening.session, list(shares)
    count = Layout.of(asked.schema, asked.metrics).words
    total = np.zeros(count, np.uint32)

    def accept(name: str, content: RecordDict, signed: Signed) -> None:
        words = wire.gate_words(content, asked.addresses[name], count)
        identity = legs.identity(name)
        letter = unmasking.accepted(Masked, "masked", session, name, identity, signed)
        unmasking.check_masked(letter, senders, broadcast, words)
        np.add(total, words, out=total)

    bodies = {
        name: body_of(Delivery(session, {j: shares[j].sealed[name] for j in senders if j != name}))
        for name in senders
    }
    active = list(legs.exchange("masked", asked, bodies, accept, asked.broadcast))
    legs.require("masked", len(active), opening.threshold, asked.round, NOTHING)
    return active, total


def _revealed(asked: Asked, legs: Legs, pending: Pending, total: Words) -> Words:
    """Leg 4: the shares of the survivors' masks, and the sum without masks."""
    session, survivors = pending.opening.session, pending.survivors
    request = Request(session, survivors.active, survivors.dead, pending.signatures)

    def accept(name: str, content: RecordDict, signed: Signed) -> Revealed:
        identity = legs.identity(name)
        letter = unmasking.accepted(Revealed, "reveal", session, name, identity, signed)
        unmasking.check_revealed(letter, survivors)
        return letter

    bodies = dict.fromkeys(sorted(pending.signatures), body_of(request))
    letters = legs.exchange("reveal", asked, bodies, accept)
    legs.require("reveal", len(letters), pending.opening.threshold, asked.round, STUCK)
    try:
        return unmasking.unmasked(total, pending, letters)
    except RefusedError as error:
        raise _wrong(asked, error) from error


def obstacle(draws: Sequence[Sequence[str]], settings: Settings, weighting: str) -> str | None:
    """Why the cohorts of a run cannot be masked, None where they can; an empty one needs none."""
    for round, names in enumerate(draws, 1):
        if not names:
            continue
        if len(names) < SMALLEST:
            return f"round {round} would ask {len(names)} clients, and {SMALLEST} are needed"
        try:
            settings.grid(len(names), weighting)
        except ValueError as error:
            return f"round {round}: {error}"
    return None
