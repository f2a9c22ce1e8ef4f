"""What is told to systemd, and when: against a socket that listens."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pointsman.daemon.shm import layout as at
from pointsman.daemon.shm.segment import Segment
from pointsman.daemon.supervisor.arbiter import is_well
from pointsman.daemon.supervisor.children import HEARTBEAT_LIMIT_S, Child
from pointsman.daemon.supervisor.notify import STATUS_INTERVAL_S, Notifier

Hear = Callable[[], list[str]]


@pytest.fixture
def hear(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hear]:
    """Returns what has been said since it was called last."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sock:
        sock.bind(str(tmp_path / "notify"))
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))

        def heard() -> list[str]:
            found: list[str] = []
            while True:
                try:
                    found.append(sock.recv(4096).decode())
                except BlockingIOError:
                    return found

        yield heard


def test_children_inherit_nothing_that_would_let_them_speak_for_us(hear: Hear, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "1000000")
    monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()))
    Notifier().ready()
    assert {"NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"} & os.environ.keys() == set()
    assert hear() == ["READY=1"]


def test_nobody_to_tell_is_fine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    Notifier().ready()
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "gone"))
    Notifier().ready()


def test_an_abstract_address_begins_with_an_at_sign(monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"pointsman-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind("\0" + name)
        monkeypatch.setenv("NOTIFY_SOCKET", f"@{name}")
        Notifier().ready()
        sock.settimeout(1)
        assert sock.recv(100) == b"READY=1"


def test_a_reload_carries_the_time_that_notify_reload_asks_for(hear: Hear) -> None:
    Notifier().reloading()
    (said,) = hear()
    first, stamp = said.split("\n")
    assert first == "RELOADING=1"
    assert stamp.removeprefix("MONOTONIC_USEC=").isdecimal()


def test_a_stop_asks_for_the_time_it_may_take(hear: Hear) -> None:
    Notifier().stopping(within_s=61.5)
    assert hear() == ["STOPPING=1\nEXTEND_TIMEOUT_USEC=61500000"]


def test_the_status_follows_changes_once_a_second(hear: Hear) -> None:
    notifier = Notifier()
    notifier.follow(100.0, lambda: "one")
    notifier.follow(100.0 + STATUS_INTERVAL_S / 2, lambda: "two")
    assert hear() == ["STATUS=one"]
    notifier.follow(100.0 + STATUS_INTERVAL_S, lambda: "two")
    assert hear() == ["STATUS=two"]
    notifier.follow(100.0 + 2 * STATUS_INTERVAL_S, lambda: "two")
    assert hear() == [], "nothing has changed"


def test_the_watchdog_is_fed_at_half_its_time(hear: Hear, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "20000000")
    notifier = Notifier()
    for now in (100.0, 109.9, 110.0, 119.0):
        notifier.feed(now)
    assert hear() == ["WATCHDOG=1"] * 2


@pytest.mark.parametrize(("microseconds", "pid"), [("", ""), ("20000000", "1"), ("soon", "")])
def test_a_watchdog_of_somebody_else_is_not_fed(
    hear: Hear, monkeypatch: pytest.MonkeyPatch, microseconds: str, pid: str
) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", microseconds)
    if pid:
        monkeypatch.setenv("WATCHDOG_PID", pid)
    Notifier().feed(100.0)
    assert hear() == []


def test_another_main_process_is_the_last_word(hear: Hear, monkeypatch: pytest.MonkeyPatch) -> None:
    """And it gets what it needs to speak for itself; a watchdog process id would be ours."""
    address = os.environ["NOTIFY_SOCKET"]
    monkeypatch.setenv("WATCHDOG_USEC", "20000000")
    monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()))
    notifier = Notifier()
    assert notifier.environment == {"NOTIFY_SOCKET": address, "WATCHDOG_USEC": "20000000"}
    notifier.hand_over(4711)
    notifier.ready()
    notifier.follow(100.0, lambda: "one")
    notifier.feed(100.0)
    assert hear() == ["MAINPID=4711"]


def test_without_systemd_there_is_nothing_to_hand_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    assert Notifier().environment == {}


# --- when all is well


class Tree:
    """Two shards and control without processes, all ready and just heard."""

    def __init__(self) -> None:
        self.segment = Segment.create(2, 4)
        self.children = [Child(f"child {index}", index, self.segment, [], []) for index in range(3)]
        for child in self.children:
            child.pid = os.getpid()
            child.ready()
            self.segment.beat(child.index)
        self.now = max(self.segment.process(index).heartbeat_ns for index in range(3)) / 1e9

    def is_well(self, later_s: float = 0.0, *, is_stopping: bool = False) -> bool:
        *shards, control = self.children
        return is_well(shards, control, self.now + later_s, is_stopping=is_stopping)


@pytest.fixture
def tree() -> Iterator[Tree]:
    made = Tree()
    yield made
    os.close(made.segment.fd)


def test_all_is_well_while_every_heart_beats(tree: Tree) -> None:
    assert tree.is_well()
    assert not tree.is_well(later_s=HEARTBEAT_LIMIT_S + 0.1)


@pytest.mark.parametrize("silent", [0, 1, 2])
def test_one_silent_heart_is_enough(tree: Tree, silent: int) -> None:
    for index in {0, 1, 2} - {silent}:
        tree.segment.set_process(index, at.P_HEARTBEAT_NS, int((tree.now + 60) * 1e9))
    assert not tree.is_well(later_s=60)
    assert not tree.is_well(later_s=60, is_stopping=True)


def test_a_shard_must_not_be_missing_and_control_may(tree: Tree) -> None:
    tree.children[2].died()
    assert tree.is_well()
    tree.children[0].died()
    assert not tree.is_well()


def test_at_the_end_of_a_stop_nobody_is_missed(tree: Tree) -> None:
    for child in tree.children:
        child.died()
    assert tree.is_well(is_stopping=True)
