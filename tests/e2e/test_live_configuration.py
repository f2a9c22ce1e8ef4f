"""Files edited and workers changed while requests run: nothing fails, nothing is cut, a bad file changes nothing."""

from __future__ import annotations

import json
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from pointsman.daemon.main import main
from pointsman.scripts.simulated_engine.launch import launch_engines
from tests.fakes.edits import EDITS, Edit, write_and_rename
from tests.fakes.gateway import Gateway, gateway
from tests.fakes.traffic import LAST_CHUNK, Client, Reply, Traffic, client_of_each, completion, request

STREAMS = 50
EDITS_UNDER_LOAD = 50
CHANGES_OF_WORKERS = 200
STEP_S = 0.1
"""between two tokens of a stream"""
STREAM_TOKENS = 60


@pytest.fixture(scope="module")
def engines() -> Iterator[list[str]]:
    with launch_engines(4) as running:
        yield [engine.url for engine in running]


@pytest.fixture(scope="module")
def paced_engines() -> Iterator[list[str]]:
    with launch_engines(4, "--preset", "h100-8b", "--speed", str(0.007 / STEP_S)) as running:
        yield [engine.url for engine in running]


def address_of(gate: Gateway) -> tuple[str, int]:
    return gate.host, gate.port


def profiles(default: str, policy: str = "least-request", **more: Any) -> bytes:
    document = {"defaultProfile": default, "profiles": {default: {"routingStrategy": policy}}, **more}
    return json.dumps(document, indent=2).encode()


def config(gate: Gateway) -> dict[str, Any]:
    return dict(gate.admin("GET", "/config")[1])


def generations(gate: Gateway) -> set[int]:
    status = gate.admin("GET", "/status")[1]
    return {row["generation"] for row in status["processes"]} | {status["generation"]}


@contextmanager
def shard_clients(gate: Gateway) -> Iterator[list[Client]]:
    """One connection to each shard."""
    with client_of_each(gate.pids("shard"), address_of(gate)) as clients:
        yield list(clients.values())


TOKENIZE = request({"model": "sim-model", "prompt": "one two"}, "/tokenize")
"""what a paced engine answers at once"""


def profile_of(client: Client) -> str:
    return client.ask(TOKENIZE).profile


# --- under load


@pytest.mark.slow
def test_edits_and_changes_of_workers_under_load(paced_engines: list[str], tmp_path: Path) -> None:
    path = tmp_path / "profiles.json"
    path.write_bytes(profiles("edit-0"))
    with ExitStack() as stack:
        gate = stack.enter_context(gateway("--profiles", str(path), workers=paced_engines[:2]))
        short = stack.enter_context(Traffic(address_of(gate), completion(), connections=16))
        wire = completion(max_tokens=STREAM_TOKENS, stream=True)
        long = stack.enter_context(Traffic(address_of(gate), wire, connections=STREAMS, is_complete=is_whole_stream))
        gate.wait_until("the streams run", lambda: gate.in_flight() >= STREAMS)
        first = config(gate)["generation"]
        started = time.monotonic()

        with ThreadPoolExecutor() as pool:
            edits = pool.submit(edit_under_load, gate, path)
            changes = [pool.submit(change_workers, gate, url) for url in paced_engines[2:]]
            changes.append(pool.submit(change_workers, gate, unreachable_url()))
            for work in (edits, *changes):
                work.result()
        took = time.monotonic() - started
        whole, answered = long.stop(), short.stop()

        assert whole.failures == []
        assert whole.answered >= STREAMS
        assert whole.backwards == []
        assert answered.failures == []
        assert answered.backwards == []
        gate.wait_until("all processes run one generation", lambda: len(generations(gate)) == 1)
        last = config(gate)["generation"]
        assert last - first >= EDITS_UNDER_LOAD
        assert max(answered.generations) <= last
        with shard_clients(gate) as clients:
            assert [client.ask(completion()).generation for client in clients] == [last, last]
        assert sorted(worker["url"] for worker in gate.workers()) == sorted(paced_engines[:2])
        gate.wait_until("removed workers are gone", lambda: gate.workers("?state=draining") == [])
    print(f"\n{EDITS_UNDER_LOAD} edits, {CHANGES_OF_WORKERS} changes of workers in {took:.1f} s: ", end="")
    print(f"generations {first} to {last}, {len(answered.generations)} of them seen by {answered.answered} answers")


def is_whole_stream(answer: bytes) -> bool:
    """All tokens, then the end that the worker sent."""
    return answer.count(b"data: {") >= STREAM_TOKENS and b"data: [DONE]" in answer


def edit_under_load(gate: Gateway, path: Path) -> None:
    with Client(address_of(gate)) as client:
        for number in range(1, EDITS_UNDER_LOAD + 1):
            name = f"edit-{number}"
            EDITS[number % len(EDITS)](path, profiles(name))
            gate.wait_until(f"{name} is in force", lambda name=name: profile_of(client) == name)  # type: ignore[misc]


def change_workers(gate: Gateway, url: str) -> None:
    """A third of all changes: three of these run at the same time."""
    for _ in range(-(-CHANGES_OF_WORKERS // 6)):
        gate.add_worker(url)
        status, answer = gate.admin("DELETE", f"/workers/{quote(url, safe='')}")
        assert status == 202, answer


def unreachable_url() -> str:
    """Bound, and nobody listens: a connection is refused."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{sock.getsockname()[1]}"


# --- profiles


@pytest.mark.parametrize("edit", EDITS, ids=[edit.__name__ for edit in EDITS])
def test_an_edit_changes_the_policy_of_the_next_request_on_every_shard(
    engines: list[str], tmp_path: Path, edit: Edit
) -> None:
    path = tmp_path / "profiles.json"
    path.write_bytes(profiles("before", "random"))
    with gateway("--profiles", str(path), workers=engines) as gate, shard_clients(gate) as clients:
        assert [profile_of(client) for client in clients] == ["before", "before"]
        generation = config(gate)["generation"]
        edit(path, profiles("after", "round-robin"))
        gate.wait_until("a new generation", lambda: config(gate)["generation"] > generation)
        # From the moment that it is published, all shards use it: no second look.
        replies = [client.ask(completion()) for client in clients for _ in engines]
        assert {(reply.profile, reply.generation) for reply in replies} == {("after", config(gate)["generation"])}
        order = [worker["id"] for worker in gate.workers()]
        picked = [order.index(reply.headers["x-pointsman-worker"]) for reply in replies]
        turns = [(picked[0] + turn) % len(order) for turn in range(len(picked))]
        assert picked == turns, "round robin goes on from shard to shard"
        for reply in replies:
            line = gate.wait_log("request", id=reply.headers["x-request-id"], timeout_s=2)
            assert (line["policy"], line["profile"], line["generation"]) == ("round-robin", "after", reply.generation)


def test_profiles_by_header_and_by_rules(engines: list[str], tmp_path: Path) -> None:
    """Header, then the first rule whose conditions all hold, then the default; edited while connections are open."""
    path = tmp_path / "profiles.json"
    names = ("default", "asked", "by-key", "by-model", "by-path", "by-header", "late")
    base = {"profiles": {name: {"routingStrategy": "round-robin"} for name in names}, "defaultProfile": "default"}
    rules = [
        {"profile": "by-key", "key": "sk-team-a-*", "model": "sim-*"},
        {"profile": "by-model", "model": "sim-*"},
        {"profile": "by-path", "path": "/v1/embed*"},
        {"profile": "by-header", "header": {"X-Job": "nightly-*"}},
        {"profile": "late", "path": "/v1/*"},
    ]
    team_a = {"Authorization": "Bearer sk-team-a-1"}
    questions = {
        "key": request({"model": "sim-model", "prompt": "x"}, headers=team_a),
        "key, but another model": request({"model": "other", "prompt": "x"}, headers=team_a),
        "model": completion(),
        "path": request({"model": "other", "input": "x"}, "/v1/embeddings"),
        "header": request({"model": "other", "prompt": "x"}, headers={"x-job": "nightly-7"}),
        "nothing but the last": request({"model": "other", "prompt": "x"}),
        "no rule": request({"model": "other", "prompt": "x"}, "/tokenize"),
        "asked for": request({"model": "sim-model", "prompt": "x"}, headers={"config-profile": "asked"}),
        "asked for, unknown": request({"model": "sim-model", "prompt": "x"}, headers={"config-profile": "nobody"}),
    }
    path.write_text(json.dumps(base | {"match": rules}))
    with gateway("--profiles", str(path), workers=engines) as gate, shard_clients(gate) as clients:

        def answers(client: Client) -> list[str]:
            return [client.ask(wire).profile for wire in questions.values()]

        expected = ["by-key", "late", "by-model", "by-path", "by-header", "late", "default", "asked", "by-model"]
        assert [answers(client) for client in clients] == [expected, expected]

        generation = config(gate)["generation"]
        write_and_rename(path, json.dumps(base | {"match": rules[::-1]}).encode())
        gate.wait_until("the order is turned around", lambda: config(gate)["generation"] > generation)
        expected = ["late", "late", "late", "late", "late", "late", "default", "asked", "late"]
        assert [answers(client) for client in clients] == [expected, expected]
        assert gate.metrics()["pointsman_profile_fallbacks_total"] == 4


# --- broken files

GOOD = profiles("good", "round-robin")


@dataclass(frozen=True)
class Breakage:
    """What is done to the file; `says` is in the message, `place` is what follows the file's name in it."""

    do: Callable[[Path], object]
    place: str
    says: str


def _holds(content: bytes | str, place: str, says: str) -> Breakage:
    data = content.encode() if isinstance(content, str) else content
    return Breakage(partial(write_and_rename, content=data), place, says)


def _is_replaced(make: Callable[[Path], object], says: str) -> Breakage:
    def do(path: Path) -> None:
        path.unlink()
        make(path)

    return Breakage(do, ":", says)


def _strategy(value: str) -> str:
    return f'{{"defaultProfile": "good",\n "profiles": {{"good": {{\n  "routingStrategy": {value}}}}}}}'


BROKEN = {
    "half written": _holds(GOOD[: len(GOOD) // 2], ":", "not valid JSON"),
    "cut before the end": _holds(GOOD[:-2], ":", "not valid JSON"),
    "truncated in place": Breakage(lambda path: path.write_bytes(GOOD[:20]), ":", "not valid JSON"),
    "emptied in place": Breakage(lambda path: path.write_bytes(b""), ":1", "empty"),
    "empty": _holds(b"", ":1", "empty"),
    "blank": _holds(b" \n\n", ":", "empty"),
    "noughts after a power cut": _holds(b"\0" * 64, ":1", ""),
    "binary": _holds(bytes(range(256)), ":", ""),
    "not utf-8": _holds(b'{"profiles": {\n"caf\xe9": {}}}', ":", "UTF-8"),
    "utf-16": _holds(GOOD.decode().encode("utf-16"), ":", ""),
    "another format": _holds("profiles:\n  good: {}\n", ":1", "not valid JSON"),
    "a comment": _holds(b"// mine\n" + GOOD, ":1", "not valid JSON"),
    "a trailing comma": _holds('{"profiles": {\n"good": {},\n}}', ":", "not valid JSON"),
    "merge conflict": _holds(b"<<<<<<< HEAD\n" + GOOD, ":1", "not valid JSON"),
    "two documents": _holds(GOOD + b"\n" + GOOD, ":", "not valid JSON"),
    "a key twice": _holds('{"profiles": {"good": {},\n"good": {}}}', ":2:1: profiles.good:", "twice"),
    "a list": _holds("[]", ":1:1:", "expected an object"),
    "null": _holds("null", ":1:1:", "expected an object"),
    "no profiles": _holds("{}", ":1:1: profiles:", "is required"),
    "unknown key": _holds('{"profiles": {},\n "defaultprofile": "a"}', ":2:2: defaultprofile:", "'defaultProfile'"),
    "unknown key in a profile": _holds(
        '{"profiles": {"good": {\n\n "routing": "random"}}}', ":3:2: profiles.good.routing:", "unknown"
    ),
    "wrong type": _holds(_strategy("3"), ":3:3: profiles.good.routingStrategy:", "expected a string, got a number"),
    "unknown policy": _holds(_strategy('"rnd"'), ":3:3: profiles.good.routingStrategy:", "'rnd'"),
    "profiles a list": _holds('{"profiles": ["good"]}', ":1:2: profiles:", "expected an object"),
    "default that is not there": _holds(
        '{"profiles": {"good": {}},\n"defaultProfile": "goood"}', ":2:1: defaultProfile:", "did you mean 'good'"
    ),
    "rule to nowhere": _holds(
        '{"profiles": {"good": {}}, "match": [\n{"profile": "bad"}]}', ":2:2: match[0].profile:", "'bad'"
    ),
    "rule with a typo": _holds(
        '{"profiles": {"good": {}}, "match": [\n{"profile": "good",\n"modle": "x"}]}',
        ":3:1: match[0].modle:",
        "'model'",
    ),
    "nested without end": _holds('{"profiles": ' + "[" * 100_000, ":", "nested too deeply"),
    "too large": _holds(b" " * (4 * 1024 * 1024 + 1), ":", "larger"),
    "deleted": Breakage(Path.unlink, ":", "no such file"),
    "a directory": _is_replaced(Path.mkdir, "is a directory"),
    "a pipe": _is_replaced(os.mkfifo, "is not a regular file"),
    "a dead link": _is_replaced(lambda path: path.symlink_to("nowhere.json"), "no such file"),
    "a link to itself": _is_replaced(lambda path: path.symlink_to(path.name), ""),
}


@pytest.fixture(scope="module")
def kept(engines: list[str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Gateway, Path, list[Client]]]:
    """A daemon whose profiles file is broken and mended many times."""
    path = tmp_path_factory.mktemp("profiles") / "profiles.json"
    path.write_bytes(GOOD)
    with gateway("--profiles", str(path), workers=engines) as gate, shard_clients(gate) as clients:
        yield gate, path, clients


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_changes_nothing_and_says_where(
    kept: tuple[Gateway, Path, list[Client]], name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert len(BROKEN) >= 30
    gate, path, clients = kept
    broken = BROKEN[name]
    before = config(gate)
    assert before["last_reload_ok"]
    refusals = len(refused(gate))
    broken.do(path)
    gate.wait_until("it is refused", lambda: not config(gate)["last_reload_ok"])

    after = config(gate)
    assert (after["generation"], after["hash"]) == (before["generation"], before["hash"])
    (message,) = after["errors"]
    place = f"{path}{broken.place}"
    assert message.startswith(place), message
    assert broken.says in message

    for client in clients:
        reply = client.ask(completion())
        assert (reply.status, reply.profile, reply.generation) == (200, "good", before["generation"])
    gate.wait_until("it is in the log", lambda: len(refused(gate)) > refusals)
    line = refused(gate)[-1]
    assert line["problem"] == message
    assert line["place"].startswith(str(path))
    assert not line["key"] or f" {line['key']}: " in message
    metrics = gate.metrics()
    assert metrics["pointsman_config_last_reload_successful"] == 0
    assert metrics["pointsman_config_generation"] == before["generation"]
    assert main(["status", "--admin", f"unix:{gate.socket_path}"]) == 0
    shown = capsys.readouterr().out
    assert "RELOAD REFUSED" in shown
    assert message in shown

    mend(path, GOOD)
    gate.wait_until("mended", lambda: config(gate)["last_reload_ok"])
    assert config(gate)["errors"] == []
    assert config(gate)["generation"] == before["generation"], "the same content makes no generation"
    assert gate.metrics()["pointsman_config_last_reload_successful"] == 1
    assert main(["status", "--admin", f"unix:{gate.socket_path}"]) == 0
    assert "REFUSED" not in capsys.readouterr().out


def refused(gate: Gateway) -> list[dict[str, Any]]:
    return [line for line in gate.log if line["event"] == "config_refused"]


def mend(path: Path, content: bytes) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    write_and_rename(path, content)


def test_what_comes_after_a_broken_file_is_taken(kept: tuple[Gateway, Path, list[Client]]) -> None:
    gate, path, clients = kept
    write_and_rename(path, GOOD[:30])
    gate.wait_until("it is refused", lambda: not config(gate)["last_reload_ok"])
    generation = config(gate)["generation"]
    write_and_rename(path, profiles("new"))
    gate.wait_until("mended", lambda: config(gate)["last_reload_ok"])
    assert config(gate)["generation"] > generation
    assert [profile_of(client) for client in clients] == ["new", "new"]


def test_the_files_may_be_read_on_demand(kept: tuple[Gateway, Path, list[Client]]) -> None:
    """POST /config/reload answers with what came of it: 422 and the place, or 200."""
    gate, path, _ = kept
    write_and_rename(path, b"[]")
    status, answer = gate.admin("POST", "/config/reload")
    assert status == 422
    assert answer["errors"][0].startswith(f"{path}:1:1:")
    write_and_rename(path, GOOD)
    status, answer = gate.admin("POST", "/config/reload")
    assert (status, answer["errors"]) == (200, [])


# --- workers


def own_shape(urls: list[str], **fields: Any) -> bytes:
    return json.dumps({"workers": [{"url": url, **fields} for url in urls]}).encode()


def file_sd(urls: list[str], **labels: str) -> bytes:
    return json.dumps([{"targets": [url.removeprefix("http://") for url in urls], "labels": labels}]).encode()


@pytest.mark.parametrize("shape", [own_shape, pytest.param(file_sd, marks=pytest.mark.slow)])
def test_a_workers_file_is_live(engines: list[str], tmp_path: Path, shape: Callable[..., bytes]) -> None:
    path = tmp_path / "workers.json"
    path.write_bytes(shape(engines[:1]))
    with (
        gateway("--workers-file", str(path), "--policy", "random") as gate,
        Traffic(address_of(gate), completion(), connections=8) as traffic,
        shard_clients(gate) as clients,
    ):
        for number, edit in enumerate(EDITS * 2):
            wanted = engines[: 1 + (number + 1) % 3]
            edit(path, shape(wanted))
            gate.wait_until(f"{len(wanted)} workers", partial(serves, gate, wanted))
            live = set(ids(gate).values())
            for client in clients:
                picked = {reply.headers["x-pointsman-worker"] for reply in ask_often(client)}
                assert picked == live
        first = ids(gate)[engines[0]]
        write_and_rename(path, shape(engines[:2], weight="3") if shape is file_sd else shape(engines[:2], weight=3))
        gate.wait_until("the weight", lambda: [worker["weight"] for worker in gate.workers()] == [3, 3])
        assert ids(gate)[engines[0]] == first, "an edited worker is the same worker"
        assert {worker["source"] for worker in gate.workers()} == {"file"}
        assert {worker["source_path"] for worker in gate.workers()} == {str(path)}
        report = traffic.stop()
        assert report.failures == []
        assert report.backwards == []


def serves(gate: Gateway, urls: list[str]) -> bool:
    workers = gate.workers()
    return [worker["url"] for worker in workers] == urls and all(worker["is_healthy"] for worker in workers)


def ids(gate: Gateway) -> dict[str, str]:
    return {worker["url"]: worker["id"] for worker in gate.workers()}


def test_a_broken_workers_file_changes_nothing(engines: list[str], tmp_path: Path) -> None:
    """Nor does it hold up a good profiles file that is saved with it."""
    path, rules = tmp_path / "workers.json", tmp_path / "profiles.json"
    path.write_bytes(own_shape(engines[:2]))
    rules.write_bytes(profiles("one"))
    with (
        gateway("--workers-file", str(path), "--profiles", str(rules)) as gate,
        shard_clients(gate) as clients,
    ):
        gate.wait_healthy(2)
        before = ids(gate)
        breakages = {
            b'{"workers": [\n{"url": "http://127.0.0.1:1", "wieght": 2}]}': (":2:31: workers[0].wieght:", "'weight'"),
            b'{"workers": [\n{"url": "http://1.1.1.1:80"}]}': (":2", "worker_networks"),
            f'{{"workers": [\n{{"url": "http://127.0.0.1:{gate.port}"}}]}}'.encode(): (
                ":2",
                "listener of this gateway",
            ),
            b"": (":1", "empty"),
        }
        for number, (content, (place, says)) in enumerate(breakages.items()):
            write_and_rename(path, content)
            write_and_rename(rules, profiles(f"beside-{number}"))
            gate.wait_until("it is refused", lambda: not config(gate)["last_reload_ok"])
            (message,) = config(gate)["errors"]
            assert message.startswith(f"{path}{place}"), message
            assert says in message
            for client in clients:
                gate.wait_until("the profiles", lambda c=client, n=number: profile_of(c) == f"beside-{n}")  # type: ignore[misc]
            assert ids(gate) == before
            write_and_rename(path, own_shape(engines[:2]))
            gate.wait_until("mended", lambda: config(gate)["last_reload_ok"])
        path.unlink()
        gate.wait_until("it is missed", lambda: not config(gate)["last_reload_ok"])
        assert config(gate)["errors"] == [f"{path}: no such file"]
        assert ids(gate) == before
        write_and_rename(path, own_shape(engines[:3]))
        gate.wait_until("mended", partial(serves, gate, engines[:3]))


def test_a_worker_belongs_to_whoever_declared_it(engines: list[str], tmp_path: Path) -> None:
    """A file's worker is changed in the file; an API's survives a restart with its id; a flag's is not kept."""
    path = tmp_path / "workers.json"
    path.write_bytes(own_shape(engines[:1]))
    arguments = ("--workers-file", str(path), "--policy", "random")
    with gateway(*arguments, "--workers", engines[1], folder=tmp_path) as gate:
        gate.wait_healthy(2)
        gate.add_worker(engines[2], weight=2.5, labels={"rack": "b"}, api_key="sk-engine")
        owned = quote(engines[0], safe="")
        for method, body in (("DELETE", None), ("PATCH", {"weight": 5})):
            status, answer = gate.admin(method, f"/workers/{owned}", body)
            assert (status, answer["code"]) == (409, "WORKER_DECLARED_IN_FILE")
            assert str(path) in answer["error"]
        status, answer = gate.admin("POST", "/workers", {"url": engines[0]})
        assert (status, answer["code"]) == (409, "WORKER_ALREADY_EXISTS")
        before = ids(gate)
        sources = {worker["url"]: worker["source"] for worker in gate.workers()}
        assert sources == dict(zip(engines, ("file", "flag", "api"), strict=False))
        removed = gate.add_worker(engines[3])["worker_id"]
        assert gate.admin("DELETE", f"/workers/{removed}")[0] == 202
        (kept,) = (tmp_path / "state").glob("workers.state.json")
        assert kept.stat().st_mode & 0o777 == 0o600

    path.write_bytes(own_shape([engines[3]]))
    with gateway(*arguments, folder=tmp_path) as gate:
        gate.wait_healthy(2)
        workers = {worker["url"]: worker for worker in gate.workers()}
        assert {url: worker["source"] for url, worker in workers.items()} == {engines[3]: "file", engines[2]: "api"}
        survivor = workers[engines[2]]
        assert survivor["id"] == before[engines[2]]
        assert (survivor["weight"], survivor["labels"], survivor["has_api_key"]) == (2.5, {"rack": "b"}, True)
        with shard_clients(gate) as clients:
            seen = {reply.headers["x-pointsman-worker"] for client in clients for reply in ask_often(client)}
            assert seen == {worker["id"] for worker in workers.values()}


def ask_often(client: Client) -> list[Reply]:
    """So many that chance (`random`, three workers) leaves one out once in a billion times."""
    return [client.ask(completion()) for _ in range(55)]


def test_a_removed_worker_is_not_picked_and_its_streams_go_on(paced_engines: list[str]) -> None:
    """DELETE answers when no shard picks it any more; what runs on it runs to its end."""
    with gateway("--policy", "round-robin", workers=paced_engines[:2]) as gate, ExitStack() as stack:
        clients = stack.enter_context(shard_clients(gate))
        streams = [stack.enter_context(Client(address_of(gate))) for _ in range(4)]
        heads = []
        for stream in streams:
            stream.sock.sendall(completion(max_tokens=15, stream=True))
            heads.append(stream.read_head())
        leaver, stayer = (worker["id"] for worker in gate.workers())
        assert {head["x-pointsman-worker"] for head in heads} == {leaver, stayer}
        status, answer = gate.admin("DELETE", f"/workers/{leaver}")
        assert status == 202
        assert answer["worker"]["in_flight"] == 2
        picked = {client.ask(TOKENIZE).headers["x-pointsman-worker"] for client in clients for _ in range(10)}
        assert picked == {stayer}
        assert [worker["id"] for worker in gate.workers()] == [stayer]
        assert [worker["id"] for worker in gate.workers("?state=draining")] == [leaver]
        for stream in streams:
            answer = stream.rest
            while not answer.endswith(LAST_CHUNK):
                answer += stream.sock.recv(65536)
            assert b"data: [DONE]" in answer
        gate.wait_until("it is gone", lambda: gate.workers("?state=draining") == [])
        assert gate.admin("GET", f"/workers/{leaver}")[0] == 404
