"""Which sockets a daemon goes on with, and which it opens and closes."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from pointsman.config.settings import Settings
from pointsman.daemon.supervisor.doors import DATA, Doors, open_doors
from pointsman.daemon.supervisor.handover import PROTOCOL, Handover
from pointsman.daemon.supervisor.listeners import ListenError


def settings(folder: Path, **fields: object) -> Settings:
    given = {"port": 0, "shards": 2, "admin_listen": (f"unix:{folder}/admin.sock", "127.0.0.1:0")} | fields
    return Settings(runtime_dir=str(folder), state_dir=str(folder), **given)  # type: ignore[arg-type]


def passed_on(doors: Doors) -> Handover:
    """Descriptors as a new process would have them: its own copies."""
    return Handover(
        protocol=PROTOCOL,
        pid=1,
        version="1",
        channel_fd=-1,
        host=doors.host,
        port=doors.port,
        data_fds=tuple(os.dup(sock.fileno()) for sock in doors.data),
        is_socket_activated=doors.is_socket_activated,
        admin_fds={where: os.dup(sock.fileno()) for where, sock in doors.admin.items()},
        generation=0,
        snapshot_fd=-1,
    )


def names(sockets: tuple[socket.socket, ...]) -> list[object]:
    return [sock.getsockname() for sock in sockets]


def inodes(doors: Doors) -> list[int]:
    return [os.fstat(sock.fileno()).st_ino for sock in (*doors.data, *doors.admin.values())]


def is_listening(sock: socket.socket) -> bool:
    return bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))


@pytest.fixture
def old(tmp_path: Path) -> Iterator[Doors]:
    doors = open_doors(settings(tmp_path), None)
    yield doors
    doors.remove_files()
    close(doors)


def close(doors: Doors) -> None:
    for sock in (*doors.data, *doors.admin.values()):
        sock.close()


def test_a_daemon_on_its_own_opens_one_socket_for_each_shard(old: Doors) -> None:
    assert len(old.data) == 2
    assert old.taken == set()
    assert [old.of_shard(index, 2) for index in range(2)] == [(old.data[0],), (old.data[1],)]


def test_the_same_addresses_are_the_same_sockets(tmp_path: Path, old: Doors) -> None:
    """Also port 0: what matters is what was asked for."""
    new = open_doors(settings(tmp_path), passed_on(old))
    assert inodes(new) == inodes(old)
    assert new.taken == {DATA, *old.admin}
    new.remove_files()
    assert (tmp_path / "admin.sock").exists(), "it is not the new daemon's to remove yet"
    close(new)


def test_fewer_shards_accept_on_all_sockets(tmp_path: Path, old: Doors) -> None:
    new = open_doors(settings(tmp_path, shards=1), passed_on(old))
    assert new.of_shard(0, 1) == new.data
    assert inodes(new) == inodes(old)
    close(new)


def test_more_shards_get_more_sockets_that_do_not_listen_yet(tmp_path: Path, old: Doors) -> None:
    """A connection that came to one of them would be reset if the upgrade failed."""
    new = open_doors(settings(tmp_path, shards=4), passed_on(old))
    assert [is_listening(sock) for sock in new.data] == [True, True, False, False]
    assert len(set(map(str, names(new.data)))) == 1
    close(new)


def test_other_addresses_are_opened_and_the_copies_of_the_old_ones_closed(tmp_path: Path, old: Doors) -> None:
    handover = passed_on(old)
    where = f"unix:{tmp_path}/other.sock"
    new = open_doors(settings(tmp_path, host="localhost", admin_listen=(where, "127.0.0.1:0")), handover)
    assert new.taken == {"127.0.0.1:0"}
    assert not set(map(str, names(new.data))) & set(map(str, names(old.data)))
    for fd in (*handover.data_fds, handover.admin_fds[f"unix:{tmp_path}/admin.sock"]):
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)
    old.leave(new.taken)
    assert not (tmp_path / "admin.sock").exists()
    assert (tmp_path / "other.sock").exists()
    new.remove_files()
    assert not (tmp_path / "other.sock").exists()
    close(new)


def test_an_address_that_overlaps_the_old_one_needs_a_restart(tmp_path: Path, old: Doors) -> None:
    port = old.data[0].getsockname()[1]
    with pytest.raises(ListenError, match=f"port {port} on 0.0.0.0 is in use.*this change needs a restart"):
        open_doors(settings(tmp_path, host="0.0.0.0", port=port), passed_on(old))


def test_sockets_of_systemd_stay_whatever_host_and_port_say(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as theirs:
        old = Doors("127.0.0.1", 8700, (theirs,), is_socket_activated=True, admin={})
        new = open_doors(settings(tmp_path, host="0.0.0.0", port=1, shards=3, admin_listen=()), passed_on(old))
        assert [new.of_shard(index, 3) for index in range(3)] == [new.data] * 3
        assert names(new.data) == [theirs.getsockname()]
        assert new.is_socket_activated
        close(new)
