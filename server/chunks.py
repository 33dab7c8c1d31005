"""How the clients of a round are dealt to the nodes of a simulation."""

import math
from collections.abc import Mapping


def deal(work: Mapping[str, float], together: int, nodes: int) -> list[list[str]]:
    """Chunks of at most `together` clients, alike in their work.

    There are as few as keep every node busy to the end: a multiple of `nodes`, or one for each
    client. The largest clients are dealt first, each to the chunk with the least work that still
    has room (Graham 1969, "Bounds on multiprocessing timing anomalies"), which is the same for the
    same clients whatever their order.

    Args:
        work: client -> what it will cost, in any unit.
        together: from 1.
        nodes: from 1.
    """
    multiples = math.ceil(len(work) / (together * nodes))
    chunks: list[list[str]] = [[] for _ in range(min(len(work), multiples * nodes))]
    loads = [0.0] * len(chunks)
    for name in sorted(work, key=lambda name: (-work[name], name)):
        room = [i for i, chunk in enumerate(chunks) if len(chunk) < together]
        # Of chunks without any work the emptiest, so that none stays empty.
        least = min(room, key=lambda i: (loads[i], len(chunks[i]), i))
        chunks[least].append(name)
        loads[least] += work[name]
    return [sorted(chunk) for chunk in chunks]
