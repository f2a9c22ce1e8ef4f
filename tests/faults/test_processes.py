"""Any process may die, or be stopped, at any time: who notices, how soon the place is filled, and what nobody loses."""

from __future__ import annotations

import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from functools import partial
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from pointsman.scripts.simulated_engine.launch import launch_engines
from tests.fakes.gateway import Gateway, gateway
from tests.fakes.leeway import leeway
from tests.fakes.processes import cpu_s, is_alive, is_stopped, mapped_files, wait_gone, wait_until
from tests.fakes.traffic import LAST_CHUNK, Client, Traffic, client_of_each, completion, shards_of_connections

HEAVY = ("aiohttp", "pydantic", "pydantic_core", "pydantic_settings", "watchfiles", "prometheus_client", "yaml")
ENDLESS = completion(max_tokens=100_000, stream=True)
DEADLINE_S = 10.0


@pytest.fixture(scope="module")
def engines() -> Iterator[list[str]]:
    with launch_engines(3) as running:
        yield [engine.url for engine in running]


@pytest.fixture(scope="module")
def paced_engine() -> Iterator[str]:
    """A token every 50 ms."""
    with launch_engines(1, "--preset", "h100-8b", "--speed", "0.14") as running:
        yield running[0].url


def address_of(gate: Gateway) -> tuple[str, int]:
    return gate.host, gate.port


def rows(gate: Gateway) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in gate.admin("GET", "/status")[1]["processes"]}


def is_all_ready(gate: Gateway) -> bool:
    return all(row["state"] == "ready" for row in rows(gate).values())


def is_replaced(gate: Gateway, name: str, pid: int) -> bool:
    """Another process has its place, and is ready. Control itself answers this: not while it is away."""
    try:
        row = rows(gate)[name]
    except OSError:
        return False
    return row["pid"] not in (0, pid) and row["state"] == "ready"


def kill_and_wait(gate: Gateway, name: str) -> float:
    """Seconds from the kill to the successor's `ready`."""
    gate.wait_until("all are ready", partial(is_all_ready, gate))
    pid = rows(gate)[name]["pid"]
    started = time.monotonic()
    os.kill(pid, signal.SIGKILL)
    wait_until("its successor is ready", partial(is_replaced, gate, name, pid), DEADLINE_S)
    return time.monotonic() - started


# --- shards


def test_a_killed_shard_is_back_in_300_ms(engines: list[str]) -> None:
    with gateway(workers=engines) as gate:
        took = [kill_and_wait(gate, f"shard-{turn % 2}") for turn in range(9)]
        assert sum(row["restarts"] for row in rows(gate).values()) == 9
    median = statistics.median(took)
    print(f"\nrespawn, idle: median {median * 1000:.0f} ms, worst {max(took) * 1000:.0f} ms")
    assert median <= 0.3 * leeway()


def test_a_killed_shard_is_back_in_a_second_under_load(engines: list[str]) -> None:
    with gateway(workers=engines) as gate, Traffic(address_of(gate), completion(), connections=32) as traffic:
        gate.wait_until("the load runs", lambda: traffic.report.answered > 500)
        took = [kill_and_wait(gate, f"shard-{turn % 2}") for turn in range(7)]
        report = traffic.stop()
        assert all(failure.what.startswith("connection lost") for failure in report.failures), report.failures
    median = statistics.median(took)
    print(f"\nrespawn, under load: median {median * 1000:.0f} ms, worst {max(took) * 1000:.0f} ms")
    assert median <= 1.0 * leeway()


def test_connections_made_while_a_shard_is_dead_are_served(engines: list[str]) -> None:
    """They wait in the queue of a socket that the supervisor keeps."""
    with gateway(workers=engines) as gate:
        for name in ("shard-0", "shard-1"):
            gate.wait_until("all are ready", partial(is_all_ready, gate))
            pid = rows(gate)[name]["pid"]
            os.kill(pid, signal.SIGKILL)
            with ExitStack() as stack:
                clients = [stack.enter_context(Client(address_of(gate))) for _ in range(24)]
                for client in clients:
                    client.sock.sendall(completion())
                assert [client.read().status for client in clients] == [200] * len(clients)
                now = gate.pids("shard")
                assert pid not in now
                served = set(shards_of_connections(now, gate.port).values())
                assert served == set(now), "the successor served what had waited for its predecessor"


def test_all_children_at_once(engines: list[str]) -> None:
    with gateway(workers=engines) as gate:
        before = ids(gate)
        generation = gate.admin("GET", "/config")[1]["generation"]
        children = gate.children()
        assert len(children) == 3
        for pid in children:
            os.kill(pid, signal.SIGKILL)
        wait_gone(children, 2)
        wait_until("all are back", lambda: is_answering(gate) and is_all_ready(gate), DEADLINE_S)
        assert ids(gate) == before
        with Client(address_of(gate)) as client:
            assert client.ask(completion()).generation == generation


def test_a_stopped_shard_is_replaced_while_the_other_one_serves(paced_engine: str) -> None:
    with ExitStack() as stack:
        gate = stack.enter_context(gateway(workers=[paced_engine]))
        victim, survivor = pids = gate.pids("shard")
        name = next(name for name, row in rows(gate).items() if row["pid"] == victim)
        streams = stack.enter_context(client_of_each(pids, address_of(gate)))
        others = stack.enter_context(client_of_each(pids, address_of(gate)))
        for client in streams.values():
            client.sock.sendall(ENDLESS)
            assert client.read_head()[":status"] == "200"
        assert gate.in_flight() == 2

        stopped_at = time.time()
        os.kill(victim, signal.SIGSTOP)
        slowest = ask_until(others[survivor], partial(is_replaced, gate, name, victim))
        noticed = gate.wait_log("process_stuck", pid=victim)["ts"] - stopped_at
        replaced = time.time() - stopped_at

        assert gate.wait_log("process_died", process=name.replace("-", " "))["requests_lost"] == 1
        gate.wait_until("what it had booked is given back", lambda: gate.in_flight() == 1, 1)
        assert_was_cut(streams[victim])
        assert streams[survivor].read_more(), "the other shard's stream goes on"
        assert survivor in gate.pids("shard")
        streams[survivor].sock.close()
        gate.wait_until("nothing in flight", lambda: gate.in_flight() == 0)
        assert [(worker["in_flight"], worker["in_flight_bytes"]) for worker in gate.workers()] == [(0, 0)]
    print(f"\nstopped shard: noticed after {noticed:.2f} s, replaced after {replaced:.2f} s; ", end="")
    print(f"slowest answer of the other one {slowest * 1000:.0f} ms")
    assert noticed <= 2.0 * leeway()
    assert slowest < 0.5 * leeway()


def assert_was_cut(stream: Client) -> None:
    answer = b""
    with suppress(ConnectionResetError):
        answer = stream.read_to_end()
    assert not answer.endswith(LAST_CHUNK)
    assert b"[DONE]" not in answer


def ask_until(client: Client, holds: Callable[[], bool]) -> float:
    """Requests without a pause; returns how long the slowest answer took, in seconds."""
    slowest = 0.0
    deadline = time.monotonic() + DEADLINE_S * leeway()
    while not holds():
        started = time.monotonic()
        assert started < deadline
        assert client.ask(completion()).status == 200
        slowest = max(slowest, time.monotonic() - started)
    return slowest


def test_a_worker_is_added_although_a_shard_is_stopped(engines: list[str]) -> None:
    """All shards or none: the stopped one is replaced, and its successor runs with the worker."""
    with gateway(workers=engines[:1]) as gate:
        victim = gate.pids("shard")[0]
        os.kill(victim, signal.SIGSTOP)
        started = time.monotonic()
        added = gate.add_worker(engines[1])
        print(f"\nadded after {time.monotonic() - started:.2f} s")
        pids = gate.pids("shard")
        assert victim not in pids
        wait_until("all are ready", partial(is_all_ready, gate), DEADLINE_S)
        gate.wait_healthy(2)  # it is there; whether it is up is for its first probe to say
        with client_of_each(gate.pids("shard"), address_of(gate)) as clients:
            for client in clients.values():
                # one prompt again and again would stay with whoever has it
                answers = [client.ask(completion(f"{number} little engines")) for number in range(30)]
                assert added["worker_id"] in {answer.headers["x-pointsman-worker"] for answer in answers}


# --- control


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_control_goes_and_comes_back(engines: list[str], number: signal.Signals) -> None:
    """The data plane goes on; workers keep ids, slots and counts, and generations go on upward."""
    with (
        gateway(workers=engines[:1]) as gate,
        Traffic(address_of(gate), completion(), connections=8) as traffic,
    ):
        added = gate.add_worker(engines[1], weight=2)["worker_id"]
        gone = gate.add_worker(engines[2])["worker_id"]
        assert gate.admin("DELETE", f"/workers/{gone}")[0] == 202
        before, generation = ids(gate), gate.admin("GET", "/config")[1]["generation"]
        control = rows(gate)["control"]["pid"]
        started, answered = time.monotonic(), traffic.report.answered
        os.kill(control, number)
        wait_until("control is back", partial(is_replaced_by_itself, gate, control), DEADLINE_S)
        took = time.monotonic() - started
        assert traffic.report.answered - answered > 50, "requests are answered meanwhile"
        assert not is_alive(control)

        assert ids(gate) == before
        assert {worker["id"]: worker["weight"] for worker in gate.workers()}[added] == 2
        assert gate.admin("GET", "/config")[1]["generation"] == generation
        assert all(worker["is_healthy"] for worker in gate.workers())
        assert gate.add_worker(engines[2])["worker_id"] != gone
        after = gate.admin("GET", "/config")[1]["generation"]
        assert after > generation
        assert {row["generation"] for row in rows(gate).values()} == {after}
        report = traffic.stop()
        assert report.failures == []
        assert report.backwards == []
    print(f"\ncontrol, {number.name}: back after {took:.2f} s")
    assert took < (5.0 if number == signal.SIGKILL else 7.0) * leeway()


def ids(gate: Gateway) -> dict[str, str]:
    return {worker["url"]: worker["id"] for worker in gate.workers()}


def is_answering(gate: Gateway) -> bool:
    try:
        return gate.admin("GET", "/status", timeout_s=0.5)[0] == 200
    except OSError:
        return False


def is_replaced_by_itself(gate: Gateway, pid: int) -> bool:
    """Of control, which answers the question; a stopped one does not."""
    return is_answering(gate) and is_replaced(gate, "control", pid)


def test_what_was_accepted_survives_control(engines: list[str]) -> None:
    """Killed in the middle of changes: each one that was answered with 202 is in force afterwards."""
    with gateway(workers=engines[:1]) as gate:
        urls = [f"http://127.0.0.1:{port}/{n}" for n, port in enumerate([9] * 5)]
        for turn, url in enumerate(urls):
            known = ids(gate)
            control = rows(gate)["control"]["pid"]
            accepted = gate.add_worker(url)["worker_id"]
            removed = known.get(urls[turn - 2]) if turn >= 2 else None
            if removed:
                assert gate.admin("DELETE", f"/workers/{removed}")[0] == 202
            os.kill(control, signal.SIGKILL)
            wait_until("control is back", partial(is_replaced_by_itself, gate, control), DEADLINE_S)
            now = ids(gate)
            assert now[url] == accepted
            assert removed not in now.values()
            assert {url: known[url] for url in known if known[url] != removed}.items() <= now.items()


def test_generations_meet_again_when_everything_dies_under_changes(engines: list[str]) -> None:
    """Shards and control are killed in turn while workers come and go: no answer of an older generation, none failed
    but those that ran on a killed shard, and in the end all processes run the same generation."""
    with (
        gateway(workers=engines[:2]) as gate,
        Traffic(address_of(gate), completion(), connections=8) as traffic,
    ):
        for turn in range(6):
            name = ("shard-0", "control", "shard-1")[turn % 3]
            change = threading.Thread(target=_add_and_remove, args=(gate, engines[2]))
            change.start()
            os.kill(rows(gate)[name]["pid"], signal.SIGKILL)
            change.join(DEADLINE_S)
            assert not change.is_alive()
            wait_until("all are ready", lambda: is_answering(gate) and is_all_ready(gate), DEADLINE_S)
        gate.wait_until(
            "one generation", lambda: len({row["generation"] for row in rows(gate).values()}) == 1, DEADLINE_S
        )
        report = traffic.stop()
        assert report.backwards == []
        assert all(failure.what.startswith("connection lost") for failure in report.failures), report.failures


def _add_and_remove(gate: Gateway, url: str) -> None:
    """As far as control is there to do it."""
    for _ in range(3):
        with suppress(OSError, HTTPException):
            gate.admin("POST", "/workers", {"url": url})
            gate.admin("DELETE", f"/workers/{quote(url, safe='')}")


# --- supervisor


def test_nothing_outlives_a_killed_supervisor(engines: list[str], tmp_path: Path) -> None:
    first = Gateway(tmp_path, ["--shards", "2", "--workers", engines[0]])
    first.wait_ready()
    kept = first.add_worker(engines[1])["worker_id"]
    children = first.children()
    assert len(children) == 3
    with Client(address_of(first)) as client:
        assert client.get("/health").status == 200
        started = time.monotonic()
        first.process.kill()
        first.process.wait()
        took = wait_gone(children, 1.0)
    first.close()
    print(f"\nchildren gone after {took * 1000:.0f} ms")
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(address_of(first))

    with gateway("--port", str(first.port), "--workers", engines[0], folder=tmp_path) as second:
        print(f"a new daemon is ready {time.monotonic() - started:.2f} s after the kill")
        second.wait_healthy(2)
        assert second.port == first.port
        assert ids(second)[engines[1]] == kept
        with Client(address_of(second)) as client:
            assert client.ask(completion()).status == 200


def test_children_that_are_stopped_do_not_outlive_it_either(engines: list[str], tmp_path: Path) -> None:
    gate = Gateway(tmp_path, ["--shards", "2", "--workers", engines[0]])
    gate.wait_ready()
    children = gate.children()
    for pid in children:
        os.kill(pid, signal.SIGSTOP)
    wait_until("all are stopped", lambda: all(map(is_stopped, children)), 1)
    gate.process.kill()
    gate.process.wait()
    wait_gone(children, 1.0)
    gate.close()


def test_a_stopped_supervisor_is_not_missed(engines: list[str]) -> None:
    """Requests and probes go on without it; what needs it waits, and is done when it is back."""
    with (
        gateway(workers=engines[:1]) as gate,
        Traffic(address_of(gate), completion(), connections=8) as traffic,
    ):
        children = gate.children()
        gate.signal(signal.SIGSTOP)
        wait_until("it is stopped", lambda: is_stopped(gate.process.pid), 1)
        before = traffic.report.answered
        with ThreadPoolExecutor(1) as pool:
            adding = pool.submit(gate.admin, "POST", "/workers", {"url": engines[1]})
            time.sleep(2.5)  # longer than any heartbeat may be silent
            assert not adding.done()
            gate.signal(signal.SIGCONT)
            assert adding.result(DEADLINE_S)[0] == 202
        assert traffic.report.answered - before > 100
        gate.wait_log("was_paused")
        assert gate.children() == children
        assert traffic.stop().failures == []


def test_a_pause_of_everything_kills_nobody(engines: list[str]) -> None:
    """Ctrl-Z and `fg`, a frozen cgroup, a paused machine: all were silent, and none is at fault."""
    with gateway(workers=engines) as gate, Client(address_of(gate)) as client:
        assert client.ask(completion()).status == 200
        tree = [gate.process.pid, *gate.children()]
        for pid in tree:
            os.kill(pid, signal.SIGSTOP)
        wait_until("all are stopped", lambda: all(map(is_stopped, tree)), 1)
        time.sleep(2.5)  # longer than any heartbeat may be silent
        for pid in tree:
            os.kill(pid, signal.SIGCONT)
        gate.wait_log("was_paused")
        assert client.ask(completion()).status == 200
        hearts = partial(hearts_beat, gate)
        gate.wait_until("all hearts beat again", hearts)
        assert [gate.process.pid, *gate.children()] == tree
        time.sleep(2.0)  # the supervisor's patience is over
        assert hearts()
        assert [gate.process.pid, *gate.children()] == tree
        assert not any(line["event"] == "process_stuck" for line in gate.log)


def hearts_beat(gate: Gateway) -> bool:
    return all(row["heartbeat_age_s"] < 0.6 for row in rows(gate).values())


# --- what cannot start

BREAK_SHARDS = """
import errno, mmap, os, resource, sys
def refuse(*_):
    raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
if "pointsman.daemon.shard" in sys.orig_argv and os.path.exists({flag!r}):
    {how}
"""
NO_MEMORY = "mmap.mmap = refuse"
FEW_DESCRIPTORS = """
    free = [fd for fd in range(256) if not os.path.exists(f"/proc/self/fd/{fd}")]
    resource.setrlimit(resource.RLIMIT_NOFILE, (free[3], free[3]))
"""
"""enough to import everything, too few for an event loop: libuv aborts the process"""
NO_LIBRARY = "sys.modules['httptools'] = None"


def breaking_shards(folder: Path, how: str) -> tuple[dict[str, str], Path]:
    """An environment in which shards, and only they, cannot start while the flag file is there."""
    flag = folder / "break"
    (folder / "sitecustomize.py").write_text(BREAK_SHARDS.format(flag=str(flag), how=how))
    return {"PYTHONPATH": str(folder)}, flag


@pytest.mark.parametrize(
    ("how", "reason", "deaths"),
    [(NO_MEMORY, "cannot boot", 2), (FEW_DESCRIPTORS, "died 5 times", 9), (NO_LIBRARY, "died 5 times", 9)],
    ids=["no memory", "few descriptors", "no library"],
)
def test_a_shard_that_cannot_boot_ends_the_daemon(tmp_path: Path, how: str, reason: str, deaths: int) -> None:
    """At once if it says so itself, after a few tries if it just dies."""
    environment, flag = breaking_shards(tmp_path, how)
    flag.touch()
    gate = Gateway(tmp_path, ["--shards", "2"], environment)
    assert gate.wait_ended(DEADLINE_S) == 70
    gate.close()
    assert reason in gate.wait_log("stopping")["reason"]
    died = [line for line in gate.log if line["event"] == "process_died" and line["process"].startswith("shard")]
    assert 1 <= len(died) <= deaths
    assert not gate.socket_path.exists()


def test_a_successor_that_cannot_boot_ends_the_daemon(tmp_path: Path, engines: list[str]) -> None:
    environment, flag = breaking_shards(tmp_path, NO_MEMORY)
    with gateway(folder=tmp_path, environment=environment, workers=engines) as gate:
        flag.touch()
        children = gate.children()
        os.kill(gate.pids("shard")[0], signal.SIGKILL)
        assert gate.wait_ended(DEADLINE_S) == 70
        assert "cannot boot" in gate.wait_log("stopping")["reason"]
        assert gate.wait_log("shard_boot_failed")["reason"]
        wait_gone(children, 1)


def failed_start(folder: Path, *arguments: str, **environment: str) -> tuple[int, str]:
    """(exit code, what it said)"""
    folder.mkdir(exist_ok=True)
    gate = Gateway(folder, ["--shards", "2", *arguments], environment)
    code = gate.wait_ended(DEADLINE_S)
    gate.close()
    texts = [line.get("text") or line.get("reason") or "" for line in gate.log]
    return code, "\n".join(texts)


@pytest.mark.parametrize("flag", ["--port", "--admin-listen"])
def test_a_port_in_use_is_named_with_its_flag(tmp_path: Path, flag: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
        where = str(port) if flag == "--port" else f"127.0.0.1:{port}"
        code, said = failed_start(tmp_path, flag, where)
    assert code == 69
    assert f"port {port} " in said
    assert flag in said
    assert "Traceback" not in said
    assert not (tmp_path / "run" / "admin.sock").exists()


def test_a_second_daemon_is_refused(tmp_path: Path, engines: list[str]) -> None:
    """By port, by runtime directory and by state directory; the first one does not notice."""
    with gateway(folder=tmp_path, workers=engines) as gate:
        other = tmp_path / "other"
        code, said = failed_start(other, "--port", str(gate.port))
        assert (code, f"port {gate.port} " in said, "--port" in said) == (69, True, True)

        code, said = failed_start(tmp_path)
        assert code == 69
        assert f"another pointsman listens on {gate.socket_path}" in said

        code, said = failed_start(other, STATE_DIRECTORY=str(tmp_path / "state"))
        assert code == 70
        assert f"state directory {tmp_path / 'state'} is in use by another daemon (see --state-dir)" in said

        assert is_all_ready(gate)
        assert sum(row["restarts"] for row in rows(gate).values()) == 0
        with Client(address_of(gate)) as client:
            assert client.ask(completion()).status == 200


# --- what it costs


def test_an_idle_daemon_costs_next_to_nothing(engines: list[str]) -> None:
    """The promise is 0.5 % of a core; processor time is dearer where others use the caches, too."""
    with gateway(workers=engines) as gate:
        tree = [gate.process.pid, *gate.children()]
        names = {row["pid"]: name for name, row in rows(gate).items()} | {gate.process.pid: "supervisor"}
        threading.Event().wait(1.0)  # the first probes are over
        before = {pid: cpu_s([pid]) for pid in tree}
        started = time.monotonic()
        threading.Event().wait(10.0)  # what is measured
        elapsed = time.monotonic() - started
        percents = {names[pid]: 100 * (cpu_s([pid]) - before[pid]) / elapsed for pid in tree}
        probed = [worker["last_probe"] for worker in gate.workers()]
    total = sum(percents.values())
    print(f"\nidle: {total:.2f} % of a core ({', '.join(f'{name} {value:.2f}' for name, value in percents.items())})")
    assert min(probed) > time.time() - 7 * leeway(), "its workers were probed"
    assert total <= 0.5 * leeway()


@pytest.mark.parametrize("module", ["pointsman.daemon.shard", "pointsman.daemon.supervisor.__main__"])
def test_shard_and_supervisor_stay_light(module: str) -> None:
    code = f"import json, sys, {module}; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, check=True, timeout=90)
    loaded = {name.partition(".")[0] for name in json.loads(done.stdout)}
    assert not loaded & set(HEAVY)


def test_live_shards_and_supervisor_have_no_heavy_library_mapped(engines: list[str]) -> None:
    """After they have served requests and a reload: what is imported late would show here."""
    with gateway(workers=engines) as gate, client_of_each(gate.pids("shard"), address_of(gate)) as clients:
        for client in clients.values():
            assert client.ask(completion()).status == 200
        assert gate.admin("POST", "/config/reload")[0] == 200
        control = rows(gate)["control"]["pid"]
        assert heavy_libraries(control), "control has them, so this test would see them"
        for pid in (gate.process.pid, *gate.pids("shard")):
            assert heavy_libraries(pid) == set()


def heavy_libraries(pid: int) -> set[str]:
    return {name for name in mapped_files(pid) if any(f"/{library}/" in name for library in HEAVY)}
