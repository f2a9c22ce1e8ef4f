"""The prefix index driven by random operations from two processes, against the plain one."""

from __future__ import annotations

import os
from array import array
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pointsman.daemon.shm.prefix_index import PrefixIndex
from tests.fuzz.prefix_reference import Pin, PlainPrefixIndex

SLOTS = 3
BLOCK = 16

# Few letters in long runs: prompts that share, continue and cut each other.
texts = st.lists(st.tuples(st.sampled_from(b"ab"), st.integers(1, 40)), max_size=4).map(
    lambda runs: b"".join(bytes([letter]) * count for letter, count in runs)
)
slots = st.integers(0, SLOTS - 1)
processes = st.integers(0, 1)


class Operations:
    """What either process does on its own mapping."""

    def __init__(self, fd: int) -> None:
        self.index = PrefixIndex.attach(fd)
        self.chain = self.index.chain()
        self.out = array("Q", bytes(8 * SLOTS))

    def match(self, text: bytes) -> list[int]:
        self.index.match(self.chain.load(text), self.out)
        return list(self.out)

    def insert(self, slot: int, text: bytes) -> int:
        return self.index.insert(slot, self.chain.load(text))

    def pin(self, slot: int, text: bytes, shard: int) -> int:
        return self.index.pin(slot, self.chain.load(text), shard, may_exceed=True)

    def unpin(self, token: int) -> bool | None:
        return self.index.unpin(token)

    def set_capacity(self, slot: int, chars: int) -> None:
        self.index.set_capacity(slot, chars)

    def evict(self, slot: int, to_chars: int) -> None:
        while self.index.evict(slot, to_chars):
            pass

    def remove_worker(self, slot: int) -> None:
        self.index.remove_worker(slot)


def serve(fd: int, connection: Connection) -> None:
    operations = Operations(fd)
    while (call := connection.recv()) is not None:
        name, arguments = call
        connection.send(getattr(operations, name)(*arguments))


class TwoProcesses(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.index = PrefixIndex.create(0.0635, SLOTS, block_bytes=BLOCK, seed=1)
        self.plain = PlainPrefixIndex(SLOTS)
        self.chain = self.index.chain()
        self.pins: list[tuple[int, Pin]] = []
        self.here = Operations(self.index.fd)

    @initialize()
    def start(self) -> None:
        self.connection, its_end = Pipe()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                self.connection.close()
                serve(self.index.fd, its_end)
            finally:
                os._exit(0)
        its_end.close()

    def teardown(self) -> None:
        if hasattr(self, "pid"):
            self.connection.send(None)
            os.waitpid(self.pid, 0)
            self.connection.close()
        os.close(self.index.fd)

    def do(self, process: int, name: str, *arguments: object) -> Any:
        if process == 0:
            return getattr(self.here, name)(*arguments)
        self.connection.send((name, arguments))
        return self.connection.recv()

    @rule(process=processes, text=texts)
    def match(self, process: int, text: bytes) -> None:
        assert self.do(process, "match", text) == self.plain.match(self.chain.load(text))

    @rule(process=processes, slot=slots, text=texts)
    def insert(self, process: int, slot: int, text: bytes) -> None:
        held = self.do(process, "insert", slot, text)
        self.plain.insert(slot, self.chain.load(text))
        capacity, size = self.index.capacity(slot), self.index.size(slot)
        assert held <= len(text)
        assert not capacity or size <= max(capacity, self.index.pinned(slot))

    @rule(process=processes, slot=slots, text=texts, shard=st.integers(0, 1))
    def pin(self, process: int, slot: int, text: bytes, shard: int) -> None:
        token = self.do(process, "pin", slot, text, shard)
        pin = self.plain.pin(slot, self.chain.load(text))
        assert bool(token) == bool(text)
        if token:
            self.pins.append((token, pin))

    @precondition(lambda self: self.pins)
    @rule(process=processes, which=st.integers(0, 1000))
    def unpin(self, process: int, which: int) -> None:
        token, pin = self.pins.pop(which % len(self.pins))
        assert self.do(process, "unpin", token) == self.plain.unpin(pin)
        assert not self.do(process, "unpin", token)

    @rule(process=processes, slot=slots, chars=st.sampled_from([0, 16, 40, 100, 400]))
    def set_capacity(self, process: int, slot: int, chars: int) -> None:
        self.do(process, "set_capacity", slot, chars)
        self.plain.set_capacity(slot, chars)

    @rule(process=processes, slot=slots, to_chars=st.integers(0, 300))
    def evict(self, process: int, slot: int, to_chars: int) -> None:
        self.do(process, "evict", slot, to_chars)
        self.plain.evict(slot, to_chars, is_limit=False)

    @rule(process=processes, slot=slots)
    def remove_worker(self, process: int, slot: int) -> None:
        self.do(process, "remove_worker", slot)
        self.plain.remove_worker(slot)

    @invariant()
    def agrees(self) -> None:
        assert self.index.check() == []
        for slot in range(SLOTS):
            held = self.plain.held[slot]
            assert self.index.held_blocks(slot) == self.plain.blocks(slot)
            assert (self.index.size(slot), self.index.pinned(slot)) == (held.chars, held.pinned)


TestTwoProcesses = TwoProcesses.TestCase
TestTwoProcesses.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
