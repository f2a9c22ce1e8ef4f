"""The file in which learned routing state outlives the daemon: its format, how it is written and read. Blocking.

    magic (8 bytes)   version (4)   0 (4)   records of the prefix index   description   its size (8)   digest (16)

Integers are little-endian; the records are 64-bit words of the machine (shm/prefix_dump.pyx), the description is JSON
(`Description`), the digest is BLAKE2b of all before it. The description stands behind the records because it is the
last that is known: they are written while they are dumped. Hashes and figures only: nothing here can be read as text
of a prompt.

A file is believed as a whole or not at all: `read` says by `Unusable` why not.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import msgspec

from pointsman.daemon.errors import PointsmanError
from pointsman.daemon.resilience.breaker import SavedBreaker
from pointsman.daemon.shm import prefix_layout
from pointsman.daemon.workers.atomic_file import Replacement
from pointsman.daemon.workers.marks import Marks

FILE_NAME = "routing.state"
VERSION = 1
MAGIC = b"PTSSTATE"
CLOCK_SLACK_S = 60.0
"""A file may be so much younger than now: clocks are set."""

_HEAD = struct.Struct("<8sII")
_TAIL = struct.Struct("<Q16s")
_DIGEST_BYTES = 16
_MACHINE_ID = Path("/etc/machine-id")


class Unusable(PointsmanError):
    """There is a file, but what it says is not to be believed here; the message says why."""


class SavedWorker(msgspec.Struct, frozen=True):
    slot: int
    """in the records"""
    url: str
    marks: Marks
    is_certain: bool
    """Somebody watched: the engine is the one that holds what the records say."""
    pace: tuple[float, int]
    """seconds per output token, and of how many answers (Bookings.pace)"""
    breaker: SavedBreaker | None = None
    """None: closed"""


class Description(msgspec.Struct, frozen=True):
    created_at: float
    """Unix seconds"""
    machine: str
    index_version: int
    """of the hashes"""
    seed: int
    block_bytes: int
    slots: int
    """in the records; the last one is the ghost"""
    workers: tuple[SavedWorker, ...]
    costs: dict[str, float]
    """of the fleet (Bookings.costs)"""


@dataclass(frozen=True, slots=True)
class SavedState:
    description: Description
    records: memoryview


class Writer:
    """Raises OSError."""

    def __init__(self, path: Path) -> None:
        self._file = Replacement(path)
        self._digest = blake2b(digest_size=_DIGEST_BYTES)
        self._write(_HEAD.pack(MAGIC, VERSION, 0))

    def add(self, records: bytes) -> None:
        self._write(records)

    def finish(self, description: Description) -> int:
        """The file is in its place when this returns. Returns its bytes."""
        text = msgspec.json.encode(description)
        self._write(text + len(text).to_bytes(8, "little"))
        self._file.write(self._digest.digest())
        self._file.commit()
        return self._file.size_bytes

    def discard(self) -> None:
        self._file.discard()

    def _write(self, data: bytes) -> None:
        self._digest.update(data)
        self._file.write(data)


def read(path: Path, *, block_bytes: int, max_age_s: float, now: float) -> SavedState | None:
    """None: there is no such file. Raises Unusable. `now` in Unix seconds."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise Unusable(f"it cannot be read: {error.strerror}") from None
    saved = _parse(memoryview(data))
    _check(saved.description, block_bytes, max_age_s, now)
    return saved


def read_seed(path: Path) -> int | None:
    """The hash seed that a new prefix index needs to make use of the file; None when nothing else is of use either.

    Reads only the end of the file: whether it is sound as a whole is for `read` to say.
    """
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(size - _TAIL.size, 0))
            length = _TAIL.unpack(file.read(_TAIL.size))[0]
            file.seek(size - _TAIL.size - length)
            return _decode(file.read(length)).seed
    except (OSError, ValueError, OverflowError, struct.error, Unusable):
        return None


def machine() -> str:
    """This machine, without telling its id: of another one the file says nothing, though the URLs may be the same."""
    try:
        identity = _MACHINE_ID.read_bytes().strip()
    except OSError:
        identity = b""
    return blake2b(identity + os.uname().machine.encode(), digest_size=16, key=MAGIC).hexdigest()


def _parse(data: memoryview) -> SavedState:
    if len(data) < _HEAD.size or data[: len(MAGIC)] != MAGIC:
        raise Unusable("it is no file of this kind")
    version = _HEAD.unpack_from(data)[1]
    if version != VERSION:
        raise Unusable(f"it is of version {version}, not {VERSION}")
    if len(data) < _HEAD.size + _TAIL.size:
        raise Unusable("it is cut off")
    length, digest = _TAIL.unpack_from(data, len(data) - _TAIL.size)
    if blake2b(data[:-_DIGEST_BYTES], digest_size=_DIGEST_BYTES).digest() != digest:
        raise Unusable("it is cut off or damaged: its checksum is wrong")
    end = len(data) - _TAIL.size
    if length > end - _HEAD.size:
        raise Unusable("its description is longer than the file")
    return SavedState(_decode(data[end - length : end]), data[_HEAD.size : end - length])


def _decode(text: bytes | memoryview) -> Description:
    try:
        return msgspec.json.decode(text, type=Description)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise Unusable(f"its description cannot be understood: {error}") from None


def _check(found: Description, block_bytes: int, max_age_s: float, now: float) -> None:
    age_s = now - found.created_at
    if found.machine != machine():
        raise Unusable("it is another machine's")
    if found.index_version != prefix_layout.VERSION:
        raise Unusable(f"its hashes are of version {found.index_version}, not {prefix_layout.VERSION}")
    if found.block_bytes != block_bytes:
        raise Unusable(f"it has blocks of {found.block_bytes} bytes; prefix_block_bytes is {block_bytes}")
    if age_s > max_age_s:
        raise Unusable(f"it is {age_s:.0f} s old; state_max_age_s is {max_age_s:g}")
    if age_s < -CLOCK_SLACK_S:
        raise Unusable(f"it is dated {-age_s:.0f} s in the future")
