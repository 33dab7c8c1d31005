"""Gaussian noise from a secret key: who repeats a round repeats its noise, and nobody else can.

Fresh noise on a repeated round would be a second release, which averaging uses; the same noise on
changed inputs would leave their exact difference. So the noise is a function of a secret key and of
everything it belongs to, the inputs' hash among them: the same inputs have the same noise, bitwise
and at no cost, and other inputs have independent noise, which is charged. It never comes from the
recipe's seed, which is public, and no global generator can touch it.

Each number is the sum of four draws, halved (Holohan and Braghin 2021, "Secure Random Sampling in
Differential Privacy", https://arxiv.org/abs/2107.10138): with one draw the gaps between floating
point numbers tell the noise apart from what it hides. For the same reason what is released, sum and
noise together, is rounded to a grid that does not depend on the data.
"""

import hashlib
import hmac
import math
import os
import secrets
import stat
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms, modes
from torch import Tensor

from fedtune.errors import RunError
from fedtune.privacy.normal import Doubles, quantile

KEY_BYTES = 32
DRAWS = 4  # of Holohan and Braghin
CHUNK = 8192  # numbers at a time: the buffers stay in the processor's cache
GRID_BITS = 20  # the grid is so many binary digits finer than the noise
GENERATOR = "AES-256-CTR, AS 241, sum of 4 draws"


def load_key(path: Path) -> bytes:
    """The 32 secret bytes in `path`, made at the first call; no one but the owner may read them.

    Raises:
        RunError: others can read the file, or it holds something else.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        _create(path)
    key = path.read_bytes()
    if len(key) != KEY_BYTES:
        raise RunError(
            f"{path} holds {len(key)} bytes, not {KEY_BYTES}. It is the key of this run's noise; "
            "with another one the noise of repeated rounds would differ. Start over with "
            "--overwrite."
        )
    if os.name == "posix" and stat.S_IMODE(path.stat().st_mode) & 0o077:
        raise RunError(
            f"Others can read {path}, with which noise can be subtracted again. Whatever was "
            "released with it is not private from them. Start over with --overwrite."
        )
    return key


def _create(path: Path) -> None:
    """Write a new key in one step: after a crash there is a whole key or none."""
    fresh = path.with_name(f"{path.name}.{secrets.token_hex(8)}")
    handle = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        os.write(handle, secrets.token_bytes(KEY_BYTES))
        os.fsync(handle)
    finally:
        os.close(handle)
    try:
        os.link(fresh, path)  # unlike a rename it never replaces another process's key
    except FileExistsError:
        pass
    finally:
        fresh.unlink()


def subkey(key: bytes, *context: bytes | int | str) -> bytes:
    """32 bytes that depend on every part of the context and on their order: HMAC-SHA256.

    Parts carry their type and length, so ("ab", "c") and ("a", "bc") differ.
    """
    code = hmac.new(key, digestmod=hashlib.sha256)
    for part in context:
        data = part if isinstance(part, bytes) else str(part).encode()
        code.update(f"{type(part).__name__}:{len(data)}:".encode() + data)
    return code.digest()


def secret_seed(key: bytes, *context: bytes | int | str) -> int:
    """A seed that only the key's owner knows, for draws that must stay unknown: cohorts, batches.

    Fits wherever `fedtune.seeds` takes a part; those derive 63-bit numbers from all of its 256.
    """
    return int.from_bytes(subkey(key, *context), "big")


def uniforms(key: bytes, count: int, *context: bytes | int | str) -> Doubles:
    """`count` numbers uniform on the 2^53 centres of equal parts of (0, 1)."""
    return stream(key, *context)(count)


def stream(key: bytes, *context: bytes | int | str) -> Callable[[int], Doubles]:
    """Gives the numbers of `uniforms` one after another, as many at a time as it is asked for."""
    cipher = _cipher(subkey(key, *context))
    return lambda count: _centres(cipher, count)


def gaussian(key: bytes, shape: Sequence[int], *context: bytes | int | str) -> Tensor:
    """Standard normal noise of a shape in float64, fixed by key and context.

    The context names run, round, purpose, the hash of the inputs and whatever else makes this draw
    another one: two draws with the same context are the same draw.
    """
    count = math.prod(shape)
    cipher = _cipher(subkey(key, *context))
    values = np.empty(count)
    for start in range(0, count, CHUNK):
        width = min(CHUNK, count - start)
        draws = quantile(_centres(cipher, DRAWS * width)).reshape(DRAWS, width)
        total = draws[0]
        for other in draws[1:]:
            total = total + other  # in this order: np.sum may take another one
        values[start : start + width] = total * (1 / math.sqrt(DRAWS))
    return torch.from_numpy(values.reshape(tuple(shape)))


def noisy(
    sums: Mapping[str, Tensor], key: bytes, sigma: float, *context: bytes | int | str
) -> dict[str, Tensor]:
    """The tensors in float64 with independent noise of standard deviation `sigma`, on the grid.

    Each tensor's noise depends on its name and not on the others, so their order does not matter.
    """
    grid = grid_of(sigma)
    return {
        name: on_grid(t.double() + sigma * gaussian(key, t.shape, *context, name), grid)
        for name, t in sums.items()
    }


def grid_of(sigma: float) -> float:
    """The grid for noise of this size: a power of two, a millionth of sigma or less."""
    return 2.0 ** (math.floor(math.log2(sigma)) - GRID_BITS)


def on_grid(values: Tensor, grid: float) -> Tensor:
    """The nearest multiples of `grid`, a power of two; float64 holds them exactly."""
    return torch.round(values / grid) * grid


def _cipher(key: bytes) -> CipherContext:
    """A keystream; every key is used for one, so the counter may begin at 0."""
    return Cipher(algorithms.AES256(key), modes.CTR(bytes(16))).encryptor()


def _centres(cipher: CipherContext, count: int) -> Doubles:
    words = np.frombuffer(cipher.update(bytes(8 * count)), dtype="<u8")
    return ((words >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
