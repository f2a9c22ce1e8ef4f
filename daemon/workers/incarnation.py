"""Whether the engine behind a worker's URL is still the one that was there before: a restart empties its caches. Pure.

Three signs, one restart is reported once:

(a) *Another process*: `process_start_time_seconds` (vLLM, unless it runs several API servers) or llama.cpp's header
    has another value. Misses: engines that tell neither (SGLang), a process that restarts only its inner half. A
    start time that is *earlier* than the last one, without a refused connection between them, means that several
    processes answer in turn behind this URL: from then on pages prove nothing here, and only (b) is left.
(b) *Refused, then up again*: somebody saw that nobody listened there, later a probe succeeded. It is a sign and no
    proof (a reset connection counts as refused), so where the engine told a mark of (a) before, that mark decides as
    soon as the page is read, and the sign counts only if it cannot be. Misses: a restart that is faster than the next
    probe or request; an engine behind something that keeps listening (a proxy, socket activation).
(c) *Totals went backwards*: prompt or cached tokens since the engine's start are fewer than before. Misses: an engine
    that tells no totals, and one that has made up for the old ones before the next look.

Nothing here survives a restart of control: an engine that restarted meanwhile is not noticed. The first observation
never reports: there is nothing to compare it with.

                     refused                     came up, no mark known: report (b)
    known ────────────────────────> suspected ─────────────────────────────────────────> nothing known
      ^                                 │   came up, then: page read, same mark                 │
      │<────────────────────────────────┤                                                       │ page read
      │   page read, other mark: (a);   │                                                       │
      │   no mark any more: (b)         │ page unreadable: report (b)                           │
      │                                 └──────────────────────────────────────────────────────>│
      └<────────────────────────────────────────────────────────────────────────────────────────┘
"""

from __future__ import annotations

from dataclasses import dataclass

from pointsman.daemon.workers.engine_metrics import EngineReport

ANOTHER_PROCESS = "another start time"
REFUSED_THEN_UP = "refused connections, then up again"
TOTALS_WENT_BACK = "token totals went backwards"


@dataclass(frozen=True, slots=True)
class _Seen:
    started_at: float | None = None
    instance: str | None = None
    prompt_tokens: float | None = None
    cached_tokens: float | None = None

    @property
    def has_mark(self) -> bool:
        return self.started_at is not None or self.instance is not None


@dataclass(slots=True)
class Incarnation:
    """Of one worker. What returns a reason reports a restart."""

    _seen: _Seen = _Seen()
    _is_known: bool = False
    _is_suspected: bool = False
    _are_several: bool = False

    def went_down(self, *, is_refused: bool) -> None:
        """A probe failed for good, or a shard met a refused connection."""
        self._is_suspected |= is_refused and self._is_known

    def came_up(self) -> str | None:
        """A probe succeeded, for the first time or again."""
        self._is_known = True  # from here on it may fill a cache, whether its page was read or not
        if not self._is_suspected or (self._seen.has_mark and not self._are_several):
            return None
        self._forget()
        return REFUSED_THEN_UP

    def observe(self, report: EngineReport) -> str | None:
        """A page that was asked for after the last `came_up`."""
        before, suspected = self._seen, self._is_suspected
        now = _Seen(report.started_at, report.instance, report.prompt_tokens, report.cached_tokens)
        self._is_known, self._is_suspected = True, False
        self._are_several |= not suspected and _fell(before.started_at, now.started_at)
        if self._are_several:
            return None
        reason = _difference(before, now)
        if reason is None and suspected and not _has_common_mark(before, now):
            reason = REFUSED_THEN_UP
        self._seen = now if reason else _merged(before, now)
        return reason

    def unreadable(self) -> str | None:
        """The worker is up, but does not give its page, so that a suspicion can't be cleared."""
        self._is_known = True
        if not self._is_suspected:
            return None
        self._forget()
        return REFUSED_THEN_UP

    def _forget(self) -> None:
        self._seen = _Seen()
        self._is_suspected = self._are_several = False


def _difference(before: _Seen, now: _Seen) -> str | None:
    if _differ(before.started_at, now.started_at) or _differ(before.instance, now.instance):
        return ANOTHER_PROCESS
    if _fell(before.prompt_tokens, now.prompt_tokens) or _fell(before.cached_tokens, now.cached_tokens):
        return TOTALS_WENT_BACK
    return None


def _has_common_mark(before: _Seen, now: _Seen) -> bool:
    return (before.started_at is not None and before.started_at == now.started_at) or (
        before.instance is not None and before.instance == now.instance
    )


def _merged(before: _Seen, now: _Seen) -> _Seen:
    """What a page leaves out for once is not forgotten."""
    return _Seen(
        now.started_at if now.started_at is not None else before.started_at,
        now.instance if now.instance is not None else before.instance,
        now.prompt_tokens if now.prompt_tokens is not None else before.prompt_tokens,
        now.cached_tokens if now.cached_tokens is not None else before.cached_tokens,
    )


def _differ(before: float | str | None, now: float | str | None) -> bool:
    return before is not None and now is not None and before != now


def _fell(before: float | None, now: float | None) -> bool:
    return before is not None and now is not None and now < before
