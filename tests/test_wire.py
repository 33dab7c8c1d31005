"""States survive the wire, and a reply that is not what was asked for never passes the gate."""

import io
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st

from fedtune.adapter import State, digest, nbytes
from fedtune.wire import (
    Address,
    RejectedError,
    bundle,
    gate,
    gate_metrics,
    gate_tokens,
    metrics_record,
    pack,
    samples_of,
    samples_record,
    size,
    unbundle,
    unpack,
)

SENT = Address(run="r:1", arm="", round=3, client="north", last_round=2)
SCHEMA: State = {
    "delta": {"A": torch.zeros(2, 3), "B": torch.zeros(4, 2)},
    "head": {"W": torch.zeros(5)},
}


def good() -> RecordDict:
    state = {g: {n: torch.full_like(t, 0.5) for n, t in a.items()} for g, a in SCHEMA.items()}
    content = RecordDict({"config": SENT.record(), **pack(state)})
    content["metrics"] = metrics_record({"loss": [2.5, 10.0]}, 10)
    return content


@given(
    st.dictionaries(
        st.text(min_size=1, max_size=9), st.lists(st.integers(0, 4), max_size=3), max_size=4
    ),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_what_is_packed_is_unpacked_bitwise(
    shapes: dict[str, list[int]], dtype: torch.dtype
) -> None:
    draws = torch.Generator().manual_seed(0)
    state = {
        "adapter": {n: torch.randn(s, generator=draws, dtype=dtype) for n, s in shapes.items()}
    }
    content = RecordDict(pack(state))
    back = unpack(content)
    assert digest(back) == digest(state)
    assert list(back["adapter"]) == list(shapes)
    assert size(content) >= nbytes(state)


def test_a_good_reply_passes_in_the_schemas_order() -> None:
    content = good()
    content["delta"] = ArrayRecord(dict(reversed(list(content["delta"].items()))))
    state, examples = gate(content, SENT, SCHEMA, 10)
    assert examples == 10
    assert list(state["delta"]) == ["A", "B"]
    assert all((t == 0.5).all() for adapter in state.values() for t in adapter.values())
    assert gate_metrics(content, SENT, {"loss": 2}) == {"loss": [2.5, 10.0]}


def npy(values: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array(stream, values)
    return stream.getvalue()


def with_array(array: Array) -> Callable[[RecordDict], None]:
    def change(content: RecordDict) -> None:
        content["delta"]["A"] = array

    return change


def with_values(values: np.ndarray) -> Callable[[RecordDict], None]:
    return with_array(Array(values))


def lying(
    shape: tuple[int, ...], data: bytes, dtype: str = "float32"
) -> Callable[[RecordDict], None]:
    return with_array(Array(dtype, shape, "numpy.ndarray", data))


def with_address(**changes: object) -> Callable[[RecordDict], None]:
    def change(content: RecordDict) -> None:
        content["config"] = replace(SENT, **changes).record()  # type: ignore[arg-type]

    return change


def with_examples(value: object) -> Callable[[RecordDict], None]:
    def change(content: RecordDict) -> None:
        content["metrics"] = MetricRecord({"num-examples": value})  # type: ignore[dict-item]

    return change


def without(group: str) -> Callable[[RecordDict], None]:
    def change(content: RecordDict) -> None:
        del content[group]

    return change


def renamed(content: RecordDict) -> None:
    content["delta"] = ArrayRecord({"A": content["delta"]["A"], "C": content["delta"]["B"]})


def extra_tensor(content: RecordDict) -> None:
    content["delta"]["C"] = Array(np.zeros(1, np.float32))


def extra_group(content: RecordDict) -> None:
    content["spare"] = ArrayRecord({"x": Array(np.zeros(1, np.float32))})


def no_address(content: RecordDict) -> None:
    content["config"] = ConfigRecord({"round": 3})


def mistyped_address(content: RecordDict) -> None:
    content["config"] = ConfigRecord({**vars(SENT), "round": "3"})


def huge_header() -> bytes:
    stream = io.BytesIO()
    header = {"descr": "<f4", "fortran_order": False, "shape": (10**10, 10**10)}
    np.lib.format.write_array_header_1_0(stream, header)
    return stream.getvalue() + b"\0" * 24


def npz() -> bytes:
    stream = io.BytesIO()
    np.savez_compressed(stream, x=np.zeros(10**6, np.float32))
    return stream.getvalue()


ONES = np.full((2, 3), 0.5, np.float32)
BAD = [
    ("nan", with_values(np.full((2, 3), np.nan, np.float32)), "E_NONFINITE", "'A'"),
    ("infinity", with_values(np.full((2, 3), np.inf, np.float32)), "E_NONFINITE", "'A'"),
    ("shape of one", with_values(np.ones((1,), np.float32)), "E_SCHEMA", "(1,), not (2, 3)"),
    ("transposed", with_values(np.ones((3, 2), np.float32)), "E_SCHEMA", "(3, 2), not (2, 3)"),
    ("another rank", with_values(np.ones((4, 3), np.float32)), "E_SCHEMA", "(4, 3)"),
    ("float64", with_values(np.ones((2, 3))), "E_DTYPE", "float64"),
    ("float16", with_values(np.ones((2, 3), np.float16)), "E_DTYPE", "float16"),
    ("complex", with_values(np.ones((2, 3), np.complex64)), "E_DTYPE", "complex64"),
    ("integers", with_values(np.ones((2, 3), np.int32)), "E_DTYPE", "int32"),
    ("text", with_values(np.full((2, 3), "x")), "E_DTYPE", "U1"),
    ("fortran order", lying((2, 3), npy(np.asfortranarray(ONES))), "E_SCHEMA", "C order"),
    ("declared shape lies", lying((9, 9), npy(ONES)), "E_SCHEMA", "declares another"),
    ("declared dtype lies", lying((2, 3), npy(ONES), "float64"), "E_SCHEMA", "declares another"),
    ("header claims too much", lying((10**10, 10**10), huge_header()), "E_SCHEMA", "not (2, 3)"),
    ("truncated", lying((2, 3), npy(ONES)[:-4]), "E_SCHEMA", "20 bytes"),
    ("trailing bytes", lying((2, 3), npy(ONES) + b"x"), "E_SCHEMA", "25 bytes"),
    ("npz", lying((2, 3), npz()), "E_SCHEMA", "no npy array"),
    ("no bytes", lying((2, 3), b""), "E_SCHEMA", "no npy array"),
    ("pickle", lying((2, 3), b"\x80\x04N."), "E_SCHEMA", "no npy array"),
    (
        "another serialisation",
        with_array(Array("float32", (2, 3), "pickle", npy(ONES))),
        "E_SCHEMA",
        "serialised as 'pickle'",
    ),
    ("renamed", renamed, "E_SCHEMA", "B, C"),
    ("extra tensor", extra_tensor, "E_SCHEMA", "C"),
    ("extra group", extra_group, "E_SCHEMA", "spare"),
    ("missing group", without("head"), "E_SCHEMA", "head"),
    ("no address", no_address, "E_SCHEMA", "no address"),
    ("mistyped address", mistyped_address, "E_SCHEMA", "'round' is no int"),
    ("another round", with_address(round=2), "E_REPLAY", "(round)"),
    ("another run", with_address(run="r:2"), "E_REPLAY", "(run)"),
    ("another client", with_address(client="south"), "E_REPLAY", "(client)"),
    ("another arm", with_address(arm="local_only"), "E_REPLAY", "(arm)"),
    ("no examples", with_examples(0), "E_WEIGHT", "0"),
    ("negative examples", with_examples(-4), "E_WEIGHT", "-4"),
    ("more than declared", with_examples(11), "E_WEIGHT", "between 1 and 10"),
    ("fractional examples", with_examples(2.5), "E_WEIGHT", "2.5"),
    ("nan examples", with_examples(float("nan")), "E_WEIGHT", "nan"),
    ("a list of examples", with_examples([1, 2]), "E_WEIGHT", "[1, 2]"),
    ("no metrics", without("metrics"), "E_WEIGHT", "0"),
]


@pytest.mark.parametrize(("change", "code", "text"), [b[1:] for b in BAD], ids=[b[0] for b in BAD])
def test_a_bad_reply_is_refused_with_its_reason(
    change: Callable[[RecordDict], None], code: str, text: str
) -> None:
    content = good()
    change(content)
    with pytest.raises(RejectedError) as error:
        gate(content, SENT, SCHEMA, 10)
    assert error.value.code == code
    assert text in error.value.reason


@given(st.binary(max_size=300))
def test_any_bytes_are_refused_and_nothing_else_is_raised(data: bytes) -> None:
    content = good()
    content["delta"]["A"] = Array("float32", (2, 3), "numpy.ndarray", data)
    with pytest.raises(RejectedError):
        gate(content, SENT, SCHEMA, 10)


@given(st.integers(0, 200), st.integers(0, 255))
def test_a_flipped_byte_is_refused_or_only_changes_a_value(position: int, value: int) -> None:
    data = bytearray(npy(ONES))
    data[position % len(data)] = value
    content = good()
    content["delta"]["A"] = Array("float32", (2, 3), "numpy.ndarray", bytes(data))
    try:
        state, _ = gate(content, SENT, SCHEMA, 10)
    except RejectedError:
        return
    assert state["delta"]["A"].shape == (2, 3)
    assert torch.isfinite(state["delta"]["A"]).all()


@pytest.mark.parametrize(
    ("metrics", "code"),
    [
        ({"loss": [float("nan"), 1.0]}, "E_NONFINITE"),
        ({"loss": [float("inf"), 1.0]}, "E_NONFINITE"),
        ({"loss": [-1.0, 1.0]}, "E_NONFINITE"),
        ({"loss": 3.0}, "E_SCHEMA"),
        ({"loss": [1.0, 2.0, 3.0]}, "E_SCHEMA"),
        ({}, "E_SCHEMA"),
        ({"loss": [1.0, 2.0], "praise": [1.0, 1.0]}, "E_SCHEMA"),
    ],
)
def test_metrics_must_be_what_the_task_adds_up(metrics: dict[str, object], code: str) -> None:
    """Anything else would break the sums over clients, and with them the report."""
    content = good()
    content["metrics"] = MetricRecord({"num-examples": 1, **metrics})  # type: ignore[dict-item]
    with pytest.raises(RejectedError, match=code):
        gate_metrics(content, SENT, {"loss": 2})


def test_samples_are_read_back_and_others_left_out() -> None:
    samples = [("Q", "A", "R"), ("问", "答", "案")]
    content = RecordDict({"samples": samples_record(samples)})
    assert samples_of(content) == samples
    assert samples_of(RecordDict()) == []
    for text in ("{", "3", '[["a", "b"], 7]', "null"):
        assert samples_of(RecordDict({"samples": ConfigRecord({"samples": text})})) == []
    assert samples_of(RecordDict({"samples": ConfigRecord({})})) == []


@given(st.lists(st.lists(st.integers(0, 3), max_size=3, unique=True), max_size=5))
def test_a_bundle_holds_each_record_once_and_gives_back_every_turn(turns: list[list[int]]) -> None:
    """Turns are drawn from four records that they may share; groups are called by numbers."""
    records = [pack({"g": {"A": torch.full((4,), float(i))}})["g"] for i in range(4)]
    contents = [RecordDict({f"group-{i}": records[i] for i in turn}) for turn in turns]
    bundled = bundle(contents)
    used = {i for turn in turns for i in turn}
    assert size(bundled) == sum(size(RecordDict({"g": records[i]})) for i in used)
    back = unbundle(bundled)
    assert [list(content) for content in back] == [list(content) for content in contents]
    for content, turn in zip(back, turns, strict=True):
        assert all(content[f"group-{i}"] is records[i] for i in turn)


@pytest.mark.parametrize(
    "tokens",
    [
        [5.0, 4.0],
        [-1.0, 4.0],
        [float("nan"), 4.0],
        [1.0, float("inf")],
        [1.0],
        [1.0, 2.0, 3.0],
        7,
    ],
)
def test_tokens_must_be_real_ones_among_computed_ones(tokens: object) -> None:
    content = good()
    content["metrics"]["num-tokens"] = tokens
    with pytest.raises(RejectedError, match=r"E_SCHEMA.*num-tokens"):
        gate_tokens(content)


def test_tokens_are_optional_and_no_metric() -> None:
    content = good()
    assert gate_tokens(content) == [0.0, 0.0]
    content["metrics"] = metrics_record({"loss": [2.5, 10.0]}, 10, [3.0, 4.0])
    assert gate_tokens(content) == [3.0, 4.0]
    assert gate_metrics(content, SENT, {"loss": 2}) == {"loss": [2.5, 10.0]}
