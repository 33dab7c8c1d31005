"""What privacy asks of a round: charge before it is sent, add noise before anything is joined.

The coordinator asks a guard at each step. Where nothing is promised the guard changes nothing;
where something is, it keeps the run's secret and its ledger, and stops the run before a round that
would cost more than the recipe allows.
"""

import functools
import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import torch

import fedtune
from fedtune.adapter import State, digest
from fedtune.config import Experiment
from fedtune.errors import BudgetError, RunError
from fedtune.parts import Parts
from fedtune.privacy import (
    accounting,
    central,
    clipping,
    distributed,
    mechanism,
    noise,
    skellam,
    spending,
)
from fedtune.privacy.clipping import BOUND, CLIP
from fedtune.privacy.distributed import Shares
from fedtune.privacy.ledger import BEGIN, KEY, Ledger, Line
from fedtune.privacy.mechanism import Mechanism
from fedtune.privacy.secure import Masked, Noised, noised
from fedtune.privacy.spending import CHARGE, RELEASE
from fedtune.strategies.strategy import Update
from fedtune.wire import RejectedError
from server.roster import Roster

log = logging.getLogger("fedtune")
STOP = "stop"


class Guard:
    """Of a run that promises nothing: every step is left as it is."""

    def __init__(self, experiment: Experiment, parts: Parts) -> None:
        self.experiment = experiment
        self.parts = parts

    @property
    def settings(self) -> Masked | None:
        """Of secure aggregation; None where updates come one by one."""
        return self.parts.secure if isinstance(self.parts.secure, Masked) else None

    @property
    def seed(self) -> int:
        """Of the cohorts."""
        return self.experiment.seed

    @property
    def tells_metrics(self) -> bool:
        """Whether clients tell metrics of their training batches."""
        return True

    @property
    def compares(self) -> bool:
        """Whether figures may tell how the clients' replies differ."""
        return True

    def began(self, server: State) -> State:
        """The coordinator's state before round 1."""
        return server

    def broadcast(self, server: State, sent: State) -> State:
        """What a client receives."""
        return sent

    def schema(self, schema: State) -> State:
        """What a client must send."""
        return schema

    def admit(self, server: State, state: State) -> None:
        """Refuse, with a RejectedError, a reply that breaks the bound it should keep."""

    def charge(self, server: State, names: Sequence[str], round: int) -> None:
        """Enter a round before it is dispatched; BudgetError where it would cost too much."""

    def release(
        self, server: State, updates: Sequence[Update], schema: State, round: int
    ) -> tuple[State, Sequence[Update]]:
        """The state and the updates that may be joined."""
        return server, updates


class Charging(Guard):
    """Of a run that promises something.

    Args:
        experiment: of the arm.
        parts: of it.
        run_id: of the whole run.
        roster: the population.
        folder: of the arm.
    """

    def __init__(
        self, experiment: Experiment, parts: Parts, run_id: str, roster: Roster, folder: Path
    ) -> None:
        super().__init__(experiment, parts)
        units = {name: member.units for name, member in roster.members.items()}
        self.run_id = run_id
        self.mechanisms = mechanism.of_roster(experiment, parts.cohort, units)
        self.central = experiment.privacy.mode == mechanism.CENTRAL
        self.key = noise.load_key(folder / KEY)
        self.ledger = Ledger(folder, self.key)
        begin = _begin(experiment, parts, run_id, self.mechanisms)
        if self._new(begin):
            self.ledger.append(BEGIN, **begin)
        self.spending = spending.of(self.ledger.lines)
        self._since = 0
        before: dict[str, Mechanism] = {}
        for line in self.ledger.lines:
            if line["kind"] == BEGIN and (told := spending.mechanisms_of(line)) != before:
                self._since, before = line["seq"], told

    def _new(self, begin: Line) -> bool:
        """Whether the population, the recipe's promise or the code is another than before."""
        if not (last := self._latest(BEGIN)):
            return True
        return any(last.get(key) != value for key, value in json.loads(json.dumps(begin)).items())

    def _latest(self, kind: str) -> Line:
        return next((line for line in reversed(self.ledger.lines) if line["kind"] == kind), {})

    def _of(self, kind: str, round: int) -> list[Line]:
        """This round's lines since the mechanisms are what they are."""
        now = self.ledger.lines[self._since :]
        return [line for line in now if line["kind"] == kind and line["round"] == round]

    @property
    def settings(self) -> Masked | None:
        settings = super().settings
        if settings is None or self.experiment.privacy.mode != mechanism.DISTRIBUTED:
            return settings
        return noised(settings, next(iter(self.mechanisms.values())))  # one for all clients

    @property
    def seed(self) -> int:
        return noise.secret_seed(self.key, self.run_id, "cohort")

    @property
    def tells_metrics(self) -> bool:
        return False

    @property
    def compares(self) -> bool:
        return not self.central

    def began(self, server: State) -> State:
        if not (self.central and self.experiment.privacy.clip_quantile):
            return server
        clip = torch.tensor(self.experiment.privacy.clip, dtype=torch.float64)
        return {**server, CLIP: {CLIP: clip}}

    def broadcast(self, server: State, sent: State) -> State:
        return {**sent, CLIP: server[CLIP]} if CLIP in server else sent

    def schema(self, schema: State) -> State:
        if not (self.central and self.experiment.privacy.clip_quantile):
            return schema
        return {**schema, BOUND: {BOUND: torch.zeros(1)}}

    def admit(self, server: State, state: State) -> None:
        if not self.central:
            return
        clip = clipping.clip_of(server, self.experiment.privacy)
        size = clipping.norm({group: t for group, t in state.items() if group != BOUND})
        if not size <= clip:
            raise RejectedError("E_NORM", "its change is larger than the clip")
        if BOUND in state and abs(float(state[BOUND][BOUND])) != 0.5:
            raise RejectedError("E_NORM", "its mark of the clip is neither -1/2 nor 1/2")

    def charge(self, server: State, names: Sequence[str], round: int) -> None:
        if self.central:
            if not self._of(CHARGE, round):
                self._charge([""], "", round, "round", len(names))
            return
        inputs = digest(server)
        paid = {
            name
            for line in self._of(CHARGE, round)
            if line["inputs"] == inputs
            for name in line["clients"]
        }
        # Clients that were asked before repeat the same bytes, which tells nothing new.
        if fresh := [name for name in names if name not in paid]:
            self._charge(fresh, inputs, round, "round", len(names))

    def _charge(
        self, clients: Sequence[str], inputs: str, round: int, why: str, cohort: int
    ) -> None:
        after = self.spending.after(clients)
        for name, account in after.items():
            budget = self.mechanisms[name].budget
            if budget and account.epsilon > budget:
                self._stop(name, account.epsilon, budget, round)
        accounts = {**self.spending.accounts, **after}
        name = spending.worst(spending.present(accounts, self.mechanisms))
        line = self.ledger.append(
            CHARGE,
            round=round,
            clients=list(clients),
            cohort_size=cohort,
            inputs=inputs,
            why=why,
            worst=name,
            mechanism=asdict(self.mechanisms[name]),
            sigma_abs=self.mechanisms[name].sigma,
            cost=spending.told(accounts[name].cost),
        )
        self.spending.take(line)

    def _stop(self, name: str, epsilon: float, budget: float, round: int) -> None:
        if not self._of(STOP, round):
            self.ledger.append(STOP, round=round, client=name, epsilon=epsilon, budget=budget)
        whose = f" of client '{name}'" if name else ""
        raise BudgetError(
            f"Round {round} would bring the epsilon{whose} to {epsilon:.4g}, above "
            f"privacy.epsilon = {budget:.4g}, so it was not sent. The model of round {round - 1} "
            "is in the run's folder. A larger budget or noise is another recipe and another run."
        )

    def release(
        self, server: State, updates: Sequence[Update], schema: State, round: int
    ) -> tuple[State, Sequence[Update]]:
        shapes = [
            {"group": group, "name": name, "shape": list(t.shape), "dtype": str(t.dtype)}
            for group, tensors in schema.items()
            for name, t in tensors.items()
        ]
        if not self.central:
            clients = [name for update in updates for name in update.clients]
            earlier = any(line["clients"] == clients for line in self._of(RELEASE, round))
            outcome = "replayed" if earlier else "released"
            told: Line = {}
            if isinstance(self.settings, Noised) and updates:
                updates, told = self._shared(updates[0], self.settings, round)
            self.ledger.append(
                RELEASE,
                round=round,
                outcome=outcome,
                clients=clients,
                inputs=digest(server),
                released=shapes,
                **told,
            )
            return server, updates
        (only,), settings = self.mechanisms.values(), self.experiment.privacy
        clip = clipping.clip_of(server, settings)
        inputs = central.inputs_hash(updates, repr(clip), repr(only))
        outcome = self._admitted(inputs, round, only.sampling)
        done = central.release(
            updates, schema, only, settings, clip, self.key, self.run_id, round, inputs
        )
        self.ledger.append(
            RELEASE,
            round=round,
            outcome=outcome,
            inputs=inputs,
            clip=clip,
            sigma_abs=done.sigma,
            denominator=only.denominator,
            grid=done.grid,
            noise_norm=done.noise_norm,
            released_norm=done.signal_norm,
            released=shapes,
        )
        if CLIP in server:
            moved = torch.tensor(done.clip, dtype=torch.float64)
            server = {**server, CLIP: {CLIP: moved}}
        _say_if_drowned(done.noise_norm, clip, round)
        return server, [done.update]

    def _shared(
        self, update: Update, settings: Noised, round: int
    ) -> tuple[Sequence[Update], Line]:
        """The mean of those who stayed, and what the ledger tells of the noise they made."""
        promised = self.mechanisms[update.clients[0]]
        shares = Shares.of(settings, self._of(CHARGE, round)[-1]["cohort_size"])
        done = distributed.release(update, shares, promised)
        _say_if_drowned(done.noise_norm, promised.clip, round)
        told = {
            "clip": promised.clip,
            "shares": asdict(shares),
            "sigma_abs": done.sigma,
            "denominator": promised.denominator,
            "noise_norm": done.noise_norm,
            "released_norm": done.released_norm,
        }
        return [done.update], told

    def _admitted(self, inputs: str, round: int, sampling: str) -> str:
        """Whether these inputs were released before; other ones than before are charged again.

        Raises:
            RunError: they would be a second sum over one secret sample, which costs more than two
                sums over samples of their own.
        """
        earlier = {line["inputs"] for line in self._of(RELEASE, round)}
        if inputs in earlier:
            return "replayed"
        if earlier and sampling == "poisson":
            raise RunError(
                f"Round {round} was released once already, with other replies of the same secretly "
                "drawn clients. A second release would reveal more than the ledger can charge. "
                "Resume with the clients that replied then, or begin a new run."
            )
        if len(self._of(CHARGE, round)) <= len(earlier):
            self._charge([""], inputs, round, "other inputs", 0)
        return "released"


def _say_if_drowned(noise_norm: float, clip: float, round: int) -> None:
    if noise_norm > clip and round == 1:
        log.warning(
            "the noise in each round's mean has norm %.3g, what clients say in it %.3g at most: "
            "the model may learn nothing. More clients, fewer trained parameters or a larger "
            "epsilon help.",
            noise_norm,
            clip,
        )


def guard(experiment: Experiment, parts: Parts, run_id: str, roster: Roster, folder: Path) -> Guard:
    """The guard of an arm.

    Raises:
        RecipeError: the population is too small, or a client for its batches.
        LedgerError: the folder's ledger was altered.
        OSError: the folder cannot be written.
    """
    if not mechanism.private(experiment):
        return Guard(experiment, parts)
    return Charging(experiment, parts, run_id, roster, folder)


def _begin(
    experiment: Experiment,
    parts: Parts,
    run_id: str,
    mechanisms: dict[str, Mechanism],
) -> Line:
    """What a ledger begins with, and again where any of it changes."""
    return {
        "run": run_id,
        "mode": experiment.privacy.mode,
        "recipe": experiment.identity(),
        "mechanisms": {name: asdict(one) for name, one in mechanisms.items()},
        "noise": _generator(experiment),
        "accountant": {
            "name": accounting.accountant(),
            "interval": accounting.INTERVAL,
        },
        "code": code_hash(),
        "fedtune": version("fedtune"),
        "selection_charged": False,
        "not_covered": mechanism.not_covered(experiment, parts.strategy),
    }


def _generator(experiment: Experiment) -> Line:
    if experiment.privacy.mode == mechanism.DISTRIBUTED:
        return {"generator": skellam.GENERATOR, "least_steps": skellam.LEAST_STEPS}
    return {"generator": noise.GENERATOR, "grid_bits": noise.GRID_BITS}


@functools.lru_cache(maxsize=1)
def code_hash() -> str:
    """SHA-256 of this installation's own source files."""
    root, sha = Path(fedtune.__file__).parent.parent, hashlib.sha256()
    for package in ("clients", "fedtune", "server"):
        for file in sorted((root / package).rglob("*.py")):
            sha.update(file.relative_to(root).as_posix().encode() + b"\0" + file.read_bytes())
    return sha.hexdigest()
