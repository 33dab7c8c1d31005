"""Who is who: each client's Ed25519 key, and the roster of all that was spread out of band.

The roster is the one thing that the coordinator cannot choose: it can add nobody to a cohort and
swap no key, since every client holds what it is told against its own copy. The key signs; and a
secret made of it draws how numbers are rounded, so that a round that is repeated rounds the same
way and nobody else can tell how.
"""

import base64
import binascii
import json
import os
import stat
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from fedtune.errors import RecipeError
from fedtune.privacy.letters import digest
from fedtune.privacy.masks import derived

SMALLEST = 3  # of two clients each knows the other's update from their sum


@dataclass(frozen=True)
class Manifest:
    """The roster: who may take part.

    Attributes:
        keys: name -> public identity key.
        minimum_cohort: clients without which this one takes no part.
        run: the one run that it is for, as `fedtune plan` shows it: two runs of one recipe over
            different cohorts are two sums of the same updates. "" is any, in a simulation.
    """

    keys: dict[str, bytes]
    minimum_cohort: int = SMALLEST
    run: str = ""

    def digest(self) -> bytes:
        """Equal for equal rosters."""
        shown = {name: key.hex() for name, key in self.keys.items()}
        text = json.dumps([shown, self.minimum_cohort, self.run], sort_keys=True)
        return digest(b"roster", text.encode())

    @classmethod
    def load(cls, path: Path) -> "Manifest":
        """The roster in a TOML file: its run, and `[keys]` with a line that `fedtune keys` prints.

        Raises:
            RecipeError: it is missing or not as described.
        """
        try:
            found = tomllib.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise RecipeError(f"The roster {path} cannot be read: {error}.") from error
        minimum, run = found.pop("minimum_cohort", SMALLEST), found.pop("run", "")
        table = found.pop("keys", None)
        if found or not isinstance(table, dict) or not table:
            raise RecipeError(
                f"The roster {path} must hold run and a table [keys], and may hold minimum_cohort; "
                f"it holds {', '.join(found) or 'no keys'}."
            )
        if type(minimum) is not int or minimum < SMALLEST:
            raise RecipeError(f"The roster {path}: minimum_cohort must be at least {SMALLEST}.")
        if type(run) is not str or not run:
            raise RecipeError(
                f'The roster {path} must name the one run that it is for, as in run = "NAME-DIGEST"'
                " (`fedtune plan RECIPE` shows it): sums over two runs of a recipe, of different "
                "cohorts, differ by single updates."
            )
        return cls(
            {str(name): _public(path, name, text) for name, text in table.items()}, minimum, run
        )


def _public(path: Path, name: str, text: object) -> bytes:
    try:
        key = base64.b64decode(str(text), validate=True)
    except binascii.Error:
        key = b""
    if len(key) != 32:
        raise RecipeError(
            f"The roster {path}: the key of '{name}' is none. `fedtune keys show` prints it."
        )
    return key


@dataclass(frozen=True)
class Identity:
    """A client's own key and the roster that it holds everybody to."""

    client: str
    key: Ed25519PrivateKey
    manifest: Manifest

    @property
    def public(self) -> bytes:
        """The key that others know it by."""
        return self.key.public_key().public_bytes_raw()

    def rounding(self, *inputs: bytes) -> bytes:
        """A seed that nobody else can make, the same for the same inputs."""
        return derived(self.key.private_bytes_raw(), b"rounding", digest(*inputs))

    @classmethod
    def load(cls, client: str, key: Path, roster: Path) -> "Identity":
        """An institution's, from its own files.

        Raises:
            RecipeError: a file is missing, readable by others or of another form, or the roster
                has another key for this client.
        """
        identity = cls(client, read_key(key), Manifest.load(roster))
        if identity.manifest.keys.get(client) != identity.public:
            raise RecipeError(
                f"The roster {roster} has not the key of {key} for '{client}'. "
                f"`fedtune keys show {key}` prints the line that it must have."
            )
        return identity


def simulated(config: bytes, names: Iterable[str]) -> dict[str, Identity]:
    """Identities of a simulation, where there is nobody to protect: made of the recipe's digest."""
    keys = {
        name: Ed25519PrivateKey.from_private_bytes(digest(b"simulated", config, name.encode()))
        for name in sorted(names)
    }
    manifest = Manifest({name: key.public_key().public_bytes_raw() for name, key in keys.items()})
    return {name: Identity(name, key, manifest) for name, key in keys.items()}


def new_key(path: Path) -> Ed25519PrivateKey:
    """A new key in a new file that only its owner can read.

    Raises:
        RecipeError: the file is there already or cannot be written.
    """
    key = Ed25519PrivateKey.generate()
    text = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError as error:
        raise RecipeError(f"No key is written to {path}: {error.strerror}.") from error
    with os.fdopen(handle, "wb") as file:
        file.write(text)
    return key


def read_key(path: Path) -> Ed25519PrivateKey:
    """The key in a file.

    Raises:
        RecipeError: it is missing, readable by others, or of another kind.
    """
    try:
        others = stat.S_IMODE(path.stat().st_mode) & 0o077
        key = load_pem_private_key(path.read_bytes(), password=None)
    except (OSError, ValueError, TypeError) as error:
        raise RecipeError(f"The key {path} cannot be read: {error}.") from error
    if others and os.name == "posix":
        raise RecipeError(f"The key {path} can be read by others. Run: chmod 600 {path}")
    if not isinstance(key, Ed25519PrivateKey):
        raise RecipeError(f"The key {path} is none of Ed25519. `fedtune keys new` makes one.")
    return key


def line_of(client: str, key: Ed25519PrivateKey) -> str:
    """The client's line in a roster."""
    return f'{client} = "{base64.b64encode(key.public_key().public_bytes_raw()).decode()}"'
