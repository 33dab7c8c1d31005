"""The coordinator's side of secure aggregation: what it accepts, and how masks leave the sum.

It trusts no client more than they trust it: what a client signed is checked against the key that it
showed when the run began, a rebuilt secret against what was published of it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from fedtune.privacy.letters import (
    Entry,
    Masked,
    Opening,
    RefusedError,
    Revealed,
    Session,
    Shares,
    Signed,
    Survivors,
    body_of,
    digest,
    read,
    verify,
)
from fedtune.privacy.masks import (
    Words,
    add_stream,
    commitment,
    pair_seed,
    public_of,
    told,
)
from fedtune.privacy.sharing import SHARE, combine

T = TypeVar("T", Shares, Masked, Revealed)


def accepted(
    kind: type[T], leg: str, session: Session, client: str, identity: bytes, signed: Signed
) -> T:
    """The letter of a leg, if it is of this client and session.

    Raises:
        RefusedError: it is not.
    """
    verify(identity, leg, session, signed, client)
    letter = read(kind, signed.body)
    if letter.session != session or letter.client != client:
        raise RefusedError("E_REPLAY", "the reply belongs to another turn")
    return letter


def check_shares(letter: Shares, entries: bytes, names: Sequence[str]) -> None:
    """Nothing, if everybody else gets a share.

    Raises:
        RefusedError: E_COHORT.
    """
    if letter.entries != entries or letter.sealed.keys() != set(names) - {letter.client}:
        raise RefusedError("E_COHORT", "the shares are not for the clients that sent keys")


def check_masked(letter: Masked, senders: Sequence[str], broadcast: bytes, words: Words) -> None:
    """Nothing, if the words are those that were signed, for this model and these clients.

    Raises:
        RefusedError: E_STALE, E_COHORT or E_AUTH.
    """
    if letter.broadcast != broadcast:
        raise RefusedError("E_STALE", "the reply belongs to another model")
    if letter.senders != tuple(senders):
        raise RefusedError("E_COHORT", "the words are masked for other clients")
    if letter.words != digest(words.tobytes()):
        raise RefusedError("E_AUTH", "the words are not those that the client signed")


def check_revealed(letter: Revealed, survivors: Survivors) -> None:
    """Nothing, if there is a share for everybody and of the right kind.

    Raises:
        RefusedError: E_COHORT or E_SCHEMA.
    """
    if set(letter.seeds) != set(survivors.active) or set(letter.keys) != set(survivors.dead):
        raise RefusedError("E_COHORT", "the shares are not of the survivors that were signed")
    if any(len(share) != SHARE for share in (*letter.seeds.values(), *letter.keys.values())):
        raise RefusedError("E_SCHEMA", "a share has another length")


@dataclass(frozen=True)
class Pending:
    """What the coordinator needs to open a sum, beside the sum of the masked words itself.

    Attributes:
        opening: of the session.
        broadcast: digest of the model.
        entries: of U1, in the order of names, which numbers the shares.
        survivors: as they were signed.
        signatures: of at least t of them.
    """

    opening: Opening
    broadcast: bytes
    entries: tuple[Entry, ...]
    survivors: Survivors
    signatures: dict[str, bytes]


def unmasked(total: Words, pending: Pending, letters: Mapping[str, Revealed]) -> Words:
    """The sum of the active clients' words.

    S = sum_i y_i - sum_i PRG(b_i) - sum_i sum_d (PRG(seed_id) if d > i else -PRG(seed_id)), for i
    active and d dead, modulo 2^32.

    Args:
        total: sum of the masked words of the active.
        pending: of the round.
        letters: client -> its accepted reply to the reveal.

    Raises:
        RefusedError: E_COHORT: too few; E_SUM: the shares give another secret than was published.
    """
    threshold, session = pending.opening.threshold, pending.opening.session
    if len(letters) < threshold:
        raise RefusedError(
            "E_COHORT", f"{len(letters)} clients revealed, but {threshold} are needed"
        )
    numbers = {entry.client: x for x, entry in enumerate(pending.entries, 1)}
    entries = {entry.client: entry for entry in pending.entries}
    chosen = sorted(letters)[:threshold]

    def rebuilt(client: str, kind: str) -> bytes:
        try:
            return combine({numbers[j]: getattr(letters[j], kind)[client] for j in chosen})
        except ValueError as error:
            raise _other_secret(client) from error

    words = np.array(total, np.uint32)
    for client in pending.survivors.active:
        seed = rebuilt(client, "seeds")
        if commitment(session, client, seed) != entries[client].commitment:
            raise _other_secret(client)
        add_stream(words, seed, -1)
    bound = told(digest(body_of(pending.opening)), pending.broadcast)
    for gone in pending.survivors.dead:
        secret = rebuilt(gone, "keys")
        if public_of(secret) != entries[gone].mask_key:
            raise _other_secret(gone)
        for client in pending.survivors.active:
            public = entries[client].mask_key
            seed = pair_seed(secret, public, session, bound, gone, client)
            add_stream(words, seed, -1 if gone > client else 1)
    return words


def _other_secret(client: str) -> RefusedError:
    return RefusedError(
        "E_SUM", f"the shares of a secret of '{client}' do not fit what it published"
    )
