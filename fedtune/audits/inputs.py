"""What the layers that tokens enter first are given for a token: found by running the model.

The first adapted attention layer is recognised by a projection named as queries are, and those that
read the same input by reading the same input; no table of architectures is needed. Whether the
input follows from the token alone is tried too, on two rows that differ in another token.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn

from fedtune import models
from fedtune.models import Model

QUERIES = ("query", "q_proj", "q_lin", "q", "c_attn", "query_key_value", "qkv_proj", "Wqkv")
COPIES = 8  # of a token in a row: the average of so many positions
ROWS = 64  # at a time


@dataclass(frozen=True)
class Readers:
    """Adapted modules that read one input.

    Attributes:
        paths: their names, the query's first.
        alone: whether their input is that of the token, whatever stands beside it.
        before: special tokens that a row begins with.
        after: those that it ends with.
    """

    paths: tuple[str, ...]
    alone: bool
    before: tuple[int, ...]
    after: tuple[int, ...]


class _Reached(Exception):  # noqa: N818
    """Ends a forward pass where nothing more is wanted of it."""


def readers(model: Model, example: Sequence[int]) -> Readers:
    """The modules that read what the first adapted attention layer is given.

    Without a module that is named as a query's, those that read what the first adapted one does.

    Args:
        model: with its adapter.
        example: the ids of a row as the task encodes it.
    """
    special = set(model.tokenizer.all_special_ids)
    before = tuple(takewhile(special.__contains__, example))
    after = tuple(takewhile(special.__contains__, reversed(example[len(before) :])))[::-1]
    middle = [token for token in example if token not in special] or [example[0]]
    probe = torch.tensor([[*before, *(middle * 2)[:2], *after]], device=model.device)
    seen = _seen(model, [path for path, _ in models.lora_layers(model)], probe)
    named = [path for path in seen if path.rpartition(".")[2] in QUERIES]
    first = named[0] if named else next(iter(seen))
    same = [p for p, given in seen.items() if given.shape == seen[first].shape]
    paths = tuple(p for p in [first, *same] if bool((seen[p] == seen[first]).all()))
    # Another token before the one that is looked at: a causal model does not see those after it.
    place, other = len(before), probe.clone()
    other[0, place] = min({*range(len(special) + 2)} - special - {int(probe[0, place])})
    given = _seen(model, [first], other)[first]
    alone = bool((given[0, place + 1] == seen[first][0, place + 1]).all())
    return Readers(tuple(dict.fromkeys(paths)), alone, before, after)


def states(model: Model, found: Readers, tokens: Sequence[int]) -> Tensor:
    """The input of the modules for each token, (tokens, width) in float64 on the CPU.

    Where it follows from the token, the mean over some first positions, whose own parts it holds
    in a model that adds them; else that of the token alone in a row.
    """
    copies = COPIES if found.alone else 1
    place, parts = len(found.before), []
    for start in range(0, len(tokens), ROWS):
        rows = [
            [*found.before, *[token] * copies, *found.after]
            for token in tokens[start : start + ROWS]
        ]
        given = _seen(model, found.paths[:1], torch.tensor(rows, device=model.device))
        own = given[found.paths[0]][:, place : place + copies]
        parts.append(own.double().mean(dim=1).cpu())
    return torch.cat(parts)


def _seen(model: Model, paths: Sequence[str], ids: Tensor) -> dict[str, Tensor]:
    """The inputs of some adapted modules, in the order in which they are reached."""
    layers = dict(models.lora_layers(model))
    seen: dict[str, Tensor] = {}
    training = model.module.training
    model.module.eval()
    with (
        torch.no_grad(),
        model.autocast(),
        models.untuned(model),
        _watched(layers, paths, seen),
        suppress(_Reached),
    ):
        model.module(input_ids=ids, attention_mask=torch.ones_like(ids))
    model.module.train(training)
    return seen


@contextmanager
def _watched(
    layers: dict[str, Any], paths: Sequence[str], seen: dict[str, Tensor]
) -> Iterator[None]:
    def watch(path: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen[path] = args[0] if args else next(iter(kwargs.values()))
            if len(seen) == len(paths):
                raise _Reached

        return hook

    hooks = [layers[p].register_forward_pre_hook(watch(p), with_kwargs=True) for p in paths]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
