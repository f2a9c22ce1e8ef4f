"""Rollbacks, files on trial and edits while requests run: none of those that were allowed before and after fails."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from pointsman.config.keys_file import digest_of
from pointsman.scripts.simulated_engine.launch import launch_engines
from tests.fakes.edits import write_and_rename
from tests.fakes.gateway import Gateway, gateway
from tests.fakes.traffic import Client, Traffic, client_of_each, completion, request

ROUNDS = 6
KEY_EDITS = 20
STREAM_TOKENS = 30
STEP_S = 0.05
TRIAL_S = 1.0
LONG_TRIAL_S = 60.0
"""longer than it takes to confirm on a busy machine"""
WORKER_KEY = "sk-the-worker-wants-this"


@pytest.fixture(scope="module")
def engines() -> Iterator[list[str]]:
    with launch_engines(3, "--preset", "h100-8b", "--speed", str(0.007 / STEP_S)) as running:
        yield [engine.url for engine in running]


class Files:
    """A profiles and a workers file; every profile of theirs is called as the edit that made it."""

    def __init__(self, folder: Path, urls: list[str]) -> None:
        self.profiles = folder / "profiles.json"
        self.workers = folder / "workers.json"
        self.write("first", urls)

    @property
    def flags(self) -> tuple[str, ...]:
        return ("--profiles", str(self.profiles), "--workers-file", str(self.workers))

    def write(self, profile: str, urls: list[str] | None = None, **worker: Any) -> None:
        write_and_rename(self.profiles, profiles(profile))
        if urls is not None:
            declared = [{"url": url, "api_key": WORKER_KEY, **worker} for url in urls]
            write_and_rename(self.workers, json.dumps({"workers": declared}).encode())


def profiles(name: str) -> bytes:
    return json.dumps({"defaultProfile": name, "profiles": {name: {"routingStrategy": "least-request"}}}).encode()


def config(gate: Gateway) -> dict[str, Any]:
    return dict(gate.admin("GET", "/config")[1])


def held(gate: Gateway) -> dict[str, str]:
    return {each["kind"]: each["what"] for each in config(gate)["held"]}


def causes(gate: Gateway) -> list[str]:
    """The last one first."""
    return [entry["cause"] for entry in gate.admin("GET", "/config/history")[1]["generations"]]


def post(gate: Gateway, action: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    status, answer = gate.admin("POST", f"/config/{action}", body)
    assert status == 200, answer
    return dict(answer)


def apply(gate: Gateway, name: str, within_s: float | None = None) -> dict[str, Any]:
    body = {"kind": "profiles", "name": f"{name}.json", "content": profiles(name).decode()}
    return post(gate, "apply", body | ({} if within_s is None else {"confirm_within_s": within_s}))


def command(gate: Gateway, *arguments: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "pointsman.daemon.main", *arguments, "--admin", f"unix:{gate.socket_path}"]
    return subprocess.run(line, capture_output=True, text=True, check=False, timeout=90)


class Shards:
    """One connection to each shard; asks which profile the next request gets."""

    def __init__(self, clients: list[Client], gate: Gateway) -> None:
        self._clients = clients
        self._gate = gate

    def profiles(self) -> set[str]:
        wire = request({"model": "sim-model", "prompt": "one two"}, "/tokenize")
        return {client.ask(wire).profile for client in self._clients}

    def become(self, profile: str, timeout_s: float = 10.0) -> None:
        self._gate.wait_until(f"{profile} on all shards", lambda: self.profiles() == {profile}, timeout_s)


@contextmanager
def shards_of(gate: Gateway) -> Iterator[Shards]:
    with client_of_each(gate.pids("shard"), (gate.host, gate.port)) as clients:
        yield Shards(list(clients.values()), gate)


# --- under load


@pytest.mark.slow
def test_rollbacks_trials_and_edits_under_load(engines: list[str], tmp_path: Path) -> None:
    files = Files(tmp_path, engines[:2])
    with ExitStack() as stack:
        gate = stack.enter_context(gateway(*files.flags))
        gate.wait_healthy(2)
        shards = stack.enter_context(shards_of(gate))
        address = gate.host, gate.port
        short = stack.enter_context(Traffic(address, completion(), connections=8))
        wire = completion(max_tokens=STREAM_TOKENS, stream=True)
        long = stack.enter_context(Traffic(address, wire, connections=16, is_complete=is_whole))
        first = config(gate)["generation"]
        for number in range(ROUNDS):
            go_round(gate, files, shards, number, engines)
        whole, answered = long.stop(), short.stop()
        last = config(gate)["generation"]
    assert (whole.failures, answered.failures) == ([], [])
    assert (whole.backwards, answered.backwards) == ([], [])
    assert whole.answered >= 16
    assert last - first >= 5 * ROUNDS
    print(f"\n{last - first} generations, {whole.answered} streams and {answered.answered} requests, none failed")


def is_whole(answer: bytes) -> bool:
    return answer.count(b"data: {") >= STREAM_TOKENS and b"data: [DONE]" in answer


def go_round(gate: Gateway, files: Files, shards: Shards, number: int, engines: list[str]) -> None:
    """Every change is in force on both shards when it is answered, and workers come and go with it."""
    before = config(gate)["generation"]
    was = shards.profiles()
    files.write(f"edit-{number}", engines if number % 2 else engines[1:])
    shards.become(f"edit-{number}")
    gate.wait_until("the workers are those of the file", lambda: len(gate.workers()) == (3 if number % 2 else 2))
    assert held(gate) == {}

    after = post(gate, "rollback", {"generation": before})
    assert shards.profiles() == was
    assert held(gate) == {"profiles": f"generation {before}", "workers": f"generation {before}"}
    assert after["generation"] > before

    apply(gate, f"trial-{number}", TRIAL_S)
    shards.become(next(iter(was)))  # by itself
    assert held(gate)["profiles"] == f"generation {before}"
    assert causes(gate)[:2] == ["not confirmed", f"apply trial-{number}.json"]

    apply(gate, f"kept-{number}", LONG_TRIAL_S)
    assert shards.profiles() == {f"kept-{number}"}
    post(gate, "confirm")
    assert shards.profiles() == {f"kept-{number}"}
    post(gate, "release")
    assert shards.profiles() == {f"edit-{number}"}
    assert held(gate) == {}


@pytest.mark.slow
def test_key_edits_and_rollbacks_under_load(engines: list[str], tmp_path: Path) -> None:
    """A key that stays in the file is never refused; one that is taken out is, on both shards, from then on."""
    files, keys = Files(tmp_path, engines), tmp_path / "keys.json"
    steady, guest = "sk-steady-0123456789", "sk-guest-0123456789"

    def write_keys(*present: str, **more: str) -> None:
        found = {f"key-{key[3:8]}": {"sha256": digest_of(key).hex()} for key in present}
        write_and_rename(
            keys, json.dumps({"keys": found | {name: {"key": key} for name, key in more.items()}}).encode()
        )

    def question(key: str) -> bytes:
        body = {"model": "sim-model", "prompt": "one", "max_tokens": 1}
        return request(body, headers={"Authorization": f"Bearer {key}"})

    def statuses(key: str) -> set[int]:
        with client_of_each(gate.pids("shard"), address) as clients:
            return {client.ask(question(key)).status for client in clients.values()}

    write_keys(steady)
    with gateway(*files.flags, "--api-key-file", str(keys)) as gate:
        gate.wait_healthy(3)
        address = gate.host, gate.port
        with Traffic(address, question(steady), connections=16) as traffic:
            for number in range(KEY_EDITS):
                present = (steady, guest) if number % 2 == 0 else (steady,)
                write_keys(*present, filler=f"sk-filler-{number:012}")
                wanted = {200} if number % 2 == 0 else {401}
                gate.wait_until("the guest's key is judged anew", lambda wanted=wanted: statuses(guest) == wanted)  # type: ignore[misc]
                if number % 5 == 4:
                    before = config(gate)["generation"]
                    files.write(f"edit-{number}")
                    gate.wait_until("the edit", lambda before=before: config(gate)["generation"] > before)  # type: ignore[misc]
                    post(gate, "rollback", {"generation": before})
                    assert statuses(guest) == wanted, "keys are no part of a rollback"
            report = traffic.stop()
    assert report.failures == []
    assert report.answered > 100
    print(f"\n{KEY_EDITS} edits of keys, {report.answered} requests with a key that stayed, none failed")


# --- what survives


@pytest.mark.slow
def test_a_trial_ends_in_time_though_control_dies(engines: list[str], tmp_path: Path) -> None:
    files = Files(tmp_path, engines)
    with gateway(*files.flags) as gate, shards_of(gate) as shards:
        gate.wait_healthy(3)
        (control,) = gate.pids("control")
        deadline = apply(gate, "trial", 4.0)["held"][0]["confirm_by"]
        os.kill(control, signal.SIGKILL)
        assert shards.profiles() == {"trial"}
        gate.wait_log("control_ready", timeout_s=10)
        shards.become("first")
        assert time.time() >= deadline
        gate.wait_until("control knows that it is over", lambda: held(gate) == {})
        assert causes(gate)[:2] == ["not confirmed", "apply trial.json"]


@pytest.mark.slow
def test_a_hold_and_the_history_survive_a_restart_until_the_file_changes(engines: list[str], tmp_path: Path) -> None:
    files = Files(tmp_path, engines[:2])
    with gateway(*files.flags, folder=tmp_path) as gate, shards_of(gate) as shards:
        first = config(gate)["generation"]
        files.write("second", engines, weight=2.0)
        shards.become("second")
        gate.wait_until("three workers", lambda: len(gate.workers()) == 3)
        last = post(gate, "rollback", {"generation": first})["generation"]
        assert "HELD" in command(gate, "status").stdout
    with gateway(*files.flags, folder=tmp_path) as gate, shards_of(gate) as shards:
        assert shards.profiles() == {"first"}
        assert {worker["url"]: worker["weight"] for worker in gate.workers()} == dict.fromkeys(engines[:2], 1.0)
        assert held(gate) == {"profiles": f"generation {first}", "workers": f"generation {first}"}
        assert config(gate)["generation"] > last, "generations go on counting"
        assert causes(gate)[0] == f"rollback to {first}"
        assert causes(gate)[-1] == "start"
        files.profiles.touch()
        gate.admin("POST", "/config/reload")
        assert shards.profiles() == {"first"}, "the same bytes are no change"
        write_and_rename(files.profiles, profiles("third"))
        shards.become("third")
        assert held(gate) == {"workers": f"generation {first}"}
        files.write("third", engines)
        gate.wait_until("nothing is held", lambda: held(gate) == {})


@pytest.mark.slow
def test_a_trial_whose_deadline_passes_while_nothing_runs_is_over(engines: list[str], tmp_path: Path) -> None:
    files = Files(tmp_path, engines)
    with gateway(*files.flags, folder=tmp_path) as gate:
        deadline = apply(gate, "trial", 1.0)["held"][0]["confirm_by"]
        gate.signal(signal.SIGKILL)
        gate.process.wait()
    time.sleep(max(0.0, deadline - time.time()))  # the deadline is of the wall clock, and this waits for it
    with gateway(*files.flags, folder=tmp_path) as gate, shards_of(gate) as shards:
        assert shards.profiles() == {"first"}
        assert held(gate) == {}
        assert causes(gate)[:2] == ["not confirmed", "apply trial.json"]


@pytest.mark.slow
def test_a_trial_goes_on_through_an_upgrade(engines: list[str], tmp_path: Path) -> None:
    files = Files(tmp_path, engines)
    with gateway(*files.flags, folder=tmp_path) as gate:
        gate.wait_healthy(3)
        apply(gate, "trial", LONG_TRIAL_S)
        assert gate.upgrade().returncode == 0, gate.log_text()
        assert config(gate)["held"][0]["confirm_by"] is not None
        with shards_of(gate) as shards:
            assert shards.profiles() == {"trial"}
            post(gate, "confirm")
            assert shards.profiles() == {"trial"}
        assert config(gate)["held"][0]["confirm_by"] is None


# --- secrets


@pytest.mark.slow
def test_the_history_has_no_secret_and_says_when_it_lacks_one(engines: list[str], tmp_path: Path) -> None:
    files = Files(tmp_path, engines[:1])
    with gateway(*files.flags, folder=tmp_path) as gate:
        first = config(gate)["generation"]
        declared = [{"url": engines[0], "api_key": "sk-rotated-to-this"}]
        write_and_rename(files.workers, json.dumps(declared).encode())
        gate.wait_until("the key is rotated", lambda: config(gate)["generation"] > first)
        change = gate.admin("GET", f"/config/diff?from={first}")[1]["changes"]
        assert [each["path"] for each in change] == [f'workers["{engines[0]}"].api_key']
        assert all(each["before"].startswith("hash:") for each in change)
        post(gate, "rollback", {"generation": first})  # this process has seen the key
        post(gate, "release")
    path = tmp_path / "state" / "config.history.json"
    assert path.stat().st_mode & 0o777 == 0o600
    assert WORKER_KEY not in path.read_text()
    assert "sk-rotated-to-this" not in path.read_text()
    assert not (tmp_path / "state" / "config.held.json").exists()
    with gateway(*files.flags, folder=tmp_path) as gate:
        status, answer = gate.admin("POST", "/config/rollback", {"generation": first})
        assert (status, answer["code"]) == (409, "SECRET_NOT_KEPT")
        assert engines[0] in answer["error"]
        assert held(gate) == {}


# --- the command line


def test_the_commands(engines: list[str], tmp_path: Path) -> None:
    files = Files(tmp_path, engines)
    new = tmp_path / "new-profiles.json"
    new.write_bytes(profiles("new"))
    with gateway(*files.flags) as gate, shards_of(gate) as shards:
        first = config(gate)["generation"]
        applied = command(gate, "apply", str(new), "--confirm-within", "60s")
        assert applied.returncode == 0, applied.stderr
        assert "pointsman config confirm" in applied.stdout
        assert shards.profiles() == {"new"}
        again = command(gate, "apply", str(new))
        assert again.returncode == 1
        assert "waits for its confirmation" in again.stderr
        assert "UNCONFIRMED" in command(gate, "status").stdout
        assert command(gate, "config", "confirm").returncode == 0
        assert command(gate, "config", "confirm").returncode == 1
        assert "apply new-profiles.json" in command(gate, "config", "history").stdout
        assert "+ {" in command(gate, "config", "diff", str(first)).stdout
        assert json.loads(command(gate, "config", "show", str(first)).stdout)["default_profile"] == "first"
        assert command(gate, "config", "rollback", str(first)).returncode == 0
        assert shards.profiles() == {"first"}
        assert held(gate) == {}, "the files say the same: nothing is held in their place"
        assert command(gate, "config", "rollback", "9999").returncode == 1
        new.write_text('{"profiles": {"bad": {"routingStrategy": "rnd"}}}')
        refused = command(gate, "apply", str(new))
        assert refused.returncode == 78
        assert f"{new}:1:" in refused.stderr
        assert shards.profiles() == {"first"}
