"""The rollout of one generation: all shards or none. Pure; the supervisor feeds it and does what it says.

publish ──> every shard loads ──> all acknowledged ──> current (one store in the segment)
                  │ failed                 │ one is silent for ACK_TIMEOUT_S
                  └──> refused: the last one stays      └──> it is replaced, its successor must acknowledge
"""

from __future__ import annotations

from collections.abc import Iterable

ACK_TIMEOUT_S = 2.0


class Rollout:
    def __init__(self, generation: int, shards: Iterable[int], now: float) -> None:
        self.generation = generation
        self.refusal: str | None = None
        self._waiting = set(shards)
        self._asked_at = dict.fromkeys(self._waiting, now)

    @property
    def is_complete(self) -> bool:
        return self.refusal is None and not self._waiting

    def loaded(self, shard: int) -> None:
        self._waiting.discard(shard)

    def failed(self, shard: int, reason: str) -> None:
        self.refusal = f"shard {shard}: {reason}"

    def restarted(self, shard: int, now: float) -> None:
        """A successor has been asked; whatever its predecessor said does not count for it."""
        self._waiting.add(shard)
        self._asked_at[shard] = now

    def forgotten(self, shard: int) -> None:
        """The shard is gone for good (the daemon is stopping)."""
        self._waiting.discard(shard)

    def silent(self, now: float) -> list[int]:
        """Shards that have not acknowledged in time."""
        return sorted(shard for shard in self._waiting if now - self._asked_at[shard] > ACK_TIMEOUT_S)
