"""From the shards' rings to lines of a trace."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import pytest

from pointsman.daemon.control.recording import GRACE_S, Recorder, Recording
from pointsman.daemon.errors import RequestError
from pointsman.daemon.shm import layout as at
from pointsman.daemon.shm.prefix import HashChain
from pointsman.daemon.shm.recording import RecordingLog
from pointsman.daemon.shm.segment import Segment

BLOCK = 512
BEGAN, UNTIL = 100.0, 160.0


@pytest.fixture
def segment() -> Segment:
    return Segment.create(2, 4)


@pytest.fixture
def recording(segment: Segment) -> Iterator[Recording]:
    made = start(segment)
    yield made
    made.close()


def start(segment: Segment) -> Recording:
    return Recording(segment, BLOCK, lambda: ("other", "m"), BEGAN, UNTIL)


def ask(log: RecordingLog, text: bytes, arrived_s: float, **fields: Any) -> None:
    taken = log.begin(HashChain(1, BLOCK).load(text), arrived_s)
    assert taken is not None
    told = {"prompt_tokens": None, "output_tokens": 9, "model": 1, "is_streamed": True, "status": 200}
    log.end(taken, **(told | fields))


def lines(recording: Recording) -> list[dict[str, Any]]:
    return [json.loads(line) for line in b"".join(recording.take()).splitlines()]


def test_a_line_is_what_the_trace_format_says(segment: Segment, recording: Recording) -> None:
    ask(RecordingLog(segment, 1), b"x" * 1300, 100.25, prompt_tokens=310)
    (line,) = lines(recording)
    ids = line.pop("hash_ids")
    assert line == {
        "timestamp": 250.0,
        "input_length": 325,
        "output_length": 9,
        "model": "m",
        "stream": True,
        "prompt_tokens": 310,
    }
    assert len(set(ids)) == 3
    assert all(0 <= block < 2**53 for block in ids)
    assert json.loads(recording.header()) == {"block_size": 128, "block_bytes": 512}


def test_ids_are_equal_as_far_as_prompts_are(segment: Segment, recording: Recording) -> None:
    log = RecordingLog(segment, 0)
    for text in (b"a" * 1200, b"a" * 1024 + b"b" * 500, b"a" * 1200, b"b" * 1200):
        ask(log, text, 101)
    first, other, same, foreign = (line["hash_ids"] for line in lines(recording))
    assert first == same
    assert first[:2] == other[:2]
    assert first[2] != other[2]
    assert not set(first) & set(foreign)


def test_ids_are_those_of_one_recording_and_not_those_of_the_index(segment: Segment) -> None:
    log, text = RecordingLog(segment, 0), b"a" * 1200
    found = []
    for _ in range(2):
        recording = start(segment)
        ask(log, text, 101)
        found.append(set(lines(recording)[0]["hash_ids"]))
        recording.close()
    index = {block >> 11 for block in HashChain(1, BLOCK).load(text).hash_list()}
    assert not found[0] & found[1]
    assert not (found[0] | found[1]) & index


def test_failed_requests_are_counted_and_those_that_a_client_left_are_kept(
    segment: Segment, recording: Recording
) -> None:
    log = RecordingLog(segment, 0)
    for status in (200, 400, 502, 499):
        ask(log, b"x", 101, status=status, output_tokens=None)
    assert [line["output_length"] for line in lines(recording)] == [0, 0]
    assert json.loads(recording.summary()) == {"recorded": 2, "failed": 2, "lost": 0, "unfinished": 0}


def test_what_arrived_before_is_not_of_this_recording(segment: Segment, recording: Recording) -> None:
    ask(RecordingLog(segment, 0), b"x", 99.9)
    assert lines(recording) == []
    assert json.loads(recording.summary())["recorded"] == 0


def test_a_model_without_a_name_yet_is_other(segment: Segment, recording: Recording) -> None:
    ask(RecordingLog(segment, 0), b"x", 101, model=7)
    assert lines(recording)[0]["model"] == "other"


def test_an_overrun_is_told(segment: Segment, recording: Recording) -> None:
    log, text = RecordingLog(segment, 0), bytes(BLOCK * 4096)
    for _ in range(40):
        ask(log, text, 101)
    found = lines(recording)
    assert 0 < len(found) < 40
    assert json.loads(recording.summary())["lost"] == 40 - len(found)


def test_it_waits_for_what_runs_but_not_for_ever(segment: Segment, recording: Recording) -> None:
    log = RecordingLog(segment, 0)
    taken = log.begin(HashChain(1, BLOCK).load(b"x"), 101)
    assert taken is not None
    assert not recording.is_over(UNTIL + GRACE_S - 0.1)
    assert recording.is_over(UNTIL + GRACE_S)
    assert json.loads(recording.summary())["unfinished"] == 1
    log.end(taken, prompt_tokens=1, output_tokens=1, model=0, is_streamed=False, status=200)
    assert not recording.is_over(UNTIL - 0.1)
    assert recording.is_over(UNTIL)


def test_a_drain_ends_it(segment: Segment, recording: Recording) -> None:
    assert not recording.is_over(BEGAN)
    segment.start_draining()
    assert recording.is_over(BEGAN)


async def test_one_at_a_time_and_the_word_is_cleared(segment: Segment) -> None:
    segment.words.put(at.H_RECORDING, 5)
    recorder = Recorder(segment, BLOCK, lambda: ("other",))
    assert segment.words.get(at.H_RECORDING) == 0
    with pytest.raises(RequestError) as nothing:
        recorder.stop()
    assert nothing.value.status == 404
    first = recorder.record(60)
    await anext(first)
    assert segment.words.get(at.H_RECORDING) > 0
    with pytest.raises(RequestError) as refused:
        await anext(recorder.record(60))
    assert (refused.value.status, refused.value.code) == (409, "RECORDING_RUNS")
    await first.aclose()
    assert segment.words.get(at.H_RECORDING) == 0
    again = recorder.record(60)
    await anext(again)
    await again.aclose()


async def test_stopped_early_it_has_what_came(segment: Segment) -> None:
    recorder = Recorder(segment, BLOCK, lambda: ("other", "m"))
    stream = recorder.record(60)
    await anext(stream)
    ask(RecordingLog(segment, 1), b"x" * 100, asyncio.get_running_loop().time())
    recorder.stop()
    rest = [json.loads(line) for line in b"".join([part async for part in stream]).splitlines() if line]
    assert rest[0]["input_length"] == 25
    assert rest[-1] == {"recorded": 1, "failed": 0, "lost": 0, "unfinished": 0}


async def test_a_draining_daemon_records_nothing(segment: Segment) -> None:
    segment.start_draining()
    with pytest.raises(RequestError) as refused:
        await anext(Recorder(segment, BLOCK, lambda: ()).record(60))
    assert refused.value.status == 503
