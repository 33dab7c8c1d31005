"""How rows pass through the resident base: without padding, and from the first changing layer on.

What lies below the first adapter gives the same activations for the same tokens in every round, so
they are computed once, kept on disk, and shared by rounds, strategies, seeds and processes.
"""

import logging
import math
import os
import weakref
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedtune import models, trunk
from fedtune.cache import cache_limit
from fedtune.config import TrainSettings
from fedtune.models import Model
from fedtune.packing import Packing
from fedtune.prefix import PrefixStore, digest_of, prefix_folder
from fedtune.privacy import steps
from fedtune.tasks.task import Example, Scores, Task

log = logging.getLogger("fedtune")
TOKENS = 2048  # a step; more than this only takes memory, see experiments/README.md
SHARE = 0.5  # of the machine's memory that activations may take


def runs_unpadded(model: Model) -> bool:
    """Whether the base sees real tokens only.

    On the CPU, where products over fewer tokens take less time; a GPU prefers rows of one shape.
    """
    return model.device.type == "cpu" and trunk.agrees(model)


@dataclass(frozen=True)
class Base:
    """How rows pass through the resident base.

    Attributes:
        model: the base with its adapter.
        task: what is asked of it.
        unpadded: whether its layers see real tokens only.
        first: its first layer that changes; what it begins from is kept and not computed again.
        store: where that is kept, None where nothing lies below.
    """

    model: Model
    task: Task
    unpadded: bool
    first: int
    store: PrefixStore | None

    @classmethod
    def of(cls, model: Model, task: Task, unpadded: bool | None) -> "Base":
        """The base as it is best used on this device."""
        unpadded = runs_unpadded(model) if unpadded is None else unpadded
        first = trunk.frozen_layers(model)
        store = _store(model, first) if first and trunk.agrees(model) else None
        if store is None:
            return cls(model, task, unpadded, 0, None)
        return cls(model, task, True, first, store)

    def opened(self) -> AbstractContextManager[None]:
        """Within it, rows may pass."""
        return trunk.unpadded(self.model) if self.unpadded else nullcontext()

    def scores(self, rows: Sequence[Example]) -> Scores:
        """The task's scores of some rows."""
        model, task = self.model, self.task
        batch = {k: v.to(model.device) for k, v in task.collate(rows, model.pad).items()}
        if not self.unpadded:
            with model.autocast():
                return task.scores(model.module, batch)
        packing = Packing.of([len(row["input_ids"]) for row in rows], model.device)
        entry = None if self.store is None else self._entry(self.store, rows)
        with model.autocast(), trunk.packed(model, packing, entry, self.first):
            return task.scores(model.module, batch)

    def _entry(self, store: PrefixStore, rows: Sequence[Example]) -> Tensor:
        """(1, tokens, hidden), what layer `first` begins from for these rows."""
        digests = [digest_of(row["input_ids"]) for row in rows]
        found = store.lookup(digests)
        fresh = list(
            {
                d: row for d, row, there in zip(digests, rows, found, strict=True) if not there
            }.items()
        )
        computed: dict[bytes, Tensor] = {}
        if fresh:
            missing = [row for _, row in fresh]
            batch = self.task.collate(missing, self.model.pad)
            on_device = {k: v.to(self.model.device) for k, v in batch.items()}
            lengths = [len(row["input_ids"]) for row in missing]
            packing = Packing.of(lengths, self.model.device)
            states = trunk.below(self.model, on_device, packing, self.first)
            computed = dict(zip([d for d, _ in fresh], torch.split(states, lengths), strict=True))
            store.append(list(computed), lengths, states.cpu())
        if not computed:
            return store.read(digests).unsqueeze(0).to(self.model.device)
        parts = [
            computed[d] if d in computed else store.read([d]).to(self.model.device) for d in digests
        ]
        return torch.cat(parts).unsqueeze(0)


_stores: "weakref.WeakKeyDictionary[nn.Module, PrefixStore]" = weakref.WeakKeyDictionary()


def _store(model: Model, first: int) -> PrefixStore | None:
    """The store of this model's frozen prefix, opened once a process; None where none can be."""
    if model.module not in _stores:
        probe = trunk.probe(model, first)
        key = trunk.fingerprint(model, first)
        try:
            store = PrefixStore(prefix_folder(), key, probe.shape[1], probe.dtype, cache_limit())
        except OSError as error:
            log.warning("activations of the frozen layers cannot be kept: %s", error)
            return None
        _stores[model.module] = store
    return _stores[model.module]


def together(
    model: Model,
    settings: TrainSettings,
    lengths: Sequence[int],
    workers: int,
    *,
    noisy: bool = False,
) -> int:
    """How many clients one process should train at once, the same on one machine every time.

    As many as make a step of 2,048 tokens, fewer where their activations would not fit.

    Args:
        model: the resident model.
        settings: the recipe's.
        lengths: tokens of the training rows.
        workers: processes that share the machine's memory.
        noisy: whether each client holds the gradients of single rows (record-level privacy).
    """
    rows = settings.batch_size
    longest, mean = max(lengths, default=1), sum(lengths) / max(1, len(lengths))
    layers = 1 if settings.gradient_checkpointing else None
    needed = models.activation_bytes(model, rows * longest, longest, layers)
    trained = sum(p.numel() * p.element_size() for t in model.tensors.values() for p in t.values())
    needed += 6 * trained + (min(steps.DRAWS_ABOVE * rows * trained, steps.HELD) if noisy else 0)
    if model.device.type == "cuda":
        memory = torch.cuda.get_device_properties(model.device).total_memory
        base = sum(p.numel() * p.element_size() for p in model.module.parameters())
        return max(1, int((SHARE * memory - base) // needed))
    fitting = SHARE * _memory() / workers // needed
    return max(1, min(int(fitting), math.ceil(TOKENS / (rows * mean)), 64))


def _memory() -> int:
    """Bytes of this machine's memory; 8 GB where the system does not tell."""
    if not hasattr(os, "sysconf"):
        return 8 * 10**9
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
