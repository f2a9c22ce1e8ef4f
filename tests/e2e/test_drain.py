"""Workers taken out of service: no new requests on any shard, and an end of those that run, or not."""

from __future__ import annotations

import itertools
import json
import os
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from pointsman.scripts.simulated_engine.launch import launch_engines
from tests.fakes.edits import write_and_rename
from tests.fakes.gateway import Gateway, gateway
from tests.fakes.leeway import leeway
from tests.fakes.processes import wait_gone
from tests.fakes.traffic import LAST_CHUNK, Client, completion

NUMBERS = itertools.count()
LONG = 20_000
"""tokens of a stream that outlives every test"""
SLOWLY = ("--max-model-tokens", "30000", "--preset", "h100-8b", "--speed", "0.2")
"""Nobody's buffers fill, so what there is of a stream ends between two chunks."""
SILENT = '{"kind": "hang", "path": "/v1/completions"}'


def worker_of(head: dict[str, str]) -> str:
    return f"http://{head['target-pod']}"


def one(key: str) -> str:
    return f"/workers/{quote(key, safe='')}"


def asked(gate: Gateway, count: int = 40) -> list[str]:
    """Whom `count` short requests went to, a connection each, so that both shards have their part."""
    found = []
    for _ in range(count):
        with Client((gate.host, gate.port)) as client:
            reply = client.ask(completion(f"{next(NUMBERS)}: never asked before", max_tokens=1))
        assert reply.status == 200, reply.body
        found.append(worker_of(reply.headers))
    return found


@contextmanager
def long_streams(gate: Gateway, count: int) -> Iterator[list[tuple[Client, str]]]:
    """Streams under way, with their workers."""
    with ExitStack() as stack:
        found = []
        for _ in range(count):
            client = stack.enter_context(Client((gate.host, gate.port)))
            client.sock.sendall(completion(f"{next(NUMBERS)}: tell me all you know", max_tokens=LONG, stream=True))
            head = client.read_head()
            assert head[":status"] == "200"
            found.append((client, worker_of(head)))
        yield found


@contextmanager
def drained_with_streams() -> Iterator[tuple[Gateway, str, Any, Any]]:
    """A daemon, one of its two workers, the streams at it, and those at the other one."""
    with launch_engines(2, *SLOWLY) as engines, ExitStack() as stack:
        gate = stack.enter_context(gateway())
        for engine in engines:
            gate.add_worker(engine.url)
        streams = stack.enter_context(long_streams(gate, 6))
        drained = streams[0][1]
        here = [client for client, worker in streams if worker == drained]
        there = [client for client, worker in streams if worker != drained]
        assert here and there
        yield gate, drained, here, there


def goes_on(clients: Sequence[Client]) -> bool:
    """Every one of them gets more of its stream."""
    for client in clients:
        client.rest = b""
        data = b""
        while data.count(b"data: ") < 3:
            more = client.read_more()
            assert more, f"the stream ended: {data[-300:]!r}"
            data += more
        assert b"worker_drained" not in data
    return True


def are_cut(clients: Sequence[Client]) -> bool:
    """Every stream ends with the error event, and not as if it were complete."""
    for client in clients:
        data = client.rest + client.read_to_end()
        last = data.rpartition(b"data: ")[2].partition(b"\n")[0]
        assert b'"code":"worker_drained"' in last, data[-300:]
        assert not data.endswith(LAST_CHUNK) and b"[DONE]" not in data
    return True


@pytest.mark.slow
def test_a_drained_worker_gets_nothing_new_and_shows_how_far_it_is() -> None:
    with drained_with_streams() as (gate, drained, here, there):
        status, answer = gate.admin("POST", f"{one(drained)}/drain")
        assert status == 202
        assert answer["message"] == f"Worker {drained} gets no new requests; {len(here)} running requests go on"
        assert drained not in asked(gate)
        shown = gate.admin("GET", one(drained))[1]
        assert (shown["status"], shown["is_healthy"], shown["in_flight"]) == ("draining", False, len(here))
        assert shown["drain"].items() >= {"deadline": None, "then": "keep", "is_removed": False}.items()
        assert abs(time.time() - shown["drain"]["since"]) < 10
        first = shown["oldest_s"]
        assert 0 < first < 60
        gate.wait_until("it gets older", lambda: gate.admin("GET", one(drained))[1]["oldest_s"] > first)
        (listed,) = gate.admin("GET", "/status")[1]["draining"]
        assert (listed["url"], listed["in_flight"]) == (drained, len(here))
        assert [worker["url"] for worker in gate.workers("?state=draining")] == [drained]
        assert goes_on(here) and goes_on(there)
        for client in here:
            client.sock.close()
        assert gate.wait_log("worker_drained")["worker"] == drained
        gate.wait_until("it is empty", lambda: gate.admin("GET", one(drained))[1]["oldest_s"] is None)
        status, answer = gate.admin("POST", f"{one(drained)}/undrain")
        assert (status, answer["worker"]["status"], answer["worker"]["drain"]) == (200, "ready", None)
        gate.wait_until("it gets requests again", lambda: drained in asked(gate, 5))


def test_at_the_deadline_streams_are_cut_with_an_event_and_others_get_503() -> None:
    with ExitStack() as stack:
        streaming, silent = (
            stack.enter_context(launch_engines(1, *SLOWLY))[0],
            stack.enter_context(launch_engines(1, "--fault", SILENT))[0],
        )
        gate = stack.enter_context(gateway("--disable-retries", workers=[streaming.url, silent.url]))
        clients = stack.enter_context(streams_and_questions(gate, 12))
        for engine in (streaming, silent):
            status, answer = gate.admin("POST", f"{one(engine.url)}/drain", {"deadline_s": 0.5})
            assert status == 202 and "running requests have 0.5 s" in answer["message"]
        drained_at = time.monotonic()
        cut = refused = 0
        for client in clients:
            head = client.read_head()
            if head[":status"] == "200":
                assert are_cut([client])
                cut += 1
            else:
                size = int(head["content-length"])
                while len(client.rest) < size:
                    client.rest += client.read_more()
                assert (head[":status"], json.loads(client.rest)["error"]["code"]) == ("503", "worker_drained")
                assert head["retry-after"] == "1"
                refused += 1
        took = time.monotonic() - drained_at
        assert cut > 0 and refused > 0
        assert 0.3 < took < 3.0 * leeway()
        gate.wait_until("nothing is in flight", lambda: gate.in_flight() == 0)
        gate.wait_log("request", end="drained", status=200)
        gate.wait_log("request", end="drained", status=503)


@contextmanager
def streams_and_questions(gate: Gateway, count: int) -> Iterator[list[Client]]:
    """Requests that have been sent, half of them streams, until every worker has some; answers are not read."""
    with ExitStack() as stack:
        clients = [stack.enter_context(Client((gate.host, gate.port))) for _ in range(count)]
        for number, client in enumerate(clients):
            client.sock.sendall(completion(f"{number} of many", max_tokens=LONG, stream=True))
        gate.wait_until("all are at workers", lambda: gate.in_flight() == count)
        assert all(worker["in_flight"] for worker in gate.workers())
        yield clients


def test_with_keep_what_runs_is_left_alone() -> None:
    with drained_with_streams() as (gate, drained, here, _):
        gate.admin("POST", f"{one(drained)}/drain", {"deadline_s": 0.2, "then": "keep"})
        deadline = gate.admin("GET", one(drained))[1]["drain"]["deadline"]
        gate.wait_until("the deadline is over", lambda: time.time() > deadline + 0.6)
        assert goes_on(here)
        gate.admin("POST", f"{one(drained)}/drain", {"deadline_s": 0})
        assert are_cut(here), "the last word counts"


@pytest.mark.slow
def test_the_deadline_needs_no_control_process() -> None:
    with drained_with_streams() as (gate, drained, here, there):
        (control,) = gate.pids("control")
        gate.admin("POST", f"{one(drained)}/drain", {"deadline_s": 0.5, "then": "close"})
        os.kill(control, signal.SIGSTOP)
        try:
            assert are_cut(here)
            assert goes_on(there)
        finally:
            os.kill(control, signal.SIGKILL)
        gate.wait_until("another control", lambda: status_of(gate, drained) == "draining")
        assert drained not in asked(gate, 10)


def shows_a_probe(gate: Gateway, key: str) -> bool:
    return gate.admin("GET", one(key))[1]["last_probe"] is not None


def status_of(gate: Gateway, key: str) -> str:
    try:
        return str(gate.admin("GET", one(key))[1].get("status"))
    except OSError:
        return "nobody answers"


@pytest.mark.slow
def test_a_drain_survives_reload_death_of_control_and_restart(tmp_path: Path) -> None:
    with launch_engines(3) as engines:
        by_file, by_api, by_flag = (engine.url for engine in engines)
        file = tmp_path / "workers.json"
        write_and_rename(file, json.dumps({"workers": [{"url": by_file}]}).encode())
        arguments = ("--workers-file", str(file), "--workers", by_flag)
        with gateway(*arguments, folder=tmp_path) as gate:
            gate.add_worker(by_api)
            gate.wait_healthy(3)
            for url in (by_file, by_api):
                assert gate.admin("POST", f"{one(url)}/drain", {"deadline_s": 3600, "then": "keep"})[0] == 202
            before = {url: gate.admin("GET", one(url))[1]["drain"]["deadline"] for url in (by_file, by_api)}
            write_and_rename(file, json.dumps({"workers": [{"url": by_file, "weight": 2}]}).encode())
            gate.wait_until("reloaded", lambda: gate.admin("GET", one(by_file))[1]["weight"] == 2)
            assert {*asked(gate, 10)} == {by_flag}
            (control,) = gate.pids("control")
            os.kill(control, signal.SIGKILL)
            gate.wait_until("another control", lambda: status_of(gate, by_file) == "draining")
            assert {*asked(gate, 10)} == {by_flag}
        with gateway(*arguments, folder=tmp_path) as gate:
            gate.wait_until("the third is up", lambda: status_of(gate, by_flag) == "ready")
            assert {*asked(gate, 10)} == {by_flag}
            for url, deadline in before.items():
                shown = gate.admin("GET", one(url))[1]
                assert (shown["status"], shown["drain"]["deadline"]) == ("draining", deadline)
                gate.wait_until("it is asked how it is", partial(shows_a_probe, gate, url))
                assert gate.admin("POST", f"{one(url)}/undrain")[0] == 200
            gate.wait_until("all get requests", lambda: {*asked(gate, 10)} == {by_file, by_api, by_flag})


def test_a_removed_worker_is_drained_first() -> None:
    with drained_with_streams() as (gate, drained, here, there):
        status, answer = gate.admin("DELETE", one(drained))
        assert (status, answer["worker"]["drain"]["is_removed"]) == (202, True)
        assert goes_on(here)
        assert drained not in asked(gate, 10)
        assert gate.admin("POST", f"{one(drained)}/undrain")[1]["code"] == "WORKER_DRAINING"
        (control,) = gate.pids("control")
        status, answer = gate.admin("DELETE", f"{one(drained)}?deadline_s=1")
        assert f"{len(here)} running requests have 1 s" in answer["message"]
        os.kill(control, signal.SIGKILL)
        assert are_cut(here)
        gate.wait_until("it is gone", lambda: status_of(gate, drained) == "None")
        assert goes_on(there)
        other = gate.workers()[0]["url"]
        status, answer = gate.admin("DELETE", f"{one(other)}?force=1")
        assert f"{len(there)} requests are ended" in answer["message"]
        assert are_cut(there)


@pytest.mark.slow
def test_a_drain_survives_an_upgrade_and_does_not_touch_what_runs() -> None:
    with drained_with_streams() as (gate, drained, here, there):
        gate.admin("POST", f"{one(drained)}/drain", {"deadline_s": 3600})
        status, answer = gate.admin("POST", "/upgrade", {"timeout_s": 30}, timeout_s=40.0)
        assert status == 200, answer
        try:
            gate.wait_until("the new one answers", lambda: status_of(gate, drained) == "draining")
            assert drained not in asked(gate, 10)
            assert goes_on(here) and goes_on(there)
        finally:
            for client in (*here, *there):
                client.sock.close()
            os.kill(answer["pid"], signal.SIGTERM)
            wait_gone([answer["pid"]], 30)
        assert gate.wait_ended(10) == 0
