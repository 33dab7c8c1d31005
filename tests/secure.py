"""A round of secure aggregation played by its pure functions, for the tests that change it."""

import hashlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from fedtune.privacy import protocol, unmasking
from fedtune.privacy.identity import Identity, simulated
from fedtune.privacy.letters import (
    Delivery,
    Entries,
    Entry,
    Opening,
    RefusedError,
    Request,
    Revealed,
    Session,
    Shares,
    Signed,
    Survivors,
    read,
)
from fedtune.privacy.masks import Words, keystream
from fedtune.privacy.secure import Masked
from fedtune.privacy.stages import Committed, Dealt, Done, Draw, Keyed, Mask, Rules, Waiting

RUN, CONFIG, LAYOUT, MODEL = "study-0123/", b"config", b"layout", b"model"
LEGS = ("keys", "shares", "masked", "sign", "reveal")
WORDS = 40


def stream(label: str) -> Draw:
    """Bytes that look random and are the same in every run."""
    drawn = 0

    def draw(count: int) -> bytes:
        nonlocal drawn
        drawn += 1
        return hashlib.shake_256(f"{label} {drawn}".encode()).digest(count)

    return draw


def names_of(count: int) -> list[str]:
    return [f"client-{number:02d}" for number in range(count)]


@dataclass
class Table:
    """Clients and an honest coordinator; every stage is there to be taken again.

    Attributes:
        count: clients in the cohort.
        attempt: at round 1.
        gone: client -> the leg whose answer never arrives.
        settings: of the recipe.
        told: client -> another model than the others'.
    """

    count: int
    attempt: int = 1
    gone: Mapping[str, str] = field(default_factory=dict)
    settings: Masked = field(default_factory=Masked)
    told: Mapping[str, bytes] = field(default_factory=dict)

    @cached_property
    def names(self) -> list[str]:
        return names_of(self.count)

    @cached_property
    def identities(self) -> dict[str, Identity]:
        return simulated(CONFIG, self.names)

    @cached_property
    def public(self) -> dict[str, bytes]:
        return {name: identity.public for name, identity in self.identities.items()}

    @property
    def session(self) -> Session:
        return Session(RUN, 1, self.attempt)

    def rules(self, name: str) -> Rules:
        return Rules(self.identities[name], RUN, 3, CONFIG, self.settings, "examples")

    def left(self, names: Collection[str], leg: str) -> list[str]:
        return [name for name in names if self.gone.get(name) != leg]

    @cached_property
    def opening(self) -> Opening:
        return Opening(
            self.session,
            tuple(self.names),
            self.settings.needed(self.count),
            CONFIG,
            self.identities[self.names[0]].manifest.digest(),
            self.settings.grid(self.count, "examples").digest(),
            LAYOUT,
        )

    @cached_property
    def keyed(self) -> dict[str, tuple[Keyed, Signed]]:
        return {
            name: protocol.keys(
                self.rules(name), self.opening, None, None, stream(f"{self.attempt} {name}")
            )
            for name in self.left(self.names, "keys")
        }

    @cached_property
    def entries(self) -> Entries:
        return Entries(self.session, tuple(signed for _, signed in self.keyed.values()))

    @cached_property
    def dealt(self) -> dict[str, tuple[Dealt, Signed]]:
        return {
            name: protocol.shares(
                self.rules(name), self.keyed[name][0], self.entries, stream(f"deal {name}")
            )
            for name in self.left(self.keyed, "shares")
        }

    def delivery(self, name: str) -> Delivery:
        letters = {j: read(Shares, signed.body) for j, (_, signed) in self.dealt.items()}
        return Delivery(
            self.session, {j: letter.sealed[name] for j, letter in letters.items() if j != name}
        )

    @cached_property
    def waiting(self) -> dict[str, tuple[Waiting, Mask]]:
        return {
            name: protocol.masking(
                self.rules(name),
                self.dealt[name][0],
                self.delivery(name),
                self.told.get(name, MODEL),
            )
            for name in self.dealt
        }

    def words(self, name: str) -> Words:
        return keystream(hashlib.sha256(name.encode()).digest(), WORDS)

    @cached_property
    def hidden(self) -> dict[str, Words]:
        return {
            name: self.waiting[name][1].hide(self.words(name))
            for name in self.left(self.waiting, "masked")
        }

    @cached_property
    def survivors(self) -> Survivors:
        dead = [name for name in self.waiting if name not in self.hidden]
        return Survivors(self.session, tuple(self.hidden), tuple(dead))

    @cached_property
    def committed(self) -> dict[str, tuple[Committed, Signed]]:
        return {
            name: protocol.sign(self.rules(name), self.waiting[name][0], self.survivors)
            for name in self.left(self.hidden, "sign")
        }

    @cached_property
    def request(self) -> Request:
        signatures = {name: signed.signature for name, (_, signed) in self.committed.items()}
        return Request(self.session, self.survivors.active, self.survivors.dead, signatures)

    @cached_property
    def done(self) -> dict[str, tuple[Done, Signed]]:
        return {
            name: protocol.reveal(self.rules(name), self.committed[name][0], self.request)
            for name in self.left(self.committed, "reveal")
        }

    @cached_property
    def total(self) -> Words:
        return sum_of(list(self.hidden.values()))

    @cached_property
    def pending(self) -> unmasking.Pending:
        entries = tuple(read(Entry, signed.body) for _, signed in self.keyed.values())
        return unmasking.Pending(
            self.opening, MODEL, entries, self.survivors, self.request.signatures
        )

    def unmasked(self) -> Words:
        letters = {name: read(Revealed, signed.body) for name, (_, signed) in self.done.items()}
        return unmasking.unmasked(self.total, self.pending, letters)


def sum_of(vectors: list[Words]) -> Words:
    total = np.zeros(WORDS, np.uint32)
    for vector in vectors:
        total += vector
    return total


def refusal(act: Callable[[], object]) -> RefusedError | None:
    """Why it was refused, None where it was not."""
    try:
        act()
    except RefusedError as error:
        return error
    return None
