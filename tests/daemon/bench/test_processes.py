"""Processes are found by what they listen on, and measured with their children."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from pointsman.daemon.bench import processes
from tests.fakes.processes import wait_until

PARENT = """
import socket, subprocess, sys
sock = socket.create_server(("127.0.0.1", 0))
path = sys.argv[1]
unix = socket.socket(socket.AF_UNIX); unix.bind(path); unix.listen()
child = subprocess.Popen([sys.executable, "-c", "import sys\\nprint('up', flush=True)\\nsys.stdin.read()\\nfor _ in range(3_000_000): pass\\nprint('worked', flush=True)\\nsys.stdin.close(); import time; time.sleep(60)"],
                         stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=[sock.fileno()])
child.stdout.readline()
print(sock.getsockname()[1], child.pid, flush=True)
sys.stdin.readline()
child.stdin.close(); child.stdout.readline()
print("worked", flush=True)
sys.stdin.read()
child.kill(); child.wait()
"""  # noqa: E501 - a program


def test_a_tree_is_found_by_port_and_socket_and_measured_whole(tmp_path: Path) -> None:
    path = tmp_path / "admin.sock"
    command = [sys.executable, "-c", PARENT, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None and parent.stdin is not None
        port, child = map(int, parent.stdout.readline().split())
        assert processes.find_by_port(port) == parent.pid  # its child holds the socket too
        assert processes.find_by_socket(str(path)) == parent.pid
        before = processes.measure(parent.pid)
        assert before is not None
        assert before.pids == (parent.pid, child)
        assert before.pss_bytes > 1 << 20
        parent.stdin.write("\n")
        parent.stdin.flush()
        assert parent.stdout.readline() == "worked\n"
        after = processes.measure(parent.pid)
        assert after is not None
        assert after.cpu_ns - before.cpu_ns > 5_000_000  # of the child's loop
        parent.stdin.close()
        parent.wait(10)
    assert processes.measure(parent.pid) is None
    with pytest.raises(processes.NoProcess, match="no process"):
        processes.check_pid(parent.pid)


def test_nobody_listens(dead_port: int, tmp_path: Path) -> None:
    with pytest.raises(processes.NoProcess, match=f"port {dead_port}"):
        processes.find_by_port(dead_port)
    with pytest.raises(processes.NoProcess, match=r"x\.sock"):
        processes.find_by_socket(str(tmp_path / "x.sock"))


def test_a_thread_of_ours_is_measured() -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        assert processes.find_by_port(sock.getsockname()[1]) == os.getpid()
    first = processes.measure(os.getpid())
    assert first is not None

    def has_grown() -> bool:
        now = processes.measure(os.getpid())
        return now is not None and now.cpu_ns > first.cpu_ns

    wait_until("time has been used", has_grown, 10)
