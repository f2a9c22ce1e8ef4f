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

The first observation never reports: there is nothing to compare it with. What was seen before a restart of the daemon
can be recalled (`recall`, from the saved state); unless the daemon was away so shortly that no engine can have
restarted meanwhile, everything is then suspected at first. A restart of control alone begins anew: an engine that
restarted in that second is not noticed.

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

from dataclasses import dataclass, field

from pointsman.daemon.workers.engine_metrics import EngineReport
from pointsman.daemon.workers.marks import Marks

ANOTHER_PROCESS = "another start time"
REFUSED_THEN_UP = "refused connections, then up again"
TOTALS_WENT_BACK = "token totals went backwards"
UNPROVEN = "nothing proves that it is the process of before the daemon's restart"
NO_RESTART_S = 30.0
"""No engine loads its model in less: a daemon that was away so shortly finds the engines that it left."""


@dataclass(slots=True)
class Incarnation:
    """Of one worker. What returns a reason reports a restart."""

    _seen: Marks = field(default_factory=Marks)
    _is_known: bool = False
    _suspicion: str | None = None
    """Why it may be another process by now."""
    _are_several: bool = False

    @property
    def marks(self) -> Marks:
        """To know the engine again by; empty when pages prove nothing."""
        return Marks() if self._are_several else self._seen

    @property
    def is_certain(self) -> bool:
        return self._suspicion is None

    def recall(self, marks: Marks, *, is_certain: bool, away_s: float) -> bool:
        """What was known of the engine `away_s` ago, when nobody went on watching.

        False: it is another one, or there is no way to find out, so nothing is to be believed.
        """
        is_proven = _has_common_mark(marks, self._seen)
        is_certain = is_proven or (is_certain and away_s <= NO_RESTART_S)
        may_be_proven = marks.has_mark and not self._seen.has_mark
        if _difference(marks, self._seen) is not None or not (is_certain or may_be_proven):
            return False
        self._seen, self._is_known = _merged(marks, self._seen), True
        if not is_certain:
            self._suspicion = UNPROVEN
        return True

    def went_down(self, *, is_refused: bool) -> None:
        """A probe failed for good, or a shard met a refused connection."""
        if is_refused and self._is_known:
            self._suspicion = REFUSED_THEN_UP

    def came_up(self) -> str | None:
        """A probe succeeded, for the first time or again."""
        self._is_known = True  # from here on it may fill a cache, whether its page was read or not
        if self._suspicion is None or (self._seen.has_mark and not self._are_several):
            return None
        return self._forget()

    def observe(self, report: EngineReport) -> str | None:
        """A page that was asked for after the last `came_up`."""
        before, suspicion = self._seen, self._suspicion
        now = Marks(report.started_at, report.instance, report.prompt_tokens, report.cached_tokens)
        self._is_known, self._suspicion = True, None
        self._are_several |= suspicion is None and _fell(before.started_at, now.started_at)
        if self._are_several:
            return None
        reason = _difference(before, now)
        if reason is None and not _has_common_mark(before, now):
            reason = suspicion
        self._seen = now if reason else _merged(before, now)
        return reason

    def unreadable(self) -> str | None:
        """The worker is up, but does not give its page, so that a suspicion can't be cleared."""
        self._is_known = True
        return None if self._suspicion is None else self._forget()

    def _forget(self) -> str | None:
        reason = self._suspicion
        self._seen, self._suspicion, self._are_several = Marks(), None, False
        return reason


def _difference(before: Marks, now: Marks) -> str | None:
    if _differ(before.started_at, now.started_at) or _differ(before.instance, now.instance):
        return ANOTHER_PROCESS
    if _fell(before.prompt_tokens, now.prompt_tokens) or _fell(before.cached_tokens, now.cached_tokens):
        return TOTALS_WENT_BACK
    return None


def _has_common_mark(before: Marks, now: Marks) -> bool:
    return (before.started_at is not None and before.started_at == now.started_at) or (
        before.instance is not None and before.instance == now.instance
    )


def _merged(before: Marks, now: Marks) -> Marks:
    """What a page leaves out for once is not forgotten."""
    return Marks(
        now.started_at if now.started_at is not None else before.started_at,
        now.instance if now.instance is not None else before.instance,
        now.prompt_tokens if now.prompt_tokens is not None else before.prompt_tokens,
        now.cached_tokens if now.cached_tokens is not None else before.cached_tokens,
    )


def _differ(before: float | str | None, now: float | str | None) -> bool:
    return before is not None and now is not None and before != now


def _fell(before: float | None, now: float | None) -> bool:
    return before is not None and now is not None and now < before
