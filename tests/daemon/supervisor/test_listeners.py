"""Sockets that systemd passes: which are taken, and what is said of the others."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable

import pytest

from pointsman.daemon.supervisor import listeners
from pointsman.daemon.supervisor.listeners import ListenError, inherited_sockets

Pass = Callable[[socket.socket], int]


@pytest.fixture
def pass_on(monkeypatch: pytest.MonkeyPatch) -> Pass:
    """Has the next look at the environment find a copy of that socket; returns the descriptor."""

    def passed(sock: socket.socket) -> int:
        fd = os.dup(sock.fileno())
        os.set_inheritable(fd, True)
        monkeypatch.setattr(listeners, "FIRST_INHERITED_FD", fd)
        monkeypatch.setenv("LISTEN_PID", str(os.getpid()))
        monkeypatch.setenv("LISTEN_FDS", "1")
        monkeypatch.setenv("LISTEN_FDNAMES", "data")
        return fd

    return passed


def test_a_listening_socket_is_taken_and_the_variables_with_it(pass_on: Pass) -> None:
    with socket.create_server(("127.0.0.1", 0)) as theirs:
        fd = pass_on(theirs)
        (passed,) = inherited_sockets()
        assert passed.name == "data"
        with passed.sock as ours:
            assert ours.fileno() == fd
            assert ours.getsockname() == theirs.getsockname()
            assert not os.get_inheritable(fd), "children get it one by one"
    assert not [name for name in os.environ if name.startswith("LISTEN_")]
    assert inherited_sockets() == []


def test_sockets_for_another_process_are_left_alone(pass_on: Pass, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as theirs:
        fd = pass_on(theirs)
        monkeypatch.setenv("LISTEN_PID", str(os.getppid()))
        assert inherited_sockets() == []
        assert os.get_inheritable(fd)
        os.close(fd)


@pytest.mark.parametrize(
    ("family", "kind"), [(socket.AF_INET, socket.SOCK_DGRAM), (socket.AF_INET, socket.SOCK_STREAM)]
)
def test_what_does_not_listen_is_refused_with_the_place_to_look(
    pass_on: Pass, family: socket.AddressFamily, kind: socket.SocketKind
) -> None:
    with socket.socket(family, kind) as theirs:
        pass_on(theirs)
        with pytest.raises(ListenError, match=r"not a listening TCP socket \(see ListenStream= in pointsman.socket\)"):
            inherited_sockets()


def test_a_unix_socket_is_refused(pass_on: Pass) -> None:
    with socket.socket(socket.AF_UNIX) as theirs:
        theirs.bind("")
        theirs.listen()
        pass_on(theirs)
        with pytest.raises(ListenError, match="not a listening TCP socket"):
            inherited_sockets()


def test_a_file_is_no_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    fd = os.memfd_create("no-socket")
    monkeypatch.setattr(listeners, "FIRST_INHERITED_FD", fd)
    monkeypatch.setenv("LISTEN_PID", str(os.getpid()))
    monkeypatch.setenv("LISTEN_FDS", "1")
    with pytest.raises(ListenError, match="is no socket"):
        inherited_sockets()
    os.close(fd)
