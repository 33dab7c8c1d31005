"""Plain LoRA training on all rows together, at several batch sizes: what the machine can do.

Each process trains an independent copy; all measure the same batch size at the same time, and their
tokens a second are added. This is a reference for throughput, not a federated result.
"""

import multiprocessing
import time
from collections.abc import Sequence
from multiprocessing.synchronize import Barrier
from typing import Any

from competitors.job import Job, Result, main


def _work(job: Job, sizes: Sequence[int], seconds: float, barrier: Barrier, queue: Any) -> None:
    import torch
    from torch import nn

    from competitors import encoder

    torch.set_num_threads(1)
    held = encoder.shards(job, encoder.tokenizer_of(job))
    examples = [example for own in held.values() for example in own]
    model = encoder.build(job, len(encoder.labels_of(job)))
    parameters = list(encoder.trained(model).values())
    optimizer = torch.optim.AdamW(parameters, lr=job.learning_rate, weight_decay=0.0)
    draws = torch.Generator().manual_seed(0)
    loss_value, rates, began = 0.0, {}, 0.0
    model.train()
    for size in sizes:
        barrier.wait()
        began = began or time.time()
        done, start, warm = 0, time.perf_counter(), False
        while not done or time.perf_counter() - start < seconds:
            for batch in encoder.batches(examples, size, draws):
                loss = model(**encoder.collate(batch))["loss"]
                loss.backward()
                nn.utils.clip_grad_norm_(parameters, encoder.MAX_GRAD_NORM)
                optimizer.step()
                optimizer.zero_grad()
                loss_value = float(loss.detach())
                if not warm:  # the first step of a batch size allocates
                    warm, start = True, time.perf_counter()
                    continue
                done += sum(len(example["input_ids"]) for example in batch)
                if time.perf_counter() - start >= seconds:
                    break
        rates[size] = done / (time.perf_counter() - start)
        barrier.wait()
    tests = encoder.evaluate(model, encoder.shards(job, encoder.tokenizer_of(job), "test"))
    queue.put((began, rates, len(examples), loss_value, tests))


def compete(job: Job) -> Result:
    """Tokens a second of all processes, for each batch size."""
    sizes, seconds = job.options["batch_sizes"], job.options["seconds"]
    context = multiprocessing.get_context("spawn")
    barrier, queue = context.Barrier(job.processes), context.Queue()
    workers = [
        context.Process(target=_work, args=(job, sizes, seconds, barrier, queue), daemon=True)
        for _ in range(job.processes)
    ]
    for worker in workers:
        worker.start()
    answers = [queue.get() for _ in workers]
    for worker in workers:
        worker.join()
    began, _, rows, loss, (test_loss, accuracy) = answers[0]
    rates = {size: sum(answer[1][size] for answer in answers) for size in sizes}
    best = max(rates, key=lambda size: rates[size])
    more = {"tokens_per_second": rates, "best_batch_size": best}
    return Result(began, [], rows, loss, test_loss, accuracy, more)


if __name__ == "__main__":
    main(compete)
