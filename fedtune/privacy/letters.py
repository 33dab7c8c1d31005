"""What clients and the coordinator write to each other in secure aggregation, as bytes to sign.

A letter is a frozen dataclass of texts, numbers and bytes; its body is JSON in one form only, so
that equal letters have equal bytes and what is signed is what is read. Nothing in a body is
believed before its types are right, and nothing a client wrote before its signature is.
"""

import base64
import binascii
import dataclasses
import functools
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from fedtune.errors import FedTuneError

DOMAIN = b"fedtune/secure-aggregation/1"
T = TypeVar("T")


class RefusedError(FedTuneError):
    """A letter that a client or the coordinator must not act on.

    Attributes:
        code: E_AUTH (signature, keys), E_SCHEMA (form), E_REPLAY (another turn or stage), E_COHORT
            (who takes part), E_STALE (another model or recipe), E_RANGE, E_NONFINITE, E_SUM (the
            sum is not what it must be).
        reason: for a person.
    """

    def __init__(self, code: str, reason: str) -> None:
        super().__init__(f"{code}: {reason}")
        self.code = code
        self.reason = reason


@dataclass(frozen=True)
class Session:
    """One attempt at one round; every key, signature and mask is bound to it."""

    run: str  # name and digest of the run, and its arm
    round: int
    attempt: int

    def salt(self) -> bytes:
        """The session as bytes."""
        return joined(self.run.encode(), number(self.round), number(self.attempt))


@dataclass(frozen=True)
class Signed:
    """A body and its author's signature."""

    body: bytes
    signature: bytes


@dataclass(frozen=True)
class Opening:
    """Leg 1, to all: what the round is about, before anybody draws a key.

    Attributes:
        session: of the round.
        cohort: U0, sorted.
        threshold: t, shares that rebuild a secret, and signatures that allow a reveal.
        config: digest of the recipe.
        manifest: digest of the identity keys.
        grid: digest of how numbers become words.
        layout: digest of what the words stand for.
    """

    session: Session
    cohort: tuple[str, ...]
    threshold: int
    config: bytes
    manifest: bytes
    grid: bytes
    layout: bytes


@dataclass(frozen=True)
class Entry:
    """Leg 1, from each: public keys E_i and M_i, drawn for this session only.

    Attributes:
        session: of the round.
        client: whose they are.
        opening: digest of the opening that it saw, so that all must have seen one.
        share_key: E_i, X25519, to which shares are sealed.
        mask_key: M_i, X25519, of which pairwise masks are made.
        commitment: digest of b_i, the seed of its own mask.
    """

    session: Session
    client: str
    opening: bytes
    share_key: bytes
    mask_key: bytes
    commitment: bytes


@dataclass(frozen=True)
class Entries:
    """Leg 2, to all: the signed entries of U1, in the order of names."""

    session: Session
    entries: tuple[Signed, ...]


@dataclass(frozen=True)
class Shares:
    """Leg 2, from each: for every other client its shares of b_i and m_i, sealed."""

    session: Session
    client: str
    entries: bytes  # digest of the entries that it saw
    sealed: dict[str, bytes]


@dataclass(frozen=True)
class Delivery:
    """Leg 3, to each beside the model: what the other clients of U2 sealed for it."""

    session: Session
    sealed: dict[str, bytes]


@dataclass(frozen=True)
class Masked:
    """Leg 3, from each beside the masked words: what they were made from."""

    session: Session
    client: str
    senders: tuple[str, ...]  # U2
    broadcast: bytes  # digest of the model
    words: bytes  # digest of the masked words


@dataclass(frozen=True)
class Survivors:
    """Leg 4, sign: whose words arrived and whose did not; each signs it as it stands."""

    session: Session
    active: tuple[str, ...]  # U3
    dead: tuple[str, ...]  # U2 without U3


@dataclass(frozen=True)
class Request:
    """Leg 4, reveal: the survivors, and who signed them."""

    session: Session
    active: tuple[str, ...]
    dead: tuple[str, ...]
    signatures: dict[str, bytes]

    def survivors(self) -> Survivors:
        """What was signed."""
        return Survivors(self.session, self.active, self.dead)


@dataclass(frozen=True)
class Revealed:
    """Leg 4, reveal, from each: shares of b_j of the active and of m_j of the dead, never both."""

    session: Session
    client: str
    seeds: dict[str, bytes]
    keys: dict[str, bytes]


def number(value: int) -> bytes:
    """A number below 2^64 in a form of its own."""
    return value.to_bytes(8, "big")


def joined(*parts: bytes) -> bytes:
    """The parts with their lengths: other parts never give the same bytes."""
    return b"".join(number(len(part)) + part for part in parts)


def digest(*parts: bytes) -> bytes:
    """SHA-256 of the parts and their lengths."""
    return hashlib.sha256(joined(*parts)).digest()


def body_of(letter: object) -> bytes:
    """The one body of a letter."""
    return json.dumps(_plain(letter), sort_keys=True, separators=(",", ":")).encode()


def read(kind: type[T], body: bytes) -> T:
    """The letter in a body.

    Raises:
        RefusedError: E_SCHEMA: another form, or the same in other bytes.
    """
    try:
        letter: T = _typed(kind, json.loads(body), kind.__name__)
    except (ValueError, RecursionError) as error:
        raise RefusedError("E_SCHEMA", f"no letter of the form {kind.__name__}") from error
    if body_of(letter) != body:
        raise RefusedError("E_SCHEMA", f"the bytes of this {kind.__name__} are not its own")
    return letter


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if dataclasses.is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in _fields(value)}
    return value


def _fields(value: Any) -> Sequence["dataclasses.Field[Any]"]:
    return dataclasses.fields(value)


@functools.cache
def _types_of(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def _typed(kind: Any, value: Any, where: str) -> Any:
    """The JSON value as `kind`, whose parts are checked one by one."""
    wrong = RefusedError("E_SCHEMA", f"{where} is not as it must be")
    origin, arguments = get_origin(kind), get_args(kind)
    if kind in (int, str) and type(value) is kind:
        if kind is int and not 0 <= value < 2**63:
            raise wrong
        return value
    if kind is bytes and isinstance(value, str):
        try:
            return base64.b64decode(value, validate=True)
        except binascii.Error as error:
            raise wrong from error
    if origin is tuple and isinstance(value, list):
        return tuple(_typed(arguments[0], item, where) for item in value)
    if origin is dict and isinstance(value, dict):
        return {key: _typed(arguments[1], item, where) for key, item in value.items()}
    if isinstance(kind, type) and dataclasses.is_dataclass(kind) and isinstance(value, dict):
        types = _types_of(kind)
        if value.keys() != types.keys():
            raise wrong
        return kind(**{key: _typed(types[key], value[key], key) for key in types})
    raise wrong


def signature(key: Ed25519PrivateKey, leg: str, session: Session, body: bytes) -> bytes:
    """The signature over (domain, session, leg, digest of the body)."""
    return key.sign(_statement(leg, session, body))


def verify(public: bytes, leg: str, session: Session, signed: Signed, client: str) -> None:
    """Nothing, if `client`, whose identity key is `public`, signed it.

    Raises:
        RefusedError: E_AUTH.
    """
    try:
        key = Ed25519PublicKey.from_public_bytes(public)
        key.verify(signed.signature, _statement(leg, session, signed.body))
    except (InvalidSignature, ValueError) as error:
        raise RefusedError("E_AUTH", f"'{client}' did not sign this letter of '{leg}'") from error


def _statement(leg: str, session: Session, body: bytes) -> bytes:
    return joined(DOMAIN, session.salt(), leg.encode(), hashlib.sha256(body).digest())
