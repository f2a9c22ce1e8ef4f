"""Whatever goes in comes out as it was, and nothing else ever comes out."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pointsman.daemon.stores.framing import (
    HEAD_BYTES,
    MAX_JSON_DEPTH,
    TENSOR_ALIGNMENT,
    Json,
    Opaque,
    Tensor,
    UnstorableError,
    Value,
    decode,
    encode,
)
from pointsman.daemon.stores.results import Corrupt, Ok

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda children: st.lists(children, max_size=4) | st.dictionaries(st.text(), children, max_size=4),
    max_leaves=10,
)


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    shape = tuple(draw(st.lists(st.integers(0, 3), max_size=3)))
    item = draw(st.sampled_from([1, 2, 8]))
    size = math.prod(shape) * item
    return Tensor(
        draw(st.sampled_from(["bfloat16", "<f4", "bool", "é"])), shape, draw(st.binary(min_size=size, max_size=size))
    )


text = st.text(st.characters(exclude_categories=()))  # with lone surrogates
values: st.SearchStrategy[Value] = (
    st.binary() | text | st.none() | json_values.map(Json) | tensors() | st.builds(Opaque, st.text(), st.binary())
)


def same(one: Value, other: Value) -> bool:
    """Equal and of the same type all the way down: 1 is not True, 0.0 is not -0.0."""
    return type(one) is type(other) and one == other and repr(plain(one)) == repr(plain(other))


def plain(value: Value) -> object:
    if isinstance(value, Tensor):
        return value.dtype, value.shape, bytes(value.data)
    return (value.encoding, bytes(value.data)) if isinstance(value, Opaque) else value


@given(values)
@example(b"")
@example("")
@example(None)
@example(Tensor("<f4", (0, 3), b""))
@example(Tensor("<f4", (), b"\0\0\0\0"))
@example(Json(None))
@example(Json(-0.0))
def test_round_trip(value: Value) -> None:
    frame = encode("key", value)
    found = decode("key", frame.join())
    assert isinstance(found, Ok) and same(found.value, value)
    target = bytearray(frame.size_bytes)
    frame.write_into(memoryview(target))
    assert target == frame.join()


@given(values, st.data())
def test_no_changed_byte_goes_unnoticed(value: Value, data: st.DataObject) -> None:
    frame = bytearray(encode("key", value).join())
    place = data.draw(st.integers(0, len(frame) - 1))
    frame[place] ^= data.draw(st.integers(1, 255))
    assert isinstance(decode("key", frame), Corrupt)


@pytest.mark.parametrize(
    "value", [b"payload", "", None, Json({"a": 1}), Tensor("<f4", (1,), b"abcd"), Opaque("p", b"x")]
)
def test_every_bit_and_every_cut(value: Value) -> None:
    frame = encode("key", value).join()
    for place in range(len(frame)):
        for bit in range(8):
            flipped = bytearray(frame)
            flipped[place] ^= 1 << bit
            assert isinstance(decode("key", flipped), Corrupt), (place, bit)
        assert isinstance(decode("key", frame[:place]), Corrupt), place
        assert isinstance(decode("key", frame[place + 1 :]), Corrupt), place
    assert isinstance(decode("key", frame + b"\0"), Corrupt)
    assert isinstance(decode("key", bytes(len(frame))), Corrupt)


@given(st.binary(max_size=200))
def test_no_rubbish_is_a_value(rubbish: bytes) -> None:
    assert isinstance(decode("key", rubbish), Corrupt)


def test_a_value_under_another_key_is_corrupt() -> None:
    assert decode("other", encode("key", b"x").join()) == Corrupt("checksum")


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_buffers_come_back_as_bytes_and_are_not_copied_on_the_way_in(kind: Any) -> None:
    value = kind(b"abc")
    frame = encode("key", value)
    assert frame.payload is value
    assert decode("key", frame.join()) == Ok(b"abc")


def test_memory_of_any_layout() -> None:
    view = memoryview(bytearray(range(24)))
    assert decode("k", encode("k", view[::2]).join()) == Ok(bytes(range(0, 24, 2)))
    assert decode("k", encode("k", view.cast("H", (3, 4))).join()) == Ok(bytes(range(24)))
    assert decode("k", encode("k", view[:0].cast("H")).join()) == Ok(b"")


def test_a_tensor_is_a_view_of_what_was_read_and_starts_aligned() -> None:
    frame = bytearray(encode("key", Tensor("bfloat16", (2, 2), bytes(8))).join())
    found = decode("key", frame)
    assert isinstance(found, Ok) and isinstance(found.value, Tensor)
    assert isinstance(found.value.data, memoryview) and found.value.data.obj is frame
    assert (len(frame) - 8) % TENSOR_ALIGNMENT == 0
    assert len(frame) - 8 > HEAD_BYTES


def nested(depth: int) -> Any:
    value: Any = None
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("value", "code"),
    [
        (Json((1, 2)), "json"),
        (Json({1: 2}), "json"),
        (Json(math.nan), "json"),
        (Json([math.inf]), "json"),
        (Json(b"x"), "json"),
        (Json(nested(MAX_JSON_DEPTH)), "json"),
        (Json(10**5000), "json"),
        (Tensor("<f4", (3,), b"abcd"), "tensor"),
        (Tensor("<f4", (0,), b"abcd"), "tensor"),
        (Tensor("<f4", (-1, -4), b"abcd"), "tensor"),
        (Opaque("x" * 70_000, b""), "description"),
        (12, "type"),
        ([], "type"),
    ],
)
def test_what_has_no_exact_frame_is_refused(value: Any, code: str) -> None:
    with pytest.raises(UnstorableError) as caught:
        encode("key", value)
    assert caught.value.code == code


def test_the_deepest_json_comes_back() -> None:
    value = Json(nested(MAX_JSON_DEPTH - 1))
    assert decode("key", encode("key", value).join()) == Ok(value)
