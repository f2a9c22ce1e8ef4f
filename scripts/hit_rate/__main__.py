"""`python -m pointsman.scripts.hit_rate`: hit rates behind 1, 2 and 4 shards; exit code 1 when a bound is missed."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from pointsman.scripts.hit_rate.shards import (
    BOUND,
    CONTESTANTS,
    FULL,
    HEADLINE,
    SEPARATE,
    SHORT,
    Figures,
    Setup,
    compare,
    rounds,
)

LEAST_SHARE = 0.5
"""Of an even share: with less, traffic on one shard alone would pass for traffic on all."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="check-hit-rate", description="Hit rates behind 1, 2 and 4 shards.")
    parser.add_argument("--rounds", type=int, default=7, metavar="N")
    parser.add_argument("--short", action="store_true", help="a smaller recording")
    parser.add_argument("--separate", action="store_true", help="also two daemons that know nothing of each other")
    options = parser.parse_args(argv)
    setup = SHORT if options.short else FULL
    contestants = (*CONTESTANTS, SEPARATE) if options.separate else CONTESTANTS
    _describe(setup)
    tallies = []
    for number, tally in enumerate(rounds(setup, options.rounds, contestants), 1):
        print(f"round {number} of {options.rounds}", file=sys.stderr, flush=True)
        tallies.append(tally)
    figures = compare(tallies, contestants)
    print(HEADLINE)
    for found in figures:
        print(found.line())
    missed = [problem for found in figures if found.contestant in CONTESTANTS for problem in _problems(found)]
    print("\n".join(missed) or "within the bounds")
    return 1 if missed else 0


def _describe(setup: Setup) -> None:
    recording = setup.recording
    print(
        f"{recording.requests} requests, {recording.groups} groups; system prompts {recording.system_chars_total // 4}"
        f" tokens, all that is distinct {recording.distinct_chars // 4}; {setup.workers} engines of {setup.kv_tokens}"
    )


def _problems(found: Figures) -> list[str]:
    problems = []
    shards = found.contestant.shards
    if found.ratio < BOUND:
        problems.append(f"{shards} shards: {found.ratio:.4f} of the hit rate of one, bound {BOUND}")
    if found.least_share < LEAST_SHARE / shards:
        problems.append(f"{shards} shards: one had {found.least_share:.0%} of the requests")
    return problems


if __name__ == "__main__":
    sys.exit(main())
