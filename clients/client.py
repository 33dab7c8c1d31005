"""One client: its shard, its share of a model, and the three steps of a turn.

`prepare` turns a message into a job, `train` runs the job, `finish` turns what was trained into a
reply. Engines differ in the middle step only: a cohort may train many jobs at once, a SuperNode
trains its own.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from clients import personal, sampled
from clients.budget import Book
from clients.policy import OPEN, Policy
from clients.rows import Rows
from fedtune import adapter, attacks, canaries, models, parts, per_example, shards, training
from fedtune.adapter import State
from fedtune.attacks import Attack
from fedtune.config import DataSettings, Experiment, ModelSettings, PrivacySettings
from fedtune.errors import RecipeError
from fedtune.heads import HeadRule
from fedtune.models import Model
from fedtune.privacy import clipping, identity, mechanism, noise
from fedtune.privacy.identity import Identity
from fedtune.privacy.ledger import KEY
from fedtune.privacy.mechanism import Mechanism
from fedtune.privacy.secure import config_digest
from fedtune.shards import Shard
from fedtune.strategies.strategy import Plan, Turn
from fedtune.tasks.task import Example, Task
from fedtune.tokens import Examples
from fedtune.training import Trained, Work
from fedtune.wire import Address

SAMPLE_TOKENS = 64
Trial = tuple[Plan, Examples]


@dataclass(frozen=True)
class Job:
    """Everything that one client's local training depends on."""

    address: Address
    turn: Turn
    plan: Plan
    work: Work


def _ordered(plan: Plan) -> Plan:
    """The plan with its tensors by name.

    A state that was read from a checkpoint has another order than the one that was written, and a
    norm over all tensors, which clips gradients, another last bit.
    """
    start = {group: dict(sorted(tensors.items())) for group, tensors in sorted(plan.start.items())}
    return replace(plan, start=start)


@dataclass(frozen=True, eq=False)
class Client:
    """One institution, simulated or real.

    Attributes:
        experiment: the arm's experiment.
        shard: its rows.
        labels: the classes of the head.
        state: the folder of what it keeps to itself.
        rows: of all clients in this process, which are encoded together.
        number: of its own shard among them, None for all.
        policy: what it lets out.
        everybody: in a simulation, the client that would hold the rows of all.
        malicious: in a simulation, whether it does what the recipe's attack says.
        triggers: the test rows of all that show an attack's success, None for none.
        identity: its key and roster, where updates are masked.
        account: the folder of its ledger over all runs; None is `state`, that of this one.
    """

    experiment: Experiment
    shard: Shard
    labels: tuple[str, ...]
    state: Path
    rows: Rows
    number: int | None
    policy: Policy = OPEN
    everybody: "Client | None" = None
    malicious: bool = False
    triggers: Rows | None = None
    identity: Identity | None = None
    account: Path | None = None

    @functools.cached_property
    def parts(self) -> parts.Parts:
        """The experiment's parts."""
        return parts.resolve(self.experiment)

    @property
    def model(self) -> Model:
        """The process's resident model."""
        e = self.experiment
        return models.load(self.parts.task, e.model, e.adapter, self.labels, e.seed)

    @property
    def examples(self) -> Examples:
        """Its encoded training rows."""
        return self.rows.examples("train", self.number, self.model)

    @property
    def tests(self) -> Examples:
        """Its encoded test rows."""
        return self.rows.examples("test", self.number, self.model)

    @property
    def units(self) -> int:
        """What record-level privacy protects of its rows."""
        return shards.units(self.shard, self.experiment.privacy.unit)

    def require_rows(self) -> None:
        """Encode every row now, so that a faulty one is told before the first round.

        Raises:
            RecipeError: a row does not fit the task, its number being in the message; or the rows
                or the model do not fit what is promised to them.
        """
        _ = self.examples, self.tests
        if self.experiment.privacy.mode == "record":
            per_example.require(self.model)
        if self.promised:
            self.book.require_room(self.experiment.run_id, self.promised)

    def _turn(self, address: Address, received: State) -> Turn:
        kept = personal.load(self.state, address.last_round)
        return Turn(address.round, received, kept, rank=address.rank)

    def prepare(self, address: Address, received: State) -> Job:
        """The job of one round, from what the coordinator sent and what the client kept."""
        e, name = self.experiment, self.shard.name
        promised = self.promised if e.privacy.mode == "record" else None
        batches = (
            []
            if promised
            else training.batches_of(self.examples, e.train, e.seed, "batches", address.round, name)
        )
        steps = promised.steps if promised else len(batches)
        rates = training.rates_of(steps, address.round, e.rounds, e.train)
        turn = replace(self._turn(address, received), rates_sum=sum(rates))
        plan = _ordered(self._with_head(turn, self.parts.strategy.plan(turn)))
        if shared := self.shares_noise:
            context = (address.run, address.arm, address.round, adapter.digest(received))
            self._charge(noise.load_key(self.state / KEY), shared, address, repr(context))
        if promised:
            work = self._sampled(address, plan, rates, promised)
        else:
            seed = training.dropout_seed(e.seed, address.round, name)
            work = Work(batches, rates, seed)
        return Job(address, turn, plan, work)

    @property
    def shares_noise(self) -> Mechanism | None:
        """The promise whose noise this client makes a share of, None where there is none.

        The population is the client's own roster, so that it believes nobody how much noise it
        takes.
        """
        e = self.experiment
        if e.privacy.mode != mechanism.DISTRIBUTED or self.identity is None:
            return None
        return mechanism.client(e, self.parts.cohort, len(self.identity.manifest.keys))

    @property
    def promised(self) -> Mechanism | None:
        """What the recipe promises by noise of this client's own, None for nothing."""
        e = self.experiment
        if e.privacy.mode == "record":
            return mechanism.record(e, self.units)
        return mechanism.local(e) if e.privacy.mode == "local" else self.shares_noise

    @property
    def book(self) -> Book:
        """Its account, with what its institution lets all runs together cost."""
        demands = self.policy.demands
        delta = demands.delta or mechanism.delta_of(PrivacySettings(), self.units)
        return Book(self.account or self.state, demands.epsilon, delta)

    def _charge(self, key: bytes, promised: Mechanism, address: Address, inputs: str) -> None:
        e = self.experiment
        solved = not e.privacy.noise
        self.book.charge(e.run_id, key, promised, address, inputs, solved=solved)

    def _sampled(
        self, address: Address, plan: Plan, rates: Sequence[float], promised: Mechanism
    ) -> Work:
        """The noisy steps of a round, charged to this client's own ledger."""
        settings, key = self.experiment.privacy, noise.load_key(self.state / KEY)
        units = self.rows.units(self.number, self.model, settings.unit)
        own = (address, plan, rates, self.examples, units, settings.unit_rows, promised)
        inputs = sampled.inputs_hash(*own)
        self._charge(key, promised, address, inputs)
        return sampled.work(*own, key, inputs)

    def _with_head(self, turn: Turn, plan: Plan) -> Plan:
        rule = HeadRule.of(self.parts.task, self.parts.strategy)
        head = rule.start(turn.received, turn.personal)
        if not head:
            return plan
        trainable = plan.trainable | (frozenset(head) if rule.trained else frozenset())
        return replace(plan, start={**plan.start, "head": head}, trainable=trainable)

    def train(self, job: Job) -> Trained:
        """What the job gives, step by step."""
        settings = self.experiment.train
        return training.train(self.model, self.parts.task, job.plan, job.work, settings)

    def finish(self, job: Job, trained: State) -> State:
        """What is sent; what the client keeps is saved."""
        rule = HeadRule.of(self.parts.task, self.parts.strategy)
        if self.malicious:
            key = (self.experiment.seed, job.address.round, self.shard.name)
            trained = self.parts.attack.trained(job.plan.start, trained, key)
        sent, kept = self.parts.strategy.reply(job.turn, job.plan, trained)
        head, own_head = rule.reply(job.plan.start.get("head", {}), trained.get("head", {}))
        personal.save(self.state, job.address.round, {**kept, **own_head})
        return self._protected(job, {**sent, **head})

    def _protected(self, job: Job, sent: State) -> State:
        """What is sent under the recipe's promise to clients; one to records is kept by steps."""
        e = self.experiment
        if e.privacy.mode == "client":
            return clipping.bounded(sent, job.turn.received, e.privacy)
        if e.privacy.mode == "local":
            key, turn = noise.load_key(self.state / KEY), job.address
            own, context = mechanism.local(e), (turn.run, turn.arm, turn.round, turn.client)
            bare, _ = clipping.clipped(sent, own.clip)
            self._charge(key, own, turn, repr((context, adapter.digest(bare), own)))
            return clipping.noised(bare, own, key, *context)
        return sent

    def trial(self, address: Address, received: State) -> Trial:
        """The client's model, its own where it has one, and its own test rows.

        With scope "pooled", the test rows of all clients: a simulation can, an institution cannot.
        """
        turn = self._turn(address, received)
        plan = self._with_head(turn, self.parts.strategy.plan(turn))
        if address.scope != "pooled":
            return plan, self.tests
        if self.everybody is None:
            raise RecipeError("Test rows never leave an institution; nothing can be pooled.")
        return plan, self.everybody.tests

    def triggered(self, address: Address) -> Sequence[Example]:
        """The test rows that show an attack's success, of the same scope as a trial's."""
        if self.triggers is None:
            return []
        number = self.number if address.scope != "pooled" else None
        return self.triggers.examples("test", number, self.model)

    def samples(self, plan: Plan) -> list[tuple[str, str, str]]:
        """(prompt, generated answer, reference) of its first test rows, with the plan's model."""
        count = self.experiment.evaluation.samples
        if not (count and self.policy.samples and self.parts.task.generates):
            return []
        rows = self.shard.test.select(range(min(count, len(self.shard.test))))
        prompts = self.parts.task.prompts(rows, self.model.tokenizer)
        with training.opened(self.model, plan):
            answers = models.generate(self.model, [ids for ids, _, _ in prompts], SAMPLE_TOKENS)
        return [(p, a, r) for (_, p, r), a in zip(prompts, answers, strict=True)]


@functools.lru_cache(maxsize=1)
def _held(data: DataSettings, seed: int, task: Task) -> tuple[Shard, ...]:
    return tuple(canaries.load(data, seed, task))


@functools.lru_cache(maxsize=2)  # arms without anything to attack have honest rows
def _rows(
    data: DataSettings, seed: int, task: Task, model: ModelSettings, attack: Attack
) -> tuple[Rows, Rows | None]:
    """One object for all arms of a run; task and model decide how rows are encoded.

    The second has the test rows that show the attack's success.
    """
    held = _held(data, seed, task)
    if not attack.count:
        return Rows(held, task, model), None
    labels = task.labels(shards.pooled(held).train)
    rows = Rows(attacks.poisoned(attack, held, task, labels, seed), task, model)
    if not attack.metrics:
        return rows, None
    return rows, Rows(attacks.triggered(attack, held, task, labels), task, model)


@functools.lru_cache(maxsize=16)  # arms of a run, which take turns
def simulated(experiment: Experiment) -> dict[str, Client]:
    """All clients of a simulation by name.

    Raises:
        RecipeError: the rows or their partition are not as the recipe says.
    """
    e, resolved = experiment, parts.resolve(experiment)
    held, attack = _held(e.data, e.seed, resolved.task), resolved.attack
    rows, triggers = _rows(e.data, e.seed, resolved.task, e.model, attack)
    everything = shards.pooled(held)
    malicious = attack.malicious([shard.name for shard in held])
    labels = resolved.task.labels(everything.train)
    root = parts.folder_of(e) / "clients"
    everybody = Client(e, everything, labels, root / everything.name, rows, None)
    if resolved.strategy.pools:
        return {everything.name: everybody}
    names = [shard.name for shard in held] if resolved.secure.masks else []
    keys = identity.simulated(config_digest(e), names)
    return {
        shard.name: Client(
            experiment=e,
            shard=shard,
            labels=labels,
            state=root / shard.name,
            rows=rows,
            number=number,
            everybody=everybody,
            malicious=shard.name in malicious,
            triggers=triggers,
            identity=keys.get(shard.name),
        )
        for number, shard in enumerate(held)
    }


def warm(experiment: Experiment, arms: Sequence[str]) -> None:
    """Load the model and encode all rows of a simulation.

    Raises:
        RecipeError: the model or a row is not as the recipe says.
    """
    for arm in arms:
        everybody = simulated(parts.reference(experiment, arm) if arm else experiment)
        for client in everybody.values():
            client.require_rows()


@functools.lru_cache(maxsize=1)
def institution(
    experiment: Experiment, run_id: str, config: tuple[tuple[str, object], ...]
) -> Client:
    """The one client of a SuperNode, with the rows that its own node-config names.

    Args:
        experiment: the arm's.
        run_id: of the whole run; what the client keeps lies in a folder of that name.
        config: the node-config, sorted.

    Raises:
        RecipeError: the node-config or its file is wrong, or the recipe asks for pooled rows, for
            updates in clear where the node-config names a roster, or promises less than the
            node-config demands.
    """
    node = dict(config)
    policy = Policy.of(node)
    resolved = parts.resolve(experiment)
    if resolved.strategy.pools:
        raise RecipeError(
            f"strategy '{experiment.strategy}' pools rows; at an institution they stay."
        )
    if resolved.attack.count:
        raise RecipeError(
            f"attack = '{experiment.attack}' is for simulations; an institution takes no part in "
            "it. Set attack = 'none'."
        )
    if experiment.data.audit_canaries:
        raise RecipeError(
            f"data.audit_canaries = {experiment.data.audit_canaries} is for simulations; an "
            "institution puts no made-up rows among its own. Set data.audit_canaries = 0."
        )
    name = str(node["client"])
    key = policy.identity(name)
    if resolved.secure.masks != bool(key):
        raise RecipeError(
            "This institution has a roster and lets out masked updates only. Set "
            "secure_aggregation = 'masked'."
            if key
            else f"secure_aggregation = '{experiment.secure_aggregation}' needs the client's own "
            'key and the roster of all: --node-config \'... identity="/keys/north.key" '
            'roster="/keys/roster.toml"\'.'
        )
    if key and key.manifest.run != run_id:
        raise RecipeError(
            f"The roster of this institution is for the run {key.manifest.run}; this one is "
            f"{run_id}. Each run needs a roster of its own."
        )
    data, seed = experiment.data, experiment.seed
    shard = shards.institution(
        name, str(node["shard"]), str(node.get("test", "")) or None, data, seed
    )
    labels = resolved.task.labels(None)
    root = Path(str(node.get("state", Path.home() / ".fedtune"))) / name
    account = Path(policy.demands.ledger or root / "account")
    client = Client(
        experiment=experiment,
        shard=shard,
        labels=labels,
        state=root / run_id / experiment.strategy,
        rows=Rows((shard,), resolved.task, experiment.model),
        number=0,
        policy=policy,
        identity=key,
        account=account,
    )
    if policy.demands.modes:
        policy.demands.require(experiment, client.promised, bool(node.get("test")))
    return client
