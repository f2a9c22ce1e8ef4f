"""`pointsman upgrade`: another daemon takes over on the same sockets, or the old one goes on as if nothing had been."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from pointsman.scripts.simulated_engine.launch import launch_engines
from tests.fakes.gateway import Gateway, gateway
from tests.fakes.leeway import leeway
from tests.fakes.processes import open_files, wait_for_orphan, wait_gone, wait_until
from tests.fakes.service_manager import ServiceManager
from tests.fakes.traffic import LAST_CHUNK, Client, Traffic, client_of_each, completion, request

TOKEN_S = 0.05
"""of the paced engine"""
OUTLASTING_S = 20.0
"""longer than upgrades take on a busy machine"""
FAILED, REFUSED = 70, 1


@pytest.fixture(scope="module")
def engine() -> Iterator[str]:
    """7 ms a token at its own speed."""
    with launch_engines(1, "--preset", "h100-8b", "--speed", str(0.007 / TOKEN_S)) as running:
        yield running[0].url


@pytest.fixture(scope="module")
def quick_engines() -> Iterator[list[str]]:
    with launch_engines(2) as running:
        yield [engine.url for engine in running]


def address_of(gate: Gateway) -> tuple[str, int]:
    return gate.host, gate.port


def stream_of(duration_s: float) -> bytes:
    return completion(max_tokens=int(duration_s / TOKEN_S), stream=True)


def processes_of(gate: Gateway) -> list[int]:
    return [gate.main_pid, *gate.children()]


def descriptors_of(pid: int) -> list[str]:
    """Their kinds; the numbers in the names of sockets differ."""
    return sorted(name.partition(":[")[0] for name in open_files(pid))


def upgraded(gate: Gateway, *arguments: str) -> dict[str, Any]:
    """What the daemon answered; the process that follows is ready."""
    done = gate.upgrade("--json", *arguments)
    assert done.returncode == 0, done.stdout + done.stderr + gate.log_text()
    answer = dict(json.loads(done.stdout))
    gate.wait_log("ready", pid=answer["pid"])
    return answer


def broken(folder: Path, code: str) -> tuple[dict[str, str], Path]:
    """An environment in which processes run `code` at their start, while the flag file is there."""
    flag = folder / "break"
    lines = "\n".join(f"    {line}" for line in code.strip().splitlines())
    (folder / "sitecustomize.py").write_text(f"import os, sys, time\nif os.path.exists({str(flag)!r}):\n{lines}\n")
    return {"PYTHONPATH": str(folder)}, flag


def assert_unharmed(gate: Gateway, before: list[int]) -> None:
    """The shards and the supervisor are the ones they were, and the failed successor has left nothing."""
    wait_gone(gate.successors, 2)
    gate.wait_until("control is there", partial(is_answering, gate))
    gate.wait_until("as many processes", lambda: len(processes_of(gate)) == len(before))
    assert set(before) - set(processes_of(gate)) <= {before[-1]}, "only control may be another one"
    with Client(address_of(gate)) as client:
        assert client.ask(completion()).status == 200


def is_answering(gate: Gateway) -> bool:
    try:
        return gate.admin("GET", "/health")[0] == 200
    except OSError:
        return False


# --- it succeeds


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_everything_survives_and_nothing_is_left(engine: str, quick_engines: list[str]) -> None:
    """Workers, their ids, the generation; streams and idle connections of the old daemon. No process, no descriptor."""
    with gateway(workers=[engine]) as gate:
        added = gate.add_worker(quick_engines[0], labels={"rack": "7"}, models=["other"])["worker_id"]
        before, old = gate.workers(), processes_of(gate)
        generation = gate.admin("GET", "/status")[1]["generation"]
        descriptors = descriptors_of(gate.main_pid)
        with (
            client_of_each(gate.pids("shard"), address_of(gate)) as streams,
            client_of_each(gate.pids("shard"), address_of(gate)) as idle,
        ):
            for client in streams.values():
                client.sock.sendall(stream_of(OUTLASTING_S))
                assert client.read_head()[":status"] == "200"
            answer = upgraded(gate)
            for client in idle.values():  # at once: they are closed soon
                reply = client.get("/readiness")
                assert reply.status == 200, "a load balancer must not think that the port is going away"
                assert reply.headers["connection"] == "close"
                assert client.read_more() == b""
            assert answer["in_flight"] == 2
            assert (answer["previous_pid"], answer["pid"]) == (old[0], gate.main_pid)

            assert not set(processes_of(gate)) & set(old)
            assert [(w["id"], w["url"], w["labels"], w["models"], w["source"]) for w in gate.workers()] == [
                (w["id"], w["url"], w["labels"], w["models"], w["source"]) for w in before
            ]
            assert added in [worker["id"] for worker in gate.workers()]
            status = gate.admin("GET", "/status")[1]
            assert (status["generation"], status["workers_healthy"]) == (generation, 2)

            for client in streams.values():
                text = client.read_to_end()
                assert text.endswith(LAST_CHUNK)
                assert b"data: [DONE]\n\n" in text
        assert gate.wait_ended(5) == 0
        gate.wait_log("predecessor_gone")
        wait_gone(old, 1)
        assert descriptors_of(gate.main_pid) == descriptors
        # What was added is still in the new daemon's hands.
        assert gate.admin("DELETE", f"/workers/{added}")[0] == 202
        generation = gate.admin("GET", "/status")[1]["generation"]
        assert generation > status["generation"]
        new = processes_of(gate)
        assert gate.stop() == 0
        wait_gone(new, 1)
        assert not gate.socket_path.exists()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_upgrades_can_follow_one_another_while_the_first_daemon_still_streams(engine: str) -> None:
    with gateway(workers=[engine]) as gate:
        descriptors = descriptors_of(gate.main_pid)
        with Client(address_of(gate)) as client:
            client.sock.sendall(stream_of(OUTLASTING_S))
            assert client.read_head()[":status"] == "200"
            for _ in range(3):
                upgraded(gate)
            assert gate.process.poll() is None, "it has a stream to finish"
            answer = client.read_to_end()
            assert answer.endswith(LAST_CHUNK)
        assert gate.wait_ended(5) == 0
        wait_gone(gate.successors[:-1], 5)
        assert descriptors_of(gate.main_pid) == descriptors, "three upgrades have left as much as none"


@pytest.mark.slow
def test_no_request_notices(quick_engines: list[str]) -> None:
    """Kept-alive connections, and connections for one request each."""
    once = request({"model": "sim-model", "prompt": "count", "max_tokens": 1}, headers={"Connection": "close"})
    with (
        gateway(workers=quick_engines) as gate,
        Traffic(address_of(gate), completion(), connections=8) as kept,
        Traffic(address_of(gate), once, connections=4) as single,
    ):
        gate.wait_until("the load runs", lambda: min(kept.report.answered, single.report.answered) > 200)
        upgraded(gate)
        counts = kept.report.answered, single.report.answered
        gate.wait_until(
            "it goes on", lambda: kept.report.answered > counts[0] + 200 and single.report.answered > counts[1] + 200
        )
        for traffic in (kept, single):
            report = traffic.stop()
            assert report.failures == []
            assert report.backwards == []


@pytest.mark.slow
def test_a_setting_that_needs_a_restart_is_listed_and_applied(tmp_path: Path, quick_engines: list[str]) -> None:
    settings = tmp_path / "pointsman.toml"
    settings.write_text("max_payload_size = 100000\n")
    large = request({"model": "sim-model", "prompt": "x" * 5000, "max_tokens": 1})
    with gateway("--config", str(settings), folder=tmp_path, workers=quick_engines[:1]) as gate:
        settings.write_text("max_payload_size = 4096\n")
        gate.wait_until("it is listed", lambda: pending(gate) == ["max_payload_size"])
        with Client(address_of(gate)) as client:
            assert client.ask(large).status == 200, "it is not applied by itself"
        upgraded(gate)
        assert pending(gate) == []
        with Client(address_of(gate)) as client:
            assert client.ask(large).status == 413


def pending(gate: Gateway) -> list[str]:
    return list(gate.admin("GET", "/config")[1]["pending_restart"])


@pytest.mark.slow
def test_the_number_of_shards_changes_under_load(tmp_path: Path, quick_engines: list[str]) -> None:
    """Up and down: a listening socket that were closed would reset what waits in its queue."""
    settings = tmp_path / "pointsman.toml"
    settings.write_text("shards = 2\n")
    once = request({"model": "sim-model", "prompt": "count", "max_tokens": 1}, headers={"Connection": "close"})
    with (
        gateway("--config", str(settings), folder=tmp_path, workers=quick_engines, shards=None) as gate,
        Traffic(address_of(gate), completion(), connections=8) as kept,
        Traffic(address_of(gate), once, connections=8) as single,
    ):
        for shards in (4, 1, 3, 2):
            settings.write_text(f"shards = {shards}\n")
            gate.wait_until("the change is seen", lambda: pending(gate) == ["shards"])
            upgraded(gate)
            assert len(gate.pids("shard")) == shards
        for traffic in (kept, single):
            assert traffic.stop().failures == []


class ByFile(Gateway):
    """The addresses come from a settings file."""

    def addresses(self) -> list[str]:
        return []


@pytest.mark.slow
def test_other_addresses_are_opened_and_the_old_ones_given_up(
    tmp_path: Path, quick_engines: list[str], free_port: int
) -> None:
    """Refused from then on, not left to hang; who asked for the upgrade hears of it on the old admin socket."""
    settings = tmp_path / "pointsman.toml"
    admin = [f"unix:{tmp_path}/run/admin.sock", "127.0.0.1:0"]
    settings.write_text(f"port = 0\nadmin_listen = {admin}\n")
    gate = ByFile(tmp_path, ["--config", str(settings), "--shards", "2", "--workers", quick_engines[0]])
    try:
        gate.wait_ready()
        old = address_of(gate)
        settings.write_text(f'port = {free_port}\nadmin_listen = ["unix:{tmp_path}/run/other.sock"]\n')
        done = gate.upgrade()
        assert done.returncode == 0, done.stderr
        assert gate.wait_ended(5) == 0
        assert [path.name for path in (tmp_path / "run").glob("*.sock")] == ["other.sock"]
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(old, timeout=1)
        with Client(("127.0.0.1", free_port)) as client:
            assert client.ask(completion()).status == 200
        assert gate.stop() == 0
        assert list((tmp_path / "run").glob("*.sock")) == []
    except BaseException:
        gate.kill()
        raise


# --- it fails


def test_a_version_that_refuses_its_settings_changes_nothing(tmp_path: Path, quick_engines: list[str]) -> None:
    settings = tmp_path / "pointsman.toml"
    settings.write_text("# none yet\n")
    with (
        gateway("--config", str(settings), folder=tmp_path, workers=quick_engines) as gate,
        Traffic(address_of(gate), completion(), connections=4) as traffic,
    ):
        before = processes_of(gate)
        settings.write_text("\nprot = 8700\n")
        done = gate.upgrade()
        assert done.returncode == FAILED
        assert f"{settings}:2:1: prot: " in done.stderr
        assert "goes on unchanged" in done.stderr
        assert_unharmed(gate, before)
        assert processes_of(gate) == before, "control has not even been asked"
        assert traffic.stop().failures == []


BREAKAGES = {
    "it cannot start": ("os._exit(1)", "it ended before it was ready", 30.0),
    "its shards cannot boot": (
        "if 'pointsman.daemon.shard' in sys.orig_argv: sys.modules['httptools'] = None",
        "shard",
        30.0,
    ),
    "its control process hangs": (
        "if 'pointsman.daemon.control' in sys.orig_argv: time.sleep(60)",
        "not ready within 2 s",
        2.0,
    ),
    "its control process dies when it is to take over": (
        """
import pointsman.daemon.workers.state as state
def lock(*_): os._exit(3)
if 'pointsman.daemon.control' in sys.orig_argv: state.WorkerState.lock = lock
""",
        "control cannot boot",
        30.0,
    ),
    "its control process hangs when it is to take over": (
        """
import pointsman.daemon.workers.state as state
def lock(*_): time.sleep(60)
if 'pointsman.daemon.control' in sys.orig_argv: state.WorkerState.lock = lock
""",
        "not ready within 3 s",
        3.0,
    ),
}


FIRST, *OTHERS = BREAKAGES


@pytest.mark.parametrize("name", [FIRST, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)])
def test_a_version_that_does_not_come_up_is_ended(tmp_path: Path, quick_engines: list[str], name: str) -> None:
    """And when what was wrong with it is mended, it takes over."""
    code, reason, timeout_s = BREAKAGES[name]
    environment, flag = broken(tmp_path, code)
    with (
        gateway(folder=tmp_path, environment=environment, workers=quick_engines[:1]) as gate,
        Traffic(address_of(gate), completion(), connections=4) as traffic,
    ):
        before = processes_of(gate)
        flag.touch()
        started = time.monotonic()
        done = gate.upgrade("--timeout", str(timeout_s))
        took = time.monotonic() - started
        flag.unlink()
        assert done.returncode == FAILED
        assert reason in done.stderr
        assert took < timeout_s + 2 * leeway()
        assert_unharmed(gate, before)
        added = gate.add_worker(quick_engines[1])["worker_id"]
        upgraded(gate)
        assert added in [worker["id"] for worker in gate.workers()]
        assert traffic.stop().failures == []


HANGS = "if 'pointsman.daemon.control' in sys.orig_argv: time.sleep(60)"


@pytest.mark.slow
def test_one_upgrade_at_a_time(tmp_path: Path, quick_engines: list[str]) -> None:
    environment, flag = broken(tmp_path, HANGS)
    with gateway(folder=tmp_path, environment=environment, workers=quick_engines[:1]) as gate:
        before = processes_of(gate)
        flag.touch()
        with ThreadPoolExecutor(1) as pool:
            first = pool.submit(gate.upgrade, "--timeout", "4")
            gate.wait_log("upgrade_started")
            second = gate.upgrade()
            assert second.returncode == REFUSED
            assert "another upgrade is under way" in second.stderr
            assert first.result().returncode == FAILED
        assert_unharmed(gate, before)


@pytest.mark.slow
def test_the_daemon_can_be_stopped_during_an_upgrade(tmp_path: Path, quick_engines: list[str]) -> None:
    environment, flag = broken(tmp_path, HANGS)
    with gateway(folder=tmp_path, environment=environment, workers=quick_engines[:1]) as gate:
        processes = processes_of(gate)
        flag.touch()
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(gate.upgrade)
            gate.wait_log("upgrade_started")
            gate.signal(signal.SIGTERM)
            assert gate.wait_ended(10) == 0
            assert "the daemon is stopping" in asked.result().stderr
        wait_gone([*processes, *gate.successors], 2)
        assert not gate.socket_path.exists()


@pytest.mark.slow
def test_a_killed_supervisor_takes_its_successor_with_it(tmp_path: Path, quick_engines: list[str]) -> None:
    """Who it was that should serve is not decided by chance: the service manager starts the daemon anew."""
    environment, flag = broken(tmp_path, HANGS)
    with gateway(folder=tmp_path, environment=environment, workers=quick_engines[:1]) as gate:
        flag.touch()
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(gate.upgrade)
            gate.wait_log("upgrade_started")
            (successor,) = gate.successors
            wait_until("it has begun", lambda: children_of(successor) >= 3, 10)
            gate.process.kill()
            assert asked.result().returncode == 69
            wait_gone([successor], 2)
        gate.process.wait()


def children_of(pid: int) -> int:
    return len(Path(f"/proc/{pid}/task/{pid}/children").read_text().split())


# --- after it


@pytest.mark.slow
def test_a_stop_ends_the_daemon_that_still_streams_too(engine: str) -> None:
    """With the grace of a stop: the stream of 1.5 s ends as it should, the endless one is cut honestly."""
    with gateway("--shutdown-grace-s", "3", workers=[engine]) as gate:
        with Client(address_of(gate)) as short, Client(address_of(gate)) as endless:
            for client, wire in ((short, stream_of(2.5)), (endless, completion(max_tokens=100_000, stream=True))):
                client.sock.sendall(wire)
                assert client.read_head()[":status"] == "200"
            upgraded(gate)
            started = time.monotonic()
            gate.signal(signal.SIGTERM)
            assert short.read_to_end().endswith(LAST_CHUNK)
            cut = endless.read_to_end()
            assert 2.5 < time.monotonic() - started < 3 + 2 * leeway()
        assert b"[DONE]" not in cut
        assert b'data: {"error"' in cut
        assert gate.wait_ended(5) == 0
        assert wait_for_orphan(gate.main_pid, 5) == 0


@pytest.mark.slow
def test_a_second_signal_ends_the_daemon_that_still_streams_at_once(engine: str) -> None:
    with gateway(workers=[engine]) as gate, Client(address_of(gate)) as endless:
        endless.sock.sendall(completion(max_tokens=100_000, stream=True))
        assert endless.read_head()[":status"] == "200"
        upgraded(gate)
        gate.signal(signal.SIGTERM)
        gate.wait_log("retiring_faster", timeout_s=2)
        started = time.monotonic()
        gate.signal(signal.SIGTERM)
        assert gate.wait_ended(2) == 0
        assert wait_for_orphan(gate.main_pid, 2) == 0
        assert time.monotonic() - started < 1 * leeway()


# --- systemd


@pytest.mark.slow
def test_systemd_hears_who_the_main_process_is(tmp_path: Path, quick_engines: list[str]) -> None:
    """MAINPID is the old one's last word, READY the new one's first; whoever is the main process feeds the watchdog."""
    with socket.create_server(("127.0.0.1", 0), backlog=128) as data, ServiceManager(tmp_path, [data], 2.0) as manager:
        address = data.getsockname()
        manager.start("--workers", quick_engines[0])
        manager.wait_for(lambda line: "1/1 workers" in line, "the worker is up")
        first = manager.main_pid
        with Traffic(address, completion(), connections=4) as traffic, ThreadPoolExecutor(1) as pool:
            asked = pool.submit(upgrade_at, manager.admin_socket)
            named = manager.wait_for(lambda line: line.startswith("MAINPID="), "the new main process")
            manager.wait("READY=1")
            manager.wait("WATCHDOG=1")
            assert asked.result().returncode == 0
            assert named == f"MAINPID={manager.main_pid}"
            assert manager.main_pid != first
            assert manager.main is not None
            assert manager.main.wait(30) == 0
            fed = manager.listen_until(time.monotonic() + 3.0).count("WATCHDOG=1")
            assert fed >= 2, "every second"
            report = traffic.stop()
        assert report.failures == []
        assert manager.strangers == [], "nobody but the main process has spoken"
        assert manager.stop() == 0
        assert manager.heard.count("READY=1") == 2


def upgrade_at(admin: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pointsman.daemon.main", "upgrade", "--admin", f"unix:{admin}"]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
