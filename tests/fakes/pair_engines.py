"""Simulated prefill and decode engines, each a process of its own, and the gateway's flags for them."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import aiohttp

from pointsman.scripts.simulated_engine.launch import EngineAddress, launch_engines


@dataclass(frozen=True)
class PairFleet:
    prefills: Sequence[EngineAddress]
    decodes: Sequence[EngineAddress]

    @property
    def flags(self) -> list[str]:
        """Of `pointsman serve`."""
        prefills = [flag for one in self.prefills for flag in ("--prefill", one.url, str(one.bootstrap_port))]
        return [*prefills, "--decode", *(one.url for one in self.decodes)]

    @property
    def engines(self) -> list[EngineAddress]:
        return [*self.prefills, *self.decodes]

    async def arm(self, engine: EngineAddress, *faults: dict[str, Any]) -> None:
        async with aiohttp.ClientSession() as client:
            await client.post(f"{engine.url}/_sim/faults", json=list(faults))

    async def states(self) -> list[dict[str, Any]]:
        async with aiohttp.ClientSession() as client:
            return list(await asyncio.gather(*(_state(client, engine.url) for engine in self.engines)))

    async def reset(self) -> None:
        """No faults, empty journals."""
        async with aiohttp.ClientSession() as client:
            for engine in self.engines:
                for path in ("restart", "reset"):
                    async with client.post(f"{engine.url}/_sim/{path}") as answer:
                        assert answer.status == 200


async def _state(client: aiohttp.ClientSession, url: str) -> dict[str, Any]:
    async with client.get(f"{url}/_sim/state") as answer:
        found: dict[str, Any] = await answer.json()
        return found


def bodies(state: dict[str, Any]) -> list[bytes]:
    """Of the last inference requests that an engine got, oldest first."""
    return [
        base64.b64decode(one["body_base64"]) for one in state["requests"] if one["body_base64"] and one["body_bytes"]
    ]


@contextmanager
def pair_fleet(prefills: int, decodes: int, *arguments: str, flavor: str = "sglang") -> Iterator[PairFleet]:
    with ExitStack() as stack:
        groups = [
            stack.enter_context(launch_engines(count, "--flavor", flavor, "--role", role, *arguments))
            for count, role in ((prefills, "prefill"), (decodes, "decode"))
        ]
        yield PairFleet(*groups)
