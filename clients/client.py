"""One client: its shard, its share of a model, and the three steps of a turn.

`prepare` turns a message into a job, `train` runs the job, `finish` turns what was trained into a
reply. Engines differ in the middle step only: a cohort may train many jobs at once, a SuperNode
trains its own.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from datasets import Dataset

from clients import chunk, personal
from clients.chunk import Trained
from clients.policy import OPEN, Policy
from fedtune import models, parts, shards, training
from fedtune.adapter import State
from fedtune.config import DataSettings, Experiment, ModelSettings
from fedtune.errors import RecipeError
from fedtune.heads import HeadRule
from fedtune.models import Model
from fedtune.shards import Shard
from fedtune.strategies.strategy import Plan, Turn
from fedtune.tasks.task import Example, Task
from fedtune.training import Work
from fedtune.wire import Address

SAMPLE_TOKENS = 64
Trial = tuple[State, list[Example]]


@dataclass(frozen=True)
class Job:
    """Everything that one client's local training depends on."""

    address: Address
    turn: Turn
    plan: Plan
    work: Work


@dataclass(frozen=True, eq=False)
class Rows:
    """A shard and, once they were asked for, its encoded rows: the arms of a run share them.

    Attributes:
        shard: the rows as text.
        labels: the classes of the head.
        parts: where the rows are those of several shards, these.
        encoded: split -> encoded rows.
    """

    shard: Shard
    labels: tuple[str, ...]
    parts: Sequence["Rows"] = ()
    encoded: dict[str, list[Example]] = field(default_factory=dict)

    def examples(self, split: str, task: Task, model: Model, limit: int) -> list[Example]:
        """The rows of `split`, "train" or "test", of at most `limit` tokens each.

        Raises:
            RecipeError: a row does not fit the task; its number is in the message.
        """
        if split not in self.encoded:
            if self.parts:
                lists = [part.examples(split, task, model, limit) for part in self.parts]
                self.encoded[split] = [example for rows in lists for example in rows]
            else:
                self.encoded[split] = self._encode(split, task, model, limit)
        return self.encoded[split]

    def _encode(self, split: str, task: Task, model: Model, limit: int) -> list[Example]:
        rows: Dataset = getattr(self.shard, split)
        try:
            return task.encode(rows, model.tokenizer, self.labels, limit)
        except RecipeError as error:
            raise RecipeError(f"{split} rows of client '{self.shard.name}': {error}") from error


def _ordered(plan: Plan) -> Plan:
    """The plan with its tensors by name.

    A state that was read from a checkpoint has another order than the one that was written, and a
    norm over all tensors, which clips gradients, another last bit.
    """
    start = {group: dict(sorted(tensors.items())) for group, tensors in sorted(plan.start.items())}
    return Plan(start, plan.trainable)


@dataclass(frozen=True, eq=False)
class Client:
    """One institution, simulated or real.

    Attributes:
        experiment: the arm's experiment.
        rows: its rows.
        state: the folder of what it keeps to itself.
        policy: what it lets out.
        everybody: in a simulation, the client that would hold the rows of all.
    """

    experiment: Experiment
    rows: Rows
    state: Path
    policy: Policy = OPEN
    everybody: "Client | None" = None

    @property
    def shard(self) -> Shard:
        """Its rows as text."""
        return self.rows.shard

    @property
    def labels(self) -> tuple[str, ...]:
        """The classes of the head."""
        return self.rows.labels

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
    def examples(self) -> list[Example]:
        """Its encoded training rows."""
        return self._encoded("train")

    @property
    def tests(self) -> list[Example]:
        """Its encoded test rows."""
        return self._encoded("test")

    def _encoded(self, split: str) -> list[Example]:
        limit = self.experiment.model.max_length
        return self.rows.examples(split, self.parts.task, self.model, limit)

    def require_rows(self) -> None:
        """Encode every row now, so that a faulty one is told before the first round.

        Raises:
            RecipeError: a row does not fit the task; its number is in the message.
        """
        _ = self.examples, self.tests

    def _turn(self, address: Address, received: State) -> Turn:
        kept = personal.load(self.state, address.last_round)
        return Turn(address.round, received, kept)

    def prepare(self, address: Address, received: State) -> Job:
        """The job of one round, from what the coordinator sent and what the client kept."""
        e, name = self.experiment, self.shard.name
        turn = self._turn(address, received)
        plan = _ordered(self._with_head(turn, self.parts.strategy.plan(turn)))
        batches = training.batches_of(
            self.examples, e.train, e.seed, "batches", address.round, name
        )
        rates = training.rates_of(len(batches), address.round, e.rounds, e.train)
        seed = training.dropout_seed(e.seed, address.round, name)
        return Job(address, turn, plan, Work(batches, rates, seed))

    def _with_head(self, turn: Turn, plan: Plan) -> Plan:
        rule = HeadRule.of(self.parts.task, self.parts.strategy)
        head = rule.start(turn.received, turn.personal)
        if not head:
            return plan
        trainable = plan.trainable | (frozenset(head) if rule.trained else frozenset())
        return Plan({**plan.start, "head": head}, trainable)

    def train(self, job: Job) -> Trained:
        """The job's outcome, step by step."""
        settings = self.experiment.train
        return chunk.alone(self.model, self.parts.task, (job.plan, job.work), settings)

    def finish(self, job: Job, trained: State) -> State:
        """What is sent; what the client keeps is saved."""
        rule = HeadRule.of(self.parts.task, self.parts.strategy)
        sent, kept = self.parts.strategy.reply(job.turn, job.plan, trained)
        head, own_head = rule.reply(job.plan.start.get("head", {}), trained.get("head", {}))
        personal.save(self.state, job.address.round, {**kept, **own_head})
        return {**sent, **head}

    def trial(self, address: Address, received: State) -> Trial:
        """The client's model, its own where it has one, and its own test rows.

        With scope "pooled", the test rows of all clients: a simulation can, an institution cannot.
        """
        turn = self._turn(address, received)
        start = self._with_head(turn, self.parts.strategy.plan(turn)).start
        if address.scope != "pooled":
            return start, self.tests
        if self.everybody is None:
            raise RecipeError("Test rows never leave an institution; nothing can be pooled.")
        return start, self.everybody.tests

    def samples(self, state: State) -> list[tuple[str, str, str]]:
        """(prompt, generated answer, reference) of its first test rows, with the model `state`."""
        count = self.experiment.evaluation.samples
        if not (count and self.policy.samples and self.parts.task.generates):
            return []
        models.write(self.model, state)
        rows = self.shard.test.select(range(min(count, len(self.shard.test))))
        prompts = self.parts.task.prompts(rows, self.model.tokenizer)
        answers = models.generate(self.model, [ids for ids, _, _ in prompts], SAMPLE_TOKENS)
        return [(p, a, r) for (_, p, r), a in zip(prompts, answers, strict=True)]


@functools.lru_cache(maxsize=1)
def _population(
    data: DataSettings, seed: int, task: Task, model: ModelSettings
) -> tuple[list[Rows], Rows]:
    """The rows of each client and of all; task and model decide how they are encoded."""
    held = shards.load(data, seed)
    everything = shards.pooled(held)
    labels = task.labels(everything.train)
    each = [Rows(shard, labels) for shard in held]
    return each, Rows(everything, labels, each)


@functools.lru_cache(maxsize=16)  # arms of a run, which take turns
def simulated(experiment: Experiment) -> dict[str, Client]:
    """All clients of a simulation by name.

    Raises:
        RecipeError: the rows or their partition are not as the recipe says.
    """
    e = experiment
    resolved = parts.resolve(e)
    each, everything = _population(e.data, e.seed, resolved.task, e.model)
    root, name = parts.folder_of(e) / "clients", everything.shard.name
    everybody = Client(e, everything, root / name)
    if resolved.strategy.pools:
        return {name: everybody}
    return {
        rows.shard.name: Client(e, rows, root / rows.shard.name, OPEN, everybody) for rows in each
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
        RecipeError: the node-config or its file is wrong, or the recipe asks for pooled rows.
    """
    node = dict(config)
    policy = Policy.of(node)
    resolved = parts.resolve(experiment)
    if resolved.strategy.pools:
        raise RecipeError(
            f"strategy '{experiment.strategy}' pools rows; at an institution they stay."
        )
    name = str(node["client"])
    data, seed = experiment.data, experiment.seed
    shard = shards.institution(
        name, str(node["shard"]), str(node.get("test", "")) or None, data, seed
    )
    rows = Rows(shard, resolved.task.labels(None))
    root = Path(str(node.get("state", Path.home() / ".fedtune"))) / name / run_id
    return Client(experiment, rows, root / experiment.strategy, policy)
