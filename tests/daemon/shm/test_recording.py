"""The rings of a recording: what goes in comes out, what finds no room is counted, nobody's death breaks them."""

from __future__ import annotations

import os
import signal
import struct
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pointsman.daemon.shm import layout as at
from pointsman.daemon.shm.prefix import HashChain
from pointsman.daemon.shm.recording import (
    MAX_RECORD_BYTES,
    RING_BYTES,
    UNKNOWN,
    RecordedRequest,
    RecordingLog,
    RecordingReader,
)
from pointsman.daemon.shm.segment import Segment

BLOCK = 512
END: dict[str, Any] = {"prompt_tokens": 7, "output_tokens": 3, "model": 1, "is_streamed": True, "status": 200}


@pytest.fixture
def segment() -> Segment:
    made = Segment.create(2, 4)
    made.words.put(at.H_RECORDING, 1000)
    return made


def chain(text: bytes) -> HashChain:
    return HashChain(1, BLOCK).load(text)


def note(log: RecordingLog, text: bytes, arrived_s: float = 0.5, **fields: Any) -> None:
    taken = log.begin(chain(text), arrived_s)
    assert taken is not None
    log.end(taken, **(END | fields))


def test_a_record_has_what_was_told(segment: Segment) -> None:
    log, reader = RecordingLog(segment, 1), RecordingReader(segment, 1)
    text = b"x" * 1300
    note(log, text, 0.25, prompt_tokens=None)
    (record,) = reader.take()
    hashes = struct.pack("=3Q", *chain(text).hash_list())
    assert record == RecordedRequest(250_000, 1300, UNKNOWN, 3, 1, is_streamed=True, status=200, hashes=hashes)
    assert reader.take() == []
    assert RecordingReader(segment, 0).take() == []


def test_a_request_that_came_after_the_end_is_not_taken_up(segment: Segment) -> None:
    log, reader = RecordingLog(segment, 0), RecordingReader(segment, 0)
    assert log.begin(chain(b"late"), 1.0) is None
    segment.words.put(at.H_RECORDING, 0)
    assert log.begin(chain(b"off"), 0.0) is None
    assert (reader.running, reader.lost, reader.take()) == (0, 0, [])


def test_hashes_are_those_of_the_pick_though_the_chain_is_used_again(segment: Segment) -> None:
    log, reader = RecordingLog(segment, 0), RecordingReader(segment, 0)
    shared = HashChain(1, BLOCK)
    first = log.begin(shared.load(b"a" * 600), 0.1)
    second = log.begin(shared.load(b"b" * 600), 0.2)
    assert first is not None
    assert second is not None
    assert reader.running == 2
    log.end(second, **END)
    log.end(first, **END)
    assert [record.arrived_us for record in reader.take()] == [200_000, 100_000]
    assert reader.running == 0
    assert reader.lost == 0


def test_a_full_ring_drops_what_is_new_and_counts_it(segment: Segment) -> None:
    log, reader = RecordingLog(segment, 0), RecordingReader(segment, 0)
    text = b"x" * (BLOCK * 100)
    fitting = RING_BYTES // (64 + 800)
    for number in range(fitting + 10):
        note(log, text, number / 1e4)
    assert reader.lost == 10
    assert [record.arrived_us for record in reader.take()] == [number * 100 for number in range(fitting)]
    note(log, text)
    assert len(reader.take()) == 1
    assert (reader.lost, reader.running) == (10, 0)
    assert RecordingReader(segment, 0).lost == 0, "losses are those of one recording"


def test_a_prompt_that_no_ring_would_hold_is_lost_and_counted(segment: Segment) -> None:
    log, reader = RecordingLog(segment, 0), RecordingReader(segment, 0)
    taken = log.begin(HashChain(1, 16).load(bytes(16 * (MAX_RECORD_BYTES // 8))), 0.0)
    assert taken is not None
    log.end(taken, **END)
    assert (reader.lost, reader.running, reader.take()) == (1, 0, [])


def test_a_new_reader_begins_with_what_comes_now(segment: Segment) -> None:
    log = RecordingLog(segment, 0)
    note(log, b"before")
    reader = RecordingReader(segment, 0)
    note(log, b"after", 0.75)
    assert [record.arrived_us for record in reader.take()] == [750_000]


def test_what_a_killed_shard_had_taken_up_is_lost_and_counted(segment: Segment) -> None:
    reader = RecordingReader(segment, 0)
    pid = os.fork()
    if pid == 0:
        try:
            log = RecordingLog(segment, 0)
            note(log, b"whole")
            log.begin(chain(b"cut off"), 0.6)
        finally:
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
    assert reader.running == 1
    successor = RecordingLog(segment, 0)
    note(successor, b"next", 0.7)
    assert [record.arrived_us for record in reader.take()] == [500_000, 700_000]
    assert (reader.running, reader.lost) == (0, 1)


def test_a_ring_that_was_overwritten_is_left_and_counted(segment: Segment) -> None:
    log, reader = RecordingLog(segment, 0), RecordingReader(segment, 0)
    note(log, b"one")
    segment.cells[segment.layout.recording_ring(0) + 8] = 12345
    assert reader.take() == []
    assert reader.lost == 1
    note(log, b"two", 0.9)
    assert [record.arrived_us for record in reader.take()] == [900_000]


_numbers = st.integers(0, 2**40)
_records = st.tuples(
    st.integers(0, 40_000), _numbers, st.none() | _numbers, st.none() | _numbers, st.booleans(), st.integers(0, 599)
)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(_records, max_size=40), max_size=8))
def test_what_goes_in_comes_out_in_order_or_is_counted(turns: list[list[tuple[Any, ...]]]) -> None:
    """Records of up to 78 KiB (blocks of 4 bytes), over the ring's end, with a reader that comes now and then."""
    segment = Segment.create(1, 1)
    segment.words.put(at.H_RECORDING, 2**40)
    log, reader = RecordingLog(segment, 0), RecordingReader(segment, 0)
    own = HashChain(3, 16)
    sent = received = 0
    for turn in turns:
        expected = []
        for size, arrived, prompt, output, is_streamed, status in turn:
            lost = reader.lost
            taken = log.begin(own.load(bytes(size * 4)), arrived / 1e6)
            assert taken is not None
            log.end(
                taken,
                prompt_tokens=prompt,
                output_tokens=output,
                model=size,
                is_streamed=is_streamed,
                status=status,
            )
            if reader.lost == lost:
                expected.append((arrived, size * 4, prompt, output, size, is_streamed, status, own.hash_list()))
        found = reader.take()
        told = [
            (
                one.arrived_us,
                one.total_chars,
                None if one.prompt_tokens == UNKNOWN else one.prompt_tokens,
                None if one.output_tokens == UNKNOWN else one.output_tokens,
                one.model,
                one.is_streamed,
                one.status,
                list(struct.unpack(f"={len(one.hashes) // 8}Q", one.hashes)),
            )
            for one in found
        ]
        assert told == expected
        sent, received = sent + len(turn), received + len(found)
    assert received + reader.lost == sent
    assert reader.running == 0
