"""Grids of runs: traces x policies x seeds, paired by seed, and what they say side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

import msgspec

from pointsman.daemon.routing.router import Router, Worker
from pointsman.scripts.replay.contestants import Contestant
from pointsman.scripts.replay.measures import Measures, geometric_mean, measure
from pointsman.scripts.replay.simulation import simulate
from pointsman.scripts.replay.traces import Trace
from pointsman.scripts.replay.workload import Workload, schedule
from pointsman.scripts.simulated_engine.model import EngineLimits
from pointsman.scripts.simulated_engine.timing import PRESETS, StepCost

TIMES = ("ttft_mean", "ttft_p50", "ttft_p90", "ttft_p99", "tpot_mean")
"""Measures that are averaged and compared geometrically; the others are shares."""


@dataclass(frozen=True, slots=True)
class Setting:
    """A fleet of equal engines. `load` None: as recorded."""

    workers: int = 8
    load: float | None = 0.7
    preset: str = "h100-8b"
    kv_tokens: int = 400_000

    @property
    def cost(self) -> StepCost:
        return PRESETS[self.preset]

    def limits(self, trace: Trace) -> EngineLimits:
        return EngineLimits(kv_tokens=self.kv_tokens, block_tokens=trace.block_tokens)

    def schedule(self, trace: Trace, seed: int) -> Workload:
        limits = self.limits(trace)
        return schedule(trace, load=self.load, workers=self.workers, seed=seed, cost=self.cost, limits=limits)


class Run(msgspec.Struct, frozen=True):
    trace: str
    policy: str
    seed: int
    measures: Measures


Watch = Callable[[str, int, int], None]
"""Hears (what runs, requests done, requests in all)."""


def run_once(
    trace: Trace, contestant: Contestant, seed: int, setting: Setting, workload: Workload, watch: Watch | None = None
) -> Run:
    """One simulation; `setting.workers` may differ from those that the workload was made for."""
    limits = setting.limits(trace)
    workers = [Worker(f"worker-{number}", setting.kv_tokens) for number in range(setting.workers)]
    router = Router(workers, contestant.profile, seed)
    total = len(workload.arrivals)
    label = f"{trace.name} {contestant.name} seed {seed}"
    progress = None if watch is None else lambda done: watch(label, done, total)
    served = simulate(workload, router, setting.cost, limits, progress)
    return Run(trace.name, contestant.name, seed, measure(served, setting.workers, setting.cost, limits))


def run_grid(
    traces: Sequence[Trace],
    contestants: Sequence[Contestant],
    seeds: Sequence[int],
    setting: Setting,
    watch: Watch | None = None,
) -> Iterator[Run]:
    for trace in traces:
        for seed in seeds:
            workload = setting.schedule(trace, seed)
            for contestant in contestants:
                yield run_once(trace, contestant, seed, setting, workload, watch)


class Summary(msgspec.Struct, frozen=True):
    """One policy on one trace over all seeds: geometric means of times, arithmetic ones of shares.

    `ratios`: geometric mean over seeds of this policy's time over the first policy's, by measure.
    """

    trace: str
    policy: str
    seeds: int
    mean: dict[str, float]
    ratios: dict[str, float]


def summarise(runs: Sequence[Run]) -> list[Summary]:
    """In the order of the runs; the first policy of each trace is the one compared with."""
    cells: dict[tuple[str, str], dict[int, Measures]] = {}
    first: dict[str, str] = {}
    for run in runs:
        first.setdefault(run.trace, run.policy)
        cells.setdefault((run.trace, run.policy), {})[run.seed] = run.measures
    return [
        Summary(trace, policy, len(by_seed), _means(by_seed), _ratios(by_seed, cells[trace, first[trace]]))
        for (trace, policy), by_seed in cells.items()
    ]


def _means(by_seed: dict[int, Measures]) -> dict[str, float]:
    means = {}
    for name in Measures.__struct_fields__:
        values = [float(getattr(measures, name)) for measures in by_seed.values()]
        means[name] = geometric_mean(values) if name in TIMES else fmean(values)
    return means


def _ratios(by_seed: dict[int, Measures], reference: dict[int, Measures]) -> dict[str, float]:
    seeds = [seed for seed in by_seed if seed in reference]
    return {
        name: geometric_mean([_ratio(getattr(by_seed[seed], name), getattr(reference[seed], name)) for seed in seeds])
        for name in TIMES
    }


def _ratio(value: float, reference: float) -> float:
    return value / reference if reference else 1.0


def find_workers(
    trace: Trace,
    contestant: Contestant,
    seed: int,
    setting: Setting,
    is_enough: Callable[[Measures], bool],
    *,
    most: int = 256,
    watch: Watch | None = None,
) -> int | None:
    """The fewest workers that are enough for the traffic of `setting`; None: more than `most`.

    More workers are taken to be never worse: doubles, then bisects.
    """
    workload = setting.schedule(trace, seed)

    def holds(count: int) -> bool:
        return is_enough(run_once(trace, contestant, seed, replace(setting, workers=count), workload, watch).measures)

    low, high = 0, 1
    while not holds(high):
        low, high = high, high * 2
        if high > most:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high
