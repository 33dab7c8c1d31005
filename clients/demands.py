"""What an institution demands of every recipe, before its rows are learnt from.

A recipe is the coordinator's, and a client that does as it is told has whatever privacy that
recipe promises, none included. So an institution's own node-config can name the promise without
which it takes no part, and how much all runs together may cost its rows.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from fedtune.components import nearest
from fedtune.config import Experiment
from fedtune.errors import RecipeError
from fedtune.privacy.mechanism import Mechanism

# Modes whose noise, or a share of it, the client adds itself.
OWN_NOISE = ("record", "local", "client-distributed")
KEYS: dict[str, type] = {
    "privacy": str,
    "unit": str,
    "epsilon": float,
    "delta": float,
    "noise": float,
    "clip": float,
    "ledger": str,
}


@dataclass(frozen=True)
class Demands:
    """What an institution demands of a recipe; the defaults demand nothing.

    Attributes:
        modes: the values of privacy.mode that it takes part in.
        unit: the value that privacy.unit must have.
        epsilon: of all runs together, at most.
        delta: of the recipe and of that epsilon, at most; 0 is min(1e-5, 1 / (10 units)).
        noise: z = sigma / C, at least.
        clip: C, at most.
        ledger: the folder of its account; "" lies beside what it keeps of its runs.
    """

    modes: tuple[str, ...] = ()
    unit: str = ""
    epsilon: float = 0.0
    delta: float = 0.0
    noise: float = 0.0
    clip: float = 0.0
    ledger: str = ""

    @classmethod
    def of(cls, node_config: Mapping[str, object]) -> "Demands":
        """The demands in a node-config whose keys and types were checked.

        Raises:
            RecipeError: a value that cannot be demanded, or a bound without a mode that keeps it.
        """
        given = [key for key in KEYS if key in node_config]
        if not given:
            return cls()
        if "privacy" not in given:
            raise RecipeError(
                f"node-config {given[0]} bounds what a promise costs, but nothing demands one. Say "
                'which: privacy="record" (noisy steps at this client).'
            )
        modes = tuple(mode.strip() for mode in str(node_config["privacy"]).split(","))
        for mode in modes:
            if mode not in OWN_NOISE:
                raise RecipeError(_no_mode(mode))
        return cls(
            modes,
            unit=_text(node_config, "unit"),
            epsilon=_number(node_config, "epsilon"),
            delta=_number(node_config, "delta", below=1),
            noise=_number(node_config, "noise"),
            clip=_number(node_config, "clip"),
            ledger=_text(node_config, "ledger"),
        )

    def require(self, experiment: Experiment, promised: Mechanism | None, own_tests: bool) -> None:
        """Refuse a recipe that promises less.

        Args:
            experiment: the recipe.
            promised: by noise of the client's own, None for nothing.
            own_tests: whether the node-config names a file of test rows.

        Raises:
            RecipeError: it does, in what is in the message.
        """
        for reason in self._lacking(experiment, promised, own_tests):
            raise RecipeError(f"This institution {reason}")

    def _lacking(
        self, experiment: Experiment, promised: Mechanism | None, own_tests: bool
    ) -> Iterator[str]:
        p, data = experiment.privacy, experiment.data
        if promised is None or p.mode not in self.modes:
            wanted = " or ".join(f"'{mode}'" for mode in self.modes)
            yield f"demands privacy.mode = {wanted}; the recipe has '{p.mode}'."
            return
        if self.unit and p.mode == "record" and p.unit != self.unit:
            yield f"demands privacy.unit = '{self.unit}'; the recipe has '{p.unit}'."
        if self.delta and promised.delta > self.delta:
            yield (
                f"demands a delta of {self.delta:.3g} at most; the recipe's is "
                f"{promised.delta:.3g}. Lower privacy.delta."
            )
        if self.noise and promised.noise < self.noise:
            yield (
                f"demands a noise multiplier of {self.noise:.4g} at least; the recipe's is "
                f"{promised.noise:.4g}. Raise privacy.noise, or lower privacy.epsilon."
            )
        if self.clip and promised.clip > self.clip:
            yield f"demands privacy.clip = {self.clip:.4g} at most; the recipe has {p.clip:.4g}."
        # Metrics on test rows go without noise, so a recipe must not choose which rows those are.
        shares = {"validation_fraction": data.validation_fraction}
        if not own_tests:
            shares["test_fraction"] = data.test_fraction
        for key, share in shares.items():
            if share:
                yield (
                    f"demands noise for its rows, and data.{key} = {share} would measure a part of "
                    f"them without. Set data.{key} = 0; it may name test rows of its own "
                    "(node-config test)."
                )


def _number(node_config: Mapping[str, object], key: str, below: float = math.inf) -> float:
    """The number of a key that may be left out."""
    value = node_config.get(key)
    if value is None:
        return 0.0
    if not (isinstance(value, int | float) and 0 < value < below):
        most = "" if below == math.inf else f" and below {below}"
        raise RecipeError(
            f"node-config {key} = {value!r} must be above 0{most}; leave the key out to demand "
            "nothing."
        )
    return float(value)


def _text(node_config: Mapping[str, object], key: str) -> str:
    """The text of a key that may be left out."""
    value = node_config.get(key)
    if value == "":
        raise RecipeError(
            f"node-config {key} is empty; name one, or leave the key out to demand nothing."
        )
    return str(value or "")


def _no_mode(mode: str) -> str:
    if mode == "client":
        return (
            "node-config privacy = 'client' cannot be demanded: its noise is the coordinator's, "
            "which no client can check. Demand 'record', 'local' or 'client-distributed'."
        )
    known = ", ".join(f"'{own}'" for own in OWN_NOISE)
    return (
        f"node-config privacy = '{mode}' is none of {known}.{nearest(mode, OWN_NOISE)} Several "
        "have commas between them. Masked sums are demanded by naming identity and roster."
    )
