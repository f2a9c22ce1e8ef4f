"""Settings of prefill/decode disaggregation: what a profile says (`pd`), and what workers declare."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from pointsman.config.resilience import Seconds, SomeSeconds

KvConnector = Literal["sglang", "nixl", "mooncake"]
"""How a worker's engine hands KV over: SGLang's bootstrap server, vLLM's NixlConnector or MooncakeConnector."""
GROUP_LABEL = "pd_group"
"""Only workers with the same value are paired."""
COMBINED_LABEL = "combined"
""""true": a regular worker that also takes what its model's prefill and decode workers cannot."""


class PdSection(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`pd` of a profile."""

    prefill_policy: Annotated[str, Meta(max_length=1000)] = "expected_cost"
    decode_policy: Annotated[str, Meta(max_length=1000)] = "kv_headroom"
    min_uncached_tokens: Annotated[int, Meta(ge=0, le=2**31 - 1)] = 0
    """A prompt of which fewer tokens are not in decode's cache goes to decode alone (vLLM); 0 = none does."""
    decode_without_prefill: bool = True
    """Decode computes prompts itself when no prefill worker is left to (vLLM)."""
    kv_lease_s: SomeSeconds = 30.0
    """How long a prefill worker keeps what decode has not fetched."""
    headroom_wait_s: Seconds = 5.0
    """How long a request waits for a decode worker that has memory for it, before its prefill begins."""
