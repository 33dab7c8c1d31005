"""What a client knows, and what it keeps between the legs of secure aggregation.

A stage is kept after each leg and taken by the next, so a leg can be answered once only; a secret
is in a stage for as long as a later leg needs it. A stage is a letter to oneself: it has a body.
"""

from collections.abc import Callable
from dataclasses import dataclass

from fedtune.privacy.identity import Identity
from fedtune.privacy.letters import (
    Entry,
    Masked,
    Opening,
    Session,
    Signed,
    Survivors,
    body_of,
    signature,
)
from fedtune.privacy.masks import Words, add_stream
from fedtune.privacy.secure import Masked as Settings

Draw = Callable[[int], bytes]


@dataclass(frozen=True)
class Rules:
    """What a client knows by itself, and holds the coordinator to.

    Attributes:
        identity: its key and its roster.
        run: the run's id, "/" and the arm.
        rounds: how many the run has.
        config: digest of the recipe as this client has it.
        settings: of the recipe.
        weighting: of the recipe.
    """

    identity: Identity
    run: str
    rounds: int
    config: bytes
    settings: Settings
    weighting: str

    def sign(self, leg: str, session: Session, letter: object) -> Signed:
        """The letter with this client's signature."""
        body = body_of(letter)
        return Signed(body, signature(self.identity.key, leg, session, body))


@dataclass(frozen=True)
class Keyed:
    """Kept after leg 1: e_i, m_i and b_i, whose public sides were sent."""

    opening: Opening
    share_secret: bytes
    mask_secret: bytes
    seed: bytes
    entry: Signed


@dataclass(frozen=True)
class Dealt:
    """Kept after leg 2: the same secrets, everybody's public keys, and the own shares."""

    opening: Opening
    share_secret: bytes
    mask_secret: bytes
    seed: bytes
    entries: tuple[Entry, ...]
    own: bytes


@dataclass(frozen=True)
class Waiting:
    """Kept after leg 3: shares of others' secrets; the own secrets are gone."""

    session: Session
    threshold: int
    shares: dict[str, bytes]  # of b_j, then of m_j, for j in U2


@dataclass(frozen=True)
class Committed:
    """Kept after leg 4, sign: the one pair of lists that this client will reveal for."""

    session: Session
    threshold: int
    shares: dict[str, bytes]
    survivors: Survivors


@dataclass(frozen=True)
class Done:
    """Kept after leg 4, reveal, until the next: what was revealed, and on which request."""

    session: Session
    request: bytes
    reply: Signed


Stage = Keyed | Dealt | Waiting | Committed


@dataclass(frozen=True)
class Mask:
    """Everything that hides one vector; it is never stored."""

    head: Masked
    cohort: int  # clients in U0
    layout: bytes  # digest of what the words must stand for
    own: bytes
    pairs: tuple[tuple[bytes, int], ...]  # seed and sign

    def hide(self, words: Words) -> Words:
        """The words plus the client's own stream and its pairs', modulo 2^32."""
        hidden = words.copy()
        for seed, sign in ((self.own, 1), *self.pairs):
            add_stream(hidden, seed, sign)
        return hidden


def session_of(stage: Stage) -> Session:
    """The session that a stage belongs to."""
    return stage.opening.session if isinstance(stage, Keyed | Dealt) else stage.session
