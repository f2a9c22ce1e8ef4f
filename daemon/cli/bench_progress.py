"""What `pointsman bench` shows while it runs: a line that is written over in a terminal, else one now and then."""

from __future__ import annotations

import sys
import time

from pointsman.daemon.bench.scenarios import Progress
from pointsman.daemon.bench.svg import number_text
from pointsman.daemon.cli.terminal import plain, progress_bar

EVERY_LINE_S = 10.0


class Display:
    """On stderr. The rate is that since the last time it was shown."""

    def __init__(self, *, is_quiet: bool) -> None:
        self._is_quiet = is_quiet
        self._is_terminal = sys.stderr.isatty()
        self._shown_at = time.monotonic()
        self._last: Progress | None = None
        self._last_ended = 0

    def show(self, progress: Progress) -> None:
        now = time.monotonic()
        if self._is_quiet or (not self._is_terminal and now - self._shown_at < EVERY_LINE_S):
            return
        line = self._line(progress, now - self._shown_at)
        self._shown_at = now
        if self._is_terminal:
            print(f"\r\033[K{line}", end="", file=sys.stderr, flush=True)
        else:
            print(line, file=sys.stderr, flush=True)

    def say(self, text: str) -> None:
        self.clear()
        if not self._is_quiet:
            print(text, file=sys.stderr, flush=True)

    def clear(self) -> None:
        if self._is_terminal and not self._is_quiet:
            print("\r\033[K", end="", file=sys.stderr, flush=True)

    def _line(self, progress: Progress, since_s: float) -> str:
        tally = progress.tally
        is_same = self._last is not None and self._last.tally is tally
        rate = (tally.requests - (self._last_ended if is_same else 0)) / max(since_s, 1e-3)
        self._last, self._last_ended = progress, tally.requests
        parts = [plain(progress.name), "warm-up" if progress.is_warm_up else f"{progress.seconds:.0f} s"]
        if progress.share is not None:
            parts.insert(0, progress_bar(progress.share))
        parts += [f"{rate:,.0f}/s", f"p50 {_ms(tally.e2e.quantile(0.5))}", f"p99 {_ms(tally.e2e.quantile(0.99))}"]
        if tally.ttft.count:
            parts.append(f"first token {_ms(tally.ttft.quantile(0.5))}")
        parts += [f"{tally.failed} failed", f"{progress.in_flight} in flight"]
        return "  ".join(parts)


def _ms(nanoseconds: float) -> str:
    return f"{number_text(nanoseconds / 1e6)} ms"
