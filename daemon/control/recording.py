"""Turns the shards' recorded requests into lines of a trace, for one client of the admin API at a time.

A trace holds prompts as block ids that are equal where the prompts' beginnings are equal. The ids of a recording are
the index's hashes, hashed once more with a key that is drawn for this recording and kept nowhere: neither the running
index nor another recording has the same ids for the same text.

    {"block_size": 128, "block_bytes": 512}                                         first
    {"timestamp": 12.5, "input_length": 300, "output_length": 40, "hash_ids": […], "model": "m", "stream": true,
     "prompt_tokens": 287}                                                          as requests end
    {"recorded": 1, "failed": 0, "lost": 0, "unfinished": 0}                        last

`input_length` is the text's length over BYTES_PER_TOKEN, as routing estimates it, so that it goes with the block size;
`prompt_tokens` is there when the engine told it. `output_length` is 0 where nobody knows.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence

import orjson

from pointsman.config.snapshot import MODEL_OTHER
from pointsman.daemon.errors import Fault, RequestError
from pointsman.daemon.shm import layout as at
from pointsman.daemon.shm.prefix import HashChain
from pointsman.daemon.shm.recording import RecordedRequest, RecordingReader
from pointsman.daemon.shm.segment import Segment
from pointsman.daemon.telemetry.logs import log

TICK_S = 0.1
PULSE_S = 0.5
"""how often an empty line is sent when there is no other: so that either end notices that the other one is gone"""
GRACE_S = 30.0
"""for requests that came in time to end"""
BYTES_PER_TOKEN = 4
ID_BITS = 53
"""what every reader of JSON takes exactly"""
_CLIENT_LEFT = 499

Models = Callable[[], Sequence[str]]


class Recording:
    """One recording, from its begin on. Times are seconds of the monotonic clock."""

    def __init__(self, segment: Segment, block_bytes: int, models: Models, began: float, until: float) -> None:
        self._segment = segment
        self._block_bytes = block_bytes
        self._models = models
        self._began = began
        self._readers = [RecordingReader(segment, shard) for shard in range(segment.layout.shards)]
        self._chain = HashChain(int.from_bytes(os.urandom(8), "little"), block_bytes)
        self._salt = os.urandom(16)
        self.recorded = 0
        self._failed = 0
        self.stop(until)

    def stop(self, until: float) -> None:
        """Requests that arrive from `until` on are not recorded."""
        self.until = until
        self._segment.words.put(at.H_RECORDING, int(until * 1e3))

    def close(self) -> None:
        self._segment.words.put(at.H_RECORDING, 0)

    def is_over(self, now: float) -> bool:
        if self._segment.is_draining:
            return True
        return now >= self.until and (self._running == 0 or now >= self.until + GRACE_S)

    @property
    def _running(self) -> int:
        return sum(reader.running for reader in self._readers)

    def header(self) -> bytes:
        tokens = max(round(self._block_bytes / BYTES_PER_TOKEN), 1)
        return _line({"block_size": tokens, "block_bytes": self._block_bytes})

    def take(self) -> Iterator[bytes]:
        """What has ended since the last time, as lines; shard by shard, so that the caller may do something else."""
        for reader in self._readers:
            records = [record for record in reader.take() if self._is_of_this(record)]
            answered = [record for record in records if _is_answered(record)]
            self.recorded += len(answered)
            self._failed += len(records) - len(answered)
            if answered:
                yield b"".join(map(self._request, answered))

    def _is_of_this(self, record: RecordedRequest) -> bool:
        """A long request may have been taken up by an earlier recording."""
        return self._began <= record.arrived_us / 1e6 < self.until

    def _request(self, record: RecordedRequest) -> bytes:
        models = self._models()
        fields: dict[str, object] = {
            "timestamp": round(record.arrived_us / 1e3 - self._began * 1e3, 3),
            "input_length": max(-(-record.total_chars // BYTES_PER_TOKEN), 1),
            "output_length": max(record.output_tokens, 0),
            "hash_ids": self._ids(record),
            "model": models[record.model] if record.model < len(models) else MODEL_OTHER,
            "stream": record.is_streamed,
        }
        if record.prompt_tokens >= 0:
            fields["prompt_tokens"] = record.prompt_tokens
        return _line(fields)

    def _ids(self, record: RecordedRequest) -> list[int]:
        chain = self._chain.load_ids(record.hashes, self._block_bytes, record.total_chars, self._salt)
        return [block >> (64 - ID_BITS) for block in chain.hash_list()]

    def summary(self) -> bytes:
        lost = sum(reader.lost for reader in self._readers)
        return _line({"recorded": self.recorded, "failed": self._failed, "lost": lost, "unfinished": self._running})


class Recorder:
    """What the admin API asks for."""

    def __init__(
        self, segment: Segment, block_bytes: int, models: Models, now: Callable[[], float] = time.monotonic
    ) -> None:
        self._segment = segment
        self._block_bytes = block_bytes
        self._models = models
        self._now = now
        self._recording: Recording | None = None
        segment.words.put(at.H_RECORDING, 0)  # a predecessor may have died recording

    async def record(self, seconds: float) -> AsyncGenerator[bytes]:
        """Whole lines: header, requests as they end (or an empty line now and then), summary.

        Over after `seconds` or `stop`, once the requests of that time have ended (GRACE_S at most); at once when the
        daemon drains. Raises RequestError 409 while another recording runs, 503 when the daemon drains already.
        """
        recording = self._begin(seconds)
        log("recording_began", seconds=seconds)
        try:
            yield recording.header()
            spoken_at = self._now()
            while not recording.is_over(self._now()):
                await asyncio.sleep(TICK_S)
                for lines in recording.take():
                    yield lines
                    spoken_at = self._now()
                if self._now() - spoken_at >= PULSE_S:
                    yield b"\n"
                    spoken_at = self._now()
            for lines in recording.take():
                yield lines
            yield recording.summary()
        finally:
            recording.close()
            self._recording = None
            log("recording_ended", recorded=recording.recorded)

    def _begin(self, seconds: float) -> Recording:
        if self._recording is not None:
            raise RequestError(409, "RECORDING_RUNS", "somebody records already", fault=Fault.CLIENT)
        if self._segment.is_draining:
            raise RequestError(503, "DRAINING", "the daemon is stopping", fault=Fault.OPERATOR)
        now = self._now()
        self._recording = Recording(self._segment, self._block_bytes, self._models, now, now + seconds)
        return self._recording

    def stop(self) -> None:
        """Ends the recording that runs as if its time were over. Raises RequestError 404 when there is none."""
        if self._recording is None:
            raise RequestError(404, "NO_RECORDING", "nobody records", fault=Fault.CLIENT)
        self._recording.stop(min(self._now(), self._recording.until))


def _is_answered(record: RecordedRequest) -> bool:
    """Or was left by a client that had to wait: its prompt was work all the same."""
    return record.status < 400 or record.status == _CLIENT_LEFT


def _line(value: Mapping[str, object]) -> bytes:
    return orjson.dumps(value) + b"\n"
