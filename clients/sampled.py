"""A client's work under record-level privacy: who is drawn, and what hides them.

Both follow from a secret that never leaves the client's folder and from everything that the steps
depend on, so a repeated round repeats its bytes and a changed one shares nothing with it.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import replace

from fedtune import training
from fedtune.adapter import State, digest
from fedtune.privacy import noise, steps
from fedtune.privacy.mechanism import Mechanism
from fedtune.strategies.strategy import Plan
from fedtune.tokens import Examples
from fedtune.training import Work
from fedtune.wire import Address


def work(
    address: Address,
    plan: Plan,
    rates: Sequence[float],
    examples: Examples,
    units: Sequence[Sequence[int]],
    unit_rows: int,
    mechanism: Mechanism,
    key: bytes,
    inputs: str,
) -> Work:
    """The noisy steps of one round.

    Args:
        address: of the turn.
        plan: what they begin from.
        rates: of the steps.
        examples: the client's training rows.
        units: the examples of each unit.
        unit_rows: of a unit in one step at most, 0 for all.
        mechanism: the client's own.
        key: its secret.
        inputs: hash of all that the steps depend on.
    """
    context = (address.run, address.arm, address.round, address.client, inputs)
    drawn = list(steps.drawn(units, mechanism.rate, mechanism.steps, unit_rows, key, *context))
    parameters = sum(
        tensor.numel()
        for tensors in plan.start.values()
        for name, tensor in tensors.items()
        if name in plan.trainable
    )
    private = steps.Steps(
        clip=mechanism.clip,
        denominator=mechanism.denominator,
        sigma=mechanism.sigma,
        key=key,
        context=context,
        units=[whose for _, whose in drawn],
        limit=steps.limit_of(round(mechanism.batch), parameters),
    )
    batches = [[examples[row] for row in rows] for rows, _ in drawn]
    # Dropout from a public seed could be undone; this is as unknown as the noise.
    seed = training.dropout_seed(noise.secret_seed(key, *context))
    return Work(batches, rates, seed, private)


def inputs_hash(
    address: Address,
    plan: Plan,
    rates: Sequence[float],
    examples: Examples,
    units: Sequence[Sequence[int]],
    unit_rows: int,
    mechanism: Mechanism,
) -> str:
    """SHA-256 of the turn and of everything that decides what its steps add up."""
    state: State = {
        **plan.start,
        "base of the plan": plan.base,
        "correction": plan.correction,
        "mask": plan.mask,
    }
    rest = replace(plan, start={}, base={}, correction={}, mask={}, trainable=frozenset())
    sha = hashlib.sha256()
    for part in (
        repr((address.run, address.arm, address.round, address.client)),
        digest(state),
        repr((sorted(plan.trainable), rest)),
        repr(list(rates)),
        examples.digest.hex(),
        repr([list(own) for own in units]),
        repr((unit_rows, mechanism)),
    ):
        sha.update(f"{len(part)}:{part}".encode())
    return sha.hexdigest()
