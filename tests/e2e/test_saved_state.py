"""What routing has learned outlives the daemon, unless the engines or the file do not deserve it."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from pointsman.scripts.simulated_engine.launch import EngineAddress, launch_engines
from tests.fakes.gateway import Gateway, gateway
from tests.fakes.prompts import prompt_text, shaped
from tests.fakes.traffic import Client

PROBES = ("--health-interval-s", "0.2", "--health-down-interval-s", "0.1")
EXPLAIN = {"x-pointsman-explain": "1"}
PROMPTS = [prompt_text(f"prompt {number}", 3000) for number in range(60)]
STATE = "routing.state"


@contextmanager
def started(folder: Path, engines: Sequence[EngineAddress], *arguments: str) -> Iterator[Gateway]:
    with gateway(*PROBES, *arguments, workers=[engine.url for engine in engines], folder=folder) as gate:
        yield gate


def decisions(gate: Gateway, prompts: Sequence[str] = PROMPTS) -> list[dict[str, Any]]:
    """How the shards route them, one after the other; over several connections, so that both shards have their part."""
    found = []
    for at in range(0, len(prompts), 5):
        with Client((gate.host, gate.port)) as client:
            for text in prompts[at : at + 5]:
                reply = client.ask(shaped("prompt string", text, EXPLAIN, max_tokens=1))
                assert reply.status == 200, reply.body
                found.append(json.loads(reply.headers["x-pointsman-decision"]))
    return found


def statuses(gate: Gateway, count: int) -> list[tuple[int, str]]:
    """(status, our error's code), over a new connection each."""
    found = []
    for _ in range(count):
        with Client((gate.host, gate.port)) as client:
            reply = client.ask(shaped("prompt string", "a prompt", max_tokens=1))
        error = reply.json.get("error", {})
        found.append((reply.status, str(error.get("code") or "") if reply.status == 503 else ""))
    return found


def hit_share(found: Sequence[dict[str, Any]]) -> float:
    matched: int = sum(one["matched_tokens"] for one in found)
    return matched / int(sum(one["prompt_tokens"] for one in found))


def placed(found: Sequence[dict[str, Any]]) -> list[str]:
    return [one["worker"] for one in found]


def test_hits_after_a_restart_are_those_of_before(tmp_path: Path) -> None:
    with launch_engines(4) as engines:
        with started(tmp_path, engines) as gate:
            first = decisions(gate)
            before = decisions(gate)
            assert hit_share(first) < 0.1
        assert (tmp_path / "state" / STATE).stat().st_mode & 0o777 == 0o600
        with started(tmp_path, engines) as gate:
            loaded = gate.wait_log("routing_state_loaded")
            after = decisions(gate)
            assert not any(line["event"] in ("cache_forgotten", "routing_state_ignored") for line in gate.log)
    print(
        f"\nhits: first {hit_share(first):.3f}, before {hit_share(before):.3f}, after {hit_share(after):.3f}; {loaded}"
    )
    assert (loaded["workers"], loaded["workers_left_out"]) == (4, 0)
    assert placed(after) == placed(before)
    assert hit_share(after) == hit_share(before) > 0.95


@pytest.mark.slow
def test_an_engine_that_restarted_in_between_is_forgotten_and_the_others_are_not(tmp_path: Path) -> None:
    with ExitStack() as stack:
        engines = [stack.enter_context(launch_engines(1))[0] for _ in range(2)]
        with started(tmp_path, engines) as gate:
            decisions(gate)
            before = decisions(gate)
        gone, stays = engines
        os.kill(gone.pid, signal.SIGKILL)
        stack.enter_context(launch_engines(1, "--port", str(gone.port)))
        with started(tmp_path, engines) as gate:
            loaded = gate.wait_log("routing_state_loaded")
            after = decisions(gate)
    assert (loaded["workers"], loaded["workers_left_out"]) == (1, 1)
    assert {one["worker"] for one in before} == {gone.url, stays.url}
    for old, new in zip(before, after, strict=True):
        if old["worker"] == stays.url:
            assert (new["worker"], new["matched_tokens"]) == (stays.url, old["matched_tokens"])
        else:
            assert new["matched_tokens"] < 50, "at most what it shares with a prompt before it"


@pytest.mark.slow
def test_an_engine_that_comes_up_late_is_judged_then(tmp_path: Path) -> None:
    with ExitStack() as stack:
        engines = [stack.enter_context(launch_engines(1))[0] for _ in range(2)]
        urls = [engine.url for engine in engines]
        with started(tmp_path, engines) as gate:
            held = {worker: placed(decisions(gate)).count(worker) for worker in urls}
            assert min(held.values()) > 0
        late = engines[0]
        os.kill(late.pid, signal.SIGKILL)
        with gateway(*PROBES, "--workers", *urls, folder=tmp_path) as gate:
            loaded = gate.wait_log("routing_state_loaded")
            assert (loaded["workers"], loaded["workers_left_out"]) == (2, 0), "nobody knows yet"
            stack.enter_context(launch_engines(1, "--port", str(late.port)))
            assert gate.wait_log("cache_forgotten")["worker"] == late.url
            reason = gate.wait_log("engine_restarted")["reason"]
            assert reason in ("another start time", "refused connections, then up again"), "whichever is seen first"


@pytest.mark.slow
def test_an_upgrade_takes_along_what_was_learned(tmp_path: Path) -> None:
    with launch_engines(3) as engines, started(tmp_path, engines) as gate:
        decisions(gate)
        before = decisions(gate)
        done = gate.upgrade()
        assert done.returncode == 0, done.stderr
        loaded = gate.wait_log("routing_state_loaded")
        assert gate.wait_ended(10) == 0
        after = decisions(gate)
    assert loaded["workers"] == 3
    assert hit_share(after) == hit_share(before) > 0.95


@pytest.mark.slow
def test_an_open_breaker_stays_open(tmp_path: Path) -> None:
    breaker = ("--cb-failure-threshold", "3", "--cb-timeout-duration-secs", "600", "--disable-retries")
    fails = '{"kind": "status", "status": 500}'
    with launch_engines(1, "--fault", fails) as engines:
        with started(tmp_path, engines, *breaker) as gate:
            assert statuses(gate, 4) == [(500, ""), (500, ""), (500, ""), (503, "circuit_open")]
        with started(tmp_path, engines, *breaker) as gate:
            assert statuses(gate, 1) == [(503, "circuit_open")]
    with launch_engines(1, "--port", str(engines[0].port)), started(tmp_path, engines, *breaker) as gate:
        assert statuses(gate, 1) == [(200, "")], "it is another engine's"


@pytest.mark.slow
def test_after_a_kill_the_last_periodic_snapshot_counts(tmp_path: Path) -> None:
    with launch_engines(2) as engines:
        with started(tmp_path, engines, "--state-snapshot-interval-s", "0.2") as gate:
            before = decisions(gate), decisions(gate)
            path = tmp_path / "state" / STATE
            written = path.stat().st_mtime_ns if path.exists() else 0
            gate.wait_until("all of it was saved", lambda: path.exists() and path.stat().st_mtime_ns > written)
            saved = path.stat().st_mtime_ns
            gate.wait_until("and that is the last", lambda: path.stat().st_mtime_ns == saved)
            gate.process.kill()
            gate.process.wait()
        with started(tmp_path, engines) as gate:
            gate.wait_log("routing_state_loaded")
            after = decisions(gate)
    assert hit_share(after) == hit_share(before[1])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda data: data[: len(data) // 2], "cut off or damaged"),
        (lambda data: data[:100] + bytes([data[100] ^ 1]) + data[101:], "checksum"),
        (lambda data: b"", "no file of this kind"),
    ],
)
def test_a_damaged_file_means_a_cold_start_and_one_message(tmp_path: Path, damage: Any, reason: str) -> None:
    with launch_engines(2) as engines:
        with started(tmp_path, engines) as gate:
            decisions(gate, PROMPTS[:5])
        path = tmp_path / "state" / STATE
        path.write_bytes(damage(path.read_bytes()))
        with started(tmp_path, engines) as gate:
            assert hit_share(decisions(gate, PROMPTS[:5])) < 0.1
            (message,) = [line for line in gate.log if line["event"].startswith("routing_state")]
        assert message["event"] == "routing_state_ignored"
        assert message["file"] == str(path)
        assert reason in message["reason"]
        with started(tmp_path, engines) as gate:
            gate.wait_log("routing_state_loaded")


@pytest.mark.slow
def test_a_stale_file_and_one_of_other_blocks_are_not_loaded(tmp_path: Path) -> None:
    with launch_engines(1) as engines:
        with started(tmp_path, engines) as gate:
            decisions(gate, PROMPTS[:5])
        with started(tmp_path, engines, "--prefix-block-bytes", "256") as gate:
            assert "blocks of 512 bytes" in gate.wait_log("routing_state_ignored")["reason"]
        with started(tmp_path, engines, "--prefix-block-bytes", "256", "--state-max-age-s", "0.001") as gate:
            assert "s old" in gate.wait_log("routing_state_ignored")["reason"]
        (tmp_path / "state" / STATE).unlink()
        with started(tmp_path, engines, "--state-max-age-s", "0") as gate:
            decisions(gate, PROMPTS[:5])
        assert not (tmp_path / "state" / STATE).exists()


def test_a_snapshot_by_hand(tmp_path: Path) -> None:
    with launch_engines(2) as engines, started(tmp_path, engines, "--state-snapshot-interval-s", "0") as gate:
        decisions(gate, PROMPTS[:5])
        path = tmp_path / "state" / STATE
        status, answer = gate.admin("POST", "/state/snapshot")
        assert (status, answer["path"]) == (200, str(path))
        assert answer["bytes"] == path.stat().st_size > 1000
        assert 0 < answer["seconds"] < 5
        path.parent.chmod(0o500)
        try:
            if os.geteuid():
                status, answer = gate.admin("POST", "/state/snapshot")
                assert (status, answer["code"]) == (500, "STATE_NOT_SAVED")
        finally:
            path.parent.chmod(0o700)


@pytest.mark.slow
def test_a_respawned_control_loads_nothing_over_what_is_there(tmp_path: Path) -> None:
    with launch_engines(2) as engines:
        with started(tmp_path, engines) as gate:
            decisions(gate)
        with started(tmp_path, engines) as gate:
            gate.wait_log("routing_state_loaded")
            (pid,) = gate.pids("control")
            os.kill(pid, signal.SIGKILL)
            gate.wait_until("another control", lambda: _control(gate) not in (None, pid))
            before = decisions(gate)
            assert hit_share(before) > 0.95
            assert [line["event"] for line in gate.log].count("routing_state_loaded") == 1


def _control(gate: Gateway) -> int | None:
    try:
        return gate.pids("control")[0]
    except OSError:
        return None
