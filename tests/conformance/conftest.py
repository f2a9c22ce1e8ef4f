"""Fixtures of more than one file."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from pointsman.daemon.shm import layout as at
from tests.fakes.data_plane import DataPlane, data_plane
from tests.fakes.pair_rig import DECODE, GOOD_DECODE, GOOD_PREFILL, PREFILL, Rig, streams
from tests.fakes.scripted_worker import ScriptedWorker


@pytest.fixture(scope="module")
def pair_plane() -> Iterator[DataPlane]:
    with data_plane(disable_retries=False, disable_circuit_breaker=False) as running:
        yield running


@pytest.fixture
def rig(pair_plane: DataPlane) -> Iterator[Rig]:
    workers = [ScriptedWorker() for _ in range(4)]
    workers[GOOD_PREFILL].script = workers[PREFILL].script = streams("p")
    workers[GOOD_DECODE].script = streams("good")
    workers[DECODE].script = streams("first")
    found = Rig(pair_plane, workers)
    layout = pair_plane.segment.layout
    found.forgive()
    words = at.PAIR_LEDGER_ROWS * at.RATE_WORDS
    pair_plane.segment.words.fill_zero(layout.pair_ledger, words)
    for shard in range(2):
        pair_plane.segment.words.fill_zero(layout.pair_row(shard) + 1, at.PAIR_COUNT_WORDS - 1)
    found.publish()
    yield found
    pair_plane.segment.words.put(at.H_PAUSE, 0)
    pair_plane.wait_until("no load, no hold", found.is_idle)
    for worker in workers:
        worker.stop()
