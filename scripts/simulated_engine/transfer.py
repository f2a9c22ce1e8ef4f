"""Prefill/decode disaggregation as the simulated engines do it: two protocols over one side channel.

A prefill engine listens on a side channel, a TCP port of its own: SGLang's bootstrap server, NIXL's side channel. One
JSON line in, one JSON line out, per connection:

    {"op": "meet", "room": 7}         → {"ok": true} as soon as the prefill leg of that room is here and computed
    {"op": "fail", "room": 7}         → {"ok": true}; the prefill leg of that room fails with a KVTransferError
    {"op": "pull", "id": "..."}       → {"ok": true}, or {"ok": false, "gone": true} after the lease

SGLang (flavor sglang): a request without `bootstrap_room` is refused, as by an engine in disaggregation mode. Both legs
wait for each other, `bootstrap_timeout_s` at most. After a failed transfer a decode engine with `sticky_sessions` fails
every later one with the same prefill engine at once, until that engine is restarted.

A decode engine takes KV memory for prompt and answer before it meets, and frees it when the request has ended. Short of
it, transfers wait for others to end, and both legs with them; who waits longer than the bootstrap timeout fails: the
usual cause of a KVTransferError under load.

vLLM (flavor vllm): `do_remote_decode` makes an answer with parameters, `do_remote_prefill` pulls by them. Blocks that
were not pulled are gone after `kv_lease_s`. As in vLLM nothing refuses them then: the text is another one (`STALE`).
A decode engine short of memory pulls when it has some, which may be too late.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import orjson

from pointsman.scripts.simulated_engine.context import ApiError, Call, JsonObject
from pointsman.scripts.simulated_engine.faults import Fault
from pointsman.scripts.simulated_engine.settings import EngineSettings
from pointsman.scripts.simulated_engine.transfer_memory import TransferMemory, needed_tokens

PATHS = frozenset({"/generate", "/v1/completions", "/v1/chat/completions"})
STALE = "this KV belongs to another prompt: "
_TOKEN_KEYS = ("max_tokens", "max_completion_tokens")


class TransferError(ApiError):
    def __init__(self, why: str) -> None:
        super().__init__(500, f"KVTransferError: {why}", "InternalServerError")


@dataclass(slots=True)
class Transfers:
    """One engine's side of all its transfers."""

    settings: EngineSettings
    port: int = 0
    """of the side channel; 0 = the engine has none"""
    rooms_seen: int = 0
    rooms_reused: int = 0
    expired: int = 0
    failed: int = 0
    starved: int = 0
    """of those that failed: there was no memory for them in time"""
    _memory: TransferMemory = field(init=False)
    _rooms: set[int] = field(default_factory=set)
    _computed: dict[int, asyncio.Future[None]] = field(default_factory=dict)
    """Prefill legs: done when decode has met them; an exception when it failed."""
    _waiting: dict[int, asyncio.Future[None]] = field(default_factory=dict)
    """Decode engines that came before the prefill leg."""
    _blocks: dict[str, float] = field(default_factory=dict)
    """NIXL: id of a request → when its lease ends"""
    _sticky: set[tuple[str, int]] = field(default_factory=set)
    _server: asyncio.Server | None = None

    def __post_init__(self) -> None:
        self._memory = TransferMemory(self.settings.limits.kv_tokens)

    async def start(self) -> None:
        if self.settings.role == "prefill":
            self._server = await asyncio.start_server(self._serve, self.settings.host, self.settings.bootstrap_port)
            self.port = self._server.sockets[0].getsockname()[1]

    def close(self) -> None:
        if self._server is not None:
            self._server.close()

    def restarted(self) -> None:
        self._sticky.clear()
        self._blocks.clear()

    def describe(self) -> JsonObject:
        return {
            "bootstrap_port": self.port,
            "rooms_seen": self.rooms_seen,
            "rooms_reused": self.rooms_reused,
            "transfers_failed": self.failed,
            "transfers_starved": self.starved,
            "tokens_reserved": self._memory.reserved,
            "leases_expired": self.expired,
            "sessions_failed": len(self._sticky),
        }

    # --- a request's part in it

    @asynccontextmanager
    async def part(self, call: Call, fault: Fault | None) -> AsyncIterator[None]:
        """Entered when the request may be answered; left when it is. Raises ApiError."""
        document = call.json()
        async with AsyncExitStack() as memory:
            if self.settings.flavor == "sglang":
                await self._bootstrap(call, document, fault, memory)
            else:
                await self._hand_over(call, document, fault, memory)
            yield

    async def _reserve(self, call: Call, document: JsonObject, memory: AsyncExitStack) -> None:
        await memory.enter_async_context(self._memory.reserve(needed_tokens(call, document)))

    async def _bootstrap(self, call: Call, document: JsonObject, fault: Fault | None, memory: AsyncExitStack) -> None:
        given: Any = document.get("bootstrap_room")
        rooms: list[int] = given if isinstance(given, list) else [] if given is None else [given]
        if not rooms:
            raise ApiError(400, "Disaggregated request received without bootstrap room id")
        self._note(rooms)
        timeout_s = self.settings.bootstrap_timeout_s
        is_prefill = self.settings.role == "prefill"
        if is_prefill:
            _shorten(call, document)
        has_memory = is_prefill
        try:
            async with asyncio.timeout(timeout_s):
                if fault is not None and fault.kind == "room_lost":
                    await asyncio.sleep(2 * timeout_s)
                if is_prefill:
                    await self._meet_decode(rooms, fault)
                else:
                    await self._reserve(call, document, memory)
                    has_memory = True
                    await self._meet_prefill(document, rooms, fault)
        except TimeoutError:
            self.failed += 1
            self.starved += not has_memory
            why = "timed out" if has_memory else "found no KV memory in time"
            raise TransferError(f"room {rooms[0]} {why}") from None
        except TransferError:
            self.failed += 1
            raise

    def _note(self, rooms: list[int]) -> None:
        for room in rooms:
            self.rooms_seen += 1
            self.rooms_reused += room in self._rooms
            self._rooms.add(room)

    async def _meet_decode(self, rooms: list[int], fault: Fault | None) -> None:
        for room in rooms:
            met: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._computed[room] = met
            waiting = self._waiting.get(room)
            if waiting is not None and not waiting.done():
                waiting.set_result(None)
            try:
                if fault is not None:
                    met.set_exception(TransferError(f"failed to send the KV of room {room}"))
                await met
            finally:
                del self._computed[room]

    async def _meet_prefill(self, document: JsonObject, rooms: list[int], fault: Fault | None) -> None:
        hosts, ports = (document.get(f"bootstrap_{name}") for name in ("host", "port"))
        host = hosts[0] if isinstance(hosts, list) else hosts
        port = ports[0] if isinstance(ports, list) else ports
        peer = str(host), int(port or self.settings.bootstrap_port)
        if peer in self._sticky:
            raise TransferError(f"the session with {peer[0]}:{peer[1]} has failed before")
        for room in rooms:
            if fault is not None:
                self._fail_session(peer)  # first: prefill's error may have this leg cancelled
                with suppress(OSError, TransferError):
                    await _ask(peer, {"op": "fail", "room": room})
                raise TransferError(f"failed to receive the KV of room {room}")
            told = await _ask(peer, {"op": "meet", "room": room})
            if not told.get("ok"):
                self._fail_session(peer)
                raise TransferError(f"prefill failed room {room}")

    def _fail_session(self, peer: tuple[str, int]) -> None:
        if self.settings.sticky_sessions:
            self._sticky.add(peer)

    async def _hand_over(self, call: Call, document: JsonObject, fault: Fault | None, memory: AsyncExitStack) -> None:
        params: Any = document.get("kv_transfer_params") or {}
        if fault is not None and fault.kind == "transfer_error":
            self.failed += 1
            raise ApiError(500, "Internal server error", "InternalServerError")
        if params.get("do_remote_decode"):
            name = params.get("transfer_id") or uuid.uuid4().hex
            self._blocks[name] = time.monotonic() + self.settings.kv_lease_s
            if fault is None:
                call.transfer_params = {
                    "do_remote_prefill": True,
                    "do_remote_decode": False,
                    "remote_block_ids": [[5, 6]],
                    "remote_engine_id": f"engine-{self.port}",
                    "remote_request_id": name,
                    "remote_host": self.settings.host,
                    "remote_port": self.port,
                }
        elif params.get("do_remote_prefill"):
            await self._reserve(call, document, memory)
            await self._pull(call, document, params)

    async def _pull(self, call: Call, document: JsonObject, params: JsonObject) -> None:
        if "remote_bootstrap_addr" in params:
            host, _, port = str(params["remote_bootstrap_addr"]).removeprefix("http://").rpartition(":")
            peer, name = (host.strip("[]"), int(port)), params["transfer_id"]
        else:
            peer, name = (str(params["remote_host"]), int(params["remote_port"])), params["remote_request_id"]
        try:
            told = await _ask(peer, {"op": "pull", "id": name})
        except (OSError, TransferError):
            self.failed += 1
            raise ApiError(500, "Internal server error", "InternalServerError") from None
        if told.get("gone"):
            self.expired += 1
            for key in ("prompt", "text"):
                if isinstance(document.get(key), str):
                    document[key] = STALE + document[key]
            call.body = orjson.dumps(document)

    # --- the side channel

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            asked: JsonObject = orjson.loads(await reader.readline())
            lost = asyncio.ensure_future(reader.read(1))
            answer = asyncio.ensure_future(self._answer(asked))
            await asyncio.wait((lost, answer), return_when=asyncio.FIRST_COMPLETED)
            lost.cancel()
            if answer.done():
                writer.write(orjson.dumps(answer.result()) + b"\n")
                await writer.drain()
            else:
                answer.cancel()
        except (OSError, orjson.JSONDecodeError):
            pass  # the decode engine is gone
        finally:
            writer.close()

    async def _answer(self, asked: JsonObject) -> JsonObject:
        if asked["op"] == "pull":
            ends = self._blocks.pop(asked["id"], 0.0)
            if ends <= time.monotonic():
                self.expired += 1
                return {"ok": False, "gone": True}
            return {"ok": True}
        room = asked["room"]
        if room not in self._computed:
            waiting = self._waiting[room] = asyncio.get_running_loop().create_future()
            try:
                await waiting
            finally:
                del self._waiting[room]
        met = self._computed.get(room)
        if met is None:
            return {"ok": False}
        if met.done():
            return {"ok": met.exception() is None}
        if asked["op"] == "fail":
            met.set_exception(TransferError(f"decode failed room {room}"))
        else:
            met.set_result(None)
        return {"ok": True}


async def _ask(peer: tuple[str, int], question: JsonObject) -> JsonObject:
    """Raises OSError, TransferError."""
    reader, writer = await asyncio.open_connection(*peer)
    try:
        writer.write(orjson.dumps(question) + b"\n")
        line = await reader.readline()
    finally:
        writer.close()
    if not line:
        raise TransferError(f"{peer[0]}:{peer[1]} is gone")
    told: JsonObject = orjson.loads(line)
    return told


def _shorten(call: Call, document: JsonObject) -> None:
    """A prefill engine ends with the first token, whatever the request asks for."""
    for key in _TOKEN_KEYS:
        document.pop(key, None)
    if call.path == "/generate":
        given = document.get("sampling_params") or {}
        each = given if isinstance(given, list) else [given]
        short = [{**item, "max_new_tokens": 1} for item in each]
        document["sampling_params"] = short if isinstance(given, list) else short[0]
    else:
        document["max_tokens"] = 1
    call.body = orjson.dumps(document)
