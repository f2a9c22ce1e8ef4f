"""`pointsman replay TRACE…`: how would these policies route this traffic? Simulated engines, virtual clock."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from pointsman.daemon.cli.arguments import Parser
from pointsman.daemon.cli.terminal import table
from pointsman.daemon.errors import EXIT_OK
from pointsman.scripts.replay import report
from pointsman.scripts.replay.contestants import Contestant, read_contestants
from pointsman.scripts.replay.runs import Run, Setting, find_workers, run_grid, summarise
from pointsman.scripts.replay.traces import Trace, read_trace
from pointsman.scripts.simulated_engine.timing import PRESETS

_EPILOG = """\
A policy is a strategy as in a profile (expected_cost, least-request:40,prefix-cache:60), with parameters where it has
some (cache_aware?miss=smallest_tree&holder=first), or the name of a profile in --profile FILE. Load is the GPU time
the traffic needs with one cache of all workers' size, over workers x time. Ratios (x) compare with the first policy,
seed by seed. goodput: TTFT below 2 s and 50 ms a token; goodput_len: TTFT below 1 s + 2 x the prompt's own prefill."""


def run(argv: list[str]) -> int:
    """0 done, 64 misuse, 78 a trace, profile or policy that cannot be used."""
    parser = _parser()
    arguments = parser.parse(argv)
    setting = Setting(
        workers=arguments.workers,
        load=None if arguments.as_recorded else arguments.load,
        preset=arguments.preset,
        kv_tokens=arguments.kv_tokens,
    )
    pyplot = report.require_plot() if arguments.plot else None
    goal = report.parse_goal(arguments.find_workers) if arguments.find_workers else None
    contestants = read_contestants(arguments.policy, arguments.profile)
    traces = [read_trace(path) for path in arguments.traces]
    if arguments.as_recorded and any(trace.is_closed_loop for trace in traces):
        parser.error("--as-recorded: a trace of sessions has no times of its own")
    progress = _Progress(len(traces) * len(contestants) * len(arguments.seeds))
    if goal is not None:
        for trace in traces:
            for contestant in contestants:
                count = find_workers(trace, contestant, arguments.seeds[0], setting, goal, watch=progress.show)
                progress.clear()
                answer = "more than 256" if count is None else str(count)
                print(f"{trace.name}  {contestant.name}  {arguments.find_workers}: {answer} workers")
        return EXIT_OK
    runs = _runs(traces, contestants, arguments.seeds, setting, progress)
    summaries = summarise(runs)
    for trace in traces:
        print(f"{trace.name}: {_title(setting, arguments.seeds)}")
        print(table(report.HEADS, [report.row(s) for s in summaries if s.trace == trace.name]), end="\n\n")
    if arguments.json:
        arguments.json.write_bytes(report.as_json(setting, runs, summaries))
    if pyplot is not None:
        report.plot(pyplot, summaries, arguments.plot)
    return EXIT_OK


def _runs(
    traces: Sequence[Trace],
    contestants: Sequence[Contestant],
    seeds: Sequence[int],
    setting: Setting,
    progress: _Progress,
) -> list[Run]:
    runs = []
    for one in run_grid(traces, contestants, seeds, setting, progress.show):
        progress.end(one)
        runs.append(one)
    progress.clear()
    return runs


def _title(setting: Setting, seeds: Sequence[int]) -> str:
    load = "as recorded" if setting.load is None else f"load {setting.load:g}"
    names = ",".join(map(str, seeds))
    return f"{setting.workers} workers {setting.preset}, {load}, seed{'s' if len(seeds) > 1 else ''} {names}"


def _parser() -> Parser:
    parser = Parser("replay", "Replay traces against simulated engines, policy by policy.", epilog=_EPILOG)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("traces", nargs="+", type=Path, metavar="TRACE", help="JSON lines, may be gzip'd")
    parser.add_argument("--workers", type=_count, default=8, metavar="N", help="engines (default 8)")
    parser.add_argument(
        "--load", type=_positive, default=0.7, metavar="L", help="of the fleet's GPU time (default 0.7)"
    )
    parser.add_argument("--as-recorded", action="store_true", help="the trace's own times instead of a load")
    parser.add_argument("--policy", action="append", default=[], metavar="P", help="repeatable; see below")
    parser.add_argument("--profile", type=Path, metavar="FILE", help="profiles (JSON, YAML, TOML) to choose from")
    parser.add_argument("--seeds", type=_seeds, default=(0,), metavar="0,1,2", help="default 0")
    parser.add_argument("--preset", choices=sorted(set(PRESETS) - {"instant"}), default="h100-8b", help="engine model")
    parser.add_argument("--kv-tokens", type=_count, default=400_000, metavar="N", help="an engine's KV capacity")
    parser.add_argument(
        "--find-workers", metavar="GOAL", help="fewest workers with e.g. 'goodput>=0.95' for this traffic"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw them (needs pointsman[plot])")
    return parser


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < 100:
        raise argparse.ArgumentTypeError("must be above 0")
    return value


def _seeds(text: str) -> tuple[int, ...]:
    return tuple(dict.fromkeys(int(part) for part in text.split(",")))


class _Progress:
    """A bar on stderr where that is a terminal, else a line per run."""

    WIDTH = 30
    EVERY_S = 0.1

    def __init__(self, runs: int) -> None:
        self._runs = runs
        self._done = 0
        self._is_terminal = sys.stderr.isatty()
        self._shown_at = 0.0
        self._began_at = time.monotonic()

    def show(self, label: str, done: int, total: int) -> None:
        now = time.monotonic()
        if not self._is_terminal or (now - self._shown_at < self.EVERY_S):
            return
        self._shown_at = now
        filled = self.WIDTH * done // total
        bar = "#" * filled + "." * (self.WIDTH - filled)
        print(f"\r\033[K[{bar}] {self._done + 1}/{self._runs} {label}", end="", file=sys.stderr, flush=True)

    def end(self, finished: Run) -> None:
        self._done += 1
        if not self._is_terminal:
            seconds = time.monotonic() - self._began_at
            label = f"{finished.trace} {finished.policy} seed {finished.seed}"
            print(f"{self._done}/{self._runs} {label} ({seconds:.0f} s)", file=sys.stderr)

    def clear(self) -> None:
        if self._is_terminal:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
