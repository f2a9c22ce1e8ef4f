"""What an engine tells of itself, to know it again by."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Marks:
    """None = not told. Times are Unix seconds, totals of tokens are since its start."""

    started_at: float | None = None
    instance: str | None = None
    prompt_tokens: float | None = None
    cached_tokens: float | None = None

    @property
    def has_mark(self) -> bool:
        return self.started_at is not None or self.instance is not None
