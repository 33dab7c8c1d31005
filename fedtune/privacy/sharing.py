"""Shamir's secret sharing of 32 bytes.

Adi Shamir, "How to Share a Secret", CACM 1979. The secret is the value at 0 of a random polynomial
of degree t - 1 over the integers modulo p, the smallest prime above 2^256; client number x holds
its value at x. Any t shares give it back, fewer say nothing. Integers of Python are a hundred times
as fast as a polynomial field of characteristic 2 in Python, and a whole secret fits.
"""

from collections.abc import Callable, Mapping

P = 2**256 + 297
SECRET, SHARE = 32, 33  # bytes


def split(secret: bytes, threshold: int, count: int, draw: Callable[[int], bytes]) -> list[bytes]:
    """Shares 1 to `count` of 32 bytes, any `threshold` of which give them back.

    Args:
        secret: 32 bytes.
        threshold: from 1 to `count`.
        count: below 2^16.
        draw: that many random bytes of a cryptographic generator.

    Raises:
        ValueError: another length or threshold.
    """
    if len(secret) != SECRET or not 1 <= threshold <= count < 2**16:
        raise ValueError(f"{len(secret)} bytes cannot be shared {threshold} of {count}")
    # 48 bytes modulo p are uniform to within 2^-127.
    rest = [int.from_bytes(draw(48), "big") % P for _ in range(threshold - 1)]
    shares = []
    for x in range(1, count + 1):
        y = 0
        for coefficient in reversed(rest):
            y = (y + coefficient) * x % P
        shares.append(((y + int.from_bytes(secret, "big")) % P).to_bytes(SHARE, "big"))
    return shares


def combine(shares: Mapping[int, bytes]) -> bytes:
    """The secret of exactly `threshold` shares by their numbers: Lagrange's formula at 0.

    Raises:
        ValueError: they are no shares of 32 bytes.
    """
    secret = 0
    for x, share in shares.items():
        above, below = 1, 1
        for other in shares:
            if other != x:
                above = above * other % P
                below = below * (other - x) % P
        secret = (secret + int.from_bytes(share, "big") * above * pow(below, -1, P)) % P
    if secret >= 2**256 or any(len(share) != SHARE for share in shares.values()):
        raise ValueError("these are no shares of one secret")
    return secret.to_bytes(SECRET, "big")
