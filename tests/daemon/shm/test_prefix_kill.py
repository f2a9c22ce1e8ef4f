"""A process may be killed at any instruction: one is, at every journalled store of every operation.

After each kill everything is recounted. The state between two stores is the one at the next: a kill between them needs
no case of its own.
"""

import os
import signal
from array import array
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from pointsman.daemon.shm.prefix import abort_at
from pointsman.daemon.shm.prefix_index import PrefixIndex

SLOTS = 3
BLOCK = 16
JOURNAL_AT = 4096
MAX_POINTS = 5000


def run_child(work: Callable[[], object]) -> int:
    """Runs `work` in a forked process; returns its wait status."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitpid(pid, 0)[1]


def was_killed(status: int) -> bool:
    assert status == 0 or os.WIFSIGNALED(status), "the operation failed instead of being killed"
    return os.WIFSIGNALED(status)


def text(name: int, blocks: int, tail: int = 0) -> bytes:
    return b"".join(b"%08d%08d" % (name, i) for i in range(blocks)) + b"t" * tail


@dataclass
class Scene:
    """A small index with something of everything, and how to put it back to that."""

    index: PrefixIndex
    tokens: list[int]
    memory: bytes

    def insert(self, slot: int, content: bytes) -> int:
        return self.index.insert(slot, self.index.chain().load(content))

    def pin(self, slot: int, content: bytes, shard: int = 0) -> int:
        return self.index.pin(slot, self.index.chain().load(content), shard)

    def restore(self) -> None:
        memoryview(self.index.memory)[:] = self.memory

    def recount(self) -> None:
        assert self.index.check() == []
        for slot in range(SLOTS):
            capacity = self.index.capacity(slot)
            assert 0 <= self.index.pinned(slot) <= self.index.size(slot)
            assert not capacity or self.index.size(slot) <= capacity

    def live_on(self) -> None:
        """What comes after a crash works: the same operations by somebody else, down to nothing held."""
        self.insert(0, text(1, 6, 5))
        token = self.pin(1, text(9, 4))
        self.recount()
        assert self.index.unpin(token)
        for shard in range(3):
            self.index.reclaim_shard(shard)
        for slot in range(SLOTS):
            assert self.index.pinned(slot) == 0
            self.index.remove_worker(slot)
        assert self.index.check() == []
        totals = self.index.totals()
        assert (totals["blocks_used"], totals["holdings_used"], totals["pins_used"]) == (0, 0, 0)


def make_scene(size_mib: float = 0.0635) -> Scene:
    index = PrefixIndex.create(size_mib, SLOTS, block_bytes=BLOCK, seed=1)
    scene = Scene(index, [], b"")
    for slot in range(SLOTS):
        scene.insert(slot, text(1, 4))
    scene.insert(0, text(1, 6, 3))
    scene.insert(0, text(2, 3))
    scene.insert(1, text(1, 2))
    scene.tokens += [scene.pin(0, text(1, 5), shard=1), scene.pin(0, text(3, 3, 1), shard=1)]
    scene.tokens += [scene.pin(1, text(1, 4), shard=2), scene.pin(0, text(1, 6), shard=2)]
    index.set_capacity(2, 160)
    scene.memory = bytes(index.memory)
    return scene


def fill(scene: Scene) -> None:
    """No block is free, and no memory operation has the lock."""
    name = 100
    while scene.index.totals()["blocks_used"] < scene.index.totals()["block_count"]:
        scene.insert(name % 2, text(name, 1))
        name += 1
    scene.memory = bytes(scene.index.memory)


OPERATIONS: dict[str, Callable[[Scene], object]] = {
    "insert of a new prompt": lambda s: s.insert(0, text(4, 4, 2)),
    "insert of a continuation": lambda s: s.insert(1, text(1, 7, 2)),
    "insert of what others hold": lambda s: s.insert(2, text(1, 6, 3)),
    "insert of a repeat": lambda s: s.insert(0, text(2, 3)),
    "insert above the capacity": lambda s: s.insert(2, text(5, 8)),
    "insert of more than the capacity": lambda s: s.insert(2, text(5, 20)),
    "pin of a new prompt": lambda s: s.pin(1, text(6, 3, 1), shard=1),
    "pin of what is pinned": lambda s: s.pin(0, text(1, 6, 9), shard=1),
    "pin of a known prefix": lambda s: s.pin(0, text(2, 2), shard=1),
    "unpin of a part that stays pinned": lambda s: s.index.unpin(s.tokens[0]),
    "unpin of the only request": lambda s: s.index.unpin(s.tokens[1]),
    "withdrawal of a part that stays pinned": lambda s: s.index.withdraw(s.tokens[0]),
    "withdrawal of the only request": lambda s: s.index.withdraw(s.tokens[1], 600),
    "eviction": lambda s: s.index.evict(0, 0),
    "lowered capacity": lambda s: s.index.shrink(2, 16, 1000),
    "removal of a worker": lambda s: s.index.remove_worker(0),
    "end of a dead shard's pins": lambda s: s.index.reclaim_shard(1),
}


def kill_everywhere(scene: Scene, operation: Callable[[Scene], object]) -> int:
    """Kills a child at the first, second, … point of the operation until it gets through; returns their number."""
    for point in range(1, MAX_POINTS):
        scene.restore()

        def work(point: int = point) -> None:
            abort_at(point)
            operation(scene)

        if not was_killed(run_child(work)):
            scene.recount()
            return point - 1
        scene.recount()
        assert scene.index.totals()["recoveries"] == 1
        scene.live_on()
    raise AssertionError("the operation does not end")


SLOW = ("removal of a worker",)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in OPERATIONS]
)
def test_killed_at_any_point(name: str) -> None:
    points = kill_everywhere(make_scene(), OPERATIONS[name])
    assert points >= 5


@pytest.mark.slow
def test_killed_at_any_point_of_an_insert_into_a_full_index() -> None:
    scene = make_scene()
    fill(scene)
    assert kill_everywhere(scene, lambda s: s.insert(0, text(7, 3, 1))) > 100
    assert scene.index.totals()["memory_evictions"] > 0


@pytest.mark.parametrize("name", ["insert of a continuation", "eviction", "pin of what is pinned"])
def test_killed_while_recovering_from_a_kill(name: str) -> None:
    scene = make_scene()
    for point in range(1, MAX_POINTS, 7):
        scene.restore()

        def work(point: int = point) -> None:
            abort_at(point)
            OPERATIONS[name](scene)

        if not was_killed(run_child(work)):
            break
        for _ in range(3):

            def recover() -> None:
                abort_at(3)
                scene.index.lock()

            run_child(recover)
        scene.recount()
        scene.live_on()


def test_killed_between_operations_while_holding_the_lock() -> None:
    scene = make_scene()

    def work() -> None:
        scene.index.lock()
        os.kill(os.getpid(), signal.SIGKILL)

    assert was_killed(run_child(work))
    scene.recount()
    assert scene.index.totals()["recoveries"] == 1
    assert scene.index.totals()["resets"] == 0
    scene.live_on()


@pytest.mark.parametrize("kills", [0, 1, 2])
def test_a_journal_that_makes_no_sense_empties_the_index_and_is_counted(kills: int) -> None:
    scene = make_scene()

    def work() -> None:
        scene.index.lock()
        memoryview(scene.index.memory)[JOURNAL_AT : JOURNAL_AT + 8] = array("Q", [1000]).tobytes()
        os.kill(os.getpid(), signal.SIGKILL)

    assert was_killed(run_child(work))
    for point in range(1, 1 + kills):

        def reset(point: int = point) -> None:
            abort_at(point)
            scene.index.lock()

        assert was_killed(run_child(reset))
    assert scene.index.check() == []
    assert scene.index.totals()["resets"] >= 1
    assert scene.index.totals()["blocks_used"] == 0
    assert scene.index.unpin(scene.tokens[0]) is False
    scene.live_on()


def test_a_stopped_holder_costs_the_deadline_and_an_unpin_is_made_up_for() -> None:
    scene = make_scene()
    ready, stopped = os.pipe()

    def work() -> None:
        scene.index.lock()
        os.write(stopped, b"x")
        os.kill(os.getpid(), signal.SIGSTOP)
        scene.index.unlock()

    pid = os.fork()
    if pid == 0:
        work()
        os._exit(0)
    assert os.read(ready, 1) == b"x"
    assert os.WIFSTOPPED(os.waitpid(pid, os.WUNTRACED)[1])
    index, chain = scene.index, scene.index.chain().load(text(1, 4))
    matched = array("Q", bytes(8 * SLOTS))
    assert not index.lock()
    with index.locked() as held:
        assert not held
    assert index.match(chain, matched) == -1
    assert index.insert(0, chain) == -1
    assert index.pin(0, chain) == 0
    assert index.unpin(scene.tokens[0]) is None
    assert index.totals()["lock_timeouts"] == 6
    pinned = index.totals()["pins_used"]
    os.kill(pid, signal.SIGCONT)
    assert os.waitpid(pid, 0)[1] == 0
    assert index.match(chain, matched) == 64
    assert index.totals()["pins_used"] == pinned - 1
    scene.recount()
    os.close(ready)
    os.close(stopped)
