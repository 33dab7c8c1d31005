"""States as Flower records, and the gate that every reply passes.

A group of a state is one ArrayRecord, its tensors npy bytes under their names. Nothing that comes
from the network is decoded before its names, dtypes, shapes and sizes equal what was expected:
Flower checks neither an array's declared shape nor its length, and a header may claim any size. A
reply that does not pass is set aside with its reason and never broadcast into shape.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_type_hints

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from torch import Tensor

from fedtune.adapter import Adapter, State

DTYPES: dict[torch.dtype, np.dtype[Any]] = {
    torch.float32: np.dtype("<f4"),
    torch.float64: np.dtype("<f8"),
}
HEADER = re.compile(
    rb"\{'descr': '(?P<descr>[<|][a-zA-Z][0-9]{1,3})', 'fortran_order': False, "
    rb"'shape': \((?P<shape>(?:[0-9]{1,12}(?:, |,|))*)\), \} *\n"
)
MAXIMUM_EXAMPLES = 10**9
CONFIG, METRICS, SAMPLES = "config", "metrics", "samples"
EXAMPLES, TOKENS = "num-examples", "num-tokens"  # in the metrics, beside what a task adds up
BUNDLE, FAULT = "bundle", "fault"
LETTER, WORDS = "letter", "words"  # of secure aggregation


class RejectedError(Exception):
    """A reply that must not touch the model."""

    def __init__(self, code: str, reason: str) -> None:
        super().__init__(f"{code}: {reason}")
        self.code = code
        self.reason = reason


@dataclass(frozen=True)
class Address:
    """Which turn a message belongs to; a reply repeats it, so that an old one is recognised.

    Attributes:
        run: name and digest of the run.
        arm: "" for the recipe's own strategy, else the reference's.
        round: from 1; for an evaluation the round whose model is evaluated, from 0.
        client: the client's name.
        last_round: the client's last accepted round before this turn, 0 for none.
        scope: of an evaluation: "own" or "pooled" test rows.
        rank: of the client's adapter.
    """

    run: str
    arm: str
    round: int
    client: str
    last_round: int = 0
    scope: str = "own"
    rank: int = 0

    def record(self) -> ConfigRecord:
        """The address as a Flower record."""
        return ConfigRecord(dict(vars(self)))

    @classmethod
    def of(cls, content: RecordDict) -> "Address":
        """The address in a message's content.

        Raises:
            RejectedError: it has none, or one of other fields or types.
        """
        record = content.get(CONFIG)
        wanted = get_type_hints(cls)
        if not isinstance(record, ConfigRecord) or set(record) != set(wanted):
            raise RejectedError("E_SCHEMA", "the message has no address record")
        for key, kind in wanted.items():
            if type(record[key]) is not kind:
                raise RejectedError("E_SCHEMA", f"address field '{key}' is no {kind.__name__}")
        return cls(**record)  # type: ignore[arg-type]


def pack(state: State) -> dict[str, ArrayRecord]:
    """One ArrayRecord a group."""
    return {
        group: ArrayRecord({name: Array(_numpy(tensor)) for name, tensor in adapter.items()})
        for group, adapter in state.items()
    }


def _numpy(tensor: Tensor) -> np.ndarray:
    values: np.ndarray = tensor.detach().contiguous().numpy()
    return values.astype(DTYPES[tensor.dtype], copy=False)


def unpack(content: RecordDict) -> State:
    """The state in a message that this process trusts: a broadcast, at a client.

    Raises:
        RejectedError: an array whose bytes are no npy array of a float dtype.
    """
    return {
        group: {name: torch.from_numpy(_decode(name, array)) for name, array in record.items()}
        for group, record in content.items()
        if isinstance(record, ArrayRecord)
    }


def bundle(contents: Sequence[RecordDict]) -> RecordDict:
    """Several turns in one content; a record object that several of them share is in it once."""
    numbers: dict[int, str] = {}
    table: list[dict[str, str]] = []
    bundled = RecordDict()
    for content in contents:
        row = {}
        for name, record in content.items():
            if id(record) not in numbers:
                numbers[id(record)] = str(len(numbers))
                bundled[numbers[id(record)]] = record
            row[name] = numbers[id(record)]
        table.append(row)
    bundled[BUNDLE] = ConfigRecord({BUNDLE: json.dumps(table)})
    return bundled


def unbundle(content: RecordDict) -> list[RecordDict]:
    """The turns of a bundle, in order; records that were shared are shared again.

    Raises:
        RejectedError: it is no bundle.
    """
    record = content.get(BUNDLE)
    try:
        table: Any = json.loads(str(record[BUNDLE]) if isinstance(record, ConfigRecord) else "0")
        return [RecordDict({k: content[number] for k, number in row.items()}) for row in table]
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise RejectedError("E_SCHEMA", "the message is no bundle of turns") from error


def fault(reason: str) -> RecordDict:
    """In the place of a turn's reply in a bundle: why there is none."""
    return RecordDict({FAULT: ConfigRecord({FAULT: reason})})


def fault_of(content: RecordDict) -> str | None:
    """Why a turn of a bundle has no reply, or None where it has one."""
    record = content.get(FAULT)
    if not isinstance(record, ConfigRecord):
        return None
    return str(record.get(FAULT) or "no reason given")


def size(content: RecordDict) -> int:
    """Bytes of a message's letter and of all its arrays, serialised, npy headers included."""
    arrays = (
        array
        for record in content.values()
        if isinstance(record, ArrayRecord)
        for array in record.values()
    )
    letter = content.get(LETTER)
    texts = letter.values() if isinstance(letter, ConfigRecord) else ()
    return sum(len(array.data) for array in arrays) + sum(len(t) for t in texts if type(t) is bytes)


def letter_record(body: bytes, signature: bytes = b"") -> ConfigRecord:
    """A letter of secure aggregation as a Flower record."""
    return ConfigRecord({"body": body, "signature": signature})


def letter_of(content: RecordDict) -> tuple[bytes, bytes]:
    """(body, signature) of a message's letter.

    Raises:
        RejectedError: it has none.
    """
    record = content.get(LETTER)
    if isinstance(record, ConfigRecord) and set(record) == {"body", "signature"}:
        body, signature = record["body"], record["signature"]
        if isinstance(body, bytes) and isinstance(signature, bytes):
            return body, signature
    raise RejectedError("E_SCHEMA", "the message has no letter")


def words_record(words: np.ndarray) -> ArrayRecord:
    """Masked words as a Flower record."""
    return ArrayRecord({WORDS: Array(words.astype("<u4", copy=False))})


def gate_words(content: RecordDict, sent: Address, count: int) -> np.ndarray:
    """The masked words of a reply, if it is what was asked for and holds nothing else.

    Args:
        content: of the reply.
        sent: the address that the message carried.
        count: of words.

    Raises:
        RejectedError: E_REPLAY, E_SCHEMA or E_DTYPE.
    """
    same_turn(content, sent)
    record = content.get(WORDS)
    if set(content) != {CONFIG, LETTER, WORDS} or not isinstance(record, ArrayRecord):
        raise RejectedError("E_SCHEMA", "the reply holds other records than masked words")
    if set(record) != {WORDS} or record[WORDS].stype != "numpy.ndarray":
        raise RejectedError("E_SCHEMA", "the masked words are not one array")
    dtype, shape, begin = _header(WORDS, record[WORDS].data)
    if dtype != np.dtype("<u4") or record[WORDS].dtype != str(dtype):
        raise RejectedError("E_DTYPE", f"the masked words are {dtype}, not uint32")
    body = memoryview(record[WORDS].data)[begin:]
    if shape != (count,) or tuple(record[WORDS].shape) != shape or len(body) != 4 * count:
        raise RejectedError("E_SCHEMA", f"the masked words are {shape}, not ({count},)")
    return np.frombuffer(body, dtype)


def _header(name: str, data: bytes) -> tuple[np.dtype, tuple[int, ...], int]:
    """(dtype, shape, where the values begin) of npy bytes, format 1.0 in C order.

    NumPy's own reader evaluates a header as Python, which fails in many ways on a forged one.
    """
    length = int.from_bytes(data[8:10], "little")
    found = HEADER.fullmatch(data[10 : 10 + length])
    if data[:8] != b"\x93NUMPY\x01\x00" or found is None:
        raise RejectedError("E_SCHEMA", f"'{name}' is no npy array in C order")
    shape = tuple(int(part) for part in found["shape"].decode().split(",") if part.strip())
    return np.dtype(found["descr"].decode()), shape, 10 + length


def _decode(name: str, array: Array, expected: Tensor | None = None) -> np.ndarray:
    """The array's values, after its header and its length were compared with what is expected."""
    if array.stype != "numpy.ndarray":
        raise RejectedError("E_SCHEMA", f"'{name}' is serialised as '{array.stype}'")
    dtype, shape, begin = _header(name, array.data)
    if dtype not in DTYPES.values() or (expected is not None and dtype != DTYPES[expected.dtype]):
        wanted = "a float dtype" if expected is None else str(expected.dtype)
        raise RejectedError("E_DTYPE", f"'{name}' is {dtype}, not {wanted}")
    if tuple(array.shape) != shape or array.dtype != str(dtype):
        raise RejectedError("E_SCHEMA", f"'{name}' declares another array than its bytes hold")
    if expected is not None and shape != tuple(expected.shape):
        raise RejectedError("E_SCHEMA", f"'{name}' has shape {shape}, not {tuple(expected.shape)}")
    body = memoryview(array.data)[begin:]
    # Python integers do not overflow, whatever the header claims.
    count = 1
    for length in shape:
        count *= length
    if len(body) != count * dtype.itemsize:
        raise RejectedError("E_SCHEMA", f"'{name}' holds {len(body)} bytes, not what it declares")
    return np.frombuffer(body, dtype=dtype).reshape(shape).copy()


def gate(content: RecordDict, sent: Address, schema: State, examples: int) -> tuple[State, int]:
    """The state and number of examples of a reply to a train message, if it is what was asked for.

    Args:
        content: of the reply.
        sent: the address that the message carried.
        schema: tensors with the expected groups, names, shapes and dtypes (values do not matter).
        examples: the training rows that the client said it has, an upper bound of its weight.

    Returns:
        The state, its tensors in the schema's order, and the number of examples.

    Raises:
        RejectedError: with a code and a reason: E_REPLAY (another turn), E_SCHEMA (names, shapes,
            sizes), E_DTYPE, E_NONFINITE, E_WEIGHT.
    """
    same_turn(content, sent)
    groups = {key: record for key, record in content.items() if isinstance(record, ArrayRecord)}
    if odd := groups.keys() ^ schema.keys():
        raise RejectedError("E_SCHEMA", f"the groups {sorted(odd)} are missing or unknown")
    state: State = {}
    for group, expected in schema.items():
        record = groups[group]
        if odd := record.keys() ^ expected.keys():
            shown = ", ".join(sorted(odd)[:3])
            raise RejectedError("E_SCHEMA", f"{len(odd)} tensors missing or unknown: {shown}")
        decoded: Adapter = {}
        for name, tensor in expected.items():
            values = _decode(name, record[name], tensor)
            if not np.isfinite(values).all():
                raise RejectedError("E_NONFINITE", f"'{name}' holds NaN or infinity")
            decoded[name] = torch.from_numpy(values)
        state[group] = decoded
    count = content[METRICS].get(EXAMPLES) if isinstance(content.get(METRICS), MetricRecord) else 0
    if type(count) is not int or not 1 <= count <= min(examples, MAXIMUM_EXAMPLES):
        raise RejectedError("E_WEIGHT", f"num-examples is {count!r}, not between 1 and {examples}")
    return state, count


def same_turn(content: RecordDict, sent: Address) -> None:
    """Nothing, if the content carries the address that was sent.

    Raises:
        RejectedError: E_REPLAY or E_SCHEMA.
    """
    came = Address.of(content)
    if came != sent:
        odd = [key for key in vars(sent) if getattr(came, key) != getattr(sent, key)]
        raise RejectedError("E_REPLAY", f"the reply belongs to another turn ({', '.join(odd)})")


def metrics_record(
    sums: Mapping[str, Sequence[float]], examples: int = 0, tokens: Sequence[float] = ()
) -> MetricRecord:
    """Metrics, which are lists of numbers that add up, as a Flower record.

    Args:
        sums: of the task.
        examples: training rows, the weight of a reply to a train message.
        tokens: [real, computed] tokens of its training, () where they are not known.
    """
    record = MetricRecord({EXAMPLES: examples})
    for name, values in {**sums, **({TOKENS: tokens} if tokens else {})}.items():
        record[name] = [float(value) for value in values]
    return record


def gate_metrics(
    content: RecordDict, sent: Address, expected: Mapping[str, int]
) -> dict[str, list[float]]:
    """The metrics of a reply, if they are what the task adds up.

    Args:
        content: of the reply.
        sent: the address that the message carried.
        expected: each metric's name and of how many numbers it consists.

    Raises:
        RejectedError: E_REPLAY, E_SCHEMA or E_NONFINITE.
    """
    same_turn(content, sent)
    record = content.get(METRICS)
    if not isinstance(record, MetricRecord):
        raise RejectedError("E_SCHEMA", "the reply has no metrics")
    sums: dict[str, list[float]] = {}
    if odd := (record.keys() - {EXAMPLES, TOKENS}) ^ expected.keys():
        raise RejectedError("E_SCHEMA", f"metrics missing or unknown: {', '.join(sorted(odd)[:3])}")
    for name, length in expected.items():
        values = record[name]
        if not isinstance(values, list) or len(values) != length:
            raise RejectedError("E_SCHEMA", f"metric '{name}' is no list of {length} numbers")
        if not all(math.isfinite(value) and value >= 0 for value in values):
            raise RejectedError("E_NONFINITE", f"metric '{name}' is not finite or below 0")
        sums[name] = [float(value) for value in values]
    return sums


def gate_tokens(content: RecordDict) -> list[float]:
    """[real, computed] tokens of a reply to a train message, [0, 0] where it does not tell them.

    Raises:
        RejectedError: E_SCHEMA.
    """
    record = content.get(METRICS)
    tokens = record.get(TOKENS, [0.0, 0.0]) if isinstance(record, MetricRecord) else None
    if (
        not isinstance(tokens, list)
        or len(tokens) != 2
        or not all(math.isfinite(count) for count in tokens)
        or not 0 <= tokens[0] <= tokens[1]
    ):
        raise RejectedError("E_SCHEMA", "num-tokens is no pair of finite numbers, real <= computed")
    return [float(count) for count in tokens]


def samples_record(samples: Sequence[tuple[str, str, str]]) -> ConfigRecord:
    """(prompt, answer, reference) of generated samples as a Flower record."""
    return ConfigRecord({SAMPLES: json.dumps(samples, ensure_ascii=False)})


def samples_of(content: RecordDict) -> list[tuple[str, str, str]]:
    """The generated samples in a reply; what is not of their form is left out."""
    record = content.get(SAMPLES)
    try:
        found = json.loads(str(record[SAMPLES])) if isinstance(record, ConfigRecord) else []
    except (KeyError, ValueError):
        return []
    return [
        (str(item[0]), str(item[1]), str(item[2]))
        for item in (found if isinstance(found, list) else [])
        if isinstance(item, list) and len(item) == 3
    ]
