"""The plain PEFT loop: clients one after another on one resident model.

With several processes each has a model and its share of the clients, and the parent, which never
imports torch, averages what they send back.
"""

import multiprocessing
import time
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from competitors.job import Job, Result, main

Tensors = dict[str, np.ndarray[Any, Any]]


def _work(link: Connection, job: Job, number: int) -> None:
    """One process: sums of weighted tensors and losses for each round it is asked to train."""
    import torch

    from competitors import encoder

    torch.set_num_threads(1)
    tokenizer = encoder.tokenizer_of(job)
    held = encoder.shards(job, tokenizer)
    mine = list(held)[number :: job.processes]
    model = encoder.build(job, len(encoder.labels_of(job)))
    live = encoder.trained(model)
    draws = torch.Generator().manual_seed(number)
    start = {name: p.detach().numpy().copy() for name, p in live.items()}
    link.send((start, sum(len(rows) for rows in held.values())))

    while (order := link.recv()) is not None:
        action, sent = order
        tensors = {name: torch.from_numpy(values) for name, values in sent.items()}
        encoder.put(model, tensors)
        if action == "evaluate":
            link.send(encoder.evaluate(model, encoder.shards(job, tokenizer, "test")))
            continue
        sums = {name: np.zeros(p.shape) for name, p in live.items()}
        loss = 0.0
        for client in mine:
            encoder.put(model, tensors)
            weight = len(held[client])
            loss += weight * encoder.train(model, held[client], job, draws)
            for name, parameter in live.items():
                sums[name] += weight * parameter.detach().numpy()
        link.send((sums, loss))


def compete(job: Job) -> Result:
    """Run all rounds."""
    context = multiprocessing.get_context("spawn")
    links, workers = [], []
    for number in range(job.processes):
        link, theirs = context.Pipe()
        workers.append(context.Process(target=_work, args=(theirs, job, number), daemon=True))
        workers[-1].start()
        theirs.close()
        links.append(link)
    # Every process sends the same.
    tensors, rows = [link.recv() for link in links][-1]
    began, seconds, loss = time.time(), [], 0.0
    for _ in range(job.rounds):
        start = time.perf_counter()
        for link in links:
            link.send(("train", tensors))
        answers = [link.recv() for link in links]
        tensors = {
            name: (sum(sums[name] for sums, _ in answers) / rows).astype(np.float32)
            for name in tensors
        }
        loss = sum(part for _, part in answers) / rows
        seconds.append(time.perf_counter() - start)
    links[0].send(("evaluate", tensors))
    test_loss, accuracy = links[0].recv()
    for link, worker in zip(links, workers, strict=True):
        link.send(None)
        worker.join()
    return Result(began, seconds, rows, loss, test_loss, accuracy)


if __name__ == "__main__":
    main(compete)
