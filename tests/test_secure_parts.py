"""The parts of secure aggregation by themselves: numbers, shares, masks, letters, identities."""

import hashlib
import hmac
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from Crypto.Cipher import AES
from hypothesis import given
from hypothesis import strategies as st
from secure import Table, refusal, stream

from fedtune.adapter import State
from fedtune.errors import RecipeError
from fedtune.privacy import masks, ring
from fedtune.privacy.identity import Identity, Manifest, line_of, new_key, read_key
from fedtune.privacy.letters import Entry, RefusedError, Session, body_of, joined, read
from fedtune.privacy.ring import Contribution, Grid, Layout
from fedtune.privacy.secure import Masked
from fedtune.privacy.sharing import P, combine, split

ANSWERS = Path(__file__).parent / "secure_aggregation.json"
SESSION = Session("study-0123/", 1, 1)


# --- sharing ---------------------------------------------------------------------------------


@given(st.binary(min_size=32, max_size=32), st.integers(1, 9), st.integers(0, 9), st.data())
def test_any_threshold_of_shares_gives_the_secret_back(
    secret: bytes, threshold: int, more: int, data: st.DataObject
) -> None:
    count = threshold + more
    shares = dict(enumerate(split(secret, threshold, count, stream("a")), 1))
    chosen = data.draw(st.permutations(sorted(shares)))[:threshold]
    assert combine({x: shares[x] for x in chosen}) == secret


@given(st.binary(min_size=32, max_size=32), st.binary(min_size=32, max_size=32))
def test_a_share_too_few_fits_every_secret(secret: bytes, other: bytes) -> None:
    """Two of three needed: with any other secret at 0 there is one more polynomial through both."""
    known = dict(enumerate(split(secret, 3, 4, stream("b")), 1))
    points = [(0, int.from_bytes(other, "big"))]
    points += [(x, int.from_bytes(known[x], "big")) for x in (1, 2)]

    def at(z: int) -> int:
        total = 0
        for x, y in points:
            above = math.prod(z - o for o, _ in points if o != x)
            below = math.prod(x - o for o, _ in points if o != x)
            total += y * above * pow(below, -1, P)
        return total % P

    assert combine({1: known[1], 2: known[2], 3: at(3).to_bytes(33, "big")}) == other


def test_the_modulus_is_the_first_prime_above_two_to_the_256() -> None:
    """Fermat: every smaller one is composite (2^256 + 1 passes with base 2), this one is not."""
    bases = [2, 3, 5, 7, 11, 13, 17, 19, 23, 29]
    assert all(pow(base, P - 1, P) == 1 for base in bases)
    assert all(pow(3, n - 1, n) != 1 for n in range(2**256 + 1, P, 2))


def test_what_is_no_share_is_refused() -> None:
    with pytest.raises(ValueError, match="31 bytes cannot be shared 2 of 3"):
        split(bytes(31), 2, 3, stream("c"))
    with pytest.raises(ValueError, match="cannot be shared 4 of 3"):
        split(bytes(32), 4, 3, stream("c"))
    with pytest.raises(ValueError, match="no shares of one secret"):
        combine({1: bytes(32), 2: bytes(33)})


# --- numbers ---------------------------------------------------------------------------------


def contribution(values: torch.Tensor, weight: int = 1) -> Contribution:
    state = {"delta": {"a": values[: values.numel() // 2], "b": values[values.numel() // 2 :]}}
    return Contribution(state, weight, {"accuracy": [3.0, 4.0], "loss": [0.25, 4.0]}, [5.0, 8.0])


def summed(grid: Grid, given: list[Contribution]) -> ring.Totals:
    layout = Layout.of(given[0].state, {"accuracy": 2, "loss": 2})
    factors = ring.multipliers("run", 1, layout.words)
    total = np.zeros(layout.words, np.uint32)
    for number, one in enumerate(given):
        rounding = masks.keystream(bytes([number] * 32), layout.parameters)
        total += ring.encoded(grid, layout, one, rounding, factors)
    return ring.decoded(grid, layout, total, factors, given[0].state)


@given(st.integers(1, 40), st.sampled_from([1, 50, 10_000]), st.integers(0, 2**32))
def test_the_mean_is_the_weighted_mean_to_the_last_step_of_the_grid(
    clients: int, cap: int, seed: int
) -> None:
    """Each client's error is below one step, so that of the sum is below n / s."""
    draws = torch.Generator().manual_seed(seed)
    grid = Grid(clients, 8.0, 0.0, cap)
    weights = torch.randint(1, cap + 1, (clients,), generator=draws).tolist()
    values = [torch.randn(6, generator=draws, dtype=torch.float64) for _ in weights]
    given = [contribution(v.clamp(-8, 8), w) for v, w in zip(values, weights, strict=True)]
    totals = summed(grid, given)
    exact = sum(w * v.clamp(-8, 8) for v, w in zip(values, weights, strict=True)) / sum(weights)
    found = torch.cat([totals.mean["delta"]["a"], totals.mean["delta"]["b"]])
    step = cap / (grid.scale * sum(weights))
    assert float((found - exact).abs().max()) < clients * step * (1 + 1e-6)
    assert (totals.clients, totals.within, totals.weight) == (clients, clients, sum(weights))
    assert totals.metrics == {
        "accuracy": [3.0 * clients, 4.0 * clients],
        "loss": [0.25 * clients, 4.0 * clients],
    }
    assert totals.tokens == [5.0 * clients, 8.0 * clients]


def test_rounding_is_unbiased_and_its_deviation_below_a_half() -> None:
    """4096 draws of 0.3: the mean is 0.3 within five standard errors of at most 0.5 / 64."""
    grid = Grid(4, 8.0, 0.0, 1)
    values = torch.full((4096,), 0.3 / grid.scale, dtype=torch.float64)
    layout = Layout.of({"d": {"a": values}}, {})
    factors = ring.multipliers("run", 1, layout.words)
    given = Contribution({"d": {"a": values}}, 1, {}, [0, 0])
    rounding = masks.keystream(b"r" * 32, 4096)
    words = ring.encoded(grid, layout, given, rounding, factors)[:4096]
    assert set(words.tolist()) == {0, 1}
    assert abs(float(words.mean()) - 0.3) < 5 * 0.5 / 64


@given(st.integers(1, 4095), st.floats(1e-6, 1e4))
def test_the_largest_sum_of_a_grid_fits(clients: int, bound: float) -> None:
    grid = Grid(clients, bound, 0.0, 1)
    assert clients * (grid.scale * bound + 1) < 2**31 <= clients * (2 * grid.scale * bound + 1)


def test_the_extremes_of_a_grid_come_back() -> None:
    for sign in (1.0, -1.0):
        values = torch.full((4,), 8.0 * sign, dtype=torch.float64)
        totals = summed(Grid(32, 8.0, 0.0, 1), [contribution(values)] * 32)
        assert torch.equal(totals.mean["delta"]["a"], values[:2])


@pytest.mark.parametrize(
    ("clients", "bound", "cap"), [(4096, 8.0, 1), (4, 1e9, 1), (300, 8.0, 10**7), (4, 8.0, 0)]
)
def test_what_could_overflow_is_refused(clients: int, bound: float, cap: int) -> None:
    with pytest.raises(ValueError, match="does not fit 32 bits"):
        Grid(clients, bound, 0.0, cap)


@pytest.mark.parametrize(
    ("value", "code"),
    [(math.nan, "E_NONFINITE"), (math.inf, "E_NONFINITE"), (8.001, "E_RANGE"), (-9.0, "E_RANGE")],
)
def test_what_no_word_stands_for_is_refused_before_it_is_rounded(value: float, code: str) -> None:
    values = torch.tensor([0.0, value, 0.0, 0.0])
    error = refusal(lambda: summed(Grid(4, 8.0, 0.0, 1), [contribution(values)]))
    assert error is not None
    assert error.code == code


@pytest.mark.parametrize("weight", [0, 51, -1])
def test_a_weight_outside_its_range_is_refused(weight: int) -> None:
    values = torch.zeros(4)
    error = refusal(lambda: summed(Grid(4, 8.0, 0.0, 50), [contribution(values, weight)]))
    assert error is not None
    assert error.code == "E_RANGE"


def test_an_update_is_scaled_down_to_the_clip_and_counted() -> None:
    """(6, 8) has norm 10 and becomes (3, 4); (0.3, 0.4) stays."""
    values = [torch.tensor(v, dtype=torch.float64) for v in ((6.0, 8.0), (0.3, 0.4))]
    totals = summed(Grid(4, 8.0, 5.0, 1), [contribution(v) for v in values])
    mean = torch.cat([totals.mean["delta"]["a"], totals.mean["delta"]["b"]])
    torch.testing.assert_close(
        mean, torch.tensor([1.65, 2.2], dtype=torch.float64), rtol=0, atol=1e-7
    )
    assert (totals.clients, totals.within) == (2, 1)


def test_a_sum_with_one_changed_word_is_noticed() -> None:
    given, grid = contribution(torch.ones(4)), Grid(4, 8.0, 0.0, 1)
    layout = Layout.of(given.state, {"accuracy": 2, "loss": 2})
    factors = ring.multipliers("run", 1, layout.words)
    rounding = masks.keystream(bytes(32), layout.parameters)
    words = ring.encoded(grid, layout, given, rounding, factors)
    for place in range(len(words)):
        for bit in (0, 13, 31):
            changed = words.copy()
            changed[place] ^= np.uint32(1 << bit)
            with pytest.raises(RefusedError, match="checksum"):
                ring.decoded(grid, layout, changed, factors, given.state)


def test_other_tensors_or_metrics_are_refused() -> None:
    given, grid = contribution(torch.ones(4)), Grid(4, 8.0, 0.0, 1)
    layout = Layout.of(given.state, {"accuracy": 2})
    factors = ring.multipliers("run", 1, layout.words)
    with pytest.raises(RefusedError, match="other tensors or metrics"):
        ring.encoded(grid, layout, given, masks.keystream(bytes(32), 4), factors)


def test_nothing_to_send_still_has_a_count_and_metrics() -> None:
    state: State = {}
    layout, grid = Layout.of(state, {"loss": 2}), Grid(3, 8.0, 0.0, 10)
    factors = ring.multipliers("run", 1, layout.words)
    given = Contribution(state, 7, {"loss": [1.5, 2.0]}, [1.0, 1.0])
    words = ring.encoded(grid, layout, given, masks.keystream(bytes(32), 0), factors)
    totals = ring.decoded(grid, layout, words, factors, state)
    assert (totals.weight, totals.metrics, totals.mean) == (7, {"loss": [1.5, 2.0]}, {})


# --- masks -----------------------------------------------------------------------------------


def test_the_stream_is_that_of_aes_in_counter_mode() -> None:
    """Against pycryptodome, over several blocks of what is made at once."""
    seed, count = bytes(range(32)), masks.BLOCK + 77
    cipher = AES.new(seed, AES.MODE_CTR, nonce=b"", initial_value=0)
    expected = np.frombuffer(cipher.encrypt(bytes(4 * count)), "<u4")
    np.testing.assert_array_equal(masks.keystream(seed, count), expected)
    words = np.arange(count, dtype=np.uint32)
    masks.add_stream(words, seed, -1)
    np.testing.assert_array_equal(words + expected, np.arange(count, dtype=np.uint32))


def test_a_pair_has_one_seed_and_it_is_that_of_rfc_5869() -> None:
    """Extract and expand written out with hmac: T(1) = HMAC(PRK, info || 0x01)."""
    secrets = {"a": b"a" * 32, "b": b"b" * 32}
    public = {name: masks.public_of(secret) for name, secret in secrets.items()}
    told = masks.told(b"o" * 32, b"m" * 32)
    one = masks.pair_seed(secrets["a"], public["b"], SESSION, told, "a", "b")
    assert one == masks.pair_seed(secrets["b"], public["a"], SESSION, told, "b", "a")
    shared = masks._agreed(secrets["a"], public["b"], "b")
    extracted = hmac.new(SESSION.salt(), shared, hashlib.sha256).digest()
    info = joined(b"mask", told, b"a", b"b")
    assert one == hmac.new(extracted, info + b"\x01", hashlib.sha256).digest()


# --- letters ---------------------------------------------------------------------------------


@given(st.lists(st.binary(max_size=6), max_size=4), st.lists(st.binary(max_size=6), max_size=4))
def test_only_equal_parts_join_to_equal_bytes(first: list[bytes], second: list[bytes]) -> None:
    assert (joined(*first) == joined(*second)) == (first == second)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"7",
        b"{}",
        b"\xff",
        b"[" * 10**5,
        b'{"session":{"run":"r","round":1,"attempt":1}}',
    ],
)
def test_what_is_no_letter_is_refused(body: bytes) -> None:
    error = refusal(lambda: read(Entry, body))
    assert error is not None
    assert error.code == "E_SCHEMA"


def test_a_letter_has_one_form() -> None:
    entry = Entry(SESSION, "north", b"o", b"s", b"m", b"c")
    body = body_of(entry)
    assert read(Entry, body) == entry
    fields = json.loads(body)
    others = [
        json.dumps(fields).encode(),
        body.replace(b'"round":1', b'"round":1.0'),
        body.replace(b'"round":1', b'"round":true'),
        body.replace(b'"round":1', b'"round":-1'),
        body.replace(b'"client":"north"', b'"client":"south","client":"north"'),
        json.dumps({**fields, "more": 1}, sort_keys=True, separators=(",", ":")).encode(),
    ]
    for other in others:
        assert refusal(lambda other=other: read(Entry, other)), other


# --- identities ------------------------------------------------------------------------------


def roster(path: Path, lines: list[str], head: str = "") -> Path:
    path.write_text("\n".join([head, "[keys]", *lines]) + "\n")
    return path


def test_an_identity_is_a_key_file_and_a_roster_file(tmp_path: Path) -> None:
    keys = {name: new_key(tmp_path / f"{name}.key") for name in ("north", "south")}
    assert (tmp_path / "north.key").stat().st_mode & 0o777 == 0o600
    lines = [line_of(name, key) for name, key in keys.items()]
    path = roster(tmp_path / "roster.toml", lines, 'run = "a-0123"\nminimum_cohort = 4')
    identity = Identity.load("north", tmp_path / "north.key", path)
    assert identity.public == keys["north"].public_key().public_bytes_raw()
    assert identity.manifest.minimum_cohort == 4
    assert identity.manifest.run == "a-0123"
    assert identity.manifest.digest() == Manifest.load(path).digest()
    with pytest.raises(RecipeError, match="has not the key of"):
        Identity.load("south", tmp_path / "north.key", path)
    with pytest.raises(RecipeError, match=r"north\.key: File exists"):
        new_key(tmp_path / "north.key")
    (tmp_path / "north.key").chmod(0o644)
    with pytest.raises(RecipeError, match="can be read by others"):
        read_key(tmp_path / "north.key")


@pytest.mark.parametrize(
    ("head", "line", "message"),
    [
        ('run = "a"', 'north = "AAAA"', "the key of 'north' is none"),
        ('run = "a"', "north = 7", "the key of 'north' is none"),
        ("", "north = 7", "must name the one run that it is for"),
        ("run = 1", "north = 7", "must name the one run that it is for"),
        ("minimum_cohort = 2", "", "must hold run and a table"),
        ("minimum_cohort = 2", 'north = "' + "A" * 43 + '="', "must be at least 3"),
        ("threshold = 1", 'north = "' + "A" * 43 + '="', "it holds threshold"),
        ("= 1", "", "cannot be read"),
    ],
)
def test_a_wrong_roster_is_refused(tmp_path: Path, head: str, line: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Manifest.load(roster(tmp_path / "roster.toml", [line], head))


def test_thresholds_never_allow_two_sums() -> None:
    """Two sets of t of n clients share at least one third of n: no two of them can both be honest
    about different survivors while fewer than a third lie."""
    for n in range(3, 100):
        t = Masked().needed(n)
        assert 2 * n // 3 + 1 <= t <= n
        assert 2 * t - n > (n - 1) // 3
    assert [Masked().needed(n) for n in (3, 4, 8, 32)] == [3, 3, 6, 22]
    assert Masked(threshold=1.0).needed(7) == 7


# --- known answers ---------------------------------------------------------------------------


def answers() -> dict[str, object]:
    """Everything that another implementation must reproduce, from keys that are given."""
    table = Table(3, settings=Masked(threshold=0.67, clip=0.0, bound=8.0, cap=10_000))
    first, second = table.names[:2]
    kept, _ = table.keyed[first]
    entry = table.keyed[first][1]
    grid, values = Grid(3, 8.0, 0.0, 100), torch.tensor([0.5, -0.25, 1e-3, -7.5])
    layout = Layout.of({"delta": {"a": values}}, {"loss": 2})
    words = ring.encoded(
        grid,
        layout,
        Contribution({"delta": {"a": values}}, 40, {"loss": [1.5, 4.0]}, [10.0, 12.0]),
        masks.keystream(bytes(32), 4),
        ring.multipliers("run", 1, layout.words),
    )
    mask = table.waiting[first][1]
    return {
        "opening": body_of(table.opening).decode(),
        "share_secret": kept.share_secret.hex(),
        "mask_secret": kept.mask_secret.hex(),
        "seed": kept.seed.hex(),
        "identity": table.public[first].hex(),
        "entry": entry.body.decode(),
        "signature": entry.signature.hex(),
        "shares of 00..1f, 2 of 3": [s.hex() for s in split(bytes(range(32)), 2, 3, stream("k"))],
        "sealed": table.delivery(second).sealed[first].hex(),
        "pair seeds and signs": [[seed.hex(), sign] for seed, sign in mask.pairs],
        "masked zeros": mask.hide(np.zeros(4, np.uint32)).tolist(),
        "stream of 32 zero bytes": masks.keystream(bytes(32), 4).tolist(),
        "scale": grid.scale,
        "words": words.tolist(),
        "survivors": table.committed[first][1].signature.hex(),
        "revealed": table.done[first][1].body.decode(),
    }


def test_known_answers() -> None:
    """Written once from this code; a change of any of them is a change of the protocol."""
    known = json.loads(ANSWERS.read_text())
    found = answers()
    assert known.keys() == found.keys()
    for name, value in known.items():
        assert found[name] == value, name
