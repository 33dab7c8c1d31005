"""What an institution lets out beside adapters and sums of metrics.

The institution's own node-config decides; a recipe cannot. In a simulation there is nobody to
protect.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from fedtune.components import nearest
from fedtune.errors import RecipeError

INSTITUTION_KEYS = {
    "client": str,
    "shard": str,
    "test": str,
    "state": str,
    "label_counts": bool,
    "samples": bool,
}


@dataclass(frozen=True)
class Policy:
    """Two releases that are off unless an institution turns them on.

    Attributes:
        label_counts: its rows a label, for the report's class mix.
        samples: answers that its model generates from its own test rows.
    """

    label_counts: bool = False
    samples: bool = False

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
            if type(value) is not INSTITUTION_KEYS[key]:
                kind = INSTITUTION_KEYS[key].__name__
                raise RecipeError(f"node-config {key} = {value!r} must be of type {kind}.")
        for key in ("client", "shard"):
            if not node_config.get(key):
                raise RecipeError(
                    "An institution's node-config needs a client's name and its file: "
                    '--node-config \'client="north" shard="/data/notes.jsonl"\'.'
                )
        return cls(
            bool(node_config.get("label_counts", False)), bool(node_config.get("samples", False))
        )


OPEN = Policy(label_counts=True, samples=True)
