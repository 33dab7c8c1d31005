"""One seed for each (experiment, round, client, purpose), the same in every engine.

Nothing in FedTune draws from a global generator: whoever needs randomness derives a seed here from
    what the draw is for. A draw therefore never depends on what was drawn before it, which is what
    makes a resumed run equal to an uninterrupted one, and two strategies comparable on the same
    batches.
"""

import hashlib

import torch


def seed_of(*parts: int | str) -> int:
    """A seed in [0, 2^63) that depends on every part and on their order.

    Parts are length-prefixed before hashing, so ("ab", "c") and ("a", "bc") differ, and so do 1 and
    "1".
    """
    digest = hashlib.sha256()
    for part in parts:
        text = f"{type(part).__name__}:{part}".encode()
        digest.update(len(text).to_bytes(8, "big") + text)
    return int.from_bytes(digest.digest()[:8], "big") >> 1


def generator(*parts: int | str) -> torch.Generator:
    """A CPU generator seeded by `seed_of(*parts)`."""
    return torch.Generator().manual_seed(seed_of(*parts))


def uniform(*parts: int | str) -> float:
    """One draw from [0, 1), keyed by its parts."""
    return seed_of(*parts) / 2**63
