"""What a run will cost, before it costs anything: parameters, bytes, memory and time.

No weights are loaded: the model is built on the meta device. Bytes are exact, but for array
    headers; memory and time are estimates from counted numbers and a measured rate, and say so.
"""

import dataclasses
import math
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fedtune import bases, canaries, models, parts, shards, training
from fedtune.adapter import State, nbytes
from fedtune.cache import cache_limit
from fedtune.config import Experiment
from fedtune.heads import HeadRule
from fedtune.prefix import prefix_folder, usage
from fedtune.privacy.forecast import Outlook, outlook
from fedtune.privacy.mechanism import DISTRIBUTED, private
from fedtune.privacy.secure import Masked
from fedtune.seeds import generator
from fedtune.strategies.strategy import ClientInfo

SAMPLE = 256  # rows whose lengths stand for all
REPEATS = 8


@dataclass(frozen=True)
class Forecast:
    """A run's cost.

    Attributes:
        clients: in the population.
        examples: training rows of all clients.
        test_examples: test rows of all clients.
        classes: of the head, 0 without one.
        base_parameters: frozen.
        trainable: group -> parameters that a client trains or holds.
        bytes_down: broadcast to one client in a round.
        bytes_up: sent by one client in a round.
        bytes_total: of all training rounds, for the expected cohort.
        tokens: mean length of a training row after truncation.
        truncated: share of the sampled rows that lose their end.
        padding: share of padding in the sampled rows' batches, which a sequential run computes; a
            batched one on a CPU does not.
        frozen_layers: how many of the base's layers lie below the first adapter: they are computed
            once a row, and what they give is kept on disk.
        kept_bytes: of those activations, for all rows; the cache holds at most `cache_bytes`.
        cached_bytes: of what is there already, this run's or others'.
        cache_bytes: that activations may take on disk, the least recently used going first.
        memory_bytes: estimate for one process: base, trained tensors with gradients and moments,
            and one batch's activations.
        seconds: estimate for the rounds on one thread of this machine: counted FLOPs over its
            measured rate of matrix products; the references are not in it.
        mix: client -> label -> training rows, {} without labels.
        privacy: what the recipe's promise will cost, None where it makes none.
    """

    clients: int
    examples: int
    test_examples: int
    classes: int
    base_parameters: int
    trainable: dict[str, int]
    bytes_down: int
    bytes_up: int
    bytes_total: int
    tokens: float
    truncated: float
    padding: float
    frozen_layers: int
    kept_bytes: int
    cached_bytes: int
    cache_bytes: int
    memory_bytes: int
    seconds: float
    mix: dict[str, dict[str, int]]
    privacy: Outlook | None = None


def forecast(experiment: Experiment) -> Forecast:
    """The cost of an experiment whose rows this machine can read.

    Raises:
        RecipeError: the recipe, its rows or its model do not fit.
    """
    e, resolved = experiment, parts.resolve(experiment)
    held = canaries.load(e.data, e.seed, resolved.task)
    everything = shards.pooled(held)
    labels = resolved.task.labels(everything.train)
    tensors, parameters, base_bytes = models.skeleton(resolved.task, e.model, e.adapter, labels)
    initial: State = {group: dict(named) for group, named in tensors.items()}
    strategy, rule = resolved.strategy, HeadRule.of(resolved.task, resolved.strategy)
    head: State = {"head": initial["head"]} if "head" in initial else {}
    down = strategy.broadcast(strategy.start(initial["adapter"]), ClientInfo("any", 1), 1)
    up = strategy.payload(initial["adapter"], ClientInfo("any", 1), 1)
    bytes_down = nbytes({**down, **head})
    bytes_up = nbytes({**up, **(head if rule.shared else {})})
    names = [shard.name for shard in ([everything] if strategy.pools else held)]
    turns = sum(len(resolved.cohort.draw(names, r, e.seed)) for r in range(1, e.rounds + 1))

    lengths, truncated = _lengths(e, resolved, everything, labels)
    mean = sum(lengths) / max(1, len(lengths))
    per_round = [
        e.train.steps * e.train.batch_size if e.train.steps else len(s.train) * e.train.epochs
        for s in held
    ]
    trained = sum(per_round) * turns / max(1, len(held))
    tested = len(everything.test) * (1 + math.ceil(e.rounds / e.evaluation.every))
    # A frozen base costs 2 P FLOPs a token forward and 2 P backward; embeddings are not multiplied.
    matrices = _multiplied(resolved, e, labels)
    hidden, layers, _ = bases.dimensions(e.model)
    frozen = _frozen_layers(tensors["adapter"], layers)
    kept = mean * (len(everything.train) + len(everything.test)) * hidden * 4 if frozen else 0
    # Below the first adapter nothing is computed backward, and forward only once a row.
    above = 1 - frozen / layers
    flops = mean * matrices * above * (4 * trained + 2 * tested)
    trainable = models.parameters(tensors)
    longest = max(lengths, default=0)
    return Forecast(
        clients=len(names),
        examples=len(everything.train),
        test_examples=len(everything.test),
        classes=len(labels),
        base_parameters=parameters,
        trainable=trainable,
        bytes_down=bytes_down,
        bytes_up=bytes_up,
        bytes_total=(bytes_down + bytes_up) * turns,
        tokens=mean,
        truncated=truncated,
        padding=_padding(e, lengths),
        frozen_layers=frozen,
        kept_bytes=int(kept),
        cached_bytes=usage(prefix_folder()).bytes,
        cache_bytes=cache_limit(),
        memory_bytes=base_bytes + 20 * sum(trainable.values()) + _activations(e, longest),
        seconds=flops / _rate(),
        mix=shards.mix(held, resolved.task.label_column) if labels else {},
        privacy=_privacy(e, resolved, held, initial, {**up, **(head if rule.shared else {})}),
    )


def _privacy(
    e: Experiment,
    resolved: parts.Parts,
    held: Sequence[shards.Shard],
    initial: State,
    sent: State,
) -> Outlook | None:
    if not private(e):
        return None
    noised = sent
    if e.privacy.mode == "record":
        strategy, rule = resolved.strategy, HeadRule.of(resolved.task, resolved.strategy)
        trained = {n: t for n, t in initial["adapter"].items() if strategy.trains(n, 1)}
        # A strategy with cores trains what it sends.
        noised = {"adapter": trained or sent.get("delta", {})}
        if rule.trained and "head" in initial:
            noised["head"] = initial["head"]
    parameters = sum(t.numel() for tensors in noised.values() for t in tensors.values())
    units = {shard.name: shards.units(shard, e.privacy.unit) for shard in held}
    excess, size = 1.0, resolved.cohort.most(len(held))
    if e.privacy.mode == DISTRIBUTED and isinstance(resolved.secure, Masked):
        excess = math.sqrt(size / resolved.secure.needed(size))
    return outlook(e, resolved.cohort, units, parameters, excess)


def _lengths(
    experiment: Experiment, resolved: parts.Parts, everything: shards.Shard, labels: tuple[str, ...]
) -> tuple[list[int], float]:
    """Token counts of a sample of the training rows, and the share that is cut."""
    tokenizer = bases.tokenizer(experiment.model)
    rows = everything.train
    order = torch.randperm(len(rows), generator=generator(experiment.seed, "forecast")).tolist()
    sample = rows.select(sorted(order[:SAMPLE]))
    limit = experiment.model.max_length
    whole = resolved.task.encode(sample, tokenizer, labels, 10**6)
    lengths = [len(example["input_ids"]) for example in whole]
    cut = sum(length > limit for length in lengths) / max(1, len(lengths))
    return [min(length, limit) for length in lengths], cut


def _padding(experiment: Experiment, lengths: Sequence[int]) -> float:
    """The share of padding in batches of rows of these lengths, as they are drawn."""
    examples = [{"input_ids": [0] * length} for length in lengths]
    settings = dataclasses.replace(experiment.train, epochs=1, steps=0)
    batches = training.batches_of(examples, settings, experiment.seed, "forecast")
    places = sum(len(b) * max(len(row["input_ids"]) for row in b) for b in batches)
    return 1 - sum(lengths) / places if places else 0.0


def _frozen_layers(adapter: Mapping[str, object], layers: int) -> int:
    """Layers below the first adapted one, read from the tensors' names."""
    numbers = [int(n) for name in adapter for n in re.findall(r"\.(\d+)\.", name)[:1]]
    return min(numbers, default=0) if len(numbers) == len(adapter) else 0


def _multiplied(resolved: parts.Parts, experiment: Experiment, labels: tuple[str, ...]) -> int:
    return bases.multiplied(resolved.task, experiment.model, labels)


def _activations(experiment: Experiment, tokens: int) -> int:
    """Bytes kept for a backward pass: about 34 hidden-sized numbers a token and layer.

    Korthikanti et al. 2022, https://arxiv.org/abs/2205.05198, equation 1, in the base's precision.
    """
    hidden, layers, heads = bases.dimensions(experiment.model)
    size = 2 if experiment.model.dtype == "bfloat16" else 4
    rows = experiment.train.batch_size
    per_layer = rows * tokens * (17 * hidden + 2.5 * heads * tokens) * size
    return int(per_layer * (1 if experiment.train.gradient_checkpointing else layers))


def _rate() -> float:
    """FLOP/s of float32 matrix products on one thread of this machine, measured."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    left, right = torch.ones(256, 384), torch.ones(384, 384)
    best = math.inf
    for _ in range(REPEATS):
        began = time.perf_counter()
        for _ in range(20):
            left @ right
        best = min(best, time.perf_counter() - began)
    torch.set_num_threads(threads)
    return 20 * 2 * 256 * 384 * 384 / best


def as_json(forecast: Forecast, experiment: Experiment) -> dict[str, Any]:
    """For `fedtune plan --json`."""
    privacy = forecast.privacy.to_json() if forecast.privacy else None
    return {"experiment": experiment.flat(), **vars(forecast), "privacy": privacy}
