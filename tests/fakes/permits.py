"""Whether every permit of admission is there, seen from outside."""

from __future__ import annotations

from contextlib import ExitStack

from tests.fakes.answers import read_answer
from tests.fakes.chaos import ChaosFleet, Cut, How
from tests.fakes.gateway import Gateway
from tests.fakes.processes import wait_until
from tests.fakes.traffic import Client, request


def named(request_id: str, *, stream: bool = False, max_tokens: int = 8) -> bytes:
    """A completion whose attempts can be planned and found again."""
    body = {"model": "sim-model", "prompt": "count to three", "max_tokens": max_tokens, "stream": stream}
    return request(body, headers={"X-Request-Id": request_id})


def assert_none_is_held(gate: Gateway, timeout_s: float = 2.0) -> None:
    """By the daemon's own count: no permit, and nobody who waits for one."""
    gate.wait_until("no permit is held", lambda: held(gate) == (0, 0), timeout_s)


def held(gate: Gateway) -> tuple[int, int]:
    """(permits, waiters)"""
    admission = gate.admin("GET", "/status")[1]["admission"]
    return admission["in_use"], admission["waiting"]


def assert_all_are_free(gate: Gateway, fleet: ChaosFleet, permits: int) -> None:
    """As many requests as there are permits pass at once and one more is refused (the queue must have no places): none
    leaked, none was given back twice."""
    with ExitStack() as stack:
        clients = [stack.enter_context(Client((gate.host, gate.port))) for _ in range(permits + 1)]
        for number, client in enumerate(clients[:-1]):
            fleet.plan(f"permit-{number}", Cut(How.HANG))
            client.sock.sendall(named(f"permit-{number}"))
        wait_until(
            "all are at workers",
            lambda: all(fleet.attempts_of(f"permit-{number}") for number in range(permits)),
            5,
        )
        clients[-1].sock.sendall(named("permit-too-many"))
        answer = read_answer(clients[-1])
        assert (answer.status, answer.error_code) == (429, "admission_queue_full")
        assert int(answer.headers["retry-after"]) >= 1
        assert fleet.attempts_of("permit-too-many") == []
    gate.wait_until("no load", lambda: gate.in_flight() == 0, 2)
