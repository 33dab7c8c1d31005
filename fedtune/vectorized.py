"""A whole cohort's local steps at once on one resident base: the same computation as training.py.

The frozen base multiplies the real tokens of all clients together, from the first adapted layer
on; each adapter and head is applied to its own client's rows. Clients are sorted by their number of
steps: those that have finished drop off the end, and no row of theirs is computed again. What is
unequal between clients (rows, steps, rates, ranks, trained tensors, corrections, penalties) is a
value a client in a vector, never a reason to fall back.
"""

import logging
import weakref
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from fedtune import models, stacked, training
from fedtune.adapter import digest, rank_axis
from fedtune.config import TrainSettings
from fedtune.models import Model
from fedtune.products import Layout, UnsupportedError
from fedtune.records import Sums, merge
from fedtune.resident import Base
from fedtune.seeds import seed_of
from fedtune.stacked import Stack
from fedtune.strategies.strategy import Plan
from fedtune.tasks.task import Example, Scores, Task
from fedtune.training import Trained, Work

log = logging.getLogger("fedtune")
BETAS, EPSILON = (0.9, 0.999), 1e-8  # torch's AdamW
Job = tuple[Plan, Work]
Outcome = Trained | FloatingPointError


def obstacle(model: Model, jobs: Sequence[Job]) -> str:
    """Why a cohort cannot be trained at once, "" where it can."""
    if model.module.peft_config["default"].use_dora:
        return "adapter.dora needs the norm of each client's merged weights"
    if {name for group in model.tensors.values() for name in group} - set(stacked.places(model)):
        return "the model's head has parts that are not linear"
    names = [[name for group in plan.start.values() for name in group] for plan, _ in jobs]
    if any(own != names[0] for own in names):
        return "the clients hold different tensors"
    if "core" in jobs[0][0].start and len({_shapes(plan) for plan, _ in jobs}) > 1:
        return "the clients' cores have different shapes"
    if any(plan.base for plan, _ in jobs):
        bases = {digest({"base": plan.base}) for plan, _ in jobs}
        if len(bases) > 1:
            return "the clients' frozen weights differ"
    if len({work.private is None for _, work in jobs}) > 1:
        return "some clients take noisy steps and others do not"
    return ""


def _shapes(plan: Plan) -> tuple[torch.Size, ...]:
    return tuple(tensor.shape for group in plan.start.values() for tensor in group.values())


def train(
    model: Model,
    task: Task,
    jobs: Sequence[Job],
    settings: TrainSettings,
    unpadded: bool | None = None,
) -> list[Outcome]:
    """What `training.train` gives for each job, computed together.

    Where `obstacle` names a reason, or the base turns out to hand its adapted parts what no client
    can be told from, the jobs run one after another. Where a GPU's memory does not hold them all,
    they run in halves; who is trained beside whom does not matter.

    Args:
        model: the resident model.
        task: what is learnt.
        jobs: the clients' plans and work.
        settings: the recipe's, the same for all.
        unpadded: whether the base sees real tokens only; None: as `resident.runs_unpadded` has it.

    Returns:
        For each job its tensors and metrics, or the error that voided its round.
    """
    if any(plan.keep < 1 for plan, _ in jobs):
        return _after_trial(model, task, jobs, settings, unpadded)
    if not jobs or model.module in _apart or obstacle(model, jobs):
        return [_alone(model, task, job, settings) for job in jobs]
    try:
        return _together(model, task, jobs, settings, unpadded)
    except UnsupportedError as error:
        _apart.add(model.module)
        log.warning("clients are trained one after another: %s", error)
        return [_alone(model, task, job, settings) for job in jobs]
    except torch.OutOfMemoryError:
        if len(jobs) == 1:
            raise
    half = len(jobs) // 2
    log.info("%d clients do not fit into memory; %d do, perhaps", len(jobs), half)
    parts = jobs[:half], jobs[half:]
    return [done for part in parts for done in train(model, task, part, settings, unpadded)]


def _after_trial(
    model: Model,
    task: Task,
    jobs: Sequence[Job],
    settings: TrainSettings,
    unpadded: bool | None,
) -> list[Outcome]:
    """The same where some plans keep a share of their ranks: a provisional pass comes first."""
    partial = [number for number, (plan, _) in enumerate(jobs) if plan.keep < 1]
    for number in partial:
        training.require_one_pass(jobs[number][1])
    whole = [(replace(jobs[n][0], keep=1.0), jobs[n][1]) for n in partial]
    outcomes = dict(zip(partial, train(model, task, whole, settings, unpadded), strict=True))
    trials = {n: trial for n, trial in outcomes.items() if isinstance(trial, Trained)}
    going = [n for n in range(len(jobs)) if n in trials or n not in outcomes]
    again = [
        (training.chosen(jobs[n][0], trials[n]) if n in trials else jobs[n][0], jobs[n][1])
        for n in going
    ]
    for n, done in zip(going, train(model, task, again, settings, unpadded), strict=True):
        if isinstance(done, Trained) and n in trials:
            done = replace(done, computed=done.computed + trials[n].computed)
        outcomes[n] = done
    return [outcomes[n] for n in range(len(jobs))]


# Models whose clients turned out to be inseparable.
_apart: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()


def _together(
    model: Model,
    task: Task,
    jobs: Sequence[Job],
    settings: TrainSettings,
    unpadded: bool | None,
) -> list[Outcome]:
    order = sorted(range(len(jobs)), key=lambda i: -len(jobs[i][1].batches))
    with (
        models.shifted(model, jobs[0][0].base),
        models.checkpointed(model, settings.gradient_checkpointing),
    ):
        run = _Run(model, task, [jobs[i] for i in order], settings, unpadded)
        outcomes = dict(zip(order, run.outcomes(), strict=True))
    return [outcomes[i] for i in range(len(jobs))]


def _alone(model: Model, task: Task, job: Job, settings: TrainSettings) -> Outcome:
    try:
        return training.train(model, task, *job, settings)
    except FloatingPointError as error:
        return error


class _Run:
    """The steps of some clients, sorted by their number."""

    def __init__(
        self,
        model: Model,
        task: Task,
        jobs: Sequence[Job],
        settings: TrainSettings,
        unpadded: bool | None,
    ) -> None:
        self.model, self.task, self.jobs, self.settings = model, task, jobs, settings
        plans = [plan for plan, _ in jobs]
        self.places, self.stack = stacked.places(model), Stack(plans, model)
        self.base = Base.of(model, task, unpadded)
        flat = self.stack.flat
        self.anchor = flat.clone()
        self.moments = torch.zeros_like(flat), torch.zeros_like(flat)
        corrected = any(plan.correction for plan in plans)
        rows = [self.stack.row({"correction": plan.correction}) for plan in plans]
        self.correction = torch.stack(rows).to(flat) if corrected else None
        self.private = jobs[0][1].private is not None
        self.sums: list[list[Sums]] = [[] for _ in jobs]
        self.counts = [[0, 0] for _ in jobs]
        self.failures: dict[int, FloatingPointError] = {}

    def outcomes(self) -> list[Outcome]:
        """Train every step of every client."""
        self.model.module.train()
        leaves: dict[str, Tensor] = {}
        with self.base.opened():
            for step in range(len(self.jobs[0][1].batches)):
                count = sum(len(work.batches) > step for _, work in self.jobs)
                if not leaves or len(next(iter(leaves.values()))) != count:
                    leaves = self.stack.leaves(count)
                if self.private:
                    self._noisy_gradients(step, count, leaves)
                else:
                    self._gradients(step, count, leaves)
                rates = [work.rates[step] for _, work in self.jobs[:count]]
                self._update(torch.tensor(rates, dtype=torch.float64), step + 1)
        return [self._outcome(number) for number in range(len(self.jobs))]

    def _outcome(self, number: int) -> Outcome:
        if number in self.failures:
            return self.failures[number]
        state = self.stack.state(number)
        if self.private:
            try:
                training.require_finite(state)
            except FloatingPointError as error:
                return error
        return Trained(state, merge(self.sums[number]), *self.counts[number])

    def _gradients(self, step: int, count: int, leaves: dict[str, Tensor]) -> None:
        """One forward and backward pass over the batches of the first `count` clients."""
        batches = [work.batches[step] for _, work in self.jobs[:count]]
        layout = self._layout(batches, step)
        with stacked.applied(self.places, leaves, self.stack.scales, layout):
            scores = self.base.scores([row for batch in batches for row in batch])
            each = torch.split(scores["loss"], layout.rows)
            losses = torch.stack([own.mean() for own in each])
            self._note(losses, scores, batches)
            (losses.sum() + self._penalty(leaves)).backward()  # type: ignore[no-untyped-call]
            self.stack.gather(leaves)

    def _noisy_gradients(self, step: int, count: int, leaves: dict[str, Tensor]) -> None:
        """The noisy means of the first `count` clients' batches, some rows of each at a time."""
        works = [(work, work.private) for _, work in self.jobs[:count] if work.private]
        waiting = [own.chunks(step, len(work.batches[step])) for work, own in works]
        sums = [self.stack.clipped_sum(n, own.clip) for n, (_, own) in enumerate(works)]
        for turn in range(max(map(len, waiting))):
            parts = [chunks[turn] if turn < len(chunks) else None for chunks in waiting]
            batches = [
                work.batches[step][part.start : part.stop] if part else []
                for (work, _), part in zip(works, parts, strict=True)
            ]
            layout = self._layout(batches, step, turn)
            with stacked.applied(self.places, leaves, self.stack.scales, layout):
                scores = self.base.scores([row for batch in batches for row in batch])
                scores["loss"].sum().backward()  # type: ignore[no-untyped-call]
            for number, (total, part) in enumerate(zip(sums, parts, strict=True)):
                if part:
                    total.add(self.stack.rows(number, layout), part)
        for number, (total, (_, own)) in enumerate(zip(sums, works, strict=True)):
            training.say_left_out(total)
            whole = self.stack.cropped(number, total.total)
            self.stack.lay(number, own.noised(whole, step))
        penalty = self._penalty(leaves)
        if isinstance(penalty, Tensor):
            penalty.backward()  # type: ignore[no-untyped-call]
            self.stack.add(leaves)

    def _layout(
        self, batches: Sequence[Sequence[Example]], step: int, turn: int | None = None
    ) -> Layout:
        """Whose rows are whose; with a turn, of those of a step, each row's gradient is kept."""
        lengths = [len(example["input_ids"]) for batch in batches for example in batch]
        longest = max(lengths)
        for number, batch in enumerate(batches):
            own = [len(example["input_ids"]) for example in batch]
            self.counts[number][0] += sum(own)
            self.counts[number][1] += sum(own) if self.base.unpadded else longest * len(own)
        return Layout(
            rows=[len(batch) for batch in batches],
            tokens=lengths if self.base.unpadded else [longest] * len(lengths),
            longest=longest,
            step=step,
            # Another stream for every turn: rows of one step share no dropout.
            seeds=[
                seed_of(work.seed, turn) if turn else work.seed
                for _, work in self.jobs[: len(batches)]
            ],
            examples=None if turn is None else {},
        )

    def _note(self, losses: Tensor, scores: Scores, batches: Sequence[Sequence[Example]]) -> None:
        """Keep each client's metrics, and whose loss is not finite."""
        on_cpu = {name: values.detach().cpu() for name, values in scores.items()}
        begin = 0
        for number, (batch, loss) in enumerate(zip(batches, losses.tolist(), strict=True)):
            if not -float("inf") < loss < float("inf"):
                failure = FloatingPointError(f"the training loss became {loss}")
                self.failures.setdefault(number, failure)
            end = begin + len(batch)
            own = {name: values[begin:end] for name, values in on_cpu.items()}
            self.sums[number].append(self.task.sums(own, self.model.labels))
            begin = end

    def _penalty(self, leaves: dict[str, Tensor]) -> Tensor | float:
        """The sum of all clients' tail penalties; 0.0 where nobody has one."""
        count = len(next(iter(leaves.values())))
        plans = [plan for plan, _ in self.jobs[:count]]
        if not any(plan.penalty for plan in plans):
            return 0.0
        flat = self.stack.flat
        # In float32 a penalty such as 0.001 would be another one than in training.py.
        penalties = [plan.penalty for plan in plans]
        factors = torch.tensor(penalties, dtype=torch.float64).to(flat)
        tails = torch.tensor([plan.tail for plan in plans], device=flat.device)
        total = flat.new_zeros(count)
        for name, a in leaves.items():
            if rank_axis(name) != 0:
                continue
            b = leaves[name.replace("lora_A", "lora_B")]
            tail = torch.arange(a.shape[1], device=a.device) >= tails.unsqueeze(1)
            norms = [
                torch.linalg.vector_norm(part, dim=(1, 2))
                for part in (a * tail.unsqueeze(2), b * tail.unsqueeze(1))
            ]
            total = total + norms[0] * norms[1]
        return (factors * total).sum()

    def _update(self, rates: Tensor, step: int) -> None:
        """One AdamW step of the first clients, as many as there are rates.

        Loshchilov and Hutter 2019, https://arxiv.org/abs/1711.05101, algorithm 2, with torch's
        epsilon.
        """
        count, settings, stack = len(rates), self.settings, self.stack
        rates = rates.unsqueeze(1).to(stack.flat)
        parameters, mask = stack.flat[:count], stack.mask[:count]
        gradients = stack.grad[:count]
        first, second = self.moments[0][:count], self.moments[1][:count]
        if settings.proximal:
            gradients.add_(parameters - self.anchor[:count], alpha=settings.proximal)
        if self.correction is not None:
            gradients += self.correction[:count]
        gradients.masked_fill_(~mask, 0.0)
        if settings.max_grad_norm:
            norms = torch.linalg.vector_norm(gradients, dim=1, keepdim=True)
            gradients *= (settings.max_grad_norm / (norms + 1e-6)).clamp(max=1.0)
        beta1, beta2 = BETAS
        if settings.weight_decay:
            parameters -= parameters * (rates * settings.weight_decay) * mask
        first.lerp_(gradients, 1 - beta1)
        second.mul_(beta2).addcmul_(gradients, gradients, value=1 - beta2)
        spread = second.sqrt().div_((1 - beta2**step) ** 0.5).add_(EPSILON)
        parameters -= (first / spread).mul_(rates / (1 - beta1**step))


def evaluate(
    model: Model,
    task: Task,
    trials: Sequence[tuple[Plan, Sequence[Example]]],
    batch_size: int,
    unpadded: bool | None = None,
) -> list[Sums]:
    """What `training.evaluate` gives for each (plan, examples); equal models are tried together.

    Their rows are sorted by length and share batches, as if one client held them all.
    """
    alike: dict[tuple[str, float], list[int]] = {}
    for number, (plan, examples) in enumerate(trials):
        if examples:
            key = digest({**plan.start, "base": plan.base}), plan.scale
            alike.setdefault(key, []).append(number)
    results: list[Sums] = [{} for _ in trials]
    model.module.eval()
    for numbers in alike.values():
        rows = [(example, n) for n in numbers for example in trials[n][1]]
        rows.sort(key=lambda row: len(row[0]["input_ids"]))
        scores = _tried(
            model, task, trials[numbers[0]][0], [e for e, _ in rows], batch_size, unpadded
        )
        whose = torch.tensor([n for _, n in rows])
        for n in numbers:
            own = {name: values[whose == n] for name, values in scores.items()}
            results[n] = task.sums(own, model.labels)
    return results


def _tried(
    model: Model,
    task: Task,
    plan: Plan,
    examples: Sequence[Example],
    batch_size: int,
    unpadded: bool | None,
) -> Scores:
    """The scores of all examples, on the CPU, in their order."""
    base = Base.of(model, task, unpadded)
    parts: list[Scores] = []
    with torch.no_grad(), training.opened(model, plan), base.opened():
        for start in range(0, len(examples), batch_size):
            scores = base.scores(examples[start : start + batch_size])
            parts.append({name: values.cpu() for name, values in scores.items()})
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
