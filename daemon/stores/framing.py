"""How a value lies in a store: a head, what the kind needs to be rebuilt, the bytes; and a checksum over all of it.

    offset  size  field
         0     2  magic "pf"
         2     1  version (1)
         3     1  kind
         4     4  size of the description in bytes: dtype and shape, or the name of an encoding
         8     8  size of the payload in bytes
        16     4  CRC-32 of the key (UTF-8), the 16 bytes before, the description and the payload
        20        description, then payload; little-endian throughout

A frame is never empty, so an empty value is never mistaken for a missing one. The key is part of the checksum: a value
that turns up under another key is as corrupt as one with a flipped bit. CRC-32 finds every error of up to 32 bits in a
row and misses one in 2^32 of the others; it is no protection against somebody who may write to the store.
"""

from __future__ import annotations

import json
import math
import struct
from typing import Any, Final, cast
from zlib import crc32

import msgspec

from pointsman.daemon.errors import PointsmanError
from pointsman.daemon.stores.results import Corrupt, Ok

Buffer = bytes | bytearray | memoryview

_MAGIC: Final = b"pf"
_VERSION: Final = 1

_FIELDS = struct.Struct("<2sBBIQ")
_CHECKSUM = struct.Struct("<I")
HEAD_BYTES = _FIELDS.size + _CHECKSUM.size
TENSOR_ALIGNMENT = 64
"""the payload of a tensor starts at a multiple of this, counted from the frame's first byte"""
MAX_DESCRIPTION_BYTES = 64 * 1024
MAX_JSON_DEPTH = 200
"""the standard library reads back what it wrote up to about five times this"""


class _Kind:
    BYTES = 1
    STR = 2
    NONE = 3
    JSON = 4
    TENSOR = 5
    OPAQUE = 6


class Json(msgspec.Struct, frozen=True):
    """A document that JSON gives back as it was: dicts with str keys, lists, str, int, finite float, bool, None."""

    value: Any


class Tensor(msgspec.Struct, frozen=True):
    """The memory of a C-contiguous array. `dtype` is a name only the caller understands ("bfloat16", "<f4")."""

    dtype: str
    shape: tuple[int, ...]
    data: Buffer


class Opaque(msgspec.Struct, frozen=True):
    """Bytes in somebody else's encoding; what they mean is for whoever knows `encoding`."""

    encoding: str
    data: Buffer


Value = bytes | str | None | Json | Tensor | Opaque
"""what comes back from a store"""
Storable = Value | bytearray | memoryview
"""what may be given to one; a bytearray or memoryview comes back as bytes"""


class UnstorableError(PointsmanError):
    """This value has no exact frame; `code` says why in one word."""

    def __init__(self, code: str, problem: str) -> None:
        self.code = code
        super().__init__(problem)


class Frame(msgspec.Struct, frozen=True):
    """Two pieces, so that a large payload is copied once: into the database, the socket or the shared memory."""

    head: bytes
    payload: Buffer

    @property
    def size_bytes(self) -> int:
        return len(self.head) + len(self.payload)

    def join(self) -> bytes:
        return b"".join((self.head, self.payload))

    def write_into(self, target: memoryview) -> None:
        """`target` is a view of bytes of exactly `size_bytes`."""
        cut = len(self.head)
        target[:cut] = self.head
        target[cut:] = self.payload


def encode(key: str, value: Storable) -> Frame:
    """Raises UnstorableError. A payload that already is a buffer is not copied: leave it alone until it is sent."""
    kind, description, payload = _take_apart(value)
    fields = _FIELDS.pack(_MAGIC, _VERSION, kind, len(description), len(payload))
    checksum = crc32(payload, crc32(fields + description, crc32(key.encode())))
    return Frame(fields + _CHECKSUM.pack(checksum) + description, payload)


def decode(key: str, frame: Buffer) -> Ok[Value] | Corrupt:
    """The very value that was framed under `key`, or Corrupt. A Tensor's data is a view of `frame`."""
    if len(frame) < HEAD_BYTES:
        return Corrupt("short")
    magic, version, kind, description_bytes, payload_bytes = _FIELDS.unpack_from(frame)
    if magic != _MAGIC or version != _VERSION:
        return Corrupt("head")
    start = HEAD_BYTES + description_bytes
    if len(frame) != start + payload_bytes:
        return Corrupt("short" if len(frame) < start + payload_bytes else "long")
    view = memoryview(frame)
    checksum = crc32(view[: _FIELDS.size], crc32(key.encode()))
    checksum = crc32(view[HEAD_BYTES:], checksum)
    if checksum != _CHECKSUM.unpack_from(frame, _FIELDS.size)[0]:
        return Corrupt("checksum")
    if kind == _Kind.BYTES:
        return Ok(bytes(view[start:]))
    return _put_together(kind, bytes(view[HEAD_BYTES:start]), view[start:])


def flat(buffer: Buffer) -> Buffer:
    """The same memory as one row of bytes; a copy only where it is not contiguous."""
    if not isinstance(buffer, memoryview):
        return buffer
    if buffer.ndim == 1 and buffer.itemsize == 1 and buffer.c_contiguous:
        return buffer if buffer.format == "B" else buffer.cast("B")
    if buffer.nbytes == 0:  # memoryview cannot cast a shape with a zero in it
        return b""
    return buffer.cast("B") if buffer.c_contiguous else buffer.tobytes()


def _take_apart(value: Storable) -> tuple[int, bytes, Buffer]:
    match value:
        case bytes() | bytearray() | memoryview():
            return _Kind.BYTES, b"", flat(value)
        case str():
            return _Kind.STR, b"", value.encode("utf-8", "surrogatepass")
        case None:
            return _Kind.NONE, b"", b""
        case Tensor():
            return _Kind.TENSOR, _describe_tensor(value), flat(value.data)
        case Json():
            return _Kind.JSON, b"", _dump(value.value)
        case Opaque():
            return _Kind.OPAQUE, _bounded(value.encoding.encode()), flat(value.data)
        case _:
            raise UnstorableError("type", f"a {type(value).__name__} cannot be stored")


def _put_together(kind: int, description: bytes, payload: memoryview) -> Ok[Value] | Corrupt:
    # The checksum held, so what fails here was written by somebody else.
    try:
        match kind:
            case _Kind.STR:
                return Ok(str(payload, "utf-8", "surrogatepass"))
            case _Kind.NONE:
                return Ok(None)
            case _Kind.JSON:
                return Ok(Json(json.loads(bytes(payload))))
            case _Kind.TENSOR:
                dtype, shape = msgspec.json.decode(description, type=tuple[str, tuple[int, ...]])
                return Ok(Tensor(dtype, shape, payload))
            case _Kind.OPAQUE:
                return Ok(Opaque(description.decode(), bytes(payload)))
    except (ValueError, RecursionError, msgspec.ValidationError):
        return Corrupt("content")
    return Corrupt("kind")


def _describe_tensor(tensor: Tensor) -> bytes:
    elements = math.prod(tensor.shape)
    size = memoryview(tensor.data).nbytes
    if min(tensor.shape, default=0) < 0 or (size % elements if elements else size):
        raise UnstorableError("tensor", f"{size} bytes are no tensor of shape {tensor.shape}")
    text = msgspec.json.encode((tensor.dtype, tensor.shape))
    padding = -(HEAD_BYTES + len(text)) % TENSOR_ALIGNMENT
    return _bounded(text + b" " * padding)


def _bounded(description: bytes) -> bytes:
    if len(description) > MAX_DESCRIPTION_BYTES:
        raise UnstorableError("description", f"a description of {len(description)} bytes is too long")
    return description


def _dump(value: object) -> bytes:
    _check_json(value, MAX_JSON_DEPTH)
    try:
        return json.dumps(value, separators=(",", ":"), allow_nan=False).encode()
    except ValueError as error:  # an integer of more digits than Python would read back
        raise UnstorableError("json", f"not exact in JSON: {error}") from error


def _check_json(value: object, depth: int) -> None:
    """Refuses what JSON would quietly turn into something else: tuples, keys that are no str, NaN, subclasses."""
    kind = type(value)
    if depth == 0:
        raise UnstorableError("json", f"deeper than {MAX_JSON_DEPTH} levels")
    if kind is dict:
        for name, item in cast("dict[object, object]", value).items():
            if type(name) is not str:
                raise UnstorableError("json", f"a key of type {type(name).__name__} would come back as a str")
            _check_json(item, depth - 1)
    elif kind is list:
        for item in cast("list[object]", value):
            _check_json(item, depth - 1)
    elif kind is float:
        if not math.isfinite(cast("float", value)):
            raise UnstorableError("json", f"JSON has no {value}")
    elif value is not None and kind not in (str, int, bool):
        raise UnstorableError("json", f"a {kind.__name__} would come back as something else")
