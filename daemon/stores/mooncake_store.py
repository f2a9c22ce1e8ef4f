"""Values in the memory of a Mooncake cluster (extra `mooncake`): a hot tier, whose master's restart loses everything.

The client lives in a child process (`mooncake_process`). Only calls that answer per key are used; reads ask for the
size first and count what arrived. Objects are pinned, so a full cluster says so instead of dropping older objects. With
`replicas` above 1 the copies are counted after every write, because the cluster takes that number as a wish.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import TypeVar

import msgspec

from pointsman.daemon.stores.codes import CodeTable
from pointsman.daemon.stores.framing import Buffer, Frame
from pointsman.daemon.stores.mooncake_process import ChildError, Lane, MooncakeProcess
from pointsman.daemon.stores.mooncake_wire import Request, Setup
from pointsman.daemon.stores.results import OK_NONE, Failure, Ok, Stat, Transient, Written

R = TypeVar("R")

CODES = CodeTable(
    invalid=frozenset({-400, -600, -601, -1011, -1012, -1700, -1701, -1702, "closed"}),
    no_space=frozenset({-200}),
    corrupt=frozenset({-801}),
    missing=frozenset({-704}),
    is_no_space_retried=True,
    is_corrupt_retried=True,
)
"""-200 is full, or for a second after a restart of the master, nobody there yet. -801 may be one copy of several."""

READ_BYTES = 32 * 1024 * 1024
"""values of one batch are read in turns of so many bytes"""
_ALIGNMENT = 64


class MooncakeOptions(msgspec.Struct, frozen=True):
    master: str
    """host:port"""
    metadata: str = "P2PHANDSHAKE"
    hostname: str = "127.0.0.1"
    """what other members reach this client by, without a port"""
    protocol: str = "tcp"
    devices: str = ""
    segment_bytes: int = 0
    """memory that this client gives to the cluster; what lies there is lost with the client"""
    buffer_bytes: int = 16 * 1024 * 1024
    hard_pin: bool = True
    replicas: int = 1
    min_replicas: int = 0
    """fewer copies after a write are Transient("under_replicated"); 0 = as many as `replicas`"""
    lanes: int = 2
    """calls side by side; on two cores more of them were slower for large values and no faster for small ones"""
    watchdog_s: float = 15.0
    """a call without an answer for so long ends the child; longer than any honest stall under its timeouts"""

    @property
    def least_replicas(self) -> int:
        return self.min_replicas or self.replicas


class MooncakeBackend:
    """Has no expiry: `ttl_s` is ignored, whoever writes must delete. Raises BackendMissingError."""

    name = "mooncake"
    codes = CODES
    max_value_bytes = 1 << 40
    is_volatile = True

    def __init__(self, options: MooncakeOptions, *, environment: Mapping[str, str] | None = None) -> None:
        self.options = options
        self.threads = options.lanes
        self.process = MooncakeProcess(
            _setup(options), lanes=options.lanes, watchdog_s=options.watchdog_s, environment=environment
        )

    def put_batch(
        self, keys: Sequence[str], frames: Sequence[Frame], ttl_s: float | None, timeout_s: float
    ) -> list[Ok[Written] | Failure]:
        sizes = [frame.size_bytes for frame in frames]
        with_replicas = self.options.replicas > 1

        def put(lane: Lane, left_s: Callable[[], float]) -> list[Ok[Written] | Failure]:
            offsets, total = _lay_out(sizes)
            with lane.reserve(total) as arena:
                for frame, offset in zip(frames, offsets, strict=True):
                    with arena[offset : offset + frame.size_bytes] as target:
                        frame.write_into(target)
            request = Request(
                "upsert", list(keys), offsets, sizes, arena_bytes=lane.arena_bytes, with_replicas=with_replicas
            )
            reply = lane.call(request, self.process.time_for(left_s()))
            replicas = reply.replicas if with_replicas else [1] * len(keys)
            return [self._written(code, count) for code, count in zip(reply.numbers, replicas, strict=True)]

        return self._attempt(keys, timeout_s, put)

    def get_batch(self, keys: Sequence[str], timeout_s: float) -> list[Ok[Buffer] | Failure]:
        def get(lane: Lane, left_s: Callable[[], float]) -> list[Ok[Buffer] | Failure]:
            looked = lane.call(Request("look", list(keys)), self.process.time_for(left_s()))
            results: list[Ok[Buffer] | Failure] = [CODES.judge(number) for number in looked.numbers]
            present = [place for place, number in enumerate(looked.numbers) if number > 0]
            for place in present:
                results[place] = Transient("deadline")
            for turn in _turns(present, looked.numbers):
                if left_s() <= 0:
                    break
                self._read(lane, keys, looked.numbers, turn, results, left_s())
            return results

        return self._attempt(keys, timeout_s, get)

    def delete_batch(self, keys: Sequence[str], timeout_s: float) -> list[Ok[None] | Failure]:
        def delete(lane: Lane, left_s: Callable[[], float]) -> list[Ok[None] | Failure]:
            reply = lane.call(Request("remove", list(keys)), self.process.time_for(left_s()))
            return [OK_NONE if code == 0 else CODES.judge(code) for code in reply.numbers]

        return self._attempt(keys, timeout_s, delete)

    def stat_batch(self, keys: Sequence[str], timeout_s: float) -> list[Ok[Stat] | Failure]:
        def stat(lane: Lane, left_s: Callable[[], float]) -> list[Ok[Stat] | Failure]:
            request = Request("look", list(keys), with_replicas=True)
            reply = lane.call(request, self.process.time_for(left_s()))
            pairs = zip(reply.numbers, reply.replicas, strict=True)
            return [Ok(Stat(number, copies)) if number > 0 else CODES.judge(number) for number, copies in pairs]

        return self._attempt(keys, timeout_s, stat)

    def tidy(self) -> None:
        """Nothing: memory is free as soon as a value is deleted."""

    def close(self) -> None:
        self.process.close()

    def _written(self, code: int, replicas: int) -> Ok[Written] | Failure:
        if code != 0:
            return CODES.judge(code, is_write=True)
        if replicas < self.options.least_replicas:
            return Transient("under_replicated")
        return Ok(Written(replicas))

    def _read(
        self,
        lane: Lane,
        keys: Sequence[str],
        all_sizes: Sequence[int],
        turn: Sequence[int],
        results: list[Ok[Buffer] | Failure],
        left_s: float,
    ) -> None:
        """Fills the slots of one turn."""
        sizes = [all_sizes[place] for place in turn]
        offsets, total = _lay_out(sizes)
        with lane.reserve(total) as arena:
            request = Request("read", [keys[place] for place in turn], offsets, sizes, arena_bytes=lane.arena_bytes)
            reply = lane.call(request, self.process.time_for(left_s))
            for place, offset, size, got in zip(turn, offsets, sizes, reply.numbers, strict=True):
                if got == size:
                    with arena[offset : offset + size] as found:
                        results[place] = Ok(bytearray(found))
                else:
                    results[place] = _misread(got)

    def _attempt(
        self,
        keys: Sequence[str],
        timeout_s: float,
        work: Callable[[Lane, Callable[[], float]], list[Ok[R] | Failure]],
    ) -> list[Ok[R] | Failure]:
        deadline = time.monotonic() + timeout_s
        try:
            with self.process.lane(timeout_s) as lane:
                return work(lane, lambda: deadline - time.monotonic())
        except ChildError as error:
            return [CODES.judge(error.code)] * len(keys)


def _misread(got: int) -> Failure:
    """-600 is a buffer too small: the object grew after its size was asked for."""
    if got >= 0:
        return Transient("short_read")
    return Transient(got) if got == -600 else CODES.judge(got)


def _lay_out(sizes: Sequence[int]) -> tuple[list[int], int]:
    """Where each value starts, and how many bytes all take together."""
    padded = [-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes]
    ends = list(accumulate(padded, initial=0))
    return ends[:-1], ends[-1]


def _turns(places: Sequence[int], sizes: Sequence[int]) -> list[list[int]]:
    turns: list[list[int]] = []
    total = READ_BYTES
    for place in places:
        if total + sizes[place] > READ_BYTES:
            turns.append([])
            total = 0
        turns[-1].append(place)
        total += sizes[place]
    return turns


def _setup(options: MooncakeOptions) -> Setup:
    return Setup(
        local_hostname=options.hostname,
        metadata_server=options.metadata,
        global_segment_size=options.segment_bytes,
        local_buffer_size=options.buffer_bytes,
        protocol=options.protocol,
        rdma_devices=options.devices,
        master_server_addr=options.master,
        hard_pin=options.hard_pin,
        replicas=options.replicas,
    )
