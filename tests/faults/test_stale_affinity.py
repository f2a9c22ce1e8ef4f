"""An engine restarted at the same URL has an empty cache: nobody is sent there for what its predecessor held."""

from __future__ import annotations

import json
import os
import signal
import socket
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest

from pointsman.scripts.simulated_engine.launch import launch_engines
from tests.fakes.gateway import Gateway, gateway
from tests.fakes.prompts import prompt_text, shaped
from tests.fakes.traffic import Client

EXPLAIN = {"x-pointsman-explain": "1"}
PROBES = ("--health-interval-s", "0.2", "--health-down-interval-s", "0.1")
PROMPT = prompt_text("a prompt that one engine holds", 8000)


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def decision(gate: Gateway) -> dict[str, Any]:
    """How a shard routes the prompt; the answer is read to its end."""
    with Client((gate.host, gate.port)) as client:
        reply = client.ask(shaped("prompt string", PROMPT, EXPLAIN, max_tokens=2))
    return dict(json.loads(reply.headers["x-pointsman-decision"]))


def matched_at(gate: Gateway, url: str) -> int:
    return int(decision(gate)["explanation"]["matched_tokens"].get(url, 0))


@pytest.mark.parametrize("flavor", ["vllm", "sglang", "llamacpp"])
def test_a_restarted_engine_is_believed_to_hold_nothing(flavor: str) -> None:
    ports = free_port(), free_port()
    with ExitStack() as stack:
        engines = {
            engine.url: engine
            for port in ports
            for engine in stack.enter_context(launch_engines(1, "--port", str(port), "--flavor", flavor))
        }
        gate = stack.enter_context(gateway(*PROBES, workers=list(engines)))
        holder = engines[decision(gate)["worker"]]
        gate.wait_until("the prompt is known", lambda: matched_at(gate, holder.url) > 1900)
        os.kill(holder.pid, signal.SIGKILL)
        gate.wait_until("the engine is down", lambda: not is_healthy(gate, holder.url))
        stack.enter_context(launch_engines(1, "--port", str(holder.port), "--flavor", flavor))
        gate.wait_until("the engine is up", lambda: is_healthy(gate, holder.url))
        gate.wait_until("its cache is forgotten", was_forgotten(gate, holder.url))
        # whatever was asked meanwhile went to the other one, or came back after the restart: both are true
        forgotten = [line for line in gate.log if line["event"] == "cache_forgotten"]
        assert [line["worker"] for line in forgotten] == [holder.url]
        assert forgotten[0]["chars"] >= 8000


def test_forgetting_by_hand() -> None:
    with launch_engines(2) as engines, gateway(workers=[engine.url for engine in engines]) as gate:
        holder = decision(gate)["worker"]
        assert matched_at(gate, holder) == 1999
        worker = next(worker for worker in gate.workers() if worker["url"] == holder)
        assert gate.admin("POST", f"/workers/{worker['id']}/forget")[0] == 200
        assert decision(gate)["matched_tokens"] == 0
        assert gate.admin("POST", "/workers/nobody/forget")[0] == 404


def was_forgotten(gate: Gateway, url: str) -> Callable[[], bool]:
    return lambda: any(line["event"] == "cache_forgotten" and line["worker"] == url for line in gate.log)


def is_healthy(gate: Gateway, url: str) -> bool:
    return any(worker["url"] == url and worker["is_healthy"] for worker in gate.workers())
