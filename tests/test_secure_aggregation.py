"""The protocol: exact sums whoever drops out, and a reason for everything that is refused."""

import itertools
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from secure import LEGS, MODEL, RUN, WORDS, Table, names_of, refusal, stream, sum_of

from fedtune.privacy import protocol, unmasking
from fedtune.privacy.identity import simulated
from fedtune.privacy.letters import (
    Entries,
    Entry,
    Masked,
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
)
from fedtune.privacy.masks import public_of
from fedtune.privacy.stages import Done


def expected_of(table: Table) -> list[str]:
    """Whose words are in the sum: all that did not go before their words arrived."""
    return [n for n in table.names if table.gone.get(n) not in LEGS[:3]]


def check(table: Table) -> None:
    """The sum is that of the survivors where every leg keeps its threshold, else it stays shut."""
    needed, staying = table.opening.threshold, set(table.names)
    for leg in LEGS:
        staying -= {name for name, last in table.gone.items() if last == leg}
        if len(staying) < needed:
            error = refusal(table.unmasked)
            assert error is not None
            assert error.code == "E_COHORT", leg
            if leg != "reveal":
                assert refusal(lambda: table.done) or not table.done, f"revealed after '{leg}'"
            return
    wanted = sum_of([table.words(name) for name in expected_of(table)])
    np.testing.assert_array_equal(table.unmasked(), wanted)


@pytest.mark.parametrize("count", [3, 4, 5, 6])
@pytest.mark.parametrize("leg", LEGS)
def test_any_clients_may_go_at_any_leg(count: int, leg: str) -> None:
    whole = Table(count)
    for size in range(count + 1):
        for gone in itertools.combinations(names_of(count), size):
            table = Table(count, gone=dict.fromkeys(gone, leg))
            # What comes before the leg is the same whoever goes at it: pure functions, made once.
            if leg != "keys":
                table.keyed = whole.keyed
            if leg not in ("keys", "shares"):
                table.dealt = whole.dealt
                table.waiting = whole.waiting
            check(table)


@given(st.data())
def test_clients_may_go_at_different_legs(data: st.DataObject) -> None:
    count = data.draw(st.integers(3, 9))
    draws = st.lists(st.sampled_from(["stays"] * 6 + list(LEGS)), min_size=count, max_size=count)
    legs = dict(zip(names_of(count), data.draw(draws), strict=True))
    check(Table(count, gone={name: leg for name, leg in legs.items() if leg != "stays"}))


def test_a_share_too_few_opens_nothing() -> None:
    """t - 1 shares and any candidate seed belong to some polynomial, so the sum stays masked."""
    table = Table(5)
    letters = {n: read(Revealed, s.body) for n, (_, s) in table.done.items()}
    few = dict(list(letters.items())[: table.opening.threshold - 1])
    with pytest.raises(RefusedError, match="3 clients revealed, but 4 are needed"):
        unmasking.unmasked(table.total, table.pending, few)


def test_a_share_that_was_changed_is_noticed() -> None:
    table = Table(4, gone={"client-03": "masked"})
    for kind, of in (("seeds", "client-01"), ("keys", "client-03")):
        letters = {n: read(Revealed, s.body) for n, (_, s) in table.done.items()}
        first = letters["client-00"]
        shares = dict(getattr(first, kind))
        shares[of] = shares[of][:-1] + bytes([shares[of][-1] ^ 1])
        letters["client-00"] = replace(first, **{kind: shares})
        with pytest.raises(RefusedError, match=f"a secret of '{of}' do not fit"):
            unmasking.unmasked(table.total, table.pending, letters)


# What a malicious coordinator may try, each on a whole table; what client-00 or -01 says to it.
ME, OTHER = "client-00", "client-01"


def _entries(table: Table, changed: Callable[[Entry], Entry], signer: str) -> Entries:
    """The entries with client-01's changed and signed by `signer`."""
    own = changed(read(Entry, table.keyed[OTHER][1].body))
    signed = table.rules(signer).sign("keys", table.session, own)
    rest = [s if name != OTHER else signed for name, (_, s) in table.keyed.items()]
    return Entries(table.session, tuple(rest))


def open_as(**changes: object) -> Callable[[Table], object]:
    def act(table: Table) -> object:
        opening = replace(table.opening, **changes)  # type: ignore[arg-type]
        return protocol.keys(table.rules(ME), opening, None, None, stream("x"))

    return act


def deal_with(entries: Callable[[Table], Entries]) -> Callable[[Table], object]:
    return lambda t: protocol.shares(t.rules(ME), t.keyed[ME][0], entries(t), stream("x"))


def _swapped(table: Table) -> Entries:
    key = public_of(b"k" * 32)
    return _entries(table, lambda e: replace(e, mask_key=key), "client-02")


def _doubled(table: Table) -> Entries:
    mine = read(Entry, table.keyed["client-02"][1].body)
    return _entries(table, lambda e: replace(e, mask_key=mine.mask_key), OTHER)


def _without_me(table: Table) -> Entries:
    return Entries(table.session, table.entries.entries[1:])


def _of_another_attempt(table: Table) -> Entries:
    other = Table(4, attempt=2).entries.entries
    return Entries(table.session, (table.entries.entries[0], *other[1:]))


def _told_otherwise(table: Table) -> Entries:
    return _entries(table, lambda e: replace(e, opening=b"another"), OTHER)


def _low_order(table: Table) -> object:
    entries = _entries(table, lambda e: replace(e, share_key=bytes(32)), OTHER)
    return protocol.shares(table.rules(ME), table.keyed[ME][0], entries, stream("x"))


def deliver(change: Callable[[Table, dict[str, bytes]], None]) -> Callable[[Table], object]:
    def act(table: Table) -> object:
        letter = table.delivery(ME)
        sealed = dict(letter.sealed)
        change(table, sealed)
        letter = replace(letter, sealed=sealed)
        return protocol.masking(table.rules(ME), table.dealt[ME][0], letter, MODEL)

    return act


def _stale(table: Table, sealed: dict[str, bytes]) -> None:
    sealed[OTHER] = Table(4, attempt=2).delivery(ME).sealed[OTHER]


def _for_another(table: Table, sealed: dict[str, bytes]) -> None:
    sealed[OTHER] = table.delivery("client-02").sealed[OTHER]


def _two_left(table: Table, sealed: dict[str, bytes]) -> None:
    del sealed["client-02"], sealed["client-03"]


def _to_myself(table: Table, sealed: dict[str, bytes]) -> None:
    sealed[ME] = sealed[OTHER]


def sign_lists(active: list[int], dead: list[int]) -> Callable[[Table], object]:
    def act(table: Table) -> object:
        lists = [tuple(table.names[i] for i in numbers) for numbers in (active, dead)]
        letter = Survivors(table.session, lists[0], lists[1])
        return protocol.sign(table.rules(ME), table.waiting[ME][0], letter)

    return act


def request(change: Callable[[Table], Request]) -> Callable[[Table], object]:
    return lambda t: protocol.reveal(t.rules(ME), t.committed[ME][0], change(t))


def _few(table: Table) -> Request:
    signatures = dict(list(table.request.signatures.items())[:2])
    return replace(table.request, signatures=signatures)


def _forged(table: Table) -> Request:
    signatures = dict(table.request.signatures)
    signatures[OTHER] = signatures["client-02"]
    return replace(table.request, signatures=signatures)


def _other_survivors(table: Table) -> Request:
    return replace(table.request, active=table.request.active[:3], dead=("client-03",))


def _other_attempt(table: Table) -> Request:
    return replace(table.request, session=Session(RUN, 1, 2))


def _dead_signer(table: Table) -> Request:
    signatures = {**table.request.signatures, "client-09": b"s" * 64}
    return replace(table.request, signatures=signatures)


def after_reveal(table: Table) -> object:
    done = table.done[ME][0]
    second = replace(table.opening, session=Session(RUN, 1, 2))
    return protocol.keys(table.rules(ME), second, None, done, stream("x"))


def replayed(table: Table) -> object:
    kept = table.keyed[ME][0]
    return protocol.keys(table.rules(ME), table.opening, kept, None, stream("x"))


def pinned(table: Table) -> object:
    rules = table.rules(ME)
    manifest = replace(rules.identity.manifest, run="another-4567")
    rules = replace(rules, identity=replace(rules.identity, manifest=manifest))
    return protocol.keys(rules, table.opening, None, None, stream("x"))


ATTACKS: list[tuple[str, Callable[[Table], object], str]] = [
    ("cohort of two", open_as(cohort=("client-00", "client-01")), "2 clients are in the cohort"),
    ("without me", open_as(cohort=("client-01", "client-02", "client-03")), "not in the cohort"),
    ("a stranger", open_as(cohort=(*names_of(4), "eve")), "'eve' is not in this client's roster"),
    ("twice", open_as(cohort=("client-00", "client-00", "client-01")), "one is there twice"),
    ("lowered threshold", open_as(threshold=2), "a threshold of 2 for 4 clients, not 3"),
    ("raised threshold", open_as(threshold=4), "a threshold of 4 for 4 clients, not 3"),
    ("another recipe", open_as(config=b"x"), "has another recipe"),
    ("another roster", open_as(manifest=b"x"), "has another roster"),
    ("another grid", open_as(grid=b"x"), "has another grid of numbers"),
    ("another run", open_as(session=Session("other/", 1, 1)), "of run other/, not of"),
    ("another arm", open_as(session=Session(RUN + "fedit", 1, 1)), "fedit, not of"),
    ("round 4 of 3", open_as(session=Session(RUN, 4, 1)), "round 4 of a run of 3"),
    ("a run that the roster is not for", pinned, "not of another-4567"),
    ("replay of an opening", replayed, "attempt 1 is not after run"),
    ("second attempt after a reveal", after_reveal, "has revealed the sum of round 1 already"),
    ("key swap", deal_with(_swapped), "'client-01' did not sign this letter"),
    ("my own keys left out", deal_with(_without_me), "own keys are missing or changed"),
    ("one key for two clients", deal_with(_doubled), "one key stands twice"),
    ("keys of another attempt", deal_with(_of_another_attempt), "attempt 2, not of"),
    ("different openings", deal_with(_told_otherwise), "was told of another cohort"),
    ("a key of low order", _low_order, "the key of 'client-01' is none of X25519"),
    ("stale shares", deliver(_stale), "'client-01' for 'client-00' does not open"),
    ("shares for another", deliver(_for_another), "'client-01' for 'client-00' does not open"),
    ("two clients left", deliver(_two_left), "2 clients sent shares, but 3 are needed"),
    ("shares of my own", deliver(_to_myself), "shares of 'client-00', who sent no keys"),
    ("overlapping lists", sign_lists([0, 1, 2, 3], [3]), "'client-03' is said to be active and"),
    ("somebody left out", sign_lists([0, 1, 2], []), "'client-03' is missing or was not there"),
    ("said to be dead", sign_lists([1, 2, 3], [0]), "this client is said to be dead"),
    ("too few active", sign_lists([0, 1], [2, 3]), "2 clients are active, but 3 are needed"),
    ("too few signatures", request(_few), "2 clients signed who survived, but 3 are needed"),
    ("a forged signature", request(_forged), "'client-01' did not sign this letter of 'sign'"),
    ("other survivors", request(_other_survivors), "other survivors than this client has signed"),
    ("reveal of another attempt", request(_other_attempt), "attempt 2, not of"),
    ("signed by a stranger", request(_dead_signer), "'client-09' signed, but is not active"),
]


@pytest.mark.parametrize(
    ("attack", "reason"), [a[1:] for a in ATTACKS], ids=[a[0] for a in ATTACKS]
)
def test_a_malicious_coordinator_is_told_why_not(
    attack: Callable[[Table], object], reason: str
) -> None:
    with pytest.raises(RefusedError, match=reason):
        attack(Table(4))


def test_there_are_attacks() -> None:
    assert len(ATTACKS) == 34


def test_a_larger_minimum_cohort_of_the_roster_holds() -> None:
    table = Table(4)
    rules = table.rules(ME)
    manifest = replace(rules.identity.manifest, minimum_cohort=5)
    rules = replace(rules, identity=replace(rules.identity, manifest=manifest))
    with pytest.raises(RefusedError, match="4 clients are in the cohort, but 5 are needed"):
        protocol.keys(rules, table.opening, None, None, stream("x"))


def test_clients_with_different_models_have_masks_that_do_not_cancel() -> None:
    """Pasquini et al.: with a crafted model for one client the sum would be another's update."""
    table = Table(4, told={ME: b"crafted"})
    off = table.unmasked() - sum_of([table.words(name) for name in table.names])
    assert np.count_nonzero(off) > WORDS - 3


def test_what_the_coordinator_sees_does_not_depend_on_the_words() -> None:
    """The same stream is added to whatever the words are, and it is not used for anything else."""
    mask = Table(4).waiting[ME][1]
    zeros = np.zeros(WORDS, np.uint32)
    for words in (zeros, ~zeros, Table(4).words(ME)):
        np.testing.assert_array_equal(mask.hide(words) - words, mask.hide(zeros))
    seeds = [mask.own, *(seed for seed, _ in mask.pairs)]
    assert len(set(seeds)) == len(seeds) == 4


def test_masked_words_look_like_noise() -> None:
    """Chi-square of 255 degrees of freedom has a standard deviation of 22.6; six of them are
    exceeded once in 10^8. All words are 0, the worst case for whoever must hide them."""
    table = Table(3)
    for name in table.names:
        hidden = table.waiting[name][1].hide(np.zeros(2**16, np.uint32))
        for plane in hidden.view(np.uint8).reshape(-1, 4).T:
            counts = np.bincount(plane, minlength=256)
            chi = float(((counts - 256) ** 2 / 256).sum())
            assert abs(chi - 255) < 6 * 22.6


def test_masks_of_two_attempts_and_of_two_models_have_nothing_in_common() -> None:
    first = Table(3).waiting[ME][1]
    for other in (Table(3, attempt=2), Table(3, told={ME: b"x"})):
        mask = other.waiting[ME][1]
        assert not {seed for seed, _ in mask.pairs} & {seed for seed, _ in first.pairs}
    assert Table(3, attempt=2).waiting[ME][1].own != first.own


def _bits(body: bytes) -> list[bytes]:
    """The body with each byte changed in one bit."""
    return [body[:i] + bytes([body[i] ^ (1 << i % 8)]) + body[i + 1 :] for i in range(len(body))]


def test_every_changed_byte_of_a_letter_to_a_client_is_noticed() -> None:
    """By the client, or by what it then answers: its keys name the opening that it saw."""
    t = Table(3)
    rules = t.rules(ME)

    def opened(body: bytes) -> object:
        letter = read(type(t.opening), body)
        _, signed = protocol.keys(rules, letter, None, None, stream("x"))
        opening = digest(body_of(t.opening))
        return protocol.checked(signed, t.session, opening, t.public, t.names)

    acts: list[tuple[bytes, Callable[[bytes], object]]] = [
        (body_of(t.opening), opened),
        (
            body_of(t.entries),
            lambda b: protocol.shares(rules, t.keyed[ME][0], read(Entries, b), stream("x")),
        ),
        (
            body_of(t.delivery(ME)),
            lambda b: protocol.masking(rules, t.dealt[ME][0], read(type(t.delivery(ME)), b), MODEL),
        ),
        (
            body_of(t.survivors),
            lambda b: protocol.sign(rules, t.waiting[ME][0], read(Survivors, b)),
        ),
        (
            body_of(t.request),
            lambda b: protocol.reveal(rules, t.committed[ME][0], read(Request, b)),
        ),
    ]
    for body, act in acts:
        act(body)
        for changed in _bits(body):
            assert refusal(lambda act=act, changed=changed: act(changed)), changed


def test_every_changed_byte_of_an_answer_is_noticed() -> None:
    t = Table(3)
    words = t.hidden[ME]
    head = replace(t.waiting[ME][1].head, words=digest(words.tobytes()))
    answers: list[tuple[str, type, Signed]] = [
        ("shares", Shares, t.dealt[ME][1]),
        ("masked", Masked, t.rules(ME).sign("masked", t.session, head)),
        ("reveal", Revealed, t.done[ME][1]),
    ]
    for leg, kind, signed in answers:
        unmasking.accepted(kind, leg, t.session, ME, t.public[ME], signed)
        changed = [Signed(body, signed.signature) for body in _bits(signed.body)]
        changed += [Signed(signed.body, text) for text in _bits(signed.signature)]
        for forged in changed:
            with pytest.raises(RefusedError, match="did not sign"):
                unmasking.accepted(kind, leg, t.session, ME, t.public[ME], forged)
    unmasking.check_masked(head, t.names, MODEL, words)
    for body in _bits(words.tobytes()):
        with pytest.raises(RefusedError, match="not those that the client signed"):
            unmasking.check_masked(head, t.names, MODEL, np.frombuffer(body, np.uint32))


def test_an_answer_of_one_leg_is_none_of_another() -> None:
    t = Table(3)
    with pytest.raises(RefusedError, match="did not sign"):
        unmasking.accepted(Revealed, "sign", t.session, ME, t.public[ME], t.done[ME][1])
    other = Session(RUN, 1, 2)
    with pytest.raises(RefusedError, match="did not sign"):
        unmasking.accepted(Revealed, "reveal", other, ME, t.public[ME], t.done[ME][1])


def test_what_is_revealed_of_a_client_is_one_of_two_things() -> None:
    table = Table(6, gone={"client-02": "masked"})
    for _, signed in table.done.values():
        letter = read(Revealed, signed.body)
        assert not letter.seeds.keys() & letter.keys.keys()
        assert letter.keys.keys() == {"client-02"}


def test_a_stage_outlives_a_process() -> None:
    t = Table(3)
    for stage in (t.keyed[ME][0], t.dealt[ME][0], t.waiting[ME][0], t.committed[ME][0]):
        assert read(type(stage), body_of(stage)) == stage
    assert read(Done, body_of(t.done[ME][0])) == t.done[ME][0]


def test_simulated_identities_are_the_runs_own() -> None:
    first, again, other = (simulated(run, names_of(3)) for run in (b"r", b"r", b"s"))
    assert {n: i.public for n, i in first.items()} == {n: i.public for n, i in again.items()}
    assert not {i.public for i in first.values()} & {i.public for i in other.values()}
