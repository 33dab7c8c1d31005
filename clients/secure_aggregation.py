"""A client's side of secure aggregation between messages: what it keeps, where, for how long.

A SuperNode starts a process for every message, and any worker of a simulation may answer any leg,
so a stage lies in the client's own folder, readable by its owner alone. It is replaced before the
answer that follows from it is sent; after a crash a leg is lost, and with it this client's part in
the round, but never answered twice. What was revealed last is kept, so that the very same request
gets the very same answer, which lets a coordinator that crashed go on, and every other is refused.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

from filelock import FileLock

from clients.client import Client
from fedtune import adapter
from fedtune.adapter import State
from fedtune.errors import RecipeError, RunError
from fedtune.privacy import noise, protocol, ring, skellam
from fedtune.privacy.ledger import KEY
from fedtune.privacy.letters import (
    Delivery,
    Entries,
    Opening,
    RefusedError,
    Request,
    Signed,
    Survivors,
    body_of,
    digest,
    number,
    read,
)
from fedtune.privacy.masks import Words, keystream
from fedtune.privacy.ring import Contribution, Grid, Layout
from fedtune.privacy.secure import Masked, config_digest, noised
from fedtune.privacy.skellam import Integers
from fedtune.privacy.stages import (
    Committed,
    Dealt,
    Done,
    Keyed,
    Mask,
    Rules,
    Stage,
    Waiting,
)
from fedtune.records import Sums

STAGES: dict[str, type[Stage]] = {
    kind.__name__: kind for kind in (Keyed, Dealt, Waiting, Committed)
}
K = TypeVar("K", Keyed, Dealt, Waiting, Committed)


@dataclass(frozen=True)
class Desk:
    """Where one client answers letters.

    Attributes:
        folder: what it keeps lies here; made when needed.
        rules: what it holds the coordinator to.
        durable: whether a power cut, too, may not bring an earlier stage back; a simulation, which
            protects nobody, does not wait for the disk.
        draw: random bytes of a cryptographic generator.
        key: the client's secret, where it adds shares of noise.
    """

    folder: Path
    rules: Rules
    durable: bool = True
    draw: Callable[[int], bytes] = os.urandom
    key: bytes = field(default=b"", repr=False)

    @contextlib.contextmanager
    def _turn(self) -> Iterator[None]:
        """One leg at a time, whatever process answers it."""
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with FileLock(self.folder / ".lock"):
            yield

    def answer(self, leg: str, body: bytes) -> Signed:
        """The answer to a letter of the legs without a model: keys, shares, sign, reveal.

        Raises:
            RefusedError: the letter is not as it must be, or not the next.
        """
        with self._turn():
            if leg == "keys":
                opening = read(Opening, body)
                before, done = self._stage(), self._done()
                keyed, signed = protocol.keys(self.rules, opening, before, done, self.draw)
                self._keep(keyed)
            elif leg == "shares":
                entries = read(Entries, body)
                dealt, signed = protocol.shares(self.rules, self._at(Keyed), entries, self.draw)
                self._keep(dealt)
            elif leg == "sign":
                survivors = read(Survivors, body)
                committed, signed = protocol.sign(self.rules, self._at(Waiting), survivors)
                self._keep(committed)
            else:
                signed = self._revealed(read(Request, body))
        return signed

    def _revealed(self, request: Request) -> Signed:
        done = self._done()
        if done and done.session == request.session:
            if done.request != digest(body_of(request)):
                raise RefusedError("E_REPLAY", "this client has revealed for other survivors")
            return done.reply
        done, signed = protocol.reveal(self.rules, self._at(Committed), request)
        self._write("revealed", Done.__name__, body_of(done))
        self._wipe("stage")
        return signed

    def mask(self, body: bytes, broadcast: bytes) -> Mask:
        """The mask of this round's vector, from the letter and the digest of the model with it.

        Raises:
            RefusedError: as in `answer`.
        """
        with self._turn():
            waiting, mask = protocol.masking(
                self.rules, self._at(Dealt), read(Delivery, body), broadcast
            )
            self._keep(waiting)
        return mask

    def masked(self, mask: Mask, sent: State, rows: int, sums: Sums, tokens: list[float]) -> Words:
        """The masked words of what the client sends.

        Raises:
            RefusedError: it cannot be encoded, or is not what the round is about.
        """
        rules, session = self.rules, mask.head.session
        metrics = {name: values for name, values in sums.items() if len(values) == 2}
        layout = Layout.of(sent, dict.fromkeys(metrics, 2))
        if layout.digest() != mask.layout:
            raise RefusedError("E_SCHEMA", "the round is about other tensors or metrics")
        factors = ring.multipliers(session.run, session.round, layout.words)
        weight = rules.settings.weight(rows, rules.weighting)
        grid = rules.settings.grid(mask.cohort, rules.weighting)
        # Keyed and not fresh: a round that is repeated from the same model rounds the same way.
        turn, own = (rules.config, number(session.round), mask.head.broadcast), adapter.digest(sent)
        seed = rules.identity.rounding(*turn, own.encode())
        rounding = keystream(seed, layout.parameters)
        given = Contribution(sent, weight, metrics, tokens)
        share = self._share(grid, layout, mask, own)
        return mask.hide(ring.encoded(grid, layout, given, rounding, factors, share))

    def _share(self, grid: Grid, layout: Layout, mask: Mask, own: str) -> Integers | None:
        """This client's share of the round's noise, None where there is none.

        Another run has other noise, so two sums of the same changes over other survivors differ by
        more than the change of one client.
        """
        if not grid.noise:
            return None
        head, told = mask.head, grid.digest()
        context = (head.session.run, head.session.round, head.client, head.broadcast, told, own)
        return skellam.share(self.key, layout.parameters, grid.share, "share", *context)

    def signed(self, mask: Mask, words: Words) -> Signed:
        """The letter beside the masked words."""
        letter = replace(mask.head, words=digest(words.tobytes()))
        return self.rules.sign("masked", mask.head.session, letter)

    def _at(self, kind: type[K]) -> K:
        stage = self._stage()
        if not isinstance(stage, kind):
            found = type(stage).__name__ if stage else "nothing"
            raise RefusedError("E_REPLAY", f"this leg is not the next: {found} is kept")
        return stage

    def _stage(self) -> Stage | None:
        found = self._read("stage")
        return read(STAGES[found[0]], found[1]) if found else None

    def _done(self) -> Done | None:
        found = self._read("revealed")
        return read(Done, found[1]) if found else None

    def _keep(self, stage: Stage) -> None:
        self._write("stage", type(stage).__name__, body_of(stage))

    def _read(self, name: str) -> tuple[str, bytes] | None:
        path = self.folder / name
        try:
            kind, _, body = path.read_bytes().partition(b"\n")
        except FileNotFoundError:
            return None
        if kind.decode(errors="replace") not in {*STAGES, Done.__name__}:
            raise RunError(f"{path} is damaged; this client can take no part in the run.")
        return kind.decode(), body

    def _write(self, name: str, kind: str, body: bytes) -> None:
        """Replace a file in one step and have it on the disk; the old secrets are overwritten."""
        path, fresh = self.folder / name, self.folder / f"{name}.tmp"
        with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
            file.write(kind.encode() + b"\n" + body)
            file.flush()
            if self.durable:
                os.fsync(file.fileno())
        with _overwritten(path):
            fresh.replace(path)
            if self.durable:
                _flush(self.folder)

    def _wipe(self, name: str) -> None:
        with _overwritten(self.folder / name):
            (self.folder / name).unlink()


def _flush(folder: Path) -> None:
    """Have what a folder's names stand for on the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def _overwritten(path: Path) -> Iterator[None]:
    """Fill what is in the file now with zeros once it has been replaced or unlinked.

    As far as the file system writes in place; one that keeps old blocks keeps the secrets.
    """
    try:
        old = path.open("r+b")
    except FileNotFoundError:
        yield
        return
    with old:
        yield
        old.write(bytes(os.fstat(old.fileno()).st_size))


def desk_of(client: Client, run: str) -> Desk:
    """Where a client answers, in its own folder.

    Args:
        client: with an identity.
        run: the run's id, "/" and the arm.

    Raises:
        RecipeError: the recipe does not mask.
    """
    e, settings = client.experiment, client.parts.secure
    if client.identity is None or not isinstance(settings, Masked):
        raise RecipeError(
            f"secure_aggregation = '{e.secure_aggregation}' sends updates one by one; there is no "
            "letter to answer."
        )
    key = b""
    if promised := client.shares_noise:
        settings, key = noised(settings, promised), noise.load_key(client.state / KEY)
    rules = Rules(client.identity, run, e.rounds, config_digest(e), settings, e.weighting)
    return Desk(client.state / "secure", rules, durable=bool(client.policy.key), key=key)
