"""A client's side of secure aggregation: what it answers to each letter, and what it refuses.

Bonawitz et al., "Practical Secure Aggregation for Privacy-Preserving Machine Learning", CCS 2017,
https://doi.org/10.1145/3133956.3133982, figure 4, the full graph against an active coordinator.
Beyond it, identity keys are known out of band; masks are bound to the model that was broadcast
(Pasquini et al., "Eluding Secure Aggregation in Federated Learning via Model Inconsistency", CCS
2022, https://arxiv.org/abs/2111.07380); and a client reveals once a round over all attempts, since
two sums of the same updates over different survivors differ by one client's update.

Each function takes the stage that the client kept after the leg before and gives the next.
"""

from collections.abc import Sequence

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
    read,
    verify,
)
from fedtune.privacy.masks import commitment, pair_seed, public_of, seal, told, unseal
from fedtune.privacy.sharing import SHARE, split
from fedtune.privacy.stages import (
    Committed,
    Dealt,
    Done,
    Draw,
    Keyed,
    Mask,
    Rules,
    Stage,
    Waiting,
    session_of,
)


def _same(kept: Session, came: Session) -> None:
    if came != kept:
        raise RefusedError("E_REPLAY", f"the letter is of {_name(came)}, not of {_name(kept)}")


def _name(session: Session) -> str:
    return f"run {session.run}, round {session.round}, attempt {session.attempt}"


def _sorted(names: Sequence[str], what: str) -> None:
    if list(names) != sorted(set(names)):
        raise RefusedError("E_COHORT", f"the {what} are not in order, or one is there twice")


def _require(count: int, needed: int, what: str) -> None:
    if count < needed:
        raise RefusedError("E_COHORT", f"{count} clients {what}, but {needed} are needed")


def keys(
    rules: Rules, letter: Opening, before: Stage | None, done: Done | None, draw: Draw
) -> tuple[Keyed, Signed]:
    """Leg 1: fresh keys for a session that is as this client's own files say.

    Args:
        rules: what it must be.
        letter: from the coordinator.
        before: what is kept of an attempt that came to nothing.
        done: the last reveal.
        draw: that many random bytes of a cryptographic generator.

    Raises:
        RefusedError: anything is otherwise.
    """
    _check_session(rules, letter.session, before, done)
    manifest, own = rules.identity.manifest, rules.identity.client
    _sorted(letter.cohort, "clients of the cohort")
    if strangers := [name for name in letter.cohort if name not in manifest.keys]:
        raise RefusedError("E_COHORT", f"'{strangers[0]}' is not in this client's roster")
    if own not in letter.cohort:
        raise RefusedError("E_COHORT", "this client is not in the cohort")
    count = len(letter.cohort)
    _require(count, manifest.minimum_cohort, "are in the cohort")
    if letter.threshold != rules.settings.needed(count):
        raise RefusedError(
            "E_COHORT",
            f"a threshold of {letter.threshold} for {count} clients, not "
            f"{rules.settings.needed(count)} as the recipe says",
        )
    for what, came, known in (
        ("recipe", letter.config, rules.config),
        ("roster", letter.manifest, manifest.digest()),
        ("grid of numbers", letter.grid, rules.settings.grid(count, rules.weighting).digest()),
    ):
        if came != known:
            raise RefusedError("E_STALE", f"the coordinator has another {what} than this client")
    share_secret, mask_secret, seed = draw(32), draw(32), draw(32)
    entry = Entry(
        letter.session,
        own,
        digest(body_of(letter)),
        public_of(share_secret),
        public_of(mask_secret),
        commitment(letter.session, own, seed),
    )
    signed = rules.sign("keys", letter.session, entry)
    return Keyed(letter, share_secret, mask_secret, seed, signed), signed


def _check_session(rules: Rules, came: Session, before: Stage | None, done: Done | None) -> None:
    run = rules.identity.manifest.run
    if came.run != rules.run or (run and run != rules.run.partition("/")[0]):
        wanted = rules.run if came.run != rules.run else run
        raise RefusedError("E_REPLAY", f"the session is of run {came.run}, not of {wanted}")
    if not 1 <= came.round <= rules.rounds:
        raise RefusedError("E_REPLAY", f"round {came.round} of a run of {rules.rounds}")
    if done and came.round <= done.session.round:
        raise RefusedError(
            "E_REPLAY",
            f"this client has revealed the sum of round {done.session.round} already, and a second "
            "sum of a round would tell single updates. Give the run another name (name=second)",
        )
    if before:
        last = session_of(before)
        if (came.round, came.attempt) <= (last.round, last.attempt):
            raise RefusedError("E_REPLAY", f"{_name(came)} is not after {_name(last)}")


def shares(rules: Rules, kept: Keyed, letter: Entries, draw: Draw) -> tuple[Dealt, Signed]:
    """Leg 2: shares of b_i and m_i for everybody whose signed keys are there.

    Raises:
        RefusedError: a key is not its client's, not of this session, or there are too few.
    """
    session, own = kept.opening.session, rules.identity.client
    _same(session, letter.session)
    manifest, opening = rules.identity.manifest, digest(body_of(kept.opening))
    entries = tuple(
        checked(signed, session, opening, manifest.keys, kept.opening.cohort)
        for signed in letter.entries
    )
    names = [entry.client for entry in entries]
    _sorted(names, "entries")
    if kept.entry not in letter.entries:
        raise RefusedError("E_AUTH", "this client's own keys are missing or changed")
    public = [key for entry in entries for key in (entry.share_key, entry.mask_key)]
    if len(set(public)) < len(public):
        raise RefusedError("E_AUTH", "one key stands twice in the entries")
    _require(len(names), max(kept.opening.threshold, manifest.minimum_cohort), "sent keys")
    parts = zip(
        split(kept.seed, kept.opening.threshold, len(names), draw),
        split(kept.mask_secret, kept.opening.threshold, len(names), draw),
        strict=True,
    )
    texts = {
        entry.client: of_seed + of_key
        for entry, (of_seed, of_key) in zip(entries, parts, strict=True)
    }
    sealed = {
        entry.client: seal(
            kept.share_secret,
            entry.share_key,
            session,
            opening,
            (own, entry.client),
            texts[entry.client],
        )
        for entry in entries
        if entry.client != own
    }
    answer = Shares(session, own, digest(body_of(letter)), sealed)
    dealt = Dealt(kept.opening, kept.share_secret, kept.mask_secret, kept.seed, entries, texts[own])
    return dealt, rules.sign("shares", session, answer)


def checked(
    signed: Signed,
    session: Session,
    opening: bytes,
    identities: dict[str, bytes],
    cohort: Sequence[str],
) -> Entry:
    """The entry in a signed letter of leg 1, for clients and the coordinator alike.

    Args:
        signed: the letter.
        session: that it must be of.
        opening: digest that its author must have seen.
        identities: public keys by name.
        cohort: who may have written it.

    Raises:
        RefusedError: it is another's, of another session, or answers another opening.
    """
    entry = read(Entry, signed.body)
    _same(session, entry.session)
    if entry.client not in cohort:
        raise RefusedError("E_COHORT", f"'{entry.client}' is not in the cohort")
    verify(identities[entry.client], "keys", session, signed, entry.client)
    if entry.opening != opening:
        raise RefusedError("E_COHORT", f"'{entry.client}' was told of another cohort or recipe")
    return entry


def masking(rules: Rules, kept: Dealt, letter: Delivery, broadcast: bytes) -> tuple[Waiting, Mask]:
    """Leg 3: the mask of this round's one vector; it can be made once.

    Args:
        rules: of this client.
        kept: after leg 2.
        letter: what the others sealed for this client.
        broadcast: digest of the model that came with it.

    Raises:
        RefusedError: a share does not open, or too few clients are left.
    """
    session, own = kept.opening.session, rules.identity.client
    _same(session, letter.session)
    public = {entry.client: entry for entry in kept.entries}
    if strangers := letter.sealed.keys() - (public.keys() - {own}):
        raise RefusedError("E_COHORT", f"shares of '{min(strangers)}', who sent no keys")
    least = max(kept.opening.threshold, rules.identity.manifest.minimum_cohort)
    _require(len(letter.sealed) + 1, least, "sent shares")
    opening, opened = digest(body_of(kept.opening)), {own: kept.own}
    for name, text in letter.sealed.items():
        key = public[name].share_key
        opened[name] = unseal(kept.share_secret, key, session, opening, (name, own), text)
        if len(opened[name]) != 2 * SHARE:
            raise RefusedError("E_SCHEMA", f"what '{name}' sealed is no pair of shares")
    bound = told(opening, broadcast)
    pairs = tuple(
        (
            pair_seed(kept.mask_secret, public[name].mask_key, session, bound, own, name),
            1 if name > own else -1,
        )
        for name in sorted(letter.sealed)
    )
    head = Masked(session, own, tuple(sorted(opened)), broadcast, b"")
    waiting = Waiting(session, kept.opening.threshold, dict(sorted(opened.items())))
    mask = Mask(head, len(kept.opening.cohort), kept.opening.layout, kept.seed, pairs)
    return waiting, mask


def sign(rules: Rules, kept: Waiting, letter: Survivors) -> tuple[Committed, Signed]:
    """Leg 4, sign: agree to one division of U2 into those who arrived and those who did not.

    Raises:
        RefusedError: the lists overlap, leave somebody out, or too few arrived.
    """
    _same(kept.session, letter.session)
    _sorted(letter.active, "active clients")
    _sorted(letter.dead, "dead clients")
    if both := set(letter.active) & set(letter.dead):
        raise RefusedError("E_COHORT", f"'{min(both)}' is said to be active and dead")
    if odd := {*letter.active, *letter.dead} ^ kept.shares.keys():
        raise RefusedError("E_COHORT", f"'{min(odd)}' is missing or was not there before")
    if rules.identity.client not in letter.active:
        raise RefusedError("E_COHORT", "this client is said to be dead")
    _require(
        len(letter.active),
        max(kept.threshold, rules.identity.manifest.minimum_cohort),
        "are active",
    )
    committed = Committed(kept.session, kept.threshold, kept.shares, letter)
    return committed, rules.sign("sign", kept.session, letter)


def reveal(rules: Rules, kept: Committed, letter: Request) -> tuple[Done, Signed]:
    """Leg 4, reveal: of each active client the share of b_j, of each dead one that of m_j.

    Raises:
        RefusedError: other lists than were signed, or too few of their clients signed them.
    """
    _same(kept.session, letter.session)
    if letter.survivors() != kept.survivors:
        raise RefusedError("E_COHORT", "other survivors than this client has signed")
    identities, body = rules.identity.manifest.keys, body_of(kept.survivors)
    for name, text in letter.signatures.items():
        if name not in letter.active:
            raise RefusedError("E_COHORT", f"'{name}' signed, but is not active")
        verify(identities[name], "sign", kept.session, Signed(body, text), name)
    _require(len(letter.signatures), kept.threshold, "signed who survived")
    answer = Revealed(
        kept.session,
        rules.identity.client,
        {name: kept.shares[name][:SHARE] for name in letter.active},
        {name: kept.shares[name][SHARE:] for name in letter.dead},
    )
    signed = rules.sign("reveal", kept.session, answer)
    return Done(kept.session, digest(body_of(letter)), signed), signed
