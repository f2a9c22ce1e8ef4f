"""Log lines: always one JSON object per line, never at the price of a wait."""

import json
import os
from collections.abc import Iterator

import pytest

from pointsman.daemon.telemetry import logs


@pytest.fixture
def pipe(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    reader, writer = os.pipe()
    monkeypatch.setattr(logs._Sink, "fd", writer)
    monkeypatch.setattr(logs._Sink, "level", logs.FixedLevel("info"))
    monkeypatch.setattr(logs._Sink, "is_journal", False)
    monkeypatch.setattr(logs._Sink, "dropped", 0)
    yield reader
    os.close(reader)
    os.close(writer)


def lines(reader: int) -> list[dict[str, object]]:
    return [json.loads(line) for line in os.read(reader, 1 << 20).splitlines()]


def test_a_line_is_one_json_object(pipe: int) -> None:
    logs.log("worker_up", worker="http://127.0.0.1:1", tries=3)
    (line,) = lines(pipe)
    assert line.pop("ts")
    assert line == {"level": "info", "event": "worker_up", "worker": "http://127.0.0.1:1", "tries": 3}


def test_below_the_threshold_nothing_is_written(pipe: int) -> None:
    logs.set_level("warning")
    logs.log("quiet")
    logs.log("loud", level="error")
    assert [line["event"] for line in lines(pipe)] == ["loud"]


def test_values_of_any_kind_and_size_make_a_line(pipe: int) -> None:
    logs.log("odd", error=ValueError("x\ny"), path="\udcff", long="a" * 100_000)
    logs.log("huge", many=["b" * 1000] * 50)
    odd, huge = lines(pipe)
    assert odd["error"] == "x\ny"
    assert len(str(odd["long"])) <= logs.MAX_FIELD_CHARS + 1
    assert "truncated" in huge


def test_a_stalled_reader_costs_lines_but_never_a_wait(pipe: int) -> None:
    for _ in range(10_000):
        logs.log("spam", filler="c" * 100)
    assert logs._Sink.dropped > 0
    os.read(pipe, 1 << 20)
    dropped = logs._Sink.dropped
    logs.log("after")
    assert lines(pipe)[-1]["dropped_before"] == dropped
