"""The compiled configuration that shards run on: one immutable value per generation.

Control compiles it from the files, the flags and the registry; shards receive it as bytes in a sealed memfd. It
imports nothing heavy: a shard never loads pydantic.
"""

from __future__ import annotations

from typing import Any

import msgspec

MODEL_OTHER = "other"
"""Label (index 0 of `Snapshot.models`) of requests whose model no worker serves; bounds the metrics' cardinality."""

KEY_OTHER = ""
"""Label (index 0 of `Snapshot.key_names`) of the keys that are too many for labels of their own."""

MAX_TOKENS = 2**31 - 1


class WorkerSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One worker as shards see it. Whether it is up, down or draining lives in shared memory, at `slot`."""

    id: str
    url: str
    """Canonical: scheme://host[:port][/path], no trailing slash."""
    slot: int
    """Row in the shared worker table; kept for the life of the worker, reused only after its last request ended."""
    address: str
    """The resolved and checked IP address that is connected to (pinned)."""
    host: str
    port: int
    tls: bool = False
    base_path: str = ""
    role: str = "regular"
    bootstrap_port: int | None = None
    kv_connector: str = "sglang"
    """How a prefill or decode worker hands KV over (`config.pd.KvConnector`)."""
    models: tuple[str, ...] = ()
    """Empty: not known, so it may serve any model."""
    weight: float = 1.0
    labels: dict[str, str] = {}
    api_key: str | None = None
    prompt_tokens_min: int = 0
    prompt_tokens_max: int = MAX_TOKENS
    """The prompt lengths that it takes, both ends included."""
    kv_tokens: int | None = None
    """Declared KV capacity; None: as the engine tells."""


class Hints(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """For `config-profile: auto`. Tokens; lower bounds included, upper ones not; 0 = no such hint."""

    prompt_tokens_gte: int = 0
    prompt_tokens_lt: int = 0
    max_tokens_gte: int = 0
    max_tokens_lt: int = 0


class Profile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: str
    strategy: str | None = None
    """As it was written: "least-request:40,prefix-cache:60"; None = the daemon's default policy."""
    routing: dict[str, Any] = {}
    """Parameters of policies, `chain`, `sticky`: a mapping that `routing.strategies.read_profile` takes."""
    hints: Hints = Hints()
    prompt_tokens_min: int = 0
    prompt_tokens_max: int = MAX_TOKENS
    """Prompts of other lengths fall to the next `match`."""
    retry: dict[str, Any] = {}
    timeouts: dict[str, Any] = {}
    limits: dict[str, Any] = {}
    pd: dict[str, Any] = {}
    """What the profile says of `resilience.RetrySection`, `TimeoutsSection`, `LimitsSection`, `pd.PdSection`."""
    stream_failure: str = "error"
    """What follows when a worker dies in the middle of a stream: "error" or "continue"."""


class Match(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """First match wins. Absent conditions hold; `model`, `path` and `key` are shell patterns (`*`, `?`).

    `key` is matched against the name of the client's key; without a key file, against the bearer token that the client
    presents. `headers` maps a lower-case header name to a pattern.
    """

    profile: str
    model: str | None = None
    path: str | None = None
    key: str | None = None
    headers: dict[str, str] = {}


class Shared(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is one for all profiles; None and absent keys: as the settings say."""

    eviction_interval_secs: float | None = None
    max_tree_size: int | None = None
    breaker: dict[str, Any] = {}
    admission: dict[str, Any] = {}
    health: dict[str, Any] = {}
    """Of `resilience.BreakerSection`, `AdmissionSection`, `HealthSection`."""


class KeySpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A client's API key, as shards know it. The key itself is nowhere but in the client's hands (or in the file)."""

    name: str
    digest: bytes
    """SHA-256 of the key"""
    user: str = ""
    models: tuple[str, ...] = ()
    """Shell patterns; empty: all."""
    profiles: tuple[str, ...] = ()
    """Names; empty: all."""
    requests_per_minute: float = 0.0
    tokens_per_minute: float = 0.0
    """0 = no limit"""
    may_steer: bool | None = None
    """Whether its requests may carry routing headers; None: as `routing_header_networks` says."""


class TlsMaterial(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the data port proves itself by, in PEM. It holds a private key: never shown, never logged."""

    certificates: str
    key: str
    client_ca: str = ""
    """"" = clients show no certificate"""

    def __repr__(self) -> str:
        return "TlsMaterial(…)"


class Snapshot(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    generation: int
    workers: tuple[WorkerSpec, ...] = ()
    profiles: dict[str, Profile] = {}
    default_profile: str | None = None
    matches: tuple[Match, ...] = ()
    default_policy: str = "expected_cost"
    default_routing: dict[str, Any] = {}
    """Like `Profile.routing`, for requests without a profile."""
    default_retry: dict[str, Any] = {}
    default_timeouts: dict[str, Any] = {}
    default_pd: dict[str, Any] = {}
    """Where a profile says nothing: the settings."""
    locked_strategy: str = ""
    """`lockedRoutingStrategy`: wins over the request's header and the profile."""
    shared: Shared = Shared()
    strict_models: bool = False
    models: tuple[str, ...] = (MODEL_OTHER,)
    """Index = the model's label in the metrics; only ever appended to while the daemon lives."""
    keys: tuple[KeySpec, ...] | None = None
    """None: there is no key file, whoever reaches the port may ask."""
    key_names: tuple[str, ...] = (KEY_OTHER,)
    """As `models`: a key's label in the metrics."""
    tls: TlsMaterial | None = None
    worker_ca: str = ""
    """PEM of the authorities that https workers are checked against; "" = the system's"""
    content: str = ""
    """Names what the files said, for the history (control.history)."""


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Snapshot)


def encode(snapshot: Snapshot) -> bytes:
    return _encoder.encode(snapshot)


def decode(data: bytes) -> Snapshot:
    """Raises msgspec.DecodeError or ValidationError when `data` is not a snapshot of this version."""
    return _decoder.decode(data)
