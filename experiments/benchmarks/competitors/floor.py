"""How fast this machine could be: matrix products on each core at the same time.

Each process multiplies float32 matrices of the shapes that a training step multiplies, one thread,
and all processes measure at once, so that shared clocks and caches count.
"""

import multiprocessing
import time
from multiprocessing.synchronize import Barrier
from typing import Any

from competitors.job import Job, Result, main

SECONDS = 1.0


def shapes(rows: int, width: int) -> list[tuple[int, int, int]]:
    """(m, k, n) of the products that a layer of this width has, and a large square one."""
    return [(rows, width, width), (rows, width, 4 * width), (rows, 4 * width, width), (1024,) * 3]


def _work(rows: int, width: int, barrier: Barrier, queue: Any) -> None:
    import torch

    torch.set_num_threads(1)
    rates = []
    for m, k, n in shapes(rows, width):
        a, b, out = torch.randn(m, k), torch.randn(k, n), torch.empty(m, n)
        torch.mm(a, b, out=out)
        barrier.wait()
        count, start = 0, time.perf_counter()
        while time.perf_counter() - start < SECONDS:
            torch.mm(a, b, out=out)
            count += 1
        rates.append(2 * m * k * n * count / (time.perf_counter() - start))
    queue.put(rates)


def compete(job: Job) -> Result:
    """FLOP a second of all processes together, at the best shape."""
    began = time.time()
    context = multiprocessing.get_context("spawn")
    barrier, queue = context.Barrier(job.processes), context.Queue()
    rows, width = job.batch_size * job.max_length * 4, int(job.options["width"])
    workers = [
        context.Process(target=_work, args=(rows, width, barrier, queue), daemon=True)
        for _ in range(job.processes)
    ]
    for worker in workers:
        worker.start()
    answers = [queue.get() for _ in workers]
    for worker in workers:
        worker.join()
    by_shape = [sum(rates) for rates in zip(*answers, strict=True)]
    names = ["x".join(map(str, shape)) for shape in shapes(rows, width)]
    more = {"flops": max(by_shape), "flops_by_shape": dict(zip(names, by_shape, strict=True))}
    return Result(began, [], 0, 0.0, 0.0, 0.0, more)


if __name__ == "__main__":
    main(compete)
