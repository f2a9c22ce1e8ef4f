"""Workers that fail a share of their requests, or all: what clients see of it, what it costs, when a breaker opens."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator

import pytest

from pointsman.config.resilience import RetrySection
from pointsman.scripts.simulated_engine.launch import launch_engines
from tests.fakes.answers import Answer, read_answer
from tests.fakes.chaos import ChaosFleet, Cut, How, Status, Trouble, chaos
from tests.fakes.gateway import Gateway
from tests.fakes.leeway import leeway
from tests.fakes.live_profiles import LiveProfiles, gateway_with
from tests.fakes.load import Load, share, statuses
from tests.fakes.permits import assert_none_is_held
from tests.fakes.processes import resident_bytes, wait_until
from tests.fakes.traffic import Client, client_of_each, completion, request

REQUESTS = 4000
DEFAULTS = RetrySection()
NO_BREAKERS = {"breaker": {"enabled": False}}


@pytest.fixture(scope="module")
def fleet() -> Iterator[ChaosFleet]:
    with launch_engines(4) as engines, chaos([engine.url for engine in engines]) as running:
        yield running


@pytest.fixture(autouse=True)
def healed(fleet: ChaosFleet) -> Iterator[None]:
    yield
    fleet.heal()


def wire(_number: int) -> bytes:
    return completion()


def budget(requests: int, seconds: float) -> float:
    """Retries that are allowed in that time, under the defaults."""
    return DEFAULTS.budget_ratio * requests + DEFAULTS.budget_min_per_s * (seconds + 10)


def assert_nothing_stays(gate: Gateway) -> None:
    gate.wait_until("no load", lambda: not any(worker["in_flight"] for worker in gate.workers()), 2)
    assert gate.in_flight() == 0
    assert_none_is_held(gate)


@pytest.mark.parametrize("shared", [NO_BREAKERS, {}], ids=["no breakers", "breakers"])
def test_one_of_four_fails_thirty_percent(fleet: ChaosFleet, shared: dict[str, dict[str, object]]) -> None:
    """Clients do not notice, and what hides it stays within the budget."""
    fleet.workers[2].suffers(Trouble(Status(500), rate=0.15, seed=1), Trouble(Cut(How.RESET), rate=0.15 / 0.85, seed=2))
    with gateway_with({}, shared, "--policy", "round_robin", workers=fleet.urls) as (gate, _):
        started = time.monotonic()
        with Load((gate.host, gate.port), wire, clients=16, total=REQUESTS) as load:
            samples = load.wait()
        took = time.monotonic() - started
        seen = statuses(samples)
        failed = REQUESTS - seen[200]
        extra = len(fleet.attempts) - REQUESTS
        struck = sum(attempt.fault is not None for attempt in fleet.attempts)
        print(f"\n{REQUESTS} requests in {took:.1f} s: {struck} struck, {extra} extra attempts, {failed} failed")
        assert failed / REQUESTS < 0.001, seen
        assert struck > 0.2 * REQUESTS / 4
        assert extra <= budget(REQUESTS, took)
        assert_nothing_stays(gate)


def test_all_fail_all_the_time(fleet: ChaosFleet) -> None:
    """Attempts stay within the budget, clients hear of it soon, and nothing piles up."""
    for worker in fleet.workers:
        worker.suffers(Trouble(Status(503)))
    with gateway_with({}, NO_BREAKERS, workers=fleet.urls) as (gate, _):
        started = time.monotonic()
        with Load((gate.host, gate.port), wire, clients=16, total=REQUESTS // 4) as load:
            load.wait()
        pids = gate.pids("shard")
        before = resident_bytes(pids)
        with Load((gate.host, gate.port), wire, clients=16, total=REQUESTS) as load:
            samples = load.wait()
        took = time.monotonic() - started
        grown = resident_bytes(pids) - before
        requests = REQUESTS + REQUESTS // 4
        extra = len(fleet.attempts) - requests
        slowest = share((sample.took_s for sample in samples), 0.99)
        print(
            f"\n{requests} requests in {took:.1f} s: {extra} extra attempts, budget {budget(requests, took):.0f}; ",
            end="",
        )
        print(f"p99 {slowest * 1000:.0f} ms, memory {grown / 2**20:+.1f} MiB")
        assert statuses(samples) == {503: REQUESTS}
        assert 0.5 * DEFAULTS.budget_ratio * requests <= extra <= budget(requests, took)
        assert slowest < 1.0 * leeway()
        assert grown < 4 * 2**20
        assert_nothing_stays(gate)


# --- breakers

QUICK = {"failure_threshold": 3, "success_threshold": 2, "timeout_s": 1.0, "window_s": 60}
ONE_ATTEMPT = {"retry": {"max_retries": 1}, "timeouts": {"first_token_s": 1.0, "total_s": 20}}


class Watched:
    """A sole worker behind two shards, asked on each of them by turns."""

    def __init__(self, gate: Gateway, profiles: LiveProfiles, fleet: ChaosFleet, clients: list[Client]) -> None:
        self.gate = gate
        self.profiles = profiles
        self.fleet = fleet
        self._clients = clients

    def ask(self, *, stream: bool = False) -> Answer:
        self._clients.append(self._clients.pop(0))
        client = self._clients[0]
        client.sock.sendall(completion(stream=stream))
        answer = read_answer(client)
        if answer.is_whole and answer.status < 400:
            # A success counts when all is over; a failure before its client can know.
            assert client.get("/health").status == 200
        return answer

    def fails(self, times: int | None = None) -> None:
        self.fleet.workers[0].suffers(Trouble(Status(500), times=times))

    def recovers(self) -> None:
        self.fleet.workers[0].suffers()

    def ask_all(self, times: int) -> list[int]:
        return [self.ask().status for _ in range(times)]

    def is_open(self) -> bool:
        """What the next request is told, on every shard; the worker does not see any of them."""
        before = len(self.fleet.attempts)
        answers = [self.ask() for _ in self._clients]
        for answer in answers:
            if answer.status != 503:
                return False
            assert answer.error_code == "circuit_open"
            assert 1 <= int(answer.headers["retry-after"]) <= math.ceil(QUICK["timeout_s"])
        assert len(self.fleet.attempts) == before
        return True

    def opens(self) -> None:
        self.fails()
        assert self.ask_all(3) == [500] * 3
        assert self.is_open()

    def wait_half_open(self) -> Answer:
        """Asks until the probe is let through; its answer."""
        return self.gate.wait_until("a probe goes out", self._passed, 5)[0]

    def _passed(self) -> list[Answer]:
        before = len(self.fleet.attempts)
        answer = self.ask()
        return [answer] if len(self.fleet.attempts) > before else []


@pytest.fixture
def watched(fleet: ChaosFleet) -> Iterator[Watched]:
    with gateway_with(ONE_ATTEMPT, {"breaker": QUICK}, workers=fleet.urls[:1]) as (gate, profiles):
        with client_of_each(gate.pids("shard"), (gate.host, gate.port)) as clients:
            yield Watched(gate, profiles, fleet, list(clients.values()))
        assert_nothing_stays(gate)


def test_three_failures_open_the_only_workers_breaker_for_all_shards(watched: Watched) -> None:
    assert watched.ask_all(4) == [200] * 4
    watched.fails(2)
    assert watched.ask_all(4) == [500, 500, 200, 200]
    watched.fails(2)
    assert watched.ask_all(3) == [500, 500, 200], "a success in between: three in a row are needed"
    watched.opens()


def test_one_failing_probe_opens_it_again(watched: Watched) -> None:
    watched.opens()
    for _ in range(2):
        started = time.monotonic()
        assert watched.wait_half_open().status == 500
        assert time.monotonic() - started > 0.5 * QUICK["timeout_s"]
        assert watched.is_open()


def test_probes_that_succeed_close_it(watched: Watched) -> None:
    watched.opens()
    watched.recovers()
    assert watched.wait_half_open().status == 200
    assert watched.ask_all(8) == [200] * 8
    watched.fails(2)
    assert watched.ask_all(3) == [500, 500, 200], "it is closed, and counts from zero"


def test_only_one_probe_goes_out_at_a_time(watched: Watched) -> None:
    watched.opens()
    watched.recovers()
    watched.fleet.plan("probe", Cut(How.HANG))
    watched.profiles.change(watched.gate, breaker=QUICK | {"timeout_s": 0.001})
    with Client((watched.gate.host, watched.gate.port)) as prober:
        prober.sock.sendall(request({"model": "sim-model", "prompt": "x"}, headers={"X-Request-Id": "probe"}))
        wait_until("the probe is out", lambda: bool(watched.fleet.attempts_of("probe")), 5)
        assert watched.ask_all(4) == [503] * 4
    # the client has left: that tells nothing of the worker, and the next probe may go at once
    assert watched.wait_half_open().status == 200
    assert watched.ask_all(4) == [200] * 4


@pytest.mark.parametrize("status", [400, 404, 429])
def test_what_clients_do_wrong_is_not_held_against_the_worker(watched: Watched, status: int) -> None:
    watched.fleet.workers[0].suffers(Trouble(Status(status), times=10))
    assert watched.ask_all(12) == [status] * 10 + [200] * 2


def test_broken_connections_and_timeouts_count(watched: Watched) -> None:
    watched.fleet.workers[0].suffers(
        Trouble(Cut(How.RESET), times=1), Trouble(Cut(How.FIN), times=1), Trouble(Cut(How.HANG), times=1)
    )
    assert [watched.ask(stream=True).status for _ in range(3)] == [502, 502, 504]
    assert watched.is_open()


def test_a_stream_that_breaks_counts(watched: Watched) -> None:
    watched.fleet.workers[0].suffers(Trouble(Cut(How.FIN, after_events=1)))
    for _ in range(3):
        with Client((watched.gate.host, watched.gate.port)) as client:
            client.sock.sendall(completion(max_tokens=4, stream=True))
            assert not read_answer(client).is_whole
    assert watched.is_open()


def test_its_settings_change_live(watched: Watched) -> None:
    watched.profiles.change(watched.gate, breaker=QUICK | {"failure_threshold": 1, "timeout_s": 600})
    watched.fails(1)
    assert watched.ask_all(1) == [500]
    answer = watched.ask()
    assert answer.status == 503
    assert 590 <= int(answer.headers["retry-after"]) <= 600
    watched.profiles.change(watched.gate, breaker={"enabled": False})
    assert watched.ask_all(4) == [200] * 4
    watched.profiles.change(watched.gate, breaker=QUICK | {"timeout_s": 0.001})
    watched.gate.wait_until("it is open no more", lambda: watched.ask().status == 200)
    assert watched.ask_all(4) == [200] * 4


def test_of_two_bad_workers_one_stays(fleet: ChaosFleet) -> None:
    """All engines stumble over the same load: half of them are asked all the same."""
    for worker in fleet.workers[:2]:
        worker.suffers(Trouble(Status(500)))
    with gateway_with(
        ONE_ATTEMPT, {"breaker": QUICK | {"timeout_s": 600}}, "--policy", "round_robin", workers=fleet.urls[:2]
    ) as (gate, _):
        with Client((gate.host, gate.port)) as client:
            assert {client.ask(completion()).status for _ in range(40)} == {500}
            last = [attempt.worker for attempt in fleet.attempts[-20:]]
            assert len(set(last)) == 1, "one is kept out"
            other = fleet.workers[1 - last[0]]
            fleet.workers[last[0]].suffers()
            other.suffers()
            assert {client.ask(completion()).status for _ in range(10)} == {200}
        assert_nothing_stays(gate)


def test_an_open_breaker_is_not_noticed_where_another_worker_is(fleet: ChaosFleet) -> None:
    fleet.workers[0].suffers(Trouble(Status(500)))
    with gateway_with(
        {}, {"breaker": QUICK | {"timeout_s": 600}}, "--policy", "round_robin", workers=fleet.urls[:3]
    ) as (gate, _):
        with Load((gate.host, gate.port), wire, clients=8, total=500) as load:
            samples = load.wait()
        assert statuses(samples) == {200: 500}
        # those that were on their way when it opened, and no more
        assert 3 <= sum(attempt.worker == 0 for attempt in fleet.attempts) <= 3 + 8
        assert_nothing_stays(gate)
