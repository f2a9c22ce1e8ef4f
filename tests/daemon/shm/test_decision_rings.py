"""The rings of decisions and of their explanations: what was written last can be read, nothing half."""

from __future__ import annotations

from pointsman.config.snapshot import WorkerSpec
from pointsman.daemon.shm import layout as at
from pointsman.daemon.shm.choosing import Booked, Chooser
from pointsman.daemon.shm.decisions import DecisionRecord, key_of, read_decisions
from pointsman.daemon.shm.explanations import RING_BYTES, ExplanationLog, read_explanations
from pointsman.daemon.shm.routing_state import IndexSize, RoutingState
from pointsman.daemon.shm.segment import Segment


def chooser_of(state: RoutingState, shard: int) -> Chooser:
    layout = state.segment.layout
    ring, gauges = layout.decision_ring(shard), layout.gauge(shard, 0)
    chain, words = state.index.chain(), (layout.budget, layout.breakers)
    return Chooser(state.words, state.bookings, state.index, chain, shard, state.ghost, gauges, ring, 1024, *words)


def test_decisions_come_back_newest_first_and_old_ones_go() -> None:
    state = RoutingState.create(Segment.create(2, 8), IndexSize(2, 512), 2**20)
    worker = WorkerSpec(id="w", url="http://x:1", slot=3, address="127.0.0.1", host="x", port=1)
    chooser = chooser_of(state, 1)
    assert list(read_decisions(state.segment, 1)) == []
    for number in range(at.DECISIONS + 10):
        booked = Booked(worker, 3, 100, 50, False)
        booked.reason, booked.cached_tokens, booked.predicted_s = 2, 20, 0.5
        booked.group = 2**64 - 1
        key = chooser.note(booked, b"req-%d" % number, 77, 1000 + number, 600_000, 900_000, 12, 51, 19, 200)
        assert key == key_of(f"req-{number}")
    found = list(read_decisions(state.segment, 1))
    assert len(found) == at.DECISIONS
    last = at.DECISIONS + 9
    assert found[0] == DecisionRecord(
        1000 + last, 3, 77, 2, 50, 20, 500_000, 2**64 - 1, key_of(f"req-{last}"), 600_000, 900_000, 12, 51, 19, 200
    )
    assert [record.ended_us for record in found] == list(range(1000 + last, 1000 + 9, -1))
    assert list(read_decisions(state.segment, 0)) == []
    row = state.segment.layout.load(1, 3, 0)
    cells = state.segment.cells
    count = at.DECISIONS + 10
    assert cells[row + at.L_PREDICTIONS] == count
    assert cells[row + at.L_ERROR_US] == 100_000 * count
    assert cells[row + at.L_USAGE_CACHED_TOKENS] == 19 * count


def test_explanations_of_any_size_come_back_until_they_are_written_over() -> None:
    segment = Segment.create(2, 8)
    log = ExplanationLog(segment, 1)
    texts = [b"%d" % number + b"x" * (number * 37 % 9000) for number in range(300)]
    for number, text in enumerate(texts):
        log.note(number, number * 10, text)
        newest = next(read_explanations(segment, 1))
        assert (newest.request_key, newest.at_us, newest.json) == (number, number * 10, text)
    found = list(read_explanations(segment, 1))
    assert [record.json for record in found] == texts[::-1][: len(found)]
    held = sum(len(record.json) for record in found)
    assert RING_BYTES * 0.7 < held <= RING_BYTES
    assert list(read_explanations(segment, 0)) == []


def test_too_large_an_explanation_is_left_out_and_a_successor_goes_on() -> None:
    segment = Segment.create(1, 8)
    log = ExplanationLog(segment, 0)
    log.note(1, 1, b"small")
    log.note(2, 2, b"x" * RING_BYTES)
    ExplanationLog(segment, 0).note(3, 3, b"after a restart")
    assert [record.json for record in read_explanations(segment, 0)] == [b"after a restart", b"small"]
