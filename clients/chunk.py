"""What the clients of a chunk compute on one resident model, and how many make a chunk."""

from collections.abc import Sequence
from dataclasses import dataclass

from fedtune import training, vectorized
from fedtune.adapter import State
from fedtune.config import TrainSettings
from fedtune.models import Model
from fedtune.records import Sums
from fedtune.tasks.task import Example, Task
from fedtune.training import Work
from fedtune.vectorized import Job

TOGETHER = 8  # clients trained at once


@dataclass(frozen=True)
class Trained:
    """What a job gave.

    Attributes:
        state: the trained tensors.
        sums: the metrics of the training batches.
        tokens: real tokens of the batches.
        computed: tokens that went through the base for them, padding included.
    """

    state: State
    sums: Sums
    tokens: float
    computed: float


def alone(model: Model, task: Task, job: Job, settings: TrainSettings) -> Trained:
    """One job, step by step.

    Raises:
        FloatingPointError: a loss was not finite.
    """
    state, sums = training.train(model, task, *job, settings)
    return Trained(state, sums, *_tokens([job[1]], 0))


def train(
    model: Model, task: Task, jobs: Sequence[Job], settings: TrainSettings
) -> list[Trained | FloatingPointError]:
    """All jobs, together where nothing is in the way."""
    outcomes = vectorized.train(model, task, jobs, settings)
    separate = vectorized.obstacle(model, settings, jobs)
    results: list[Trained | FloatingPointError] = []
    for number, ((_, work), outcome) in enumerate(zip(jobs, outcomes, strict=True)):
        if isinstance(outcome, FloatingPointError):
            results.append(outcome)
            continue
        works = [work] if separate else [w for _, w in jobs]
        results.append(Trained(*outcome, *_tokens(works, 0 if separate else number)))
    return results


def _tokens(works: Sequence[Work], own: int) -> tuple[float, float]:
    """(real, computed) tokens of one of the works that are trained together."""
    real = computed = 0
    for step, batch in enumerate(works[own].batches):
        beside = [work.batches[step] for work in works if len(work.batches) > step]
        real += sum(len(example["input_ids"]) for example in batch)
        rows = max(len(other) for other in beside)
        computed += rows * max(len(example["input_ids"]) for b in beside for example in b)
    return float(real), float(computed)


def evaluate(
    model: Model, task: Task, trials: Sequence[tuple[State, Sequence[Example]]], batch_size: int
) -> list[Sums]:
    """The metrics of each state over its own examples."""
    return [training.evaluate(model, task, *trial, batch_size) for trial in trials]


def together(model: Model, settings: TrainSettings, longest: int, workers: int) -> int:
    """How many clients one process trains at once.

    Args:
        model: the resident model.
        settings: of the training.
        longest: tokens of the longest example.
        workers: processes that share the machine.
    """
    return TOGETHER
