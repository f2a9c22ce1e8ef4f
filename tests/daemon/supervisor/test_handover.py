"""What is passed on, and what is made of it: real descriptors, real processes."""

from __future__ import annotations

import json
import os
import select
import socket
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from pointsman.config import snapshot as codec
from pointsman.config.settings import Settings
from pointsman.config.snapshot import Snapshot, WorkerSpec
from pointsman.daemon import leash
from pointsman.daemon.supervisor import handover as module
from pointsman.daemon.supervisor.handover import PROTOCOL, VARIABLE, Handover, HandoverError, Successor
from tests.fakes.processes import wait_for_orphan


def example(**fields: Any) -> Handover:
    whole: dict[str, Any] = {
        "protocol": PROTOCOL,
        "pid": 1,
        "version": "1",
        "channel_fd": -1,
        "host": "127.0.0.1",
        "port": 0,
        "data_fds": (),
        "is_socket_activated": False,
        "admin_fds": {},
        "generation": 7,
        "snapshot_fd": -1,
    }
    return Handover(**(whole | fields))


def passed(data: bytes) -> dict[str, str]:
    return {VARIABLE: str(leash.sealed_memfd("test", data))}


def test_nothing_is_passed_at_an_ordinary_start() -> None:
    assert module.read({}) is None
    assert module.take({}) is None


def test_what_is_taken_is_nobody_elses() -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        sock.set_inheritable(True)
        ours, theirs = leash.pair()
        environ = passed(
            msgspec.json.encode(example(channel_fd=theirs.fileno(), data_fds=(sock.fileno(),), snapshot_fd=-1))
        )
        manifest = int(environ[VARIABLE])
        taken = module.take(environ)
        assert taken is not None
        assert taken.fds == (theirs.fileno(), sock.fileno())
        assert environ == {}
        assert not os.get_inheritable(sock.fileno())
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(manifest)
        ours.close()
        theirs.close()


@pytest.mark.parametrize("data", [b"", b"{", b"{}", b'{"protocol": 1, "channel_fd": -1}'])
def test_what_cannot_be_understood_is_refused(data: bytes) -> None:
    with pytest.raises(HandoverError, match="is not what a running pointsman passes"):
        module.read(passed(data))


@pytest.mark.parametrize("text", ["x", "999", "-1"])
def test_a_variable_that_is_no_descriptor_is_refused(text: str) -> None:
    with pytest.raises(HandoverError, match=VARIABLE):
        module.read({VARIABLE: text})


def test_another_protocol_is_refused_and_the_running_daemon_told() -> None:
    """Whatever else it has in it."""
    ours, theirs = leash.pair()
    with ours, theirs, pytest.raises(HandoverError, match="restart instead"):
        try:
            module.read(passed(json.dumps({"protocol": 99, "channel_fd": theirs.fileno(), "new": {}}).encode()))
        finally:
            message, _ = leash.receive(ours)
            assert message is not None
            assert message.kind == "failed"
            assert "by protocol 1 only, not 99" in message.reason


# --- the generation

WORKER = WorkerSpec(id="w", slot=5, url="http://10.0.0.1:8000", host="10.0.0.1", port=8000, address="10.0.0.1")


@pytest.mark.parametrize(("max_workers", "is_kept"), [(6, True), (5, False)])
def test_workers_keep_their_slots_where_there_are_that_many(tmp_path: Path, max_workers: int, is_kept: bool) -> None:
    data = codec.encode(Snapshot(generation=7, workers=(WORKER,)))
    handover = example(snapshot_fd=leash.sealed_memfd("snapshot", data))
    settings = Settings(runtime_dir=str(tmp_path), state_dir=str(tmp_path), max_workers=max_workers)
    inherited = module.inherited_generation(handover, settings)
    assert inherited is not None
    number, snapshot = inherited
    assert number == codec.decode(snapshot).generation == 7
    assert codec.decode(snapshot).workers == ((WORKER,) if is_kept else ())


def test_a_snapshot_of_another_version_leaves_its_number(tmp_path: Path) -> None:
    handover = example(snapshot_fd=leash.sealed_memfd("snapshot", b'{"generation": 7, "unheard of": 1'))
    settings = Settings(runtime_dir=str(tmp_path), state_dir=str(tmp_path))
    assert module.inherited_generation(handover, settings) == (7, codec.encode(Snapshot(generation=7)))


# --- the process

SAY = """
import json, os, socket, sys
fd = int(os.environ["POINTSMAN_HANDOVER_FD"])
given = json.loads(os.pread(fd, 1 << 16, 0))
channel = socket.socket(fileno=given["channel_fd"])
channel.recv(1)
address = socket.socket(fileno=given["data_fds"][0]).getsockname()
reason = f"{os.getppid()} {address[1]} {os.environ['MARK']} {sys.argv[1:]}"
channel.send(json.dumps({"kind": "failed", "pid": os.getpid(), "reason": reason}).encode())
channel.recv(1)
sys.exit(5)
"""


def test_a_successor_inherits_the_sockets_and_is_no_child_of_ours() -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        command = [sys.executable, "-c", SAY, "serve"]
        successor = module.start_successor(command, os.environ | {"MARK": "m"}, example(data_fds=(sock.fileno(),)))
        with successor.channel as channel:
            assert not os.get_inheritable(sock.fileno())
            # Its parent, a child of ours, has ended: it belongs to who adopts orphans, here this process again.
            channel.send(b"1")
            assert select.select([channel], [], [], 30)[0]
            message, _ = leash.receive(channel)
        assert message is not None
        assert message.pid == successor.pid
        assert message.reason == f"{os.getpid()} {sock.getsockname()[1]} m ['serve']"
        successor.wait(30)
        assert wait_for_orphan(successor.pid, 10) == 5
        successor.kill()


def test_a_command_that_is_not_there_is_named(tmp_path: Path) -> None:
    program = str(tmp_path / "pointsman")
    with pytest.raises(HandoverError, match=f"{program} cannot be started: No such file"):
        module.start_successor([program, "serve"], os.environ, example())


def test_killing_one_that_hangs(tmp_path: Path) -> None:
    successor: Successor = module.start_successor(
        [sys.executable, "-c", "import time; time.sleep(60)"], os.environ, example()
    )
    successor.kill()
    assert wait_for_orphan(successor.pid, 10) == -9
    successor.channel.close()
