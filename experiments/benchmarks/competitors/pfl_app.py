"""Federated averaging by pfl-research, through its PyTorch bridge, in one of several processes.

Its algorithm evaluates every user before and after training in the first round; that is switched
off here, since nobody else does it.
"""

import dataclasses
import itertools
import sys
import time
from pathlib import Path
from typing import Any

import torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.aggregate.weighting import WeightByDatapoints
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.pytorch import PyTorchTensorDataset
from pfl.data.sampling import MinimizeReuseUserSampler
from pfl.hyperparam import NNTrainHyperParams
from pfl.internal.ops import pytorch_ops
from pfl.metrics import Metrics, Weighted
from pfl.model.pytorch import PyTorchModel
from torch import Tensor

from competitors import encoder
from competitors.encoder import Classifier
from competitors.job import Job, Result


class Module(Classifier):
    """The two methods that pfl asks of a module; a batch is cut to its longest row."""

    losses = (0.0, 0)  # the sum over rows, and how many

    def loss(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Tensor:
        """The batch's mean loss."""
        self.train()
        longest = int(attention_mask.sum(1).max())
        loss: Tensor = self(input_ids[:, :longest], attention_mask[:, :longest], labels)["loss"]
        total, rows = self.losses
        self.losses = total + float(loss.detach()) * len(labels), rows + len(labels)
        return loss

    @torch.no_grad()
    def metrics(self, **batch: Tensor) -> dict[str, Any]:
        """Asked for, but never called: see Averaging."""
        rows = len(batch["labels"])
        return {"loss": Weighted(float(self(**batch)["loss"]) * rows, rows)}


class Averaging(FederatedAveraging):
    """Federated averaging without evaluation of each user."""

    def get_next_central_contexts(self, *arguments: Any, **named: Any) -> Any:
        contexts, model, metrics = super().get_next_central_contexts(*arguments, **named)
        if contexts is not None:
            contexts = tuple(dataclasses.replace(c, do_evaluation=False) for c in contexts)
        return contexts, model, metrics


class Clock(TrainingProcessCallback):
    """When each round ended; before the last one the losses start anew."""

    def __init__(self, rounds: int) -> None:
        self.rounds = rounds
        self.stamps: list[float] = []

    def on_train_begin(self, *, model: Any) -> Metrics:
        self.stamps.append(time.time())
        return Metrics()

    def after_central_iteration(
        self, aggregate_metrics: Metrics, model: Any, *, central_iteration: int
    ) -> tuple[bool, Metrics]:
        self.stamps.append(time.time())
        if central_iteration < self.rounds - 1:
            model.pytorch_model.losses = (0.0, 0)
        return False, Metrics()


def _module(job: Job) -> Module:
    labels = len(encoder.labels_of(job))
    built = encoder.build(job, labels)
    module = Module(built.encoder, built.head.in_features, labels)
    module.load_state_dict(built.state_dict())
    return module


def _optimizer(parameters: Any, lr: float) -> torch.optim.Optimizer:
    wanted = [p for p in parameters if p.requires_grad]
    return torch.optim.AdamW(wanted, lr=lr, weight_decay=0.0)


def _users(held: dict[str, list[encoder.Example]]) -> FederatedDataset:
    """Every client's rows, in another order each time."""
    tensors = {name: encoder.collate(rows) for name, rows in held.items()}
    draws = torch.Generator().manual_seed(0)

    def user(name: str) -> PyTorchTensorDataset:
        order = torch.randperm(len(held[name]), generator=draws)
        own = {key: values[order] for key, values in tensors[name].items()}
        return PyTorchTensorDataset(own, user_id=name)

    # The weights let pfl deal users to processes by their size.
    sizes = {name: len(rows) for name, rows in held.items()}
    return FederatedDataset(user, MinimizeReuseUserSampler(list(held)), sizes)


def _train(job: Job, module: Module, held: dict[str, list[encoder.Example]]) -> list[float]:
    """Run all rounds; returns when each of them ended, and when the first began."""
    clock = Clock(job.rounds)
    central = torch.optim.SGD(encoder.trained(module).values(), lr=1.0)
    Averaging().run(
        algorithm_params=NNAlgorithmParams(
            central_num_iterations=job.rounds,
            evaluation_frequency=job.rounds,
            train_cohort_size=len(held),
            val_cohort_size=None,
        ),
        backend=SimulatedBackend(_users(held), None, postprocessors=[WeightByDatapoints()]),
        model=PyTorchModel(module, _optimizer, central),
        model_train_params=NNTrainHyperParams(
            local_num_epochs=1,
            local_learning_rate=job.learning_rate,
            local_batch_size=job.batch_size,
            local_max_grad_norm=encoder.MAX_GRAD_NORM,
        ),
        callbacks=[clock],
        send_metrics_to_platform=False,
    )
    return clock.stamps


def main(job: Job, target: Path) -> None:
    """All rounds; the first process writes the result."""
    torch.set_num_threads(1)
    tokenizer = encoder.tokenizer_of(job)
    held, module = encoder.shards(job, tokenizer), _module(job)
    stamps = _train(job, module, held)
    total = torch.tensor(module.losses, dtype=torch.float64)
    if pytorch_ops.distributed.world_size > 1:
        torch.distributed.all_reduce(total)
    if pytorch_ops.distributed.global_rank == 0:
        seconds = [after - before for before, after in itertools.pairwise(stamps)]
        tests = encoder.evaluate(module, encoder.shards(job, tokenizer, "test"))
        rows = int(total[1])
        Result(stamps[0], seconds, rows, float(total[0]) / rows, *tests).write(target)


if __name__ == "__main__":
    main(Job.read(sys.argv[1]), Path(sys.argv[2]))
