"""ServerApp and ClientApp as Flower's public fine-tuning examples are built.

For each train message: the base model from disk, a PEFT model, the received parameters, a
transformers Trainer with a padding collator, and the trained parameters back. With the option
`cached` the model is built once in each actor, and everything else stays; with `plain` a plain
loop takes the Trainer's place, whose clean-up costs as much as a small step. A client's encoded
rows are kept in the actor in all of them.
"""

import functools
import itertools
import time
from pathlib import Path
from typing import Any

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from transformers import DataCollatorWithPadding, Trainer, TrainingArguments

from competitors import encoder
from competitors.encoder import Classifier
from competitors.job import Job, Result

client = ClientApp()
server = ServerApp()
torch.set_num_threads(1)


@functools.lru_cache(maxsize=1)
def _rows(path: str) -> tuple[Any, dict[str, list[encoder.Example]]]:
    job = Job.read(path)
    tokenizer = encoder.tokenizer_of(job)
    return tokenizer, encoder.shards(job, tokenizer)


def _build(path: str) -> Classifier:
    job = Job.read(path)
    return encoder.build(job, len(encoder.labels_of(job)))


_cached = functools.lru_cache(maxsize=1)(_build)


def _arrays(model: Classifier) -> ArrayRecord:
    return ArrayRecord({name: p.detach().clone() for name, p in encoder.trained(model).items()})


def _trained(model: Classifier, examples: list[encoder.Example], job: Job, tokenizer: Any) -> float:
    """One epoch by a Trainer of its own; the mean loss over its steps."""
    arguments = TrainingArguments(
        output_dir=str(Path(job.folder, "trainer")),
        num_train_epochs=1,
        per_device_train_batch_size=job.batch_size,
        learning_rate=job.learning_rate,
        lr_scheduler_type="constant",
        max_grad_norm=encoder.MAX_GRAD_NORM,
        weight_decay=0.0,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=examples,
        data_collator=DataCollatorWithPadding(tokenizer),
    )
    return float(trainer.train().training_loss)


@client.train()
def train(message: Message, context: Context) -> Message:
    """One client's epoch."""
    path = str(context.run_config["job"])
    job = Job.read(path)
    tokenizer, held = _rows(path)
    examples = held[list(held)[int(context.node_config["partition-id"])]]
    model = (_cached if job.options["cached"] else _build)(path)
    encoder.put(model, message.content.array_records["arrays"].to_torch_state_dict())
    if job.options["plain"]:
        # Rows in another order each round, as a Trainer has them.
        number = message.content.config_records["config"]["server-round"]
        draws = torch.Generator().manual_seed(int(str(number)))
        loss = encoder.train(model, examples, job, draws)
    else:
        loss = _trained(model, examples, job, tokenizer)
    metrics = MetricRecord({"num-examples": len(examples), "train_loss": loss})
    content = RecordDict({"arrays": _arrays(model), "metrics": metrics})
    return Message(content, reply_to=message)


@server.main()
def main(grid: Grid, context: Context) -> None:
    """FedAvg over all clients; the time of each round, and the trained model's test loss."""
    path = str(context.run_config["job"])
    job = Job.read(path)
    tokenizer, held = _rows(path)
    model = _build(path)
    while len(list(grid.get_node_ids())) < len(held):
        time.sleep(0.2)
    stamps: list[float] = []

    def stamp(number: int, arrays: ArrayRecord) -> None:
        stamps.append(time.time())

    count = len(held)
    strategy = FedAvg(fraction_evaluate=0.0, min_train_nodes=count, min_available_nodes=count)
    done = strategy.start(
        grid=grid, initial_arrays=_arrays(model), num_rounds=job.rounds, evaluate_fn=stamp
    )
    told = done.train_metrics_clientapp
    if len(told) != job.rounds:
        raise RuntimeError(f"{len(told)} of {job.rounds} rounds had replies")
    loss = told[job.rounds]["train_loss"]
    assert isinstance(loss, float)
    encoder.put(model, done.arrays.to_torch_state_dict())
    test_loss, accuracy = encoder.evaluate(model, encoder.shards(job, tokenizer, "test"))
    result = Result(
        stamps[0],
        [after - before for before, after in itertools.pairwise(stamps)],
        sum(len(rows) for rows in held.values()),
        loss,
        test_loss,
        accuracy,
    )
    result.write(Path(path).with_name("result.json"))
