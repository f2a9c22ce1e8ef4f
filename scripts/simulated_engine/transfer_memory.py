"""KV memory of a decode engine: taken for a request before its transfer begins, free when the request has ended."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from pointsman.scripts.simulated_engine.context import Call, JsonObject
from pointsman.scripts.simulated_engine.prompts import read_prompts, read_sampling, render_chat
from pointsman.scripts.simulated_engine.text import count_tokens


class TransferMemory:
    def __init__(self, tokens: int) -> None:
        self.tokens = tokens
        self.reserved = 0
        self._freed = asyncio.Condition()

    @asynccontextmanager
    async def reserve(self, tokens: int) -> AsyncIterator[None]:
        """Waits until there is room. An idle engine has room for everything; what is too large it refuses itself."""
        async with self._freed:
            await self._freed.wait_for(lambda: not self.reserved or self.reserved + tokens <= self.tokens)
            self.reserved += tokens
        try:
            yield
        finally:
            self.reserved -= tokens
            async with self._freed:
                self._freed.notify_all()


def needed_tokens(call: Call, document: JsonObject) -> int:
    """Of all prompts of a request, and of the longest answers that it may get. Raises ApiError 400."""
    if call.path == "/v1/chat/completions":
        prompts = [render_chat(document)]
        sampling = read_sampling(call, document, "max_completion_tokens", "max_tokens")
    elif call.path == "/v1/completions":
        prompts = read_prompts(document.get("prompt"))
        sampling = read_sampling(call, document, "max_tokens")
    else:
        prompts = read_prompts(document.get("text") or document.get("input_ids"))
        given = document.get("sampling_params") or {}
        sampling = read_sampling(call, given[0] if isinstance(given, list) else given, "max_new_tokens")
    return sum(count_tokens(prompt) + sampling.max_tokens * sampling.choices for prompt in prompts)
