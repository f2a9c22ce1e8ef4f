"""`pointsman record` against the real admin API over a fake daemon: what is written, and how it ends."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pointsman.daemon.cli import record
from pointsman.daemon.cli.trace_file import Spool
from pointsman.scripts.replay.traces import read_trace
from tests.fakes.admin_server import AdminServer, admin_server
from tests.fakes.control_port import error

HEADER = b'{"block_size":128,"block_bytes":512}\n'


class Result(NamedTuple):
    code: int
    out: str
    err: str


Run = Callable[..., Result]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[AdminServer]:
    folder = tmp_path / "run"
    folder.mkdir()
    with admin_server(folder) as running:
        yield running


@pytest.fixture
def run(server: AdminServer, capsys: pytest.CaptureFixture[str]) -> Run:
    def invoke(*argv: str) -> Result:
        try:
            code = record.run(["--admin", f"unix:{server.unix}", *argv])
        except SystemExit as end:
            code = int(end.code or 0)
        captured = capsys.readouterr()
        return Result(code, captured.out, captured.err)

    return invoke


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "traffic.jsonl"


def request(timestamp: float, tokens: int, told: int | None = None, **fields: Any) -> bytes:
    ids = list(range(-(-tokens // 128)))
    line = {"timestamp": timestamp, "input_length": tokens, "output_length": 3, "hash_ids": ids, "model": "m"}
    line |= {"stream": True} | ({} if told is None else {"prompt_tokens": told})
    return json.dumps(line | fields).encode() + b"\n"


def summary(**counts: int) -> bytes:
    return json.dumps({"recorded": 1, "failed": 0, "lost": 0, "unfinished": 0} | counts).encode() + b"\n"


def test_a_trace_in_the_order_of_arrival(server: AdminServer, run: Run, target: Path) -> None:
    server.port.recording = (HEADER, b"\n", request(20, 300), request(10, 40) + request(15, 128), summary(recorded=3))
    result = run("-o", str(target), "--minutes", "2.5")
    assert result.code == 0
    assert f"{target}: 3 requests" in result.out
    assert server.port.calls == [("record", 150)]
    trace = read_trace(target)
    assert trace.block_tokens == 128
    assert [(one.timestamp, one.input_length, one.hash_ids) for one in trace.requests] == [
        (10, 40, (0,)),
        (15, 128, (0,)),
        (20, 300, (0, 1, 2)),
    ]
    assert list(target.parent.glob("*.part")) == []


def test_the_engines_counts_set_the_block_size(server: AdminServer, run: Run, target: Path) -> None:
    """An estimate of 1000 was 750 tokens: so is a block, of every request; a short prompt says nothing of it."""
    told = (request(1, 1000, 750), request(2, 1000, 745), request(3, 1000), request(4, 10, 60), request(5, 1000, 9000))
    server.port.recording = (HEADER, *told, request(6, 2000, 1500), summary())
    assert run("-o", str(target)).code == 0
    trace = read_trace(target)
    assert trace.block_tokens == 96
    assert [one.input_length for one in trace.requests] == [750, 745, 750, 60, 8 * 96, 1500]


def test_gzip_where_the_name_says_so(server: AdminServer, run: Run, tmp_path: Path) -> None:
    server.port.recording = (HEADER, request(1, 300), summary())
    target = tmp_path / "traffic.jsonl.gz"
    assert run("-o", str(target)).code == 0
    assert gzip.decompress(target.read_bytes()).startswith(b'{"block_size":128}\n')
    assert len(read_trace(target).requests) == 1


def test_a_file_is_replaced_only_by_force(server: AdminServer, run: Run, target: Path) -> None:
    target.write_text("mine")
    server.port.recording = (HEADER, request(1, 300), summary())
    refused = run("-o", str(target))
    assert (refused.code, target.read_text()) == (64, "mine")
    assert "--force replaces it" in refused.err
    assert server.port.calls == []
    assert run("-o", str(target), "--force").code == 0
    assert len(read_trace(target).requests) == 1
    assert run("-o", str(target.parent), "--force").code == 64


def test_what_is_missing_is_said(server: AdminServer, run: Run, target: Path) -> None:
    server.port.recording = (HEADER, request(1, 300), summary(lost=7, failed=2, unfinished=1))
    result = run("-o", str(target), "--json")
    assert result.code == 0
    assert "WARNING: 7 requests are missing" in result.err
    assert "2 requests that ended in an error are not in it" in result.err
    assert "1 requests had not ended" in result.err
    told = json.loads(result.out)
    assert (told["lost"], told["failed"], told["unfinished"], told["is_complete"]) == (7, 2, 1, True)


def test_a_daemon_that_breaks_off_leaves_what_came(server: AdminServer, run: Run, target: Path) -> None:
    server.port.recording = (HEADER, request(1, 300))
    result = run("-o", str(target))
    assert result.code == 69
    assert "what came until then is written" in result.err
    assert len(read_trace(target).requests) == 1


def test_no_requests_no_file(server: AdminServer, run: Run, target: Path) -> None:
    server.port.recording = (HEADER, summary(recorded=0))
    assert run("-o", str(target)).code == 1
    assert list(target.parent.glob("traffic*")) == []


def test_a_refusal_leaves_no_file(server: AdminServer, run: Run, target: Path) -> None:
    server.port.breaks_with = error(409, "RECORDING_RUNS", "somebody records already")
    result = run("-o", str(target))
    assert (result.code, "somebody records already" in result.err) == (1, True)
    assert list(target.parent.glob("traffic*")) == []


def test_nobody_there_is_69(run: Run, target: Path) -> None:
    assert run("--admin", f"unix:{target.parent}/nobody.sock", "-o", str(target)).code == 69
    assert list(target.parent.glob("traffic*")) == []


def test_nonsense_is_69(server: AdminServer, run: Run, target: Path) -> None:
    server.port.recording = (b"<html>\n",)
    assert run("-o", str(target)).code == 69


def test_a_folder_that_is_not_there(server: AdminServer, run: Run, tmp_path: Path) -> None:
    result = run("-o", str(tmp_path / "nowhere" / "traffic.jsonl"))
    assert result.code == 1
    assert "No such file" in result.err


@pytest.mark.parametrize("minutes", ["0", "-1", "1441", "nan", "ten"])
def test_bad_minutes_are_64(run: Run, minutes: str) -> None:
    assert run("--minutes", minutes).code == 64


@given(st.lists(st.tuples(st.floats(0, 1e6), st.integers(1, 5000), st.none() | st.integers(0, 10_000)), max_size=30))
def test_every_request_fits_its_blocks(tmp_path_factory: pytest.TempPathFactory, told: list[tuple[Any, ...]]) -> None:
    if not told:
        return
    folder = tmp_path_factory.mktemp("spool")
    with Spool(folder / "part", may_replace=False) as spool:
        spool.add(HEADER)
        for timestamp, tokens, engines in told:
            spool.add(request(timestamp, tokens, engines))
        spool.write_trace(folder / "trace", may_replace=False)
    trace = read_trace(folder / "trace")
    assert [one.timestamp for one in trace.requests] == sorted(timestamp for timestamp, _, _ in told)
    for one in trace.requests:
        assert len(one.hash_ids) == -(-one.input_length // trace.block_tokens)
