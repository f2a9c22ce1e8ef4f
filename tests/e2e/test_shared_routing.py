"""Two shards route as one process would (one index, booking table and configuration), and leave nothing behind."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol, Self

import pytest

from pointsman.config.snapshot import Hints, Profile, WorkerSpec
from pointsman.daemon.shm import layout as at
from pointsman.scripts.simulated_engine.launch import launch_engines
from tests.fakes.data_plane import DataPlane, data_plane, worker_spec
from tests.fakes.edits import write_and_rename
from tests.fakes.gateway import Gateway, gateway
from tests.fakes.leeway import IS_STRICT
from tests.fakes.prompts import MODEL, SHAPES, prompt_text, shaped
from tests.fakes.traffic import Client, Reply, Traffic, client_of_each, completion

BURST = 1000
WORKERS = 4
EXPLAIN = {"x-pointsman-explain": "1"}
ANSWER = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}"


class HeldWorkers:
    """Workers that answer nobody before `release`; `counts` are the requests that each of them has read."""

    def __init__(self, number: int = WORKERS) -> None:
        self.counts = [0] * number
        self.urls: list[str] = []
        self._loop = asyncio.new_event_loop()
        self._may_answer = asyncio.Event()
        self._ready = threading.Event()
        self._done = asyncio.Event()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._run(),), daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._ready.wait(30)
        return self

    def __exit__(self, *_: object) -> None:
        self.release()
        self._loop.call_soon_threadsafe(self._done.set)
        self._thread.join(30)
        self._loop.close()

    def release(self) -> None:
        self._loop.call_soon_threadsafe(self._may_answer.set)

    async def _run(self) -> None:
        async with asyncio.TaskGroup() as serving:
            servers = []
            for number in range(len(self.counts)):
                sock = socket.create_server(("127.0.0.1", 0), backlog=BURST)
                self.urls.append(f"http://127.0.0.1:{sock.getsockname()[1]}")
                sock.setblocking(False)
                servers.append(serving.create_task(self._accept(number, sock, serving)))
            self._ready.set()
            await self._done.wait()
            for server in servers:
                server.cancel()

    async def _accept(self, number: int, listener: socket.socket, serving: asyncio.TaskGroup) -> None:
        with listener:
            while True:
                sock, _ = await self._loop.sock_accept(listener)
                serving.create_task(self._serve(number, sock))

    async def _serve(self, number: int, sock: socket.socket) -> None:
        with sock:
            sock.setblocking(False)
            try:
                while head := await self._read_request(sock):
                    if not head.startswith(b"GET "):  # probes
                        self.counts[number] += 1
                        await self._may_answer.wait()
                    await self._loop.sock_sendall(sock, ANSWER)
            except OSError:  # the gateway may close when its client has left
                return

    async def _read_request(self, sock: socket.socket) -> bytes:
        """Its head; empty at the end of the connection."""
        data = b""
        while b"\r\n\r\n" not in data:
            if not (more := await self._loop.sock_recv(sock, 65536)):
                return b""
            data += more
        head, _, body = data.partition(b"\r\n\r\n")
        left = int(head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0] or 0) - len(body)
        while left > 0 and (more := await self._loop.sock_recv(sock, 65536)):
            left -= len(more)
        return head


@contextmanager
def sent_at_once(address: tuple[str, int], wire: bytes, count: int) -> Iterator[list[Client]]:
    """`count` clients that are all connected before the first of them sends."""
    with ExitStack() as stack:
        clients = [stack.enter_context(Client(address)) for _ in range(count)]
        for client in clients:
            client.sock.sendall(wire)
        yield clients


@contextmanager
def burst(shards: int, name: str, count: int = BURST, **fields: Any) -> Iterator[tuple[DataPlane, HeldWorkers, Any]]:
    """`count` identical new requests, all of them booked and none answered yet."""
    with HeldWorkers() as workers, data_plane(shards, workers.urls) as plane:
        wire = completion(prompt_text(name, 8000), **fields)
        with sent_at_once(plane.address, wire, count) as clients:
            plane.wait_until("all have arrived", lambda: sum(workers.counts) == count)
            yield plane, workers, clients


def bookings(plane: DataPlane) -> list[int]:
    return [plane.state.bookings.in_flight(slot) for slot in range(WORKERS)]


def pinned(plane: DataPlane) -> list[int]:
    return [plane.state.index.pinned(slot) for slot in range(WORKERS)]


def loads(plane: DataPlane) -> list[int]:
    return [plane.segment.inflight(slot) for slot in range(WORKERS)]


NOTHING = [0] * WORKERS


def assert_nothing_held(plane: DataPlane) -> None:
    plane.wait_until("no booking", lambda: bookings(plane) == NOTHING)
    plane.wait_until("no load", lambda: loads(plane) == NOTHING)
    plane.wait_until("no pin", lambda: pinned(plane) == NOTHING)
    slots = range(WORKERS)
    assert [plane.state.bookings.queued_tokens(slot) for slot in slots] == NOTHING
    assert [plane.state.bookings.reserved(slot) for slot in slots] == NOTHING
    assert [plane.segment.total(slot, at.L_INFLIGHT_BYTES) for slot in slots] == NOTHING
    assert plane.state.index.check() == []


def assert_gateway_idle(gate: Gateway) -> None:
    def cells() -> set[tuple[int, int]]:
        return {(worker["in_flight"], worker["in_flight_bytes"]) for worker in gate.workers()}

    gate.wait_until("nothing in flight", lambda: cells() == {(0, 0)})
    assert gate.in_flight() == 0


def decision_of(reply: Reply) -> dict[str, Any]:
    return dict(json.loads(reply.headers["x-pointsman-decision"]))


@contextmanager
def shard_clients(plane: DataPlane) -> Iterator[list[Client]]:
    """One connection to each shard."""
    pids = [process.pid for process in plane.processes]
    with client_of_each(pids, ("127.0.0.1", plane.address[1])) as clients:
        yield list(clients.values())


# --- choose and book is one step


@pytest.mark.parametrize("is_streamed", [False, True])
def test_a_burst_spreads_over_two_shards_as_over_one(is_streamed: bool) -> None:
    found = {}
    for shards in (1, 2):
        with burst(shards, "burst", stream=is_streamed) as (plane, workers, clients):
            counts = list(workers.counts)
            assert loads(plane) == counts
            # On a busy machine a holder of the mutex may lose its core for longer than the others wait for it.
            unlocked = plane.segment.gauge_total(at.G_UNLOCKED)
            assert sum(bookings(plane)) == BURST - unlocked >= BURST * 0.98
            gauges = [plane.segment.gauge(shard, at.G_REQUESTS) for shard in range(shards)]
            assert min(gauges) > BURST // 4, "every shard has its part"
            found[shards] = counts, plane.segment.gauge_total(at.G_CACHE_MISSES)
            workers.release()
            assert {client.read().status for client in clients} == {200}
            assert_nothing_held(plane)
    print(f"\n(requests by worker, prompts computed) by shards: {found}")
    for counts, computed in found.values():
        used = [count for count in counts if count]
        # A machine so busy that the burst takes seconds gives the first workers the time to be expected ready again.
        assert 2 <= computed <= WORKERS, "shards that did not see each other would compute it more often"
        assert computed == len(used) == WORKERS or not IS_STRICT
        assert max(used) - min(used) <= BURST // len(used) // 5


def test_after_its_answer_a_prompt_goes_where_it_is_cached() -> None:
    with launch_engines(WORKERS) as engines, data_plane(2, [engine.url for engine in engines]) as plane:
        wire = shaped("prompt string", prompt_text("once"), EXPLAIN, max_tokens=1)
        with shard_clients(plane) as clients:
            first = decision_of(clients[0].ask(wire))
            later = [decision_of(client.ask(wire)) for client in clients * 20]
        assert first["matched_tokens"] == 0
        assert {found["worker"] for found in later} == {first["worker"]}
        assert {found["reason"] for found in later} == {"prefix"}
        assert {found["prompt_tokens"] - found["matched_tokens"] for found in later} == {1}
        assert_nothing_held(plane)


def test_clients_that_leave_midway_leave_nothing_behind() -> None:
    with burst(2, "leavers", 200) as (plane, workers, clients):
        for client in clients[::2]:
            client.sock.close()
        plane.wait_until("half is given back", lambda: sum(bookings(plane)) == sum(loads(plane)) == 100)
        workers.release()
        assert {client.read().status for client in clients[1::2]} == {200}
        assert_nothing_held(plane)


def test_a_killed_shards_bookings_and_pins_are_reclaimed() -> None:
    with burst(2, "killed", 200) as (plane, workers, clients):
        victim, survivor = (plane.segment.gauge(shard, at.G_REQUESTS) for shard in (0, 1))
        assert min(victim, survivor) > 0
        plane.processes[0].kill()
        plane.processes[0].wait(30)
        assert sum(bookings(plane)) == 200, "the dead do not tidy up"
        # what the supervisor does when it has buried a shard
        assert plane.segment.reclaim_shard(0) == victim
        assert plane.state.reclaim_shard(0)
        assert bookings(plane) == loads(plane)
        assert sum(bookings(plane)) == survivor
        assert all(pinned(plane)), "the survivor's pins stay"
        assert plane.state.index.check() == []
        workers.release()
        assert sorted(status_of(client) for client in clients) == [0] * victim + [200] * survivor
        assert_nothing_held(plane)


@pytest.mark.parametrize("mutex", ["routing", "index"])
def test_an_idle_shard_gives_back_what_it_could_not_at_once(mutex: str) -> None:
    """A mutex is taken while the answers come, as by a process that is stopped in there; no request follows."""
    with burst(2, "late", 20) as (plane, workers, clients):
        mutexes: dict[str, Mutex] = {"routing": plane.state.words, "index": plane.state.index}
        taken = mutexes[mutex]
        assert taken.lock(1_000_000)
        try:
            workers.release()
            assert {client.read().status for client in clients} == {200}
            plane.wait_until("all are over", lambda: plane.segment.gauge_total(at.G_REQUESTS) == 0)
        finally:
            taken.unlock()
        assert_nothing_held(plane)


class Mutex(Protocol):
    def lock(self, deadline_us: int = ...) -> bool: ...
    def unlock(self) -> None: ...


def status_of(client: Client) -> int:
    """0: the connection was lost."""
    try:
        return client.read().status
    except OSError:
        return 0


FAILURES = (
    {"kind": "status", "status": 500},
    {"kind": "reset"},
    {"kind": "reset", "after_tokens": 2},
    {"kind": "hang", "seconds": 0.2},
)


@pytest.mark.parametrize("fault", FAILURES, ids=json.dumps)
def test_failing_workers_leave_nothing_behind(fault: dict[str, Any]) -> None:
    with ExitStack() as stack:
        sound = stack.enter_context(launch_engines(2))
        faulty = stack.enter_context(launch_engines(1, "--fault", json.dumps(fault)))
        urls = [engine.url for engine in (*sound, *faulty)]
        plane = stack.enter_context(data_plane(2, [*urls, refusing_url()]))
        address = ("127.0.0.1", plane.address[1])
        answered = []
        for headers in ({}, {"routing-strategy": "round-robin"}):
            wire = shaped("prompt string", prompt_text("faulty"), headers, max_tokens=8, stream=True)
            with Traffic(address, wire, connections=16, total=200) as traffic:
                report = traffic.wait()
            assert report.answered + len(report.failures) == 200
            answered.append(report.answered)
        assert answered[1] > 0
        plane.wait_until("clients have left", lambda: plane.segment.gauge_total(at.G_CONNECTIONS) == 0)
        assert_nothing_held(plane)


def test_a_worker_that_failed_a_prompt_is_not_believed_to_hold_it() -> None:
    failing = json.dumps({"kind": "status", "status": 500})
    with ExitStack() as stack:
        sound = stack.enter_context(launch_engines(1))
        faulty = stack.enter_context(launch_engines(1, "--fault", failing))
        plane = stack.enter_context(data_plane(2, [sound[0].url, faulty[0].url]))
        text = prompt_text("refused")
        with shard_clients(plane) as clients:
            refused = clients[0].ask(shaped("prompt string", text, {"x-smg-target-worker": "1"}))
            assert refused.status == 500
            again = clients[1].ask(shaped("prompt string", text, EXPLAIN))
        assert decision_of(again)["explanation"]["matched_tokens"] == {sound[0].url: 0, faulty[0].url: 0}


def refusing_url() -> str:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{sock.getsockname()[1]}"


# --- the whole daemon


@pytest.fixture(scope="module")
def engines() -> Iterator[list[str]]:
    with launch_engines(WORKERS) as running:
        yield [engine.url for engine in running]


@pytest.fixture(scope="module")
def gate(engines: list[str]) -> Iterator[Gateway]:
    with gateway(workers=engines) as running:
        yield running


@contextmanager
def gate_clients(gate: Gateway) -> Iterator[list[Client]]:
    """One connection to each shard."""
    with client_of_each(gate.pids("shard"), (gate.host, gate.port)) as clients:
        yield list(clients.values())


def test_the_daemon_reclaims_what_leavers_and_a_killed_shard_held() -> None:
    with HeldWorkers() as workers, gateway(workers=workers.urls) as gate, ExitStack() as stack:
        wire = completion(prompt_text("daemon", 8000))
        clients = stack.enter_context(sent_at_once((gate.host, gate.port), wire, 200))
        gate.wait_until("all are booked", lambda: sum(workers.counts) == 200)
        assert [worker["in_flight"] for worker in gate.workers()] == workers.counts
        for client in clients[::2]:
            client.sock.close()
        gate.wait_until("half is given back", lambda: gate.in_flight() == 100)
        os.kill(gate.pids("shard")[0], signal.SIGKILL)
        gate.wait_log("process_died", process="shard 0")
        wait_shards(gate)
        assert 0 < gate.in_flight() < 100
        assert sum(worker["in_flight"] for worker in gate.workers()) == gate.in_flight()
        workers.release()
        assert {status_of(client) for client in clients[1::2]} == {0, 200}
        assert_gateway_idle(gate)
        with gate_clients(gate) as fresh:
            found = [decision_of(client.ask(shaped("text", "nothing is left", EXPLAIN))) for client in fresh]
        for decision in found:
            assert set(column(decision, "wait_s").values()) == {0.0}, "bookings of the dead make no line"


def wait_shards(gate: Gateway) -> None:
    def states() -> set[str]:
        processes = gate.admin("GET", "/status")[1]["processes"]
        return {row["state"] for row in processes if row["name"].startswith("shard")}

    gate.wait_until("every shard is ready", lambda: states() == {"ready"})


def column(decision: dict[str, Any], scorer: str) -> dict[str, float]:
    """A scorer's raw values by worker."""
    scorers = decision["explanation"]["scorers"]
    return dict(next(row["raw"] for row in scorers if row["name"] == scorer))


# --- one prompt, many ways to write it


def ask(client: Client, shape: str, text: str, headers: dict[str, str] | None = None, **fields: Any) -> dict[str, Any]:
    """The decision on a request of that shape."""
    reply = client.ask(shaped(shape, text, EXPLAIN | (headers or {}), max_tokens=1, **fields))
    assert "x-pointsman-decision" in reply.headers, reply
    return decision_of(reply)


def is_full_match(decision: dict[str, Any]) -> bool:
    """Engines compute at least one token."""
    return bool(decision["matched_tokens"] == decision["prompt_tokens"] - 1)


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_is_found_again_on_the_other_shard(gate: Gateway, shape: str) -> None:
    text = prompt_text(f"shape {shape}")
    with gate_clients(gate) as (one, other):
        first, again = ask(one, shape, text), ask(other, shape, text)
        longer = ask(one, shape, text + prompt_text("and so on", 2000))
    assert first["matched_tokens"] == 0
    assert is_full_match(again)
    assert longer["worker"] == again["worker"] == first["worker"]
    assert longer["reason"] == again["reason"] == "prefix"
    assert 0.5 < longer["matched_tokens"] / longer["prompt_tokens"] < 0.7


def test_a_chat_in_parts_is_the_same_text(gate: Gateway) -> None:
    text = prompt_text("parts")
    with gate_clients(gate) as (one, other):
        ask(one, "chat string", text)
        assert is_full_match(ask(other, "chat parts", text))


def written_otherwise(text: str) -> list[bytes]:
    """The body of a chat, as other clients' JSON libraries would write it."""
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": text}]
    body = {"model": MODEL, "messages": messages, "max_tokens": 1}
    turned = [dict(reversed(message.items())) for message in messages]
    ascii_only = json.dumps(body)
    return [
        ascii_only.encode(),
        json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode(),
        json.dumps(dict(reversed(body.items())), ensure_ascii=False, indent=2).encode(),
        json.dumps({"max_tokens": 1, "messages": turned, "model": MODEL}).encode(),
        ascii_only.replace("/", "\\/").encode(),
        ascii_only.replace("v", "\\u0076").encode(),
    ]


def test_another_way_to_write_the_json_is_the_same_prompt(gate: Gateway) -> None:
    text = 'Straße, "naïve" \\ 日本語 🙂 a/b\n\t' + prompt_text("escapes")
    with gate_clients(gate) as clients:
        decisions = []
        for number, body in enumerate(written_otherwise(text)):
            wire = raw_request(body)
            decisions.append(decision_of(clients[number % 2].ask(wire)))
    assert decisions[0]["matched_tokens"] == 0
    assert [is_full_match(found) for found in decisions[1:]] == [True] * (len(decisions) - 1), decisions


def raw_request(body: bytes, path: str = "/v1/chat/completions") -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: gateway\r\nx-pointsman-explain: 1\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


def test_another_model_or_lora_is_another_prompt(gate: Gateway) -> None:
    text = prompt_text("salt")
    with gate_clients(gate) as (one, other):
        ask(one, "text", text)
        assert ask(other, "text", text, model="another")["matched_tokens"] == 0
        assert ask(other, "text", text, lora_path="adapter")["matched_tokens"] == 0
        assert ask(other, "input_ids", text)["matched_tokens"] == 0, "ids are no text"
        assert is_full_match(ask(one, "text", text, lora_path="adapter"))
        assert is_full_match(ask(other, "text", text))


# --- what a request may ask for


def labelled(urls: Sequence[str]) -> list[WorkerSpec]:
    zones = ("a", "a", "b", "b")
    return [
        worker_spec(slot, url, labels={"zone": zone}) for slot, (url, zone) in enumerate(zip(urls, zones, strict=True))
    ]


@pytest.fixture
def plane(engines: list[str]) -> Iterator[DataPlane]:
    with data_plane(2) as running:
        running.publish(*labelled(engines))
        yield running


def explained(client: Client, text: str, headers: dict[str, str] | None = None) -> tuple[Reply, dict[str, Any]]:
    reply = client.ask(shaped("text", text, EXPLAIN | (headers or {})))
    assert reply.status == 200, reply
    return reply, decision_of(reply)


def test_a_weighted_strategy_by_header(plane: DataPlane) -> None:
    asked = "least-request:40,prefix-cache:60"
    with shard_clients(plane) as clients:
        for client in clients:
            reply, decision = explained(client, prompt_text("weighted"), {"routing-strategy": asked})
            weights = {row["name"]: row["weight"] for row in decision["explanation"]["scorers"]}
            assert weights == {"least_request": 40, "prefix_cache": 60}
            assert decision["policy"] == asked
            assert reply.headers["routing-strategy"] == asked


def test_an_answer_names_its_strategy_once(plane: DataPlane) -> None:
    with shard_clients(plane) as (client, _):
        client.sock.sendall(shaped("text", "once", {"routing-strategy": "random"}))
        while b"\r\n\r\n" not in client.rest:
            client.rest += client.sock.recv(65536)
    lines = client.rest.partition(b"\r\n\r\n")[0].lower().split(b"\r\n")
    assert [line for line in lines if line.startswith(b"routing-strategy:")] == [b"routing-strategy: random"]


BAD_STRATEGIES = {
    "nonsense": "nonsense",
    "least-request:40,nonsense:60": "nonsense",
    "least-request:x": "weight",
    "cache_aware,least-request": "cannot be combined",
    "least-request:0": "every weight is 0",
}


@pytest.mark.parametrize("strategy", BAD_STRATEGIES)
def test_a_bad_strategy_is_refused_with_the_reason(plane: DataPlane, strategy: str) -> None:
    with shard_clients(plane) as clients:
        for client in clients:
            reply = client.ask(shaped("text", "hello", {"routing-strategy": strategy}))
            assert reply.status == 400
            assert BAD_STRATEGIES[strategy] in reply.json["error"]["message"]
    assert_nothing_held(plane)


def test_a_locked_strategy_wins_over_header_and_profile(plane: DataPlane, engines: list[str]) -> None:
    profiles = {"mine": Profile("mine", "random")}
    plane.publish(*labelled(engines), profiles=profiles, locked_strategy="round-robin")
    with shard_clients(plane) as clients:
        workers = []
        for client in clients * 4:
            headers = {"routing-strategy": "least-request", "config-profile": "mine"}
            reply, decision = explained(client, "locked", headers)
            assert reply.headers["routing-strategy"] == decision["policy"] == "round-robin"
            workers.append(decision["worker"])
    assert Counter(workers) == dict.fromkeys(engines, 2), "in turn over both shards"


def test_a_named_worker_gets_it(plane: DataPlane, engines: list[str]) -> None:
    with shard_clients(plane) as clients:
        for position, client in enumerate(clients * 2):
            _, decision = explained(client, prompt_text("named"), {"X-SMG-Target-Worker": str(position)})
            assert (decision["worker"], decision["reason"]) == (engines[position], "named")
        assert clients[0].ask(shaped("text", "hello", {"X-SMG-Target-Worker": "first"})).status == 400
        assert clients[0].ask(shaped("text", "hello", {"X-SMG-Target-Worker": "9"})).status == 503


def test_labels_choose_who_may_have_it(plane: DataPlane, engines: list[str]) -> None:
    with shard_clients(plane) as clients:
        text = prompt_text("labels")
        explained(clients[0], text, {"X-SMG-Target-Worker": "0"})
        for client in clients * 4:
            _, decision = explained(client, text, {"external-filter": "zone=b"})
            assert decision["worker"] in engines[2:], "wherever it is cached"
            assert set(decision["explanation"]["dropped"]) == set(engines[:2])
        refused = clients[0].ask(shaped("text", text, {"external-filter": "zone=c"}))
    assert refused.status == 503
    assert "zone=c" in refused.json["error"]["message"]


def test_a_session_stays_where_it_is(plane: DataPlane, engines: list[str]) -> None:
    sticky = {"sticky": {"factor": 50.0}}
    plane.publish(*labelled(engines), profiles={"s": Profile("s", "random", sticky)}, default_profile="s")
    with shard_clients(plane) as clients:
        for session in ("one", "two", "three", "four"):
            headers = {"x-session-id": session}
            _, first = explained(clients[0], prompt_text(session), headers)
            later = [
                explained(client, prompt_text(f"{session} {n}"), headers)[1] for n, client in enumerate(clients * 4)
            ]
            assert {found["worker"] for found in later} == {first["worker"]}
            assert {found["reason"] for found in later} == {"sticky"}


def test_a_profile_by_name_and_by_shape(plane: DataPlane, engines: list[str]) -> None:
    profiles = {
        "plain": Profile("plain"),
        "short": Profile("short", "random", hints=Hints(prompt_tokens_lt=100)),
        "long": Profile("long", "least-request", hints=Hints(prompt_tokens_gte=100)),
    }
    plane.publish(*labelled(engines), profiles=profiles, default_profile="plain")
    texts = {"short": "hello", "long": prompt_text("long")}
    with shard_clients(plane) as clients:
        for client in clients:
            for name, text in texts.items():
                assert explained(client, text, {"config-profile": "auto"})[0].profile == name
                assert explained(client, text, {"config-profile": "short"})[0].profile == "short"
                assert explained(client, text, {"config-profile": "nobody"})[0].profile == "plain"
                assert explained(client, text)[0].profile == "plain"


def test_what_an_answer_tells(plane: DataPlane, engines: list[str]) -> None:
    with shard_clients(plane) as clients:
        for client in clients:
            reply, decision = explained(client, "hello")
            assert f"http://{reply.headers['target-pod']}" == decision["worker"]
            assert reply.headers["routing-strategy"] == "expected_cost"
            assert reply.generation == decision["generation"] == plane.segment.generation


# --- edits


POLICIES = ("expected_cost", "least-request", "cache_aware", "prefix-cache")


def profiles_file(strategy: str, **more: Any) -> bytes:
    return json.dumps({"defaultProfile": "p", "profiles": {"p": {"routingStrategy": strategy, **more}}}).encode()


@contextmanager
def edited_gateway(engines: list[str], folder: Path) -> Iterator[tuple[Gateway, Callable[[bytes], None]]]:
    """A daemon, and a function that saves its profiles file and returns once every shard runs by it."""
    path = folder / "profiles.json"
    path.write_bytes(profiles_file("expected_cost"))
    with gateway("--profiles", str(path), workers=engines) as gate:

        def edit(content: bytes) -> None:
            before = gate.admin("GET", "/status")[1]["generation"]
            write_and_rename(path, content)
            gate.wait_until("the edit counts", lambda: gate.admin("GET", "/status")[1]["generation"] > before, 5)

        yield gate, edit


def test_an_edit_under_load_counts_for_the_next_request_on_every_shard(engines: list[str], tmp_path: Path) -> None:
    text = prompt_text("survives")
    with edited_gateway(engines, tmp_path) as (gate, edit), gate_clients(gate) as clients:
        home = ask(clients[0], "text", text)["worker"]
        wire = completion(prompt_text("load", 2000), stream=True)
        with Traffic((gate.host, gate.port), wire, connections=8) as traffic:
            for number in range(12):
                strategy = POLICIES[(number + 1) % len(POLICIES)]
                edit(profiles_file(strategy))
                for client in clients:
                    decision = ask(client, "text", text)
                    assert decision["policy"].replace("-", "_") == strategy.replace("-", "_")
                    assert is_full_match(decision) or decision["worker"] != home
                    assert decision["explanation"]["matched_tokens"][home] == decision["prompt_tokens"] - 1
            report = traffic.stop()
    assert report.failures == []
    assert report.backwards == []
    assert report.answered > 100


def scorer_weights(decision: dict[str, Any]) -> dict[str, float]:
    return {row["name"]: row["weight"] for row in decision["explanation"]["scorers"]}


Apply = Callable[[str, dict[str, Any]], object]
"""Puts a strategy and its parameters in force on every shard."""


def assert_weights_change(apply: Apply, clients: Sequence[Client]) -> None:
    for least, prefix in ((40, 60), (90, 10)):
        apply(f"least-request:{least},prefix-cache:{prefix}", {})
        for client in clients:
            weights = scorer_weights(ask(client, "text", "weights"))
            assert weights == {"least_request": least, "prefix_cache": prefix}


def assert_thresholds_change(apply: Apply, clients: Sequence[Client]) -> None:
    """A third of each prompt is held by one worker: above the threshold it goes there, below it to the others."""
    for number, (threshold, is_hit) in enumerate(((0.2, True), (0.9, False), (0.2, True))):
        apply("cache_aware", {"cache_aware": {"cache_threshold": threshold}})
        head = prompt_text(f"threshold {number}", 2048)
        home = ask(clients[0], "text", head, {"x-smg-target-worker": "2"})["worker"]
        tails = [prompt_text(f"{number} {n}", 4096) for n in range(8)]
        found = [ask(clients[n % 2], "text", head + tail) for n, tail in enumerate(tails)]
        assert ({one["worker"] for one in found} == {home}) is is_hit, found


def generation_of(plane: DataPlane, engines: list[str]) -> Apply:
    def apply(strategy: str, routing: dict[str, Any]) -> None:
        profiles = {"p": Profile("p", strategy, routing)}
        plane.publish(*labelled(engines), profiles=profiles, default_profile="p")

    return apply


def test_a_new_generation_changes_weights(plane: DataPlane, engines: list[str]) -> None:
    with shard_clients(plane) as clients:
        assert_weights_change(generation_of(plane, engines), clients)


def test_a_new_generation_changes_thresholds(plane: DataPlane, engines: list[str]) -> None:
    with shard_clients(plane) as clients:
        assert_thresholds_change(generation_of(plane, engines), clients)


def test_an_edit_changes_weights(engines: list[str], tmp_path: Path) -> None:
    with edited_gateway(engines, tmp_path) as (gate, edit), gate_clients(gate) as clients:
        assert_weights_change(lambda strategy, routing: edit(profiles_file(strategy, **routing)), clients)


def test_an_edit_changes_thresholds(engines: list[str], tmp_path: Path) -> None:
    with edited_gateway(engines, tmp_path) as (gate, edit), gate_clients(gate) as clients:
        assert_thresholds_change(lambda strategy, routing: edit(profiles_file(strategy, **routing)), clients)


def test_a_lock_in_the_file_wins(engines: list[str], tmp_path: Path) -> None:
    with edited_gateway(engines, tmp_path) as (gate, edit), gate_clients(gate) as clients:
        document = json.loads(profiles_file("random")) | {"lockedRoutingStrategy": "least-request"}
        edit(json.dumps(document).encode())
        for client in clients:
            decision = ask(client, "text", "locked", {"routing-strategy": "prefix-cache"})
            assert decision["policy"].replace("-", "_") == "least_request"


def test_a_file_says_who_is_sticky_and_which_profile_fits(engines: list[str], tmp_path: Path) -> None:
    profiles = {
        "plain": {"routingStrategy": "least-request"},
        "long": {"routingStrategy": "prefix-cache", "routingConfig": {"promptTokensGte": 500}},
        "chat": {"routingStrategy": "random", "sticky": {"factor": 50.0}},
    }
    with edited_gateway(engines, tmp_path) as (gate, edit), gate_clients(gate) as clients:
        edit(json.dumps({"defaultProfile": "plain", "profiles": profiles}).encode())
        long, chat = {"config-profile": "auto"}, {"config-profile": "chat", "x-session-id": "one"}
        found = [ask(client, "text", prompt_text(f"auto {n}"), long) for n, client in enumerate(clients * 2)]
        assert {one["profile"] for one in found} == {"long"}
        assert ask(clients[0], "text", "short", long)["profile"] == "plain"
        stayed = [ask(client, "text", prompt_text(f"chat {n}"), chat) for n, client in enumerate(clients * 4)]
        assert len({one["worker"] for one in stayed}) == 1
        assert {one["reason"] for one in stayed[1:]} == {"sticky"}
