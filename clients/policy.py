"""What an institution lets out beside adapters and sums of metrics, and what it demands for them.

The institution's own node-config decides; a recipe cannot. In a simulation there is nobody to
protect.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from clients import demands
from clients.demands import Demands
from fedtune.components import fits, nearest
from fedtune.errors import RecipeError
from fedtune.privacy.identity import Identity

INSTITUTION_KEYS: dict[str, type] = {
    "client": str,
    "shard": str,
    "test": str,
    "state": str,
    "label_counts": bool,
    "samples": bool,
    "identity": str,
    "roster": str,
    **demands.KEYS,
}


@dataclass(frozen=True)
class Policy:
    """What an institution's node-config decides: what leaves it, and what a recipe must promise.

    Attributes:
        label_counts: its rows a label, for the report's class mix.
        samples: answers that its model generates from its own test rows.
        key: the file of its identity key; with it, updates leave masked or not at all.
        roster: the file of everybody's public keys.
        demands: the promise without which it takes no part.
    """

    label_counts: bool = False
    samples: bool = False
    key: str = ""
    roster: str = ""
    demands: Demands = field(default_factory=Demands)

    @classmethod
    def of(cls, node_config: Mapping[str, object]) -> "Policy":
        """The policy in an institution's node-config.

        Raises:
            RecipeError: an unknown key or a value of the wrong type: a mistyped policy must not
                fall back to another one.
        """
        for key, value in node_config.items():
            if key not in INSTITUTION_KEYS:
                suggestion = nearest(key, INSTITUTION_KEYS)
                raise RecipeError(f"Unknown node-config key '{key}'.{suggestion}")
            if not fits(value, INSTITUTION_KEYS[key]):
                kind = INSTITUTION_KEYS[key].__name__
                raise RecipeError(f"node-config {key} = {value!r} must be of type {kind}.")
        for key in ("client", "shard"):
            if not node_config.get(key):
                raise RecipeError(
                    "An institution's node-config needs a client's name and its file: "
                    '--node-config \'client="north" shard="/data/notes.jsonl"\'.'
                )
        key, roster = (str(node_config.get(name, "")) for name in ("identity", "roster"))
        if bool(key) != bool(roster):
            raise RecipeError("node-config identity and roster belong together; name both files.")
        label_counts, samples = (bool(node_config.get(n)) for n in ("label_counts", "samples"))
        return cls(label_counts, samples, key, roster, Demands.of(node_config))

    def identity(self, client: str) -> Identity | None:
        """The client's identity, None where it has none.

        Raises:
            RecipeError: a file of it is not as it must be.
        """
        return Identity.load(client, Path(self.key), Path(self.roster)) if self.key else None


OPEN = Policy(label_counts=True, samples=True)
