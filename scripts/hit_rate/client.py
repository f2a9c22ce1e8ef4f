"""A closed-loop client: so many conversations at a time, one connection per request, all answers streamed.

A connection per request sends the turns of a conversation to whatever shard the kernel chooses: the hardest case for
processes that know nothing of each other.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count

from pointsman.daemon.errors import PointsmanError
from pointsman.scripts.hit_rate.workload import Conversation

ANSWER_TIMEOUT_S = 60.0
_PROMPT = re.compile(rb'"prompt_tokens": ?(\d+)')
_CACHED = re.compile(rb'"cached_tokens": ?(\d+)')
_REQUEST_ID = re.compile(rb"\r\nx-request-id: *([^\r\n]+)-", re.IGNORECASE)
_POD = re.compile(rb"\r\ntarget-pod: *([^\r\n]+)", re.IGNORECASE)


class AnswerError(PointsmanError):
    """An answer that is not a complete one with the engine's count of tokens."""


@dataclass(slots=True)
class Tally:
    """Tokens as the engines report them."""

    requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    by_shard: Counter[bytes] = field(default_factory=Counter)
    """requests by the part of the request ids that is the shard's own"""
    by_worker: Counter[bytes] = field(default_factory=Counter)

    @property
    def hit_rate(self) -> float:
        return self.cached_tokens / self.prompt_tokens if self.prompt_tokens else 0.0


@dataclass(frozen=True, slots=True)
class Client:
    """Of several addresses, requests go to each in turn."""

    addresses: Sequence[tuple[str, int]]
    model: str
    max_tokens: int = 1
    headers: Mapping[str, str] = field(default_factory=dict)
    _turns: count[int] = field(default_factory=count)

    async def drive(self, conversations: Sequence[Conversation], at_once: int) -> Tally:
        """Client n of `at_once` holds every conversation that is n modulo `at_once`, one after the other.

        Raises AnswerError for the first answer that is not whole.
        """
        tally = Tally()
        async with asyncio.TaskGroup() as clients:
            for number in range(at_once):
                clients.create_task(self._hold(conversations[number::at_once], tally))
        return tally

    async def _hold(self, conversations: Sequence[Conversation], tally: Tally) -> None:
        for conversation in conversations:
            for prompt in conversation:
                async with asyncio.timeout(ANSWER_TIMEOUT_S):
                    _note(tally, await self._ask(prompt))

    async def _ask(self, prompt: str) -> bytes:
        reader, writer = await asyncio.open_connection(*self.addresses[next(self._turns) % len(self.addresses)])
        try:
            writer.write(self._wire(prompt))
            return await reader.read()
        finally:
            writer.close()

    def _wire(self, prompt: str) -> bytes:
        body = json.dumps(
            {
                "model": self.model,
                "prompt": prompt,
                "max_tokens": self.max_tokens,
                "temperature": 0,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
        ).encode()
        lines = ["POST /v1/completions HTTP/1.1", "Host: gateway", "Connection: close", f"Content-Length: {len(body)}"]
        lines += [f"{name}: {value}" for name, value in self.headers.items()]
        return "\r\n".join([*lines, "", ""]).encode() + body


def _note(tally: Tally, answer: bytes) -> None:
    prompt, cached = _PROMPT.findall(answer), _CACHED.findall(answer)
    if not answer.startswith(b"HTTP/1.1 200 ") or b"data: [DONE]" not in answer or not prompt:
        raise AnswerError(f"not a whole answer: {answer[:300]!r} ... {answer[-200:]!r}")
    tally.requests += 1
    tally.prompt_tokens += int(prompt[-1])
    tally.cached_tokens += int(cached[-1]) if cached else 0
    for pattern, counts in ((_REQUEST_ID, tally.by_shard), (_POD, tally.by_worker)):
        found = pattern.search(answer)
        if found:
            counts[found[1]] += 1
