"""Keys, seeds and the masks that are made of them.

Two clients agree by X25519 on a secret that nobody else has; HKDF makes of it a seed that is bound
to the session, the recipe, the cohort and the model that was broadcast, so that clients who were
told different things have masks that do not cancel. A mask is the seed's AES-256 counter stream,
read as little-endian 32-bit words; every seed is used once, which is why the counter begins at 0.
"""

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from numpy.typing import NDArray

from fedtune.privacy.letters import RefusedError, Session, digest, joined

Words = NDArray[np.uint32]
BLOCK = 1 << 18  # words of a stream made at once: what fits the cache is added while it is there
ONCE = bytes(12)  # the nonce of a key that seals one text


def public_of(secret: bytes) -> bytes:
    """The X25519 public key of a secret of 32 bytes."""
    return X25519PrivateKey.from_private_bytes(secret).public_key().public_bytes_raw()


def commitment(session: Session, client: str, seed: bytes) -> bytes:
    """What a client publishes of its own seed: binding, and it tells nothing of 32 random bytes."""
    return digest(b"own mask", session.salt(), client.encode(), seed)


def derived(secret: bytes, salt: bytes, info: bytes) -> bytes:
    """32 bytes by HKDF-SHA256 (RFC 5869)."""
    return HKDF(SHA256(), 32, salt, info).derive(secret)


def _agreed(secret: bytes, public: bytes, client: str) -> bytes:
    try:
        own = X25519PrivateKey.from_private_bytes(secret)
        return own.exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError as error:  # not 32 bytes, or a point of low order
        raise RefusedError("E_AUTH", f"the key of '{client}' is none of X25519") from error


def pair_seed(
    secret: bytes,
    public: bytes,
    session: Session,
    told: bytes,
    own: str,
    other: str,
) -> bytes:
    """seed_ij, the same for both clients.

    Args:
        secret: m_i of the one.
        public: M_j of the other.
        session: of the round.
        told: digest of what both must have been told: opening and model.
        own: the name of the one.
        other: the name of the other.
    """
    first, second = sorted((own.encode(), other.encode()))
    info = joined(b"mask", told, first, second)
    return derived(_agreed(secret, public, other), session.salt(), info)


def told(opening: bytes, broadcast: bytes) -> bytes:
    """The digest that pairwise seeds are bound to: of the opening's digest and the model's."""
    return digest(b"told", opening, broadcast)


def _direction(session: Session, opening: bytes, source: str, target: str) -> bytes:
    return joined(b"share", session.salt(), opening, source.encode(), target.encode())


def seal(
    secret: bytes,
    public: bytes,
    session: Session,
    opening: bytes,
    names: tuple[str, str],
    text: bytes,
) -> bytes:
    """`text` for the second of `names` from the first, by ChaCha20-Poly1305.

    The key holds for this direction of this session only, so its one nonce is used once.
    """
    source, target = names
    info = _direction(session, opening, source, target)
    key = derived(_agreed(secret, public, target), session.salt(), info)
    return ChaCha20Poly1305(key).encrypt(ONCE, text, info)


def unseal(
    secret: bytes,
    public: bytes,
    session: Session,
    opening: bytes,
    names: tuple[str, str],
    text: bytes,
) -> bytes:
    """What the first of `names` sealed for the second.

    Raises:
        RefusedError: E_AUTH: it was not that client, not for this one, or not in this session.
    """
    source, target = names
    info = _direction(session, opening, source, target)
    key = derived(_agreed(secret, public, source), session.salt(), info)
    try:
        return ChaCha20Poly1305(key).decrypt(ONCE, text, info)
    except (InvalidTag, ValueError) as error:
        raise RefusedError(
            "E_AUTH", f"a share of '{source}' for '{target}' does not open"
        ) from error


def keystream(seed: bytes, words: int) -> Words:
    """So many words of the seed's stream."""
    stream = np.zeros(words, np.uint32)
    add_stream(stream, seed, 1)
    return stream


def add_stream(words: Words, seed: bytes, sign: int) -> None:
    """Add the seed's stream to `words` in place, or subtract it with sign -1, modulo 2^32."""
    cipher = Cipher(algorithms.AES(seed), modes.CTR(bytes(16))).encryptor()
    zeros, made = bytes(4 * min(len(words), BLOCK)), bytearray(4 * BLOCK + 15)
    for start in range(0, len(words), BLOCK):
        part = words[start : start + BLOCK]
        size = cipher.update_into(memoryview(zeros)[: 4 * len(part)], made)
        stream = np.frombuffer(made, "<u4", size // 4)
        if sign > 0:
            np.add(part, stream, out=part)
        else:
            np.subtract(part, stream, out=part)
