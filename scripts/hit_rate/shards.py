"""The same recorded traffic against 1, 2 and 4 shards: how often do the engines hit their caches?

Every round runs every number of shards on engines that hold nothing; figures of a round are compared with the same
round's single shard, and the median of the rounds counts.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from statistics import median

from pointsman.scripts.hit_rate.client import Client, Tally
from pointsman.scripts.hit_rate.daemon import serve
from pointsman.scripts.hit_rate.workload import Recording
from pointsman.scripts.simulated_engine.launch import launch_engines

BOUND = 0.99
MODEL = "sim-model"


@dataclass(frozen=True, slots=True)
class Setup:
    recording: Recording
    kv_tokens: int
    """of one engine"""
    at_once: int
    workers: int = 4
    preset: str = "h100-8b"
    speed: float = 5.0
    """of the engines' clocks"""

    @property
    def engine_arguments(self) -> tuple[str, ...]:
        return "--preset", self.preset, "--speed", f"{self.speed}", "--kv-tokens", f"{self.kv_tokens}"


# One engine's cache cannot hold the system prompts, all engines' together not all conversations. So few at once that
# engines seldom have a line: which prompts are spilled is chance, and here only what is not chance is of interest.
FULL = Setup(Recording(groups=40, conversations=10, turns=5, system_chars=4800, turn_chars=800), 32_000, at_once=8)
SHORT = Setup(Recording(groups=20, conversations=8, turns=5, system_chars=4800, turn_chars=800), 16_000, at_once=6)


@dataclass(frozen=True, slots=True)
class Contestant:
    """So many daemons that know nothing of each other, of so many shards each; requests go to them in turn."""

    shards: int
    daemons: int = 1

    @property
    def name(self) -> str:
        return f"{self.shards}" if self.daemons == 1 else f"{self.daemons} daemons"


ONE = Contestant(1)
CONTESTANTS = (ONE, Contestant(2), Contestant(4))
SEPARATE = Contestant(1, daemons=2)
"""What separate processes make of the same traffic: shows that the measurement would notice."""


@dataclass(frozen=True, slots=True)
class Figures:
    contestant: Contestant
    rates: tuple[float, ...]
    ratios: tuple[float, ...]
    """of each round to its single shard"""
    least_share: float
    """of the requests, of the process that had the fewest in any round"""

    @property
    def ratio(self) -> float:
        return median(self.ratios)

    @property
    def rate(self) -> float:
        return median(self.rates)

    def line(self) -> str:
        rates = " ".join(f"{rate:.4f}" for rate in self.rates)
        return f"{self.contestant.name:>9} {self.rate:>9.4f} {self.ratio:>7.4f} {self.least_share:>12.2f}  {rates}"


HEADLINE = f"{'shards':>9} {'hit rate':>9} {'ratio':>7} {'least share':>12}  rounds"


def run(setup: Setup, contestant: Contestant) -> Tally:
    conversations = setup.recording.play()
    with ExitStack() as stack:
        engines = stack.enter_context(launch_engines(setup.workers, *setup.engine_arguments))
        urls = [engine.url for engine in engines]
        addresses = [stack.enter_context(serve(urls, contestant.shards)) for _ in range(contestant.daemons)]
        return asyncio.run(Client(addresses, MODEL).drive(conversations, setup.at_once))


def rounds(setup: Setup, count: int, contestants: Sequence[Contestant]) -> Iterator[dict[Contestant, Tally]]:
    """The order turns from round to round, and every round has another recording."""
    for number in range(count):
        recording = replace(setup.recording, seed=number)
        first = number % len(contestants)
        turned = [*contestants[first:], *contestants[:first]]
        yield {each: run(replace(setup, recording=recording), each) for each in turned}


def compare(tallies: Sequence[dict[Contestant, Tally]], contestants: Sequence[Contestant]) -> list[Figures]:
    return [_figures(contestant, tallies) for contestant in contestants]


def _figures(contestant: Contestant, tallies: Sequence[dict[Contestant, Tally]]) -> Figures:
    mine = [tally[contestant] for tally in tallies]
    return Figures(
        contestant,
        tuple(tally.hit_rate for tally in mine),
        tuple(tally[contestant].hit_rate / tally[ONE].hit_rate for tally in tallies),
        min(_least_share(tally, contestant.shards * contestant.daemons) for tally in mine),
    )


def _least_share(tally: Tally, processes: int) -> float:
    return min(tally.by_shard.values()) / tally.requests if len(tally.by_shard) == processes else 0.0
