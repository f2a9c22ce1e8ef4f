"""When an upgrade is not even tried, and what control hears."""

from __future__ import annotations

import os
import selectors
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pointsman.daemon.leash import Message
from pointsman.daemon.shm.native import parent_death_signal
from pointsman.daemon.supervisor.doors import Doors
from pointsman.daemon.supervisor.notify import Notifier
from pointsman.daemon.supervisor.succession import Leaving


class FakeDaemon:
    """Control's end; an upgrade that begins would need none of the rest."""

    generation = 7
    snapshot_fd = -1
    is_rolling_out = False
    is_control_running = True
    is_standing_by = False
    is_ready = True

    def __init__(self) -> None:
        self.told: list[Message] = []

    def tell_control(self, message: Message) -> None:
        self.told.append(message)

    def kill_control(self) -> None:
        raise AssertionError

    def retire(self, taken: set[str]) -> None:
        raise AssertionError

    def hurry(self, *, is_now: bool) -> None:
        raise AssertionError

    def announce(self) -> None:
        raise AssertionError

    def abandon(self, reason: str) -> None:
        raise AssertionError


def asked(command: list[str]) -> tuple[Leaving, FakeDaemon]:
    daemon = FakeDaemon()
    leaving = Leaving(daemon, Doors("127.0.0.1", 0, (), False, {}), command, Notifier(), selectors.DefaultSelector())
    leaving.begin(100.0, 30.0)
    return leaving, daemon


def test_a_program_that_is_gone_is_named(tmp_path: Path) -> None:
    leaving, daemon = asked([str(tmp_path / "pointsman"), "serve"])
    (message,) = daemon.told
    assert message.kind == "upgrade_refused"
    assert f"{tmp_path}/pointsman cannot be started" in message.reason
    leaving.advance(200.0)
    assert len(daemon.told) == 1, "nothing has begun"


def test_the_first_process_of_a_container_cannot_be_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getpid", lambda: 1)
    _, daemon = asked(["/bin/true"])
    assert daemon.told[0].kind == "upgrade_refused"
    assert "container" in daemon.told[0].reason


def test_a_daemon_that_is_to_end_with_its_parent_cannot_be_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pointsman.daemon.supervisor.succession.parent_death_signal", lambda: signal.SIGTERM)
    _, daemon = asked(["/bin/true"])
    assert daemon.told[0].kind == "upgrade_refused"
    assert "pointsman demo" in daemon.told[0].reason


def test_a_process_knows_that_it_is_to_end_with_its_parent() -> None:
    """Also what it has become by an exec."""
    assert parent_death_signal() == 0
    say = "from pointsman.daemon.shm.native import parent_death_signal; print(parent_death_signal())"
    code = (
        "import os, sys; from pointsman.daemon.shm.native import die_with_parent; die_with_parent(15);"
        f"os.execv(sys.executable, [sys.executable, '-c', {say!r}])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "15\n"
