"""Access lines on every shard: sampled, as text, changed while they run."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from pointsman.scripts.simulated_engine.launch import launch_engines
from tests.fakes.data_plane import data_plane
from tests.fakes.gateway import Gateway, gateway
from tests.fakes.traffic import Client, client_of_each, completion

FINE = 30


@pytest.fixture(scope="module")
def engine() -> Iterator[str]:
    with launch_engines(1) as engines:
        yield engines[0].url


def ask(clients: dict[int, Client], times: int) -> None:
    for client in clients.values():
        for _ in range(times):
            assert client.ask(completion()).status == 200


def refused(clients: dict[int, Client], mark: str, gate: Gateway) -> None:
    """An error on every shard, whose line always comes, and comes after the lines before it."""
    for client in clients.values():
        assert client.get(f"/nowhere/{mark}").status == 404
    gate.wait_until(mark, lambda: len(lines_of(gate, f"/nowhere/{mark}")) == len(clients))


def lines_of(gate: Gateway, path: str = "/v1/completions") -> list[dict[str, object]]:
    return [line for line in gate.log if line["event"] == "request" and line["path"] == path]


def test_sampling_and_level_are_changed_on_all_shards_and_outlive_control(engine: str) -> None:
    with gateway("--access-log-sample", "0", workers=[engine]) as gate:
        gate.wait_healthy(1)
        with client_of_each(gate.pids("shard"), (gate.host, gate.port)) as clients:
            ask(clients, FINE)
            refused(clients, "none", gate)
            assert lines_of(gate) == [], "of those without an error none"
            assert gate.admin("PUT", "/log-level", {"access_sample": 1, "level": "error"})[0] == 200
            ask(clients, FINE)
            refused(clients, "all", gate)
            found = lines_of(gate)
            assert len(found) == FINE * len(clients)
            assert {line["shard"] for line in found} == {0, 1}
            assert {(line["term"], line["end"], line["attempts"]) for line in found} == {("--", "complete", 1)}
            gate.admin("PUT", "/log-level", {"access_sample": 0.5})
            ask(clients, FINE)
            refused(clients, "half", gate)
            assert 0 < len(lines_of(gate)) - len(found) < FINE * len(clients)
        (control,) = gate.pids("control")
        os.kill(control, signal.SIGKILL)
        gate.wait_until("control is back", lambda: gate.pids("control") not in ([], [control]))
        kept = {"level": "error", "access_log": True, "access_sample": 0.5}
        assert gate.admin("GET", "/log-level")[1] == kept
        assert gate.admin("PUT", "/log-level", {"level": "loud"})[0] == 400


def test_lines_as_text_have_the_same_fields(engine: str) -> None:
    with data_plane(shards=1, workers=[engine], access_log_format="text") as plane:
        with Client(plane.address) as client:
            number = client.ask(completion()).headers["x-request-id"]
        plane.wait_until("its line", lambda: f"id={number}" in plane.log_text())
        (line,) = [line for line in plane.log_text().splitlines() if f"id={number}" in line]
    assert f" 127.0.0.1 POST /v1/completions 200 -- id={number} shard=0 " in line
    assert f" worker={engine} attempts=1 " in line
    assert line.endswith(" end=complete")
