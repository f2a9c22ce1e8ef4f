"""Simulated prefill and decode engines do to each other what real ones do: rooms, sessions, leases, memory."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import aiohttp
import pytest

from pointsman.scripts.simulated_engine import EngineLimits, EngineSettings, SimulatedEngine
from pointsman.scripts.simulated_engine.faults import Fault
from pointsman.scripts.simulated_engine.text import generate_output
from pointsman.scripts.simulated_engine.transfer import STALE, Transfers

PROMPT = "a prompt"
TOKENS = 4
TRANSFER_ERROR = Fault("transfer_error", times=1)
Answer = tuple[int, Any]


def right(prompt: str = PROMPT) -> str:
    return "".join(generate_output(prompt.encode(), TOKENS))


def text_of(answer: Answer) -> str:
    assert answer[0] == 200, answer
    return str(answer[1]["choices"][0]["text"])


def message_of(answer: Answer) -> str:
    assert answer[0] == 500, answer
    return str(answer[1]["error"]["message"])


@dataclass
class Pair:
    prefill: SimulatedEngine
    decode: SimulatedEngine
    client: aiohttp.ClientSession

    async def ask(self, engine: SimulatedEngine, **fields: Any) -> Answer:
        body = {"prompt": PROMPT, "max_tokens": TOKENS, **fields}
        async with self.client.post(f"{engine.url}/v1/completions", json=body) as answer:
            return answer.status, await answer.json()

    async def both(self, room: int, **fields: Any) -> tuple[Answer, Answer]:
        """SGLang: both legs at once."""
        members = {"bootstrap_host": "127.0.0.1", "bootstrap_port": self.prefill.bootstrap_port, "bootstrap_room": room}
        legs = (self.ask(engine, **members, **fields) for engine in (self.prefill, self.decode))
        first, second = await asyncio.gather(*legs)
        return first, second

    async def prefilled(self) -> dict[str, Any]:
        """vLLM: what prefill tells for decode."""
        status, answer = await self.ask(self.prefill, max_tokens=1, kv_transfer_params={"do_remote_decode": True})
        assert status == 200
        params: dict[str, Any] = answer["kv_transfer_params"]
        return params


def transfers(engine: SimulatedEngine) -> Transfers:
    found = engine.context.transfers
    assert found is not None
    return found


@asynccontextmanager
async def pair(*faults: Fault, flavor: Any = "sglang", **settings: Any) -> AsyncIterator[Pair]:
    """`faults`: of decode."""
    async with AsyncExitStack() as stack:
        prefill = SimulatedEngine(EngineSettings(flavor=flavor, role="prefill", **settings))
        decode = SimulatedEngine(EngineSettings(flavor=flavor, role="decode", faults=faults, **settings))
        for engine in (prefill, decode):
            await stack.enter_async_context(engine)
        yield Pair(prefill, decode, await stack.enter_async_context(aiohttp.ClientSession()))


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110 - an engine tells nobody
            await asyncio.sleep(0.005)


# --- SGLang


async def test_a_pair_answers_what_one_engine_would() -> None:
    async with pair() as engines:
        prefill, decode = await engines.both(7)
        assert text_of(decode) == right()
        assert prefill[1]["usage"]["completion_tokens"] == 1


async def test_no_room_is_refused() -> None:
    async with pair() as engines:
        assert (await engines.ask(engines.decode))[0] == 400


async def test_a_room_that_comes_twice_is_counted() -> None:
    async with pair() as engines:
        await engines.both(7)
        await engines.both(7)
        assert (transfers(engines.decode).rooms_seen, transfers(engines.decode).rooms_reused) == (2, 1)


async def test_a_failed_transfer_fails_both_legs_once() -> None:
    async with pair(TRANSFER_ERROR) as engines:
        for answer in await engines.both(1):
            assert "KVTransferError" in message_of(answer)
        assert text_of((await engines.both(2))[1]) == right()
        assert [transfers(engine).failed for engine in (engines.prefill, engines.decode)] == [1, 1]


async def test_a_failed_session_fails_for_ever_until_a_restart() -> None:
    async with pair(TRANSFER_ERROR, sticky_sessions=True, bootstrap_timeout_s=0.3) as engines:
        await engines.both(1)
        assert "has failed before" in message_of((await engines.both(2))[1])
        async with engines.client.post(f"{engines.decode.url}/_sim/restart") as answer:
            assert answer.status == 200
        assert text_of((await engines.both(3))[1]) == right()


@pytest.mark.parametrize("leg", [0, 1])
async def test_a_room_that_never_matches_times_out(leg: int) -> None:
    """One leg alone waits for the other one."""
    async with pair(bootstrap_timeout_s=0.2) as engines:
        port = engines.prefill.bootstrap_port
        engine = (engines.prefill, engines.decode)[leg]
        members = {"bootstrap_host": "127.0.0.1", "bootstrap_port": port, "bootstrap_room": 9}
        assert "timed out" in message_of(await engines.ask(engine, **members))


async def test_a_decode_engine_short_of_memory_fails_transfers_that_wait_too_long() -> None:
    """It has memory for one request; that one's answer hangs."""
    hang = Fault("hang", after_bytes=0, times=1)
    limits = EngineLimits(kv_tokens=16)
    async with pair(hang, limits=limits, bootstrap_timeout_s=0.3) as engines:
        decode = transfers(engines.decode)
        first = asyncio.ensure_future(engines.both(1, max_tokens=12))
        await until(lambda: decode.describe()["tokens_reserved"] == 14)
        assert "no KV memory" in message_of((await engines.both(2))[1])
        assert (decode.failed, decode.starved) == (1, 1)
        first.cancel()
        await until(lambda: decode.describe()["tokens_reserved"] == 0)
        assert text_of((await engines.both(3))[1]) == right()


async def test_who_waits_for_memory_gets_it_when_another_one_ends() -> None:
    limits = EngineLimits(kv_tokens=16)
    async with pair(limits=limits) as engines:
        answers = await asyncio.gather(*(engines.both(room) for room in range(10)))
        assert {text_of(decode) for _, decode in answers} == {right()}
        assert transfers(engines.decode).starved == 0
        assert transfers(engines.decode).describe()["tokens_reserved"] == 0


# --- vLLM


async def test_decode_pulls_what_prefill_told() -> None:
    async with pair(flavor="vllm") as engines:
        params = await engines.prefilled()
        assert text_of(await engines.ask(engines.decode, kv_transfer_params=params)) == right()


async def test_after_the_lease_decode_answers_something_else() -> None:
    """As in vLLM nobody refuses it: that is why the gateway looks at the clock."""
    async with pair(flavor="vllm", kv_lease_s=0.0) as engines:
        params = await engines.prefilled()
        assert text_of(await engines.ask(engines.decode, kv_transfer_params=params)) == right(STALE + PROMPT)
        assert [transfers(engine).expired for engine in (engines.prefill, engines.decode)] == [1, 1]


async def test_blocks_can_be_pulled_once() -> None:
    async with pair(flavor="vllm") as engines:
        params = await engines.prefilled()
        await engines.ask(engines.decode, kv_transfer_params=params)
        assert text_of(await engines.ask(engines.decode, kv_transfer_params=params)) == right(STALE + PROMPT)


async def test_a_prefill_engine_that_is_gone_is_an_error_of_decode() -> None:
    async with pair(flavor="vllm") as engines:
        params = await engines.prefilled()
        await engines.prefill.stop()
        assert message_of(await engines.ask(engines.decode, kv_transfer_params=params)) == "Internal server error"
