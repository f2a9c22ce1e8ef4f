#!/usr/bin/env python3
"""How fast the payload stores are through the whole layer: framing, checksums, batches, typed results.

    .venv/bin/python scripts/bench/stores.py URL… [--keys 10000] [--size 4096] [--rounds 5] [--raw] [--check]

Every round writes, reads and deletes all keys in one call each, and compares what came back; shown are medians over
the rounds (best in parentheses). The first round is left out: it makes files and pages. For sqlite the file must not
exist yet. `--raw` also makes, round by round, the same calls to Mooncake without the layer: batch_upsert_from and
batch_get_into over its own client, 400 keys a call, one call at a time. `--check` exits 1 below the goals for sqlite,
and for Mooncake with `--raw`. scripts/check-stores starts the servers.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import mmap
import os
import random
import sys
import time
from collections.abc import Callable
from contextlib import closing
from statistics import median
from typing import Any
from urllib.parse import urlsplit

from pointsman.daemon.stores.mooncake_process import ENVIRONMENT
from pointsman.daemon.stores.open_store import open_store, without_password
from pointsman.daemon.stores.results import require_all
from pointsman.daemon.stores.retransmission import RetransmittingStore

GOALS = {"put": 40_000, "get": 100_000}
"""Keys a second, 4 KB values, sqlite: in the best round, since whatever else runs on the machine only slows down."""
RAW_GOAL = 0.8
"""of what Mooncake's own calls make, 4 KB values: the median over the rounds of both, one after the other"""
BATCH_KEYS = 400
Rates = dict[str, list[float]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("urls", nargs="+", metavar="URL")
    parser.add_argument("--keys", type=int, default=10_000)
    parser.add_argument("--size", type=int, default=4096, help="bytes of a value")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--raw", action="store_true")
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    keys = [f"batch-1/line-{number}" for number in range(options.keys)]
    values = [random.Random(number).randbytes(options.size) for number in range(options.keys)]
    is_fast_enough = True
    for url in options.urls:
        with closing(open_store(url)) as store:
            raw = RawMooncake(url, options.size) if options.raw and url.startswith("mooncake:") else None
            rates: Rates = {"put": [], "get": [], "delete": []}
            raw_rates: Rates = {"raw put": [], "raw get": []}
            for _ in range(options.rounds + 1):
                play(store, keys, values, rates)
                if raw:
                    raw.play(keys, values, raw_rates)
        show(without_password(url), options.size, rates | (raw_rates if raw else {}))
        if url.startswith("sqlite:"):
            is_fast_enough &= all(max(rates[step][1:]) >= goal for step, goal in GOALS.items())
        if raw:
            ratios = {step: shared(rates[step], raw_rates[f"raw {step}"]) for step in ("put", "get")}
            print("  of the raw calls: " + ", ".join(f"{step} {ratio:.2f}" for step, ratio in ratios.items()))
            is_fast_enough &= min(ratios.values()) >= RAW_GOAL
    if options.check and not is_fast_enough:
        print("too slow", file=sys.stderr)
        return 1
    return 0


def shared(ours: list[float], raw: list[float]) -> float:
    """Median ratio, the first round left out."""
    return median(one / other for one, other in zip(ours[1:], raw[1:], strict=True))


def play(store: RetransmittingStore, keys: list[str], values: list[bytes], rates: Rates) -> None:
    def timed(step: str, work: Callable[[], Any]) -> Any:
        started = time.perf_counter()
        results = work()
        rates[step].append(len(keys) / (time.perf_counter() - started))
        return require_all(step, keys, results)

    timed("put", lambda: store.put_many(keys, values))
    assert timed("get", lambda: store.get_many(keys)) == values
    timed("delete", lambda: store.delete_many(keys))


class RawMooncake:
    """The wheel's own calls, in this process."""

    def __init__(self, url: str, size: int) -> None:
        os.environ.update({**ENVIRONMENT, "MC_TCP_BIND_ADDRESS": "127.0.0.1", **os.environ})
        module = importlib.import_module("mooncake.store")
        self.client = module.MooncakeDistributedStore()
        code = self.client.setup("127.0.0.1", "P2PHANDSHAKE", 0, 16 << 20, "tcp", "", urlsplit(url).netloc)
        assert code == 0, code
        self.config = module.ReplicateConfig()
        self.config.with_hard_pin = True
        self.size = size
        self.memory = mmap.mmap(-1, BATCH_KEYS * size)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        self.client.register_buffer(self.address, BATCH_KEYS * size)

    def play(self, keys: list[str], values: list[bytes], rates: Rates) -> None:
        names = [f"raw/{key}" for key in keys]
        starts = range(0, len(names), BATCH_KEYS)
        pointers = [self.address + place * self.size for place in range(BATCH_KEYS)]
        started = time.perf_counter()
        for start in starts:
            batch = names[start : start + BATCH_KEYS]
            for place, value in enumerate(values[start : start + BATCH_KEYS]):
                self.memory[place * self.size : (place + 1) * self.size] = value
            codes = self.client.batch_upsert_from(batch, pointers[: len(batch)], [self.size] * len(batch), self.config)
            assert not any(codes)
        rates["raw put"].append(len(keys) / (time.perf_counter() - started))
        found: list[bytes] = []
        started = time.perf_counter()
        for start in starts:
            batch = names[start : start + BATCH_KEYS]
            sizes = self.client.batch_get_into(batch, pointers[: len(batch)], [self.size] * len(batch))
            assert set(sizes) == {self.size}
            found += [self.memory[place * self.size : (place + 1) * self.size] for place in range(len(batch))]
        rates["raw get"].append(len(keys) / (time.perf_counter() - started))
        assert found == values
        self.client.batch_remove(names, True)


def show(url: str, size: int, rates: Rates) -> None:
    print(url)
    for step, measured in rates.items():
        middle, best = median(measured[1:]), max(measured[1:])
        print(f"  {step:8} {middle:9,.0f} /s  ({best:,.0f})  {middle * size / 1e6:7.0f} MB/s", flush=True)


if __name__ == "__main__":
    sys.exit(main())
