"""A finished run opened for audits: its rows, its model, and what its ledger claims."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from fedtune import exporting, parts, report, shards
from fedtune.composition import Parts
from fedtune.config import Experiment
from fedtune.errors import RecipeError
from fedtune.models import Model
from fedtune.privacy import certificate, verifying
from fedtune.report import Run
from fedtune.shards import Shard


@dataclass(frozen=True)
class Claim:
    """What a run's verified ledger promises of its final model.

    Attributes:
        mode: of privacy: record, client, local ...
        unit: what is protected: "record", "client", or a column of groups.
        epsilon: against who sees the models of all rounds and not who was sampled.
        delta: beside it.
        text: the certificate's sentence.
    """

    mode: str
    unit: str
    epsilon: float
    delta: float
    text: str


@dataclass(frozen=True)
class Audited:
    """A run of a simulation, whose rows are at hand.

    Attributes:
        run: its folder, read.
    """

    run: Run

    @property
    def experiment(self) -> Experiment:
        """The run's recipe."""
        return self.run.experiment

    @cached_property
    def parts(self) -> Parts:
        """The recipe's parts."""
        return parts.resolve(self.experiment)

    @cached_property
    def shards(self) -> list[Shard]:
        """Each client's rows, dealt again as the run dealt them.

        Raises:
            RecipeError: the run had others.
        """
        found = shards.load(self.experiment.data, self.experiment.seed)
        told = {client["name"] for client in self.run.clients}
        if not self.parts.strategy.pools and told != {shard.name for shard in found}:
            raise RecipeError(
                f"{self.run.folder} had the clients {', '.join(sorted(told))}, who are not those "
                "of its recipe's data: it ran at institutions, whose rows are not here. Only a "
                "simulation can be audited."
            )
        return found

    @cached_property
    def model(self) -> Model:
        """The base with the run's final adapter; audits that write to it put it back."""
        return exporting.load(self.run.folder)

    @cached_property
    def claim(self) -> Claim | None:
        """What the verified ledger promises, None where privacy.mode is none.

        Raises:
            LedgerError: the ledger is damaged or contradicts itself.
        """
        if self.experiment.privacy.mode == "none":
            return None
        made = certificate.of(self.run.folder, verifying.verify(self.run.folder))
        return Claim(
            made["mode"],
            made["unit"],
            float(made["eps_final_model_only"]),
            float(made["delta"]),
            made["statement"],
        )


def open_run(folder: str | Path) -> Audited:
    """The finished run in `folder`.

    Raises:
        RecipeError: there is no run, or it has not come to its end.
    """
    run = report.read(folder)
    if run.records[-1].round < run.experiment.rounds:
        raise RecipeError(
            f"{folder} has come to round {run.records[-1].round} of {run.experiment.rounds}. "
            "Audit a finished run; `fedtune run RECIPE --resume` goes on with this one."
        )
    return Audited(run)
