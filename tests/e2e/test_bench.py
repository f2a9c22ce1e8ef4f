"""`pointsman bench` as people call it: against a gateway of two shards, and against servers that cut, lie and hang."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from pointsman.daemon.bench.model import Report, Run, read_report
from pointsman.daemon.main import main
from pointsman.scripts.simulated_engine.launch import launch_engines
from tests.fakes.certificates import Authority
from tests.fakes.gateway import Gateway, gateway
from tests.fakes.scripted_worker import ScriptedWorker, Session

TIMEOUT_S = 50
QUICK = ("--warm-up", "0.2")


@pytest.fixture(scope="module")
def engines() -> Iterator[list[str]]:
    with launch_engines(2) as running:
        yield [engine.url for engine in running]


@pytest.fixture(scope="module")
def gate(engines: list[str]) -> Iterator[Gateway]:
    with gateway(workers=engines) as running:
        yield running


@dataclass(frozen=True)
class Done:
    returncode: int
    stdout: str
    stderr: str


def bench(*arguments: str) -> Done:
    """In this process: a new one would take longer than most of what is measured."""
    output, errors = io.StringIO(), io.StringIO()
    with redirect_stdout(output), redirect_stderr(errors):
        try:
            code = main(["bench", *arguments])
        except SystemExit as exit_:
            code = int(exit_.code or 0)
    return Done(code, output.getvalue(), errors.getvalue())


def report_of(folder: Path) -> Report:
    (path,) = folder.glob("*.json")
    return read_report(path)


def measured(folder: Path, url: str, *arguments: str, code: int = 0) -> Report:
    where = () if "compare" in arguments else ("-u", url)
    done = bench(*where, "--report-dir", str(folder), *QUICK, *arguments)
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return report_of(folder)


def only_run(report: Report) -> Run:
    (run,) = report.runs
    return run


def seconds(stamp: str) -> float:
    return datetime.fromisoformat(stamp).timestamp()


# --- against a gateway


def test_basic_tells_what_happened(gate: Gateway, engines: list[str], tmp_path: Path) -> None:
    began = datetime.now(UTC).timestamp()
    report = measured(tmp_path, gate.url, "basic", "-r", "300", "-c", "8", "-t", "3")
    run = only_run(report)
    assert (run.results.requests, run.results.successful, run.results.errors) == (300, 300, {})
    assert run.results.completion_tokens == 900
    assert run.results.e2e_ms.count == 300
    assert 0 < run.results.e2e_ms.p50 <= run.results.e2e_ms.p99 <= run.results.e2e_ms.max
    assert run.results.ttft_ms.count == 0
    assert run.warm_up.requests > 0
    assert sum(run.workers.values()) == 300
    assert set(run.workers) == set(engines)
    assert began - 0.01 <= seconds(report.start_time) < seconds(run.start_time) < seconds(run.end_time)
    assert seconds(run.end_time) <= seconds(report.end_time) <= datetime.now(UTC).timestamp() + 0.01
    assert seconds(run.start_time) - seconds(report.start_time) >= 0.2  # the warm-up
    assert report.duration_secs == pytest.approx(seconds(report.end_time) - seconds(report.start_time), abs=0.01)
    assert report.configuration["total_requests"] == 300
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".md", ".html"}


def test_the_gateway_is_found_and_its_cost_is_measured(gate: Gateway, tmp_path: Path) -> None:
    run = only_run(measured(tmp_path, gate.url, "basic", "-r", "400", "-c", "8", "-t", "2"))
    assert run.gateway is not None
    assert run.gateway.pid == gate.main_pid
    assert run.gateway.processes >= 4  # supervisor, control, two shards
    assert 5 < run.gateway.cpu_us_per_request < 20_000
    assert run.gateway.pss_mib > 20


def test_the_gateway_is_found_by_its_admin_socket(gate: Gateway, tmp_path: Path) -> None:
    arguments = ("--gateway-admin", f"unix:{gate.socket_path}")
    run = only_run(measured(tmp_path, gate.url, *arguments, "basic", "-r", "20", "-c", "2"))
    assert run.gateway is not None
    assert run.gateway.pid == gate.main_pid


@pytest.mark.parametrize("api", ["chat", "completions", "generate"])
def test_streams_of_every_api_are_read_to_their_end(gate: Gateway, tmp_path: Path, api: str) -> None:
    arguments = ("realistic", "-r", "60", "-c", "4", "--min-tokens", "3", "--max-tokens", "9")
    run = only_run(measured(tmp_path, gate.url, "--api", api, *arguments))
    assert (run.results.successful, run.results.errors) == (60, {})
    assert run.results.ttft_ms.count == 60
    assert run.results.tpot_ms.count == 60
    assert 180 <= run.results.completion_tokens <= 540
    assert run.results.prompt_tokens > 0
    assert run.results.cached_share is not None
    assert run.gateway is not None
    assert run.gateway.cpu_us_per_event is not None


def test_progressive_has_a_run_for_each_level(gate: Gateway, tmp_path: Path) -> None:
    levels = ("--start-concurrency", "2", "--max-concurrency", "60", "--step", "29", "--requests-per-level", "40")
    report = measured(tmp_path, gate.url, "progressive", *levels, "-t", "2")
    assert [run.concurrency for run in report.runs] == [2, 31, 60]
    assert [run.results.requests for run in report.runs] == [40, 62, 120]  # or a level would not be reached
    assert "Throughput against concurrency" in next(tmp_path.glob("*.html")).read_text()


def test_sustained_asks_at_the_rate_for_the_time(gate: Gateway, tmp_path: Path) -> None:
    run = only_run(measured(tmp_path, gate.url, "sustained", "-d", "2", "--rate", "60", "--arrivals", "constant"))
    assert run.results.requests == 120
    assert (run.concurrency, run.rate) == (None, 60)
    assert run.results.throughput_rps == pytest.approx(60, rel=0.1)


def test_prefixes_are_found_again(gate: Gateway, tmp_path: Path) -> None:
    groups = ("--groups", "3", "--prefix-tokens", "800", "--question-tokens", "20")
    run = only_run(measured(tmp_path, gate.url, "prefix", "-r", "60", "-c", "3", "-t", "2", *groups))
    assert run.results.cached_share is not None
    assert run.results.cached_share > 0.7


def test_a_trace_is_asked_with_its_lengths(gate: Gateway, tmp_path: Path) -> None:
    lines = [
        {"timestamp": 20 * n, "input_length": 64, "output_length": 2 + n % 3, "hash_ids": [n % 2]} for n in range(30)
    ]
    trace = tmp_path / "trace.jsonl"
    trace.write_text("\n".join(json.dumps(line) for line in [{"block_size": 64}, *lines]))
    run = only_run(measured(tmp_path / "reports", gate.url, "trace", str(trace), "--warm-up", "0"))
    assert run.results.successful == 30
    assert run.results.completion_tokens == sum(line["output_length"] for line in lines)  # type: ignore[misc]
    assert 0.5 < run.duration_secs < 20


def test_a_trace_of_sessions_is_asked_turn_by_turn(gate: Gateway, tmp_path: Path) -> None:
    lines: list[dict[str, Any]] = []
    for session in range(4):
        for turn in range(3):
            parent = {} if turn == 0 else {"parent": len(lines) - 1, "delay": 0.05}
            ids = [100 * session + block for block in range(turn + 1)]
            lines.append(
                {"session": session, "input_length": 32 * (turn + 1), "output_length": 2, "hash_ids": ids, **parent}
            )
    trace = tmp_path / "sessions.jsonl"
    trace.write_text("\n".join(json.dumps(line) for line in [{"block_size": 32}, *lines]))
    run = only_run(measured(tmp_path / "reports", gate.url, "trace", str(trace), "--rate", "20", "--warm-up", "0"))
    assert run.results.successful == 12
    done = bench("-u", gate.url, "trace", str(trace))
    assert done.returncode == 64
    assert "--rate" in done.stderr


def test_compare_interleaves_and_tells_the_overhead(gate: Gateway, engines: list[str], tmp_path: Path) -> None:
    urls = (f"direct={engines[0]}", f"gateway={gate.url}")
    report = measured(
        tmp_path, gate.url, "compare", *urls, "--rounds", "2", "--slice", "0.3", "-c", "2", "-t", "2", "-s"
    )
    assert [run.name for run in report.runs] == ["direct", "gateway"]
    assert [run.url for run in report.runs] == [engines[0], gate.url]
    assert all(run.results.requests > 0 and run.results.failed == 0 for run in report.runs)
    assert {(one.name, one.baseline, one.measure) for one in report.overheads} == {
        ("gateway", "direct", "e2e"),
        ("gateway", "direct", "ttft"),
    }
    first, second = ([point.at_s for point in run.timeline if point.succeeded_rps] for run in report.runs)
    assert min(second) < max(first), "one after the other instead of in turns"
    assert min(first) < max(second)


def test_interrupted_it_waits_and_writes_its_report(gate: Gateway, tmp_path: Path) -> None:
    arguments = ("-u", gate.url, "--report-dir", str(tmp_path), "--warm-up", "0", "sustained", "-d", "60", "-c", "2")
    command = [sys.executable, "-m", "pointsman.daemon.main", "bench", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    gate.wait_until("requests run", lambda: gate.in_flight() > 0, timeout_s=20)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0, output + errors
    report = report_of(tmp_path)
    assert report.is_interrupted
    assert report.findings[0] == "interrupted before its end"
    assert only_run(report).results.requests > 0
    assert only_run(report).results.failed == 0


def test_diff_of_two_runs(gate: Gateway, tmp_path: Path) -> None:
    for name, clients in (("a", "2"), ("b", "4")):
        measured(tmp_path / name, gate.url, "--json-report", "basic", "-r", "60", "-c", clients, "-t", "2")
    paths = [str(next((tmp_path / name).iterdir())) for name in ("a", "b")]
    assert {path.suffix for path in (tmp_path / "a").iterdir()} == {".json"}
    done = bench("diff", *paths)
    assert done.returncode == 0, done.stderr
    assert "note: concurrency: 2 against 4" in done.stdout
    assert "throughput" in done.stdout
    assert bench("diff", paths[0], paths[0], "--fail-over", "1").returncode == 0
    slow = json.loads(Path(paths[1]).read_text())
    slow["runs"][0]["results"]["e2e_ms"]["p99"] *= 100
    worse = tmp_path / "worse.json"
    worse.write_text(json.dumps(slow))
    done = bench("diff", paths[1], str(worse), "--fail-over", "50")
    assert done.returncode == 1
    assert "end to end p99 is worse" in done.stdout


# --- against servers that are not what they seem

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
EVENT = b'data: {"choices":[{"delta":{"content":"x"},"finish_reason":"stop"}]}\n\n'
MODELS = b'{"data":[{"id":"m"}]}'
MODELS_ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(MODELS), MODELS)


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def stream(*events: bytes, end: bytes = b"0\r\n\r\n") -> bytes:
    return HEAD + b"".join(map(chunk, events)) + end


def server(answer: Callable[[Session, int], None]) -> ScriptedWorker:
    """`answer` is told the number of the request, counted over all connections; /v1/models is answered."""
    lock, numbers = threading.Lock(), iter(range(1 << 30))

    def script(session: Session) -> None:
        while (seen := session.read()) is not None:
            if seen.line.startswith(b"GET"):
                session.write(MODELS_ANSWER)
                continue
            with lock:
                number = next(numbers)
            answer(session, number)

    return ScriptedWorker(script)


GOOD = stream(EVENT, b"data: [DONE]\n\n")


def every(data: bytes) -> Callable[[Session, int], None]:
    return lambda session, _: session.write(data)


def then_close(data: bytes) -> Callable[[Session, int], None]:
    def answer(session: Session, _: int) -> None:
        session.write(data)
        session.sock.close()

    return answer


def odd(data: bytes) -> Callable[[Session, int], None]:
    return lambda session, number: session.write(data if number % 2 else GOOD)


@pytest.mark.parametrize(
    ("answer", "errors"),
    [
        pytest.param(every(GOOD), {}, id="good"),
        pytest.param(odd(stream(EVENT)), {"incomplete": 10}, id="half-without-end"),
        pytest.param(then_close(HEAD + chunk(EVENT)), {"cut": 20}, id="cut-streams"),
        pytest.param(then_close(b""), {"disconnect": 20}, id="closes-without-answer"),
        pytest.param(odd(stream(EVENT, b'data: {"error":{}}\n\n')), {"stream_error": 10}, id="error-events"),
        pytest.param(every(stream(b"data: [DONE]\n\n")), {"incomplete": 20}, id="nothing-but-done"),
        pytest.param(every(MODELS_ANSWER), {"not_a_stream": 20}, id="another-document"),
        pytest.param(every(b"HTTP/1.1 503 No\r\nContent-Length: 0\r\n\r\n"), {"http_503": 20}, id="refuses"),
        pytest.param(every(b"SSH-2.0-x\r\n\r\n"), {"malformed_http": 20}, id="no-http"),
    ],
)
def test_what_a_server_does_wrong_is_counted_by_its_class(
    tmp_path: Path, answer: Callable[[Session, int], None], errors: dict[str, int]
) -> None:
    with server(answer) as fake:
        arguments = ("--warm-up", "0", "basic", "-s", "-r", "20", "-c", "4")
        report = measured(tmp_path, fake.url, *arguments, code=1 if errors else 0)
    run = only_run(report)
    assert run.results.errors == errors
    assert run.results.successful == 20 - sum(errors.values())
    assert run.results.e2e_ms.count == run.results.successful
    assert run.results.requests == 20


def test_a_pause_between_events_ends_nothing(tmp_path: Path) -> None:
    """The benchmark that was here before took a gap of a second for the end, and counted it as success."""

    def answer(session: Session, _: int) -> None:
        session.write(HEAD + chunk(EVENT))
        threading.Event().wait(1.2)
        session.write(chunk(EVENT) + chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n")

    with server(answer) as fake:
        run = only_run(measured(tmp_path, fake.url, "--warm-up", "0", "basic", "-s", "-r", "2", "-c", "2"))
    assert run.results.successful == 2
    assert run.results.inter_token_ms.max >= 1190
    assert run.results.events == 4


def test_what_hangs_is_a_timeout(tmp_path: Path) -> None:
    with server(lambda session, _: session.write(HEAD)) as fake:
        arguments = ("--warm-up", "0", "basic", "-s", "-r", "4", "-c", "2", "-T", "0.5")
        run = only_run(measured(tmp_path, fake.url, *arguments, code=1))
    assert run.results.errors == {"timeout": 4}


def test_an_open_loop_does_not_wait_for_a_server_that_stands_still(tmp_path: Path) -> None:
    """Coordinated omission: one second of standstill at 50 a second is 50 late answers, not one."""
    lock = threading.Lock()

    def answer(session: Session, number: int) -> None:
        with lock:
            if number == 40:
                threading.Event().wait(1.0)
        session.write(GOOD)

    with server(answer) as fake:
        arguments = ("--warm-up", "0", "sustained", "-s", "-d", "3", "--rate", "50", "--arrivals", "constant")
        run = only_run(measured(tmp_path, fake.url, *arguments))
    assert run.results.requests == 150
    assert run.results.e2e_ms.max >= 990
    assert run.results.e2e_ms.p90 >= 400


def test_progressive_stops_where_too_many_fail(tmp_path: Path) -> None:
    running, lock = [0], threading.Lock()

    def answer(session: Session, _: int) -> None:
        with lock:
            running[0] += 1
            is_too_many = running[0] > 6
        threading.Event().wait(0.05)
        session.write(b"HTTP/1.1 429 No\r\nContent-Length: 0\r\n\r\n" if is_too_many else GOOD)
        with lock:
            running[0] -= 1

    with server(answer) as fake:
        levels = ("--start-concurrency", "2", "--max-concurrency", "40", "--step", "10", "--requests-per-level", "10")
        report = measured(tmp_path, fake.url, "--warm-up", "0", "progressive", "-s", *levels)
    assert [run.concurrency for run in report.runs] == [2, 12]
    assert report.runs[-1].results.errors.keys() == {"http_429"}
    assert any("ended at 12 clients" in finding for finding in report.findings)


def test_nobody_there(dead_port: int, tmp_path: Path) -> None:
    done = bench("-u", f"http://127.0.0.1:{dead_port}", "--report-dir", str(tmp_path), "basic")
    assert done.returncode == 69
    assert f"127.0.0.1:{dead_port} does not answer: " in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_server_that_goes_away_is_told_from_one_that_refuses(tmp_path: Path) -> None:
    """Its listener closes after the first answer; clients wait a moment before they try again."""
    fake: list[ScriptedWorker] = []

    def answer(session: Session, number: int) -> None:
        if number == 0:
            fake[0]._listener.shutdown(2)
            fake[0]._listener.close()
        session.write(GOOD.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n", 1))
        session.sock.close()

    started = time.monotonic()
    worker = server(answer)
    fake.append(worker)
    arguments = ("--warm-up", "0", "basic", "-s", "-r", "10", "-c", "1")
    run = only_run(measured(tmp_path, worker.url, *arguments, code=1))
    assert run.results.successful == 1
    assert run.results.errors == {"connect": 9}
    assert time.monotonic() - started >= 0.9


def test_keys_and_headers_are_sent_and_kept_out_of_the_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POINTSMAN_API_KEY", "sk-very-secret")
    with server(every(GOOD)) as fake:
        header = ("--header", "X-Note: hidden-value")
        measured(tmp_path, fake.url, "--warm-up", "0", *header, "basic", "-s", "-r", "2", "-c", "1")
        requests = [fake.seen() for _ in range(3)]
    assert {seen.header(b"authorization") for seen in requests} == {b"Bearer sk-very-secret"}
    assert {seen.header(b"x-note") for seen in requests} == {b"hidden-value"}
    text = "".join(path.read_text() for path in tmp_path.iterdir())
    assert "very-secret" not in text
    assert "hidden-value" not in text


def test_over_tls_and_by_a_name(gate: Gateway, engines: list[str], tmp_path: Path) -> None:
    """A name may have addresses where nobody listens."""
    few = (*QUICK, "basic", "-s", "-r", "10", "-c", "2")
    assert only_run(measured(tmp_path / "plain", f"http://localhost:{gate.port}", *few)).results.successful == 10
    authority = Authority(tmp_path / "authority")
    with gateway(*authority.issue().flags, workers=engines) as secure:
        url = f"https://localhost:{secure.port}"
        report = measured(tmp_path / "secure", url, "--ca-file", str(authority.file), *few)
    assert only_run(report).results.successful == 10


@pytest.mark.slow
@pytest.mark.alone
def test_the_generator_is_cheap_and_exact() -> None:
    """<= 50 µs of CPU time a request, <= 10 µs an event, and latencies that are true."""
    done = bench("self-test")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(" ok") == 4
