"""`pointsman batch run` as a user starts it: progress, results, interruption, mistakes."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from pointsman.scripts.simulated_engine.launch import launch_engines
from tests.fakes.batches import MODEL, chat_line, jsonl
from tests.fakes.gateway import Gateway, gateway
from tests.fakes.processes import wait_until

PACE = ("--model", MODEL, "--preset", "h100-8b")


@pytest.fixture(scope="module")
def gate() -> Iterator[Gateway]:
    with launch_engines(2, *PACE) as engines, gateway(workers=[engine.url for engine in engines]) as running:
        yield running


def start(gate: Gateway, folder: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "pointsman.daemon.main", "batch", "run", "in.jsonl", "-o", "out.jsonl"]
    return subprocess.Popen(
        [*command, "--base-url", f"{gate.url}/v1", *arguments],
        cwd=folder,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=hear_interrupts,  # noqa: PLW1509 - this process has no other threads that hold locks
    )


def hear_interrupts() -> None:
    """As a terminal's foreground job does; these tests may run in a shell's background, which ignores them."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    _, told = process.communicate(timeout=50)
    return process.returncode, told


def ids(path: Path) -> list[str]:
    return [json.loads(line)["custom_id"] for line in path.read_bytes().splitlines()]


def test_answers_and_failures_each_in_their_file(gate: Gateway, tmp_path: Path) -> None:
    lines = [chat_line(f"l{n}") for n in range(30)] + [chat_line("bad", messages="nonsense")]
    (tmp_path / "in.jsonl").write_bytes(jsonl(lines))
    code, told = finish(start(gate, tmp_path))
    assert code == 1, told
    assert ids(tmp_path / "out.jsonl") == [f"l{n}" for n in range(30)]
    (failed,) = map(json.loads, (tmp_path / "out.errors.jsonl").read_bytes().splitlines())
    assert failed["custom_id"] == "bad"
    assert failed["error"]["message"]
    assert "30 of 31 succeeded: out.jsonl" in told
    assert "100 % 31/31, 1 failed" in told
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.errors.jsonl", "out.jsonl"]
    code, told = finish(start(gate, tmp_path))
    assert (code, "is there already" in told) == (64, True)


def test_on_a_terminal_the_progress_is_one_line_that_changes(gate: Gateway, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_bytes(jsonl([chat_line(f"l{n}", max_tokens=20) for n in range(40)]))
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "pointsman.daemon.main", "batch", "run", "in.jsonl", "-o", "out.jsonl"]
    process = subprocess.Popen([*command, "--base-url", gate.url, "--concurrency", "4"], cwd=tmp_path, stderr=theirs)
    os.close(theirs)
    told = b""
    with suppress(OSError):  # what a terminal without writers answers
        while piece := os.read(ours, 4096):
            told += piece
    os.close(ours)
    assert process.wait(10) == 0
    bar, _, report = told.decode().partition("\r\n")
    states = bar.split("\r\033[K")[1:]
    assert "100 % 40/40" in states[-1]
    assert len(set(states)) > 2, "it was seen on its way"
    assert "40 of 40 succeeded: out.jsonl" in report


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_it_goes_on_where_it_was_interrupted(gate: Gateway, tmp_path: Path, number: signal.Signals) -> None:
    count = 160
    (tmp_path / "in.jsonl").write_bytes(jsonl([chat_line(f"l{n}", max_tokens=25) for n in range(count)]))
    before = picks(gate)
    process = start(gate, tmp_path, "--concurrency", "8")
    wait_until("some have been asked", lambda: picks(gate) - before > 16, 30)
    process.send_signal(number)
    code, told = finish(process)
    assert code == (130 if number is signal.SIGINT else -number)
    assert ("the same command goes on" in told) == (number is signal.SIGINT)
    assert not (tmp_path / "out.jsonl").exists()
    code, told = finish(start(gate, tmp_path, "--concurrency", "8"))
    assert code == 0, told
    assert ids(tmp_path / "out.jsonl") == [f"l{n}" for n in range(count)]
    assert picks(gate) - before <= count + 16, "only what was under way was asked again"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]


def picks(gate: Gateway) -> int:
    return sum(worker["picks"] for worker in gate.workers())


def test_another_input_is_not_mixed_up_with_an_interrupted_run(gate: Gateway, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_bytes(jsonl([chat_line(f"l{n}", max_tokens=100) for n in range(50)]))
    before = picks(gate)
    process = start(gate, tmp_path, "--concurrency", "2")
    wait_until("it has begun", lambda: picks(gate) > before, 30)
    code, told = finish(start(gate, tmp_path))
    assert (code, "another process runs this batch" in told) == (1, True)
    process.kill()
    process.communicate()
    (tmp_path / "in.jsonl").write_bytes(jsonl([chat_line("other")]))
    code, told = finish(start(gate, tmp_path))
    assert (code, "interrupted run of another input" in told) == (1, True)


def test_mistakes_are_named_with_their_line(gate: Gateway, tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_bytes(jsonl([chat_line("a"), chat_line("a"), chat_line("b", stream=True)]))
    code, told = finish(start(gate, tmp_path))
    assert code == 1
    assert "in.jsonl:2: line 2 has the custom_id of line 1: 'a'" in told
    assert "in.jsonl:3: a line of a batch cannot be streamed" in told
    source.write_bytes(b'\n{"url": "/v1/nothing"}\n')
    code, told = finish(start(gate, tmp_path))
    assert code == 1
    assert "in.jsonl:2: url must be one of /v1/chat/completions" in told
    source.write_bytes(b"")
    assert "has no lines" in finish(start(gate, tmp_path))[1]


def test_nobody_listens_there(tmp_path: Path, dead_port: int) -> None:
    (tmp_path / "in.jsonl").write_bytes(jsonl([chat_line("a")]))
    command = [sys.executable, "-m", "pointsman.daemon.main", "batch", "run", "in.jsonl", "-o", "out.jsonl"]
    url = f"http://127.0.0.1:{dead_port}"
    done = subprocess.run([*command, "--base-url", url], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 69
    assert f"{url} cannot be reached" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["batch"], "what is to be done?"),
        (["batch", "walk"], "what is to be done?"),
        (["batch", "run", "nothing.jsonl", "-o", "x"], "nothing.jsonl is no file"),
        (["batch", "run", "in.jsonl"], "-o/--output"),
        (["batch", "run", "in.jsonl", "-o", "x", "--concurrency", "0"], "positive"),
        (["batch", "run", "in.jsonl", "-o", "x", "--base-url", "localhost"], "http://HOST:PORT"),
        (["batches", "--limit", "0"], "--limit"),
    ],
)
def test_usage(tmp_path: Path, arguments: list[str], told: str) -> None:
    (tmp_path / "in.jsonl").touch()
    command = [sys.executable, "-m", "pointsman.daemon.main", *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 64
    assert told in done.stderr


def test_batches_of_a_daemon_that_is_not_there(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pointsman.daemon.main", "batches"]
    environment = os.environ | {"RUNTIME_DIRECTORY": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 69
    assert "Is the daemon running, and with --batch-store?" in done.stderr
